"""The derivative of a fixed point, of every order and in both modes."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from implicit_core.backends.jax import BACKEND, joint
from implicit_core.estimators import AtFixedPoint

from .closure import linear_in, replaced
from .problem import pushforwards
from .ruled import ruled

PyTree = Any
Arrays = list[Any]


def at_fixed_point(
    f: Callable[[PyTree, Arrays], PyTree],
    gradient: AtFixedPoint,
    batch_ndim: int,
    h: PyTree,
    externals: Arrays,
    axes: Sequence[str],
) -> PyTree:
    """``h`` as the differentiable fixed point it is.

    Its tangent is D (∂F/∂z) dz, a linear recursion that JAX transposes; for an exact estimator the solution of a linear
    system, whose transpose is solved and not transposed. F is linearized at the result itself, so that the second
    derivative takes the first one for the derivative of h.

    Parameters
    ----------
    f
        F; closes over nothing that is traced.
    gradient
        The estimator.
    batch_ndim
        The state's batch axes.
    h
        The solver's point.
    externals
        All other arrays that F is a function of.
    axes
        Named axes that F communicates over.
    """

    def inverse(jacobian: Callable[[PyTree], PyTree], v: PyTree) -> PyTree:
        with joint(axes):
            return gradient.inverse(jacobian, v, batch_ndim)

    def rule(h: PyTree, externals: Arrays, places: list[int], directions: Arrays) -> PyTree:
        def on_moving(h: PyTree, moving: Arrays) -> PyTree:
            return f(h, replaced(externals, places, moving))

        moving = [externals[i] for i in places]
        _, push = jax.linearize(on_moving, h, moving)
        push_h, push_z = pushforwards(push, h, moving)
        b = push_z(directions)
        if not gradient.exact:
            return inverse(push_h, b)
        return jax.lax.custom_linear_solve(
            lambda w: BACKEND.map(jnp.subtract, w, push_h(w)),
            linear_in(directions, b),
            solve=lambda _, b: inverse(push_h, b),
            transpose_solve=lambda _, v: inverse(lambda w: jax.linear_transpose(push_h, h)(w)[0], v),
        )

    return ruled(h, externals, rule)
