"""A model with an implicit layer, and its output by a plain loop and dense linear algebra."""

from typing import Any

import torch
from cells import Dense
from torch import Tensor, nn
from torch.autograd.functional import jacobian

import implicit_core as ic
from implicit_core.adapters import torch as ict

torch.set_num_threads(1)

STEPS = 400
"""Plain iteration of the cell, whose weight is 0.9 times an orthogonal matrix: 0.9 ** 400 is 5e-19."""

PHANTOM = [ic.OneStep(), ic.Neumann(4, 0.5)]
EXACT = ic.Implicit(ic.GMRES(rtol=1e-13))
UNROLLED = [ic.Unroll(3, 0.5), ic.Unroll(3, 0.5, recompute=True), ic.BPTT(6)]
ESTIMATORS = [*UNROLLED, *PHANTOM, EXACT]


def name(gradient: ic.Estimator) -> str:
    """A short name for a test."""
    return type(gradient).__name__


class Model(nn.Module):
    """A linear encoder, an implicit layer and a linear head, in float64."""

    def __init__(self, gradient: ic.Estimator = EXACT, cell: Any = None, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        cell = Dense(4) if cell is None else cell
        options = {"solver": ic.Anderson(rtol=1e-13, max_steps=200)} | options
        self.layer = ict.ImplicitLayer(cell, gradient=gradient, **options)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.encoder(x)))


def inputs(batch: int = 5, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Inputs and targets of a regression."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 3, generator=generator, dtype=torch.float64)
    return x, torch.stack([x.sum(1).sin(), x.prod(1)], dim=1)


def squares(output: Tensor, target: Tensor) -> Tensor:
    """The loss, a sum over samples."""
    return (output - target).square().sum()


def plain(model: nn.Module, x: Tensor) -> Tensor:
    """The output of a model without the library: its first derivatives are those of the layer's estimator.

    ``Unroll`` and ``BPTT`` are loops with their graph. For the others the fixed point is F(h) times the matrix
    D of the estimator, computed for each sample from its dense Jacobian.
    """
    cell, gradient, z = model.layer.cell, model.layer.gradient, model.encoder(x)
    h = torch.zeros_like(z)
    if isinstance(gradient, ic.BPTT):
        for _ in range(gradient.k):
            h = cell(h, z)
        return model.head(h)
    with torch.no_grad():
        for _ in range(STEPS):
            h = cell(h, z)
    if isinstance(gradient, ic.Unroll):
        for _ in range(gradient.k):
            h = (1 - gradient.lam) * h + gradient.lam * cell(h, z)
        return model.head(h)
    f = cell(h, z)
    matrices = torch.stack([inverse(gradient, cell, *sample) for sample in zip(h, z.detach(), strict=True)])
    return model.head(h + torch.einsum("nij,nj->ni", matrices, f - f.detach()))


def inverse(gradient: ic.Estimator, cell: nn.Module, h: Tensor, z: Tensor) -> Tensor:
    """D, which replaces (I - J)⁻¹, for one sample."""
    j, identity = jacobian(lambda h: cell(h[None], z[None])[0], h), torch.eye(len(h), dtype=h.dtype)
    if isinstance(gradient, ic.Implicit):
        return torch.linalg.inv(identity - j)
    k, lam = (1, 1.0) if isinstance(gradient, ic.OneStep) else (gradient.k, gradient.lam)
    b = lam * j + (1 - lam) * identity
    return lam * sum(torch.linalg.matrix_power(b, i) for i in range(k))


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    """The gradient of each parameter that requires one."""
    chosen = {key: p for key, p in model.named_parameters() if p.requires_grad}
    return dict(zip(chosen, torch.autograd.grad(loss, chosen.values()), strict=True))


def close(ours: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 1e-9) -> None:
    """Fail where one of the tensors differs."""
    assert ours.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(ours[key], value, atol=atol, rtol=1e-9, msg=lambda m, key=key: f"{key}: {m}")
