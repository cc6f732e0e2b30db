"""The multiscale deep equilibrium model (MDEQ) for images, in PyTorch.

It follows S. Bai, V. Koltun and J. Z. Kolter, *Multiscale Deep Equilibrium Models* (NeurIPS 2020), and has the layers,
the parameters and the initial values of the code that Z. Geng et al., *On Training Implicit Models* (NeurIPS 2021),
published with their experiments.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import relu
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import is_parametrized

import implicit_core as ic
from implicit_core.adapters import torch as ict
from implicit_core.estimators import AtFixedPoint
from implicit_core.solvers import FixedPointSolver

from .sizes import Sizes

State: TypeAlias = tuple[Tensor, ...]
"""One tensor (n, channels, height, width) for each branch; height and width are halved from branch to branch."""


def convolution(channels_in: int, channels_out: int, kernel: int = 3, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    """A convolution that keeps height and width, but for the stride."""
    return nn.Conv2d(channels_in, channels_out, kernel, stride, padding=kernel // 2, bias=bias)


class Block(nn.Module):
    """A residual block of two convolutions, the first of which widens.

    The convolutions are weight-normed. The injection enters between them and the norms, which keep the state bounded
    whatever the weights are. Each norm acts on a sample by itself, so that the samples are systems of their own.
    """

    def __init__(self, channels: int, expansion: int, groups: int, dropout: float) -> None:
        super().__init__()
        inner = expansion * channels
        self.widen = weight_norm(convolution(channels, inner))
        self.widen_norm = nn.GroupNorm(groups, inner)
        self.narrow = weight_norm(convolution(inner, channels))
        self.dropout = ict.VariationalDropout(dropout, dims=(-2, -1))  # whole channels
        self.narrow_norm = nn.GroupNorm(groups, channels)
        self.norm = nn.GroupNorm(groups, channels)

    def forward(self, h: Tensor, injection: Tensor | None) -> Tensor:
        """Of the shape of h."""
        y = self.dropout(self.narrow(relu(self.widen_norm(self.widen(h)))))
        if injection is not None:
            y = y + injection
        out: Tensor = self.norm(relu(self.narrow_norm(y) + h))
        return out


def downward(channels_in: int, channels_out: int, levels: int, groups: int) -> nn.Sequential:
    """From a branch to one ``levels`` below: as many convolutions of stride 2."""
    parts: list[nn.Module] = []
    for level in range(levels):
        last = level == levels - 1
        out = channels_out if last else channels_in
        parts += [convolution(channels_in, out, stride=2), nn.GroupNorm(groups, out), *([] if last else [nn.ReLU()])]
    return nn.Sequential(*parts)


def upward(channels_in: int, channels_out: int, levels: int, groups: int) -> nn.Sequential:
    """From a branch to one ``levels`` above: a convolution of single pixels, then each pixel repeated."""
    return nn.Sequential(
        convolution(channels_in, channels_out, kernel=1),
        nn.GroupNorm(groups, channels_out),
        nn.Upsample(scale_factor=2**levels),
    )


class Fusion(nn.Module):
    """Adds up what all branches send to one of them, and mixes its channels."""

    def __init__(self, into: int, channels: Sequence[int], groups: int) -> None:
        super().__init__()
        self.paths = nn.ModuleList()
        for origin, width in enumerate(channels):
            path: nn.Module = nn.Identity()
            if origin != into:
                make = upward if origin > into else downward
                path = make(width, channels[into], abs(origin - into), groups)
            self.paths.append(path)
        self.mix = weight_norm(convolution(channels[into], channels[into], kernel=1))
        self.norm = nn.GroupNorm(groups // 2, channels[into])

    def forward(self, branches: Sequence[Tensor]) -> Tensor:
        """Of the shape of the branch that it leads to."""
        first, *others = (path(h) for path, h in zip(self.paths, branches, strict=True))
        out: Tensor = self.norm(self.mix(relu(sum(others, start=first))))
        return out


class Cell(nn.Module):
    """The equilibrium map F(h, x): a residual block in each branch, then all branches are fused into each of them.

    The injection x enters the first branch, which has the full resolution. A model of one branch has no fusion.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        channels = sizes.channels
        self.blocks = nn.ModuleList(Block(c, sizes.expansion, sizes.groups, sizes.dropout) for c in channels)
        fused = range(len(channels)) if len(channels) > 1 else ()
        self.fusions = nn.ModuleList(Fusion(i, channels, sizes.groups) for i in fused)

    def forward(self, h: State, x: Tensor) -> State:
        """The state after one application, for the injection x (n, channels[0], height, width)."""
        injections = (x, *[None] * (len(h) - 1))
        branches = tuple(block(*given) for block, *given in zip(self.blocks, h, injections, strict=True))
        return tuple(fusion(branches) for fusion in self.fusions) if self.fusions else branches


def normed(channels_in: int, channels_out: int, **options: Any) -> nn.Sequential:
    """A convolution, a batch norm and a ReLU."""
    return nn.Sequential(
        convolution(channels_in, channels_out, **options), nn.BatchNorm2d(channels_out), nn.ReLU(inplace=True)
    )


def encoder(sizes: Sizes) -> nn.Sequential:
    """The injection of images: two convolutions, with stride 2 in the first ``sizes.halvings`` of them."""
    width = sizes.channels[0]
    parts = [
        normed(sizes.image_channels, width, stride=2 if sizes.halvings > 0 else 1),
        normed(width, width, stride=2 if sizes.halvings > 1 else 1),
    ]
    if sizes.halvings or len(sizes.channels) > 2:
        parts.append(normed(width, width, kernel=1))
    return nn.Sequential(*parts)


class Bottleneck(nn.Module):
    """Widens a branch for the head, to four times ``width``. Only the shortcut's norm has parameters."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        out = 4 * width
        self.body = nn.Sequential(
            convolution(channels, width, kernel=1),
            nn.BatchNorm2d(width, affine=False),
            nn.ReLU(inplace=True),
            convolution(width, width),
            nn.BatchNorm2d(width, affine=False),
            nn.ReLU(inplace=True),
            convolution(width, out, kernel=1),
            nn.BatchNorm2d(out, affine=False),
        )
        self.shortcut: nn.Module = nn.Identity()
        if channels != out:
            self.shortcut = nn.Sequential(convolution(channels, out, kernel=1), nn.BatchNorm2d(out))

    def forward(self, h: Tensor) -> Tensor:
        """(n, 4 width, height, width of the image)."""
        return relu(self.body(h) + self.shortcut(h))


class Head(nn.Module):
    """Logits from all branches: each is widened and added to what comes from above."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        widths = [4 * width for width in sizes.head]
        self.widen = nn.ModuleList(map(Bottleneck, sizes.channels, sizes.head))
        self.down = nn.ModuleList(normed(upper, lower, stride=2, bias=True) for upper, lower in pairwise(widths))
        self.final = normed(widths[-1], sizes.final, kernel=1, bias=True)
        self.classify = nn.Linear(sizes.final, sizes.classes)

    def forward(self, h: State) -> Tensor:
        """Logits (n, classes)."""
        first, *others = (widen(branch) for widen, branch in zip(self.widen, h, strict=True))
        y = first
        for down, branch in zip(self.down, others, strict=True):
            y = branch + down(y)
        logits: Tensor = self.classify(self.final(y).mean(dim=(-2, -1)))
        return logits


class MDEQ(nn.Module):
    """A multiscale deep equilibrium model that classifies images.

    Parameters
    ----------
    sizes
        Of its layers.
    solver, gradient
        Of the implicit layer. In eval mode the value is the solver's point: an estimator that makes steps of its own,
        such as ``Unroll``, is replaced by ``OneStep`` there, unless it is given in the call.

    Attributes
    ----------
    layer
        The implicit layer, which knows how its last solve went.

    Examples
    --------
    >>> import torch
    >>> import implicit_core as ic
    >>> from implicit_core.examples.mdeq.model import MDEQ
    >>> from implicit_core.examples.mdeq.sizes import TINY
    >>> model = MDEQ(TINY, solver=ic.steps(3), gradient=ic.Unroll(5, 0.5))
    >>> model(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    >>> sum(p.numel() for p in model.parameters())
    158986
    """

    def __init__(self, sizes: Sizes, solver: FixedPointSolver, gradient: ic.Estimator) -> None:
        super().__init__()
        self.sizes = sizes
        self.encoder = encoder(sizes)
        self.layer: ict.ImplicitLayer[Tensor, State] = ict.ImplicitLayer(
            Cell(sizes), solver=solver, gradient=gradient, h0=self.start
        )
        self.head = Head(sizes)
        self.apply(initialize)

    @property
    def stats(self) -> Any:
        """Statistics of the last solve, see :class:`~implicit_core.Solution`."""
        return self.layer.stats

    def start(self, x: Tensor) -> State:
        """Zeros, for the injection x (n, channels[0], height, width); in float32 where x is in half precision."""
        n, _, height, width = x.shape
        dtype = torch.promote_types(x.dtype, torch.float32)
        shapes = [(n, c, height >> i, width >> i) for i, c in enumerate(self.sizes.channels)]
        return tuple(x.new_zeros(shape, dtype=dtype) for shape in shapes)

    def forward(
        self, images: Tensor, *, solver: FixedPointSolver | None = None, gradient: ic.Estimator | None = None
    ) -> Tensor:
        """Logits (n, classes) of images (n, channels, height, width).

        ``solver`` and ``gradient`` are those of the layer, unless given.
        """
        if any(side % self.sizes.least_side for side in images.shape[-2:]):
            raise ValueError(
                f"height and width of the images must be multiples of {self.sizes.least_side} for "
                f"{len(self.sizes.channels)} branches, got {tuple(images.shape)}"
            )
        if not self.training and gradient is None and not isinstance(self.layer.gradient, AtFixedPoint):
            gradient = ic.OneStep()  # whose value is the solver's point
        logits: Tensor = self.head(self.layer(self.encoder(images), solver=solver, gradient=gradient))
        return logits


def initialize(module: nn.Module) -> None:
    """Initial values of a convolution: normal, of standard deviation 0.01.

    Those with a weight norm keep PyTorch's, as in the published code, where the norm hides them from this step.
    """
    if isinstance(module, nn.Conv2d) and not is_parametrized(module):
        nn.init.normal_(module.weight, std=0.01)
        if module.bias is not None:
            nn.init.normal_(module.bias, std=0.01)


def parameters(sizes: Sizes) -> int:
    """How many parameters a model has; none is allocated."""
    with torch.device("meta"):
        model = MDEQ(sizes, ic.steps(1), ic.OneStep())
    return sum(p.numel() for p in model.parameters())
