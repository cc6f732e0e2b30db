"""Broyden's (good) method in limited memory, from one history: the steps."""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from .. import checks
from ..arrays import Array, History, Mask, Matrices, Numbers, Operator, Row, State
from ..carry import Point
from ..records import is_array
from ..space import Space, head
from ..system import System
from . import dense, dense_broyden
from .base import Solver
from .relaxation import any_residual, fall, first_relaxation, largest_after, next_relaxation

LEAST = 1e-3
"""The least 1 - α, as which a smaller one counts: the update is singular where it is zero.

The update is then damped, and as regular as any (J. J. Moré and J. A. Trangenstein, On the global convergence of
Broyden's method, Math. Comp. 30 (1976), damp it so).
"""
GROWTH = 1e4
"""A step is undone if the residual after it is more than this much larger than before."""
BLOCK = 16
"""By how many steps the memory grows."""
TRACED = 50
"""The most steps that are held by default where the memory cannot grow."""


class Memory(NamedTuple):
    """The last m steps, and what judges the last one.

    Attributes
    ----------
    steps, last
        The last m steps, and the last one.
    coefficients
        The matrix that turns products with the steps into coefficients, (N, m, m).
    here, others, one, least
        Constants.
    x, residual
        The last point that was kept, and the residual there.
    limit
        The residual above which the last step is undone, (N, 1).
    relaxation
        For roots, the number that the inverse Jacobian started from, (N, 1); None for fixed points, where it is 1.
    """

    steps: History
    last: Row
    coefficients: Matrices
    here: Any
    others: Any
    one: Array
    least: Array
    x: State
    residual: State
    limit: Numbers
    relaxation: Numbers | None


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

    Where F is not finite after a step, or the residual 10⁴ times as large, the step is undone: a plain one from
    the point before follows, and the method starts anew.

    A root in few unknowns has its inverse Jacobian as a matrix, which starts from the Jacobian at x0 where g has a JVP,
    at one product for each unknown; it is made anew where steps fail.

    Parameters
    ----------
    memory
        m, how many steps (states) are held. None for all: the memory grows with the steps, and where it cannot, in a
        traced or captured program, it holds the last min(max_steps, 50).
    rtol, atol, max_steps, check_every, patience, freeze, stop, check
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

    memory: int | None = None

    copies_results: ClassVar[bool] = False
    overshoots: ClassVar[bool] = True
    undoes_steps: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.memory is not None:
            object.__setattr__(self, "memory", checks.integer("memory", self.memory, 1))

    def linearizes(self, system: System) -> bool:
        """Whether the Jacobian of a root is made: where it is small, and g has derivatives."""
        return system.is_root and system.problem.has_jvp and dense.is_small(system.space) and not system.records

    def init(self, system: System, x: State) -> Any:
        space = system.space
        if system.is_root and dense.is_small(space):
            return dense_broyden.init(space, x)
        memory = _sized(self, system)
        coefficients, steps = space.matrices(memory, memory), space.history(memory)
        relaxation = space.full(1.0) if system.is_root else None
        constants = *_constants(space, memory), space.scalar(1.0), space.scalar(LEAST)
        return Memory(steps, space.row(space.zeros()), coefficients, *constants, x, x, any_residual(space), relaxation)

    def observe(self, system: System, memory: Any, point: Point, operator: Operator | None) -> Any:
        if isinstance(memory, Memory):
            return memory
        return dense_broyden.observe(system.space, memory, point, operator)

    def accepts(self, system: System, memory: Any, point: Point) -> Mask | None:
        """Not where F is not finite, or the residual grew by far: then a plain step from the point before follows."""
        return point.norm <= memory.limit if isinstance(memory, Memory) else None

    def step(self, system: System, memory: Any, point: Point) -> tuple[State, Any]:
        space = system.space
        if not isinstance(memory, Memory):
            return dense_broyden.step(space, memory)
        if self.memory is None and isinstance(point.index, int) and system.grows:
            memory = _grown(space, memory, point.index, self.max_steps)
        m = memory.coefficients.shape[1]
        slot, previous = point.index % m, (point.index - 1) % m
        first, full = point.index == 0, not isinstance(point.index, int) or point.index >= m
        x, residual, coefficients = point.x, point.residual, memory.coefficients
        limit, relaxation = largest_after(space, point, GROWTH), memory.relaxation
        begins: Any = first  # where the method starts anew
        if first is not False:
            limit = space.select(first, memory.limit, limit)
            if relaxation is not None:
                relaxation = space.select(first, first_relaxation(space, point), relaxation)
        if point.accepted is not True:
            kept: Any = ~space.all_samples() if point.accepted is False else point.accepted
            x, residual = space.where(kept, x, memory.x), space.where(kept, residual, memory.residual)
            coefficients = space.xp.where(kept[:, :, None], coefficients, space.xp.zeros_like(coefficients))
            if relaxation is None:
                limit = space.select(kept, limit, any_residual(space))
            else:
                change = fall(space, memory.residual, point)
                new = next_relaxation(space, relaxation, space.state(memory.last), change, point.norm)
                relaxation = space.select(kept, relaxation, new)
                limit = space.select(kept, limit, memory.limit)
            if first is not True:
                begins = ~kept if first is False else ~kept | first
        r = space.row(residual if relaxation is None else space.scale(relaxation, residual))
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
            if begins is not False:
                begins = begins if begins is first else begins[:, :, None]
                row = space.select(begins, space.xp.zeros_like(row), row)
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
        memory = memory._replace(steps=steps, last=step, coefficients=coefficients, x=x, residual=residual)
        return space.add(x, space.state(step)), memory._replace(limit=limit, relaxation=relaxation)


def _sized(solver: Broyden, system: System) -> int:
    """How many steps the memory holds at first."""
    if solver.memory is not None:
        return solver.memory
    most = TRACED if system.endless or is_array(solver.max_steps) else max(solver.max_steps, 1)
    return min(most, BLOCK if system.grows else TRACED)


def _constants(space: Space, m: int) -> tuple[Any, Any]:
    here = space.eye(m)[:, None, None, :]  # rows (1, 1, m)
    return space.table(here), space.table(1 - here)


def _grown(space: Space, memory: Memory, index: int, most: int) -> Memory:
    """The memory, with room for one step more, if not for the most that there can be."""
    m = memory.coefficients.shape[1]
    if index < m or m >= most:
        return memory
    more, xp = min(BLOCK, most - m), space.xp
    steps = History(tuple(map(lambda a, b: xp.concat([a, b], axis=1), memory.steps, space.history(more))))
    wide = xp.concat([memory.coefficients, space.matrices(m, more)], axis=2)
    coefficients = xp.concat([wide, space.matrices(more, m + more)], axis=1)
    here, others = _constants(space, m + more)
    return memory._replace(steps=steps, coefficients=coefficients, here=here, others=others)


def _stacked(space: Space, x: Row, y: Row) -> Row:
    return Row(tuple(space.xp.concat([a, b], axis=1) for a, b in zip(x, y, strict=True)))
