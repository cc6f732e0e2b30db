"""Broyden's (good) method in limited memory, from one history: the steps."""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from .. import checks
from ..arrays import Array, History, Matrices, Row, State
from ..carry import Point
from ..space import Space, head
from ..system import System
from .base import Solver

LEAST = 1e-3
"""The least 1 - α, as which a smaller one counts: the update is singular where it is zero.

The update is then damped, and as regular as any (J. J. Moré and J. A. Trangenstein, On the global convergence of
Broyden's method, Math. Comp. 30 (1976), damp it so).
"""


class Memory(NamedTuple):
    """The last m steps, the last one, the matrix that turns products with them into coefficients, and constants."""

    steps: History
    last: Row
    coefficients: Matrices
    here: Any
    others: Any
    one: Array
    least: Array


@dataclass(frozen=True, kw_only=True, repr=False)
class Broyden(Solver):
    r"""Broyden's method on F(h) - h, the inverse Jacobian built from the steps alone.

    With s_j the steps and B₀ = -I, a Broyden step is

    .. math::
        s_k = \frac{z_k}{1 - α_{k-1}}, \quad z_0 = r_k, \quad z_{j+1} = z_j + α_j s_{j+1}, \quad
        α_j = \frac{⟨s_j, z_j⟩}{‖s_j‖²},

    so one history suffices. The α are linear in the products ⟨s_j, r_k⟩, through a triangular matrix that depends on
    the steps only: it is kept, inverted, as m × m coefficients, one row of which is new at each step. The oldest step
    makes room for the newest. A denominator that is nearly zero, as in the first update of a skew map, counts as 0.001.

    Parameters
    ----------
    memory
        m, how many steps (states) are held.
    rtol, atol, max_steps, check_every, freeze, check
        As for :class:`Solver`.

    Raises
    ------
    TypeError, ValueError
        If a setting is of a wrong kind or out of range.

    References
    ----------
    C. G. Broyden, A class of methods for solving nonlinear simultaneous equations, Math. Comp. 19 (1965).
    C. T. Kelley, Iterative Methods for Linear and Nonlinear Equations (1995), section 7.3, on storing steps only.

    Examples
    --------
    >>> import numpy as np
    >>> import implicit_core as ic
    >>> solution = ic.solve(lambda h, z: np.cos(h) + z, np.array(1.0), np.array(0.0), solver=ic.Broyden(rtol=1e-9))
    >>> round(float(solution.value), 6), int(solution.stats.evaluations) < 10
    (0.739085, True)
    """

    memory: int = 20

    copies_results: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "memory", checks.integer("memory", self.memory, 1))

    def init(self, system: System, x: State) -> Memory:
        space, m = system.space, self.memory
        here = space.eye(m)[:, None, None, :]  # rows (1, 1, m)
        constants = space.table(here), space.table(1 - here), space.scalar(1.0), space.scalar(LEAST)
        return Memory(space.history(m), space.row(space.zeros()), space.matrices(m, m), *constants)

    def step(self, system: System, memory: Memory, point: Point) -> tuple[State, Memory]:
        space, m = system.space, self.memory
        slot, previous = point.index % m, (point.index - 1) % m
        first, full = point.index == 0, not isinstance(point.index, int) or point.index >= m
        r, coefficients = space.row(point.residual), memory.coefficients
        past = space.rows_in_use(memory.steps, point.index)
        n = past[0].shape[1]

        step = r
        if first is not True:
            # Both in one pass over the history. Decision 19.
            products = space.products(_stacked(space, memory.last, r), past)
            of_last, of_r = space.take(products, 0, 1), space.take(products, 1, 1)
            row = memory.here[previous] + space.matmul(of_last, head(coefficients, 1, n))
            # A finished sample would divide by zero here, and then by the rest.
            active = point.active if self.freeze else None
            row = row / space.divisor(space.take(of_last, previous, 2), point.norm, active)
            if first is not False:
                row = space.select(first, space.xp.zeros_like(row), row)
            coefficients = space.set_matrix_row(coefficients, slot, row)

            # alpha holds at slot j + 1 the coefficient of step j + 1, and at this slot the one of the step to be made.
            alpha = space.matmul(of_r, space.xp.matrix_transpose(head(coefficients, 2, n)))
            rest = space.multiply_add(-1.0, space.take(alpha, slot, 2), memory.one)
            rest = space.xp.where(space.xp.abs(rest) < LEAST, memory.least, rest)
            if full:  # the oldest step is forgotten
                others = memory.others[slot]
                alpha, coefficients = alpha * others, coefficients * others
            combined = space.combine(head(alpha, 2, n), past, onto=r)
            step = Row(tuple(a / rest for a in combined))
        steps = space.set_row(memory.steps, slot, step)
        return space.add(point.x, space.state(step)), memory._replace(steps=steps, last=step, coefficients=coefficients)


def _stacked(space: Space, x: Row, y: Row) -> Row:
    return Row(tuple(space.xp.concat([a, b], axis=1) for a, b in zip(x, y, strict=True)))
