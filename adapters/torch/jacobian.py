"""Products with a Jacobian, and the whole of it, from the graph of one evaluation instead of forward mode."""

import math
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge

from .autograd import gradient_edges, vector_jacobian
from .function_modes import Quiet
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
    quiet
        The context in which hooks that F registered are not called.
    """

    def __init__(
        self, inputs: Sequence[Tensor], value: Sequence[Tensor], edges: Sequence[GradientEdge | None], quiet: Quiet
    ) -> None:
        self._inputs, self._value, self._edges, self._quiet = inputs, value, edges, quiet
        self._pullback: tuple[list[Tensor], list[GradientEdge | None]] | None = None
        self._has_products = True

    @cached_property
    def _is_known(self) -> bool:
        """Whether the graph has no ``autograd.Function``, whose ``backward`` may be cut off from the graph."""
        edges = [(edge.node, edge.output_nr) for edge in self._edges if edge is not None]
        return not any(isinstance(node, BackwardCFunction) for node, _ in ancestors(edges, ()))

    def product(self, tangents: Sequence[Tensor]) -> list[Tensor] | None:
        """J u; None if F calls an ``autograd.Function``, or an operation without a second derivative."""
        if not (self._has_products and self._is_known):
            return None
        try:
            with self._quiet:
                v, edges = self._pullback = self._pullback or self._pullback_with_graph()
                return vector_jacobian(edges, v, tangents)
        except RuntimeError:
            self._has_products = False
            return None

    def _pullback_with_graph(self) -> tuple[list[Tensor], list[GradientEdge | None]]:
        """Some v, and the nodes of Jᵀ v in a graph that begins there."""
        with torch.inference_mode(False), torch.enable_grad():
            v = [torch.ones_like(x).requires_grad_() for x in self._value]
            return v, gradient_edges(vector_jacobian(self._edges, self._inputs, v, create_graph=True))

    def matrix(self, batch_ndim: int) -> Tensor | None:
        """J for each sample, (batch..., n, n) for n numbers in a sample; None if F calls an ``autograd.Function``."""
        if not self._is_known:
            return None
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
        with self._quiet:
            try:
                return vector_jacobian(self._edges, self._inputs, v, batched=True)
            except RuntimeError:  # an operation that vmap refuses
                each = [vector_jacobian(self._edges, self._inputs, one) for one in zip(*v, strict=True)]
                return [torch.stack(parts) for parts in zip(*each, strict=True)]
