"""Per-sample vector operations on states.

Inside a solve a state is a tuple of arrays, one for each leaf of the user's pytree, each of shape (N, D): N samples
(the batch axes, flattened), D numbers of that leaf. Leaves are never concatenated. Per-sample numbers are (N, 1).
"""

import operator
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

from . import checks
from .backend import Array, Backend, PyTree

State = tuple[Array, ...]
Row = tuple[Array, ...]
History = tuple[Array, ...]
Mask = Array | bool
"""Samples, (N, 1); True stands for all of them, False for none."""


class Space:
    """The vector space of one state: its backend, structure, shapes and precision.

    States keep their leaves' dtypes at the user's functions and are at least float32 here, so that norms, Gram
    matrices and small solves are. A half-precision state is rounded to what the user's function will see.

    Parameters
    ----------
    backend
        The arrays' backend.
    like
        A pytree of arrays with the state's structure, shapes, dtypes and device.
    batch_ndim
        How many first axes of every leaf index independent samples.
    name
        What to call ``like`` in an error.
    """

    def __init__(self, backend: Backend, like: PyTree, batch_ndim: int, name: str = "h0") -> None:
        self.backend = backend
        self.xp = backend.xp
        self.like = like
        self.batch_shape = checks.state(backend, name, like, batch_ndim)
        leaves, self.structure = backend.flatten(like)
        self.samples = 1
        for size in self.batch_shape:
            self.samples *= size
        self.shapes = [tuple(leaf.shape) for leaf in leaves]
        self.flat_shapes = [(self.samples, _size(shape[batch_ndim:])) for shape in self.shapes]
        self.dtypes = [leaf.dtype for leaf in leaves]
        self.dtype = _widest(backend, self.dtypes)
        self.device = backend.device(leaves[0])
        self.eps = float(backend.finfo(self.dtype).eps)
        self._placements: list[Any] = [None] * len(leaves)
        self._bare = len(leaves) == 1 and leaves[0] is like
        self._as_it_is = self.shapes == self.flat_shapes and all(dtype == self.dtype for dtype in self.dtypes)
        self._rounds = any(dtype != self.dtype for dtype in self.dtypes)
        self.coarsest_eps = max(float(backend.finfo(dtype).eps) for dtype in self.dtypes)

    # Between the user's pytrees and states.

    def pack(self, tree: PyTree) -> State:
        """A pytree like the space's, as a state."""
        return self._flat([tree] if self._bare else self.backend.flatten(tree)[0])

    def accept(self, name: str, tree: PyTree) -> State:
        """A pytree that must be like the space's, as a state.

        Raises
        ------
        TypeError, ValueError
            If it is not: ``name`` is what to call it.
        """
        if self._bare and self.backend.is_array(tree):
            leaves: list[Any] = [tree]
            alike = True
        else:
            leaves, structure = self.backend.flatten(tree)
            alike = structure == self.structure and all(map(self.backend.is_array, leaves))
        if not alike or not all(map(self._alike, leaves, self.shapes, self.dtypes)):
            checks.like(self.backend, name, tree, self.like, "h0")
        return self._flat(leaves)

    def _alike(self, leaf: Array, shape: tuple[int, ...], dtype: Any) -> bool:
        return bool(leaf.shape == shape and leaf.dtype == dtype and self.backend.device(leaf) == self.device)

    def _flat(self, leaves: Sequence[Array]) -> State:
        if self._as_it_is:
            return tuple(leaves)
        return tuple(
            self._cast(leaf if tuple(leaf.shape) == flat else self.xp.reshape(leaf, flat), self.dtype)
            for leaf, flat in zip(leaves, self.flat_shapes, strict=True)
        )

    def spread_as(self, x: State) -> None:
        """From now on, what is made here is spread over devices as ``x`` is."""
        self._placements = [self.backend.placement(a) for a in x]

    def spread(self, x: State) -> State:
        """``x``, spread so."""
        result = tuple(self.backend.spread(a, where) for a, where in zip(x, self._placements, strict=True))
        return x if all(a is b for a, b in zip(x, result, strict=True)) else result

    def _spread(self, numbers: Array) -> Array:
        return self.backend.spread_numbers(numbers, self._placements[0])

    def copy(self, x: State) -> State:
        """``x`` in memory of its own."""
        return tuple(map(self.backend.copy, x))

    def apart(self, x: State, y: State) -> bool:
        """Whether two states are known to be in different memory, whatever leaf is compared with whatever other."""
        address = self.backend.address
        ours, theirs = ({address(a) for a in state if a.shape[-1]} for state in (x, y))
        return None not in ours | theirs and ours.isdisjoint(theirs)

    def without_graph(self, x: State) -> State:
        """``x``, cut from an autodiff graph that F may have made it part of."""
        if not any(map(self.backend.has_graph, x)):
            return x
        return tuple(map(self.backend.stop_gradient, x))

    def unpack(self, x: State) -> PyTree:
        """The inverse of :meth:`pack`."""
        if self._bare and self._as_it_is:
            return x[0]
        leaves = [
            self._cast(leaf if shape == flat else self.xp.reshape(leaf, shape), dtype)
            for leaf, shape, flat, dtype in zip(x, self.shapes, self.flat_shapes, self.dtypes, strict=True)
        ]
        return self.backend.unflatten(self.structure, leaves)

    def round(self, x: State) -> State:
        """``x`` at the precision of the user's leaves."""
        if not self._rounds:
            return x
        return tuple(
            leaf if dtype == self.dtype else self.xp.astype(self.xp.astype(leaf, dtype), self.dtype)
            for leaf, dtype in zip(x, self.dtypes, strict=True)
        )

    def per_sample(self, numbers: Array) -> Array:
        """Numbers (N, 1) in the shape of the batch."""
        return self.xp.reshape(numbers, self.batch_shape)

    def _cast(self, leaf: Array, dtype: Any) -> Array:
        return leaf if leaf.dtype == dtype else self.xp.astype(leaf, dtype)

    # Numbers.

    def full(self, value: float | int | bool, dtype: Any = None) -> Array:
        """A number for each sample, (N, 1)."""
        number = value.value if isinstance(value, Enum) else value  # not every library knows what a Status is
        return self._spread(self.xp.full((self.samples, 1), number, dtype=dtype or self.dtype, device=self.device))

    def scalar(self, value: float) -> Array:
        """A number as an array without axes."""
        # Not `asarray`, which copies a number from the host.
        return self.xp.full((), value, dtype=self.dtype, device=self.device)

    def eye(self, m: int) -> Array:
        """The identity matrix (m, m)."""
        return self.xp.eye(m, dtype=self.dtype, device=self.device)

    def matrices(self, m: int, n: int) -> Array:
        """A zero matrix for each sample, (N, m, n)."""
        return self._spread(self.xp.zeros((self.samples, m, n), dtype=self.dtype, device=self.device))

    # Vectors.

    def zeros(self) -> State:
        """The zero state."""
        return self.spread(
            tuple(self.xp.zeros(shape, dtype=self.dtype, device=self.device) for shape in self.flat_shapes)
        )

    def sub(self, x: State, y: State) -> State:
        """``x - y``."""
        return tuple(map(operator.sub, x, y))

    def add(self, x: State, y: State) -> State:
        """``x + y``."""
        return tuple(map(operator.add, x, y))

    def scale(self, factor: Array | float, x: State) -> State:
        """``factor x``."""
        return tuple(factor * a for a in x)

    def divide(self, x: State, divisor: Array) -> State:
        """``x / divisor``."""
        return tuple(a / divisor for a in x)

    def axpy(self, factor: Array | float, x: State, y: State) -> State:
        """``factor x + y``."""
        return tuple(self.backend.axpy(factor, a, b) for a, b in zip(x, y, strict=True))

    def where(self, mask: Mask, x: State, y: State) -> State:
        """``x`` in the samples of ``mask``, else ``y``."""
        if isinstance(mask, bool):
            return x if mask else y
        return tuple(self.backend.where(mask, a, b) for a, b in zip(x, y, strict=True))

    def choose(self, mask: Mask, x: Array | int, y: Array | int) -> Array | int:
        """The same for per-sample numbers, or counts that are the same in all samples."""
        if isinstance(mask, bool):
            return x if mask else y
        if isinstance(x, int):
            return self.backend.where_number(mask, x, self.counts(y))
        return self.backend.where(mask, x, self.counts(y))

    def tally(self, counts: Array | int, mask: Mask) -> Array | int:
        """``counts``, one more in the samples of ``mask``."""
        return counts + 1 if mask is True else self.backend.tally(self.counts(counts), mask)

    def counts(self, numbers: Array | int) -> Array:
        """Numbers for each sample; an int stands for itself in all of them."""
        return self.full(numbers, self.xp.int32) if isinstance(numbers, int) else numbers

    def norm(self, x: State) -> Array:
        """Euclidean norm of each sample over all leaves, (N, 1)."""
        total = self.backend.norm(x[0])
        for other in x[1:]:
            total = self.xp.hypot(total, self.backend.norm(other))
        return total

    def largest(self, x: State) -> Array:
        """Largest absolute value of each sample over all leaves, (N, 1)."""
        largest = self.full(0.0)
        for a in x:
            if a.shape[-1]:
                largest = self.xp.maximum(largest, self.backend.largest(a))
        return largest

    def magnitude(self, x: State) -> Array:
        """A scale for each sample, (N, 1), at which squares neither underflow nor overflow: 1 where there is none."""
        largest = self.largest(x)
        return self.xp.where(self.xp.isfinite(largest) & (largest > 0), largest, self.xp.ones_like(largest))

    def dot(self, x: State, y: State) -> Array:
        """Inner product of each sample, (N, 1)."""
        products = [self.xp.sum(a * b, axis=-1, keepdims=True) for a, b in zip(x, y, strict=True)]
        return self.backend.total(_sum(products))

    # Histories: the last m states, (N, m, D) for each leaf, and rows that stand beside them, (N, 1, D).

    def history(self, m: int) -> History:
        """A history of m zero states."""
        return self.spread(
            tuple(self.xp.zeros((n, m, d), dtype=self.dtype, device=self.device) for n, d in self.flat_shapes)
        )

    def row(self, x: State) -> Row:
        """A state as a row."""
        return tuple(a[:, None, :] for a in x)

    def state(self, row: Row) -> State:
        """A row as a state."""
        return tuple(a[:, 0, :] for a in row)

    def set_row(self, history: History, index: Any, x: State | Row) -> History:
        """The history with one row replaced; the one passed in is given up."""
        return tuple(self.backend.set_row(a, index, b) for a, b in zip(history, x, strict=True))

    def grams(self, m: int) -> History:
        """The inner products, of each leaf, of a history of m zero states, (N, m, m)."""
        return tuple(self.matrices(m, m) for _ in self.flat_shapes)

    def gram(self, grams: History, history: History, index: Any) -> History:
        """Inner products of the rows of a history with each other, of each leaf; the row at ``index`` is new."""
        return tuple(self.backend.gram(a, b, index) for a, b in zip(grams, history, strict=True))

    def sum(self, numbers: History) -> Array:
        """The sum over all leaves."""
        return _sum(list(numbers))

    def products(self, row: Row, history: History) -> Array:
        """Inner products of a row with those of a history, (N, 1, m)."""
        return self.backend.total(_sum([self.backend.products(a, b) for a, b in zip(row, history, strict=True)]))

    def products_of_two(self, x: Row, y: Row, history: History) -> tuple[Array, Array]:
        """The same of two rows."""
        found = [self.backend.products_of_two(a, b, c) for a, b, c in zip(x, y, history, strict=True)]
        of_x, of_y = zip(*found, strict=True)
        return self.backend.total(_sum(of_x)), self.backend.total(_sum(of_y))

    def rows_in_use(self, history: History, index: Any) -> int:
        """How many rows of a history to compute with, when the loop's counter is at ``index``; the rest is zero."""
        return max(self.backend.rows_in_use(a, index) for a in history)

    def head(self, history: History, n: int) -> History:
        """The first n rows of a history."""
        return tuple(self.backend.head(a, 1, n) for a in history)

    def combine(self, weights: Array, history: History) -> Row:
        """Weighted sum of the rows of a history; weights (N, 1, m)."""
        return tuple(self.backend.combine(weights, a) for a in history)

    def combine_onto(self, row: Row, weights: Array, history: History) -> Row:
        """``row + combine(weights, history)``."""
        return tuple(self.backend.combine_onto(a, weights, b) for a, b in zip(row, history, strict=True))


Operator = Callable[[State], State]


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size


def _sum(terms: Sequence[Array]) -> Array:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _widest(backend: Backend, dtypes: list[Any]) -> Any:
    widest = max(dtypes, key=lambda dtype: backend.finfo(dtype).bits)
    return widest if backend.finfo(widest).bits >= 32 else backend.xp.float32
