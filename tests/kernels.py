"""CuPy's kernels on the CPU: their source, compiled with the C++ compiler and run on NumPy arrays."""

import ctypes
import hashlib
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

COMPILER = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
NVCC = shutil.which("nvcc")
HEAD = "#include <cmath>\n#include <cstddef>\nusing namespace std;\n"
C = {np.dtype(np.float32): "float", np.dtype(np.float64): "double", np.dtype(np.int64): "long long"}


class HostKernel:
    """An ``ElementwiseKernel`` or a ``ReductionKernel`` as CuPy calls it, with NumPy arrays.

    Parameters
    ----------
    kernel
        CuPy's; an object of it can be made without a GPU.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._params = (*kernel.in_params, *kernel.out_params)

    def __call__(self, *arguments: Any, size: int | None = None, axis: int = -1, keepdims: bool = False) -> Any:
        kernel = self.kernel
        inputs, given = arguments[: kernel.nin], list(arguments[kernel.nin :])
        typed = next(a for p, a in zip(kernel.in_params, inputs, strict=True) if p.dtype is None and np.ndim(a) > 0)
        whole = [a for p, a in zip(self._params, arguments, strict=False) if not p.raw and isinstance(a, np.ndarray)]
        shape = np.broadcast_shapes(*(a.shape for a in whole)) if size is None else (size,)
        reduces = hasattr(kernel, "reduce_expr")
        made = []
        for p, a in zip(kernel.in_params, inputs, strict=True):
            dtype = typed.dtype if p.dtype is None else p.dtype
            assert not isinstance(a, np.ndarray) or a.dtype == dtype, "CuPy would refuse it"
            a = np.asarray(a, dtype)
            if not p.raw:
                a = np.broadcast_to(a, shape)
                a = np.moveaxis(a, axis, -1) if reduces else a
            made.append(np.ascontiguousarray(a))
        if reduces:
            inner = made[0].shape[-1]
            outputs = [np.empty(made[0].shape[:-1], typed.dtype)]
            extents = outputs[0].size, inner
        else:
            outputs = given or [np.empty(shape, typed.dtype) for _ in kernel.out_params]
            extents = int(np.prod(shape)), 0
        assert all(a.flags.c_contiguous for a in outputs)
        pointers = [ctypes.c_void_p(a.ctypes.data) for a in (*made, *outputs)]
        _compiled(self.source(C[typed.dtype])).run(*(ctypes.c_longlong(n) for n in extents), *pointers)
        results = tuple(np.expand_dims(a, axis) if reduces and keepdims else a for a in outputs)
        return results[0] if len(results) == 1 else results

    def source(self, typename: str, function: str = 'extern "C" void run') -> str:
        """The kernel as a function in C++, for one type T."""
        kernel = self.kernel
        pointers = ["ptrdiff_t size, ptrdiff_t inner"]
        for p in self._params:
            pointers.append(f"{'const ' * p.is_const}{p.ctype} *{p.name if p.raw else f'_raw_{p.name}'}")
        begin = f"typedef {typename} T;\n{kernel.preamble}\n{function}({', '.join(pointers)}) {{\n"
        inputs, outputs = ([p for p in side if not p.raw] for side in (kernel.in_params, kernel.out_params))
        if not hasattr(kernel, "reduce_expr"):
            bound = [f"{'const ' * p.is_const}{p.ctype} &{p.name} = _raw_{p.name}[i];" for p in (*inputs, *outputs)]
            body = f"{' '.join(bound)}\n{kernel.operation};"
            return f"{begin}for (ptrdiff_t i = 0; i < size; ++i) {{ {body} }}\n}}\n"
        # As on a GPU: several threads start with the identity, and then their results are reduced.
        bound = [f"const {p.ctype} &{p.name} = _raw_{p.name}[i * inner + j];" for p in inputs]
        (out,) = outputs
        body = f"""
            T part[3] = {{{kernel.identity}, {kernel.identity}, {kernel.identity}}};
            for (ptrdiff_t j = 0; j < inner; ++j) {{
                {" ".join(bound)}
                part[j % 3] = REDUCE(part[j % 3], (T)({kernel.map_expr}));
            }}
            const T a = REDUCE(part[2], REDUCE(part[0], part[1]));
            T &{out.name} = _raw_{out.name}[i];
            {kernel.post_map_expr};
        """
        reduce = f"#define REDUCE(u, w) ([](T a, T b) -> T {{ return {kernel.reduce_expr}; }}(u, w))\n"
        return f"{reduce}{begin}for (ptrdiff_t i = 0; i < size; ++i) {{ {body} }}\n}}\n"


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


@cache
def _compiled(source: str) -> ctypes.CDLL:
    assert COMPILER is not None
    path = Path(_folder().name, hashlib.sha256(source.encode()).hexdigest()[:16])
    path.with_suffix(".cpp").write_text(HEAD + source)
    command = [COMPILER, "-O1", "-shared", "-fPIC", "-o", f"{path}.so", f"{path}.cpp"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return ctypes.CDLL(f"{path}.so")
