"""The layer differentiated by an estimator's own ``vjp`` and ``jvp``.

For a Problem with callbacks of the user's own, and for operations that JAX can't transpose.
"""

from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from implicit_core.arrays import H, PyTree, Z
from implicit_core.backends.jax import zeros_like
from implicit_core.backends.jax_internals import SymbolicZero
from implicit_core.estimators import AtFixedPoint, Estimator
from implicit_core.layer import LayerOptions, Watched, told
from implicit_core.problem import Problem
from implicit_core.solution import Solution

from .closure import Hoisted, depending_on, hoist, is_traced
from .leaves import Arrays, is_array, is_differentiable, partition, replaced
from .rule_primitive import with_rule
from .settings import split_record

T = TypeVar("T")

CLOSED_OVER = (
    "a Problem with callbacks has derivatives with respect to z alone, but arrays that its f or a callback closes over "
    "are differentiated here: pass them in z, or take the Problem of implicit_core.adapters.jax.problem(f)"
)
ONCE = (
    "this layer is differentiable once, because its derivatives are callbacks of a Problem, or F contains a "
    "custom_vjp, or JAX can't differentiate the estimator. With a plain f, Neumann, NeumannSeries, Unroll and Implicit "
    "have every derivative that F has"
)
SETTINGS = (
    "the settings of an estimator have no derivative in a layer that is differentiable once: pass "
    "jax.lax.stop_gradient(lam), or take a plain f"
)


class _ClosedOver(NamedTuple):
    """The arrays that F, and the functions of a :class:`_Layer`, close over."""

    f: Arrays
    value: Arrays
    forward: Arrays
    tangent: Arrays


Primals = tuple[H, Arrays, _ClosedOver]


class _Layer(NamedTuple, Generic[H]):
    """The layer and its derivatives as functions of arrays, each traced once.

    Attributes
    ----------
    value
        ``value(h, arrays)``.
    forward
        ``forward(h, arrays)``: the value, and the residuals for ``backward``. It raises if there is no VJP.
    backward
        ``backward(residuals, v)``: cotangents of the differentiable arrays.
    tangent
        ``tangent(h, arrays, tangents)``: the tangent of the value. It raises if there is no JVP.
    indices
        The indices of the differentiable arrays.
    """

    value: Callable[..., H]
    forward: Callable[..., tuple[H, Arrays]]
    backward: Callable[[Arrays, H], Arrays]
    tangent: Callable[..., H]
    indices: Sequence[int]


def value_from_callbacks(
    problem: Problem[H, Z], options: LayerOptions, solution: Solution[H], z: Z, closed_over: Arrays
) -> Solution[H]:
    """The solution with the estimator's value from the solver's point, differentiable once with respect to z.

    Reverse mode uses the estimator's ``vjp`` and forward mode its ``jvp``, if the problem has them.

    Parameters
    ----------
    problem, options, z
        The problem, the layer's options, and inputs and parameters.
    solution
        The solver's point. Its own derivative is zero.
    closed_over
        The traced arrays that ``problem.f`` closes over. To differentiate them is an error.
    """
    arrays, static = split_record(options.gradient)
    gradient = static.combine(_refuse_to_differentiate(arrays, SETTINGS))
    value, norms = _value(problem, gradient, solution.value, z, closed_over)
    return told(solution._replace(value=value), options, problem, norms)


def _value(
    problem: Problem[H, Z], gradient: Estimator, h: H, z: Z, closed_over: Arrays
) -> tuple[H, tuple[PyTree, ...]]:
    """The value, and the norms where F was evaluated last."""
    arrays, _ = partition(z, is_array)
    if not is_traced((closed_over, h, arrays, split_record(gradient)[0])):
        watched = Watched(problem, gradient)
        return gradient.value(watched.problem, h, z), watched.norms()
    layer, closed = _trace(problem, gradient, h, z)
    closed = closed._replace(f=closed_over)
    mode: Any = _reverse_mode if isinstance(layer.tangent, _Missing) else _both_modes
    value, norms = mode(layer, h, arrays, closed)
    return value, norms


def _trace(problem: Problem[H, Z], gradient: Estimator, h: H, z: Z) -> tuple[_Layer[PyTree], _ClosedOver]:
    """The layer as functions of h and of the arrays of z, and the arrays that these close over.

    Its value is a pair: the estimator's, and the norms where F was evaluated last, which have no derivative.
    """
    arrays, static = partition(z, is_array)
    indices = [i for i, array in enumerate(arrays) if is_differentiable(array)]
    pullbacks: list[Callable[[H, Arrays], Arrays]] = []

    def evaluate(h: H, arrays: Arrays) -> PyTree:
        watched = Watched(problem, gradient)
        value = gradient.value(watched.problem, h, static.combine(arrays))
        return value, _norms(gradient, watched)

    def forward(h: H, arrays: Arrays) -> tuple[PyTree, Arrays]:
        watched = Watched(problem, gradient)
        value, pullback = gradient.vjp(watched.problem, h, static.combine(arrays))
        pair = value, _norms(gradient, watched)

        def backward(v: PyTree) -> Arrays:
            cotangents = static.select(pullback(v[0]))
            return [zeros_like(arrays[i]) if cotangents[i] is None else cotangents[i] for i in indices]

        # The residuals of the pullback are the arrays that it closes over.
        hoisted = hoist(backward, pair)
        pullbacks[:] = [hoisted.program]
        return pair, hoisted.closed_over

    def tangent(h: H, arrays: Arrays, tangents: Arrays) -> PyTree:
        dz = static.combine(replaced(arrays, indices, tangents))
        watched = Watched(problem, gradient)
        pushed = gradient.jvp(watched.problem, h, static.combine(arrays), dz)[1]
        return pushed, jax.tree.map(zeros_like, _norms(gradient, watched))

    def backward(residuals: Arrays, v: H) -> Arrays:
        return pullbacks[0](v, residuals)

    value = hoist(evaluate, h, arrays)
    forwards = _hoist_or_raise_when_called(forward, h, arrays)
    tangents = _hoist_or_raise_when_called(tangent, h, arrays, [arrays[i] for i in indices])
    closed = _ClosedOver([], value.closed_over, forwards.closed_over, tangents.closed_over)
    layer = _Layer(value.program, forwards.program, backward, tangents.program, indices)
    return layer, closed


def _norms(gradient: Estimator, watched: Watched[H, Z]) -> tuple[PyTree, ...]:
    """The norms where the estimator's value evaluated F last; none if its value is the solver's point."""
    return () if isinstance(gradient, AtFixedPoint) else watched.norms()


def _reverse_mode(layer: _Layer[H], h: H, arrays: Arrays, closed: _ClosedOver) -> H:
    """The layer as a ``custom_vjp``, for a problem without a JVP."""
    size = len(arrays)

    @jax.custom_vjp
    def call(h: H, arrays: Arrays, closed: _ClosedOver) -> H:
        return layer.value(h, arrays, closed.value)

    def forward(h: PyTree, arrays: PyTree, closed: PyTree) -> tuple[H, Arrays]:
        if any(x.perturbed for x in jax.tree.leaves(closed)):
            raise ValueError(CLOSED_OVER)
        h, arrays, closed = _refuse_to_differentiate(jax.tree.map(lambda x: x.value, (h, arrays, closed)))
        return layer.forward(h, arrays, closed.forward)

    def backward(residuals: Arrays, v: H) -> tuple[None, Sequence[jax.Array | None], None]:
        none: list[jax.Array | None] = [None] * size
        return None, replaced(none, layer.indices, layer.backward(residuals, _instantiate_zeros(v))), None

    call.defvjp(forward, backward, symbolic_zeros=True)
    value: H = call(h, arrays, closed)
    return value


def _both_modes(layer: _Layer[H], h: H, arrays: Arrays, closed: _ClosedOver) -> H:
    """The layer as a ``custom_jvp`` whose transpose is the pullback, or which has no transpose without a VJP."""
    has_vjp = not isinstance(layer.forward, _Missing)

    @jax.custom_jvp
    def call(h: H, arrays: Arrays, closed: _ClosedOver) -> H:
        return layer.value(h, arrays, closed.value)

    def rule(primals: Primals[H], tangents: Primals[H]) -> tuple[H, H]:
        if any(not isinstance(x, SymbolicZero) for x in jax.tree.leaves(tangents[2])):
            raise ValueError(CLOSED_OVER)
        h, arrays, closed = _refuse_to_differentiate(primals)
        along = [tangents[1][i] for i in layer.indices]
        nonzero = [x for x in along if not isinstance(x, SymbolicZero)]
        directions = depending_on(nonzero, _instantiate_zeros(along))
        residuals: Arrays = ()
        if has_vjp:
            value, residuals = layer.forward(h, arrays, closed.forward)
        else:
            value = layer.value(h, arrays, closed.value)

        def push(b: tuple[H, Arrays]) -> tuple[H, Arrays]:
            tangent = layer.tangent(h, arrays, b[1], closed.tangent)
            return _add(b[0], tangent), b[1]

        def pull(v: tuple[H, Arrays]) -> tuple[H, Arrays]:
            return v[0], _add(v[1], layer.backward(residuals, v[0]))

        # The linear map (0, d) -> (A d, d), with its own transpose. `custom_linear_solve` takes such a pair of maps. It
        # uses the matrix, here the identity, for second derivatives only, which raise. Decision 52.
        zero = depending_on(directions, jax.tree.map(zeros_like, value))
        tangent, _ = jax.lax.custom_linear_solve(
            lambda x: x,
            (zero, directions),
            solve=lambda _, b: push(b),
            transpose_solve=(lambda _, v: pull(v)) if has_vjp else None,
        )
        return value, tangent

    call.defjvp(rule, symbolic_zeros=True)
    value: H = call(h, arrays, closed)
    return value


def _refuse_to_differentiate(arrays: T, message: str = ONCE) -> T:
    """``arrays``, which raise if they are differentiated."""

    def rule(_value: T, _inputs: Arrays, _indices: Sequence[int], _tangents: Arrays) -> T:
        raise NotImplementedError(message)

    return with_rule(arrays, jax.tree.leaves(arrays), rule)


def _instantiate_zeros(tree: T) -> T:
    """``tree``, with arrays instead of symbolic zeros."""
    dense: T = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype) if isinstance(x, SymbolicZero) else x,
        tree,
        is_leaf=lambda x: isinstance(x, SymbolicZero),
    )
    return dense


def _add(x: T, y: T) -> T:
    total: T = jax.tree.map(jnp.add, x, y)
    return total


class _Missing:
    """A derivative that there is not: to call it raises the error."""

    def __init__(self, error: NotImplementedError) -> None:
        self.error = error

    def __call__(self, *_: object) -> Any:
        raise self.error


class _Traced(NamedTuple, Generic[T]):
    program: Callable[..., T]
    closed_over: Arrays


def _hoist_or_raise_when_called(function: Callable[..., T], *arguments: object) -> Hoisted[T] | _Traced[T]:
    """``function``, traced; if it lacks a derivative, a function that raises the same error when it is called."""
    try:
        return hoist(function, *arguments)
    except NotImplementedError as error:
        return _Traced(_Missing(error.with_traceback(None)), ())
