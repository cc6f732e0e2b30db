"""Contractive cells ``h = cell(h, x)`` as modules, small enough to differentiate 600 steps of."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

Parameters = dict[str, Tensor]


class Injected(nn.Module):
    """tanh(W h + b + x), whose input has the state's shape."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        nn.init.orthogonal_(self.linear.weight, gain=0.5)

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(h) + x)


class Dense(nn.Module):
    """tanh(W h + U x)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden, self.input = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        nn.init.orthogonal_(self.hidden.weight, gain=0.9)

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.hidden(h) + self.input(x))


class ConvolutionBlock(nn.Module):
    """Convolution, group normalization, ReLU and convolution; x is injected before the normalization."""

    def __init__(self, channels: int, groups: int, scale: float) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.GroupNorm(groups, channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.scale = scale

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        return self.scale * self.second(torch.relu(self.norm(self.first(h) + x)))


class Gated(nn.Module):
    """A gated recurrent unit that is fed the same x at every step."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.unit = nn.GRUCell(width, width)
        nn.init.orthogonal_(self.unit.weight_hh, gain=0.5)

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        return self.unit(x, h)


class SelfAttention(nn.Module):
    """Attention with two heads over h + x, scaled and added to x; h is (batch, tokens, width)."""

    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.scale = scale

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(h + x).chunk(3, dim=-1))
        weights = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1)
        return x + self.scale * self.out((weights @ v).transpose(1, 2).flatten(2))


@dataclass(frozen=True)
class Cell:
    """A module and the shape of its state."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]

    def build(self, seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
        """The module, h0 = 0, and an x that wants a gradient."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            module = self.make().double()
            x = torch.randn(self.shape, dtype=torch.float64, requires_grad=True)
        return module, torch.zeros_like(x), x


def explicit(module: nn.Module) -> Callable[[Tensor, tuple[Tensor, Parameters]], Tensor]:
    """F with the parameters in z = (x, parameters)."""
    return lambda h, z: functional_call(module, z[1], (h, z[0]))


CELLS = [
    Cell("dense", lambda: Dense(5), (3, 5)),
    Cell("convolution", lambda: ConvolutionBlock(4, groups=2, scale=2.0), (2, 4, 4, 4)),
    Cell("gated", lambda: Gated(5), (3, 5)),
    Cell("attention", lambda: SelfAttention(6, scale=1.2), (2, 3, 6)),
]
