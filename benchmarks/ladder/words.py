"""Word problems of the alternating group A5: the product of all elements of a sequence up to each of them.

A5 is the smallest group in which such products cannot be computed by a circuit of constant depth, unless NC1 = TC0: a
model needs a number of layers, or of recursions, that grows with the sequence. This one is a recurrent network,
h_t = cell(h_{t-1}, x_t), of which a recursion computes all positions at once from the recursion before. Its fixed
point is the state of the recurrent network, which T recursions reach in sequences of T elements, and k recursions with
a graph are backpropagation through time that is cut off after k elements.
"""

from itertools import permutations
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

import implicit_core as ic
from implicit_core.adapters import torch as ict
from implicit_core.examples.recursive.model import Prediction

ORDER = 60


def group() -> np.ndarray[Any, Any]:
    """The table of products of A5, in which the element 0 is the identity: (60, 60)."""
    every = np.array(list(permutations(range(5))))
    sign = np.array([np.linalg.det(np.eye(5)[p]) for p in every])
    even = every[sign > 0]
    place = {tuple(p): i for i, p in enumerate(even.tolist())}
    return np.array([[place[tuple(p[q])] for q in even] for p in even])


def words(rng: np.random.Generator, count: int, length: int) -> tuple[Tensor, Tensor]:
    """Random sequences, and the product x_t ... x_1 at each position: integers (count, length)."""
    table, elements = group(), rng.integers(ORDER, size=(count, length))
    products = elements.copy()
    for t in range(1, length):
        products[:, t] = table[elements[:, t], products[:, t - 1]]
    return torch.as_tensor(elements), torch.as_tensor(products)


class Recurrence(nn.Module):
    """F(h, x): every position from the one before it, for h (n, length, width) and x (n, length, rank)."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.net = Bilinear(width, rank)
        self.first = nn.Parameter(torch.randn(width))

    def forward(self, h: tuple[Tensor], x: Tensor) -> tuple[Tensor]:
        """The states, one recursion further."""
        first = self.first.expand(len(x), 1, -1)
        return (self.net(torch.cat([first, h[0][:, :-1]], dim=1), x),)


class Bilinear(nn.Module):
    """A linear map of h for each element, of which x has the weights, and a norm."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False)

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        """Of the shape of h."""
        return rms_norm(self.outer(self.inner(h) * x), h.shape[-1:])


class WordModel(nn.Module):
    """Logits of the products of sequences, with the interface of the recursive model."""

    def __init__(self, width: int, rank: int, solver: ic.FixedPointIteration, gradient: ic.Estimator) -> None:
        super().__init__()
        self.elements = nn.Embedding(ORDER, rank)
        self.layer: ict.ImplicitLayer[Tensor, tuple[Tensor]] = ict.ImplicitLayer(
            Recurrence(width, rank), solver=solver, gradient=gradient
        )
        self.head = nn.Linear(width, ORDER, bias=False)
        self.right = nn.Linear(width, 1)

    def start(self, inputs: Tensor) -> tuple[Tensor]:
        """Zeros."""
        weight = self.head.weight
        return (torch.zeros(*inputs.shape, weight.shape[1], dtype=weight.dtype, device=weight.device),)

    def forward(self, inputs: Tensor, state: tuple[Tensor], **options: Any) -> Prediction:
        """The prediction for sequences (n, length); the options are those of the layer's call."""
        (h,) = self.layer(self.elements(inputs), state, **options)
        return Prediction(self.head(h), self.right(h.mean(dim=1)).squeeze(1), (h.detach(),))  # type: ignore[arg-type]  # its state
