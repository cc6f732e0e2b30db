"""CuPy: arrays on any GPU, work on the stream that is current there, and one kernel where CuPy would launch many.

The launch of a kernel costs more than the arithmetic of small problems, so the arithmetic of the solvers is fused.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import array_api_compat.cupy as xp
import cupy

from implicit_core.arrays import History, Matrices, Numbers, PyTree, Row, State
from implicit_core.backend import Backend, Stream
from implicit_core.space import Space, total

LARGEST_SYSTEM = 10
"""Rows of a linear system that one thread solves, since a GPU reserves registers for it. cuBLAS solves larger ones."""

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


class CuPySpace(Space):
    """Fused kernels."""

    def multiply_add(self, factor: Any, x: Any, y: Any) -> Any:
        kernel = _AXPY if isinstance(factor, cupy.ndarray) else _AXPY_NUMBER
        return kernel(factor, x, y)

    def plus_one(self, counts: Any, mask: Any) -> Any:
        return counts + mask

    def norm(self, x: State) -> Numbers:
        norms = (cupy.linalg.norm(a, axis=-1, keepdims=True) for a in self.measured(x))
        norm: Numbers = functools.reduce(cupy.hypot, norms)
        return self.noticing(norm, x)

    def largest_of(self, a: Any) -> Any:
        return _LARGEST(a, axis=-1, keepdims=True)

    def set_matrix_row(self, matrix: Any, index: int, row: Any) -> Any:
        matrix[:, index, :] = row if row.ndim == 2 else row[:, 0, :]
        return matrix

    def rows_in_use(self, history: History, index: int) -> History:
        return history  # kernels are made for one m, and read histories as they lie

    def products(self, rows: Row, history: History) -> Matrices:
        pairs = zip(self.measured(rows), self.measured(history), strict=True)
        products: Matrices = total(_products(a, b) for a, b in pairs)
        return products

    def gram(self, gram: Any, history: History, index: int) -> Any:
        # Recompute one row in place: a Gram matrix belongs to one solve.
        for matrix, a in zip(gram, self.measured(history), strict=True):
            products = _products(a[:, index : index + 1, :], a)[:, 0, :]
            matrix[:, index, :] = products
            matrix[:, :, index] = products
        return gram

    def combine(self, weights: Any, history: History, onto: Row | None = None) -> Row:
        return Row(tuple(_combined(weights, a, None if onto is None else onto[i]) for i, a in enumerate(history)))

    def solve_rows(self, matrix: Any, row: Any) -> Any:
        samples, m, _ = matrix.shape
        if m > LARGEST_SYSTEM or row.shape[1] > 1:
            return super().solve_rows(matrix, row)
        return _solve_kernel(m)(matrix, row, cupy.empty(row.shape, row.dtype), size=samples)


def _products(rows: Any, history: Any) -> Any:
    return _PRODUCTS(rows[:, :, None, :], history[:, None, :, :], axis=3)


def _combined(weights: Any, history: Any, row: Any) -> Any:
    samples, m, d = history.shape
    if row is not None:
        return _COMBINED_ONTO(row, weights, history, m, d)
    return _COMBINED(weights, history, m, d, cupy.empty((samples, 1, d), history.dtype))


class CUDAStreams:
    """See :class:`implicit_core.backend.Streams`."""

    def current(self, tree: PyTree) -> Stream:
        with BACKEND.on_device_of(tree):
            return Stream(cupy.cuda.runtime.getDevice(), cupy.cuda.get_current_stream().ptr)

    @contextmanager
    def use(self, stream: Stream) -> Iterator[None]:
        with cupy.cuda.Device(stream.device), external_stream(stream.address):
            yield


class _Foreign:
    """A stream at an address, with CUDA's protocol of streams."""

    def __init__(self, address: int) -> None:
        self._address = address

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._address


def external_stream(address: int) -> Any:
    """CuPy's stream for another framework's, of the current device."""
    if hasattr(cupy.cuda.Stream, "from_external"):
        return cupy.cuda.Stream.from_external(_Foreign(address))
    return cupy.cuda.ExternalStream(address)  # CuPy 13


class CuPyBackend(Backend):
    """CuPy arrays on any GPU. The device that is current when a function is called does not matter."""

    streams = CUDAStreams()

    def on_device_of(self, tree: PyTree) -> AbstractContextManager[Any]:
        # CuPy makes arrays on the current device, whatever device their arguments are on.
        device: AbstractContextManager[Any] = next(x.device for x in self.flatten(tree)[0] if self.is_array(x))
        return device

    def complex(self, real: Any, imag: Any) -> Any:
        made = cupy.empty(real.shape, cupy.result_type(real.dtype, cupy.complex64))
        made.real, made.imag = real, imag
        return made

    def from_dlpack(self, x: Any) -> Any:
        return cupy.from_dlpack(x)

    def devices(self) -> list[str]:
        try:
            count = cupy.cuda.runtime.getDeviceCount()
        except cupy.cuda.runtime.CUDARuntimeError as error:
            return [f"no CUDA device ({str(error).partition(':')[0]})"]
        names = (cupy.cuda.runtime.getDeviceProperties(i)["name"].decode() for i in range(count))
        return [f"cuda:{i} ({name})" for i, name in enumerate(names)] or ["no CUDA device"]

    def count(self, masks: Sequence[Any]) -> list[int]:
        counts: list[int] = cupy.concatenate(masks, axis=1).sum(axis=0).tolist()
        return counts


BACKEND = CuPyBackend("cupy", xp, (cupy.ndarray,), space=CuPySpace)
