"""F's derivatives from JAX, as the callbacks of a Problem."""

from collections.abc import Callable

import jax

from implicit_core import checks
from implicit_core.arrays import H, PyTree, Z
from implicit_core.backends.jax import BACKEND, zeros_like
from implicit_core.problem import Linearization, Map, Problem

from .closure import hoist
from .compiled import CompiledMap
from .leaves import Arrays, is_differentiable, partition


class JAXProblem(Problem[H, Z]):
    """A problem whose derivatives JAX makes from F."""


def problem(f: Map[H, Z], *, batch_ndim: int = 0, scale: PyTree = None, jit: bool = False) -> Problem[H, Z]:
    """A :class:`Problem` whose derivatives JAX makes.

    Parameters
    ----------
    f
        ``f(h, z)``, the equilibrium map, in functions that JAX can differentiate.
    batch_ndim, scale
        As for :class:`Problem`.
    jit
        Compile F and its derivatives, each once for all calls that are not within ``jax.jit`` anyway. Leaves of z that
        are not arrays are then constants of the program, and must be hashable. Arrays and numbers that f closes over
        keep the values that they had at the first call, so pass in z what changes.

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
        compiled = CompiledMap(f)
        return JAXProblem(compiled.value, linearize=compiled.linearize, batch_ndim=batch_ndim, scale=scale)
    return JAXProblem(f, linearize=lambda h, z: linearize(f, h, z), batch_ndim=batch_ndim, scale=scale)


def linearize(f: Map[H, Z], h: H, z: Z) -> Linearization[H, Z]:
    """F and its derivatives at (h, z), for one evaluation of F.

    Leaves of z that are not arrays of real or complex numbers have no derivative: their cotangent is None.
    """
    arrays, static = partition(z, is_differentiable)

    def like_h(h: H, arrays: Arrays) -> H:
        result: H = checks.structured(BACKEND, f(h, static.combine(arrays)), h)
        return result

    hoisted = hoist(like_h, h, arrays)

    def on_arrays(h: H, arrays: Arrays) -> H:
        return hoisted.function(h, arrays, hoisted.closed_over)

    def cotangents(v_h: H, v_arrays: Arrays) -> tuple[H, Z]:
        return v_h, static.cotangent(v_arrays)

    if hoisted.has_custom_vjp:
        value, pull = jax.vjp(on_arrays, h, arrays)
        return Linearization(value, vjp=lambda v: cotangents(*pull(v)))
    value, push = jax.linearize(on_arrays, h, arrays)
    push_h, push_z = partial_pushforwards(push, h, arrays)
    return Linearization(
        value,
        vjp_h=lambda v: jax.linear_transpose(push_h, h)(v)[0],
        vjp_z=lambda v: static.cotangent(jax.linear_transpose(push_z, arrays)(v)[0]),
        vjp=lambda v: cotangents(*jax.linear_transpose(push, h, arrays)(v)),
        jvp_h=push_h,
        jvp_z=lambda dz: push_z(static.select(dz)),
        jvp=lambda dh, dz: push(dh, static.select(dz)),
    )


def partial_pushforwards(
    push: Callable[[H, Arrays], H], h: H, arrays: Arrays
) -> tuple[Callable[[H], H], Callable[[Arrays], H]]:
    """``dh -> push(dh, 0)`` and ``d -> push(0, d)``, without the operations on the zeros (Decision 47).

    Parameters
    ----------
    push
        ``push(dh, d)``, linear.
    h, arrays
        The point of linearization, for the shapes.
    """
    zero_h, zero_arrays = jax.tree.map(zeros_like, (h, arrays))
    # Linearized here and not at the first call, which may be in a loop: its tracers would leak.
    push_h = jax.linearize(lambda dh: push(dh, zero_arrays), zero_h)[1]
    push_arrays = jax.linearize(lambda d: push(zero_h, d), zero_arrays)[1]
    return push_h, push_arrays
