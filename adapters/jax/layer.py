"""The differentiable layer on JAX arrays."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from implicit_core import checks
from implicit_core.backends.jax import BACKEND, joint
from implicit_core.estimators import BPTT, AtFixedPoint, Estimator, Unroll
from implicit_core.fixed_point import refuse_throw, solver_point, with_aux
from implicit_core.problem import Map, Problem
from implicit_core.solution import Solution
from implicit_core.solve import as_problem, as_solver
from implicit_core.solvers import Anderson, CallableSolver

from .batching import batched
from .callbacks import through_callbacks
from .closure import Hoisted, has_only_a_pullback, hoist, is_traced, split
from .problem import JAXProblem, problem
from .rules import at_fixed_point

PyTree = Any
Arrays = list[Any]


def fixed_point(
    f: Problem | Map,
    h0: PyTree,
    z: PyTree,
    *,
    solver: Any = Anderson(),
    gradient: Estimator = Unroll(k=5, lam=0.5),
    batch_ndim: int | None = None,
    throw: bool = False,
    trace: bool = False,
    has_aux: bool = False,
) -> Solution:
    """The layer on JAX arrays; parameters and result as for :func:`implicit_core.fixed_point`.

    f is traced once, whatever the solver does. For a plain f, or ``problem(f)``, derivatives of every order and in both
    modes reach z and all that f closes over, under ``jit``, ``vmap``, ``scan``, ``checkpoint`` and ``shard_map``. For
    :class:`Neumann` and :class:`Unroll` they are those of the surrogate, with the surrogate as the derivative of the
    fixed point itself. A :class:`Problem` with callbacks of its own is differentiated with these: once, in z alone, in
    the modes it has callbacks for.

    An axis of ``vmap`` becomes one of the batch: each of its samples has a status, and none waits in vain.

    Under ``jit`` the statuses are arrays. ``throw=True`` is there a check for ``jax.experimental.checkify``, and a
    linear solve of :class:`Implicit` that fails gives NaN, or with ``on_failure="warn"`` a warning.

    Raises
    ------
    ValueError
        If f or a callback of such a Problem closes over arrays that are differentiated; they would get no gradient.
    NotImplementedError
        For a derivative that is not available; there is no silent zero.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> import implicit_core as ic
    >>> from implicit_core.adapters import jax as icj
    >>> def loss(w, x):
    ...     h = icj.fixed_point(lambda h, x: jnp.tanh(w @ h + x), jnp.zeros(2), x, gradient=ic.Neumann(k=5)).value
    ...     return jnp.sum(h**2)
    >>> w_bar, x_bar = jax.jit(jax.grad(loss, argnums=(0, 1)))(0.3 * jnp.eye(2), jnp.array([0.3, -0.1]))
    >>> w_bar.shape, x_bar.shape
    ((2, 2), (2,))
    """
    checks.instance("gradient", gradient, Estimator, "Unroll(k=5, lam=0.5)")
    solver = as_solver(solver)
    options = {"solver": solver, "gradient": gradient, "throw": throw, "trace": trace}
    if has_aux:
        return with_aux(fixed_point, f, h0, z, {**options, "batch_ndim": batch_ndim})
    given = as_problem(f, batch_ndim)
    h0 = jax.tree.map(_as_array, h0)
    checks.state(BACKEND, "h0", h0, given.batch_ndim)
    arrays, join, pick = split(z)
    if isinstance(f, Problem) and not isinstance(f, JAXProblem):
        once = hoist(lambda h, arrays: given.f(h, join(arrays)), h0, arrays)
        with joint(once.axes):
            solution = solver_point(given, *_constants((h0, z)), **options)
            return solution._replace(value=through_callbacks(given, gradient, solution.value, z, once.closed))

    h0, once = _trace(lambda h, arrays: given.f(h, join(arrays)), h0, arrays)
    externals = [*arrays, *once.closed]
    # JAX keeps the functions below with what it traces here: they must not refer to arrays, nor to the user's f.
    n, function, batch_ndim, axes = len(arrays), once.function, given.batch_ndim, once.axes

    def on_externals(h: PyTree, externals: Arrays) -> PyTree:
        return function(h, externals[:n], externals[n:])

    def on_z(f: Map, externals: Arrays, batch_ndim: int) -> Problem:
        # A solver of the user's gets z, and may call F with other arrays in it.
        return problem(lambda h, z: f(h, [*pick(z), *externals[n:]]), batch_ndim=batch_ndim)

    if throw:
        refuse_throw(gradient)
    start, constants = _constants((h0, externals))
    if isinstance(solver, CallableSolver) and not gradient.starts_from_h0 and is_traced((start, constants)):
        start = _search(
            solver,
            lambda externals: on_z(on_externals, externals, batch_ndim),
            start,
            constants,
            lambda a: join(a[:n]),
        )
        options["solver"] = replace(solver, function=_stay)

    def solve(f: Map, h0: PyTree, externals: Arrays, batch_ndim: int) -> Solution:
        with joint(axes):
            return solver_point(on_z(f, externals, batch_ndim), h0, join(externals[:n]), **{**options, "throw": False})

    if once.has_effects:  # among them collectives over an axis of vmap, which then has to stay one
        solution = solve(on_externals, start, constants, batch_ndim)
    else:
        solution = batched(solve, on_externals, start, constants, batch_ndim)
    if throw:
        solution.raise_for_status()

    def on(f: Map) -> Problem:
        return problem(f, batch_ndim=batch_ndim)

    if type(gradient) in (Unroll, BPTT):
        recompute = isinstance(gradient, Unroll) and gradient.recompute
        step = jax.checkpoint(on_externals) if recompute else on_externals
        value = gradient.value(on(lambda h, _: step(h, externals)), solution.value, None)
    elif isinstance(gradient, AtFixedPoint) and _has_both_modes(gradient, once):
        value = at_fixed_point(on_externals, gradient, batch_ndim, solution.value, externals, axes)
    else:
        with joint(axes):
            value = through_callbacks(on(on_externals), gradient, solution.value, externals, [])
    return solution._replace(value=value)


def _search(
    solver: CallableSolver,
    on_z: Callable[[Arrays], Problem],
    start: PyTree,
    constants: Arrays,
    join: Callable[..., PyTree],
) -> PyTree:
    """What a solver of the user's finds, with all that it closes over held constant. It is a start from there on."""

    def search(h: PyTree, externals: Arrays) -> PyTree:
        return solver.function(on_z(externals), h, join(externals))

    once = hoist(search, start, constants)
    found = once.function(start, constants, _constants(once.closed))
    checks.like(BACKEND, "the result of the solver", found, start, "h0")
    return _constants(found)


def _stay(_problem: Problem, h0: PyTree, _z: PyTree) -> PyTree:
    return h0


def _trace(f: Map, h0: PyTree, arrays: Arrays) -> tuple[PyTree, Hoisted]:
    """F traced, and ``h0`` as it has to be for that.

    A start that all devices share is spread over them as F(h0) is; one that is a Python number has the dtype of F(h0).
    """
    once = hoist(f, h0, arrays)
    if BACKEND.flatten(once.result)[1] != BACKEND.flatten(h0)[1]:
        return h0, once  # the solve will say so
    fitting = jax.tree.map(_fit, h0, once.result)
    if jax.tree.map(jax.typeof, fitting) == jax.tree.map(jax.typeof, h0):
        return h0, once
    return fitting, hoist(f, fitting, arrays)


def _fit(x: jax.Array, to: Any) -> jax.Array:
    if jax.typeof(x).weak_type and jnp.issubdtype(to.dtype, jnp.floating):
        x = x.astype(to.dtype)
    return BACKEND.spread(x, to) if x.ndim == to.ndim else x


def _has_both_modes(gradient: AtFixedPoint, once: Hoisted) -> bool:
    """Whether JAX can differentiate F forward, and transpose what the estimator makes of it."""
    return (gradient.exact or not gradient.adaptive) and not has_only_a_pullback(once.jaxpr)


def _constants(tree: PyTree) -> PyTree:
    """A pytree of anything, its arrays cut from all that differentiates them."""
    return jax.tree.map(lambda x: jax.lax.stop_gradient(x) if isinstance(x, jax.Array) else x, tree)


def _as_array(leaf: Any) -> Any:
    is_number = isinstance(leaf, (int, float)) or hasattr(leaf, "__array__")
    return jnp.asarray(leaf) if is_number else leaf
