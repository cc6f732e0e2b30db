"""F and its derivatives as compiled programs, for a caller that is not within ``jax.jit`` itself."""

from collections.abc import Hashable
from typing import Any

import jax

from implicit_core.problem import Linearization, Map

from .closure import moves, replaced, with_none

PyTree = Any
Arrays = list[Any]


class Compiled:
    """F with the programs of its value, its pullbacks and its pushforwards, each compiled once.

    The pullback of ``jax.vjp`` is a pytree of arrays, what F has left for it: it comes out of one program and goes into
    another.

    Parameters
    ----------
    f
        ``f(h, z)``, in functions that JAX can compile.
    """

    def __init__(self, f: Map) -> None:
        def on_arrays(h: PyTree, moving: Arrays, still: Arrays, rest: "_Rest") -> PyTree:
            return f(h, rest.join(moving, still))

        def linearized(h: PyTree, moving: Arrays, still: Arrays, rest: "_Rest") -> tuple[PyTree, Any]:
            value, pull = jax.vjp(lambda h, moving: on_arrays(h, moving, still, rest), h, moving)
            return value, pull

        def pushed(at: PyTree, tangents: PyTree, still: Arrays, rest: "_Rest") -> PyTree:
            return jax.jvp(lambda h, moving: on_arrays(h, moving, still, rest), at, tangents)[1]

        self._value = jax.jit(on_arrays, static_argnums=3)
        self._linearized = jax.jit(linearized, static_argnums=3)
        self._pushed = jax.jit(pushed, static_argnums=3)
        self._pull = jax.jit(lambda pull, v: pull(v))
        self._pull_h = jax.jit(lambda pull, v: pull(v)[0])
        self._pull_z = jax.jit(lambda pull, v: pull(v)[1])

    def value(self, h: PyTree, z: PyTree) -> PyTree:
        """F(h, z)."""
        return self._value(h, *_split(z))

    def linearize(self, h: PyTree, z: PyTree) -> Linearization:
        """F and its derivatives at (h, z)."""
        moving, still, rest = _split(z)
        value, pull = self._linearized(h, moving, still, rest)

        def push(dh: PyTree, dz: PyTree) -> PyTree:
            given = with_none(dz)
            return self._pushed((h, moving), (dh, [given[i] for i in rest.moving]), still, rest)

        def vjp(v: PyTree) -> tuple[PyTree, PyTree]:
            v_h, v_z = self._pull(pull, v)
            return v_h, rest.cotangents(v_z)

        return Linearization(
            value,
            vjp=vjp,
            vjp_h=lambda v: self._pull_h(pull, v),
            vjp_z=lambda v: rest.cotangents(self._pull_z(pull, v)),
            jvp=push,
        )


class _Rest:
    """What z is beside its arrays, hashable: its structure, its other leaves, and where the arrays go."""

    def __init__(self, structure: Any, others: tuple[Hashable, ...], moving: tuple[int, ...], still: tuple[int, ...]):
        self.structure, self.others, self.moving, self.still = structure, others, moving, still
        # By their representations: zero has two signs, and NaN is not equal to itself.
        told = tuple(repr(x) if isinstance(x, (float, complex)) else x for x in others)
        self._key = structure, told, tuple(map(type, others)), moving, still

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Rest) and self._key == other._key

    def join(self, moving: Arrays, still: Arrays) -> PyTree:
        """z, with its arrays."""
        leaves = replaced(replaced(self.others, self.moving, moving), self.still, still)
        return jax.tree.unflatten(self.structure, leaves)

    def cotangents(self, moving: Arrays) -> PyTree:
        """A cotangent shaped as z, None where there is none."""
        leaves = replaced([None] * len(self.others), self.moving, moving)
        return jax.tree.unflatten(self.structure, leaves)


def _split(z: PyTree) -> tuple[Arrays, Arrays, _Rest]:
    """The arrays of z that have derivatives, those that have none, and the rest."""
    leaves, structure = jax.tree.flatten(z, is_leaf=lambda x: x is None)
    moving = tuple(i for i, leaf in enumerate(leaves) if moves(leaf))
    still = tuple(i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array) and i not in moving)
    others = tuple(None if i in moving + still else leaf for i, leaf in enumerate(leaves))
    for leaf in others:
        if not isinstance(leaf, Hashable):
            raise TypeError(
                "what z holds beside arrays is part of a compiled program and must be hashable, got a leaf of type "
                f"{type(leaf).__name__}; without jit=True it may be anything"
            )
    return [leaves[i] for i in moving], [leaves[i] for i in still], _Rest(structure, others, moving, still)
