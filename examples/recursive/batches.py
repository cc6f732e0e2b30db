"""What the training loops of all frameworks share: the places of a batch, and the sums over steps."""

from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Protocol

import numpy as np

from ..program import TrainingError
from .sudoku import Array

SOLVED = 0.1
"""Weight of the loss of the model's belief that it is right."""


class Schedule(Protocol):
    """The settings of a training loop, see :class:`.settings.Settings`."""

    # Properties, since settings are not assigned to.
    @property
    def steps(self) -> int: ...  # noqa: D102
    @property
    def batch(self) -> int: ...  # noqa: D102
    @property
    def supervisions(self) -> int: ...  # noqa: D102
    @property
    def rate(self) -> float: ...  # noqa: D102
    @property
    def decay(self) -> float: ...  # noqa: D102
    @property
    def warm_up(self) -> int: ...  # noqa: D102
    @property
    def average(self) -> float: ...  # noqa: D102


class Places:
    """The places of a batch. An example stays in its place for some steps, and the places are filled in turn.

    So every batch holds examples of all ages.

    Parameters
    ----------
    schedule
        Has the sizes, ``batch`` and ``supervisions``.
    examples
        How many there are.
    permutation
        Called with this number for each pass over the examples: integers in random order.

    Attributes
    ----------
    rows
        The example in each place: integers (batch,).
    """

    def __init__(self, schedule: Schedule, examples: int, permutation: Callable[[int], Array]) -> None:
        if schedule.batch > examples:
            raise TrainingError(f"A batch of {schedule.batch} is more than the {examples} examples to train on.")
        self.supervisions, self.permutation = schedule.supervisions, permutation
        self.rows: Array = np.zeros(schedule.batch, dtype=np.int64)
        self.order, self.used = permutation(examples), 0

    def fill(self, done: int) -> Array:
        """Put new examples where old ones have had all their steps, and into all places at first.

        Parameters
        ----------
        done
            Steps made.

        Returns
        -------
        booleans (batch,)
            The places that were filled.
        """
        places = np.arange(len(self.rows))
        due: Array = (places + done) % self.supervisions == 0 if done else places >= 0
        count = int(due.sum())
        if self.used + count > len(self.order):
            self.order, self.used = self.permutation(len(self.order)), 0
        self.rows[due] = self.order[self.used : self.used + count]
        self.used += count
        return due


@dataclass
class Totals:
    """Sums over training steps: of the loss, of the shares of right cells and of solved puzzles, and of residuals."""

    steps: int = 0
    loss: float = 0.0
    cells: float = 0.0
    exact: float = 0.0
    residual: float = 0.0

    def add(self, *numbers: float) -> None:
        """Count a step: its loss, shares and residual."""
        steps, *sums = astuple(self)
        self.steps = steps + 1
        self.loss, self.cells, self.exact, self.residual = (a + b for a, b in zip(sums, numbers, strict=True))

    def means(self) -> dict[str, float]:
        """Loss, right cells, solved puzzles and relative residual, by name."""
        names = ("loss", "cells", "exact", "residual")
        return {name: getattr(self, name) / max(self.steps, 1) for name in names}
