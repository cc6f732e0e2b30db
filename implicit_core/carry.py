"""What the loop of the solvers carries from one evaluation of F to the next."""

from typing import Any, NamedTuple

from .arrays import History, Index, Mask, Numbers, State
from .backend import Known
from .progress import Progress
from .space import Space

GOING_ON = -1
"""Stands for a status in samples that a solver has not ended."""


class Point(NamedTuple):
    """The last evaluation of F.

    Attributes
    ----------
    x, f, residual
        The point, F there, and F(x) - x; states.
    norm, f_norm
        ‖F(x) - x‖₂ and ‖F(x)‖₂, (N, 1).
    active
        Samples that are not finished, (N, 1).
    index
        How many evaluations came before this one.
    accepted
        Where the solver's ``accepts`` held, for ``step``; None before that.
    """

    x: State
    f: State
    residual: State
    norm: Numbers
    f_norm: Numbers
    active: Mask
    index: Index
    accepted: Known | None = None


class Count(NamedTuple):
    """An integer for each sample. One int stands for all samples while they agree, and costs no array operation."""

    value: Numbers | int

    def array(self, space: Space) -> Numbers:
        """(N, 1)."""
        return space.full(self.value, space.xp.int32) if isinstance(self.value, int) else self.value

    def plus_one(self, space: Space, mask: Known) -> "Count":
        """One more in the samples of ``mask``."""
        if isinstance(mask, bool):
            return Count(self.value + 1) if mask else self
        return Count(space.plus_one(self.array(space), mask))

    def replace(self, space: Space, mask: Known, other: "Count") -> "Count":
        """``other`` in the samples of ``mask``."""
        if isinstance(mask, bool):
            return other if mask else self
        return Count(space.select(mask, other.value, self.array(space)))


class Best(NamedTuple):
    """Each sample's point of least residual so far, its norms, and how many steps it took."""

    x: State
    norm: Numbers
    f_norm: Numbers
    steps: Count


class Carry(NamedTuple):
    """What the loop carries. What a solve does not keep is None throughout.

    Attributes
    ----------
    point, steps, best, trace, memory
        The last evaluation, each sample's count of evaluations, its best point, its residuals, the solver's memory.
    progress
        What decides whether a sample has converged or ends early; None where the number of steps is forced.
    settled
        Each sample's residual when it was last active. If F takes samples for themselves, it stays as it was.
    stopped
        Samples that the solver's ``stop`` has ended, (N, 1).
    """

    point: Point
    progress: Progress | None
    settled: Numbers | None
    steps: Count
    best: Best | None
    trace: History | None
    memory: Any
    stopped: Mask | None = None


def least_residual(space: Space, made: Progress, best: Best | None, point: Point) -> Numbers:
    """The least residual so far, (N, 1)."""
    if made.least is not None:
        return made.least
    assert best is not None
    least: Numbers = space.xp.minimum(best.norm, point.norm)
    return least
