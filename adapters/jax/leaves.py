"""The arrays of a pytree, separated from its structure and its other leaves."""

from collections.abc import Callable, Hashable, Sequence
from functools import cached_property
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
from jax.tree_util import PyTreeDef

from implicit_core.arrays import PyTree
from implicit_core.records import exact

T = TypeVar("T")
Arrays = Sequence[jax.Array]


class Static(Generic[T]):
    """A pytree without its arrays: what a compiled program is specific to.

    Parameters
    ----------
    structure
        The structure of the pytree, in which None is a leaf.
    others
        All leaves, None where there is an array. They must be hashable to compare or hash the object, as for a static
        argument of ``jax.jit``.
    indices
        The indices of the arrays among the leaves.
    self_contained
        Whether what the pytree computes depends on nothing but what is in it. Code of the user's may read anything.
    """

    def __init__(
        self, structure: PyTreeDef, others: Sequence[object], indices: Sequence[int], *, self_contained: bool
    ) -> None:
        self.structure, self.others, self.indices = structure, tuple(others), tuple(indices)
        self.self_contained = self_contained

    def combine(self, arrays: Arrays) -> T:
        """The pytree that has these arrays."""
        tree: T = jax.tree.unflatten(self.structure, replaced(self.others, self.indices, arrays))
        return tree

    def select(self, tree: PyTree) -> list[Any]:
        """The leaves of another pytree of this structure that are at the indices of the arrays; they may be None."""
        leaves = leaves_with_none(tree)
        return [leaves[i] for i in self.indices]

    def cotangent(self, arrays: Arrays) -> T:
        """A pytree of this structure that has these arrays, and None for the other leaves."""
        none: list[jax.Array | None] = [None] * len(self.others)
        tree: T = jax.tree.unflatten(self.structure, replaced(none, self.indices, arrays))
        return tree

    @cached_property
    def _key(self) -> Hashable:
        return self.structure, tuple(map(exact, self.others)), self.indices

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Static) and self._key == other._key


class Units:
    """The ``scale`` of a problem, which compares by its numbers.

    Attributes
    ----------
    scale
        A number, None, or a pytree of numbers and arrays of NumPy.
    """

    def __init__(self, scale: PyTree) -> None:
        self.scale = jax.tree.map(lambda x: jax.device_get(x) if hasattr(x, "shape") else x, scale)
        leaves, structure = jax.tree.flatten(self.scale)
        numbers = ((x.shape, x.dtype, x.tobytes()) if hasattr(x, "shape") else float(x) for x in leaves)
        self._key = structure, *numbers

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Units) and self._key == other._key


def partition(
    tree: T, predicate: Callable[[object], bool], *, self_contained: bool = True
) -> tuple[list[jax.Array], Static[T]]:
    """The leaves of a pytree that satisfy ``predicate``, and everything else. ``self_contained`` as for Static."""
    leaves, structure = jax.tree.flatten(tree, is_leaf=_is_none)
    indices = [i for i, leaf in enumerate(leaves) if predicate(leaf)]
    others = replaced(leaves, indices, [None] * len(indices))
    return [leaves[i] for i in indices], Static(structure, others, indices, self_contained=self_contained)


def is_array(leaf: object) -> bool:
    """Whether a leaf is a JAX array."""
    return isinstance(leaf, jax.Array)


def is_differentiable(leaf: object) -> bool:
    """Whether a leaf is an array of real or complex numbers."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact)


def leaves_with_none(tree: PyTree) -> list[Any]:
    """The leaves of a pytree, with None as a leaf."""
    return jax.tree.leaves(tree, is_leaf=_is_none)


def replaced(items: Sequence[T], indices: Sequence[int], values: Sequence[T]) -> list[T]:
    """``items``, with ``values`` at ``indices``."""
    new = list(items)
    for i, value in zip(indices, values, strict=True):
        new[i] = value
    return new


def _is_none(x: object) -> bool:
    return x is None
