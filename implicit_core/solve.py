"""The one driver: it owns the loop, the stop test and the statuses of every solver."""

from collections.abc import Callable
from typing import Any, NamedTuple

from . import checks
from .backend import Array, Look, PyTree
from .problem import Map, Problem
from .registry import find_backend
from .solution import Solution, Stats, Status
from .solvers import Anderson, CallableSolver, DrivenSolver, Solver
from .solvers.base import Point
from .space import History, Mask, Space, State
from .system import System

PATIENCE = 10
"""A sample whose residual has not fallen for this many steps when the steps run out has stagnated."""


class _Best(NamedTuple):
    x: State
    norm: Array
    steps: Array | int


class _Carry(NamedTuple):
    point: Point
    tolerance: Array
    steps: Array | int
    best: _Best | None
    better: Array | None
    trace: History | None
    memory: Any


def solve(
    problem: Problem | Map,
    h0: PyTree,
    z: PyTree,
    *,
    solver: Solver | CallableSolver | DrivenSolver | Callable[[Problem, PyTree, PyTree], PyTree] = Anderson(),
    batch_ndim: int | None = None,
    throw: bool = False,
    trace: bool = False,
) -> Solution:
    """Find the fixed point h = F(h, z) of every sample.

    Nothing here is differentiable: gradients are an estimator's affair, see :func:`fixed_point`.

    Parameters
    ----------
    problem
        A :class:`Problem`, or F itself, ``f(h, z)``.
    h0
        Where to start: an array or a pytree of real floating arrays, (batch..., state...).
    z
        Inputs and parameters, handed to F as they are.
    solver
        A :class:`Solver`, or any callable ``(problem, h0, z) -> h``, see :class:`CallableSolver`.
    batch_ndim
        How many first axes of every leaf of h0 index independent samples; for a plain F only (default 0).
    throw
        Raise where a sample did not converge.
    trace
        Record every residual in ``stats.trace``.

    Returns
    -------
    Solution
        The point at which each sample's residual ‖F(h) - h‖₂ was measured and met atol + rtol ‖F(h)‖₂, or the best one
        seen, with a status that says so. n steps evaluate F n times; plain iteration in PyTorch twice more, if F
        returns memory that it has returned before.

    Raises
    ------
    SolveError
        With ``throw``, if a sample did not converge.
    TypeError, ValueError
        If an argument, or what F returns, has a wrong type, structure, shape, dtype or device.

    Examples
    --------
    >>> import numpy as np
    >>> import implicit_core as ic
    >>> solution = ic.solve(lambda h, z: np.tanh(0.5 * h + z), np.zeros((2, 3)), np.eye(2, 3), batch_ndim=1)
    >>> solution.status == ic.CONVERGED
    array([ True,  True])
    """
    problem = as_problem(problem, batch_ndim)
    solver = as_solver(solver)
    with find_backend(h0).beside(h0):
        if isinstance(solver, CallableSolver):
            solution = _judge(problem, h0, z, solver)
        elif isinstance(solver, DrivenSolver):
            solution = solver.solve(problem, h0, z, trace=trace)
        else:
            solution = _iterate(System(problem, h0, z, linearizing=solver.uses_jacobian), solver, trace)
        return solution.raise_for_status() if throw else solution


def as_solver(solver: Any) -> Solver | CallableSolver | DrivenSolver:
    """A solver, or a callable as one."""
    if isinstance(solver, (Solver, CallableSolver, DrivenSolver)):
        return solver
    if isinstance(solver, type) or not callable(solver):
        checks.instance("solver", solver, Solver, "Anderson(), or a callable (problem, h0, z) -> h")
    return CallableSolver(solver)


def as_problem(problem: Problem | Map, batch_ndim: int | None) -> Problem:
    """A :class:`Problem` from F and its ``batch_ndim``."""
    if not isinstance(problem, Problem):
        return Problem(problem, batch_ndim=0 if batch_ndim is None else batch_ndim)
    if batch_ndim is not None:
        raise TypeError(
            f"batch_ndim belongs to the problem, which has batch_ndim={problem.batch_ndim}; "
            f"got batch_ndim={batch_ndim} beside it"
        )
    return problem


def _iterate(system: System, solver: Solver, trace: bool) -> Solution:
    space = system.space
    backend, xp = space.backend, space.xp

    def measure(x: State, index: Any) -> tuple[Point, Array]:
        f = system.evaluate(x)
        residual = space.sub(f, x)
        norm = space.norm(residual)
        tolerance = backend.axpy(solver.rtol, space.norm(f), atol)
        # A frozen sample gives these numbers again, and NaN is above no tolerance: both stay finished.
        return Point(x, f, residual, norm, norm > tolerance, index), tolerance

    def advance(carry: _Carry, mask: Mask, better: Mask) -> _Carry:
        best = None if carry.best is None else _fold(space, carry.best, carry.point, carry.steps, better)
        x, memory = solver.step(system, carry.memory, carry.point)
        lent = mask is True and x is carry.point.f  # f may write its next result to where this one is
        if lent:
            x = space.without_graph(x)
        if (lent and not system.writes_anew) or (mask is True and not (lent or solver.steps_anew)):
            x = space.copy(x)
        x = space.round(space.where(mask, x, carry.point.x))
        point, tolerance = measure(x, carry.point.index + 1)
        if lent and system.writes_anew and not space.apart(x, point.f):
            system.writes_anew = False
            system.extra_evaluations += 2
            x = space.round(space.copy(system.evaluate(carry.point.x)))
            point, tolerance = measure(x, carry.point.index + 1)
        steps = space.tally(carry.steps, mask)
        if best is not None and solver.retries_nonfinite:
            retry = ~_finite(point.norm) & _finite(best.norm) & (steps - best.steps < PATIENCE)
            point = point._replace(active=point.active | retry)
        memory = solver.observe(system, memory, point)
        record = None if carry.trace is None else _record(space, carry.trace, point, carry.point.active)
        improved = None if best is None else point.norm < best.norm
        return _Carry(point, tolerance, steps, best, improved, record, memory)

    def body(carry: _Carry) -> _Carry:
        return advance(carry, carry.point.active, carry.better)

    def masks(carry: _Carry) -> tuple[Array, ...]:
        return (carry.point.active,) if carry.better is None else (carry.point.active, carry.better)

    def informed(carry: _Carry, counts: list[int]) -> _Carry:
        # Mostly all samples are active, and all are better than they were: nothing to freeze, and nothing to keep.
        known = [_known(mask, n, space.samples) for mask, n in zip(masks(carry), counts, strict=True)]
        return advance(carry, known[0], known[-1])

    def begin() -> _Carry:
        start = space.copy(space.pack(backend.map(backend.stop_gradient, space.like)))
        # A best point is kept for longer than until the next evaluation.
        system.writes_anew = not solver.keeps_best and space.apart(start, space.pack(space.like))
        point, tolerance = measure(start, 0)
        if system.pure is not True:  # nothing is active then: the loop's first look tells, and costs no other
            point = point._replace(active=point.active & system.pure)
        space.spread_as(point.f)
        point = point._replace(x=space.spread(point.x))
        steps = 1 if backend.readable(point.norm) else space.full(1, xp.int32)
        best = _Best(point.x, space.full(float("inf")), steps) if solver.keeps_best else None
        record = None
        if trace:
            unknown = space.full(float("nan"))[:, None, :] + space.matrices(solver.max_steps, 1)
            record = _record(space, (unknown,), point, space.full(True, xp.bool))
        memory = solver.observe(system, solver.init(system, point.x), point)
        improved = None if best is None else point.norm < best.norm
        return _Carry(point, tolerance, steps, best, improved, record, memory)

    with backend.solving():
        atol = space.scalar(solver.absolute_tolerance)
        look = Look(masks, informed)
        # Nothing here holds the first point, or the loop would run with it beside its own.
        carry = backend.while_loop(
            lambda c: xp.any(c.point.active), body, begin(), solver.max_steps - 1, solver.check_every, look
        )
        if system.pure is not True and carry.point.index == 0 and not system.pure:
            return _restarted(system, solver, trace, carry.point.x)
        return _solution(system, carry)


def _restarted(system: System, solver: Solver, trace: bool, start: State) -> Solution:
    """The solve from a start of its own, where h0 lay in memory that f writes its results to.

    Raises
    ------
    ValueError
        If it is the start that f wrote to.
    """
    space = system.space
    kept, jacobian = space.copy(start), solver.uses_jacobian
    again = System(system.problem, space.unpack(space.copy(start)), system.z, linearizing=jacobian)
    again.evaluate(kept)
    if not again.pure:
        raise ValueError("f wrote to its argument h; it must return a new array: `0.5 * h`, not `h *= 0.5`")
    again = System(system.problem, again.space.like, system.z, linearizing=jacobian)
    again.pure = True
    solution = _iterate(again, solver, trace)
    return solution._replace(stats=solution.stats._replace(evaluations=solution.stats.evaluations + 2))


def _finite(norm: Array) -> Array:
    # One operation, where `isfinite` may be several: a norm is not negative, and NaN is below nothing.
    return norm < float("inf")


def _known(mask: Array, count: int, samples: int) -> Mask:
    return count > 0 if count in (0, samples) else mask


def _fold(space: Space, best: _Best, point: Point, steps: Array | int, better: Mask) -> _Best:
    (norm,) = space.where(better, (point.norm,), (best.norm,))
    return _Best(space.where(better, point.x, best.x), norm, space.choose(better, steps, best.steps))


def _record(space: Space, trace: History, point: Point, was_active: Array) -> History:
    norm = space.backend.where(was_active, point.norm, space.full(float("nan")))
    return space.set_row(trace, point.index, (norm,))


def _solution(system: System, carry: _Carry) -> Solution:
    space, point = system.space, carry.point
    backend, xp = space.backend, space.xp
    finite = _finite(point.norm) & _finite(carry.tolerance)
    converged = finite & ~point.active
    status = backend.where_number(finite, Status.MAX_STEPS.value, space.full(Status.NONFINITE, xp.int32))
    x, norm = point.x, point.norm
    steps = space.counts(carry.steps)
    if carry.best is not None:
        best = _fold(space, carry.best, point, carry.steps, carry.better)
        stagnated = finite & (steps - space.counts(best.steps) >= PATIENCE)
        status = backend.where_number(stagnated, Status.STAGNATED.value, status)
        x = space.where(converged, point.x, best.x)
        norm = backend.where(converged | ~_finite(best.norm), point.norm, best.norm)
    elif system.writes_anew and isinstance(point.index, int) and point.index > 0:
        x = space.copy(x)  # it may lie where f wrote its result, and will write another
    status = backend.where_number(converged, Status.CONVERGED.value, status)
    trace = None
    if carry.trace is not None:
        rows = xp.permute_dims(carry.trace[0][:, :, 0], (1, 0))
        trace = xp.reshape(rows, (rows.shape[0], *space.batch_shape))
    stats = Stats(
        steps=space.per_sample(steps),
        evaluations=point.index + 1 + system.extra_evaluations,
        residual=space.per_sample(norm),
        trace=trace,
    )
    # Once more: without a graph, a framework may still carry forward-mode tangents.
    value = backend.map(backend.stop_gradient, space.unpack(x))
    return Solution(value, space.per_sample(status), stats)


def _judge(problem: Problem, h0: PyTree, z: PyTree, solver: CallableSolver) -> Solution:
    """What a foreign solver found, measured by one more evaluation of F."""
    calls = 0
    like = System(problem, h0, z).space

    def counted(h: PyTree, z: PyTree) -> PyTree:
        nonlocal calls
        # How often a traced call is carried out can't be known.
        calls += all(like.backend.readable(leaf) for leaf in like.backend.flatten(h)[0])
        return problem.f(h, z)

    with like.backend.solving():
        h = solver.function(problem.replace_f(counted), like.backend.map(like.backend.stop_gradient, h0), z)
    checks.like(like.backend, "the result of the solver", h, h0, "h0")
    # In memory of its own: it may lie where f writes its results.
    h = like.unpack(like.copy(like.pack(h)))
    solution = _iterate(System(problem, h, z), solver.judge(), trace=False)
    xp, status, stats = like.xp, solution.status, solution.stats
    gave_up = xp.full(status.shape, Status.STAGNATED.value, dtype=status.dtype, device=like.device)
    status = xp.where(status == Status.MAX_STEPS.value, gave_up, status)
    return Solution(solution.value, status, stats._replace(steps=stats.steps + calls, evaluations=1 + calls))
