"""An axis of ``jax.vmap`` as one more batch axis of the solve (Decision 49)."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from implicit_core.arrays import H, PyTree
from implicit_core.backends.jax import unseen
from implicit_core.backends.jax_internals import ShapedArray, custom_vmap
from implicit_core.solution import Solution

from .closure import is_traced
from .leaves import Arrays

MapOfArrays = Callable[[H, Arrays], H]
SolveOfArrays = Callable[[MapOfArrays[H], H, Arrays, Arrays, int], Solution[H]]


def with_vmap_as_batch(
    solve: SolveOfArrays[H], f: MapOfArrays[H], h0: H, inputs: Arrays, settings: Arrays, batch_ndim: int
) -> Solution[H]:
    """``solve(f, h0, inputs, settings, batch_ndim)``, in which an axis of ``jax.vmap`` becomes a batch axis.

    JAX would also run the loop until all samples are finished. But it would select between old and new values of all
    that the loop carries, histories included, and outside of ``jit`` it would compile the loop at each call. It does so
    where a setting of the solver is mapped, since one loop has one number of each.
    """
    if not is_traced((h0, inputs, settings)):
        return solve(f, h0, inputs, settings, batch_ndim)

    def one_loop(h0: H, inputs: Arrays, settings: Arrays) -> Solution[H]:
        solution: Solution[H] = jax.tree.map(jnp.asarray, solve(f, h0, inputs, settings, batch_ndim))
        return solution

    call = custom_vmap(one_loop)

    @call.def_vmap
    def rule(
        size: int, is_mapped: tuple[PyTree, Sequence[bool], Sequence[bool]], h0: H, inputs: Arrays, settings: Arrays
    ) -> tuple[Solution[H], Solution[PyTree]]:
        if any(is_mapped[2]):
            in_axes = jax.tree.map(lambda has_axis: 0 if has_axis else None, is_mapped)
            solution = jax.vmap(one_loop, in_axes=in_axes, axis_size=size)(h0, inputs, settings)
            return solution, jax.tree.map(lambda _: True, solution)
        mapped = [
            x for x, has_axis in zip(*map(jax.tree.leaves, ((h0, inputs), is_mapped[:2])), strict=True) if has_axis
        ]
        aval = jax.typeof(mapped[0])
        h0 = jax.tree.map(lambda x, has_axis: x if has_axis else _repeated(x, size, aval), h0, is_mapped[0])
        axes = [0 if has_axis else None for has_axis in is_mapped[1]]
        # F gets inputs that all samples share as they are, without the axis.
        mapped_f = jax.vmap(f, in_axes=(0, axes), axis_size=size)
        solution = _axis_first(with_vmap_as_batch(solve, mapped_f, h0, inputs, settings, batch_ndim + 1))
        out = jax.tree.map(lambda _: True, solution)
        return solution, out._replace(stats=out.stats._replace(evaluations=False))

    result: Solution[H] = call(h0, inputs, settings)
    return result


def _axis_first(solution: Solution[H]) -> Solution[H]:
    """The solution with the mapped axis in front of the steps of its trace."""
    evaluations, trace = jnp.asarray(solution.stats.evaluations), solution.stats.trace
    if trace is not None:
        trace = unseen(lambda xp, trace: xp.moveaxis(trace, 1, 0), trace)
    return solution._replace(stats=solution.stats._replace(evaluations=evaluations, trace=trace))


def _repeated(x: jax.Array, size: int, mapped: ShapedArray) -> jax.Array:
    """``x``, ``size`` times along a new first axis, which is sharded as the first axis of ``mapped`` is."""
    spec = jax.sharding.PartitionSpec(mapped.sharding.spec[0], *jax.typeof(x).sharding.spec)
    sharding = jax.sharding.NamedSharding(mapped.sharding.mesh, spec) if spec[0] is not None else None
    return jnp.broadcast_to(x, (size, *x.shape), out_sharding=sharding)
