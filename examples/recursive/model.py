"""A tiny recursive model in PyTorch: an answer y and a latent z, which one network improves in turn."""

from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, silu

import implicit_core as ic
from implicit_core.adapters import torch as ict

from .sudoku import CELLS, DIGITS, Array

State: TypeAlias = tuple[Tensor, Tensor]
"""The answer y and the latent z, each (n, 36, width)."""


class SwiGLU(nn.Module):
    """A gated layer over the last axis, by N. Shazeer, *GLU variants improve transformer* (2020)."""

    def __init__(self, width: int, expansion: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, 2 * expansion * width, bias=False)
        self.outer = nn.Linear(expansion * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Of the shape of x."""
        gate, value = self.inner(x).chunk(2, dim=-1)
        return self.outer(silu(gate) * value)  # type: ignore[no-any-return]  # a tensor


class Block(nn.Module):
    """Mixes the cells, then the channels, of x (n, 36, width). Each sum is normalized, so that no state grows."""

    def __init__(self, width: int, expansion: int) -> None:
        super().__init__()
        self.cells, self.channels = SwiGLU(CELLS, expansion), SwiGLU(width, expansion)

    def forward(self, x: Tensor) -> Tensor:
        """Of the shape of x."""
        x = rms_norm(x + self.cells(x.mT).mT, x.shape[-1:])
        return rms_norm(x + self.channels(x), x.shape[-1:])


class Recursion(nn.Module):
    """F((y, z), x), one recursion: ``steps`` times z ← net(x + y + z), then y ← net(y + z)."""

    def __init__(self, net: nn.Module, steps: int) -> None:
        super().__init__()
        self.net, self.steps = net, steps

    def forward(self, h: State, x: Tensor) -> State:
        """The next state (y, z), for the embedded puzzle x (n, 36, width)."""
        y, z = h
        z = self.latent(z, x + y)
        return self.net(y + z), z

    def latent(self, z: Tensor, given: Tensor) -> Tensor:
        """The new z: (n, 36, width)."""
        for _ in range(self.steps):
            z = self.net(given + z)
        return z


class LastStepRecursion(Recursion):
    """The same recursion, in which the gradient passes through the last step of z alone.

    So do the hierarchical reasoning models of G. Wang et al. (2025).
    """

    def latent(self, z: Tensor, given: Tensor) -> Tensor:
        """See :class:`Recursion`: a solve of ``steps`` - 1 steps without a graph, then one with it."""

        def step(z: Tensor, given: Tensor) -> Tensor:
            return self.net(given + z)  # type: ignore[no-any-return]  # a tensor

        solver, gradient = ic.steps(self.steps - 1), ic.Unroll(1, 1.0)
        return ic.fixed_point(step, z, given, solver=solver, gradient=gradient, batch_ndim=1).value


class Prediction(NamedTuple):
    """What the model says of n puzzles.

    Attributes
    ----------
    logits
        Of the digits 1 to 6 in each cell: (n, 36, 6).
    solved
        The logit of its belief that all of them are right: (n,).
    state
        Where the next call starts, without a graph.
    """

    logits: Tensor
    solved: Tensor
    state: State


class RecursiveModel(nn.Module):
    """Improves the answers to puzzles by some recursions, each time it is called.

    It follows A. Jolicoeur-Martineau, *Less is more: recursive reasoning with tiny networks* (2025), with the mixer in
    place of attention.

    Parameters
    ----------
    width
        Channels of a cell.
    steps
        Updates of the latent in a recursion.
    solver, gradient
        The recursions of a call, and their derivative.
    last_step
        Whether the gradient of a recursion passes through the last update of its latent alone.

    Examples
    --------
    >>> import torch
    >>> import implicit_core as ic
    >>> from implicit_core.examples.recursive.model import RecursiveModel
    >>> model = RecursiveModel(width=16, steps=2, solver=ic.steps(2), gradient=ic.Unroll(1, 1.0))
    >>> clues = torch.zeros(5, 36, dtype=torch.long)
    >>> state = model.start(clues)
    >>> for _ in range(4):  # steps of supervision
    ...     logits, solved, state = model(clues, state)
    >>> logits.shape, solved.shape
    (torch.Size([5, 36, 6]), torch.Size([5]))
    """

    def __init__(
        self,
        width: int,
        steps: int,
        solver: ic.FixedPointIteration,
        gradient: ic.Estimator,
        *,
        expansion: int = 2,
        last_step: bool = False,
    ) -> None:
        super().__init__()
        self.digits = nn.Embedding(DIGITS + 1, width)
        self.positions = nn.Embedding(CELLS, width)
        net = nn.Sequential(*(Block(width, expansion) for _ in range(2)))
        cell = (LastStepRecursion if last_step else Recursion)(net, steps)
        self.layer: ict.ImplicitLayer[Tensor, State] = ict.ImplicitLayer(cell, solver=solver, gradient=gradient)
        self.head = nn.Linear(width, DIGITS, bias=False)
        self.halt = nn.Linear(width, 1)

    @property
    def recursion(self) -> Recursion:
        """F, the cell of the implicit layer."""
        return self.layer.cell  # type: ignore[return-value]  # as it was made

    def start(self, clues: Tensor | Array) -> State:
        """The state of puzzles before the first call: zeros."""
        weight = self.digits.weight
        y = torch.zeros(*clues.shape, weight.shape[1], dtype=weight.dtype, device=weight.device)
        return y, y.clone()

    def forward(
        self,
        clues: Tensor,
        state: State,
        *,
        solver: ic.FixedPointIteration | None = None,
        gradient: ic.Estimator | None = None,
    ) -> Prediction:
        """The prediction for clues (n, 36) after more recursions.

        ``solver`` and ``gradient`` are those of the layer, unless given.
        """
        y, z = self.layer(self.embed(clues), state, solver=solver, gradient=gradient)
        return Prediction(*self.read(y), (y.detach(), z.detach()))

    def embed(self, clues: Tensor | Array) -> Tensor:
        """The puzzle as the recursions see it: (n, 36, width)."""
        return self.digits(torch.as_tensor(clues)) + self.positions.weight  # type: ignore[no-any-return]  # a tensor

    def read(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The logits (n, 36, 6) of an answer, and of the belief that it is right: (n,)."""
        return self.head(y), self.halt(y.mean(dim=1)).squeeze(1)
