"""What adapters build a layer from: the options of :func:`implicit_core.fixed_point`, and the solver's point.

An adapter is a module with one function, ``layer(problem, h0, z, options) -> Solution``, whose value is differentiable
in its framework.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol

from . import forced, progress, settings
from .arrays import Array, H, Numbers, Z
from .backend import Backend
from .estimators import AtFixedPoint, Estimator
from .forced import has_no_tolerance, is_forced, is_plain, unmeasured, unsolved
from .iteration import finite
from .problem import Problem
from .progress import RESOLVED
from .records import is_array
from .registry import find_backend
from .solution import Solution, Status, warn_of_failures, warn_of_nonfinite
from .solve import solve_from_arrays
from .solvers import FixedPointIteration, FixedPointSolver
from .solvers.here import Here
from .space import Space


@dataclass(frozen=True)
class LayerOptions:
    """Options of :func:`implicit_core.fixed_point`, checked.

    Attributes
    ----------
    solver, gradient, throw, trace
        As there.
    examine
        Called with f and the solver's point before the estimator evaluates f there, so that what f leaves behind, such
        as an auxiliary loss, comes from the estimator's evaluations. For adapters of their own layers.
    """

    solver: FixedPointSolver
    gradient: Estimator
    throw: bool = False
    trace: bool = False
    examine: Callable[[Any, Any], None] | None = None

    def __post_init__(self) -> None:
        # The steps of an unrolled estimator behind a number of steps are those of a recurrent model: whoever asks for
        # them estimates no fixed point, whose derivative growing cotangents would miss (Decision 131).
        gradient: Any = self.gradient
        warns = not isinstance(gradient, AtFixedPoint) and getattr(gradient, "on_growth", None) == "warn"
        if warns and has_no_tolerance(self.solver):
            object.__setattr__(self, "gradient", replace(gradient, on_growth="ignore"))


NO_DEFAULT = (
    "a forced number of plain steps, as solver=ic.steps(n) makes, has no default gradient: add "
    "gradient=ic.Unroll(k, 1.0), which makes k more steps and differentiates them, or gradient=ic.OneStep(), which "
    "makes none"
)


def gradient_or_default(gradient: Estimator | None, default: Estimator, solver: object) -> Estimator:
    """The estimator that a layer was given, or the default one, which is for points that a solve found."""
    if gradient is not None:
        return gradient
    check_has_default(solver)
    return default


def check_has_default(solver: object) -> None:
    """Raise TypeError for a solver that has no default gradient."""
    if isinstance(getattr(solver, "solver", solver), FixedPointIteration) and is_forced(solver):  # or within Compacting
        raise TypeError(NO_DEFAULT)


class Layer(Protocol):
    """The function ``layer`` of an adapter."""

    def __call__(self, problem: Problem[H, Z], h0: H, z: Z, options: LayerOptions) -> Solution[H]:
        """The estimator's value, differentiable, and the solve's status and stats.

        A problem without callbacks stands for its plain ``f``, which the framework differentiates.
        """
        ...


def undifferentiated(problem: Problem[H, Z], h0: H, z: Z, options: LayerOptions) -> Solution[H]:
    """The layer of a framework without autodiff."""
    solution = solver_point(problem, h0, z, options)
    if isinstance(options.gradient, AtFixedPoint):
        return told(solution, options, problem, ())
    watched = Watched(problem.fixed_point_form(solution.value, z), options.gradient)
    value = options.gradient.value(watched.problem, solution.value, z)
    return watched.told(solution._replace(value=value), options)


def solver_point(problem: Problem[H, Z], h0: H, z: Z, options: LayerOptions, *, measured: bool = False) -> Solution[H]:
    """The point at which the estimator starts: the solver's, or h0 itself, where F is not evaluated.

    Whether it converged is not asked here: ``throw`` speaks of the estimator's value, see :meth:`Watched.told`. With
    ``measured`` the last of a forced number of steps is measured here, and not left to the estimator's.
    """
    if replaces_solve(options.gradient):
        return unsolved(problem, h0, measuring(options.solver), trace=options.trace)
    solver = starting_solver(options)
    # The estimator's own steps measure the last of them.
    at_once = measured or options.trace or isinstance(options.gradient, AtFixedPoint)
    if is_plain(solver) and not at_once and (solution := unmeasured(problem, h0, z, solver)) is not None:
        return solution
    return solve_from_arrays(problem, h0, z, solver=solver, trace=options.trace)


def replaces_solve(gradient: Estimator) -> bool:
    """Whether the estimator's own steps begin at h0, and measure it."""
    return gradient.starts_from_h0 and not isinstance(gradient, AtFixedPoint)


def starting_solver(options: LayerOptions) -> FixedPointSolver:
    """The solver that finds the point at which the estimator starts."""
    if not options.gradient.starts_from_h0:
        return options.solver
    like = measuring(options.solver)
    return Here(rtol=like.rtol, atol=like.atol)


class Watched(Generic[H, Z]):
    """A problem that remembers where F was evaluated last: by the last step of an estimator's value (Decision 72).

    Parameters
    ----------
    problem
        The problem.
    gradient
        The estimator. If it replaces the solve, its first evaluation of F is remembered too.
    keep
        What to remember of a point, before F is evaluated there: a copy if F may write to its memory.

    Attributes
    ----------
    problem
        The same problem, watched.
    """

    def __init__(self, problem: Problem[H, Z], gradient: Estimator, keep: Callable[[H], H] = lambda h: h) -> None:
        self._noted = noted = list[tuple[Any, Any]]()
        self._with_first = with_first = replaces_solve(gradient)

        def note(h: H, f: H) -> None:  # no method, which would tie the problem, and what it holds, to this object
            if with_first and not noted:  # F may write its next result to the same memory
                backend = find_backend(h, "h")
                h, f = _copied(backend, h), _copied(backend, f)
            noted[with_first:] = [(h, f)]

        self.problem = problem.watched(note, keep)
        self.problem.watches_first = with_first

    def norms(self, space: Space | None = None) -> tuple[Numbers, ...]:
        """‖F(h) - h‖ and ‖F(h)‖ at the last evaluation, without a graph; empty if there was none.

        If the estimator replaces the solve, the two at the first evaluation follow. ``space`` is that of h, if known.
        """
        if not self._noted:
            return ()
        ends = [self._noted[-1], self._noted[0]] if self._with_first else self._noted
        norms = [norm for h, f in ends for norm in self._norms_at(h, f, space)]
        self._noted.clear()  # they may hold a graph
        return tuple(norms)

    def _norms_at(self, h: H, f: H, space: Space | None) -> tuple[Numbers, Numbers]:
        space = space or self.problem.space(h)
        backend = space.backend
        with backend.on_device_of(h), backend.solving():
            h, f = (backend.map(backend.stop_gradient, tree) for tree in (h, f))
            x, fx = space.pack(h), space.accept("the result of f", f)
            residual, f_norm = space.sub(fx, x), space.norm(fx)
            norm = space.norm(residual)
            if space.is_in_range(space.xp.maximum(norm, f_norm)):
                return norm, f_norm
            return space.norm_of_any_size(residual), space.norm_of_any_size(fx)

    def told(self, solution: Solution[H], options: LayerOptions) -> Solution[H]:
        """See :func:`told`."""
        space = self.problem.space(solution.value)
        norms = self.norms(space)
        found = of_value(solution, options, self.problem, norms, space)
        if is_forced(options.solver) and norms and all(map(space.is_in_range, norms)):
            return found  # no sample is NONFINITE, which alone would be told
        return announced(found, options)


def _copied(backend: Backend, tree: H) -> H:
    """A pytree without a graph, in memory of its own. A leaf that is no array stays as it is: it is refused later."""
    if backend.immutable:
        return tree
    xp = backend.xp
    copied: H = backend.map(
        lambda x: xp.asarray(backend.stop_gradient(x), copy=True) if backend.is_array(x) else x, tree
    )
    return copied


def told(
    solution: Solution[H], options: LayerOptions, problem: Problem[H, Any], norms: tuple[Numbers, ...]
) -> Solution[H]:
    """The solution, with a status and stats that speak of the estimator's value; raises if ``throw`` asks for it.

    ``norms`` are :meth:`Watched.norms`. For an estimator whose value is the solver's point there are none, and status
    and stats are the solver's own.
    """
    return announced(of_value(solution, options, problem, norms), options)


def of_value(
    solution: Solution[H],
    options: LayerOptions,
    problem: Problem[H, Any],
    norms: tuple[Numbers, ...],
    space: Space | None = None,
) -> Solution[H]:
    """The solution, with a status and stats that speak of the estimator's value, if it has norms of its own."""
    if not norms:
        return solution
    space = space or problem.space(solution.value)
    with space.backend.on_device_of(solution.value), space.backend.solving():
        return _of_value(solution, options, space, *in_terms_of_g(problem.relaxation, norms, solution))


def in_terms_of_g(
    relaxation: Numbers | None, norms: tuple[Numbers, ...], solution: Solution[Any]
) -> tuple[Numbers, ...]:
    """The norms of g, from norms of F(x) - x = -α g(x), and the residual at the solver's point beside them."""
    if relaxation is None:
        return norms
    norm, _, *at_start = norms
    if at_start:
        first = at_start[0] / relaxation
        return norm / relaxation, first, first, first
    residual = solution.stats.residual
    return norm / relaxation, find_backend(residual, "residual").xp.reshape(residual, (-1, 1))


def announced(solution: Solution[H], options: LayerOptions) -> Solution[H]:
    """The solution, after an error if ``throw`` asks for it, or a warning of samples that did not converge.

    Of a forced number of steps no sample need have converged, but all have to be finite; a warning asks no more where
    there is no tolerance, nor of :class:`BPTT`.
    """
    status, residual = solution.status, solution.stats.residual
    backend = find_backend(status, "status")
    if options.throw:
        check_for_throw(solution, options.solver)
        return solution
    finite_is_enough = options.gradient.starts_from_h0 or has_no_tolerance(options.solver)
    if finite_is_enough and not _reads_freely(backend, residual):
        return solution
    if backend.readable(status):
        warn = warn_of_nonfinite if finite_is_enough else warn_of_failures
        backend.tell(warn, backend.xp.astype(status, residual.dtype), residual)
    return solution


def check_for_throw(solution: Solution[Any], solver: object) -> None:
    """Raise :class:`SolveError` of what ``throw`` asks for: all samples converged, or are finite after forced steps."""
    status = forced.only_nonfinite(solution.status) if is_forced(solver) else solution.status
    solution._replace(status=status).raise_for_status()


def _reads_freely(backend: Backend, residual: Array) -> bool:
    """Whether nothing that a tracer records, without numbers of a loop's, would be refused for a look at a status."""
    try:
        return backend.readable(backend.xp.reshape(residual, (-1, 1)))
    except NotImplementedError:
        return False


def measuring(solver: object) -> FixedPointIteration:
    """A solver with the tolerances of another one, or the default ones if it has none."""
    rtol, atol = getattr(solver, "rtol", None), getattr(solver, "atol", None)
    plain = FixedPointIteration()
    return plain if rtol is None else replace(plain, rtol=rtol, atol=atol)


def _of_value(
    solution: Solution[H], options: LayerOptions, space: Space, norm: Numbers, f_norm: Numbers, *at_start: Numbers
) -> Solution[H]:
    """The solution told of h_k, given the norms at h_{k-1}, and at h0 if no solve measured them."""
    if is_forced(options.solver) and not at_start:
        return forced.told(solution, space, norm, f_norm)
    xp, status, stats = space.xp, solution.status, solution.stats
    norm, f_norm = space.per_sample(norm), space.per_sample(f_norm)
    first, rounding = stats.residual, RESOLVED * space.coarsest_eps * f_norm
    if at_start:
        solver = settings.bound(measuring(options.solver), space, constant=True)
        rtol: Any = progress.reachable(space, solver.rtol)
        rtol = space.per_sample(rtol) if is_array(rtol) and rtol.shape != () else rtol
        first, first_f = (space.per_sample(number) for number in at_start)
        cap = progress.largest_converged(space, first, rtol * first_f + stats.tolerance, rtol)
        tolerance = xp.maximum(xp.minimum(rtol * f_norm + stats.tolerance, cap - rounding), xp.zeros_like(first))
        # A start where F is not finite says nothing of how far the residual fell.
        status = xp.where(finite(first), status, xp.full_like(status, Status.NONFINITE.value))
        tolerance = xp.where(finite(first), tolerance, xp.zeros_like(first))
    elif stats.tolerance is None:  # somebody else's solver, whose word is taken for its point
        tolerance = xp.where(status == Status.CONVERGED.value, xp.maximum(first, rounding), xp.zeros_like(first))
    else:
        tolerance = stats.tolerance
    # F is not evaluated at h_k. Its residual is smaller still where the steps contract. Where they grew, it is larger,
    # by no more than the residual grew over all steps.
    growth = norm / xp.maximum(first, rounding + float(space.backend.finfo(space.dtype).smallest_normal))
    converged = (norm <= tolerance) & ((growth <= 1) | (norm * growth <= tolerance))
    if stats.tolerance is not None and not at_start:
        # Where the solver's own test ended a sample, the tolerance is its residual there: the test asked for no less.
        tested = (status == Status.CONVERGED.value) & (first >= stats.tolerance)
        converged = converged | (tested & (growth <= progress.NEAR_LIMIT))
    # Not from where rounding may hide the residual, nor where the solve met numbers beyond the range.
    converged = converged & (status != Status.DIVERGED.value) & finite(first) & finite(tolerance)
    left = ~converged & ((status == Status.CONVERGED.value) | (growth > progress.GROWTH))
    for mask, code in (
        (left, Status.DIVERGED),
        (converged, Status.CONVERGED),
        (~(finite(norm) & finite(f_norm)), Status.NONFINITE),
    ):
        status = xp.where(mask, xp.full_like(status, code.value), status)
    relative = progress.relative(space, norm, f_norm)
    return solution._replace(status=status, stats=stats._replace(residual=norm, relative=relative, tolerance=tolerance))
