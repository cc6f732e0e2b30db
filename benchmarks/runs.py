"""Runs of many trainings: a file for each result, workers, and a time after which they stop and can go on."""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

R = TypeVar("R", bound="Run")


class ResultError(Exception):
    """Why a result or a checkpoint cannot be used, in a sentence."""


class Run(Protocol):
    """A run and its files."""

    @property
    def result(self) -> Path:
        """The file of its result."""
        ...

    @property
    def unfinished(self) -> Path:
        """The file of its checkpoint."""
        ...

    def finished(self) -> bool:
        """Whether there is a result.

        Raises
        ------
        ResultError
            If it was made with other settings.
        """
        ...


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
    """
    if restart:
        for run in runs:
            run.result.unlink(missing_ok=True)
            run.unfinished.unlink(missing_ok=True)
    left = [run for run in runs if not run.finished()]
    say(f"{len(left)} runs to make, {len(runs) - len(left)} finished")
    begun = time.perf_counter()

    def tell(done: int) -> None:
        minutes = (time.perf_counter() - begun) / 60
        say(
            f"{done} of {len(left)} runs in {minutes:.0f} min, about {minutes / done * (len(left) - done):.0f} min left"
        )

    if workers == 1:
        for done, run in enumerate(left, 1):
            if not run.finished():  # by another process meanwhile
                execute(run)
            tell(done)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(execute, run) for run in left]
        for done, future in enumerate(as_completed(futures), 1):
            future.result()
            tell(done)


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


def write(file: Path, write: Callable[[Path], object]) -> None:
    """Write a file; whatever happens meanwhile, it is the old one or the new one, and whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{os.getpid()}-{file.name}")
    write(temporary)
    os.replace(temporary, file)
