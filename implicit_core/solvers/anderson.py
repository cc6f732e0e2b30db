"""Anderson acceleration."""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from .. import checks, settings
from ..arrays import Array, History, Mask, Matrices, Numbers, Real, Row, State
from ..carry import Point
from ..space import Space, total
from ..system import System
from .base import Solver
from .relaxation import any_residual, fall, first_relaxation, largest_after, next_relaxation

GROWTH = 10.0
"""A step is undone if the residual after it is more than this much larger than before."""
FIRST, LONGER = 1.35, 2.5
"""How many plain steps of a fixed point follow on the first step that is undone, and how many times more on others."""


class Memory(NamedTuple):
    """The last m evaluations, and what judges the last step.

    Attributes
    ----------
    proposals, residuals
        x + β r, and r, of the last m points; for roots x and r.
    products
        The residuals' Gram matrices, (N, m, m) for each leaf.
    scaling, floor
        Constants, (1, m, m): the ridge, and a tiny diagonal for residuals that are all zero.
    used
        One where a slot is in use, and zero where it is empty or its point was forgotten, (N, 1, m).
    here
        The rows of the identity, (1, 1, m) each.
    limit, before
        The residual above which the last step is undone, (N, 1), and the one before that. Negative where plain steps
        are still to be made.
    wait, pause
        How many plain steps of a fixed point are still to be made, and how many there were, (N, 1): more
        after each step that was undone, so that plain iteration alone is left where nothing else works.
    undone_at
        The index of the last point that was undone, (N, 1).
    start
        The residual and the damped step at the start, for fixed points.
    relaxation
        β, (N, 1), for roots, whose residual has units of its own; None for fixed points.
    """

    proposals: History
    residuals: History
    products: tuple[Matrices, ...]
    scaling: Array
    floor: Array
    used: Matrices
    here: Any
    limit: Numbers
    before: Numbers
    wait: Numbers
    pause: Numbers
    undone_at: Numbers
    start: tuple[State, ...] | None
    relaxation: Numbers | None


@dataclass(frozen=True, kw_only=True, repr=False)
class Anderson(Solver):
    """Anderson acceleration: the affine combination of the last points whose residuals best cancel.

    Parameters
    ----------
    memory
        m, how many points are combined; 2m states are held.
    damping
        β in (0, 1]: each point h proposes β F(h) + (1 - β) h.
    regularization
        Ridge on the residuals' Gram matrix, relative to its diagonal: each weight is damped by its own residual, so
        old, large ones cost most. Never under rounding error.
    rtol, atol, max_steps, check_every, patience, freeze, stop, check
        As for :class:`Solver`.

    Raises
    ------
    TypeError, ValueError
        If a setting is of a wrong kind or out of range.

    References
    ----------
    D. G. Anderson, Iterative procedures for nonlinear integral equations, J. ACM 12 (1965).
    H. F. Walker and P. Ni, Anderson acceleration for fixed-point iterations, SIAM J. Numer. Anal. 49 (2011).

    Examples
    --------
    >>> import numpy as np
    >>> import implicit_core as ic
    >>> solution = ic.solve(lambda h, z: np.cos(h) + z, np.array(1.0), np.array(0.0), solver=ic.Anderson(rtol=1e-9))
    >>> round(float(solution.value), 6), int(solution.stats.evaluations) < 10
    (0.739085, True)
    """

    memory: int = 5
    damping: Real = 1.0
    regularization: Real = 1e-10

    copies_results: ClassVar[bool] = False
    undoes_steps: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "memory", checks.integer("memory", self.memory, 1))
        object.__setattr__(self, "damping", checks.real("damping", self.damping, 0.0, 1.0, low_open=True))
        object.__setattr__(self, "regularization", checks.real("regularization", self.regularization, 0.0))

    def init(self, system: System, x: State) -> Memory:
        space = system.space
        m = min(self.memory, space.dimension + 1)  # more points are not affinely independent
        # An absolute ridge would soon outweigh residuals that shrink, and turn the method into plain averaging. This
        # one is relative to the diagonal (Decision 17), and at least rounding error, for residuals that are all equal.
        ridge = settings.at_least(space, self.regularization, 4 * m * space.eps)
        tiny = float(space.backend.finfo(space.dtype).smallest_normal) / space.eps  # for residuals that are all zero
        largest = any_residual(space)
        return Memory(
            space.history(m),
            space.history(m),
            tuple(space.matrices(m, m) for _ in space.measured(x)),
            1 + ridge * space.eye(m)[None, :, :],
            tiny * space.eye(m)[None, :, :],
            space.matrices(1, m),
            space.table(space.eye(m)[:, None, None, :]),
            largest,
            largest,
            space.full(0.0),
            space.full(FIRST / LONGER),
            space.full(-2, space.xp.int32),
            None if system.is_root else (x, x),
            space.full(0.0) if system.is_root else None,
        )

    def accepts(self, system: System, memory: Memory, point: Point) -> Mask:
        """Not where F is not finite, or the residual grew by far: then a plain step from the point before follows."""
        return point.norm <= memory.limit

    def step(self, system: System, memory: Memory, point: Point) -> tuple[State, Memory]:
        space, slots, relaxation = system.space, memory.used.shape[2], memory.relaxation
        slot = point.index % slots
        first, limit = point.index == 0, largest_after(space, point, GROWTH)
        if first is not False:
            if relaxation is None:  # a plain step may make the residual grow
                limit = space.select(first, memory.limit, limit)
            else:
                relaxation = space.select(first, first_relaxation(space, point), relaxation)
        memory = memory._replace(limit=limit, before=memory.limit, relaxation=relaxation)
        residual, proposal = point.residual, self._proposal(space, point, of_root=system.is_root)
        if memory.start is not None and first is not False:
            # A copy: F may reuse the memory of its result.
            now = residual, proposal if space.backend.immutable else space.copy(proposal)
            start = tuple(space.where(first, a, b) for a, b in zip(now, memory.start, strict=True))
            memory = memory._replace(start=start)
        if point.accepted is not True:
            residual, proposal, memory = self._undone(space, memory, point, proposal)
        used = space.xp.maximum(memory.used, memory.here[slot])
        proposals = space.set_row(memory.proposals, slot, proposal)
        residuals = space.set_row(memory.residuals, slot, residual)
        products = space.gram(memory.products, residuals, slot)
        gram = total(products) * (space.xp.matrix_transpose(used) * used)
        weights = mixing_weights(space, space.multiply_add(gram, memory.scaling, memory.floor), used)
        x = space.state(space.combine(weights, proposals))
        if memory.relaxation is not None:
            mixed = space.state(space.combine(weights, residuals))
            x = space.axpy(self.damping * memory.relaxation, mixed, x)
        return x, memory._replace(proposals=proposals, residuals=residuals, products=products, used=used)

    def _proposal(self, space: Space, point: Point, *, of_root: bool) -> State:
        """What is combined: x + β r; of a root, whose β changes, x alone."""
        if of_root:
            return point.x
        return point.f if settings.is_one(self.damping) else space.axpy(self.damping, point.residual, point.x)

    def _undone(self, space: Space, memory: Memory, point: Point, proposal: State) -> tuple[State, State, Memory]:
        """The residual and the proposal of the point before, where a point is undone, and all others are forgotten."""
        accepted: Any = ~space.all_samples() if point.accepted is False else point.accepted
        slots = memory.used.shape[2]
        before = (point.index - 1) % slots
        old_residual, old_proposal = (
            space.state(Row(tuple(space.take(a, before, 1) for a in history)))
            for history in (memory.residuals, memory.proposals)
        )
        forgotten = space.xp.zeros_like(memory.used)
        memory = memory._replace(used=space.xp.where(accepted[:, :, None], memory.used, forgotten))
        kept = accepted
        if memory.relaxation is None:
            assert memory.start is not None
            waits = ~accepted & (memory.before < 0) & (point.norm < float("inf"))
            kept = accepted | waits
            # Where a plain step fails as well, only those from the start may not.
            again = ~kept & (memory.undone_at == point.index - 1)
            old_residual, old_proposal = (
                space.where(again, new, old)
                for new, old in zip(memory.start, (old_residual, old_proposal), strict=True)
            )
            undone_at = space.select(kept, memory.undone_at, space.full(0, space.xp.int32) + point.index)
            pause = space.select(kept, memory.pause, LONGER * memory.pause)
            wait = space.select(kept, memory.wait - 1, pause)
            largest = any_residual(space)
            limit = space.select(wait > 1, -largest, largest)
            memory = memory._replace(pause=pause, wait=wait, undone_at=undone_at)
        else:
            limit = GROWTH * space.norm(old_residual)
            step, change = space.sub(point.x, old_proposal), fall(space, old_residual, point)
            new = next_relaxation(space, memory.relaxation, step, change, point.norm)
            memory = memory._replace(relaxation=space.select(accepted, memory.relaxation, new))
        memory = memory._replace(limit=space.select(accepted, memory.limit, limit))
        return space.where(kept, point.residual, old_residual), space.where(kept, proposal, old_proposal), memory


def mixing_weights(space: Space, gram: Matrices, used: Matrices) -> Matrices:
    """Weights, summing to one, that minimize the norm of the combined residual.

    ``gram`` is (N, m, m); ``used``, (N, 1, m), is one at the slots in use and zero elsewhere.
    """
    weights = space.solve_rows(gram, used)
    total: Matrices = space.xp.sum(weights, axis=-1, keepdims=True)
    return weights / total
