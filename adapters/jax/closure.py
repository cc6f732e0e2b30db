"""F as a function of arrays alone: the arrays that it closes over become an argument (Decision 45)."""

from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from implicit_core.backends.jax import staging
from implicit_core.backends.jax_internals import Tracer, without_constants

from .effects import without_references
from .leaves import Arrays
from .programs import Program, program

R = TypeVar("R")
T = TypeVar("T")


class Hoisted(NamedTuple, Generic[R]):
    """A function that was traced once.

    Attributes
    ----------
    program
        ``program(*arguments, closed_over)``.
    closed_over
        The arrays that the user's function closes over, traced or not.
    """

    program: Program[R]
    closed_over: Arrays


def hoist(function: Callable[..., R], *arguments: object) -> Hoisted[R]:
    """Trace ``function``, whose arguments and results are pytrees of arrays.

    ``jax.closure_convert`` makes arguments of floating arrays only. An index array that ``jit`` has traced stays a
    constant of the program, and is not available when a derivative is taken outside of that ``jit``. Here arrays whose
    numbers are known become arguments too: with other numbers it is the same program.
    """

    def traced(*arguments: object) -> R:  # JAX remembers what it traced by the function, which may have changed
        return function(*arguments)

    made, shapes = jax.make_jaxpr(traced, return_shape=True)(*arguments)
    made = without_references(made, jax.tree.leaves(arguments))
    result = jax.tree.unflatten(jax.tree.structure(shapes), made.out_avals)
    return Hoisted(program(without_constants(made.jaxpr), len(made.consts), result), list(map(_as_array, made.consts)))


def _as_array(const: Any) -> Any:
    is_on_host = hasattr(const, "__array__") and not isinstance(const, jax.Array)
    return jnp.asarray(const) if is_on_host else const


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
