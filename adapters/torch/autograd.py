"""Vector-Jacobian products along a graph, and which parts of autograd are active."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import GradientEdge, get_gradient_edge

from .tensors import tensors


def gradient_edges(outputs: Sequence[Tensor]) -> list[GradientEdge | None]:
    """The nodes of the graph that computed ``outputs``, which need not be kept; None for an output without a graph."""
    return [get_gradient_edge(out) if out.requires_grad else None for out in outputs]


def vector_jacobian(
    outputs: Sequence[GradientEdge | None],
    inputs: Sequence[Tensor],
    v: Sequence[Tensor],
    *,
    create_graph: bool = False,
) -> list[Tensor]:
    """The cotangents of ``inputs``, given the cotangents ``v`` of ``outputs``. The graph is kept."""
    pairs = [(edge, cotangent) for edge, cotangent in zip(outputs, v, strict=True) if edge is not None]
    if not pairs or not inputs:
        return [torch.zeros_like(leaf) for leaf in inputs]
    return list(
        torch.autograd.grad(
            [edge for edge, _ in pairs],
            inputs,
            [cotangent for _, cotangent in pairs],
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
            materialize_grads=True,
        )
    )


def has_tangents(tree: object) -> bool:
    """Whether a tensor of a pytree carries a tangent of forward mode."""
    try:
        return any(forward_ad.unpack_dual(leaf).tangent is not None for leaf in tensors(tree))
    except RuntimeError:  # a tangent cannot be read within vmap
        return False


def in_dual_level() -> bool:
    """Whether forward mode is active, so that a tensor may carry a tangent."""
    try:
        forward_ad.make_dual(torch.zeros(()), torch.zeros(()))
    except RuntimeError:
        return False
    return True


def transforming() -> bool:
    """Whether a transform of ``torch.func`` is active. Within one, no tensor can be made to require a gradient."""
    try:
        torch.empty(0).requires_grad_()
    except RuntimeError:
        return True
    return False
