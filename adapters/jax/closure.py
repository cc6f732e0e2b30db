"""F as a function of arrays alone: the arrays that it closes over become an argument (Decision 45)."""

from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.core import Tracer, eval_jaxpr
from jax.extend.core import Jaxpr, jaxprs_in_params

from implicit_core.arrays import PyTree
from implicit_core.backends.jax import staging

from .effects import communication_axes, has_named_axes, without_references
from .leaves import Arrays, replaced

R = TypeVar("R")
T = TypeVar("T")


class Hoisted(NamedTuple, Generic[R]):
    """A function that was traced once.

    Attributes
    ----------
    function
        ``function(*arguments, closed_over)`` evaluates the traced program. It neither runs the user's Python nor
        refers to tracers.
    closed_over
        The traced arrays that the user's function closes over.
    jaxpr
        The traced program; None if the function can only raise.
    result
        The types of the result.
    """

    function: Callable[..., R]
    closed_over: Arrays
    jaxpr: Jaxpr | None
    result: PyTree = None

    def without_arrays(self) -> "Hoisted[R]":
        """Without ``closed_over``, for objects that JAX keeps with its programs: they must not refer to tracers."""
        return self._replace(closed_over=())

    @property
    def has_named_axes(self) -> bool:
        """Whether it refers to named axes, in collectives or to read a position."""
        return self.jaxpr is not None and has_named_axes(self.jaxpr)

    @property
    def has_custom_vjp(self) -> bool:
        """Whether an operation in it has a ``custom_vjp``, so that JAX can't differentiate it in forward mode."""
        return self.jaxpr is not None and _contains_custom_vjp(self.jaxpr)

    @property
    def axes(self) -> tuple[str, ...]:
        """The named axes that it communicates over."""
        return () if self.jaxpr is None else tuple(sorted(communication_axes(self.jaxpr)))


def hoist(function: Callable[..., R], *arguments: object) -> Hoisted[R]:
    """Trace ``function``, whose arguments and results are pytrees of arrays.

    ``jax.closure_convert`` makes arguments of floating arrays only. An index array that ``jit`` has traced stays a
    constant of the program, and is not available when a derivative is taken outside of that ``jit``.
    """
    traced, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
    traced = without_references(traced, jax.tree.leaves(arguments))
    indices = [i for i, const in enumerate(traced.consts) if isinstance(const, Tracer)]
    # JAX keeps `call` as long as the programs that contain it, so it must not refer to tracers.
    constants = [None if isinstance(const, Tracer) else const for const in traced.consts]
    structure, jaxpr = jax.tree.structure(shapes), traced.jaxpr

    def call(*inputs: PyTree) -> R:
        *arguments, closed_over = inputs
        values = eval_jaxpr(jaxpr, replaced(constants, indices, closed_over), *jax.tree.leaves(arguments))
        result: R = jax.tree.unflatten(structure, values)
        return result

    result = jax.tree.unflatten(structure, traced.out_avals)
    return Hoisted(call, [traced.consts[i] for i in indices], jaxpr, result)


def is_traced(tree: object) -> bool:
    """Whether JAX traces operations on the arrays of ``tree`` instead of executing them."""
    return staging() or any(isinstance(x, Tracer) for x in jax.tree.leaves(tree))


def depending_on(tangents: Arrays, tree: T) -> T:
    """``tree``, each leaf of which depends on ``tangents``.

    ``custom_linear_solve`` accepts no tangent that JAX knows to be zero because it depends on nothing.
    """

    def add_empty_sums(x: jax.Array) -> jax.Array:
        x = jnp.asarray(x)
        for tangent in tangents:
            x = x + jnp.astype(jnp.real(jnp.sum(jnp.ravel(tangent)[:0])), x.dtype)
        return x

    result: T = jax.tree.map(add_empty_sums, tree)
    return result


def _contains_custom_vjp(jaxpr: Jaxpr) -> bool:
    return any(
        eqn.primitive.name.startswith("custom_vjp") or any(map(_contains_custom_vjp, jaxprs_in_params(eqn.params)))
        for eqn in jaxpr.eqns
    )
