"""The backend seam: what the core needs and the array API standard has no answer for.

The base class spells everything portably, with a Python loop; a framework's module in ``backends/`` overrides only
what that framework spells better or differently. Every method is pure except :meth:`Backend.set_row` and
:meth:`Backend.gram`, which may reuse the history, or the matrix, that they are given.
"""

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import array_api_extra as xpx
import optree
from array_api_compat import device as device_of

Array = Any
PyTree = Any
Carry = TypeVar("Carry")


class Stream(NamedTuple):
    """A CUDA stream: the number of its device, and its address."""

    device: int
    address: int


class Look(NamedTuple):
    """What a loop that looks at numbers can do better than one that is traced.

    Attributes
    ----------
    masks
        ``carry -> masks``, each (N, 1); the loop ends when the first holds in no sample.
    body
        ``(carry, counts) -> carry``: the loop's body, told in how many samples each mask holds.
    """

    masks: Callable[[Any], tuple[Array, ...]]
    body: Callable[[Any, list[int]], Any]


class Backend:
    """One array framework, as the core sees it.

    Parameters
    ----------
    name
        Name of the framework's root module, e.g. ``"torch"``.
    xp
        Its array-API namespace (from array-api-compat where the framework needs it).
    array_types
        Classes whose instances are this framework's arrays.

    Examples
    --------
    >>> import numpy as np
    >>> from implicit_core.registry import find_backend
    >>> find_backend(np.zeros(3))
    <backend numpy>
    """

    def __init__(self, name: str, xp: ModuleType, array_types: tuple[type, ...]) -> None:
        self.name = name
        self.xp = xp
        self.array_types = array_types

    def __repr__(self) -> str:
        return f"<backend {self.name}>"

    # What an array is, and where.

    def is_array(self, x: object) -> bool:
        """Whether ``x`` is one of this framework's arrays."""
        return isinstance(x, self.array_types)

    def device(self, x: Array) -> Any:
        """The device ``x`` lives on; None where that can't be known (a traced array)."""
        return device_of(x)

    def beside(self, tree: PyTree) -> AbstractContextManager[Any]:
        """Within it arrays are made, and computed with, where those of ``tree`` are.

        For frameworks with a current device: the core, and the user's functions, run on that of the arrays.
        """
        return nullcontext()

    def from_dlpack(self, x: Any) -> Array:
        """An array of another framework as one of this, in the same memory.

        Raises
        ------
        TypeError, BufferError
            If its device or dtype is not known here.
        """
        return self.xp.from_dlpack(x)

    def stream(self, tree: PyTree) -> Stream | None:
        """The stream that work with the arrays of ``tree`` goes to; None where there are no streams to choose from."""
        return None

    def on_stream(self, stream: Stream | None) -> AbstractContextManager[Any]:
        """Within it, work goes to a stream of another framework, as far as this one can choose."""
        return nullcontext()

    def devices(self) -> list[str]:
        """Devices found on this machine, in words."""
        return ["cpu"]

    def finfo(self, dtype: Any) -> Any:
        """Limits of a floating dtype, as in the array API."""
        return self.xp.finfo(dtype)

    def isdtype(self, dtype: Any, kind: str | tuple[str, ...]) -> bool:
        """Whether a dtype is of a kind, as in the array API."""
        return bool(self.xp.isdtype(dtype, kind))

    # Pytrees.

    def flatten(self, tree: PyTree) -> tuple[list[Any], Hashable]:
        """Leaves and structure of a pytree; ``None`` is an empty node."""
        return optree.tree_flatten(tree)

    def flatten_with_none(self, tree: PyTree) -> tuple[list[Any], Hashable]:
        """As :meth:`flatten`, with ``None`` a leaf."""
        return optree.tree_flatten(tree, none_is_leaf=True)

    def unflatten(self, structure: Any, leaves: list[Any]) -> PyTree:
        """The inverse of :meth:`flatten`."""
        return optree.tree_unflatten(structure, leaves)

    def map(self, fn: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
        """``fn`` over the leaves of pytrees of one structure."""
        return optree.tree_map(fn, tree, *rest)

    # Loops. A body is pure, with fixed shapes and dtypes, so that a framework may trace it.

    def while_loop(
        self,
        cond: Callable[[Carry], Array],
        body: Callable[[Carry], Carry],
        carry: Carry,
        max_steps: int,
        check_every: int = 1,
        look: Look | None = None,
    ) -> Carry:
        """``while cond(carry): carry = body(carry)``, at most ``max_steps`` times.

        ``cond`` returns a boolean array without axes. Reading it is the loop's one host sync, made once in
        ``check_every`` steps; where there is a ``look``, that is read in its place. Where operations are recorded
        nothing can be read: ``max_steps`` are made.
        """
        loop = self.recorder()
        if loop is not None:
            done: Carry = loop(cond, body, carry, max_steps, check_every)
            return done
        steps = 0
        while steps < max_steps:
            masks = (cond(carry),) if look is None else look.masks(carry)
            if self.recorded(masks[0]):
                return self.repeat(body, carry, max_steps)
            if look is None:
                if not bool(masks[0]):
                    break
                carry = body(carry)
            else:
                counts = self.count(masks)
                if not counts[0]:
                    break
                carry = look.body(carry, counts)
            chunk = min(check_every, max_steps - steps)
            if chunk > 1:
                carry = self.repeat(body, carry, chunk - 1)
            steps += chunk
        return carry

    def recorder(self) -> Callable[..., Any] | None:
        """What takes a loop down in the place of carrying it out: ``(cond, body, carry, max_steps, check_every)``."""
        return None

    def count(self, masks: Sequence[Array]) -> list[int]:
        """In how many samples masks hold, (N, 1), read from the device at once."""
        xp, base = self.xp, 1 + masks[0].shape[0]
        digits = [xp.sum(xp.astype(mask, xp.int64)) * base**i for i, mask in enumerate(masks)]
        number = int(sum(digits[1:], digits[0]))
        return [number // base**i % base for i in range(len(masks))]

    def repeat(self, body: Callable[[Carry], Carry], carry: Carry, times: int) -> Carry:
        """Apply ``body`` a static number of times."""
        for _ in range(times):
            carry = body(carry)
        return carry

    def solving(self) -> AbstractContextManager[Any]:
        """The state a solve runs in: nothing recorded for autodiff, no warning for what the statuses report."""
        return nullcontext()

    def recorded(self, x: Array) -> bool:
        """Whether operations on ``x`` are recorded, to be replayed as they are, instead of carried out."""
        return False

    def readable(self, x: Array) -> bool:
        """Whether the numbers in ``x`` can be read now; those of a traced array can't."""
        return not self.recorded(x)

    def check_later(self, ok: Array, message: str, **numbers: Array) -> None:
        """For arrays that are not readable: raise once they are, unless ``ok``. The message names the numbers."""
        raise NotImplementedError(f"{self} has no arrays that can't be read")

    def call_later(self, function: Callable[..., None], *arrays: Array) -> None:
        """For arrays that are not readable: ``function(*arrays)`` once they are."""
        raise NotImplementedError(f"{self} has no arrays that can't be read")

    def undifferentiated(self, f: Callable[..., PyTree]) -> Callable[..., PyTree]:
        """``f`` as a solve calls it, for a framework where :meth:`solving` can't switch autodiff off."""
        return f

    def placement(self, x: Array) -> Any:
        """How ``x``, (N, D), is spread over devices, where that is part of an array's type."""
        return None

    def spread(self, x: Array, placement: Any) -> Array:
        """``x``, (N, ..., D), spread in the same way."""
        return x

    def spread_numbers(self, x: Array, placement: Any) -> Array:
        """Per-sample numbers ``x``, (N, ...), spread as the samples are."""
        return x

    def unchanged(self, x: Array, before: Array) -> Any:
        """Whether ``x`` still holds what it held ``before``, a boolean array without axes; True where that is certain.

        It is not read here: each look at a number waits for the device. Where it can't be read later either it is True.
        """
        return not self.readable(x) or self.xp.all((x == before) | (x != x))

    def fresh(self, x: Array) -> Array:
        """``x`` in memory that the user's functions can't write to."""
        return self.copy(x)

    def address(self, x: Array) -> Any:
        """Where the memory of ``x`` begins, a number; None where that is not known."""
        return None

    def has_graph(self, x: Array) -> bool:
        """Whether ``x`` holds what it was computed from."""
        return False

    def stop_gradient(self, x: Array) -> Array:
        """``x``, cut from any autodiff graph."""
        return x

    def tally(self, counts: Array, mask: Array) -> Array:
        """``counts``, one more where ``mask`` holds."""
        return counts + self.xp.astype(mask, counts.dtype)

    def where(self, mask: Array, x: Array, y: Array) -> Array:
        """``x`` where ``mask`` holds, else ``y``, as in the array API."""
        return self.xp.where(mask, x, y)

    def where_number(self, mask: Array, number: int, x: Array) -> Array:
        """``number`` where ``mask`` holds, else ``x``."""
        return self.xp.where(mask, self.xp.full((), number, dtype=x.dtype, device=self.device(x)), x)

    def copy(self, x: Array) -> Array:
        """``x`` in memory of its own, its rows one after the other, as other operations leave them.

        In another order F's own sums would be rounded in another way.
        """
        return self.xp.reshape(self.xp.asarray(self.xp.reshape(x, (-1,)), copy=True), x.shape)

    def rows_in_use(self, history: Array, index: Any) -> int:
        """How many rows of a history to compute with, when the loop's counter is at ``index``; the rest is zero.

        All of them, where the counter is no number, or where each size would be compiled by itself.
        """
        return min(int(index), int(history.shape[1]))

    def head(self, array: Array, axis: int, n: int) -> Array:
        """The first n along an axis."""
        if array.shape[axis] == n:
            return array
        return array[(*(slice(None),) * axis, slice(n), ...)]

    def minimum(self, index: Any, limit: int) -> Any:
        """The smaller of a loop's counter and a constant."""
        return min(index, limit)

    def table(self, rows: Array) -> Any:
        """The rows of an array, to be read with ``table[index]`` at an index the loop counts."""
        return tuple(rows[i, ...] for i in range(rows.shape[0]))

    # Per-sample linear algebra. States are (N, D), rows (N, 1, D), histories (N, m, D), per-sample numbers (N, 1).

    def norm(self, x: Array) -> Array:
        """Euclidean norm over the last axis, which is kept."""
        return self.xp.linalg.vector_norm(x, axis=-1, keepdims=True)

    def largest(self, x: Array) -> Array:
        """Largest absolute value over the last axis, which is kept and not empty."""
        return self.xp.max(self.xp.abs(x), axis=-1, keepdims=True)

    def total(self, numbers: Array) -> Array:
        """Sums over a sample, where parts of one may be held elsewhere: the sums over these too."""
        return numbers

    def axpy(self, a: Array | float, x: Array, y: Array) -> Array:
        """``a x + y``."""
        return a * x + y

    def gram(self, gram: Array, history: Array, index: Any) -> Array:
        """Inner products of the rows of a history with each other, (N, m, D) -> (N, m, m).

        ``gram`` holds them as they were before the row at ``index`` was replaced, and is given up.
        """
        return history @ self.xp.matrix_transpose(history)

    def products(self, row: Array, history: Array) -> Array:
        """Inner products of a row with those of a history, (N, 1, D), (N, m, D) -> (N, 1, m)."""
        return row @ self.xp.matrix_transpose(history)

    def products_of_two(self, x: Array, y: Array, history: Array) -> tuple[Array, Array]:
        """The same of two rows, for which the history is read once."""
        both = self.products(self.xp.concat([x, y], axis=1), history)
        return both[:, :1, :], both[:, 1:, :]

    def combine(self, weights: Array, history: Array) -> Array:
        """Weighted sum of the rows of a history, (N, 1, m), (N, m, D) -> (N, 1, D)."""
        return weights @ history

    def combine_onto(self, row: Array, weights: Array, history: Array) -> Array:
        """``row + combine(weights, history)``."""
        return row + weights @ history

    def solve_rows(self, matrix: Array, row: Array) -> Array:
        """The x with ``x matrix = row``, per sample; (N, m, m) and (N, 1, m).

        ``matrix`` is symmetric and positive definite, or triangular and regular: no pivots are needed.
        """
        transpose = self.xp.matrix_transpose
        return transpose(self.xp.linalg.solve(transpose(matrix), transpose(row)))

    def entry(self, row: Array, index: Any) -> Array:
        """One entry of a row, (N, 1, m) -> (N, 1, 1)."""
        return row[:, :, index][:, :, None]

    def set_row(self, history: Array, index: Any, row: Array) -> Array:
        """The history with one row replaced by (N, D) or (N, 1, D). The history passed in is given up."""
        return xpx.at(history)[:, index, :].set(row if row.ndim == 2 else row[:, 0, :], copy=None)
