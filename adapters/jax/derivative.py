"""The derivative of a fixed point, of every order and in both modes (Eq. 2 and 18)."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp

from implicit_core import settings
from implicit_core.arrays import H, Operator, PyTree
from implicit_core.backends.jax import BACKEND, coupled_axes, setting_placed
from implicit_core.estimators import AtFixedPoint, Derivative, Neumann
from implicit_core.estimators.base import on_states
from implicit_core.space import Space

from .closure import depending_on
from .growth import Growth, compare, fork
from .leaves import Arrays, replaced
from .problem import partial_pushforwards
from .rule_primitive import with_rule
from .settings import split_record


def with_derivative(
    h: H,
    inputs: Arrays,
    f: Callable[[H, Arrays], H],
    gradient: AtFixedPoint,
    *,
    batch_ndim: int,
    axes: Sequence[str],
    scale: PyTree = None,
) -> H:
    """``h``, differentiated by ``gradient`` as the fixed point h = F(h, inputs).

    Its tangent is D (∂F/∂z) dz. If D consists of operations, they are linear in the tangent and JAX transposes them. If
    D solves a linear system, the transpose solves the transposed system.

    Parameters
    ----------
    h
        The solver's point.
    inputs
        All arrays besides h that F is a function of.
    f
        F. It closes over no tracers.
    gradient
        The estimator.
    batch_ndim
        How many first axes of every leaf of h index independent samples.
    axes
        Named axes that F communicates over.
    scale
        The units of h.
    """
    arrays, static = split_record(gradient)
    n, of_operations = len(inputs), gradient.derivative is Derivative.OF_OPERATIONS

    def inverse(gradient: AtFixedPoint, jacobian: Callable[[H], H], v: H, *, dual: bool = False) -> H:
        space = BACKEND.space(v, batch_ndim, "v", scale)
        space = space.dual if dual else space
        with coupled_axes(axes):  # Decision 50.
            product = on_states(jacobian, space, space)
            estimator = gradient = settings.bound(gradient, space)
            if isinstance(gradient, Neumann):
                growth = Growth(gradient.growth, batch_ndim, scale, dual=dual)
                if growth.watches(axes) and type(gradient).inverse is Neumann.inverse:
                    return _watched_series(gradient, space, product, v, growth)
                # The core's own test depends on the tangents in a way that JAX cannot transpose.
                estimator = replace(gradient, on_growth="ignore")
            w: H = space.unpack(estimator.apply(space, product, space.pack(v)))
            return w

    def rule(h: H, operands: Arrays, indices: Sequence[int], tangents: Arrays) -> H:
        inputs, numbers = operands[:n], operands[n:]

        def at_indices(h: H, varied: Arrays) -> H:
            return f(h, replaced(inputs, indices, varied))

        # F is linearized at h, which has this rule too, so the second derivative uses the first one. Decision 47.
        varied = [inputs[i] for i in indices]
        _, push = jax.linearize(at_indices, h, varied)
        push_h, push_z = partial_pushforwards(push, h, varied)
        b = push_z(tangents)
        if of_operations:
            return inverse(static.combine(numbers), push_h, b)
        # The solution of the system depends on no setting of its solver.
        like_b = jax.typeof(jax.tree.leaves(b)[0])
        gradient = static.combine([setting_placed(jax.lax.stop_gradient(x), like_b) for x in numbers])
        # JAX differentiates and transposes the linear solve as one operation, to every order. Decision 26.
        w: H = jax.lax.custom_linear_solve(
            lambda w: jax.tree.map(jnp.subtract, w, push_h(w)),
            depending_on(tangents, b),
            solve=lambda _, b: inverse(gradient, push_h, b),
            transpose_solve=lambda _, v: inverse(
                gradient, lambda w: jax.linear_transpose(push_h, h)(w)[0], v, dual=True
            ),
        )
        return w

    # h itself depends on no setting of the estimator, so the first derivative is zero. Decision 141.
    return with_rule(h, inputs, rule, parameters=arrays)


def _watched_series(gradient: Neumann, space: Space, product: Operator, v: H, growth: Growth) -> H:
    """``Neumann.inverse``, whose test JAX can transpose."""
    b = space.pack(v)
    start, reference = fork(v, growth)
    before = gradient.sum_of_terms(space, product, space.pack(start), b, gradient.k - 2)
    total = gradient.sum_of_terms(space, product, before, b, 1)
    last: H = space.unpack(space.sub(total, before))
    checked: H = compare(space.unpack(total), last, reference, growth)
    w: H = space.unpack(space.scale(gradient.lam, space.pack(checked)))
    return w
