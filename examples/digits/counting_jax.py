"""Counts under ``jax.jit``, where Python runs only while JAX traces: callbacks from the compiled program."""

from collections.abc import Callable

import jax

from implicit_core.arrays import Z
from implicit_core.problem import Map


def counted(
    f: Map[jax.Array, Z], on_evaluation: Callable[[], None], on_pullback: Callable[[], None]
) -> Map[jax.Array, Z]:
    """``f(h, z)`` with the same value and derivatives, which reports each time it runs.

    Parameters
    ----------
    f
        F, from arrays to one array.
    on_evaluation
        Called at each evaluation of F.
    on_pullback
        Called whenever a cotangent passes one.
    """

    @jax.custom_jvp
    def mark(value: jax.Array) -> jax.Array:
        return value

    # Callbacks have an argument, since JAX takes one without any out of a loop.
    def pull(_: object, cotangent: jax.Array) -> jax.Array:
        jax.debug.callback(lambda _: on_pullback(), cotangent.ravel()[0])
        return cotangent

    @mark.defjvp
    def mark_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
        # The identity, written as the solution of a linear system: these may have a transpose of their own.
        tangent = jax.lax.custom_linear_solve(lambda x: x, tangents[0], solve=lambda _, b: b, transpose_solve=pull)
        return mark(primals[0]), tangent

    def call(h: jax.Array, z: Z) -> jax.Array:
        value: jax.Array = mark(f(h, z))
        jax.debug.callback(lambda _: on_evaluation(), value.ravel()[0])
        return value

    return call
