"""Broyden's (good) method in limited memory, from one history: the steps."""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from .. import checks
from ..backend import Array
from ..space import History, Row, State
from ..system import System
from .base import Point, Solver


class Memory(NamedTuple):
    """The last m steps, the last one, the matrix that makes coefficients of products with them, and constants."""

    steps: History
    last: Row
    coefficients: Array
    here: Any
    others: Any
    one: Array


@dataclass(frozen=True, kw_only=True)
class Broyden(Solver):
    r"""Broyden's method on F(h) - h, the inverse Jacobian built from the steps alone.

    With s_j the steps and B₀ = -I, a Broyden step is

    .. math::
        s_k = \frac{z_k}{1 - α_{k-1}}, \quad z_0 = r_k, \quad z_{j+1} = z_j + α_j s_{j+1}, \quad
        α_j = \frac{⟨s_j, z_j⟩}{‖s_j‖²},

    so one history suffices. The α are linear in the products ⟨s_j, r_k⟩, through a triangular matrix that depends on
    the steps only: it is kept, inverted, as m × m coefficients, one row of which is new at each step. The oldest step
    makes room for the newest.

    Parameters
    ----------
    memory
        m, how many steps (states) are held.
    rtol, atol, max_steps, check_every
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

    steps_anew: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "memory", checks.integer("memory", self.memory, 1))

    def init(self, system: System, x: State) -> Memory:
        space, m = system.space, self.memory
        here, table = space.eye(m), space.backend.table
        constants = table(here), table(1 - here), space.scalar(1.0)
        return Memory(space.history(m), space.row(space.zeros()), space.matrices(m, m), *constants)

    def step(self, system: System, memory: Memory, point: Point) -> tuple[State, Memory]:
        space, m = system.space, self.memory
        backend, slot, previous = space.backend, point.index % m, (point.index - 1) % m
        first, full = point.index == 0, not isinstance(point.index, int) or point.index >= m
        r, coefficients = space.row(point.residual), memory.coefficients
        n = space.rows_in_use(memory.steps, point.index)
        past = space.head(memory.steps, n)

        step = r
        if first is not True:
            of_last, of_r = space.products_of_two(memory.last, r, past)
            row = memory.here[previous] + backend.combine(of_last, backend.head(coefficients, 1, n))
            row = row / backend.entry(of_last, previous)
            if first is not False:
                (row,) = space.where(first, (space.xp.zeros_like(row),), (row,))
            coefficients = backend.set_row(coefficients, slot, row)

            # alpha holds at slot j + 1 the coefficient of step j + 1, so `newest` is the one of the step to be made.
            alpha = backend.products(of_r, backend.head(coefficients, 2, n))
            rest = backend.axpy(-1.0, backend.entry(alpha, slot), memory.one)
            if full:  # the oldest step is forgotten
                alpha, coefficients = alpha * memory.others[slot], coefficients * memory.others[slot]
            step = space.divide(space.combine_onto(r, backend.head(alpha, 2, n), past), rest)
        steps = space.set_row(memory.steps, slot, step)
        return space.add(point.x, space.state(step)), memory._replace(steps=steps, last=step, coefficients=coefficients)
