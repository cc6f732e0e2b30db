"""The classifier: a convolutional encoder, an implicit layer, and a linear output."""

from torch import Tensor, nn
from torch.nn.functional import relu
from torch.nn.utils.parametrizations import weight_norm

import implicit_core as ic
from implicit_core.adapters import torch as ict

from .settings import GROUPS, RTOL

CLASSES = 10
SOLVER = ic.Anderson(rtol=RTOL, max_steps=50)

GAIN = 0.25
"""Initial weight of the norm that closes the cell: small enough for F to start as a contraction in h."""


def convolution(channels_in: int, channels_out: int, kernel: int = 3, stride: int = 1) -> nn.Conv1d:
    """A convolution that keeps the length, but for the stride."""
    return nn.Conv1d(channels_in, channels_out, kernel, stride, padding=kernel // 2)


class Cell(nn.Module):
    r"""The equilibrium map, for h and x of shape (n, channels, length).

    .. math:: F(h, x) = \mathrm{relu}(x + \mathrm{norm}(W_2 * \mathrm{norm}(\mathrm{relu}(W_1 * h))))

    It follows the blocks of S. Bai, V. Koltun and J. Z. Kolter, *Multiscale Deep Equilibrium Models* (NeurIPS 2020), in
    its group norms and its weight-normed convolutions W. The norms act on each sample by itself; with batch norms, the
    samples would not be systems of their own.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = weight_norm(convolution(channels, channels))
        self.inner_norm = nn.GroupNorm(GROUPS, channels)
        self.outer = weight_norm(convolution(channels, channels))
        self.outer_norm = nn.GroupNorm(GROUPS, channels)
        nn.init.constant_(self.outer_norm.weight, GAIN)

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        """F(h, x)."""
        inner = self.inner_norm(relu(self.inner(h)))
        return relu(x + self.outer_norm(self.outer(inner)))


class Classifier(nn.Module):
    """Logits (n, 10) of signals (n, 1, length).

    Attributes
    ----------
    layer
        The implicit layer, which knows how its last solve went.
    """

    def __init__(self, channels: int, gradient: ic.Estimator) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            convolution(1, channels, kernel=5),
            nn.GroupNorm(GROUPS, channels),
            nn.ReLU(),
            convolution(channels, channels, kernel=5, stride=2),
            nn.GroupNorm(GROUPS, channels),
        )
        self.layer = ict.ImplicitLayer(Cell(channels), solver=SOLVER, gradient=gradient)
        self.output = nn.Linear(channels, CLASSES)

    def forward(self, signals: Tensor) -> Tensor:
        """Class scores, from the maximum of the fixed point over time."""
        logits: Tensor = self.output(self.layer(self.encoder(signals)).amax(dim=-1))
        return logits
