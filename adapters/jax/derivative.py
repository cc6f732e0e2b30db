"""The derivative of a fixed point, of every order and in both modes (Eq. 2 and 18)."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from implicit_core.arrays import H
from implicit_core.backends.jax import BACKEND, coupled_axes
from implicit_core.estimators import AtFixedPoint, Derivative
from implicit_core.estimators.base import on_states

from .closure import depending_on
from .leaves import Arrays, replaced
from .problem import partial_pushforwards
from .rule_primitive import with_rule


def with_derivative(
    h: H,
    inputs: Arrays,
    f: Callable[[H, Arrays], H],
    gradient: AtFixedPoint,
    *,
    batch_ndim: int,
    axes: Sequence[str],
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
    """

    def inverse(jacobian: Callable[[H], H], v: H) -> H:
        space = BACKEND.space(v, batch_ndim, "v")
        with coupled_axes(axes):  # Decision 50.
            w: H = space.unpack(gradient.apply(space, on_states(jacobian, space, space), space.pack(v)))
            return w

    def rule(h: H, inputs: Arrays, indices: Sequence[int], tangents: Arrays) -> H:
        def at_indices(h: H, varied: Arrays) -> H:
            return f(h, replaced(inputs, indices, varied))

        # F is linearized at h, which has this rule too, so the second derivative uses the first one. Decision 47.
        varied = [inputs[i] for i in indices]
        _, push = jax.linearize(at_indices, h, varied)
        push_h, push_z = partial_pushforwards(push, h, varied)
        b = push_z(tangents)
        if gradient.derivative is Derivative.OF_OPERATIONS:
            return inverse(push_h, b)
        # JAX differentiates and transposes the linear solve as one operation, to every order. Decision 26.
        w: H = jax.lax.custom_linear_solve(
            lambda w: jax.tree.map(jnp.subtract, w, push_h(w)),
            depending_on(tangents, b),
            solve=lambda _, b: inverse(push_h, b),
            transpose_solve=lambda _, v: inverse(lambda w: jax.linear_transpose(push_h, h)(w)[0], v),
        )
        return w

    return with_rule(h, inputs, rule)
