"""The layer by an estimator's own ``vjp`` and ``jvp``: for the user's callbacks, and for what JAX can't transpose."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import eval_jaxpr
from jax.custom_derivatives import SymbolicZero

from implicit_core.estimators import Estimator
from implicit_core.problem import Problem

from .closure import Hoisted, hoist, is_traced, linear_in, moves, replaced, split
from .ruled import ruled

PyTree = Any
Arrays = list[Any]

CLOSED = (
    "a Problem with callbacks gives derivatives in z alone, but its f or a callback closes over arrays that are "
    "differentiated here: pass them in z, or take the Problem of implicit_core.adapters.jax.problem(f)"
)
ONCE = (
    "this layer is differentiable once: its derivatives are callbacks of a Problem, or F has a custom_vjp within, or "
    "the estimator is one that JAX can't differentiate. On a plain f Neumann, Unroll and Implicit have every "
    "derivative that F has"
)


def through_callbacks(problem: Problem, gradient: Estimator, h: PyTree, z: PyTree, closed: Arrays) -> PyTree:
    """The estimator's value at the solver's point h, differentiable once, in z.

    In reverse mode by the estimator's ``vjp``, in forward mode by its ``jvp``, as far as the problem has them. What
    ``problem.f`` closes over, the traced arrays ``closed``, must not be differentiated.
    """
    arrays, join, pick = split(z)
    places = [i for i, array in enumerate(arrays) if moves(array)]
    value = hoist(lambda h, arrays: gradient.value(problem, h, join(arrays)), h, arrays)
    if not (closed or is_traced((h, arrays))):
        return gradient.value(problem, h, z)
    traced_pullback: list[Any] = []

    def pull(h: PyTree, arrays: Arrays) -> tuple[PyTree, Arrays]:
        """The value, and what the traced pullback takes beside a cotangent."""
        value, pullback = gradient.vjp(problem, h, join(arrays))

        def on_moving(v: PyTree) -> Arrays:
            cotangents = pick(pullback(v))
            return [jnp.zeros_like(arrays[i]) if cotangents[i] is None else cotangents[i] for i in places]

        traced = jax.make_jaxpr(on_moving)(value)
        traced_pullback[:] = [traced.jaxpr]
        return value, list(traced.consts)

    def push(h: PyTree, arrays: Arrays, tangents: Arrays) -> PyTree:
        return gradient.jvp(problem, h, join(arrays), join(replaced(arrays, places, tangents)))[1]

    def backward(residual: Arrays, v: PyTree) -> Arrays:
        cotangents: Arrays = eval_jaxpr(traced_pullback[0], residual, *jax.tree.leaves(v))
        return cotangents

    pulled = _hoist_if_there(pull, h, arrays)
    pushed = _hoist_if_there(push, h, arrays, [arrays[i] for i in places])
    # JAX keeps these: no tracers.
    parts = value._replace(closed=[]), pulled._replace(closed=[]), pushed._replace(closed=[])
    layer = Layer(*parts, backward, places)
    bind = both_modes if pushed.jaxpr is not None else reverse_mode
    return bind(layer, h, arrays, (value.closed, pulled.closed, pushed.closed, closed))


class Layer(NamedTuple):
    """The layer as a function of arrays, and its derivatives, each traced once.

    Attributes
    ----------
    value
        ``value(h, arrays)``.
    pulled
        The same, and what ``backward`` takes beside a cotangent.
    pushed
        ``pushed(h, arrays, tangents)``, the tangent of the value.
    backward
        ``backward(residual, v)``, cotangents of the arrays that have some.
    places
        Where these are.
    """

    value: Hoisted
    pulled: Hoisted
    pushed: Hoisted
    backward: Callable[[Arrays, PyTree], Arrays]
    places: list[int]


def reverse_mode(layer: Layer, h: PyTree, arrays: Arrays, closed: tuple[Arrays, ...]) -> PyTree:
    """A ``custom_vjp``: there is no pushforward."""
    count = len(arrays)

    @jax.custom_vjp
    def call(h: PyTree, arrays: Arrays, closed: Any) -> PyTree:
        return layer.value.function(h, arrays, closed[0])

    def forward(h: PyTree, arrays: Arrays, closed: Any) -> tuple[PyTree, Arrays]:
        if any(x.perturbed for x in jax.tree.leaves(closed)):
            raise ValueError(CLOSED)
        h, arrays, closed = _once(jax.tree.map(lambda x: x.value, (h, arrays, closed)))
        pulled: tuple[PyTree, Arrays] = layer.pulled.function(h, arrays, closed[1])
        return pulled

    def backward(residual: Arrays, v: PyTree) -> tuple[None, Arrays, None]:
        return None, replaced([None] * count, layer.places, layer.backward(residual, _dense(v))), None

    call.defvjp(forward, backward, symbolic_zeros=True)
    value: PyTree = call(h, arrays, closed)
    return value


def both_modes(layer: Layer, h: PyTree, arrays: Arrays, closed: tuple[Arrays, ...]) -> PyTree:
    """A ``custom_jvp``, whose transpose is the pullback, where there is one."""

    @jax.custom_jvp
    def call(h: PyTree, arrays: Arrays, closed: Any) -> PyTree:
        return layer.value.function(h, arrays, closed[0])

    def rule(primals: Any, tangents: Any) -> tuple[PyTree, PyTree]:
        if any(not isinstance(x, SymbolicZero) for x in jax.tree.leaves(tangents[2])):
            raise ValueError(CLOSED)
        h, arrays, closed = _once(primals)
        directions = _dense([tangents[1][i] for i in layer.places])

        def push(directions: Arrays) -> PyTree:
            return layer.pushed.function(h, arrays, directions, closed[2])

        if layer.pulled.jaxpr is None:
            value, residual = layer.value.function(h, arrays, closed[0]), []
        else:
            value, residual = layer.pulled.function(h, arrays, closed[1])

        def add(a: PyTree, b: PyTree) -> PyTree:
            return jax.tree.map(jnp.add, a, b)

        def pull(_: Any, v: tuple[PyTree, Arrays]) -> tuple[PyTree, Arrays]:
            return v[0], add(v[1], layer.backward(residual, v[0]))

        # The linear map (0, d) -> (A d, d) with a transpose of its own. JAX has such maps as solutions of linear
        # systems, whose matrix it looks at only for second derivatives; there are none of these here.
        zero = linear_in(directions, jax.tree.map(jnp.zeros_like, value))
        tangent, _ = jax.lax.custom_linear_solve(
            lambda x: x,
            (zero, directions),
            solve=lambda _, b: (add(b[0], push(b[1])), b[1]),
            transpose_solve=None if layer.pulled.jaxpr is None else pull,
        )
        return value, tangent

    call.defjvp(rule, symbolic_zeros=True)
    value: PyTree = call(h, arrays, closed)
    return value


def _once(arrays: PyTree) -> PyTree:
    """``arrays``, which are not to be differentiated."""
    return ruled(arrays, jax.tree.leaves(arrays), _refuse)


def _refuse(*_: Any) -> PyTree:
    raise NotImplementedError(ONCE)


def _dense(tree: PyTree) -> PyTree:
    """Arrays in the place of symbolic zeros."""
    return jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype) if isinstance(x, SymbolicZero) else x,
        tree,
        is_leaf=lambda x: isinstance(x, SymbolicZero),
    )


def _hoist_if_there(function: Callable[..., PyTree], *arguments: PyTree) -> Hoisted:
    """``function`` traced; where it lacks a derivative, what says so when it is called."""
    try:
        return hoist(function, *arguments)
    except NotImplementedError as error:
        missing = error.with_traceback(None)

    def call(*_: PyTree) -> PyTree:
        raise missing

    return Hoisted(call, [], None)
