"""The vector space of a state, sample by sample: conversion from and to the user's pytrees, and arithmetic.

Inside a solve a state is a tuple of arrays (N, D), see :mod:`implicit_core.arrays`. Leaves are never concatenated.
Numbers per sample are (N, 1).
"""

import copy
import functools
import math
import operator
import random
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeVar

import array_api_extra as xpx

from . import checks
from .arrays import Array, History, Index, Mask, Matrices, Numbers, PyTree, Real, Row, State

if TYPE_CHECKING:
    from .backend import Backend

A = TypeVar("A")
"""An array."""
Leaves = TypeVar("Leaves", bound=tuple[Any, ...])
"""A state, a row or a history."""
PRIME = 46337
"""The largest prime whose square is an int32."""
Axes = tuple[int, ...]
"""The axes of an array, the one with the largest stride first."""


class Space:
    """The vector space of one state: its structure, shapes and precision, and its arithmetic.

    States keep their leaves' dtypes at the user's functions. Here they are at least float32, so that norms, Gram
    matrices and small solves are computed in float32 or wider. A half-precision state is rounded to what the user's
    function will see (Decisions 31 and 32).

    A framework with faster spellings subclasses this and overrides what stands below "Arithmetic".

    Parameters
    ----------
    backend
        The arrays' backend.
    like
        A pytree of arrays with the state's structure, shapes, dtypes and device.
    batch_ndim
        How many first axes of every leaf index independent samples.
    name
        What errors call ``like``.
    scale
        The units of the unknown, a number, an array or a pytree like it. A state holds the unknown divided by them, so
        that all norms and inner products are those of numbers without units.

    Attributes
    ----------
    rounds
        Whether a leaf of the user's has a coarser precision than states have.
    """

    def __init__(
        self, backend: "Backend", like: PyTree, batch_ndim: int, name: str = "h0", scale: PyTree = None
    ) -> None:
        self.backend = backend
        self.xp = backend.xp
        self.like, self.name = like, name
        self.batch_shape = checks.state(backend, name, like, batch_ndim)
        leaves, self.structure = backend.flatten(like)
        self.samples = math.prod(self.batch_shape)
        self.shapes = [tuple(leaf.shape) for leaf in leaves]
        self.flat_shapes = [(self.samples, math.prod(shape[batch_ndim:])) for shape in self.shapes]
        # Numbers stay in the order that a leaf has them in memory, so that packing it copies nothing. Decision 94.
        self._orders = [backend.axis_order(leaf, batch_ndim) for leaf in leaves]
        self.dtypes = [leaf.dtype for leaf in leaves]
        self.dtype = _widest(backend, self.dtypes)
        self.device = backend.device(leaves[0])
        self.eps = float(backend.finfo(self.dtype).eps)
        self.coarsest_eps = max(float(backend.finfo(dtype).eps) for dtype in self.dtypes)
        self._is_array = len(leaves) == 1 and leaves[0] is like
        self._is_flat = self.shapes == self.flat_shapes and all(dtype == self.dtype for dtype in self.dtypes)
        self.rounds = any(dtype != self.dtype for dtype in self.dtypes)
        self._units = None if scale is None else self._flat_units(scale, batch_ndim)
        self._unmeasured = frozenset(
            i for i, unit in enumerate(self._units or ()) if isinstance(unit, float) and unit == math.inf
        )
        """The leaves that norms and inner products do not count, which have the unit 1."""
        if self._unmeasured:
            self._units = tuple(1.0 if i in self._unmeasured else unit for i, unit in enumerate(self._units or ()))

    @property
    def dimension(self) -> int:
        """How many numbers a sample's state has."""
        return sum(d for _, d in self.flat_shapes)

    @property
    def has_units(self) -> bool:
        """Whether a state is the unknown divided by units."""
        return self._units is not None

    def order_of_numbers(self) -> Array | None:
        """Which of a sample's numbers, in C order, stand in a state one after the other, (n,); None in C order."""
        if all(order is None for order in self._orders):
            return None
        xp, first, start, parts = self.xp, len(self.batch_shape), 0, []
        for shape, order, (_, d) in zip(self.shapes, self._orders, self.flat_shapes, strict=True):
            index = xp.reshape(xp.arange(start, start + d, device=self.device), shape[first:])
            axes = None if order is None else tuple(axis - first for axis in order[first:])
            parts.append(xp.reshape(_ordered(xp, index, axes), (-1,)))
            start += d
        return xp.concat(parts)

    # Between the user's pytrees and states.

    def pack(self, tree: PyTree) -> State:
        """A pytree like the space's, as a state."""
        return self._flat([tree] if self._is_array else self.backend.flatten(tree)[0])

    def accept(self, name: str, tree: PyTree) -> State:
        """A pytree that must be like the space's, as a state. A list may stand for a tuple, and a tuple for a list.

        Raises
        ------
        TypeError, ValueError
            If it is not. The error calls it ``name``.
        """
        if self._is_array and self.backend.is_array(tree):
            leaves: list[Any] = [tree]
            alike = True
        else:
            leaves, structure = self.backend.flatten(tree)
            if not all(map(self.backend.is_array, leaves)):
                tree = checks.numbers_as_arrays(self.backend, tree, self.like)
                leaves, structure = self.backend.flatten(tree)
            if structure != self.structure:
                tree = checks.structured(self.backend, tree, self.like)
                leaves, structure = self.backend.flatten(tree)
            alike = structure == self.structure and all(map(self.backend.is_array, leaves))
        if not alike or not all(map(self._alike, leaves, self.shapes, self.dtypes)):
            checks.like(self.backend, name, tree, self.like, self.name)
        return self._flat(leaves)

    @property  # cached, it would refer to itself
    def dual(self) -> "Space":
        """The space of cotangents, whose units are one over the unknown's."""
        if self._units is None:
            return self
        dual = copy.copy(self)
        dual._units, dual._unmeasured = tuple(1 / unit for unit in self._units), frozenset()
        return dual

    @property
    def every_leaf(self) -> "Space":
        """The same space, in which all leaves are measured.

        It is the space of tangents, as :attr:`dual` is that of cotangents. A part of the state that is left out of
        residuals may have a derivative all the same.
        """
        if not self._unmeasured:
            return self
        space = copy.copy(self)
        space._unmeasured = frozenset()
        return space

    def measured(self, x: Leaves) -> Leaves:
        """The leaves that norms and inner products count."""
        if not self._unmeasured:
            return x
        leaves: Any = tuple(a for i, a in enumerate(x) if i not in self._unmeasured)
        return leaves  # type: ignore[no-any-return]  # of the same kind

    def in_units(self, units: Numbers | State) -> "Space":
        """The same space with states that are divided by ``units``: one number a sample, or a state of them."""
        space, n = copy.copy(self), len(self.shapes)
        of_leaves = (
            units if isinstance(units, tuple) else tuple(1.0 if i in self._unmeasured else units for i in range(n))
        )
        space._units = tuple(
            new if unit is None else unit * new for unit, new in zip(self._units or (None,) * n, of_leaves, strict=True)
        )
        return space

    def part(self, like: PyTree, samples: Array) -> "Space":
        """The space of some of the samples, whose numbers are ``samples``, with states shaped as ``like``."""
        space, n = copy.copy(self), self.samples
        space.like, space.shapes = like, [tuple(leaf.shape) for leaf in self.backend.flatten(like)[0]]
        space.samples = samples.shape[0]
        space.batch_shape = space.shapes[0][: len(self.batch_shape)]
        space.flat_shapes = [(space.samples, d) for _, d in self.flat_shapes]
        space._units = self._units and tuple(
            self.xp.take(unit, samples, axis=0) if getattr(unit, "shape", ())[:1] == (n,) else unit
            for unit in self._units
        )
        return space

    def as_one(self) -> "Space":
        """The space of all samples as a single one, whose states are those of this space, reshaped to (1, N D)."""
        space, n, xp = copy.copy(self), self.samples, self.xp
        space.samples, space.batch_shape = 1, ()
        space.flat_shapes = [(1, n * d) for _, d in self.flat_shapes]
        space._is_flat = space.shapes == space.flat_shapes and not self.rounds
        space._units = self._units and tuple(
            unit if isinstance(unit, float) else xp.reshape(xp.broadcast_to(unit, shape), (1, math.prod(shape)))
            for unit, shape in zip(self._units, self.flat_shapes, strict=True)
        )
        return space

    def unpack(self, x: State) -> PyTree:
        """The inverse of :meth:`pack`."""
        if self._units is not None:
            x = State(tuple(a * unit for a, unit in zip(x, self._units, strict=True)))
        if self._is_array and self._is_flat:
            return x[0]
        leaves = [
            self._cast(leaf if shape == flat else self._shaped(leaf, shape, order), dtype)
            for leaf, shape, flat, order, dtype in zip(
                x, self.shapes, self.flat_shapes, self._orders, self.dtypes, strict=True
            )
        ]
        return self.backend.unflatten(self.structure, leaves)

    def round(self, x: State) -> State:
        """``x`` at the precision of the user's leaves."""
        if not self.rounds:
            return x
        return State(tuple(map(self._rounded, x, self.dtypes, self._units or [None] * len(x))))

    def _rounded(self, leaf: Array, dtype: Any, unit: Any) -> Array:
        if dtype == self.dtype:
            return leaf
        measured = leaf if unit is None else leaf * unit
        rounded = self.xp.astype(self.xp.astype(measured, dtype), self.dtype)
        return rounded if unit is None else rounded / unit

    def per_sample(self, numbers: Numbers | Mask) -> Array:
        """Numbers (N, 1) in the shape of the batch."""
        return self.xp.reshape(numbers, self.batch_shape)

    def _alike(self, leaf: Array, shape: tuple[int, ...], dtype: Any) -> bool:
        return bool(
            leaf.shape == shape
            and leaf.dtype == dtype
            and self.backend.device(leaf) == self.device
            and not self.backend.unsupported(leaf, "h")
        )

    def _flat(self, leaves: Sequence[Array]) -> State:
        x = self._reshaped(leaves)
        return x if self._units is None else State(tuple(a / unit for a, unit in zip(x, self._units, strict=True)))

    def _flat_units(self, scale: PyTree, batch_ndim: int) -> tuple[Any, ...]:
        """The units of each leaf: a number, or an array that broadcasts to (N, D)."""
        if isinstance(scale, (int, float)):
            return tuple(float(scale) for _ in self.shapes)
        leaves, structure = self.backend.flatten(scale)
        if structure != self.structure:
            raise TypeError(
                f"scale must be a number, or have the structure of the unknown, {self.structure}, got {structure}"
            )
        return tuple(
            self._flat_unit(leaf, shape, order, batch_ndim)
            for leaf, shape, order in zip(leaves, self.shapes, self._orders, strict=True)
        )

    def _flat_unit(self, unit: Any, shape: tuple[int, ...], order: Axes | None, batch_ndim: int) -> Any:
        if isinstance(unit, (int, float)):
            return float(unit)
        xp = self.xp
        unit = self._cast(unit if self.backend.is_array(unit) else xp.asarray(unit, device=self.device), self.dtype)
        state = shape[batch_ndim:]
        of_one_sample = unit.ndim <= len(state)
        whole = state if of_one_sample else shape
        if order is not None and of_one_sample:
            order = tuple(axis - batch_ndim for axis in order[batch_ndim:])
        try:
            unit = _ordered(xp, xp.broadcast_to(unit, whole), order)
            return xp.reshape(unit, (1 if of_one_sample else self.samples, math.prod(state)))
        except (ValueError, RuntimeError, TypeError):
            raise ValueError(f"scale has a leaf of shape {tuple(unit.shape)} for one of shape {shape}") from None

    def _reshaped(self, leaves: Sequence[Array]) -> State:
        if self._is_flat:
            return State(tuple(leaves))
        return State(
            tuple(
                self._cast(
                    leaf if tuple(leaf.shape) == flat else self.xp.reshape(_ordered(self.xp, leaf, order), flat),
                    self.dtype,
                )
                for leaf, flat, order in zip(leaves, self.flat_shapes, self._orders, strict=True)
            )
        )

    def _shaped(self, leaf: Array, shape: tuple[int, ...], order: Axes | None) -> Array:
        """A leaf (N, D) of a state in its own shape, its axes in memory in the given order."""
        if order is None:
            return self.xp.reshape(leaf, shape)
        in_memory = self.xp.reshape(leaf, tuple(shape[axis] for axis in order))
        return self.xp.permute_dims(in_memory, tuple(order.index(axis) for axis in range(len(order))))

    def _cast(self, leaf: Array, dtype: Any) -> Array:
        return leaf if leaf.dtype == dtype else self.xp.astype(leaf, dtype)

    # New arrays.

    def full(self, value: float, dtype: Any = None) -> Numbers:
        """A number for each sample, (N, 1)."""
        number = value.value if isinstance(value, Enum) else value  # not every library knows an IntEnum
        numbers: Numbers = self.xp.full((self.samples, 1), number, dtype=dtype or self.dtype, device=self.device)
        return numbers

    def all_samples(self) -> Mask:
        """A mask that holds in all samples, (N, 1)."""
        mask: Any = self.full(1, self.xp.bool)  # torch.jit.trace cannot record a fill with True
        return mask  # type: ignore[no-any-return]  # booleans are a mask

    def scalar(self, value: Real) -> Array:
        """A number as an array without axes; such an array as it is."""
        if not isinstance(value, (int, float)):
            return value
        # Not `asarray`, which copies a number from the host.
        return self.xp.full((), value, dtype=self.dtype, device=self.device)

    def eye(self, m: int) -> Array:
        """The identity matrix (m, m)."""
        return self.xp.eye(m, dtype=self.dtype, device=self.device)

    def matrices(self, m: int, n: int) -> Matrices:
        """A zero matrix for each sample, (N, m, n)."""
        zeros: Matrices = self.xp.zeros((self.samples, m, n), dtype=self.dtype, device=self.device)
        return zeros

    def zeros(self) -> State:
        """The zero state."""
        return State(tuple(self.xp.zeros(shape, dtype=self.dtype, device=self.device) for shape in self.flat_shapes))

    def history(self, m: int) -> History:
        """A history of m zero states."""
        return History(
            tuple(self.xp.zeros((n, m, d), dtype=self.dtype, device=self.device) for n, d in self.flat_shapes)
        )

    def row(self, x: State) -> Row:
        """A state as a row."""
        return Row(tuple(a[:, None, :] for a in x))

    def state(self, row: Row) -> State:
        """A row as a state."""
        return State(tuple(a[:, 0, :] for a in row))

    # Sharding over devices, for frameworks that make it part of an array's type.

    def shard_as(self, x: State) -> None:
        """From now on, shard new arrays as ``x`` is sharded."""

    def shard(self, x: State) -> State:
        """``x``, sharded as the state given to :meth:`shard_as`."""
        return x

    # Arithmetic. Operations on states:

    def copy(self, x: State) -> State:
        """``x`` in its own memory, in C order: in another order F's own sums would be rounded differently."""
        return State(tuple(compact(self.xp, a) for a in x))

    def add(self, x: State, y: State) -> State:
        """``x + y``."""
        return State(tuple(map(operator.add, x, y)))

    def sub(self, x: State, y: State) -> State:
        """``x - y``."""
        return State(tuple(map(operator.sub, x, y)))

    def scale(self, factor: Numbers | Real, x: State) -> State:
        """``factor x``."""
        return State(tuple(factor * a for a in x))

    def divide(self, x: State, divisor: Numbers) -> State:
        """``x / divisor``."""
        return State(tuple(a / divisor for a in x))

    def axpy(self, factor: Numbers | Real, x: State, y: State) -> State:
        """``factor x + y``."""
        return State(tuple([self.multiply_add(factor, a, b) for a, b in zip(x, y, strict=True)]))

    def where(self, mask: Mask | bool, x: State, y: State) -> State:
        """``x`` in the samples of ``mask``, else ``y``."""
        if isinstance(mask, bool):
            return x if mask else y
        return State(tuple(self.xp.where(mask, a, b) for a, b in zip(x, y, strict=True)))

    def filled(self, x: A, mask: Mask, number: float) -> A:
        """``x``, an array, with a number, such as NaN, in the samples of ``mask``. It is not made for others."""
        filled: A = self.xp.where(mask, self.scalar(number), x)
        return filled

    def blanked(self, x: A, mask: Array) -> A:
        """``x``, an array, with NaN in ``mask`` that says there is no number: as a result, and not for a mistake."""
        blanked: A = self.xp.where(mask, self.scalar(math.nan), x)
        return blanked

    def multiply_add(self, factor: Any, x: A, y: A) -> A:
        """``factor x + y`` of arrays."""
        result: A = factor * x + y
        return result

    # Numbers of each sample:

    def select(self, mask: Mask | bool, x: Numbers | int, y: Numbers) -> Numbers:
        """``x`` in the samples of ``mask``, else ``y``; ``x`` may be one integer for all samples."""
        if isinstance(mask, bool):
            return (self.full(x, y.dtype) if isinstance(x, int) else x) if mask else y
        x = self.xp.full((), x, dtype=y.dtype, device=self.device) if isinstance(x, int) else x
        selected: Numbers = self.xp.where(mask, x, y)
        return selected

    def plus_one(self, counts: Numbers, mask: Mask) -> Numbers:
        """``counts``, one more in the samples of ``mask``."""
        one: Numbers = self.xp.astype(mask, counts.dtype)
        return counts + one

    def norm(self, x: State) -> Numbers:
        """Euclidean norm over all leaves that are measured."""
        norms = (self.xp.linalg.vector_norm(a, axis=-1, keepdims=True) for a in self.measured(x))
        norm: Numbers = functools.reduce(self.xp.hypot, norms)
        return self.noticing(norm, x)

    def noticing(self, norm: Numbers, x: State) -> Numbers:
        """The norm, NaN where a leaf that is not measured is not finite."""
        for i in self._unmeasured:
            if x[i].shape[-1]:
                norm = norm + 0.0 * self.largest_of(x[i])
        return norm

    def largest(self, x: State) -> Numbers:
        """Largest absolute value over all leaves that are measured."""
        of_leaves = [self.largest_of(a) for a in self.measured(x) if a.shape[-1]]
        largest: Numbers = functools.reduce(self.xp.maximum, of_leaves) if of_leaves else self.full(0.0)
        return largest

    def largest_of(self, a: Any) -> Any:
        """Largest absolute value of a leaf, (N, D) -> (N, 1)."""
        return self.xp.linalg.vector_norm(a, axis=-1, keepdims=True, ord=math.inf)

    def norm_of_any_size(self, x: State) -> Numbers:
        """The norm, whose squares stay in the range of numbers."""
        units = self.magnitude(x)
        return units * self.norm(self.over(x, units))

    def over(self, x: State, units: Numbers) -> State:
        """``x``, whose measured leaves are divided by ``units``."""
        return State(tuple(a if i in self._unmeasured else a / units for i, a in enumerate(x)))

    def magnitude(self, *states: State) -> Numbers:
        """A scale at which squares neither underflow nor overflow; 1 where all are zero, or not finite."""
        largest = functools.reduce(self.xp.maximum, map(self.largest, states))
        return self.select(self.xp.isfinite(largest) & (largest > 0), largest, self.xp.ones_like(largest))

    @property
    def smallest(self) -> float:
        """Squares of smaller numbers, or of their rounding errors, may leave the range of numbers."""
        smallest: float = float(self.backend.finfo(self.dtype).smallest_normal) ** 0.5 / self.eps
        return smallest

    @property
    def highest(self) -> float:
        """Squares of larger numbers, or sums of them, may leave the range of numbers."""
        highest: float = float(self.backend.finfo(self.dtype).max) ** 0.5 * 1e-4
        return highest

    def out_of_range(self, norm: Numbers) -> Mask:
        """Where squares of numbers of this size, or of their rounding errors, may leave the range of numbers."""
        outside: Mask = (norm <= self.smallest) | (norm >= self.highest)
        return outside

    def is_in_range(self, norm: Numbers) -> bool:
        """Whether no number is :meth:`out_of_range`, or not finite; False where to know it would wait for a device."""
        return False

    def dot(self, x: State, y: State) -> Numbers:
        """Inner product over all leaves that are measured."""
        pairs = zip(self.measured(x), self.measured(y), strict=True)
        dot: Numbers = total(self.xp.sum(a * b, axis=-1, keepdims=True) for a, b in pairs)
        return dot

    def same(self, x: State, y: State) -> Array:
        """Whether two states hold the same numbers, NaN included: one boolean."""
        xp = self.xp
        return xp.all(xp.stack([xp.all((a == b) | (a != a)) for a, b in zip(x, y, strict=True)]))

    def divisor(self, x: Matrices, norm: Numbers, active: Mask | None) -> Matrices:
        """``x``, (N, 1, 1), to divide by, in samples that are active and have a residual; ``active`` None is all.

        Elsewhere the quotient is not used, but a framework that can be told to raise at NaN makes none.
        """
        return x

    # Histories, and small matrices made from them:

    def set_row(self, history: History, index: Index, x: State | Row) -> History:
        """The history with one row replaced. The history passed in is no longer valid."""
        return History(tuple(self.set_matrix_row(a, index, b) for a, b in zip(history, x, strict=True)))

    def set_matrix_row(self, matrix: Any, index: Index, row: Any) -> Any:
        """The same for one array (N, m, n), and a row (N, n) or (N, 1, n)."""
        return xpx.at(matrix)[:, index, :].set(row if row.ndim == 2 else row[:, 0, :], copy=None)

    def rows_in_use(self, history: History, index: Index) -> History:
        """The rows of a history that may be nonzero at the loop's counter ``index``, where that saves work."""
        return History(tuple(head(a, 1, min(int(index), int(a.shape[1]))) for a in history))

    def products(self, rows: Row, history: History) -> Matrices:
        """Inner products of r rows with the m rows of a history, over all leaves that are measured.

        (N, r, D), (N, m, D) -> (N, r, m).
        """
        pairs = zip(self.measured(rows), self.measured(history), strict=True)
        products: Matrices = total(a @ self.xp.matrix_transpose(b) for a, b in pairs)
        return products

    def gram(self, gram: tuple[Matrices, ...], history: History, index: Index) -> tuple[Matrices, ...]:
        """Inner products of the rows of a history with each other, (N, m, m) for each leaf that is measured.

        ``gram`` holds them as they were before the row at ``index`` was replaced, and is no longer valid.
        """
        return tuple(a @ self.xp.matrix_transpose(a) for a in self.measured(history))

    def combine(self, weights: Matrices, history: History, onto: Row | None = None) -> Row:
        """Weighted sum of the rows of a history, (N, 1, m), (N, m, D) -> (N, 1, D), plus ``onto``."""
        sums = (weights @ a for a in history)
        return Row(tuple(sums if onto is None else map(operator.add, onto, sums)))

    def matmul(self, a: Matrices, b: Matrices) -> Matrices:
        """The product of small matrices."""
        return a @ b

    def solve_rows(self, matrix: Matrices, row: Matrices) -> Matrices:
        """The x with ``x matrix = row``; (N, m, m), and (N, r, m) for r rows.

        ``matrix`` is symmetric and positive definite, or triangular and regular: no pivots are needed.
        """
        transpose = self.xp.matrix_transpose
        solution: Matrices = transpose(self.xp.linalg.solve(transpose(matrix), transpose(row)))
        return solution

    def take(self, x: Any, index: Index, axis: int) -> Any:
        """The entries of an array at one index of an axis, which is kept, of length 1."""
        return x[(*(slice(None),) * axis, slice(index, index + 1), ...)]

    def table(self, rows: Array) -> Any:
        """The rows of a constant array (m, ...), to be read with ``table[index]`` at the loop's counter."""
        return tuple(rows[i, ...] for i in range(rows.shape[0]))


def _ordered(xp: Any, a: Array, order: Axes | None) -> Array:
    """``a``, its axes in the given order."""
    return a if order is None else xp.permute_dims(a, order)


def compact(xp: Any, a: Array) -> Array:
    """A copy of an array in C order without gaps. ``asarray(copy=True)`` may keep the order of the axes."""
    return xp.reshape(xp.asarray(xp.reshape(a, (-1,)), copy=True), a.shape)


def normal(space: Space, draw: Callable[[float, float], float], n: int, d: int) -> Array:
    """Normal numbers (n, d) from Python's generator, since the array API has none: the same in every framework."""
    numbers = [draw(0.0, 1.0) for _ in range(n * d)]
    return space.xp.reshape(space.xp.asarray(numbers, dtype=space.dtype, device=space.device), (n, d))


def signs(space: Space, draw: random.Random, n: int = 1) -> State:
    """A state (n, D) of random signs. Among 46337 successive signs of a row any four are independent."""
    # Random cubic polynomials of the index, modulo a prime. They are computed in int32 wherever the state is, so that a
    # program that is traced holds no constants of its length.
    xp, leaves = space.xp, []
    for _, d in space.flat_shapes:
        drawn = [[[draw.randrange(PRIME)] for _ in range(n)] for _ in range(5)]
        table = xp.asarray(drawn, dtype=xp.int32, device=space.device)
        index = xp.arange(d, dtype=xp.int32, device=space.device)[None, :]
        first, second, third, constant, of_block = (table[i, :, :] for i in range(5))
        x, block = index % PRIME, index // PRIME
        value = (first * x + second) % PRIME
        value = (value * x + third) % PRIME
        value = (value * x + (of_block * block + constant) % PRIME) % PRIME
        leaves.append(1 - 2 * xp.astype(2 * value < PRIME, space.dtype))
    return State(tuple(leaves))


def total(terms: Iterable[Any]) -> Any:
    """The sum of arrays."""
    return functools.reduce(operator.add, terms)


def head(array: Any, axis: int, n: int) -> Any:
    """The first n entries along an axis."""
    return array if array.shape[axis] == n else array[(*(slice(None),) * axis, slice(n), ...)]


def _widest(backend: "Backend", dtypes: list[Any]) -> Any:
    widest = max(dtypes, key=lambda dtype: backend.finfo(dtype).bits)
    return widest if backend.finfo(widest).bits >= 32 else backend.xp.float32
