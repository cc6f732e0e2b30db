"""F's derivatives from JAX, as the callbacks of a Problem."""

import functools
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp

from implicit_core import checks
from implicit_core.arrays import H, PyTree, Z
from implicit_core.backends.jax import BACKEND
from implicit_core.problem import Linearization, Map, Problem

from .closure import hoist
from .leaves import Arrays, Units, is_array, is_differentiable, partition
from .maps import EagerMap, TracedMap


class JAXProblem(Problem[H, Z]):
    """A problem whose derivatives JAX makes from F.

    Attributes
    ----------
    traced
        Whether F may be traced.
    """

    traced = True


def problem(f: Map[H, Z], *, batch_ndim: int = 0, scale: PyTree = None, jit: bool = True) -> Problem[H, Z]:
    """A :class:`Problem` whose derivatives JAX makes.

    Parameters
    ----------
    f
        ``f(h, z)``, the equilibrium map, in functions that JAX can differentiate.
    batch_ndim, scale
        As for :class:`Problem`.
    jit
        Whether F may be traced. It is then traced for each solve and each linearization, and what is compiled for it is
        kept: equal programs are compiled once. False is for an F that JAX can't trace, because it uses NumPy or asks
        for the number in an array. Its solves are Python loops, outside of ``jax.jit`` and ``jax.vmap`` alone.
        Derivatives reach z, and are there as far as JAX can differentiate F operation by operation.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> import implicit_core as ic
    >>> from implicit_core.adapters import jax as icj
    >>> problem = icj.problem(lambda h, z: 0.5 * h + z)
    >>> value, pullback = ic.Neumann(k=3, lam=1.0).vjp(problem, jnp.array([2.0]), jnp.array([1.0]))
    >>> pullback(jnp.array([1.0]))  # 1 + 1/2 + 1/4
    Array([1.75], dtype=float32)
    """
    checks.function("f", f)
    checks.instance("jit", jit, bool, "True")
    if not jit:
        f = _with_arrays_of_jax(f)
    made = JAXProblem(f, linearize=lambda h, z: linearize(f, h, z, jit=jit), batch_ndim=batch_ndim, scale=scale)
    made.traced = jit
    return made


def compiled_once(f: Map[H, Z]) -> Map[H, Z]:
    """``f``, which JAX traces once for all calls, for loops outside of JAX: it keeps what it closes over at first.

    Leaves of z that are not arrays are constants of the program.
    """
    checks.function("f", f)
    jitted = jax.jit(lambda h, arrays, static: f(h, static.combine(arrays)), static_argnums=2)

    @functools.wraps(f)
    def call(h: H, z: Z) -> H:
        arrays, static = partition(z, lambda leaf: is_array(leaf) or is_differentiable(leaf))
        for leaf in static.others:
            if not isinstance(leaf, Hashable):
                raise TypeError(
                    "the leaves of z that are not arrays are part of the compiled program and must be hashable, got a "
                    f"leaf of type {type(leaf).__name__}"
                )
        result: H = jitted(h, arrays, static)
        return result

    return call


def _with_arrays_of_jax(f: Map[H, Z]) -> Map[H, Z]:
    """``f``, which may return arrays of NumPy."""

    @functools.wraps(f)
    def converted(h: H, z: Z) -> H:
        result: H = jax.tree.map(lambda x: jnp.asarray(x) if hasattr(x, "__array__") else x, f(h, z))
        return result

    return converted


def linearize(f: Map[H, Z], h: H, z: Z, *, jit: bool = True) -> Linearization[H, Z]:
    """F and its derivatives at (h, z), for one evaluation of F.

    Leaves of z that are not arrays of real or complex numbers have no derivative: their cotangent is None.
    """
    arrays, static = partition(z, is_differentiable)
    inputs: list[Any] = list(arrays)

    def like_h(h: H, arrays: Arrays) -> H:
        result: H = checks.structured(BACKEND, f(h, static.combine(arrays)), h)
        return result

    of: TracedMap[H] | EagerMap[H, Z] = EagerMap(f, static, 0, Units(None))
    if jit:
        hoisted = hoist(like_h, h, arrays)
        of, inputs = TracedMap(hoisted.program, 0, Units(None)), [*arrays, *hoisted.closed_over]

    def cotangents(v_h: H, v_arrays: Arrays) -> tuple[H, Z]:
        return v_h, static.cotangent(v_arrays)

    if of.has_custom_vjp:
        value, pull = jax.vjp(lambda h, arrays: of(h, [*arrays, *inputs[len(arrays) :]]), h, arrays)
        return Linearization(value, vjp=lambda v: cotangents(*pull(v)))
    at = of.linearized(h, inputs, range(len(arrays)))
    return Linearization(
        at.value,
        vjp_h=lambda v: at.pull_h(v, h),
        vjp_z=lambda v: static.cotangent(at.pull_z(v, arrays)),
        vjp=lambda v: cotangents(*at.pull(v, (h, arrays))),
        jvp_h=at.push_h,
        jvp_z=lambda dz: at.push_z(static.select(dz)),
        jvp=lambda dh, dz: at.push(dh, static.select(dz)),
    )
