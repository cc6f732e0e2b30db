"""Products with a Jacobian, and the whole of it, from the graph of one evaluation instead of forward mode."""

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from .autograd import gradient_edges, vector_jacobian
from .graph_inputs import ancestors

MOST_NUMBERS = 1 << 22
"""Numbers of the cotangents that go backwards at once."""


class GraphJacobian:
    """J = ∂F/∂h at one point, from the graph of F there.

    The pullback v -> Jᵀ v is linear, and its own pullback is u -> J u. The graph of this is made once, and a product
    goes backwards through it: F is not evaluated again, as it is in forward mode.

    Parameters
    ----------
    inputs
        The leaves of h, at which the graph begins.
    value
        The leaves of F(h), without a graph.
    edges
        Their nodes in the graph.
    batch_ndim
        How many axes index samples.
    """

    def __init__(
        self,
        inputs: Sequence[Tensor],
        value: Sequence[Tensor],
        edges: Sequence[GradientEdge | None],
        batch_ndim: int,
    ) -> None:
        self._inputs, self._value, self._edges, self._batch_ndim = inputs, value, edges, batch_ndim
        self._pullback: _Pullback | None = None
        self._right: Tensor | bool | None = None
        """In which samples products are right, (batch...); None before the first one."""

    @cached_property
    def _is_known(self) -> bool:
        """Whether there is no ``autograd.Function`` on the way from h, whose ``backward`` may do anything."""
        nodes = [edge.node for edge in self._edges if edge is not None]
        return not any(isinstance(node, BackwardCFunction) for node in _on_the_way(nodes, self._inputs))

    def product(self, tangents: Sequence[Tensor], forward: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
        """J u, or in some samples, or in all, what ``forward`` computes.

        That is where autograd records, since this product has no graph; and where F calls an ``autograd.Function``, or
        an operation whose ``backward`` has no derivative: some raise an error, and some are constant to autograd. So
        the first product is held against the pullback.
        """
        if torch.is_grad_enabled() or self._right is False or not self._is_known or _is_captured(tangents):
            return forward()
        try:
            made = self._pullback = self._pullback or self._pullback_with_graph()
            product = vector_jacobian(made.edges, made.v, tangents)
            if self._right is None:
                self._right = self._are_adjoint(made, product, tangents)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            self._right = False
        right = self._right
        if right is False:
            return forward()
        if not isinstance(right, Tensor):
            return product
        return [
            torch.where(right.reshape(*right.shape, *[1] * (a.ndim - right.ndim)), a, b)
            for a, b in zip(product, forward(), strict=True)
        ]

    def _are_adjoint(
        self, made: "_Pullback", product: Sequence[Tensor], tangents: Sequence[Tensor]
    ) -> Tensor | bool | None:
        """The samples in which ⟨v, J u⟩ is ⟨Jᵀ v, u⟩ up to rounding; None if all is zero, and nothing known.

        NaN equals nothing, but where F itself is not finite no other product is better.
        """
        here = [a.detach().double() * b.double() for a, b in zip(made.v, product, strict=True)]
        there = [-a.double() * b.double() for a, b in zip(made.value, tangents, strict=True)]
        size = sum(map(self._sums, [x.abs() for x in (*here, *there)]), torch.zeros(()))
        difference = sum(map(self._sums, (*here, *there)), torch.zeros(()))
        eps = max(torch.finfo(x.dtype).eps for x in product)
        finite = torch.isfinite(sum(map(self._sums, (x.double() for x in self._value)), torch.zeros(())))
        right = (difference.abs() <= math.sqrt(eps) * size) | ~finite
        if bool((size == 0).all()):
            return None
        if bool(right.all()):
            return True
        return right if bool(right.any()) else False

    def _sums(self, x: Tensor) -> Tensor:
        """The sum of each sample, (batch...), which copies nothing in any memory format."""
        axes = tuple(range(self._batch_ndim, x.ndim))
        return x.sum(axes) if axes else x

    def _pullback_with_graph(self) -> "_Pullback":
        """Some v without a pattern, Jᵀ v, and its nodes in a graph that begins at v."""
        with torch.inference_mode(False), torch.enable_grad():
            v = [_irregular(h).requires_grad_() for h in self._inputs]
            pulled = vector_jacobian(self._edges, self._inputs, v, create_graph=True)
            return _Pullback(v, [x.detach() for x in pulled], gradient_edges(pulled))

    def matrix(self) -> Tensor | None:
        """J for each sample, (batch..., n, n) for n numbers in a sample; None where it takes n products.

        That is where F calls an ``autograd.Function``, and where a pullback raises an error.
        """
        if not self._is_known:
            return None
        try:
            return self._matrix()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            return None

    def _matrix(self) -> Tensor:
        batch_ndim = self._batch_ndim
        batch = self._value[0].shape[:batch_ndim]
        samples, sizes = math.prod(batch), [math.prod(x.shape[batch_ndim:]) for x in self._value]
        n = sum(sizes)
        most = max(MOST_NUMBERS // max(samples * n, 1), 1)
        rows = []
        for some in torch.eye(n, device=self._value[0].device).split(most):
            v = [
                unit.to(x.dtype).reshape(-1, *[1] * batch_ndim, *x.shape[batch_ndim:]).expand(-1, *x.shape)
                for unit, x in zip(some.split(sizes, dim=1), self._value, strict=True)
            ]
            pulled = zip(self._pullbacks(v), sizes, strict=True)
            rows.append(torch.cat([x.reshape(len(some), samples, size) for x, size in pulled], dim=2))
        return torch.cat(rows).transpose(0, 1).reshape(*batch, n, n)

    def _pullbacks(self, v: Sequence[Tensor]) -> Sequence[Tensor]:
        """Jᵀ v for each of the v along the first axis."""
        try:
            return vector_jacobian(self._edges, self._inputs, v, batched=True)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # an operation that vmap refuses
            each = [vector_jacobian(self._edges, self._inputs, one) for one in zip(*v, strict=True)]
            return [torch.stack(parts) for parts in zip(*each, strict=True)]


class _Pullback(NamedTuple):
    """v, Jᵀ v, and the nodes of Jᵀ v in a graph that begins at v."""

    v: list[Tensor]
    value: list[Tensor]
    edges: list[GradientEdge | None]


def _irregular(like: Tensor) -> Tensor:
    """Numbers of a size of one that no operation maps to zero because of a pattern, as softmax does with equal ones.

    In the memory format of ``like``, a leaf of h, as other cotangents are.
    """
    index = torch.arange(like.numel(), device=like.device, dtype=torch.float32)
    return torch.empty_like(like).copy_(torch.cos(1.7 * index + 0.3).reshape(like.shape))


def _is_captured(tensors: Sequence[Tensor]) -> bool:
    """Whether a CUDA graph is captured, in which no number can be read."""
    return any(x.is_cuda for x in tensors) and torch.cuda.is_current_stream_capturing()


def _on_the_way(nodes: Sequence[Node], inputs: Sequence[Tensor]) -> set[Node]:
    """The nodes from ``inputs`` to ``nodes``, without those that lead to ``nodes`` from elsewhere."""
    children: dict[Node, list[Node]] = {}
    for node, _ in ancestors([(node, 0) for node in nodes], ()):
        for parent, _ in node.next_functions:
            if parent is not None:
                children.setdefault(parent, []).append(node)
    found = set[Node]()
    with torch.inference_mode(False), torch.enable_grad():
        pending = [get_gradient_edge(x).node for x in inputs]
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += children.get(node, [])
    return found
