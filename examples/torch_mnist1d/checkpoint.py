"""Training states as files."""

import io
import os
import pickle
from pathlib import Path
from typing import Any

import torch

from .settings import Settings
from .training import Training, TrainingError


def save(training: Training, path: Path) -> None:
    """Write the state; whatever happens meanwhile, the file is the old one or the new one, and whole."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            torch.save(training.state(), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise TrainingError(f"{path} can't be written: {error.strerror}.") from error


def restore(training: Training, path: Path) -> None:
    """Read a state into a training run.

    Raises
    ------
    TrainingError
        If the file has no state, or a state of other settings.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TrainingError(f"{path} can't be read: {error.strerror}.") from error
    try:
        state: dict[str, Any] = torch.load(io.BytesIO(content), weights_only=True)
        stored = Settings(**state["settings"])
    except (EOFError, KeyError, OSError, RuntimeError, TypeError, ValueError, pickle.UnpicklingError) as error:
        raise TrainingError(f"{path} is not a checkpoint of this program, or is damaged.") from error
    theirs, ours = stored.flags(), training.settings.flags()
    differing = [f"{flag} {theirs[flag]}" for flag in theirs if theirs[flag] != ours.get(flag)]
    if differing:
        raise TrainingError(f"{path} was made with {' '.join(differing)}: resume with the same settings.")
    training.restore(state)
