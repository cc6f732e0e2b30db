"""F's derivatives from JAX, as the callbacks of a Problem."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from implicit_core import checks
from implicit_core.problem import Linearization, Map, Problem

from .closure import has_only_a_pullback, hoist, moves, replaced, with_none
from .compiled import Compiled

PyTree = Any


class JAXProblem(Problem):
    """A problem whose callbacks are made by JAX from F."""


def problem(f: Map, *, batch_ndim: int = 0, jit: bool = False) -> Problem:
    """A :class:`Problem` whose derivatives JAX makes.

    Parameters
    ----------
    f
        ``f(h, z)``, the equilibrium map, in functions that JAX can differentiate.
    batch_ndim
        As for :class:`Problem`.
    jit
        Compile F and its derivatives, each once for all calls, where these are not within ``jax.jit`` anyway. Leaves of
        z that are not arrays are then constants of the program, and must be hashable. So is what f closes over, as it
        was at the first call: pass in z what changes.

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
    if jit:
        compiled = Compiled(f)
        return JAXProblem(compiled.value, linearize=compiled.linearize, batch_ndim=batch_ndim)
    return JAXProblem(f, linearize=lambda h, z: linearize(f, h, z), batch_ndim=batch_ndim)


def linearize(f: Map, h: PyTree, z: PyTree) -> Linearization:
    """F and its derivatives at (h, z), for one evaluation of F.

    Leaves of z that are not arrays of real or complex numbers have no derivative: None stands for it.
    """
    leaves, structure = jax.tree.flatten(z)
    places = [i for i, leaf in enumerate(leaves) if moves(leaf)]
    moving = [leaves[i] for i in places]

    def at(values: list[Any], others: list[Any]) -> PyTree:
        return jax.tree.unflatten(structure, replaced(others, places, values))

    def tangents(dz: PyTree) -> list[Any]:
        given = [d for d, leaf in zip(with_none(dz), with_none(z), strict=True) if leaf is not None]
        return [given[i] for i in places]

    once = hoist(lambda h, moving: f(h, at(moving, leaves)), h, moving)

    def on_moving(h: PyTree, moving: list[Any]) -> PyTree:
        return once.function(h, moving, once.closed)

    def cotangents(v_h: PyTree, v_z: list[Any]) -> tuple[PyTree, PyTree]:
        return v_h, at(v_z, [None] * len(leaves))

    if has_only_a_pullback(once.jaxpr):
        value, pull = jax.vjp(on_moving, h, moving)
        return Linearization(value, vjp=lambda v: cotangents(*pull(v)))
    value, push = jax.linearize(on_moving, h, moving)
    push_h, push_z = pushforwards(push, h, moving)
    return Linearization(
        value,
        vjp_h=lambda v: jax.linear_transpose(push_h, h)(v)[0],
        vjp_z=lambda v: cotangents(None, jax.linear_transpose(push_z, moving)(v)[0])[1],
        vjp=lambda v: cotangents(*jax.linear_transpose(push, h, moving)(v)),
        jvp_h=push_h,
        jvp_z=lambda dz: push_z(tangents(dz)),
        jvp=lambda dh, dz: push(dh, tangents(dz)),
    )


def pushforwards(push: Callable[..., PyTree], h: PyTree, z: PyTree) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """``dh -> push(dh, 0)`` and ``dz -> push(0, dz)``, without the work on the zeros.

    Parameters
    ----------
    push
        ``push(dh, dz)``, linear.
    h, z
        Where, for the shapes.
    """
    zero_h, zero_z = jax.tree.map(jnp.zeros_like, (h, z))
    # Here, and not where they are first called: that may be in a loop, whose tracers would get out.
    push_h = jax.linearize(lambda dh: push(dh, zero_z), zero_h)[1]
    push_z = jax.linearize(lambda dz: push(zero_h, dz), zero_z)[1]
    return push_h, push_z
