"""Automatic mixed precision: F runs under the autocast state of the call, everything around it in full precision."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from implicit_core.backends.torch import BACKEND
from implicit_core.problem import Map

PyTree = Any


def autocasted(f: Map, h: PyTree) -> Map:
    """``f`` under the autocast state of now, whenever it is called; its results in the dtypes of h.

    Autocast makes a cell's output half precision whatever h is; the state keeps its dtype.
    """
    device = _device(h)
    if device is None or not torch.is_autocast_enabled(device):
        return f
    dtype, cache = torch.get_autocast_dtype(device), torch.is_autocast_cache_enabled()

    def call(h: PyTree, z: PyTree) -> PyTree:
        with torch.autocast(device, dtype=dtype, cache_enabled=cache):
            value = f(h, z)
        leaves, structure = BACKEND.flatten(value)
        states, expected = BACKEND.flatten(h)
        if structure == expected:
            leaves = [_as(x, state) for x, state in zip(leaves, states, strict=True)]
        return BACKEND.unflatten(structure, leaves)

    return call


def full_precision(h: PyTree) -> AbstractContextManager[Any]:
    """No autocast: a Gram matrix in half precision is none."""
    device = _device(h)
    if device is None or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def _device(h: PyTree) -> str | None:
    return next((x.device.type for x in BACKEND.flatten(h)[0] if isinstance(x, Tensor)), None)


def _as(x: Any, state: Any) -> Any:
    return x.to(state.dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
