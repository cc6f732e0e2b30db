"""Counts of PyTorch operations, of evaluations of F and of bytes."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .memory import LiveTensors


class Dispatched(TorchDispatchMode):
    """Counts the operations that reach PyTorch's dispatcher, including views."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations[str(function)] += 1
        return function(*args, **(kwargs or {}))


class Counted:
    """F(h, z) with counts of its evaluations, of the evaluations that record a graph, and of the pullbacks.

    Parameters
    ----------
    f
        F, whose value is a tensor or a pytree of tensors.
    """

    def __init__(self, f: Callable[[Any, Any], Any]) -> None:
        self._f = f
        self.evaluations = self.recorded = self.vjps = 0

    def __call__(self, h: Any, z: Any) -> Any:
        """F(h, z)."""
        self.evaluations += 1  # counted first: a checkpoint may leave F through an exception
        return self.watched(self._f(h, z))

    def watched(self, value: Any) -> Any:
        """The value of an evaluation; cotangents that pass it are counted."""
        leaves, structure = optree.tree_flatten(value)
        if not any(leaf.requires_grad for leaf in leaves):
            return value
        self.recorded += 1
        return optree.tree_unflatten(structure, Pulled.apply(self, *leaves))


@contextmanager
def counting(module: nn.Module) -> Iterator[Counted]:
    """Counts of a module that is a part of a model."""
    counts = Counted(module)

    def count(_module: nn.Module, _given: tuple[Any, ...]) -> None:
        counts.evaluations += 1

    def watch(_module: nn.Module, _given: tuple[Any, ...], value: Any) -> Any:
        return counts.watched(value)

    with module.register_forward_pre_hook(count), module.register_forward_hook(watch):
        yield counts


class Pulled(torch.autograd.Function):
    """The identity, which counts the cotangents that pass it. A layer calls a hook once, however often they do."""

    @staticmethod
    def forward(ctx: Any, counted: Counted, *values: Tensor) -> tuple[Tensor, ...]:
        """Views of the values."""
        ctx.counted = counted
        ctx.set_materialize_grads(False)  # zeros would be counted as memory
        return tuple(value.view_as(value) for value in values)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        """The cotangents, counted once."""
        ctx.counted.vjps += 1
        return None, *cotangents


class Costs(NamedTuple):
    """What a layer took.

    Attributes
    ----------
    forward, backward
        Evaluations of F in the forward and in the backward pass.
    vjps
        Pullbacks through F.
    held
        Bytes of tensors that are kept for the backward pass.
    peak
        Bytes of tensors alive at once, at most.
    """

    forward: int
    backward: int
    vjps: int
    held: int
    peak: int


def costs(counted: Counted, layer: Callable[[], Any], loss: Callable[[Any], Tensor]) -> Costs:
    """The counts and bytes of a forward and a backward pass.

    Parameters
    ----------
    counted
        What the layer calls.
    layer
        The forward pass.
    loss
        Of the layer's result, a number.
    """
    with LiveTensors() as live:
        value = layer()
        forward, held = counted.evaluations, live.bytes
        loss(value).backward()
    return Costs(forward, counted.evaluations - forward, counted.vjps, held, live.peak)
