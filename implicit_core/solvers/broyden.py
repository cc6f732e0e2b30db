"""Broyden's (good) method in limited memory, from one history: the steps."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from .. import checks
from ..backend import Array
from ..space import History, State
from ..system import System
from .base import Point, Solver


class Memory(NamedTuple):
    """The last m steps, the matrix that turns products with them into coefficients, and one-hot rows and the rest."""

    steps: History
    coefficients: Array
    here: Any
    others: Any


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

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "memory", checks.integer("memory", self.memory, 1))

    def init(self, system: System, x: State) -> Memory:
        space, m = system.space, self.memory
        one_hot, table = space.eye(m), space.backend.table
        return Memory(space.history(m), space.matrices(m, m), table(one_hot), table(1 - one_hot))

    def step(self, system: System, memory: Memory, point: Point) -> tuple[State, Memory]:
        space, slot = system.space, point.index % self.memory
        backend, here, others = space.backend, memory.here[slot], memory.others[slot]
        r = space.row(point.residual)

        # alpha holds at slot j + 1 the coefficient of step j + 1, so `newest` is the one of the step to be made.
        alpha = backend.products(space.products(r, memory.steps), memory.coefficients)
        newest = backend.entry(alpha, slot)
        step = space.divide(space.combine_onto(r, alpha * others, memory.steps), 1 - newest)

        steps = space.set_row(memory.steps, slot, step)
        coefficients = memory.coefficients * others
        products = space.products(step, steps)
        row = (here + backend.combine(products, coefficients)) / backend.entry(products, slot)
        coefficients = backend.set_row(coefficients, (slot + 1) % self.memory, row)
        return space.add(point.x, space.state(step)), Memory(steps, coefficients, memory.here, memory.others)
