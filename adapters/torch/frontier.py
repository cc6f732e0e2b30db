"""Where the graph of one F begins."""

from collections.abc import Sequence, Set
from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import get_gradient_edge

from .closure import Hoisted, Tensors

Edge = tuple[Any, int]
"""A node of autograd's graph, and which of its outputs."""


def frontier(
    once: Hoisted, outputs: Sequence[Tensor], h_in: Sequence[Tensor], z: Sequence[Tensor]
) -> tuple[Tensors, bool] | None:
    """Which of the tensors that F has seen its graph begins at, and whether it also begins where none was seen.

    None if it begins at h alone.
    """
    own = {_edge(x) for x in h_in}
    explicit = {id(x) for x in z}
    edges = {_edge(x): x for x in once.externals if x.requires_grad}
    doubtful = [edge for edge, x in edges.items() if x.grad_fn is not None and id(x) not in explicit]
    for edge in doubtful:  # what comes out of scripted code, or of torch.vmap, looks like a tensor from outside
        if not own.isdisjoint(_ancestors([edge], own)):
            del edges[edge]
    reached: list[Tensor] = []
    ends: set[Edge] = set()
    opaque = False
    for edge in _ancestors([_edge(x) for x in outputs if x.requires_grad], edges.keys() | own):
        if edge in edges:
            reached.append(edges[edge])
        elif edge not in own and not any(parent for parent, _ in edge[0].next_functions):
            ends.add(edge)
        # A reentrant checkpoint, for one, has parameters and no edge to them.
        opaque = opaque or isinstance(edge[0], BackwardCFunction)
    hidden = bool(ends) and not ends <= {_edge(x) for x in once.leaves()}
    # What came out of an autograd.Function may have been made by f: not every version of PyTorch shows such a call.
    hidden = hidden or any(edge in edges and isinstance(edge[0], BackwardCFunction) for edge in doubtful)
    return (tuple(reached), hidden) if reached or ends or opaque else None


def _edge(x: Tensor) -> Edge:
    return get_gradient_edge(x)[:2]


def _ancestors(edges: list[Edge], stop: Set[Edge]) -> list[Edge]:
    """``edges`` and all that they lead to, up to and with those in ``stop``."""
    found, pending = set(edges), list(edges)
    while pending:
        edge = pending.pop()
        if edge not in stop:
            following = {parent for parent in edge[0].next_functions if parent[0] is not None} - found
            found |= following
            pending += following
    return list(found)
