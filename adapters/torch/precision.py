"""Automatic mixed precision: F runs under the autocast state of the call, everything around it in full precision."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from implicit_core.backends.torch import BACKEND
from implicit_core.estimators import Estimator
from implicit_core.linear_solvers import LinearSolver
from implicit_core.problem import Map

PyTree = Any


def autocasted(f: Map, h: PyTree) -> Map:
    """``f`` under the autocast state of now, whenever it is called; its results in the dtypes of h.

    Autocast makes a cell's output half precision whatever h is; the state keeps its dtype.
    """
    device = _device(h)
    if device is None or not torch.is_autocast_enabled(device):
        return f
    dtype = torch.get_autocast_dtype(device)

    def call(h: PyTree, z: PyTree) -> PyTree:
        # The cache as it is then: a CUDA graph would go on reading a parameter that was cast for one call.
        with torch.autocast(device, dtype=dtype, cache_enabled=torch.is_autocast_cache_enabled()):
            value = f(h, z)
        leaves, structure = BACKEND.flatten(value)
        states, expected = BACKEND.flatten(h)
        if structure == expected:
            leaves = [_as(x, state) for x, state in zip(leaves, states, strict=True)]
        return BACKEND.unflatten(structure, leaves)

    return call


def within_reach(gradient: Estimator, h: PyTree) -> Estimator:
    """The estimator, its linear solver's tolerance no finer than 8 ε of the precision that F has under autocast."""
    device, solver = _device(h), getattr(gradient, "linear_solver", None)
    if device is None or not isinstance(solver, LinearSolver) or not torch.is_autocast_enabled(device):
        return gradient
    reach = 8 * torch.finfo(torch.get_autocast_dtype(device)).eps
    changes: dict[str, Any] = {"linear_solver": replace(solver, rtol=max(solver.rtol, reach))}
    return replace(gradient, **changes)


def full_precision(h: PyTree) -> AbstractContextManager[Any]:
    """No autocast: a Gram matrix in half precision is none."""
    device = _device(h)
    if device is None or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def state_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a state as precise as ``x``: what autocast made half precision is not meant to stay so."""
    device = _device(x)
    halved = device is not None and torch.is_autocast_enabled(device) and x.dtype == torch.get_autocast_dtype(device)
    return torch.float32 if halved else x.dtype


def _device(h: PyTree) -> str | None:
    """The kind of device, if it knows autocast."""
    kinds = (x.device.type for x in BACKEND.flatten(h)[0] if isinstance(x, Tensor))
    return next((kind for kind in kinds if torch.amp.is_autocast_available(kind)), None)


def _as(x: Any, state: Any) -> Any:
    return x.to(state.dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
