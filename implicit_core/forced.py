"""A forced number of plain steps, of which only the last is measured, if any (Decision 132)."""

from typing import TYPE_CHECKING, Any

from . import progress, settings
from .arrays import Array, H, Mask, Numbers, State, Z
from .carry import Point
from .problem import Problem
from .registry import find_backend
from .root_problem import RootProblem
from .solution import Solution, Stats, Status
from .space import Space
from .system import System, system_of

if TYPE_CHECKING:
    from .solvers.base import Solver


def has_no_tolerance(solver: object) -> bool:
    """Whether no residual is small enough for a solver, so that no sample need have converged."""
    solver = getattr(solver, "solver", solver)  # within Compacting, say
    if getattr(solver, "ends_samples", False):
        return False
    return all(settings.is_zero(getattr(solver, name, None)) for name in ("rtol", "absolute_tolerance"))


def is_forced(solver: object) -> bool:
    """Whether a solver makes a fixed number of steps: it has no tolerance, and no ``stop``."""
    return has_no_tolerance(solver) and getattr(getattr(solver, "solver", solver), "stop", None) is None


def moves_anyway(solver: object) -> bool:
    """Whether it makes plain steps, wherever F is finite, however many and in whichever samples."""
    from .solvers.fixed_point_iteration import FixedPointIteration  # which imports this module

    return type(solver) is FixedPointIteration and has_no_tolerance(solver)


def is_plain(solver: Any) -> bool:
    """Whether it makes one known number of plain steps, none of which depends on a residual or on a sample."""
    return moves_anyway(solver) and isinstance(solver.max_steps, int) and solver.stop is None


def needs_no_look(system: System) -> bool:
    """Whether no point needs a look: numbers can be read at the end, and an F that writes to h is noticed."""
    backend = system.space.backend
    return (
        not (system.is_root or system.records)
        and (backend.immutable or backend.sees_writes)
        and backend.readable(backend.flatten(system.space.like)[0][0])
        and backend.tracing is None
    )


def advance(system: System, solver: Any, x: State, steps: int) -> State:
    """The point after so many steps from x; x itself if there are none."""
    space = system.space
    for _ in range(steps):
        f = system.value(x)
        if settings.is_one(solver.damping):
            x = f if space.backend.immutable else space.copy(f)  # F may reuse the memory of its result
        else:
            x = space.axpy(solver.damping, space.sub(f, x), x)
        x = space.round(x)
    return x


def can_move(space: Space, point: Point, solver: Any) -> Mask:
    """Where F is finite, and so the next point, although its squares need not be."""
    mask: Mask = space.noticing(space.largest(point.f), point.f) < float("inf")
    if settings.is_one(solver.damping):
        return mask
    return mask & (space.largest(point.residual) < float("inf"))  # which is a part of the next point


def with_norms(system: System, point: Point) -> Point:
    """The point, with norms whose squares stay in the range of numbers."""
    space = system.space
    if space.is_in_range(space.xp.maximum(point.norm, point.f_norm)):  # what is much smaller is lost to rounding
        return point
    norm = space.norm_of_any_size(point.residual)
    if not system.is_root:
        return point._replace(norm=norm, f_norm=space.norm_of_any_size(point.f))
    if isinstance(point.index, int) and point.index == 0:  # a root's f_norm is that at the start
        system.first = norm
    first = point.f_norm if system.first is None else system.first
    return point._replace(norm=norm, f_norm=first)


def unsolved(problem: Problem[H, Any], h0: H, solver: "Solver", *, trace: bool = False) -> Solution[H]:
    """The start as the result, where F is not evaluated, so that its residual is not known.

    ``stats.tolerance`` is the absolute tolerance alone, since ‖F(h0)‖ is not known either.
    """
    name = problem.names.start
    backend = find_backend(h0, name)
    with backend.on_device_of(h0), backend.solving():
        space = problem.space(h0, name)
        solver = settings.bound(solver, space, constant=True)
        return _solution(problem, space, solver, space.copy(_start(space, h0)), 0, trace=trace)


def unmeasured(problem: Problem[H, Z], h0: H, z: Z, solver: Any) -> Solution[H] | None:
    """The point after the steps of a plain solver, likewise; None if its points have to be looked at."""
    backend = find_backend(h0, problem.names.start)
    with backend.on_device_of(h0), backend.solving():
        system = system_of(problem, h0, z)
        if not needs_no_look(system):
            return None
        x = _start(system.space, h0)
        solver = settings.bound(solver, system.space, constant=True)
        x = advance(system, solver, x, solver.max_steps) if solver.max_steps else system.space.copy(x)
        return _solution(problem, system.space, solver, x, solver.max_steps)


def told(solution: Solution[H], space: Space, norm: Numbers, f_norm: Numbers) -> Solution[H]:
    """The solution after more steps, of which the last one measured these norms, (N, 1).

    No tolerance is asked for, so a status says whether the numbers are finite, and nothing else.
    """
    if space.is_in_range(norm) and space.is_in_range(f_norm):  # a look, which is cheaper than what it spares
        status = space.full(Status.MAX_STEPS.value, space.xp.int32)
    else:
        finite = (norm < float("inf")) & (f_norm < float("inf"))
        status = space.select(finite, Status.MAX_STEPS.value, space.full(Status.NONFINITE.value, space.xp.int32))
        status = space.select(norm == 0, Status.CONVERGED.value, status)
    norm, f_norm = space.per_sample(norm), space.per_sample(f_norm)
    relative, tolerance = progress.relative(space, norm, f_norm), space.xp.zeros_like(norm)
    stats = solution.stats._replace(residual=norm, relative=relative, tolerance=tolerance)
    return solution._replace(status=space.per_sample(status), stats=stats)


def only_nonfinite(status: Array) -> Array:
    """Statuses in which NONFINITE alone is a failure."""
    xp = find_backend(status, "status").xp
    nonfinite = xp.full_like(status, Status.NONFINITE.value)
    chosen: Array = xp.where(status == nonfinite, nonfinite, xp.full_like(status, Status.CONVERGED.value))
    return chosen


def _start(space: Space, h0: Any) -> State:
    return space.pack(space.backend.map(space.backend.stop_gradient, h0))


def _solution(
    problem: Problem[H, Any], space: Space, solver: "Solver", x: State, steps: int, *, trace: bool = False
) -> Solution[H]:
    space.shard_as(x)
    h = space.unpack(x)
    atol = solver.absolute_tolerance_of(root=isinstance(problem, RootProblem))
    # The largest number, and not infinity, of which frameworks can be asked to raise an error.
    unknown = space.per_sample(space.full(float(space.backend.finfo(space.dtype).max)))
    stats = Stats(
        space.per_sample(space.full(steps, space.xp.int32)),
        steps,
        unknown,
        space.xp.reshape(space.matrices(0, 1), (0, *space.batch_shape)) if trace else None,
        unknown,
        space.per_sample(space.full(0.0) + settings.absolute(space, atol)),
    )
    return Solution(h, space.per_sample(space.full(Status.MAX_STEPS.value, space.xp.int32)), stats)
