"""Vector-Jacobian products along a graph, Jacobian-vector products, and which parts of autograd are active."""

import functools
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import GradientEdge, get_gradient_edge

from .tensors import Tensors, tensors

EDGES_OWN_NODES = "ownership_token" in GradientEdge._fields
"""Whether the edge to an ``autograd.Function`` keeps its node, as from PyTorch 2.9 on.

Before, the node ends with the output, and to use its edge is an error or a crash. The edge to an alias keeps both.
"""


def gradient_edges(outputs: Sequence[Tensor]) -> list[GradientEdge | None]:
    """The nodes of the graph that computed ``outputs``, which need not be kept; None for an output without a graph."""
    if not EDGES_OWN_NODES:
        with torch.inference_mode(False), torch.enable_grad():
            outputs = [out.view_as(out) for out in outputs]
    return [get_gradient_edge(out) if out.requires_grad else None for out in outputs]


def vector_jacobian(
    outputs: Sequence[GradientEdge | None],
    inputs: Sequence[Tensor],
    v: Sequence[Tensor],
    *,
    create_graph: bool = False,
    batched: bool = False,
) -> list[Tensor]:
    """The cotangents of ``inputs``, given the cotangents ``v`` of ``outputs``. The graph is kept.

    With ``batched``, each v has a first axis of cotangents that go backwards at once, and so has the result.
    """
    pairs = [(edge, cotangent) for edge, cotangent in zip(outputs, v, strict=True) if edge is not None]
    found: Sequence[Tensor | None] = [None] * len(inputs)
    if pairs and inputs:
        found = torch.autograd.grad(
            [edge for edge, _ in pairs],
            inputs,
            [cotangent for _, cotangent in pairs],
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
            is_grads_batched=batched,
        )
    axis = v[0].shape[:1] if batched else ()
    return [
        torch.zeros_like(leaf).expand(*axis, *leaf.shape) if x is None else x
        for x, leaf in zip(found, inputs, strict=True)
    ]


def pushforward(f: Callable[..., Any], primals: Tensors, tangents: Tensors) -> Any:
    """The tangent of ``f(*primals)``, in every mode of autograd."""
    load_forward_mode()
    if torch.is_inference_mode_enabled():  # in which all tangents are zero before PyTorch 2.12
        with torch.inference_mode(False), torch.no_grad():
            return torch.func.jvp(f, primals, tangents)[1]
    return torch.func.jvp(f, primals, tangents)[1]


@functools.cache
def load_forward_mode() -> None:
    """Make PyTorch compile the rules of its forward mode, as it does at the first use, without a warning.

    It compiles them with ``torch.jit.script``, which it deprecates.
    """
    with warnings.catch_warnings(), suppress(RuntimeError):
        warnings.filterwarnings("ignore", "`torch.jit.script` is")
        forward_ad.make_dual(torch.zeros(()), torch.zeros(()))


def has_tangents(tree: object) -> bool:
    """Whether a tensor of a pytree carries a tangent of forward mode."""
    try:
        return any(forward_ad.unpack_dual(leaf).tangent is not None for leaf in tensors(tree))
    except RuntimeError:  # a tangent cannot be read within vmap
        return False


def in_dual_level() -> bool:
    """Whether forward mode is active, so that a tensor may carry a tangent."""
    load_forward_mode()
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
