"""Counts of PyTorch operations and of evaluations of F."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Dispatched(TorchDispatchMode):
    """Counts the operations that reach PyTorch's dispatcher, including views."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations[str(function)] += 1
        return function(*args, **(kwargs or {}))


class Counted:
    """F(h, z) with counts of its evaluations, of the evaluations that record a graph, and of the pullbacks."""

    def __init__(self, f: Callable[[Tensor, Any], Tensor]) -> None:
        self._f = f
        self.evaluations = self.recorded = self.vjps = 0

    def __call__(self, h: Tensor, z: Any) -> Tensor:
        """F(h, z)."""
        self.evaluations += 1  # counted first: a checkpoint may leave F through an exception
        value = self._f(h, z)
        if not value.requires_grad:
            return value
        self.recorded += 1
        counted: Tensor = Pulled.apply(value, self)
        return counted


class Pulled(torch.autograd.Function):
    """The identity, which counts the cotangents that pass it. A layer calls a hook once, however often they do."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, counted: Counted) -> Tensor:
        """A view of the value."""
        ctx.counted = counted
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None]:
        """The cotangent, counted."""
        ctx.counted.vjps += 1
        return cotangent, None
