"""Training states as files."""

from pathlib import Path
from typing import IO, Any

import torch

from .. import program
from .settings import Settings
from .training import Training


def save(training: Training, path: Path) -> None:
    """Write the state, whole or not at all."""
    program.write(path, lambda file: torch.save(training.state(), file))


def restore(training: Training, path: Path) -> None:
    """Read a state into a training run.

    Raises
    ------
    TrainingError
        If the file has no state, or a state of other settings.
    """

    def load(file: IO[bytes]) -> tuple[dict[str, Any], Settings]:
        state: dict[str, Any] = torch.load(file, weights_only=True)
        return state, Settings(**state["settings"])

    state, stored = program.read(path, load)
    program.require_same(path, stored.flags(), training.settings.flags())
    training.restore(state)
