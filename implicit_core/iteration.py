"""The one loop of all solvers that are given by a step. It returns a point whose residual was measured (Decision 1).

    begin     evaluate F at h0
    measure   a sample is active where ‖F(h) - h‖ > atol + rtol ‖F(h)‖, which is never true of NaN, or where the
              residual has not fallen
    advance   take the solver's step in the active samples, keep the points of the others, and measure
    finish    a status for each sample; where the number of steps is forced, one more step, which is not measured

A loop ends when no sample is active. The same four functions serve a Python loop, which reads how many samples are
active, a traced or captured one, which cannot, and a loop of the user's own (:class:`~implicit_core.Stepper`).
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from . import checks, finished, forced, progress, rounding, settings
from .arrays import H, History, Index, Mask, Numbers, Operator, PyTree, State, Z
from .backend import Known, Watch, WrittenArgumentError
from .carry import GOING_ON, Best, Carry, Count, Point, least_residual
from .problem import Problem
from .progress import Progress, Start
from .records import is_array
from .root_problem import RootProblem
from .solution import Solution, Stats, Status
from .system import system_of

if TYPE_CHECKING:
    from .solvers.base import Solver

Result = TypeVar("Result")

PATIENCE = 10
"""A sample has stagnated if this many steps passed since its best point when the steps run out."""
UNKNOWN = -1.0
"""Stands for a residual that was not measured, until a trace is returned."""

TRACE = (
    "trace=True needs a max_steps that is known when the program is traced, since the trace has a row for each step: "
    "write a number, or take trace=False"
)


class _OutOfRangeError(Exception):
    """The squares of a start leave the range of numbers; ``units`` are a size at which they do not, (N, 1)."""

    def __init__(self, units: Numbers) -> None:
        super().__init__()
        self.units = units


class Origin(NamedTuple):
    """What a solve that carries another one on holds a root's residuals against.

    Attributes
    ----------
    tolerance, first
        The tolerance, and the residual at the start of the first solve, (N, 1).
    """

    tolerance: Numbers
    first: Numbers


class Outcome(NamedTuple):
    """What becomes of each sample.

    Attributes
    ----------
    status
        Integers, (N, 1).
    norm, f_norm
        ‖F(x) - x‖₂ and ‖F(x)‖₂ at the point that is returned, (N, 1).
    last
        Where this is the last point, and not the best one, (N, 1).
    """

    status: Numbers
    norm: Numbers
    f_norm: Numbers
    last: Mask


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
    stepwise
        The loop is the user's: nothing is read beside the start, there is no last step, and all counts are arrays.
    origin
        Where another solve of the same root began, which this one carries on.
    """

    memory_may_grow = True
    """Whether a solver's memory may change its shape from step to step, in a loop that is not traced."""

    def __init__(
        self,
        problem: Problem[H, Z],
        h0: H,
        z: Z,
        solver: "Solver",
        *,
        trace: bool = False,
        stepwise: bool = False,
        origin: Origin | None = None,
    ) -> None:
        self.solver, self.trace, self.stepwise, self.origin = solver, trace, stepwise, origin
        self.given = solver
        self.checked = False
        self.units: Numbers | None = None
        if isinstance(problem, RootProblem) or (solver.uses_jacobian and isinstance(problem, Problem)):
            problem = problem.with_derivatives(h0)
        self.system = system_of(problem, h0, z, None if origin is None else origin.first)
        self.system.endless = stepwise
        self.linearizes = solver.linearizes(self.system)
        self.space = self.system.space
        self.noticed = self.space.backend.noticed()  # of this solve, not of one within a step or F
        solver, self.most = settings.steps_of_samples(solver, self.space)
        solver = self.solver = settings.bound(solver, self.space, constant=True)
        self.absolute = solver.absolute_tolerance_of(root=self.system.is_root)
        self.rtol = progress.reachable(self.space, solver.rtol)
        if origin is not None:
            self.absolute, self.rtol = origin.tolerance, 0.0
        self.atol: Numbers = self.space.scalar(settings.absolute(self.space, self.absolute))
        # With both zero the number of steps is the user's. Arrays never say so, as a program would depend on it.
        self.forced = settings.is_zero(self.rtol) and settings.is_zero(self.absolute)
        self._moves_anyway = self.forced and forced.moves_anyway(self.given)
        """Whether F alone decides which samples go on, and no norm does."""
        self._never = float(self.space.backend.finfo(self.space.dtype).max)
        plain = forced.is_plain(solver) and self.most is None and not (trace or stepwise)
        self.plain = plain and forced.needs_no_look(self.system)
        """Whether the steps before the last are made without a look at their points."""
        self.unmodified: Any = True
        self.start: Start  # unless the number of steps is forced

    def tells(self) -> Origin:
        """What another solve of the same root needs to carry this one on, after it."""
        first = self.start.f_norm
        return Origin(self.in_units(self.tolerance(first)), self.in_units(first))

    def run(self) -> Solution[Any]:
        """The solution.

        Raises
        ------
        ValueError
            If F wrote to its argument.
        """
        if settings.is_zero(self.solver.max_steps):
            return forced.unsolved(self.system.problem, self.space.like, self.solver, trace=self.trace)
        solution = self._in_range(self._run)
        if self.plain and self._fails(solution):
            # Such a sample keeps its last finite point, which nobody looked for.
            again = Iteration(self.system.problem, self.space.like, self.system.z, self.given)
            again.plain = False
            return again.run()
        return solution

    def _fails(self, solution: Solution[Any]) -> bool:
        """Whether some sample is not finite."""
        mask = solution.status == Status.NONFINITE.value
        return self.space.backend.count([self.space.xp.reshape(mask, (-1, 1))])[0] > 0

    def first(self) -> Carry:
        """The first evaluation, at h0, of a loop that is the user's. The numbers are read once, if they can be."""

        def begin() -> Carry:
            carry = self.begin()
            outside = self._watched(carry) if self.space.backend.readable(carry.point.norm) else None
            if outside is not None and bool(self.space.xp.any(outside)):
                self._note(carry)
            return carry

        return self._in_range(begin)

    def resume(self, start: Start | None, units: Numbers | None, unread: Mask | None) -> None:
        """Take what :meth:`begin` found in another iteration of the same solve."""
        self.unread = unread
        if start is not None:
            self.start = start
        if units is not None:
            self._measure_in(units)
        if start is not None and self.system.is_root:
            self.system.first = start.f_norm

    def _in_range(self, run: Callable[[], Result]) -> Result:
        with self.space.backend.solving():
            try:
                return run()
            except _OutOfRangeError as error:
                # Once more in units of its own size, which no square leaves the range of numbers from. Decision 73.
                self._measure_in(error.units)
                return run()

    def _measure_in(self, units: Numbers) -> None:
        self.units = units
        self.system.in_units(units)
        self.space = self.system.space
        self.atol = self.atol / units

    def _run(self) -> Solution[Any]:
        return self.with_nan(self.finish(self.loop(self.begin, self.left)))

    @property
    def left(self) -> int:
        """The most steps after :meth:`begin`."""
        return 0 if self.plain else self.solver.max_steps - 1

    def loop(self, begin: Callable[[], Carry], steps: int) -> Carry:
        """At most so many steps from a start, which has no name here, since that would keep its states."""
        watch = Watch(self._watched, self._note)
        return self.space.backend.while_loop(self.masks, self.advance, begin(), steps, self.solver.check_every, watch)

    def begin(self) -> Carry:
        """The first evaluation, at h0."""
        space, solver = self.space, self.solver
        start = space.copy(space.pack(space.backend.map(space.backend.stop_gradient, space.like)))
        start = settings.with_settings(space, solver, start)
        start = solver.start(self.system, start)
        only = (self.plain or settings.is_one(solver.max_steps)) and not self.stepwise
        if self.plain:
            start = forced.advance(self.system, solver, start, self._before)
        h = space.unpack(start)
        kept = self._kept(h)
        # An infinite start is no start.
        point, operator = self.measure(start, h, 0, lambda norm, _: finite(norm))
        if only:
            point = self._measured_in_units(point)
        # If F wrote to its argument, no sample is active: the first read of the loop shows it, without an extra read.
        self.unmodified = self._is_left(kept, h)  # Decisions 7, 8 and 109.
        del start, h, kept  # memory: a solve holds few states besides the solver's own
        if self.unmodified is not True:
            point = point._replace(active=point.active & self.unmodified)
        readable = space.backend.readable(point.norm)
        self.system.grows = readable and not self.stepwise and self.memory_may_grow
        # Traced, a solve cannot be run again in other units: such a sample ends, NONFINITE, unless atol is enough.
        # A forced number of steps needs no norm to go on.
        self.unread = None if readable or only or self._moves_anyway else self._outside(point)
        if self.unread is not None:
            if self.noticed is not None:
                self.noticed.append(self.unread)
            large = not self.forced and self.absolute > space.smallest
            if large is not False:
                self.unread = self.unread & ~progress.both(point.norm <= self.atol, large)
            point = point._replace(active=point.active & ~self.unread)
        space.shard_as(point.f)
        point = point._replace(x=space.shard(point.x))
        steps = Count(1 + self._before if readable and not self.stepwise else space.full(1, space.xp.int32))
        best = Best(point.x, point.norm, point.f_norm, steps) if solver.keeps_best else None
        made = None
        if not self.forced:
            tolerance = self.tolerance(point.f_norm)
            cap = progress.largest_converged(space, point.norm, tolerance, self.rtol)
            plain = self.units is None and not is_array(self.absolute)
            atol = space.full(self.absolute) if plain else self.atol + space.full(0.0)
            scale = settings.quotient(space, self.absolute if plain else atol, self.rtol)
            self.start = Start(cap, point.norm, point.f_norm, scale)
            floor = space.full(0.0) if operator is not None else None
            made = Progress(cap, atol, None if best else point.norm, point.norm, point.norm, floor)
            if solver.patience:
                made = made._replace(halved=point.norm, halved_at=space.full(1, space.xp.int32))
            if solver.undoes_steps and not solver.ends_samples:
                made = made._replace(failures=space.full(0.0))
            point = point._replace(active=point.active & (point.norm > tolerance))
        looked_at = readable or self.noticed is not None
        watched = looked_at and space.samples > 1 and solver.freeze and solver.check and not self.stepwise
        settled = point.norm if watched else None
        point, stopped = self._stopped(self._while_steps_are_left(point), None)
        trace = self._record(self._empty_trace(), point, space.all_samples()) if self.trace else None
        memory, point = self._observed(solver.init(self.system, point.x), point, operator)
        return Carry(point, made, settled, steps, best, trace, memory, stopped)

    def _kept(self, h: PyTree) -> State | None:
        """A copy of what F is handed, where nothing else shows whether F writes to it."""
        backend = self.space.backend
        if backend.immutable or backend.sees_writes:
            return None
        leaves = State(tuple(backend.flatten(h)[0]))
        return self.space.copy(leaves) if backend.readable(leaves[0]) else None

    def _is_left(self, kept: State | None, h: PyTree) -> Any:
        """Whether F left h as it was: a boolean array, or True if it is known."""
        return True if kept is None else self.space.same(kept, State(tuple(self.space.backend.flatten(h)[0])))

    def measure(
        self, x: State, h: PyTree, index: Index, is_active: Callable[[Numbers, Numbers], Mask]
    ) -> tuple[Point, Operator | None]:
        """F at x, which is h in the user's form, and ``v -> (I - ∂F/∂h) v`` there if the solver uses it.

        ``is_active(norm, f_norm)`` says which samples are not finished, and is false for NaN.
        """
        solver = self.solver
        copies = solver.copies_results and not self.space.backend.immutable  # Decision 6.
        found = self.system.evaluate(x, h, copies=copies, linearizes=self.linearizes)
        # A frozen sample gives these numbers again, and a comparison with NaN is false: both stay finished.
        # Decisions 2 and 3.
        active = is_active(found.norm, found.f_norm)
        point = Point(x, found.f, found.residual, found.norm, found.f_norm, active, index)
        if self._moves_anyway:
            first = self.system.is_root and isinstance(index, int) and index == 0
            point = forced.with_norms(self.system, point) if self.trace or self.stepwise or first else point
            point = point._replace(active=forced.can_move(self.space, point, solver))
        return point, found.operator

    def _observed(self, memory: Any, point: Point, operator: Operator | None) -> tuple[Any, Point]:
        """The solver's memory after an evaluation, the last of which no step follows, and the samples that go on."""
        active = point.active
        if operator is not None and not (self.stepwise or self._moves_on):
            active = progress.both(active, point.index + 1 < self.solver.max_steps)
        memory = self.solver.observe(self.system, memory, point._replace(active=active), operator)
        ended = self._ended_by_solver(memory, None)
        return memory, point if ended is None else point._replace(active=point.active & (ended < 0))

    def _ended_by_solver(self, memory: Any, stopped: Mask | None) -> Numbers | None:
        """A status in the samples that the solver, or the user's own test, has ended, and GOING_ON in others."""
        ended = self.solver.ended(memory)
        if stopped is None:
            return ended
        others = self.space.full(GOING_ON, self.space.xp.int32) if ended is None else ended
        return self.space.select(stopped, Status.CONVERGED.value, others)

    def tolerance(self, f_norm: Numbers) -> Numbers:
        """The tolerance, atol + rtol ‖F(x)‖."""
        return self.space.multiply_add(self.rtol, f_norm, self.atol)

    def threshold(self, f_norm: Numbers, made: Progress) -> Numbers:
        """The residual that a sample has to reach, which no residual exceeds where it was ended."""
        xp, tolerance = self.space.xp, self.space.multiply_add(self.rtol, f_norm, made.atol)
        smaller: Numbers = xp.minimum(tolerance, made.cap)
        return smaller if made.floor is None else xp.maximum(smaller, made.floor)

    def _of_all(self, made: Progress) -> Progress:
        """What a residual is held against, also where a sample was ended."""
        return made._replace(cap=self.start.cap, atol=self.atol)

    def masks(self, carry: Carry) -> tuple[Mask, ...]:
        """Where samples are active, where they are better than before, and where the solver goes on."""
        point, best = carry.point, carry.best
        better = None if best is None else point.norm < best.norm
        accepted = self.solver.accepts(self.system, carry.memory, point)
        return (point.active, *(mask for mask in (better, accepted) if mask is not None))

    def _watched(self, carry: Carry) -> Mask | None:
        """At the start, where squares may leave the range of numbers; later, where a finished sample moved.

        It moved where its residual rose, although its point is kept. None while all samples are active.
        """
        point, settled = carry.point, carry.settled
        if isinstance(point.index, int) and point.index == 0:
            return None if self.units is not None or self._moves_anyway else self.space.out_of_range(point.f_norm)
        return None if settled is None or settled is point.norm or self.checked else point.norm > settled

    def _measured(self, point: Point) -> State:
        """The state whose squares may leave the range of numbers."""
        return point.residual if self.system.is_root else point.f

    def _measured_in_units(self, point: Point) -> Point:
        """The only point of a solve, with its norms in units of its own size, which needs no read to begin again."""
        space, measured = self.space, self._measured(point)
        units = self.units = space.magnitude(measured, point.residual)
        self.atol = self.atol / units
        norm, f_norm = (space.norm(space.over(x, units)) for x in (point.residual, measured))
        if self.origin is not None:
            f_norm = self.origin.first / units
        return point._replace(norm=norm, f_norm=f_norm, active=finite(norm))

    def _outside(self, point: Point) -> Mask:
        """Where squares leave the range of numbers; not where F(h) is zero, or itself not finite."""
        magnitude = self.space.magnitude(self._measured(point))
        return self.space.out_of_range(point.f_norm) & self.space.out_of_range(magnitude)

    def _note(self, carry: Carry) -> None:
        """Look closer, since the mask that was watched holds in some sample."""
        if carry.point.index == 0:
            if bool(self.space.xp.any(self._outside(carry.point))):
                raise _OutOfRangeError(self.space.magnitude(self._measured(carry.point)))
        else:
            assert carry.settled is not None
            finished.check(self.system, carry.point, carry.settled)
            self.checked = True

    def advance(self, carry: Carry, masks: tuple[Known, ...]) -> Carry:
        """One step of the active samples."""
        space, solver, before, active = self.space, self.solver, carry.point, masks[0]
        best = carry.best and self._keep(carry.best, before, carry.steps, masks[1])
        tells = len(masks) > (1 if best is None else 2)
        stepped = solver.step(self.system, carry.memory, before._replace(accepted=masks[-1] if tells else True))
        if not isinstance(before.index, int) or before.index == 0:
            self._check(stepped, before.x)
        x, memory = stepped
        # F may reuse the memory of its result. Where a sample is frozen `where` makes a new array. Decision 6.
        if active is True and (solver.copies_results or x is before.f):
            x = space.copy(x)
        x = space.round(space.where(self._moving(active, carry), x, before.x))
        made = carry.progress

        def is_active(norm: Numbers, f_norm: Numbers) -> Mask:
            if solver.undoes_steps:
                # Where F is not finite, a sample that was active goes back, and stays so. NaN equals nothing.
                going_on = norm != UNKNOWN if made is None else ~(norm <= self.threshold(f_norm, made))
                return going_on if active is True else going_on & (before.active | finite(norm))
            if made is None:
                return finite(norm)
            # Zero times an infinite norm is NaN, above which nothing is.
            return norm > self.threshold(f_norm, made._replace(cap=space.multiply_add(0.0, norm, made.cap)))

        h = space.unpack(x)
        # A write to a start of zeros may have changed nothing.
        kept = self._kept(h) if isinstance(before.index, int) and before.index == 0 else None
        point, operator = self.measure(x, h, before.index + 1, is_active)
        if kept is not None:
            self.unmodified = self.unmodified & self._is_left(kept, h)
            point = point._replace(active=point.active & self.unmodified)
        point = self._while_steps_are_left(point)
        steps = carry.steps.plus_one(space, active)
        if made is not None:
            if made.failures is not None and not (tells and masks[-1] is True):
                made, point = self._given_up(made, before, point)
            accepted = masks[-1] if tells else True
            made, point = self._judge(made, best, point, operator, accepted)
        point, stopped = self._stopped(point, carry.stopped)
        settled = carry.settled
        if settled is not None:
            latest = space.select(active, point.norm, settled)
            if not isinstance(point.index, int):  # nobody looks after each step, so what has moved is marked for good
                marked = (settled < 0) | progress.both(finished.moved(self.system, point, settled), ~before.active)
                latest = space.select(marked, space.full(-1.0), latest)
            settled = latest
        memory, point = self._observed(memory, point, operator)
        trace = carry.trace and self._record(carry.trace, point, before.active)
        return Carry(point, made, settled, steps, best, trace, memory, stopped)

    def _stopped(self, point: Point, before: Mask | None) -> tuple[Point, Mask | None]:
        """The point, where samples that the user's own test ends are no longer active, and which these are."""
        space, stop = self.space, self.solver.stop
        if stop is None:
            return point, None
        said = stop(*self.system.as_the_user_has_it(point.x, point.f, point.residual))
        now = space.xp.reshape(checks.mask_of_samples("stop", space, said), (-1, 1)) & point.active
        now = now if self._moves_anyway else now & finite(point.norm)  # where active says it
        stopped = now if before is None else now | before
        return point._replace(active=point.active & ~stopped), stopped

    def _while_steps_are_left(self, point: Point) -> Point:
        """The point, where samples with a ``max_steps`` of their own are active only until then."""
        if self.most is None:
            return point
        return point._replace(active=point.active & (point.index + 1 < self.most))

    def _given_up(self, made: Progress, before: Point, point: Point) -> tuple[Progress, Point]:
        """The same, where samples have ended after too many steps in a row without a finite F (Decision 20)."""
        space = self.space
        assert made.failures is not None
        failures = space.select(finite(before.norm), space.full(0.0), made.failures + 1)
        going_on = (failures < PATIENCE) | finite(point.norm)
        return made._replace(failures=failures), point._replace(active=point.active & going_on)

    def finish(self, carry: Carry) -> Solution[Any]:
        """Each sample's point and status."""
        self.refuse_writes(carry)
        space, point, best = self.space, carry.point, carry.best
        if best is not None:
            best = self._keep(best, point, carry.steps, point.norm < best.norm)
            carry = carry._replace(best=best)
        if self.noticed is not None and carry.settled is not None:
            self.noticed.append((carry.settled < 0) | finished.moved(self.system, point, carry.settled))
        if self._moves_anyway and self.units is None:
            point = forced.with_norms(self.system, point)
            if self._below_zero is not None:
                point = point._replace(norm=space.filled(point.norm, self._below_zero, float("nan")))
            carry = carry._replace(point=point)
        outcome = self.outcome(carry)
        norm, f_norm = outcome.norm, outcome.f_norm
        stats = Stats(
            steps=space.per_sample(self._made(carry)),
            evaluations=point.index + 1 + self._before,
            residual=space.per_sample(self.in_units(norm)),
            trace=None if carry.trace is None else self._trace(carry.trace),
            relative=space.per_sample(progress.relative(space, norm, f_norm)),
            tolerance=space.per_sample(self.in_units(self._held_against(norm, f_norm, carry))),
        )
        x = self._moved_on(carry) if best is None else space.where(outcome.last, point.x, best.x)
        # Once more: without a graph, a framework may still carry forward-mode tangents.
        value = space.backend.map(space.backend.stop_gradient, space.unpack(x))
        return Solution(value, space.per_sample(outcome.status), stats)

    def _moved_on(self, carry: Carry) -> State:
        """The last point; where the number of steps is forced, the one after it.

        So n evaluations of F are n steps, and F is not evaluated at the result (Decision 119).
        """
        space, solver, point = self.space, self.solver, carry.point
        if not self._moves_on:
            return point.x
        accepted = solver.accepts(self.system, carry.memory, point)
        last = point._replace(accepted=True if accepted is None else accepted)
        x, _ = solver.step(self.system, carry.memory, last)
        moving = forced.can_move(space, point, solver) if self._moves_anyway else finite(point.norm)
        if carry.stopped is not None:
            moving = moving & ~carry.stopped
        if self.may_make_none:
            moving = moving & (self._limit > 0)
        moved = space.copy(space.round(space.where(moving, x, point.x)))
        below = self._below_zero
        return moved if below is None else State(tuple(space.filled(a, below, float("nan")) for a in moved))

    @property
    def _before(self) -> int:
        """The steps that are made without a look, before the first point that is measured."""
        return self.solver.max_steps - 1 if self.plain else 0

    def _made(self, carry: Carry) -> Numbers:
        """The evaluations of F until each sample was finished, or the steps of its own, (N, 1)."""
        steps = carry.steps.array(self.space)
        if not self.may_make_none:
            return steps
        fewer: Numbers = self.space.xp.minimum(steps, self.space.xp.astype(self._limit, steps.dtype))
        return fewer

    @property
    def may_make_none(self) -> bool:
        """Whether a forced number of steps may be zero in some sample, where F is evaluated all the same."""
        return self._moves_on and is_array(self._limit)

    @property
    def _below_zero(self) -> Mask | None:
        """Where a forced number of steps is negative, which cannot be refused; None where it can be read."""
        known = not self.may_make_none or self.space.backend.readable(self._limit)
        return None if known else self._limit < 0

    @property
    def _limit(self) -> Any:
        """The ``max_steps`` of each sample, (N, 1), or of all."""
        return self.solver.max_steps if self.most is None else self.most

    @property
    def _moves_on(self) -> bool:
        """Whether a step follows the last evaluation."""
        return self.forced and not self.solver.keeps_best

    def refuse_writes(self, carry: Carry) -> None:
        """Raise an error if F wrote to its argument."""
        index = carry.point.index
        if self.unmodified is not True and isinstance(index, int) and index <= 1 and not self.unmodified:
            raise WrittenArgumentError(*self.system.problem.names[:2])

    def outcome(self, carry: Carry) -> "Outcome":
        """What becomes of each sample if the loop ends here. The best point is known to be no worse than the last."""
        space, point = self.space, carry.point
        valid = finite(point.norm) & finite(point.f_norm)
        if self.unread is not None:
            valid = valid & ~self.unread
        last, norm, f_norm, converged = self._returned(carry, valid)
        status = self._status(carry, valid, norm)
        if not (self.forced or self.system.is_root):
            hidden = progress.is_hidden(space, self.start.cap, f_norm)
            status = space.select(converged & hidden, Status.DIVERGED.value, status)
            converged = converged & ~hidden
        return Outcome(space.select(converged, Status.CONVERGED.value, status), norm, f_norm, last)

    def _returned(self, carry: Carry, valid: Mask) -> tuple[Mask, Numbers, Numbers, Mask]:
        """Where the last point is returned, ‖F(x) - x‖ and ‖F(x)‖ at what is, and whether it has converged."""
        space, point, best = self.space, carry.point, carry.best
        if carry.progress is None:
            last = converged = point.norm == 0
            if best is not None:
                converged = converged | (best.norm == 0)
        else:
            last = converged = valid & ~point.active
            if self.may_have_ended(point):
                last = converged = converged & ~self.ended(carry.progress)
            if self.most is not None:  # a sample may have run out of steps before others
                met = point.norm <= self.threshold(point.f_norm, self._of_all(carry.progress))
                last = converged = converged & met
            if best is not None and not self.solver.freeze:  # a sample went on, perhaps to a worse point
                converged = converged | (best.norm <= self.threshold(best.f_norm, self._of_all(carry.progress)))
                last = last & (point.norm <= best.norm)
        ended = self._ended_by_solver(carry.memory, carry.stopped)
        if ended is not None:
            by_solver, failed = ended == Status.CONVERGED.value, ended > 0
            last, converged = (last & ~failed) | by_solver, (converged & ~failed) | by_solver
        if best is None:
            return last, point.norm, point.f_norm, converged
        known = last | ~finite(best.norm)
        norm, f_norm = (space.select(known, a, b) for a, b in ((point.norm, best.norm), (point.f_norm, best.f_norm)))
        return last, norm, f_norm, converged

    def _status(self, carry: Carry, valid: Mask, norm: Numbers) -> Numbers:
        """Why a sample did not converge, where it did not, with the residual at the point that is returned."""
        space, point, best = self.space, carry.point, carry.best
        if best is not None and carry.progress is not None and carry.progress.failures is not None:
            # A last trial is not finite, and would have been undone.
            undone = finite(best.norm) & (carry.progress.failures + 1 < PATIENCE)
            valid = valid | (undone if self.unread is None else undone & ~self.unread)
        status = space.select(valid, Status.MAX_STEPS.value, space.full(Status.NONFINITE, space.xp.int32))
        if best is not None:  # Decision 5.
            late = carry.steps.array(space) - best.steps.array(space) >= PATIENCE
            status = space.select(valid & late, Status.STAGNATED.value, status)
        if carry.progress is not None and self.may_have_ended(point):
            ended = valid & self.ended(carry.progress)
            gone = ended & ((point.norm > self.start.limit()) | (point.norm <= self.tolerance(point.f_norm)))
            status = space.select(ended, Status.STAGNATED.value, status)
            status = space.select(gone & (norm > self.start.cap), Status.DIVERGED.value, status)
        by_solver = self._ended_by_solver(carry.memory, carry.stopped)
        return status if by_solver is None else space.select(by_solver > 0, by_solver, status)

    def may_have_ended(self, point: Point) -> bool:
        """Whether there was a checkpoint, as far as is known."""
        early = progress.FIRST_CHECK if self.solver.patience is None else 1
        return not isinstance(point.index, int) or point.index + 1 >= early

    def ended(self, made: Progress) -> Mask:
        """The samples that were ended for lack of progress."""
        return made.cap == self._never

    def _held_against(self, norm: Numbers, f_norm: Numbers, carry: Carry) -> Numbers:
        """The tolerance, and where the solver itself says that a sample has converged, at least the residual."""
        made, ended = carry.progress, self._ended_by_solver(carry.memory, carry.stopped)
        tolerance = self.tolerance(f_norm) if made is None else self.threshold(f_norm, self._of_all(made))
        if ended is None:
            return tolerance
        return self.space.select(ended == Status.CONVERGED.value, self.space.xp.maximum(tolerance, norm), tolerance)

    def in_units(self, norm: Numbers) -> Numbers:
        """A norm in the user's units."""
        return norm if self.units is None else norm * self.units

    def _moving(self, active: Known, carry: Carry) -> Known:
        """The samples that take a step: the active ones, or all that can."""
        if self.solver.freeze or active is True:
            return active
        moving = finite(carry.point.norm) | carry.point.active
        if self.most is not None:
            moving = moving & (carry.point.index + 1 < self.most)
        if carry.stopped is not None:
            moving = moving & ~carry.stopped
        return moving if carry.progress is None else moving & ~self.ended(carry.progress)

    def _judge(
        self, made: Progress, best: Best | None, point: Point, operator: Operator | None, accepted: Known
    ) -> tuple[Progress, Point]:
        """The point, where samples without progress are no longer active.

        ``accepted`` says where the solver went on from the point before, and did not go back from it.
        """
        space, evaluations = self.space, point.index + 1
        least = made.least
        if least is not None:
            made = made._replace(least=(least := space.xp.minimum(least, point.norm)))
        if made.floor is not None and operator is not None:
            of_root, often = self.system.is_root, self.solver.patience is not None
            made, point = rounding.judged(
                space, made, best, point, operator, self.tolerance, of_root=of_root, often=often
            )
        if self.solver.patience:
            made = progress.halved(made, space, evaluations, point.norm)
            out_of_patience = evaluations - made.halved_at >= self.solver.patience
            made, point = self._ended(made, point, out_of_patience & point.active)
        now = progress.is_checkpoint(evaluations)
        if now is False:
            return made, point
        least = least_residual(space, made, best, point)
        tolerance = self.tolerance(point.f_norm)
        # A solver that goes back from a point may be on its way back from far beyond.
        goes_back = self.solver.overshoots or (self.system.is_root and self.solver.undoes_steps)
        limit = float("inf") if goes_back else self.start.limit()
        ended = progress.without_progress(made, limit, evaluations, point.norm, least, tolerance, accepted)
        ended = progress.both(ended & point.active, now)
        made, point = self._ended(made, point, ended)
        marked_least = space.select(now, least, made.marked_least)
        marked = space.select(now, point.norm, made.marked)
        return made._replace(marked_least=marked_least, marked=marked), point

    def _ended(self, made: Progress, point: Point, ended: Mask) -> tuple[Progress, Point]:
        """The same, where samples have ended: no residual exceeds their threshold."""
        space, never = self.space, self.space.full(self._never)
        cap, atol = space.select(ended, never, made.cap), space.select(ended, never, made.atol)
        return made._replace(cap=cap, atol=atol), point._replace(active=point.active & ~ended)

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
            space.select(better, point.f_norm, best.f_norm),
            best.steps.replace(space, better, steps),
        )

    # The trace is a history of one number a sample, negative where nothing was evaluated. In the result that is NaN.

    def _empty_trace(self) -> History:
        if is_array(self.solver.max_steps):
            raise TypeError(TRACE)
        unknown = self.space.full(UNKNOWN)[:, None, :]
        return History((unknown + self.space.matrices(self.solver.max_steps, 1),))

    def _record(self, trace: History, point: Point, was_active: Mask) -> History:
        space = self.space
        norm = space.select(was_active, point.norm, space.full(UNKNOWN))
        return space.set_row(trace, point.index, State((norm,)))

    def with_nan(self, solution: Solution[Any]) -> Solution[Any]:
        """The solution, with NaN in its trace where a sample was finished."""
        trace = solution.stats.trace
        if trace is None:
            return solution
        return solution._replace(stats=solution.stats._replace(trace=self.space.blanked(trace, trace < 0)))

    def _trace(self, trace: History) -> Any:
        rows = self.space.xp.permute_dims(self.in_units(trace[0][:, :, 0]), (1, 0))
        return self.space.xp.reshape(rows, (rows.shape[0], *self.space.batch_shape))


def finite(norm: Numbers) -> Mask:
    """Whether a norm is finite: one operation, since it is not negative, and NaN is below nothing."""
    return norm < float("inf")
