"""The differentiable layer on JAX arrays."""

from dataclasses import dataclass, replace
from typing import Generic

import jax
import jax.numpy as jnp
from jax.core import ShapedArray

from implicit_core import checks
from implicit_core.arrays import H, PyTree, Z
from implicit_core.backends.jax import BACKEND, coupled_axes, sharded
from implicit_core.estimators import BPTT, AtFixedPoint, Derivative, Unroll
from implicit_core.layer import LayerOptions, Watched, solver_point, told
from implicit_core.problem import Problem
from implicit_core.solution import Solution
from implicit_core.solvers.compacting import without_compacting

from .batching import MapOfArrays, with_vmap_as_batch
from .callbacks import value_from_callbacks
from .closure import Hoisted, hoist, is_traced
from .derivative import with_derivative
from .growth import Growth, compare, fork
from .leaves import Arrays, Static, T, is_array, partition
from .problem import JAXProblem, problem
from .settings import split


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
    checks.state(BACKEND, "h0", h0, problem.batch_ndim)
    if problem.has_derivatives and not isinstance(problem, JAXProblem):
        return _layer_of_callbacks(problem, h0, z, options)
    h0, f, inputs = _trace(problem, h0, z)
    return _with_value(f, _solve(f, h0, inputs, options), inputs, options)


def _layer_of_callbacks(problem: Problem[H, Z], h0: H, z: Z, options: LayerOptions) -> Solution[H]:
    """The layer of a Problem whose derivatives are the user's callbacks."""
    arrays, static = partition(z, is_array)
    f = hoist(lambda h, arrays: problem.f(h, static.combine(arrays)), h0, arrays)
    with coupled_axes(f.axes):
        solution = solver_point(problem, *_constants((h0, z)), options)
        return value_from_callbacks(problem, options, solution, z, f.closed_over)


@dataclass(frozen=True, eq=False)
class TracedMap(Generic[H, Z]):
    """F as a traced program of h and of its inputs: the arrays of z, followed by the arrays that F closes over.

    It refers neither to tracers nor to the user's F, because JAX keeps it with the programs that it traces.

    Attributes
    ----------
    hoisted
        The program, ``function(h, arrays of z, closed-over arrays)``.
    static
        z without its arrays.
    batch_ndim, scale
        As for :class:`Problem`.
    """

    hoisted: Hoisted[H]
    static: Static[Z]
    batch_ndim: int
    scale: PyTree = None

    def __call__(self, h: H, inputs: Arrays) -> H:
        """F(h, z)."""
        size = len(self.static.indices)
        return self.hoisted.function(h, inputs[:size], inputs[size:])

    def z(self, inputs: Arrays) -> Z:
        """The z that has these inputs."""
        return self.static.combine(inputs[: len(self.static.indices)])

    def problem(self, f: MapOfArrays[H], inputs: Arrays, batch_ndim: int) -> Problem[H, Z]:
        """``f``, which is F or F mapped over an axis of the batch, as a problem in z.

        A solver of the user's own may call it with another z.
        """
        closed_over = inputs[len(self.static.indices) :]
        return problem(
            lambda h, z: f(h, [*self.static.select(z), *closed_over]), batch_ndim=batch_ndim, scale=self.scale
        )


def _trace(problem: Problem[H, Z], h0: H, z: Z) -> tuple[H, TracedMap[H, Z], Arrays]:
    """``h0``, F and its inputs. F is traced again if h0 has another type than F(h0).

    If h0 is on all devices, it is sharded as F(h0) is. If it is a Python number, it gets the dtype of F(h0).
    """
    arrays, static = partition(z, is_array)

    def f(h: H, arrays: Arrays) -> H:
        value: H = checks.structured(BACKEND, problem.f(h, static.combine(arrays)), h)
        if remedy := checks.unregistered(jax.tree.leaves(value)):  # JAX would say that it is no type of its own
            raise TypeError(f"the result of f must hold arrays of jax{remedy}")
        return value

    hoisted = hoist(f, h0, arrays)
    if BACKEND.flatten(hoisted.result)[1] == BACKEND.flatten(h0)[1]:  # otherwise the solve raises
        like_result = jax.tree.map(_like, h0, hoisted.result)
        if jax.tree.map(jax.typeof, like_result) != jax.tree.map(jax.typeof, h0):
            h0, hoisted = like_result, hoist(f, like_result, arrays)
    traced = TracedMap(hoisted.without_arrays(), static, problem.batch_ndim, problem.scale)
    return h0, traced, [*arrays, *hoisted.closed_over]


def _solve(f: TracedMap[H, Z], h0: H, inputs: Arrays, options: LayerOptions) -> Solution[H]:
    """The solver's point. Its derivative is zero, so JAX never differentiates the loop (Decision 46)."""
    static, settings = split(options)
    h0, inputs, settings = _constants((h0, inputs, settings))

    def solve(mapped: MapOfArrays[H], h0: H, inputs: Arrays, settings: Arrays, batch_ndim: int) -> Solution[H]:
        with coupled_axes(f.hoisted.axes):
            return solver_point(f.problem(mapped, inputs, batch_ndim), h0, f.z(inputs), static.join(settings))

    runs_user_code = getattr(options.solver, "runs_user_code", True) and not options.gradient.starts_from_h0
    if runs_user_code and is_traced((h0, inputs, settings)):
        # The solver knows nothing of batch axes, and may close over arrays that are differentiated.
        hoisted = hoist(lambda h0, inputs: solve(f, h0, inputs, settings, f.batch_ndim), h0, inputs)
        solution = _constants(hoisted.function(h0, inputs, _constants(hoisted.closed_over)))
    elif f.hoisted.has_effects:
        # An axis of `vmap` may be one that F communicates over, and then has to stay one. Decision 49.
        solution = solve(f, h0, inputs, settings, f.batch_ndim)
    else:
        solution = with_vmap_as_batch(solve, f, h0, inputs, settings, f.batch_ndim)
    return solution


def _with_value(f: TracedMap[H, Z], solution: Solution[H], inputs: Arrays, options: LayerOptions) -> Solution[H]:
    """The solution with the estimator's value from the solver's point, differentiable, and what is told of it."""
    gradient, h = options.gradient, solution.value
    if isinstance(gradient, (Unroll, BPTT)) and type(gradient) in (Unroll, BPTT):  # a derived class may override `vjp`
        return _unrolled(f, solution, inputs, gradient, options)
    has_both_modes = not f.hoisted.has_custom_vjp
    if has_both_modes and isinstance(gradient, AtFixedPoint) and gradient.derivative is not Derivative.ONCE:
        value = with_derivative(h, inputs, f, gradient, batch_ndim=f.batch_ndim, axes=f.hoisted.axes, scale=f.scale)
        # Under `jit` this is a check for `checkify`. Decision 53.
        return told(solution, options, problem(f, batch_ndim=f.batch_ndim, scale=f.scale), ())._replace(value=value)
    with coupled_axes(f.hoisted.axes):
        return value_from_callbacks(problem(f, batch_ndim=f.batch_ndim, scale=f.scale), options, solution, inputs, ())


def _unrolled(
    f: TracedMap[H, Z], solution: Solution[H], inputs: Arrays, gradient: Unroll | BPTT, options: LayerOptions
) -> Solution[H]:
    """The k steps from the solver's point, which JAX differentiates."""
    recompute = isinstance(gradient, Unroll) and gradient.recompute
    step = jax.checkpoint(f) if recompute else f
    steps: Problem[H, None] = problem(lambda h, _: step(h, inputs), batch_ndim=f.batch_ndim, scale=f.scale)
    watched, h, lam = Watched(steps), solution.value, gradient.lam
    growth = Growth(gradient.growth, f.batch_ndim, f.scale)
    if not growth.watches(f.hoisted.axes):
        return watched.told(solution._replace(value=gradient.value(watched.problem, h, None)), options)
    # The first step starts at a constant, where no cotangent arrives, so growth is measured from h_1 on.
    h_1, reference = fork(Unroll(1, lam).value(watched.problem, h, None), growth, primal=True)
    h_k: H = Unroll(gradient.k - 1, lam).value(watched.problem, h_1, None)
    value = compare(h_k, h_k, reference, growth, primal=True)
    return watched.told(solution._replace(value=value), options)


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
    is_number = isinstance(leaf, (int, float)) or hasattr(leaf, "__array__")
    return jnp.asarray(leaf) if is_number else leaf
