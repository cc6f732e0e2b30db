"""The tensors in a pytree, and the properties of one tensor."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeGuard

import torch
from torch import Tensor

from implicit_core.arrays import H
from implicit_core.backends.torch import BACKEND

Tensors = tuple[Tensor, ...]

OnLeaves = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensors]
"""F on leaves: from the leaves of h, and all other tensors that F depends on, to the leaves of F(h, z)."""


def tensors(tree: object) -> list[Tensor]:
    """The leaves of a pytree that are tensors."""
    return [leaf for leaf in BACKEND.flatten(tree)[0] if isinstance(leaf, Tensor)]


def as_tensors(h0: H, z: object) -> H:
    """``h0``, whose numbers and NumPy arrays become tensors on the device of the tensors in z, if it holds no tensor.

    Python's numbers also take the dtype of the first floating-point tensor in z.
    """
    in_z = tensors(z)
    if tensors(h0) or not in_z:
        return h0
    dtype = next((x.dtype for x in in_z if x.is_floating_point()), None)

    def as_tensor(x: object) -> object:
        if isinstance(x, (int, float)):
            return torch.tensor(x, dtype=dtype, device=in_z[0].device)
        return torch.tensor(x, device=in_z[0].device) if hasattr(x, "__array__") else x

    start: H = BACKEND.map(as_tensor, h0)
    return start


def nested_tensors(argument: object) -> Iterator[Tensor]:
    """The tensors in an argument, or in the result, of one of PyTorch's functions."""
    if isinstance(argument, Tensor):
        yield argument
    elif isinstance(argument, (list, tuple, dict)):
        for part in argument.values() if isinstance(argument, dict) else argument:
            yield from nested_tensors(part)


def is_differentiable(x: object) -> TypeGuard[Tensor]:
    """Whether a leaf of z is a tensor of a dtype that has derivatives."""
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())


def has_storage(x: Tensor) -> bool:
    """Whether ``x`` is dense, and not wrapped by a transform of ``torch.func``."""
    try:
        x.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return False
    return True


def is_alive(x: Tensor) -> bool:
    """Whether ``x`` can be used in operations. A tensor that a vmap has wrapped cannot, once that vmap has returned."""
    try:
        x.detach()
    except RuntimeError:
        return False
    return True


def dense(x: Tensor) -> Tensor:
    """``x``, made contiguous unless it is so in one of PyTorch's memory formats."""
    return x if BACKEND.axis_order(x, 0) else x.contiguous()


def as_leaf(x: Tensor) -> Tensor:
    """``x`` as a leaf of autograd's graph. A tensor of inference mode has to be copied."""
    return (x.clone() if x.is_inference() else x.detach()).requires_grad_()


def views(leaves: Sequence[Tensor]) -> list[Tensor]:
    """Leaves of autograd's graph as tensors that are none: some tools refuse to watch a leaf."""
    return [x.view_as(x) if has_storage(x) else x for x in leaves]


def is_expanded(x: Tensor) -> bool:
    """Whether ``x`` is an expanded weight, PyTorch's way to per-sample gradients, whose class has no public name."""
    return type(x).__name__ == "ExpandedWeight"
