"""F as a function of arrays alone: the arrays that it closes over become an argument (Decision 45)."""

from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from implicit_core.backends.jax import staging
from implicit_core.backends.jax_internals import (
    ClosedJaxpr,
    Jaxpr,
    JaxprEqn,
    Literal,
    Tracer,
    Var,
    eval_jaxpr,
    without_constants,
)

from .effects import without_references
from .leaves import Arrays
from .programs import Program, alone, compiled, program

R = TypeVar("R")
T = TypeVar("T")

UNDER_JIT = "jit", "pjit"
"""The names of the primitive in newer and in older versions of JAX."""


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
    leaves = jax.tree.leaves(arguments)
    made = without_references(_with_outer_constants(made, leaves), leaves)
    result = jax.tree.unflatten(jax.tree.structure(shapes), made.out_avals)
    return Hoisted(program(without_constants(made.jaxpr), len(made.consts), result), list(map(_as_array, made.consts)))


def _with_outer_constants(made: ClosedJaxpr, arguments: Sequence[Any]) -> ClosedJaxpr:
    """The same program, where arrays that functions under ``jit`` within it close over are constants of it, too."""
    if not any(map(_closes_over_arrays, made.eqns)):
        return made
    return jax.make_jaxpr(lambda *arguments: _inlined(made.jaxpr, made.consts, arguments))(*arguments)


def _inlined(jaxpr: Jaxpr, consts: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))

    def value(x: Var | Literal) -> Any:
        return x.val if isinstance(x, Literal) else known[x]

    for eqn in jaxpr.eqns:
        if _closes_over_arrays(eqn):
            inner = eqn.params["jaxpr"]
            results = _inlined(inner.jaxpr, inner.consts, list(map(value, eqn.invars)))
        else:
            part = alone(jaxpr, eqn)
            results = eval_jaxpr(part, [], *map(value, part.invars))
        known.update(zip(eqn.outvars, results, strict=True))
    return list(map(value, jaxpr.outvars))


def _closes_over_arrays(eqn: JaxprEqn) -> bool:
    inner = eqn.params.get("jaxpr")
    if eqn.primitive.name not in UNDER_JIT or not isinstance(inner, ClosedJaxpr):
        return False
    return bool(inner.consts) or any(map(_closes_over_arrays, inner.eqns))


def compiled_for(make: Callable[..., Callable[..., Any]], *settings: Any) -> Callable[..., Any]:
    """:func:`compiled`, with settings that may hold code of the user's.

    Such code may read more than its settings, so it is traced at each call, as F is. What it computes is compiled once.
    """
    if all(getattr(setting, "self_contained", True) for setting in settings):
        return compiled(make, *settings)

    def traced(*inputs: object) -> Any:
        hoisted = hoist(make(*settings), *inputs)
        return hoisted.program(*inputs, hoisted.closed_over)

    return traced


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
