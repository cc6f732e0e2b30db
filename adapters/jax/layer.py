"""The differentiable layer on JAX arrays."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from implicit_core import checks
from implicit_core.arrays import H, Numbers, Z
from implicit_core.backends.jax import BACKEND, coupled_axes, debugs_nans, noticing, sharded
from implicit_core.backends.jax_internals import ShapedArray
from implicit_core.estimators import BPTT, AtFixedPoint, Derivative, Estimator, OneStep, Unroll
from implicit_core.forced import is_forced, unsolved
from implicit_core.layer import (
    LayerOptions,
    Watched,
    announced,
    in_terms_of_g,
    measuring,
    of_value,
    replaces_solve,
    solver_point,
    starting_solver,
)
from implicit_core.problem import Map, Problem
from implicit_core.root_problem import RootProblem
from implicit_core.solution import Solution
from implicit_core.solve import solve_as_it_is
from implicit_core.solvers import FixedPointSolver
from implicit_core.solvers.compacting import without_compacting

from .batching import MapOfArrays, with_vmap_as_batch
from .callbacks import value_from_callbacks
from .closure import compiled_for, hoist, is_traced
from .derivative import with_derivative
from .growth import Growth, compare, fork
from .leaves import Arrays, Static, T, Units, is_array, partition
from .maps import EagerMap, TracedMap
from .problem import JAXProblem
from .problem import problem as problem_of
from .settings import StaticOptions, split, split_record
from .state import hoist_without_writes

UNTRACEABLE = (
    "JAX cannot trace f, which uses NumPy or asks for the number in an array. If it has to, "
    "implicit_core.adapters.jax.problem(f, jit=False) is a problem whose f is never traced, outside of jax.jit alone"
)
R = TypeVar("R")
AnyMap = TracedMap[H] | EagerMap[H, Any]


def layer(problem: Problem[H, Z], h0: H, z: Z, options: LayerOptions) -> Solution[H]:
    """The layer on JAX arrays, see :class:`implicit_core.layer.Layer`. F is traced once, whatever the solver does.

    Parameters
    ----------
    problem
        If it has no callbacks, or is made by :func:`implicit_core.adapters.jax.problem`, JAX differentiates the layer
        with respect to z and to all arrays that f closes over: in both modes, to every order, under ``jit``, ``vmap``,
        ``scan``, ``checkpoint`` and ``shard_map``. Otherwise the callbacks differentiate the layer: once, with respect
        to z alone, in the modes that there are callbacks for.
    h0, z, options
        As for :class:`implicit_core.layer.Layer`. Leaves of h0 may be numbers or arrays of NumPy.

    Raises
    ------
    ValueError
        If arrays that f or the user's callbacks close over are differentiated; they would get no gradient.
    NotImplementedError
        For a derivative that is not available. It is never silently zero.
    """
    options = replace(options, solver=without_compacting(options.solver))  # F is traced for one number of rows
    h0 = jax.tree.map(_as_array, h0)
    checks.state(BACKEND, problem.names.start, h0, problem.batch_ndim)
    if problem.has_derivatives and not isinstance(problem.base, JAXProblem):
        return _layer_of_callbacks(problem, h0, z, options)
    try:
        h0, f, inputs, static = _map(problem, h0, z)
        relaxation, form = None, problem
        if replaces_solve(options.gradient):
            solution = unsolved(problem, _constants(h0), measuring(options.solver), trace=options.trace)
        else:
            solution = _solve(f, h0, inputs, static, options, problem.jacobian)
        if isinstance(problem, RootProblem):
            form = problem.with_factors(_factors(problem, solution.value, z, options.gradient))
            _, f, inputs, _ = _map(problem, solution.value, z, form)
            relaxation = form.relaxation
    except jax.errors.JAXTypeError as error:
        error.add_note(UNTRACEABLE)
        raise
    if isinstance(options.gradient, AtFixedPoint):
        prepared = options.gradient.prepared(form, *_constants((solution.value, z)))
        if prepared is not options.gradient:
            options = replace(options, gradient=_constants(prepared))
    return _like_start(_with_value(f, solution, inputs, options, relaxation), h0)


def solve_compiled(problem: Problem[H, Z], h0: H, z: Z, solver: FixedPointSolver, *, trace: bool) -> Solution[H] | None:
    """A solve outside of ``jax.jit`` as a compiled program; None where it is none.

    Where JAX is tracing, the solve becomes a part of what is traced. An F that JAX can't trace, and a solver that may
    run code of the user's, are run as they are.
    """
    user_code = getattr(solver, "runs_user_code", True) or not all(map(is_array, jax.tree.leaves(h0)))
    callbacks = problem.has_derivatives and not isinstance(problem.base, JAXProblem)
    if (
        user_code
        or is_traced((h0, z, split_record(solver)[0]))
        or (callbacks and getattr(solver, "uses_jacobian", True))
    ):
        return None
    try:
        h0, f, inputs, static = _map(problem, h0, z)
        if not f.shared:
            return None
        options = LayerOptions(solver, OneStep(), trace=trace)
        return _like_start(_solve(f, h0, inputs, static, options, problem.jacobian), h0)
    except jax.errors.JAXTypeError:  # F or a Jacobian reads a number of an array, or converts it to one of NumPy
        return None


def _layer_of_callbacks(problem: Problem[H, Z], h0: H, z: Z, options: LayerOptions) -> Solution[H]:
    """The layer of a Problem whose derivatives are the user's callbacks."""
    arrays, static = partition(z, is_array)
    f = hoist(lambda h, arrays: problem.f(h, static.combine(arrays)), h0, arrays)
    with coupled_axes(f.program.axes):
        solution = solver_point(problem, *_constants((h0, z)), options)
        if not isinstance(options.gradient, AtFixedPoint):
            problem = problem.fixed_point_form(*_constants((solution.value, z)))
        return value_from_callbacks(problem, options, solution, z, f.closed_over)


def _factors(problem: RootProblem[H, Z], h: H, z: Z, gradient: Estimator) -> H:
    """What makes an F of a root's g, see :meth:`RootProblem.factors`."""
    return _constants(problem.factors(*_constants((h, z)), relaxed=gradient.relaxes))


def _map(
    problem: Problem[H, Z], h0: H, z: Z, form: Problem[H, Z] | None = None
) -> tuple[H, AnyMap[H], Arrays, Static[Z]]:
    """``h0``, F, its inputs, and z without its arrays. F is traced again if h0 has another type than F(h0).

    Of a root this is g, or the F of its fixed-point ``form``. If h0 is on all devices, it is sharded as F(h0)
    is. If it is a Python number, it gets the dtype of F(h0).
    """
    arrays, static = partition(z, is_array)
    function, g_units = (problem if form is None else form).f, None
    if isinstance(problem, RootProblem) and form is None:
        g_units = Units(problem.g_scale)
    settings = problem.batch_ndim, Units(problem.scale), g_units
    # Where JAX traces the solve, it traces F too: what F closes over has derivatives that F alone cannot know of.
    base = problem.base
    if isinstance(base, JAXProblem) and not base.traced and not is_traced(_constants((h0, arrays))):
        return h0, EagerMap(function, static, *settings), arrays, static

    def f(h: H, arrays: Arrays) -> H:
        value: H = checks.structured(BACKEND, function(h, static.combine(arrays)), h)
        if remedy := checks.unregistered(jax.tree.leaves(value)):  # JAX would say that it is no type of its own
            raise TypeError(f"the result of {problem.names.function} must hold arrays of jax{remedy}")
        return value

    hoisted = hoist_without_writes(f, h0, arrays, function)
    result = hoisted.program.result
    if BACKEND.flatten(result)[1] == BACKEND.flatten(h0)[1]:  # otherwise the solve raises
        like_result = jax.tree.map(_like, h0, result)
        if jax.tree.map(jax.typeof, like_result) != jax.tree.map(jax.typeof, h0):
            h0, hoisted = like_result, hoist(f, like_result, arrays)
    traced = TracedMap(hoisted.program, *settings)
    return h0, traced, [*arrays, *hoisted.closed_over], static


def _problem(f: AnyMap[H], mapped: Map[H, Any] | None = None, batch_ndim: int | None = None) -> Problem[H, Any]:
    """F, or F mapped over an axis of the batch, as a problem in its inputs."""
    batch_ndim = f.batch_ndim if batch_ndim is None else batch_ndim
    made = problem_of(mapped or f, batch_ndim=batch_ndim, scale=f.units.scale, jit=f.traced)
    return made if f.g_units is None else RootProblem.of(made, f.g_units.scale)


def _solve(
    f: AnyMap[H],
    h0: H,
    inputs: Arrays,
    static: Static[Z],
    options: LayerOptions,
    jacobian: Callable[[H, Z], Any] | None = None,
) -> Solution[H]:
    """The solver's point. Its derivative is zero, so JAX never differentiates the loop (Decision 46)."""
    solver = starting_solver(options)
    numbers, static_solver = split_record(solver)
    arguments = h0, inputs, numbers = _constants((h0, inputs, numbers))
    given = jacobian if getattr(solver, "uses_jacobian", False) else None
    if getattr(solver, "runs_user_code", True) or given is not None:
        return _by_user_code(f, h0, inputs, static, static_solver.combine(numbers), given, trace=options.trace)
    settings = static_solver, options.trace
    if f.has_named_axes:
        # An axis of `vmap` may be one that F communicates over, and then has to stay one. Decision 49.
        return _solving(f, *settings)(*arguments)
    # A trace has NaN where samples are finished, and JAX would look at all results of a program. It has a row for each
    # step, whose number a program would not know.
    seen = options.trace and (debugs_nans() or is_array(getattr(solver, "max_steps", None)))
    solution: Solution[H]
    if is_traced(arguments):
        solving = _mapped_solving(f, *settings) if seen else compiled_for(_mapped_solving, f, *settings)
        solution = solving(*arguments)
        return solution
    if seen or not f.shared:
        return _solving(f, *settings)(*arguments)
    solution, looks = compiled_for(_watched_solving, f, *settings)(*arguments)
    if bool(looks):  # what a compiled program can only notice, a Python loop looks into: it warns, raises, or goes on
        return _solving(f, *settings)(*arguments)
    evaluations = int(solution.stats.evaluations)
    return solution._replace(stats=solution.stats._replace(evaluations=evaluations))


# The solves of a program, as functions of h0, the inputs and the arrays in the solver: what they depend on besides is
# the settings alone.

Solve = Callable[[H, Arrays, Arrays], R]


def _solving(f: AnyMap[H], solver: Static[FixedPointSolver], trace: bool) -> Solve[H, Solution[H]]:
    def solving(h0: H, inputs: Arrays, numbers: Arrays) -> Solution[H]:
        with coupled_axes(f.axes):
            return solve_as_it_is(_problem(f), h0, inputs, solver.combine(numbers), trace=trace)

    return solving


def _mapped_solving(f: AnyMap[H], solver: Static[FixedPointSolver], trace: bool) -> Solve[H, Solution[H]]:
    """A solve where an axis of ``vmap`` becomes a batch axis."""

    def solving(mapped: MapOfArrays[H], h0: H, inputs: Arrays, numbers: Arrays, batch_ndim: int) -> Solution[H]:
        with coupled_axes(()):  # a layer around this one may communicate
            return solve_as_it_is(_problem(f, mapped, batch_ndim), h0, inputs, solver.combine(numbers), trace=trace)

    return lambda h0, inputs, numbers: with_vmap_as_batch(solving, f, h0, inputs, numbers, f.batch_ndim)


def _watched_solving(
    f: AnyMap[H], solver: Static[FixedPointSolver], trace: bool
) -> Solve[H, tuple[Solution[H], jax.Array]]:
    """A solve, and whether there was something that its caller has to look into."""
    return _noticing(_solving(f, solver, trace))


def _noticing(solving: Callable[..., Solution[H]]) -> Callable[..., tuple[Solution[H], jax.Array]]:
    """A solve that is traced, and whether there was something that its caller has to look into."""

    def watched(*arguments: Any) -> tuple[Solution[H], jax.Array]:
        with noticing() as noticed:
            solution = solving(*arguments)
        # Not where a sample is not finite: the others are bit-identical whatever it holds, so by the same program.
        looks = jnp.asarray(False)
        for mask in noticed:
            looks = looks | jnp.any(mask)
        return solution, looks

    return watched


def _by_user_code(
    f: AnyMap[H],
    h0: H,
    inputs: Arrays,
    static: Static[Z],
    solver: FixedPointSolver,
    jacobian: Callable[[H, Z], Any] | None,
    *,
    trace: bool,
) -> Solution[H]:
    """A solve by a solver or a Jacobian that may do anything: call F with another z, or close over arrays."""
    size = len(static.indices)

    def solving(h0: H, inputs: Arrays) -> Solution[H]:
        closed_over = inputs[size:]
        with coupled_axes(f.axes):
            in_z: Problem[H, Z] = _problem(f, lambda h, z: f(h, [*static.select(z), *closed_over]))
            in_z.jacobian = jacobian
            return solve_as_it_is(in_z, h0, static.combine(inputs[:size]), solver, trace=trace)

    if not is_traced((h0, inputs)):
        if getattr(solver, "runs_user_code", True) or not f.traced:
            return solving(h0, inputs)
        compiled = hoist(_noticing(solving), h0, inputs)
        solution, looks = compiled.program(h0, inputs, compiled.closed_over)
        if bool(looks):
            return solving(h0, inputs)
        return solution._replace(stats=solution.stats._replace(evaluations=int(solution.stats.evaluations)))
    # The solver knows nothing of batch axes, and may close over arrays that are differentiated.
    hoisted = hoist(solving, h0, inputs)
    return _constants(hoisted.program(h0, inputs, _constants(hoisted.closed_over)))


def _with_value(
    f: AnyMap[H], solution: Solution[H], inputs: Arrays, options: LayerOptions, relaxation: Numbers | None
) -> Solution[H]:
    """The solution with the estimator's value from the solver's point, differentiable, and what is told of it.

    ``relaxation`` is α of a root, see :attr:`Problem.relaxation`.
    """
    gradient, h = options.gradient, solution.value
    if isinstance(gradient, (Unroll, BPTT)) and type(gradient) in (Unroll, BPTT):  # a derived class may override `vjp`
        return _unrolled(f, solution, inputs, gradient, options, relaxation)
    has_both_modes = not f.has_custom_vjp
    if has_both_modes and isinstance(gradient, AtFixedPoint) and gradient.derivative is not Derivative.ONCE:
        value = with_derivative(h, inputs, f, gradient)
        # Under `jit` this is a check for `checkify`. Decision 53.
        return announced(solution, options)._replace(value=value)
    with coupled_axes(f.axes):
        problem = _problem(f)
        problem.relaxation = relaxation
        return value_from_callbacks(problem, options, solution, inputs, ())


def _unrolled(
    f: AnyMap[H],
    solution: Solution[H],
    inputs: Arrays,
    gradient: Unroll | BPTT,
    options: LayerOptions,
    relaxation: Numbers | None,
) -> Solution[H]:
    """The k steps from the solver's point, which JAX differentiates."""
    growth = Growth(gradient.growth, f.batch_ndim, f.units.scale)

    def steps(h: H, first: int, end: int) -> tuple[H, tuple[Numbers, ...]]:
        numbers, static = split_record(gradient)
        result: tuple[H, tuple[Numbers, ...]] = compiled_for(_stepping, f, static, first, end)(h, inputs, numbers)
        return result

    h = solution.value
    if growth.watches(f.axes):
        # The first step starts at a constant, where no cotangent arrives, so growth is measured from h_1 on.
        h_1, at_start = steps(h, 0, 1)
        h_1, reference = fork(h_1, growth, primal=True)
        h_k, norms = steps(h_1, 1, gradient.largest)
        if gradient.starts_from_h0:
            norms = (*norms[:2], *at_start[:2])
        h_k = compare(h_k, h_k, reference, growth, primal=True)
    else:
        h_k, norms = steps(h, 0, gradient.largest)
    norms = in_terms_of_g(relaxation, norms, solution)
    # Of the solver, only the tolerances of a start are asked for, and whether there are any.
    solver = measuring(options.solver if gradient.starts_from_h0 or is_forced(options.solver) else None)
    static, numbers = split(LayerOptions(solver, gradient))
    kept = {"evaluations": solution.stats.evaluations, "trace": solution.stats.trace}
    solution = solution._replace(stats=solution.stats._replace(evaluations=0, trace=None))
    solution = compiled_for(_telling, f, static)(solution, norms, numbers)
    return announced(solution._replace(value=h_k, stats=solution.stats._replace(**kept)), options)


def _stepping(
    f: AnyMap[H], gradient: Static[Unroll | BPTT], first: int, end: int
) -> Callable[[H, Arrays, Arrays], tuple[H, tuple[Numbers, ...]]]:
    """The steps of an estimator from h_first to h_end, and the norms where F was evaluated last."""

    def stepping(h: H, inputs: Arrays, numbers: Arrays) -> tuple[H, tuple[Numbers, ...]]:
        estimator = gradient.combine(numbers)
        unroll = estimator if isinstance(estimator, Unroll) else estimator.unrolled
        recompute = unroll.recompute
        if recompute and not f.traced:
            raise NotImplementedError("Unroll(recompute=True) traces f, which jit=False forbids: take recompute=False")
        watched = Watched(_problem(f, jax.checkpoint(f) if recompute else f), estimator)
        with coupled_axes(f.axes):
            h_k: H = unroll.steps(watched.problem, h, inputs, first, end)
            return h_k, watched.norms()

    return stepping


def _telling(f: AnyMap[H], options: StaticOptions) -> Callable[[Solution[H], tuple[Numbers, ...], Arrays], Solution[H]]:
    steps = _problem(f)
    return lambda solution, norms, numbers: of_value(solution, options.join(numbers), steps, norms)


def _like_start(solution: Solution[H], h0: H) -> Solution[H]:
    """The solution, its value with the structure of h0.

    A program has the structure of the first call that it was made for, which is equal: 2 for 2.0, say.
    """
    value: H = jax.tree.unflatten(jax.tree.structure(h0), jax.tree.leaves(solution.value))
    return solution._replace(value=value)


def _like(x: jax.Array, result: ShapedArray) -> jax.Array:
    """``x`` with the dtype of ``result`` if x has a weak one, and sharded as ``result``."""
    if jax.typeof(x).weak_type and jnp.issubdtype(result.dtype, jnp.floating):
        x = x.astype(result.dtype)
    return sharded(x, result) if x.ndim == result.ndim else x


def _constants(tree: T) -> T:
    """A pytree, without the derivatives of its arrays."""
    constants: T = jax.tree.map(lambda x: jax.lax.stop_gradient(x) if is_array(x) else x, tree)
    return constants


def _as_array(leaf: object) -> object:
    if isinstance(leaf, int) and not isinstance(leaf, bool):
        leaf = float(leaf)
    return jnp.asarray(leaf) if isinstance(leaf, (bool, float)) or hasattr(leaf, "__array__") else leaf
