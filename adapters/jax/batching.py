"""The solve, with an axis of ``jax.vmap`` as one more axis of the batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from implicit_core.solution import Solution

from .closure import is_traced

PyTree = Any
Arrays = list[Any]
Map = Callable[[PyTree, Arrays], PyTree]


def batched(
    run: Callable[[Map, PyTree, Arrays, int], Solution], f: Map, h0: PyTree, externals: Arrays, batch_ndim: int
) -> Solution:
    """``run(f, h0, externals, batch_ndim)``, where samples of ``jax.vmap`` are samples of the batch.

    JAX would run the loop until the last of them is finished too, but select between the old and the new of all that it
    carries, histories included, and compile the loop at each call outside of ``jit``.
    """
    if not is_traced((h0, externals)):
        return run(f, h0, externals, batch_ndim)

    @custom_vmap
    def solve(h0: PyTree, externals: Arrays) -> Solution:
        solution: Solution = jax.tree.map(jnp.asarray, run(f, h0, externals, batch_ndim))
        return solution

    @solve.def_vmap
    def rule(size: int, in_batched: Any, h0: PyTree, externals: Arrays) -> tuple[Solution, Solution]:
        mapped = jax.tree.map(lambda x, is_batched: x if is_batched else None, (h0, externals), tuple(in_batched))
        like = jax.typeof(jax.tree.leaves(mapped)[0]).sharding
        h0 = jax.tree.map(lambda x, is_batched: x if is_batched else _repeated(x, size, like), h0, in_batched[0])
        axes = [0 if is_batched else None for is_batched in in_batched[1]]
        solution = batched(run, jax.vmap(f, in_axes=(0, axes), axis_size=size), h0, externals, batch_ndim + 1)
        trace = solution.stats.trace
        if trace is not None:
            trace = jnp.moveaxis(trace, 1, 0)
        stats = solution.stats._replace(evaluations=jnp.asarray(solution.stats.evaluations), trace=trace)
        solution = solution._replace(stats=stats)
        everywhere = jax.tree.map(lambda _: True, solution)
        return solution, everywhere._replace(stats=everywhere.stats._replace(evaluations=False))

    result: Solution = solve(h0, externals)
    return result


def _repeated(x: jax.Array, size: int, like: Any) -> jax.Array:
    """``x``, ``size`` times, spread over devices along the new axis as ``like`` is along its first."""
    spec = jax.sharding.PartitionSpec(like.spec[0], *jax.typeof(x).sharding.spec)
    where = jax.sharding.NamedSharding(like.mesh, spec) if like.spec[0] is not None else None
    return jnp.broadcast_to(x, (size, *x.shape), out_sharding=where)
