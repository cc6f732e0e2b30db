"""Any root finder as a solver."""

from collections.abc import Callable
from dataclasses import dataclass

from .. import checks
from ..backend import PyTree
from ..problem import Problem
from .fixed_point_iteration import FixedPointIteration


@dataclass(frozen=True)
class CallableSolver:
    """A callable ``(problem, h0, z) -> h`` as a solver; what it returns is judged by one evaluation of F.

    ``solve`` wraps a bare callable in this with the default tolerances. Samples within them are CONVERGED, the others
    STAGNATED or NONFINITE: only the callable knows why it stopped.

    Parameters
    ----------
    function
        Gets the :class:`Problem`, itself callable as F(h, z), ``h0`` and ``z``; returns h shaped as h0.
    rtol, atol
        As for :class:`Solver`.

    Examples
    --------
    >>> import numpy as np
    >>> import implicit_core as ic
    >>> def bisection(problem, h0, z):
    ...     low, high = h0 - 2.0, h0 + 2.0
    ...     for _ in range(60):
    ...         middle = (low + high) / 2
    ...         below = problem(middle, z) > middle
    ...         low, high = np.where(below, middle, low), np.where(below, high, middle)
    ...     return middle
    >>> solution = ic.solve(lambda h, z: np.cos(h) + z, np.array(0.0), np.array(0.0), solver=bisection)
    >>> round(float(solution.value), 6), int(solution.stats.evaluations)
    (0.739085, 61)
    """

    function: Callable[[Problem, PyTree, PyTree], PyTree]
    rtol: float = 1e-5
    atol: float | None = None

    def __post_init__(self) -> None:
        checks.function("function", self.function)
        self.judge()

    def judge(self) -> FixedPointIteration:
        """The settings of the one evaluation that judges the result."""
        return FixedPointIteration(rtol=self.rtol, atol=self.atol, max_steps=1)
