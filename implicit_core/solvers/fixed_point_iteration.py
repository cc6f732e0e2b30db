"""Damped fixed-point iteration (Eq. 13)."""

from dataclasses import dataclass
from typing import ClassVar

from .. import checks, settings
from ..arrays import Count, Real, State
from ..carry import Point
from ..system import System
from .base import Solver


@dataclass(frozen=True, kw_only=True, repr=False)
class FixedPointIteration(Solver):
    """h ← λ F(h, z) + (1 - λ) h, Eq. (13) of the paper; Eq. (10) for λ = 1.

    Converges where the step is a contraction. The cheapest step there is, and no memory.

    Parameters
    ----------
    damping
        λ in (0, 1]: a number, or an array that broadcasts to the batch, one for each sample.
    rtol, atol, max_steps, check_every, patience, freeze, stop, check
        As for :class:`Solver`.

    Raises
    ------
    TypeError, ValueError
        If a setting is of a wrong kind or out of range.

    Examples
    --------
    >>> import numpy as np
    >>> import implicit_core as ic
    >>> solver = ic.FixedPointIteration(rtol=1e-9)
    >>> solution = ic.solve(lambda h, z: np.cos(h) + z, np.array(1.0), np.array(0.0), solver=solver)
    >>> round(float(solution.value), 6)
    0.739085
    """

    damping: Real = 1.0

    of_samples: ClassVar[frozenset[str]] = Solver.of_samples | {"damping"}
    keeps_best: ClassVar[bool] = False
    copies_results: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "damping", checks.real("damping", self.damping, 0.0, 1.0, low_open=True))

    def init(self, system: System, x: State) -> None:
        return None

    def step(self, system: System, memory: None, point: Point) -> tuple[State, None]:
        if settings.is_one(self.damping):
            return point.f, None
        return system.space.axpy(self.damping, point.residual, point.x), None


def steps(n: Count, *, damping: Real = 1.0) -> FixedPointIteration:
    """The solver that makes exactly n steps, as recursive models do: ``FixedPointIteration`` with tolerances of zero.

    n steps evaluate F n times, and F is not evaluated at the result. A layer with it names its gradient:
    ``solver=steps(n), gradient=Unroll(k, 1.0)`` is n steps without a graph and k with one.

    Parameters
    ----------
    n
        How many steps, at least 0: a number, or an array of integers that broadcasts to the batch, one for each sample.
    damping
        λ in (0, 1].

    Raises
    ------
    TypeError, ValueError
        If n is no integer or is negative, or the damping is out of range.

    Examples
    --------
    >>> import numpy as np
    >>> import implicit_core as ic
    >>> solution = ic.solve(lambda h, z: 0.5 * h + z, np.zeros(2), np.ones(2), solver=ic.steps(3))
    >>> solution.value, solution.stats.evaluations
    (array([1.75, 1.75]), 3)
    """
    n = checks.count("n", n, 0)
    return FixedPointIteration(rtol=0.0, atol=0.0, max_steps=n, damping=damping)
