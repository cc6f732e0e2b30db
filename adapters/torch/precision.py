"""Automatic mixed precision: F runs under the autocast state of the call, all other operations in full precision."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from implicit_core.arrays import H, Z
from implicit_core.backends.torch import BACKEND
from implicit_core.estimators import Estimator
from implicit_core.linear_solvers import LinearSolver
from implicit_core.problem import Map

from .tensors import tensors


def autocasted(f: Map[H, Z], h: H) -> Map[H, Z]:
    """``f``, which runs under the present autocast state whenever it is called, and returns the dtypes of h.

    Under autocast a cell may return half precision for any h. The state keeps its dtype (Decision 40).
    """
    device = _autocast_device(h)
    if device is None or not torch.is_autocast_enabled(device):
        return f
    dtype = torch.get_autocast_dtype(device)

    def call(h: H, z: Z) -> H:
        # The cache is read at the time of the call: a CUDA graph must not read a parameter that was cast for one call.
        with torch.autocast(device, dtype=dtype, cache_enabled=torch.is_autocast_cache_enabled()):
            value = f(h, z)
        leaves, structure = BACKEND.flatten(value)
        states = BACKEND.flatten(h)[0]
        if len(leaves) == len(states):
            leaves = [_in_dtype_of(state, x) for x, state in zip(leaves, states, strict=True)]
        rounded: H = BACKEND.unflatten(structure, leaves)
        return rounded

    return call


def with_reachable_tolerance(gradient: Estimator, h: object) -> Estimator:
    """The estimator, whose linear solver has an rtol of at least 8 ε of the precision that F has under autocast."""
    device, solver = _autocast_device(h), getattr(gradient, "linear_solver", None)
    if device is None or not isinstance(solver, LinearSolver) or not torch.is_autocast_enabled(device):
        return gradient
    smallest = 8 * torch.finfo(torch.get_autocast_dtype(device)).eps
    rtol = solver.rtol.clamp(min=smallest) if isinstance(solver.rtol, torch.Tensor) else max(solver.rtol, smallest)
    changes: dict[str, Any] = {"linear_solver": replace(solver, rtol=rtol)}
    return replace(gradient, **changes)


def full_precision(h: object) -> AbstractContextManager[object]:
    """Disables autocast, under which a Gram matrix would be computed in half precision."""
    device = _autocast_device(h)
    if device is None or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def state_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a state that starts from ``x``: float32 where autocast has made x half precision."""
    device = _autocast_device(x)
    halved = device is not None and torch.is_autocast_enabled(device) and x.dtype == torch.get_autocast_dtype(device)
    return torch.float32 if halved else x.dtype


def _autocast_device(h: object) -> str | None:
    """The type of the device of h, if it supports autocast."""
    types = (x.device.type for x in tensors(h))
    return next((kind for kind in types if torch.amp.is_autocast_available(kind)), None)


def _in_dtype_of(state: Tensor, x: object) -> object:
    return x.to(state.dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
