"""The one loop of all solvers that are given by a step. It returns a point whose residual was measured (Decision 1).

    begin     evaluate F at h0
    measure   a sample is active where ‖F(h) - h‖ > atol + rtol ‖F(h)‖, which is never true of NaN
    advance   take the solver's step in the active samples, keep the points of the others, and measure
    finish    a status for each sample

A loop ends when no sample is active. The same four functions serve a Python loop, which reads how many samples are
active, and a traced or captured one, which cannot.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

from . import checks
from .arrays import H, History, Index, Mask, Numbers, Operator, PyTree, State, Z
from .backend import Known
from .problem import Problem
from .solution import Solution, Stats, Status
from .space import Space
from .system import System

if TYPE_CHECKING:
    from .solvers.base import Solver

PATIENCE = 10
"""A sample has stagnated if this many steps passed since its best point when the steps run out."""


class Point(NamedTuple):
    """The last evaluation of F.

    Attributes
    ----------
    x, f, residual
        The point, F there, and F(x) - x; states.
    norm
        ‖F(x) - x‖₂, (N, 1).
    active
        Samples that are not finished, (N, 1).
    index
        How many evaluations came before this one.
    """

    x: State
    f: State
    residual: State
    norm: Numbers
    active: Mask
    index: Index


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
    """Each sample's point of least residual so far, its norm, and how many steps it took."""

    x: State
    norm: Numbers
    steps: Count


class Carry(NamedTuple):
    """What the loop carries. ``best`` and ``trace`` are None throughout a solve that does not keep them."""

    point: Point
    tolerance: Numbers
    steps: Count
    best: Best | None
    trace: History | None
    memory: Any


class Iteration:
    """One solve by a solver's steps.

    Parameters
    ----------
    problem, h0, z
        As for :func:`implicit_core.solve`.
    solver
        A solver with ``init`` and ``step``.
    trace
        Whether to record every residual.
    """

    def __init__(self, problem: Problem[H, Z], h0: H, z: Z, solver: "Solver", *, trace: bool = False) -> None:
        self.solver, self.trace = solver, trace
        self.system = System(problem, h0, z)
        self.space = self.system.space

    def run(self) -> Solution[Any]:
        """The solution.

        Raises
        ------
        ValueError
            If F wrote to its argument.
        """
        backend, solver = self.space.backend, self.solver
        with backend.solving():
            self.atol: Numbers = self.space.scalar(solver.absolute_tolerance)
            carry = backend.while_loop(self.masks, self.advance, self.begin(), solver.max_steps - 1, solver.check_every)
            return self.finish(carry)

    def begin(self) -> Carry:
        """The first evaluation, at h0."""
        space, solver = self.space, self.solver
        start = space.copy(space.pack(space.backend.map(space.backend.stop_gradient, space.like)))
        can_check = not space.backend.immutable and space.backend.readable(start[0])
        x = space.copy(start) if can_check else start
        h = space.unpack(x)
        point, tolerance, jacobian = self.measure(x, h, 0)
        # If F wrote to its argument, no sample is active: the first read of the loop shows it, without an extra read.
        self.unmodified = space.same(start, space.pack(h)) if can_check else True  # Decisions 7 and 8.
        del start, x, h  # memory: a solve holds few states besides the solver's own
        if self.unmodified is not True:
            point = point._replace(active=point.active & self.unmodified)
        space.shard_as(point.f)
        point = point._replace(x=space.shard(point.x))
        steps = Count(1 if space.backend.readable(point.norm) else space.full(1, space.xp.int32))
        best = Best(point.x, space.full(float("inf")), steps) if solver.keeps_best else None
        trace = self._record(self._empty_trace(), point, space.all_samples()) if self.trace else None
        memory = solver.observe(self.system, solver.init(self.system, point.x), point, jacobian)
        return Carry(point, tolerance, steps, best, trace, memory)

    def measure(self, x: State, h: PyTree, index: Index) -> tuple[Point, Numbers, Operator | None]:
        """F at x, which is h in the user's form, the tolerance there, and the Jacobian if the solver uses it."""
        space, jacobian = self.space, None
        if self.solver.uses_jacobian:  # Decision 21.
            f, jacobian = self.system.linearize(h)
        else:
            f = self.system.evaluate(h)
        if self.solver.copies_results and not space.backend.immutable:
            f = space.copy(f)  # Decision 6.
        residual = space.sub(f, x)
        norm = space.norm(residual)
        tolerance = space.multiply_add(self.solver.rtol, space.norm(f), self.atol)
        # A frozen sample gives these numbers again, and a comparison with NaN is false: both stay finished.
        # Decisions 2 and 3.
        return Point(x, f, residual, norm, norm > tolerance, index), tolerance, jacobian

    def masks(self, carry: Carry) -> tuple[Mask, ...]:
        """Where samples are active, and where they are better than before."""
        active = carry.point.active
        return (active,) if carry.best is None else (active, carry.point.norm < carry.best.norm)

    def advance(self, carry: Carry, masks: tuple[Known, ...]) -> Carry:
        """One step of the active samples."""
        space, solver, before, active = self.space, self.solver, carry.point, masks[0]
        best = carry.best and self._keep(carry.best, before, carry.steps, masks[1])
        stepped = solver.step(self.system, carry.memory, before)
        if not isinstance(before.index, int) or before.index == 0:
            self._check(stepped, before.x)
        x, memory = stepped
        # F may reuse the memory of its result. Where a sample is frozen `where` makes a new array. Decision 6.
        if active is True and (solver.copies_results or x is before.f):
            x = space.copy(x)
        x = space.round(space.where(active, x, before.x))
        point, tolerance, jacobian = self.measure(x, space.unpack(x), before.index + 1)
        steps = carry.steps.plus_one(space, active)
        if best is not None and solver.retries_nonfinite:  # Decision 20.
            lasting = steps.array(space) - best.steps.array(space) < PATIENCE
            retry = ~finite(point.norm) & finite(best.norm) & lasting
            point = point._replace(active=point.active | retry)
        memory = solver.observe(self.system, memory, point, jacobian)
        trace = carry.trace and self._record(carry.trace, point, before.active)
        return Carry(point, tolerance, steps, best, trace, memory)

    def finish(self, carry: Carry) -> Solution[Any]:
        """Each sample's point and status."""
        if self.unmodified is not True and carry.point.index == 0 and not self.unmodified:
            raise ValueError("f wrote to its argument h; it must return a new array: `0.5 * h`, not `h *= 0.5`")
        space, point, best = self.space, carry.point, carry.best
        valid = finite(point.norm) & finite(carry.tolerance)
        converged = valid & ~point.active
        steps = carry.steps.array(space)
        status = space.select(valid, Status.MAX_STEPS.value, space.full(Status.NONFINITE, space.xp.int32))
        x, norm = point.x, point.norm
        if best is not None:  # Decision 5.
            best = self._keep(best, point, carry.steps, self.masks(carry)[1])
            stagnated = valid & (steps - best.steps.array(space) >= PATIENCE)
            status = space.select(stagnated, Status.STAGNATED.value, status)
            x = space.where(converged, x, best.x)
            norm = space.select(converged | ~finite(best.norm), norm, best.norm)
        status = space.select(converged, Status.CONVERGED.value, status)
        stats = Stats(
            steps=space.per_sample(steps),
            evaluations=point.index + 1,
            residual=space.per_sample(norm),
            trace=None if carry.trace is None else self._trace(carry.trace),
        )
        # Once more: without a graph, a framework may still carry forward-mode tangents.
        value = space.backend.map(space.backend.stop_gradient, space.unpack(x))
        return Solution(value, space.per_sample(status), stats)

    def _check(self, stepped: Any, x: State) -> None:
        """The first step is a pair of a state and a memory."""
        name = f"{type(self.solver).__name__}.step"
        if not isinstance(stepped, tuple) or len(stepped) != 2:
            raise TypeError(f"{name} must return a pair (x, memory), got {stepped!r}")
        checks.state_like(name, stepped[0], x)

    def _keep(self, best: Best, point: Point, steps: Count, better: Known) -> Best:
        space = self.space
        return Best(
            space.where(better, point.x, best.x),
            space.select(better, point.norm, best.norm),
            best.steps.replace(space, better, steps),
        )

    # The trace is a history of one number a sample, NaN where nothing was evaluated.

    def _empty_trace(self) -> History:
        unknown = self.space.full(float("nan"))[:, None, :]
        return History((unknown + self.space.matrices(self.solver.max_steps, 1),))

    def _record(self, trace: History, point: Point, was_active: Mask) -> History:
        space = self.space
        norm = space.select(was_active, point.norm, space.full(float("nan")))
        return space.set_row(trace, point.index, State((norm,)))

    def _trace(self, trace: History) -> Any:
        rows = self.space.xp.permute_dims(trace[0][:, :, 0], (1, 0))
        return self.space.xp.reshape(rows, (rows.shape[0], *self.space.batch_shape))


def finite(norm: Numbers) -> Mask:
    """Whether a norm is finite: one operation, since it is not negative, and NaN is below nothing."""
    return norm < float("inf")
