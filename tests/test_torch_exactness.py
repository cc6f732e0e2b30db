"""Every estimator that converges to the exact gradient, against autograd through 600 undamped steps in float64."""

from functools import cache
from typing import Any

import pytest
import torch
from cells import CELLS, Cell, explicit
from torch import Tensor, nn

import implicit_core as ic

ESTIMATORS = [
    ic.Implicit(ic.GMRES(rtol=1e-12)),
    ic.Neumann(400, 1.0),
    ic.Neumann(400, 0.9),
    ic.Unroll(400, 1.0),
    ic.Unroll(400, 0.9),
    ic.Unroll(400, 0.9, recompute=True),
    ic.BPTT(400),
]
FORMS = ["closed over", "explicit"]

pytestmark = pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)


def loss(h: Tensor) -> Tensor:
    return (h**3 + torch.linspace(-1.0, 1.0, h.numel(), dtype=h.dtype).view_as(h) * h).sum()


@cache
def reference(cell: Cell) -> tuple[Tensor, tuple[Tensor, ...]]:
    """h after 600 steps, at rest, and the gradients of x and of all parameters through them."""
    module, h, x = cell.build()
    for _ in range(600):
        h = module(h, x)
    assert torch.linalg.vector_norm(module(h, x) - h) < 1e-14 * torch.linalg.vector_norm(h)
    gradients = torch.autograd.grad(loss(h), (x, *module.parameters()))
    assert all(gradient.abs().max() > 0.1 for gradient in gradients), "1e-7 is small compared with them"
    return h.detach(), gradients


def call(form: str, module: nn.Module, x: Tensor) -> tuple[Any, Any, tuple[Tensor, ...]]:
    """F and z with the parameters in the module or in z, and what to differentiate with respect to."""
    if form == "closed over":
        return module, x, (x, *module.parameters())
    parameters = {name: p.detach().requires_grad_() for name, p in module.named_parameters()}
    return explicit(module), (x, parameters), (x, *parameters.values())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_many_terms_give_the_gradient_of_600_steps(cell: Cell, estimator: ic.Estimator, form: str) -> None:
    root, expected = reference(cell)
    module, h0, x = cell.build()
    f, z, sources = call(form, module, x)
    solver = ic.Anderson(rtol=1e-14, max_steps=200)
    value = ic.fixed_point(f, h0, z, solver=solver, gradient=estimator, batch_ndim=1).value
    torch.testing.assert_close(value, root, atol=1e-12, rtol=0)
    torch.testing.assert_close(torch.autograd.grad(loss(value), sources), expected, atol=1e-7, rtol=0)


@pytest.mark.parametrize("form", FORMS)
def test_one_step_is_one_pullback_at_the_fixed_point(cell: Cell, form: str) -> None:
    root, exact = reference(cell)
    module, _, x = cell.build()
    f, z, sources = call(form, module, x)
    value = ic.fixed_point(f, root, z, gradient=ic.OneStep(), batch_ndim=1).value
    gradients = torch.autograd.grad(loss(value), sources)
    h = root.clone().requires_grad_()
    cotangent = torch.autograd.grad(loss(h), h)[0]
    expected = torch.autograd.grad(f(root, z), sources, cotangent)
    torch.testing.assert_close(gradients, expected, atol=1e-12, rtol=0)
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(gradients, exact, strict=True))
