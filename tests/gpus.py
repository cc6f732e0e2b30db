"""Marks of tests that need a GPU. The reason of a skip names what is missing."""

import importlib.util
from collections.abc import Callable
from typing import TypeVar

import pytest
import torch


def without_cupy() -> str:
    """Why CuPy cannot be used here; empty if it can."""
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed"
    import cupy

    try:
        return "" if cupy.cuda.is_available() else "CuPy found no CUDA device"
    except cupy.cuda.runtime.CUDARuntimeError as error:  # older versions raise if there is no driver
        return f"CuPy found no CUDA device: {error}"


WITHOUT_CUPY = without_cupy()
CUPY = [pytest.mark.gpu, pytest.mark.skipif(bool(WITHOUT_CUPY), reason=WITHOUT_CUPY or "CuPy has a device")]
TORCH = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch found no CUDA device"),
]

Test = TypeVar("Test", bound=Callable[..., object])


def on_gpu_with_torch(test: Test) -> Test:
    """Mark a test."""
    for mark in TORCH:
        test = mark(test)
    return test
