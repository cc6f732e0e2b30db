"""JAX: Python loops on arrays whose numbers are known, ``lax.while_loop`` and ``lax.scan`` where JAX is tracing."""

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from contextvars import ContextVar
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from implicit_core.arrays import Count, History, Mask, Matrices, Numbers, PyTree, Row, State
from implicit_core.backend import Backend, IsLeaf, Known, Watch
from implicit_core.backends.jax_internals import (
    Primitive,
    Tracer,
    bdim_at_front,
    checkify,
    fancy_primitive_batchers,
    lower_fun,
    register_lowering,
)
from implicit_core.records import Record, flatten, subscribe, unflatten
from implicit_core.space import Space, total

Carry = TypeVar("Carry")

STACKED = 1024
"""Numbers of up to so many samples are carried by a loop in one array. Where they are more, a copy costs time."""
UNROLLED = 8
"""Loops of a static length up to this are unrolled where they are compiled: XLA fuses across their steps."""

_COUPLED_AXES: ContextVar[tuple[str, ...]] = ContextVar("named axes that a sample extends over", default=())


_NOTICED: ContextVar[list[jax.Array] | None] = ContextVar("what a traced solve has noticed", default=None)


@contextmanager
def noticing() -> Iterator[list[jax.Array]]:
    """Within this context traced solves append what they noticed to a list, see :meth:`Backend.noticed`."""
    noticed = list[jax.Array]()
    token = _NOTICED.set(noticed)
    try:
        yield noticed
    finally:
        _NOTICED.reset(token)


@contextmanager
def coupled_axes(axes: Sequence[str]) -> Iterator[None]:
    """Within this context a sample is one system with its counterparts along named axes.

    Inner products are summed over these axes, so that the stop test has one result along them. All devices then leave a
    loop at the same step, as a collective within it requires.
    """
    token = _COUPLED_AXES.set(tuple(axes))
    try:
        yield
    finally:
        _COUPLED_AXES.reset(token)


class JAXSpace(Space):
    """XLA's faster spellings, and sharded arrays."""

    def __init__(self, backend: Backend, like: PyTree, batch_ndim: int, name: str = "h0", scale: PyTree = None) -> None:
        super().__init__(backend, like, batch_ndim, name, scale)
        self._types: list[Any] = [None] * len(self.shapes)

    @property
    def dimension(self) -> int:
        # A sample's parts along named axes are one system, which is at most that large.
        axes = _COUPLED_AXES.get()
        return super().dimension * (int(jax.lax.psum(1, axes)) if axes else 1)

    # New arrays are sharded as the state is.

    def shard_as(self, x: State) -> None:
        self._types = [jax.typeof(a) for a in x]

    def shard(self, x: State) -> State:
        return State(tuple(map(sharded, x, self._types)))

    def full(self, value: float, dtype: Any = None) -> Numbers:
        numbers: Numbers = self._shard_numbers(super().full(value, dtype))
        return numbers

    def matrices(self, m: int, n: int) -> Matrices:
        matrices: Matrices = self._shard_numbers(super().matrices(m, n))
        return matrices

    def zeros(self) -> State:
        return self.shard(super().zeros())

    def history(self, m: int) -> History:
        return History(tuple(map(sharded, super().history(m), self._types)))

    def _shard_numbers(self, x: Any) -> Any:
        return numbers_sharded(x, self._types[0])

    # JAX may look for NaN in the result of every operation: `jax_debug_nans`, `jax_debug_infs`. Decision 100.

    def filled(self, x: Any, mask: Any, number: float) -> Any:
        return jnp.where(mask, number, x)

    def blanked(self, x: Any, mask: Any) -> Any:
        return unseen(lambda xp, mask, x: xp.where(mask, math.nan, x), mask, x)

    def divisor(self, x: Any, norm: Any, active: Any) -> Any:
        used = norm > 0 if active is None else active & (norm > 0)
        # The quotient is zero then, to rounding.
        return jnp.where(used[:, :, None], x, float(jnp.finfo(x.dtype).max))

    # Sums over a sample, which may extend over named axes.

    def norm(self, x: State) -> Numbers:
        norm: Any = super().norm(x)
        total: Any = jnp.sqrt(_total(norm**2)) if _COUPLED_AXES.get() else norm
        return total  # type: ignore[no-any-return]  # numbers

    def largest_of(self, a: Any) -> Any:
        largest = super().largest_of(a)
        # In 4096 numbers or more, XLA's maximum on a CPU passes over NaN.
        return jnp.where(jnp.isnan(a).any(axis=-1, keepdims=True), math.nan, largest)

    def largest(self, x: State) -> Numbers:
        largest: Any = super().largest(x)
        if axes := _COUPLED_AXES.get():  # XLA's maximum over devices passes over NaN, too
            found = jax.lax.psum(jnp.isnan(largest).astype(int), axes)
            largest = jnp.where(found > 0, math.nan, jax.lax.pmax(largest, axes))
        return largest  # type: ignore[no-any-return]  # numbers

    def dot(self, x: State, y: State) -> Numbers:
        dot: Numbers = _total(super().dot(x, y))
        return dot

    def products(self, rows: Row, history: History) -> Matrices:
        # One product for each row: XLA's product of two rows on the CPU takes three times as long as two products.
        rows, history, n = self.measured(rows), self.measured(history), rows[0].shape[1]
        parts = [total(_products(a[:, i : i + 1, :], b) for a, b in zip(rows, history, strict=True)) for i in range(n)]
        products: Matrices = _total(parts[0] if n == 1 else jnp.concatenate(parts, axis=1))
        return products

    def gram(self, gram: Any, history: History, index: Any) -> Any:
        return tuple(_gram(a, b, index) for a, b in zip(gram, self.measured(history), strict=True))

    # A loop's counter may be traced.

    def set_matrix_row(self, matrix: jax.Array, index: Any, row: jax.Array) -> jax.Array:
        row = row[:, None, :] if row.ndim == 2 else row
        return jax.lax.dynamic_update_slice_in_dim(matrix, row, index, axis=1)

    def rows_in_use(self, history: History, index: Any) -> History:
        return history  # each number of rows would need its own compilation

    def take(self, x: jax.Array, index: Any, axis: int) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, index, 1, axis=axis)

    def table(self, rows: jax.Array) -> jax.Array:
        return rows

    def copy(self, x: State) -> State:
        # A reshape would lose how the array is sharded.
        return State(tuple(jnp.asarray(a, copy=True) for a in x))

    def solve_rows(self, matrix: Any, row: Any) -> Any:
        # Gauss-Jordan elimination of the transposed system, for all samples at once: LAPACK takes one small matrix
        # after the other, and three times as long for Anderson's matrices. Decision 54.
        table = jnp.concatenate([matrix, numbers_sharded(row, jax.typeof(matrix))], axis=1)
        columns = jnp.arange(matrix.shape[-1])[None, None, :]

        def eliminate(j: Any, table: jax.Array) -> jax.Array:
            row = jax.lax.dynamic_slice_in_dim(table, j, 1, axis=1)
            pivot = jax.lax.dynamic_slice_in_dim(table, j, 1, axis=2) / jax.lax.dynamic_slice_in_dim(row, j, 1, axis=2)
            return jnp.where(columns == j, pivot, table - pivot * row)

        if staging():
            table = jax.lax.fori_loop(0, matrix.shape[-1], eliminate, table)
        else:
            for j in range(matrix.shape[-1]):
                table = eliminate(j, table)
        return table[:, matrix.shape[-1] :, :]


def debugs_nans() -> bool:
    """Whether JAX looks for NaN in the result of every operation."""
    debugs: bool = jax.config.jax_debug_nans  # type: ignore[attr-defined]  # all options are made at run time
    return debugs


def unseen(operation: Callable[..., Any], *arrays: jax.Array) -> jax.Array:
    """``operation(xp, *arrays)``, whose result says by NaN that there is no number, with no error of `jax_debug_nans`.

    Outside of compiled programs JAX looks at what every operation of its own makes, so NumPy computes it then.
    """
    # To switch the flag off for an operation would switch it off for all compiled programs of the thread, for good.
    if debugs_nans() and not any(isinstance(x, Tracer) for x in arrays):
        devices = arrays[-1].sharding.device_set
        if len(devices) == 1:
            on_host: jax.Array = jax.device_put(operation(np, *map(np.asarray, arrays)), *devices)
            return on_host
    result: jax.Array = operation(jnp, *arrays)
    return result


def sharded(x: jax.Array, like: Any) -> jax.Array:
    """``x``, (N, ..., D), sharded as an array (N, D) of the type ``like``, if there is one."""
    if like is None:
        return x
    axes = like.sharding.spec
    if x.shape != like.shape:
        axes = (axes[0], *[None] * (x.ndim - 2), axes[-1])
    return _placed(x, like, axes, but=())


def zeros_like(x: jax.Array) -> jax.Array:
    """Zeros, sharded as ``x`` is. In JAX 0.12 those of ``jnp`` are not if no mesh is set, and cannot be tangents."""
    return sharded(jnp.zeros_like(x), jax.typeof(x))


def numbers_sharded(x: jax.Array, like: Any) -> jax.Array:
    """Per-sample numbers ``x``, (N, ...), sharded as the samples of an array of the type ``like``, if there is one."""
    if like is None:
        return x
    return _placed(x, like, (like.sharding.spec[0], *[None] * (x.ndim - 1)), but=_COUPLED_AXES.get())


def setting_placed(x: jax.Array, like: Any) -> jax.Array:
    """A number without axes, which varies over the devices of a ``shard_map`` as samples of the type ``like`` do."""
    return _placed(x, like, (), but=_COUPLED_AXES.get())


def _placed(x: jax.Array, like: Any, axes: Sequence[Any], but: Sequence[str]) -> jax.Array:
    missing = like.manual_axis_type.varying - jax.typeof(x).manual_axis_type.varying - set(but)
    if missing:
        x = jax.lax.pcast(x, tuple(missing), to="varying")
    mesh = like.sharding.mesh
    if mesh.explicit_axes and (mesh != jax.typeof(x).sharding.mesh or any(axis is not None for axis in axes)):
        x = jax.sharding.reshard(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)))
    return x


def _total(numbers: Any) -> Any:
    """Sums over a sample; parts of it may be held elsewhere along named axes."""
    axes = _COUPLED_AXES.get()
    return jax.lax.psum(numbers, axes) if axes else numbers


def _products(row: jax.Array, history: jax.Array) -> jax.Array:
    sharding = jax.typeof(history).sharding
    spec, out = sharding.spec, None
    if spec[-1] is not None:  # JAX wants to know where sums over several devices go
        out = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(spec[0], None, None))
    return jnp.matmul(row, jnp.matrix_transpose(history), out_sharding=out)


def _gram(gram: jax.Array, history: jax.Array, index: Any) -> jax.Array:
    # Recompute one row: XLA's product of all rows on the CPU takes six times as long.
    row = jax.lax.dynamic_slice_in_dim(history, index, 1, axis=1)
    products = _total(_products(row, history))
    gram = jax.lax.dynamic_update_slice_in_dim(gram, products, index, axis=1)
    return jax.lax.dynamic_update_slice_in_dim(gram, jnp.matrix_transpose(products), index, axis=2)


class JAXTracing:
    """See :class:`implicit_core.backend.Tracing`."""

    def check(self, ok: jax.Array, message: str, **numbers: jax.Array) -> None:
        checkify.check(ok, message, **numbers)  # type: ignore[arg-type]  # its annotation is of `debug`

    def told(
        self,
        x: tuple[jax.Array, ...],
        untold: tuple[jax.Array, ...],
        function: Callable[..., None],
        *arrays: jax.Array,
    ) -> tuple[jax.Array, ...]:
        return tuple(_told.bind(*x, *untold, *arrays, size=len(x), function=function))

    def constant(self, x: jax.Array) -> jax.Array:
        return jax.lax.stop_gradient(x)


# A call back to Python that `vmap` does not repeat for each sample, and that an exported program does not make. Its
# operands are the leaves of x, of what is to be returned if nothing can be called, and the arrays of the function.

_told = Primitive("told")
_told.multiple_results = True


def _call(*operands: Any, size: int, function: Callable[..., None]) -> list[Any]:
    jax.debug.callback(function, *operands[2 * size :])
    return list(operands[:size])


def _leaves_of_x(*operands: Any, size: int, **_: Any) -> list[Any]:
    return list(operands[:size])


def _lowered(context: Any, *operands: Any, size: int, function: Callable[..., None]) -> Any:
    if context.module_context.lowering_parameters.for_export:
        return list(operands[size : 2 * size])
    return _LOWERED(context, *operands, size=size, function=function)


def _batched(
    axis: Any, operands: Sequence[Any], dims: Sequence[int | None], *, size: int, function: Callable[..., None]
) -> tuple[Sequence[Any], list[int | None]]:
    # A leaf has the axis if one of its two candidates has; all arrays of the function have it if one of them has.
    leaves = [dims[i] is not None or dims[size + i] is not None for i in range(size)]
    rest = [any(dim is not None for dim in dims[2 * size :])] * (len(operands) - 2 * size)
    moved = [
        bdim_at_front(x, dim, axis.size) if mapped else x
        for x, dim, mapped in zip(operands, dims, [*leaves, *leaves, *rest], strict=True)
    ]
    return _told.bind(*moved, size=size, function=function), [0 if mapped else None for mapped in leaves]


_LOWERED = lower_fun(_call, multiple_results=True)
_told.def_impl(_call)
_told.def_abstract_eval(_leaves_of_x)
register_lowering(_told, _lowered)
fancy_primitive_batchers[_told] = _batched


class JAXBackend(Backend):
    """JAX arrays, and the tracers that stand for them within JAX's transformations."""

    immutable = True
    has_autodiff = True
    compiles = True
    tracing = JAXTracing()

    def device(self, x: jax.Array) -> None:
        return None  # a traced array has none, and JAX itself reports arrays of two devices that meet

    def from_dlpack(self, x: Any) -> jax.Array:
        array: jax.Array = jnp.from_dlpack(x)
        if array.dtype.name != str(x.dtype).rpartition(".")[2]:
            raise TypeError(
                f"JAX converts {x.dtype} to {array.dtype}: call "
                'jax.config.update("jax_enable_x64", True) before you use its derivatives for such arrays'
            )
        return array

    def complex(self, real: jax.Array, imag: jax.Array) -> jax.Array:
        return jax.lax.complex(real, imag)

    def devices(self) -> list[str]:
        return [str(device) for device in jax.devices()]

    def finfo(self, dtype: Any) -> Any:
        return jnp.finfo(dtype)

    def isdtype(self, dtype: Any, kind: str | tuple[str, ...]) -> bool:
        is_key = jnp.issubdtype(dtype, jax.dtypes.extended)
        return not is_key and super().isdtype(dtype, kind)

    def stop_gradient(self, x: Any) -> Any:
        return jax.lax.stop_gradient(x)

    @contextmanager
    def solving(self) -> Iterator[None]:
        """What a solve within F or within a step notices is inside of the loop, and no one can look at it."""
        token = _NOTICED.set(None)
        try:
            yield
        finally:
            _NOTICED.reset(token)

    def known(self) -> AbstractContextManager[Any]:
        return jax.ensure_compile_time_eval()

    def readable(self, x: jax.Array) -> bool:
        return not isinstance(x, Tracer)

    # Pytrees are JAX's own, so that the classes registered there are nodes here.

    def flatten(
        self, tree: PyTree, *, none_is_leaf: bool = False, is_leaf: IsLeaf | None = None
    ) -> tuple[list[Any], Hashable]:
        if none_is_leaf:
            return jax.tree.flatten(tree, is_leaf=lambda x: x is None or (is_leaf is not None and is_leaf(x)))
        return jax.tree.flatten(tree, is_leaf=is_leaf)

    def unflatten(self, structure: Any, leaves: list[Any]) -> PyTree:
        return jax.tree.unflatten(structure, leaves)

    def map(self, fn: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
        return jax.tree.map(fn, tree, *rest)

    # Loops.

    def while_loop(
        self,
        masks: Callable[[Carry], tuple[Mask, ...]],
        body: Callable[[Carry, tuple[Known, ...]], Carry],
        carry: Carry,
        max_steps: Count,
        check_every: int = 1,
        watch: Watch | None = None,
    ) -> Carry:
        if self.readable(masks(carry)[0]):  # type: ignore[arg-type]  # masks are arrays
            return super().while_loop(masks, body, carry, max_steps, check_every, watch)
        chunks, rest = (max_steps, 0) if check_every == 1 else divmod(max_steps, check_every)
        carry = jax.tree.map(jnp.asarray, carry)
        packing = _Packing(carry)

        def cond(packed: list[jax.Array]) -> Any:
            return jnp.any(masks(packing.unpack(packed))[0])  # type: ignore[arg-type]  # masks are arrays

        def masked(packed: list[jax.Array]) -> list[jax.Array]:
            carry: Any = packing.unpack(packed)
            return packing.pack(body(carry, masks(carry)))

        def more(state: tuple[Any, list[jax.Array]]) -> Any:
            return (state[0] < chunks) & cond(state[1])

        def chunk(state: tuple[Any, list[jax.Array]]) -> tuple[Any, list[jax.Array]]:
            return state[0] + 1, _scan(masked, state[1], check_every)

        packed = jax.lax.while_loop(more, chunk, (jnp.zeros_like(chunks), packing.pack(carry)))[1]
        if not isinstance(rest, int):
            state = jnp.zeros_like(rest), packed
            packed = jax.lax.while_loop(
                lambda state: (state[0] < rest) & cond(state[1]), lambda state: (state[0] + 1, masked(state[1])), state
            )[1]
        elif rest:
            packed = jax.lax.cond(cond(packed), lambda c: _scan(masked, c, rest), lambda c: c, packed)
        result: Carry = packing.unpack(packed)
        return result

    def repeat(self, body: Callable[[Carry], Carry], carry: Carry, times: Count) -> Carry:
        if not isinstance(times, int):
            result: Carry = jax.lax.fori_loop(0, times, lambda _, c: body(c), jax.tree.map(jnp.asarray, carry))
            return result
        if times <= 1 or not staging():
            return super().repeat(body, carry, times)
        # The first step before the loop (Decision 51): a constant start has no tangent there, and needs no cotangent,
        # which a scan would not know.
        return _scan(body, body(carry), times - 1)

    def noticed(self) -> Any:
        return _NOTICED.get()

    def count(self, masks: Sequence[Any]) -> list[int]:
        counts: list[int] = jnp.concatenate(masks, axis=1).sum(axis=0).tolist()
        return counts


def _scan(body: Callable[[Carry], Carry], carry: Carry, times: int) -> Carry:
    if times == 1:
        return body(carry)
    unroll = times if times <= UNROLLED else 1
    carry, _ = jax.lax.scan(lambda c, _: (body(c), None), carry, length=times, unroll=unroll)
    return carry


class _Packing:
    """A loop's carry with its per-sample numbers, (N, 1), stacked in one array for each type if they are few.

    XLA on the CPU compiles a kernel for each array that a loop carries (Decision 114).
    """

    def __init__(self, carry: Any) -> None:
        leaves, self.structure = jax.tree.flatten(carry)
        groups: dict[Any, list[int]] = {}
        for i, x in enumerate(leaves):
            kind = jax.typeof(x)
            is_of_samples = kind.ndim == 2 and kind.shape[1] == 1 and kind.shape[0] <= STACKED
            groups.setdefault((kind.dtype, kind.sharding, kind.manual_axis_type) if is_of_samples else i, []).append(i)
        self.groups = list(groups.values())

    def pack(self, carry: Any) -> list[jax.Array]:
        """The arrays to carry."""
        leaves = jax.tree.leaves(carry)
        groups = [[leaves[i] for i in group] for group in self.groups]
        return [group[0] if len(group) == 1 else jnp.stack(group) for group in groups]

    def unpack(self, packed: list[jax.Array]) -> Any:
        """The carry."""
        leaves: dict[int, jax.Array] = {}
        for group, x in zip(self.groups, packed, strict=True):
            leaves.update(zip(group, [x] if len(group) == 1 else x, strict=True))
        return jax.tree.unflatten(self.structure, [leaves[i] for i in range(len(leaves))])


def staging() -> bool:
    """Whether operations are being recorded, for ``jit`` and its like, instead of carried out."""
    return isinstance(jnp.zeros(()), Tracer)


def _register(kind: type[Record]) -> None:
    """Make a class of records a node of JAX's pytrees, unless its author did."""

    def with_keys(record: Record) -> Any:
        leaves, rest = flatten(record)
        return [(jax.tree_util.GetAttrKey(name), leaf) for name, leaf in zip(rest.leaves, leaves, strict=True)], rest

    with suppress(ValueError):  # it is one already
        jax.tree_util.register_pytree_with_keys(kind, with_keys, unflatten, flatten)


subscribe(_register)
BACKEND = JAXBackend("jax", jnp, (jax.Array,), space=JAXSpace)
