"""The settings of a layer that are arrays, separated from those that a program is specific to (Decision 110).

A program that JAX keeps must not refer to a tracer, and a function that JAX maps must not close over one. So arrays in
the solver and in the estimator are arguments there, as the arrays of z are.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

from implicit_core.arrays import PyTree
from implicit_core.estimators import Estimator
from implicit_core.layer import LayerOptions
from implicit_core.preconditioner import Preconditioner
from implicit_core.records import Record, is_array
from implicit_core.solvers import FixedPointSolver

from .leaves import Arrays, Static, partition

R = TypeVar("R")
"""A record, or another solver."""


class StaticOptions(NamedTuple):
    """The options of a layer, without the arrays in its solver and its estimator.

    Two of them are equal, and have one hash, if the same program serves both. A solver of the user's own that is no
    record is hashed and compared as it is.
    """

    solver: Static[FixedPointSolver]
    gradient: Static[Estimator]
    throw: bool
    trace: bool
    examine: Callable[[PyTree, PyTree], None] | None

    @property
    def self_contained(self) -> bool:
        """See :class:`Static`."""
        return self.solver.self_contained and self.gradient.self_contained

    def join(self, arrays: Arrays) -> LayerOptions:
        """The options that have these arrays."""
        n = len(self.solver.indices)
        solver, gradient = self.solver.combine(arrays[:n]), self.gradient.combine(arrays[n:])
        return LayerOptions(solver, gradient, self.throw, self.trace, self.examine)


def split(options: LayerOptions) -> tuple[StaticOptions, Arrays]:
    """The options without the arrays in them, and these arrays: the solver's, then the estimator's.

    ``static.join(arrays)`` is the inverse.
    """
    of_solver, solver = split_record(options.solver)
    of_gradient, gradient = split_record(options.gradient)
    static = StaticOptions(solver, gradient, options.throw, options.trace, options.examine)
    return static, [*of_solver, *of_gradient]


def split_record(record: R) -> tuple[Arrays, Static[R]]:
    """The arrays in a record, and the rest of it. A solver that is no record has none."""
    return partition(record, is_array, self_contained=_is_ours(record))


def _is_ours(record: object) -> bool:
    """Whether the code of a record is this package's, which reads nothing besides its settings."""
    if type(record).__module__.partition(".")[0] != __package__.partition(".")[0] or isinstance(record, Preconditioner):
        return False
    return all(_is_ours(x) for x in vars(record).values() if isinstance(x, Record))
