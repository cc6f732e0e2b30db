"""JAX: Python loops on arrays whose numbers are known, ``lax.while_loop`` and ``lax.scan`` where JAX is tracing."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.experimental import checkify

from implicit_core.backend import Backend, Look

PyTree = Any
Carry = TypeVar("Carry")

UNROLLED = 8
"""Loops of a static length up to this are unrolled where they are compiled: XLA fuses across their steps."""

_JOINT: ContextVar[tuple[str, ...]] = ContextVar("named axes that a sample extends over", default=())


@contextmanager
def joint(axes: Sequence[str]) -> Iterator[None]:
    """Within it, a sample is one system with those in its place along named axes: inner products are summed over them.

    So is the stop test the same along them, which a collective within a loop depends on.
    """
    token = _JOINT.set(tuple(axes))
    try:
        yield
    finally:
        _JOINT.reset(token)


class JAXBackend(Backend):
    """JAX arrays, and the tracers that stand for them within JAX's transformations."""

    def device(self, x: jax.Array) -> None:
        return None  # a traced array has none, and JAX itself says where arrays of two devices meet

    def from_dlpack(self, x: Any) -> jax.Array:
        array: jax.Array = jnp.from_dlpack(x)
        if array.dtype.name != str(x.dtype).rpartition(".")[2]:
            raise TypeError(
                f"JAX makes {array.dtype} of {x.dtype}; to lend derivatives to such arrays call "
                'jax.config.update("jax_enable_x64", True) first'
            )
        return array

    def devices(self) -> list[str]:
        return [str(device) for device in jax.devices()]

    def finfo(self, dtype: Any) -> Any:
        return jnp.finfo(dtype)

    def isdtype(self, dtype: Any, kind: str | tuple[str, ...]) -> bool:
        is_key = jnp.issubdtype(dtype, jax.dtypes.extended)
        return not is_key and super().isdtype(dtype, kind)

    # Pytrees are JAX's own, so that the classes registered there are nodes here.

    def flatten(self, tree: PyTree) -> tuple[list[Any], Hashable]:
        return jax.tree.flatten(tree)

    def flatten_with_none(self, tree: PyTree) -> tuple[list[Any], Hashable]:
        return jax.tree.flatten(tree, is_leaf=lambda x: x is None)

    def unflatten(self, structure: Any, leaves: list[Any]) -> PyTree:
        return jax.tree.unflatten(structure, leaves)

    def map(self, fn: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
        return jax.tree.map(fn, tree, *rest)

    # Loops.

    def while_loop(
        self,
        cond: Callable[[Carry], jax.Array],
        body: Callable[[Carry], Carry],
        carry: Carry,
        max_steps: int,
        check_every: int = 1,
        look: Look | None = None,
    ) -> Carry:
        if self.readable(cond(carry)):
            return super().while_loop(cond, body, carry, max_steps, check_every, look)
        chunks, rest = divmod(max_steps, check_every)

        def more(state: tuple[Any, Carry]) -> Any:
            return (state[0] < chunks) & cond(state[1])

        def chunk(state: tuple[Any, Carry]) -> tuple[Any, Carry]:
            return state[0] + 1, _scan(body, state[1], check_every)

        start = 0, jax.tree.map(jnp.asarray, carry)
        carry = jax.lax.while_loop(more, chunk, start)[1]
        if rest:
            carry = jax.lax.cond(cond(carry), lambda c: _scan(body, c, rest), lambda c: c, carry)
        return carry

    def count(self, masks: Sequence[jax.Array]) -> list[int]:
        counts: list[int] = jnp.concatenate(masks, axis=1).sum(axis=0).tolist()
        return counts

    def rows_in_use(self, history: jax.Array, index: Any) -> int:
        return history.shape[1]

    def repeat(self, body: Callable[[Carry], Carry], carry: Carry, times: int) -> Carry:
        if times <= 1 or not staging():
            return super().repeat(body, carry, times)
        # The first apart: a constant start has no tangent there, and needs no cotangent, which a scan would not know.
        return _scan(body, body(carry), times - 1)

    # Traced arrays.

    def readable(self, x: jax.Array) -> bool:
        return not isinstance(x, jax.core.Tracer)

    def check_later(self, ok: jax.Array, message: str, **numbers: jax.Array) -> None:
        checkify.check(ok, message, **numbers)  # type: ignore[arg-type]  # its annotation is of `debug`

    def call_later(self, function: Callable[..., None], *arrays: jax.Array) -> None:
        jax.debug.callback(function, *arrays)

    def undifferentiated(self, f: Callable[..., PyTree]) -> Callable[..., PyTree]:
        return lambda h, z: jax.tree.map(self.stop_gradient, f(h, z))

    def copy(self, x: Any) -> Any:
        return jnp.asarray(x, copy=True)  # a reshape would give up how it is spread over devices

    def stop_gradient(self, x: Any) -> Any:
        return jax.lax.stop_gradient(x)

    def placement(self, x: jax.Array) -> Any:
        return jax.typeof(x)

    def spread(self, x: jax.Array, placement: Any) -> jax.Array:
        if placement is None:
            return x
        axes = placement.sharding.spec
        if x.shape != placement.shape:
            axes = (axes[0], *[None] * (x.ndim - 2), axes[-1])
        return self._placed(x, placement, axes, but=())

    def spread_numbers(self, x: jax.Array, placement: Any) -> jax.Array:
        if placement is None:
            return x
        return self._placed(x, placement, (placement.sharding.spec[0], *[None] * (x.ndim - 1)), but=_JOINT.get())

    def _placed(self, x: jax.Array, placement: Any, axes: Sequence[Any], but: Sequence[str]) -> jax.Array:
        missing = placement.manual_axis_type.varying - jax.typeof(x).manual_axis_type.varying - set(but)
        if missing:
            x = jax.lax.pcast(x, tuple(missing), to="varying")
        mesh = placement.sharding.mesh
        if mesh.explicit_axes and (mesh != jax.typeof(x).sharding.mesh or any(axis is not None for axis in axes)):
            x = jax.sharding.reshard(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)))
        return x

    def unchanged(self, x: jax.Array, before: jax.Array) -> bool:
        return True  # arrays can't be written to

    def fresh(self, x: jax.Array) -> jax.Array:
        return x

    def set_row(self, history: jax.Array, index: Any, row: jax.Array) -> jax.Array:
        row = row[:, None, :] if row.ndim == 2 else row
        return jax.lax.dynamic_update_slice_in_dim(history, row, index, axis=1)

    def total(self, numbers: jax.Array) -> jax.Array:
        axes = _JOINT.get()
        if axes:
            numbers = jax.lax.psum(numbers, axes)
        return numbers

    def norm(self, x: jax.Array) -> jax.Array:
        norm = super().norm(x)
        return jnp.sqrt(self.total(norm**2)) if _JOINT.get() else norm

    def largest(self, x: jax.Array) -> jax.Array:
        largest: jax.Array = super().largest(x)
        axes = _JOINT.get()
        if axes:
            largest = jax.lax.pmax(largest, axes)
        return largest

    def products(self, row: jax.Array, history: jax.Array) -> jax.Array:
        sharding = jax.typeof(history).sharding
        spec, out = sharding.spec, None
        if spec[-1] is not None:  # JAX wants to be told where sums over several devices go
            out = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(spec[0], None, None))
        return jnp.matmul(row, jnp.matrix_transpose(history), out_sharding=out)

    def products_of_two(self, x: jax.Array, y: jax.Array, history: jax.Array) -> tuple[jax.Array, jax.Array]:
        # Each by itself: of two rows XLA's product on the CPU takes three times as long as of one and one.
        return self.products(x, history), self.products(y, history)

    def gram(self, gram: jax.Array, history: jax.Array, index: Any) -> jax.Array:
        # One row anew: XLA's product of all rows on the CPU takes six times as long.
        row = jax.lax.dynamic_slice_in_dim(history, index, 1, axis=1)
        products = self.total(self.products(row, history))
        gram = jax.lax.dynamic_update_slice_in_dim(gram, products, index, axis=1)
        return jax.lax.dynamic_update_slice_in_dim(gram, jnp.matrix_transpose(products), index, axis=2)

    def solve_rows(self, matrix: jax.Array, row: jax.Array) -> jax.Array:
        # Gauss-Jordan elimination of the transposed system, for all samples at once: LAPACK takes one small matrix
        # after the other, and three times as long for those of Anderson.
        table = jnp.concatenate([matrix, self.spread_numbers(row, jax.typeof(matrix))], axis=1)
        columns = jnp.arange(matrix.shape[-1])

        def eliminate(j: Any, table: jax.Array) -> jax.Array:
            row = jax.lax.dynamic_slice_in_dim(table, j, 1, axis=1)
            pivot = jax.lax.dynamic_slice_in_dim(table, j, 1, axis=2) / jax.lax.dynamic_slice_in_dim(row, j, 1, axis=2)
            return jnp.where(columns == j, pivot, table - pivot * row)

        if staging():
            table = jax.lax.fori_loop(0, matrix.shape[-1], eliminate, table)
        else:
            for j in range(matrix.shape[-1]):
                table = eliminate(j, table)
        return table[:, -1:, :]

    def minimum(self, index: Any, limit: int) -> Any:
        return min(index, limit) if isinstance(index, int) else jnp.minimum(index, limit)

    def table(self, rows: jax.Array) -> jax.Array:
        return rows


def _scan(body: Callable[[Carry], Carry], carry: Carry, times: int) -> Carry:
    if times == 1:
        return body(carry)
    unroll = times if times <= UNROLLED else 1
    carry, _ = jax.lax.scan(lambda c, _: (body(c), None), carry, length=times, unroll=unroll)
    return carry


def staging() -> bool:
    """Whether operations are being recorded, for ``jit`` and its like, instead of carried out."""
    return isinstance(jnp.zeros(()), jax.core.Tracer)


BACKEND = JAXBackend("jax", jnp, (jax.Array,))
