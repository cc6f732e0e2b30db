"""The tensors at which the autograd graph of one evaluation of F begins."""

from collections.abc import Container, Iterable, Sequence
from typing import NamedTuple

from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node, get_gradient_edge

from implicit_core.arrays import H

from .closure import Evaluation
from .identity import IdentitySet
from .tensors import Tensors

Edge = tuple[Node, int]
"""A node of autograd's graph, and the number of one of its outputs."""


class GraphInputs(NamedTuple):
    """Where the graph of one evaluation of F begins, other than at h.

    Attributes
    ----------
    tensors
        The externals among its inputs.
    complete
        Whether these are all of its inputs.
    watched
        Whether a tool watches the backward pass, so that each cotangent must pass once: by full backward hooks of
        modules, by the per-sample gradients of expanded weights, or by ``retain_grad``. Hooks show by the name of their
        node alone.
    """

    tensors: Tensors
    complete: bool
    watched: bool


def graph_inputs(
    evaluation: Evaluation[H], outputs: Sequence[Tensor], h: Sequence[Tensor], z: Sequence[Tensor]
) -> GraphInputs | None:
    """The inputs of the graph of ``outputs``; None if its only inputs are ``h``.

    Parameters
    ----------
    evaluation
        The evaluation of F.
    outputs
        The leaves of its value.
    h
        The leaves of the h at which F was evaluated, leaves of the graph too.
    z
        The tensors in z.
    """
    in_z, edges_of_h = IdentitySet(z), {_edge(x) for x in h}
    externals = {_edge(x): x for x in evaluation.externals if x.requires_grad}
    # The results of scripted code and of torch.vmap do not come out of a function that was observed, so they were taken
    # for closed-over tensors. They depend on h, which closed-over tensors do not.
    computed = [edge for edge, x in externals.items() if x.grad_fn is not None and x not in in_z]
    for edge in computed:
        if any(ancestor in edges_of_h for ancestor in ancestors([edge], edges_of_h)):
            del externals[edge]
    reached: list[Tensor] = []
    unknown: list[Edge] = []
    opaque = False
    watched = evaluation.watched
    for edge in ancestors([_edge(x) for x in outputs if x.requires_grad], externals.keys() | edges_of_h):
        if edge in externals:
            reached.append(externals[edge])
        elif edge not in edges_of_h and not any(parent for parent, _ in edge[0].next_functions):
            unknown.append(edge)
        # A reentrant checkpoint has parameters, and no edge to them.
        opaque = opaque or isinstance(edge[0], BackwardCFunction)
        # Hooks of modules around the cell are on the edges of its inputs, where each cotangent passes once.
        watched = watched or (edge not in externals and edge[0].name() == "BackwardHookFunctionBackward")
    if not (reached or unknown or opaque):
        return None
    produced = {_edge(x) for x in evaluation.produced_leaves()} if unknown else set()
    # f itself may have called an autograd.Function whose output is among the externals: some versions of PyTorch do not
    # show such calls to a TorchFunctionMode.
    ambiguous = any(edge in externals and isinstance(edge[0], BackwardCFunction) for edge in computed)
    return GraphInputs(tuple(reached), not ambiguous and all(edge in produced for edge in unknown), watched)


def _edge(x: Tensor) -> Edge:
    return get_gradient_edge(x)[:2]


def ancestors(edges: Iterable[Edge], stop: Container[Edge]) -> Iterable[Edge]:
    """``edges`` and all edges that lead to them, each once, in a fixed order. Those in ``stop`` are not followed."""
    found = dict.fromkeys(edges)  # a dict and not a set: the order reaches autograd
    pending = list(found)
    while pending:
        edge = pending.pop()
        if edge not in stop:
            parents = [(node, i) for node, i in edge[0].next_functions if node is not None and (node, i) not in found]
            found |= dict.fromkeys(parents)
            pending += dict.fromkeys(parents)
    return found
