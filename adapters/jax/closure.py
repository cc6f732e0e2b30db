"""F as a function of arrays alone: what it closes over becomes an argument."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer, eval_jaxpr
from jax.extend.core import Jaxpr, jaxprs_in_params

from implicit_core.backends.jax import staging

PyTree = Any
Arrays = Sequence[Any]


class Hoisted(NamedTuple):
    """A function, traced once.

    Attributes
    ----------
    function
        ``function(*arguments, closed)``: no Python of the user's runs in it, and nothing traced is closed over.
    closed
        The traced arrays that the user's function closes over.
    jaxpr
        What was traced; None for a function that can only raise.
    result
        The types of what it returns.
    """

    function: Callable[..., PyTree]
    closed: list[jax.Array]
    jaxpr: Jaxpr | None
    result: PyTree = None

    @property
    def has_effects(self) -> bool:
        """Whether it does more than compute: collectives over a named axis, callbacks, prints."""
        return self.jaxpr is not None and bool(self.jaxpr.effects)

    @property
    def axes(self) -> tuple[str, ...]:
        """The named axes that it communicates over."""
        return () if self.jaxpr is None else tuple(sorted(_axes(self.jaxpr)))


def _axes(jaxpr: Any) -> set[str]:
    found: set[str] = set()
    for eqn in jaxpr.eqns:
        inner = list(jaxprs_in_params(eqn.params))
        if inner:
            found = found.union(*map(_axes, inner))
        elif eqn.primitive.name != "axis_index":  # which only asks where it is
            found |= {str(effect.name) for effect in eqn.effects if hasattr(effect, "name")}
    return found


def hoist(function: Callable[..., PyTree], *arguments: PyTree) -> Hoisted:
    """Trace ``function``, whose arguments and results are pytrees of arrays.

    ``jax.closure_convert`` does so for arrays that may be differentiated; an index array that ``jit`` has traced stays
    inside, and is gone when a derivative is taken outside of that ``jit``.
    """
    traced, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
    places = [i for i, const in enumerate(traced.consts) if isinstance(const, Tracer)]
    # What `call` refers to is kept for as long as a program it is part of: no tracers.
    known = [None if isinstance(const, Tracer) else const for const in traced.consts]
    structure, jaxpr = jax.tree.structure(shapes), traced.jaxpr

    def call(*inputs: PyTree) -> PyTree:
        *arguments, closed = inputs
        consts = replaced(known, places, closed)
        return jax.tree.unflatten(structure, eval_jaxpr(jaxpr, consts, *jax.tree.leaves(arguments)))

    result = jax.tree.unflatten(structure, traced.out_avals)
    return Hoisted(call, [traced.consts[i] for i in places], jaxpr, result)


class Split(NamedTuple):
    """A pytree of anything, as its arrays and what holds them.

    Attributes
    ----------
    arrays
        The leaves that are JAX arrays.
    join
        The pytree, with arrays in their places.
    pick
        What stands in these places of another pytree of that structure; it may have None there.
    """

    arrays: list[jax.Array]
    join: Callable[[Arrays], PyTree]
    pick: Callable[[PyTree], list[Any]]


def split(tree: PyTree) -> Split:
    """The arrays of a pytree apart from its other leaves: numbers, functions, None."""
    leaves, structure = jax.tree.flatten(tree, is_leaf=lambda x: x is None)
    arrays = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)}
    places = list(arrays)
    others = [None if i in arrays else leaf for i, leaf in enumerate(leaves)]

    def join(arrays: Arrays) -> PyTree:
        return jax.tree.unflatten(structure, replaced(others, places, arrays))

    def pick(tree: PyTree) -> list[Any]:
        found = with_none(tree)
        return [found[i] for i in places]

    return Split(list(arrays.values()), join, pick)


def replaced(items: Sequence[Any], places: Sequence[int], values: Sequence[Any]) -> list[Any]:
    """``items`` with ``values`` in these places."""
    new = list(items)
    for i, value in zip(places, values, strict=True):
        new[i] = value
    return new


def is_traced(tree: PyTree) -> bool:
    """Whether operations on the arrays of ``tree`` are traced, not carried out."""
    return staging() or any(isinstance(x, Tracer) for x in jax.tree.leaves(tree))


def linear_in(sources: Arrays, tree: PyTree) -> PyTree:
    """``tree``, each leaf of it depending on tangents: those that JAX knows to be zero can't enter a linear solve."""

    def add_nothing(x: jax.Array) -> jax.Array:
        for source in sources:
            x = x + jnp.astype(jnp.real(jnp.sum(jnp.ravel(source)[:0])), x.dtype)
        return x

    return jax.tree.map(add_nothing, tree)


def with_none(tree: PyTree) -> list[Any]:
    """The leaves of a pytree, and its None."""
    return jax.tree.leaves(tree, is_leaf=lambda x: x is None)


def moves(leaf: Any) -> bool:
    """Whether a leaf is an array of real or complex numbers, which has a derivative."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact)


def has_only_a_pullback(jaxpr: Any) -> bool:
    """Whether something in it has a ``custom_vjp``, so that JAX has no pushforward of it."""
    return any(
        eqn.primitive.name.startswith("custom_vjp") or any(map(has_only_a_pullback, jaxprs_in_params(eqn.params)))
        for eqn in jaxpr.eqns
    )
