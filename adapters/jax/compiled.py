"""F and its derivatives as compiled programs, for callers outside of ``jax.jit`` (Decision 57)."""

from collections.abc import Callable, Hashable
from typing import Generic

import jax

from implicit_core import checks
from implicit_core.arrays import H, Z
from implicit_core.backends.jax import BACKEND
from implicit_core.problem import Linearization, Map

from .leaves import Arrays, Static, is_array, is_differentiable, partition

Pullback = Callable[[H], tuple[H, Arrays]]


class CompiledMap(Generic[H, Z]):
    """F with the programs of its value, its pullbacks and its pushforward, each compiled once.

    The pullback of ``jax.vjp`` is a pytree of arrays, the residuals of F. One program can therefore return it and
    another one take it.

    Parameters
    ----------
    f
        ``f(h, z)``, in functions that JAX can compile.
    """

    def __init__(self, f: Map[H, Z]) -> None:
        def value(h: H, arrays: Arrays, static: Static[Z]) -> H:
            result: H = checks.structured(BACKEND, f(h, static.combine(arrays)), h)
            return result

        def linearized(h: H, arrays: Arrays, static: Static[Z]) -> tuple[H, Pullback[H]]:
            differentiable, rest = partition(arrays, is_differentiable)
            result, pull = jax.vjp(lambda h, d: value(h, rest.combine(d), static), h, differentiable)
            return result, pull

        def pushforward(h: H, arrays: Arrays, dh: H, tangents: Arrays, static: Static[Z]) -> H:
            differentiable, rest = partition(arrays, is_differentiable)
            at, along = (h, differentiable), (dh, tangents)
            tangent: H = jax.jvp(lambda h, d: value(h, rest.combine(d), static), at, along)[1]
            return tangent

        self._value = jax.jit(value, static_argnums=2)
        self._linearized = jax.jit(linearized, static_argnums=2)
        self._pushforward = jax.jit(pushforward, static_argnums=4)
        self._pull = jax.jit(lambda pull, v: pull(v))
        self._pull_h = jax.jit(lambda pull, v: pull(v)[0])
        self._pull_arrays = jax.jit(lambda pull, v: pull(v)[1])

    def value(self, h: H, z: Z) -> H:
        """F(h, z)."""
        result: H = self._value(h, *_split(z))
        return result

    def linearize(self, h: H, z: Z) -> Linearization[H, Z]:
        """F and its derivatives at (h, z)."""
        arrays, static = _split(z)
        differentiable = partition(z, is_differentiable)[1]
        value, pull = self._linearized(h, arrays, static)

        def vjp(v: H) -> tuple[H, Z]:
            v_h, v_arrays = self._pull(pull, v)
            return v_h, differentiable.cotangent(v_arrays)

        return Linearization(
            value,
            vjp=vjp,
            vjp_h=lambda v: self._pull_h(pull, v),
            vjp_z=lambda v: differentiable.cotangent(self._pull_arrays(pull, v)),
            jvp=lambda dh, dz: self._pushforward(h, arrays, dh, differentiable.select(dz), static),
        )


def _split(z: Z) -> tuple[Arrays, Static[Z]]:
    """The arrays of z, which are arguments of the programs, and the rest, which is part of them."""
    arrays, static = partition(z, lambda leaf: is_array(leaf) or is_differentiable(leaf))
    for leaf in static.others:
        if not isinstance(leaf, Hashable):
            raise TypeError(
                "with jit=True the leaves of z that are not arrays are part of the compiled program and must be "
                f"hashable, got a leaf of type {type(leaf).__name__}; jit=False accepts any leaf"
            )
    return arrays, static
