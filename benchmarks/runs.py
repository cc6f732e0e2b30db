"""Runs of many trainings: a file for each result, workers, and a time after which they stop and can go on."""

import json
import multiprocessing
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing.synchronize import Event
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, TypeVar

import numpy as np
import torch

from implicit_core.examples.program import Stop, TrainingError, write

R = TypeVar("R", bound="Run")


class ResultError(TrainingError):
    """Why a result or a checkpoint cannot be used, in a sentence."""


class Run(ABC):
    """A run and its files: a result in the end, and a checkpoint while it goes on."""

    @property
    @abstractmethod
    def settings(self) -> Any:
        """What determines it, a dataclass."""

    @property
    @abstractmethod
    def result(self) -> Path:
        """The file of its result."""

    @property
    @abstractmethod
    def unfinished(self) -> Path:
        """The file of its checkpoint."""

    def finished(self) -> bool:
        """Whether there is a result.

        Raises
        ------
        ResultError
            If it was made with other settings, or is no result.
        """
        if not self.result.exists():
            return False
        remedy = "remove it, or choose another --results"
        try:
            same = json.loads(self.result.read_text())["settings"] == plain(self.settings)
        except (KeyError, TypeError, ValueError) as error:
            raise ResultError(f"{self.result} is from another version, or damaged: {remedy}") from error
        if not same:
            raise ResultError(f"{self.result} was made with other settings: {remedy}")
        return True

    def finish(self, record: dict[str, Any]) -> None:
        """Write the result, and remove the checkpoint."""
        write_json(self.result, record)
        self.unfinished.unlink(missing_ok=True)

    def save(self, state: dict[str, Any]) -> None:
        """Write a checkpoint."""
        write(self.unfinished, lambda file: torch.save({"settings": plain(self.settings), **state}, file))

    def restore(self, load: Callable[[dict[str, Any]], object], device: torch.device | str = "cpu") -> None:
        """Load what the checkpoint has, if there is one.

        Raises
        ------
        ResultError
            If it was made with other settings, or ``load`` finds something else in it.
        """
        if not self.unfinished.exists():
            return
        remedy = "remove it, or pass --restart"
        try:
            state: dict[str, Any] = torch.load(self.unfinished, map_location=device, weights_only=True)
            same = state["settings"] == plain(self.settings)
            if same:
                load(state)
        except Exception as error:  # of any type, which depends on the bytes
            raise ResultError(f"{self.unfinished} is from another version, or damaged: {remedy}") from error
        if not same:
            raise ResultError(f"{self.unfinished} was made with other settings: {remedy}")


def plain(settings: Any) -> dict[str, Any]:
    """Settings as JSON has them."""
    found: dict[str, Any] = json.loads(json.dumps(asdict(settings)))
    return found


def make_all(runs: Sequence[R], execute: Callable[[R], object], *, workers: int, restart: bool) -> None:
    """Make the runs that have no result.

    Parameters
    ----------
    runs
        All runs.
    execute
        Makes a run, or the rest of it; a function that can be pickled.
    workers
        Runs at a time, each in a process.
    restart
        Remove results and checkpoints of these runs first.

    Raises
    ------
    ResultError
        If there are results of other settings, or the folders can't be written.
    """
    left = [run for run in runs if restart or not run.finished()]
    for folder in dict.fromkeys(path.parent for run in left for path in (run.result, run.unfinished)):
        require_writable(folder)
    if restart:
        for run in runs:
            run.result.unlink(missing_ok=True)
            run.unfinished.unlink(missing_ok=True)
    say(f"{len(left)} runs to make, {len(runs) - len(left)} finished")
    begun = time.perf_counter()

    def tell(done: int) -> None:
        minutes = (time.perf_counter() - begun) / 60
        say(
            f"{done} of {len(left)} runs in {minutes:.0f} min, about {minutes / done * (len(left) - done):.0f} min left"
        )

    if workers == 1:
        with _stop:
            for done, run in enumerate(left, 1):
                _execute_unless_finished(execute, run)
                tell(done)
        return
    context = multiprocessing.get_context("spawn")
    ask = context.Event()
    pool = ProcessPoolExecutor(workers, context, initializer=_obey, initargs=(ask,))
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        futures = [pool.submit(_execute_unless_finished, execute, run) for run in left]
        for done, future in enumerate(as_completed(futures), 1):
            future.result()
            tell(done)
    finally:
        ask.set()
        pool.shutdown(cancel_futures=True)
        signal.signal(signal.SIGTERM, before)


def _execute_unless_finished(execute: Callable[[R], object], run: R) -> None:
    """Another command may have finished it meanwhile."""
    if not run.finished():
        execute(run)


_stop = Stop()
_ask: Event | None = None


def interrupted() -> bool:
    """Whether Ctrl-C, SIGTERM or the parent of a worker asks for a stop.

    A run looks between two steps, so that none is done by half.
    """
    return _stop.asked or (_ask is not None and _ask.is_set())


def _obey(ask: Event) -> None:
    """What a worker does first. The terminal interrupts all processes; other signals reach the parent alone."""
    global _ask
    _ask = ask
    _stop.__enter__()


def require_writable(folder: Path) -> None:
    """Raise :class:`ResultError` if files can't be written there, which is better known before a training."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ResultError(f"{folder} can't be written: {error.strerror}") from error


def say(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def rounded(tree: Any) -> Any:
    """A record with six digits of each number, and None for numbers that are not finite."""
    if isinstance(tree, dict):
        return {name: rounded(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [rounded(value) for value in tree]
    if isinstance(tree, float):
        return float(f"{tree:.6g}") if np.isfinite(tree) else None
    return tree


def write_json(file: Path, record: dict[str, Any]) -> None:
    """Write a record, with six digits of each number."""
    write(file, lambda to: to.write((json.dumps(rounded(record), indent=1) + "\n").encode()))
