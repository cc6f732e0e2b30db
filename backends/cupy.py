"""CuPy: arrays of the GPU that is theirs, on the stream that is current there; one kernel where CuPy would launch many.

A kernel's launch costs more than what small problems compute, so the arithmetic of the solvers is fused.
"""

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import array_api_compat.cupy as xp
import cupy

from implicit_core.backend import Array, Backend, PyTree, Stream

LARGEST_SYSTEM = 10
"""Rows of a linear system that one thread solves: a GPU reserves what threads keep. Larger ones are cuBLAS' task."""

_AXPY = cupy.ElementwiseKernel("T a, T x, T y", "T z", "z = a * x + y", "implicit_core_axpy")
_AXPY_NUMBER = cupy.ElementwiseKernel("float64 a, T x, T y", "T z", "z = (T)a * x + y", "implicit_core_axpy_number")
_PRODUCTS = cupy.ReductionKernel("T x, T y", "T z", "x * y", "a + b", "z = a", "0", "implicit_core_products")
# CuPy's own `max` begins at the least finite number, and may lose infinities and NaN.
_LARGEST = cupy.ReductionKernel(
    "T x", "T y", "x < 0 ? -x : x", "(a > b || a != a) ? a : b", "y = a", "0", "implicit_core_largest"
)
_COMBINE = """
    const long long sample = i / d, place = i % d;
    T sum = {start};
    for (long long j = 0; j < m; ++j) {{
        sum += weights[sample * m + j] * history[(sample * m + j) * d + place];
    }}
    z = sum;
"""
_COMBINED = cupy.ElementwiseKernel(
    "raw T weights, raw T history, int64 m, int64 d", "T z", _COMBINE.format(start="0"), "implicit_core_combine"
)
_COMBINED_ONTO = cupy.ElementwiseKernel(
    "T x, raw T weights, raw T history, int64 m, int64 d",
    "T z",
    _COMBINE.format(start="x"),
    "implicit_core_combine_onto",
)
# Elimination without pivots of the transposed system: one thread a sample, which keeps the matrix to itself.
_SOLVE = """
    T a[{m}][{m}], b[{m}];
    for (int r = 0; r < {m}; ++r) {{
        b[r] = row[i * {m} + r];
        for (int c = 0; c < {m}; ++c) {{
            a[r][c] = matrix[(i * {m} + c) * {m} + r];
        }}
    }}
    for (int k = 0; k < {m}; ++k) {{
        for (int r = k + 1; r < {m}; ++r) {{
            const T factor = a[r][k] / a[k][k];
            for (int c = k + 1; c < {m}; ++c) {{
                a[r][c] -= factor * a[k][c];
            }}
            b[r] -= factor * b[k];
        }}
    }}
    for (int r = {m} - 1; r >= 0; --r) {{
        for (int c = r + 1; c < {m}; ++c) {{
            b[r] -= a[r][c] * b[c];
        }}
        b[r] /= a[r][r];
        solution[i * {m} + r] = b[r];
    }}
"""


@functools.cache
def _solve_kernel(m: int) -> cupy.ElementwiseKernel:
    return cupy.ElementwiseKernel(
        "raw T matrix, raw T row", "raw T solution", _SOLVE.format(m=m), f"implicit_core_solve_{m}"
    )


class CuPyBackend(Backend):
    """CuPy arrays on any GPU; what is current when a function is called does not matter, but for the streams."""

    def beside(self, tree: PyTree) -> AbstractContextManager[Any]:
        # CuPy makes arrays on the current device, whatever theirs is that they are made from.
        device: AbstractContextManager[Any] = next(x.device for x in self.flatten(tree)[0] if self.is_array(x))
        return device

    def from_dlpack(self, x: Any) -> Array:
        return cupy.from_dlpack(x)

    def stream(self, tree: PyTree) -> Stream:
        with self.beside(tree):
            return Stream(cupy.cuda.runtime.getDevice(), cupy.cuda.get_current_stream().ptr)

    def devices(self) -> list[str]:
        try:
            count = cupy.cuda.runtime.getDeviceCount()
        except cupy.cuda.runtime.CUDARuntimeError as error:
            return [f"no CUDA device ({str(error).partition(':')[0]})"]
        names = (cupy.cuda.runtime.getDeviceProperties(i)["name"].decode() for i in range(count))
        return [f"cuda:{i} ({name})" for i, name in enumerate(names)] or ["no CUDA device"]

    def count(self, masks: Sequence[Array]) -> list[int]:
        counts: list[int] = cupy.concatenate(masks, axis=1).sum(axis=0).tolist()
        return counts

    def rows_in_use(self, history: Array, index: int) -> int:
        return int(history.shape[1])  # kernels are made for one m, and read histories as they lie

    def tally(self, counts: Array, mask: Array) -> Array:
        return counts + mask

    def norm(self, x: Array) -> Array:
        return cupy.linalg.norm(x, axis=-1, keepdims=True)

    def largest(self, x: Array) -> Array:
        return _LARGEST(x, axis=-1, keepdims=True)

    def axpy(self, a: Array | float, x: Array, y: Array) -> Array:
        return _AXPY(a, x, y) if isinstance(a, cupy.ndarray) else _AXPY_NUMBER(a, x, y)

    def gram(self, gram: Array, history: Array, index: int) -> Array:
        # One row anew, in place: a Gram matrix belongs to one solve.
        products = self.products(history[:, index : index + 1, :], history)[:, 0, :]
        gram[:, index, :] = products
        gram[:, :, index] = products
        return gram

    def products(self, row: Array, history: Array) -> Array:
        return _PRODUCTS(row[:, :, None, :], history[:, None, :, :], axis=3)

    def combine(self, weights: Array, history: Array) -> Array:
        samples, m, d = history.shape
        return _COMBINED(weights, history, m, d, cupy.empty((samples, 1, d), history.dtype))

    def combine_onto(self, row: Array, weights: Array, history: Array) -> Array:
        _, m, d = history.shape
        return _COMBINED_ONTO(row, weights, history, m, d)

    def solve_rows(self, matrix: Array, row: Array) -> Array:
        samples, m, _ = matrix.shape
        if m > LARGEST_SYSTEM:
            return super().solve_rows(matrix, row)
        return _solve_kernel(m)(matrix, row, cupy.empty(row.shape, row.dtype), size=samples)

    def entry(self, row: Array, index: int) -> Array:
        return row[:, :, index : index + 1]

    def set_row(self, history: Array, index: int, row: Array) -> Array:
        history[:, index, :] = row if row.ndim == 2 else row[:, 0, :]
        return history


BACKEND = CuPyBackend("cupy", xp, (cupy.ndarray,))
