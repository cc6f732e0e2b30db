"""Attributions by captum, through and within a layer."""

import numpy as np
import pytest
import torch
from cells import Dense
from packages.models import ESTIMATORS, EXACT, STEPS, Model, inputs, inverse, name, plain
from torch import Tensor, nn

import implicit_core as ic

attr = pytest.importorskip("captum.attr", reason="captum is not installed")

TARGET = 1
NODES, WEIGHTS = (torch.tensor(x) for x in np.polynomial.legendre.leggauss(50))


def gradient_of_inputs(model: Model, x: Tensor) -> Tensor:
    """The gradient of the target's output, by a plain loop."""
    x = x.clone().requires_grad_()
    return torch.autograd.grad(plain(model, x)[:, TARGET].sum(), x)[0]


@pytest.mark.parametrize("gradient", ESTIMATORS, ids=name)
def test_attributions_by_gradients_are_those_of_the_estimator(gradient: ic.Estimator) -> None:
    model, (x, _) = Model(gradient), inputs()
    expected = gradient_of_inputs(model, x)
    saliency = attr.Saliency(model).attribute(x, target=TARGET, abs=False)
    torch.testing.assert_close(saliency, expected, atol=1e-10, rtol=0)
    product = attr.InputXGradient(model).attribute(x, target=TARGET)
    torch.testing.assert_close(product, x * expected, atol=1e-10, rtol=0)
    path = sum(w / 2 * gradient_of_inputs(model, (t + 1) / 2 * x) for t, w in zip(NODES, WEIGHTS, strict=True))
    integrated = attr.IntegratedGradients(model).attribute(x, target=TARGET, n_steps=50)
    torch.testing.assert_close(integrated, x * path, atol=1e-9, rtol=0)


def test_integrated_gradients_sum_to_the_difference_only_with_the_exact_gradient() -> None:
    x, _ = inputs()

    def excess(model: Model) -> float:
        difference = (plain(model, x) - plain(model, torch.zeros_like(x)))[:, TARGET]
        sums = attr.IntegratedGradients(model).attribute(x, target=TARGET).sum(1)
        return (sums - difference).abs().max().item()

    assert excess(Model(EXACT)) < 1e-8
    assert excess(Model(ic.OneStep())) > 1e-2


@pytest.mark.parametrize("gradient", [EXACT, ic.Neumann(4, 0.5)], ids=name)
def test_a_layer_is_seen_at_its_fixed_point_and_its_cell_with_the_solved_cotangent(gradient: ic.Estimator) -> None:
    model, (x, _) = Model(gradient), inputs()
    with torch.no_grad():
        z = model.encoder(x)
        h = torch.zeros_like(z)
        for _ in range(STEPS):
            h = model.layer.cell(h, z)
    v = model.head.weight[TARGET].detach()
    w = torch.stack([inverse(gradient, model.layer.cell, *sample).T @ v for sample in zip(h, z, strict=True)])
    for part, cotangent in ((model.layer, v), (model.layer.cell, w)):
        torch.testing.assert_close(attr.LayerActivation(model, part).attribute(x), h, atol=1e-10, rtol=0)
        product = attr.LayerGradientXActivation(model, part).attribute(x, target=TARGET)
        torch.testing.assert_close(product, cotangent * h, atol=1e-10, rtol=0)
        cam = attr.LayerGradCam(model, part).attribute(x, target=TARGET)
        torch.testing.assert_close(cam, (cotangent * h).sum(1, keepdim=True), atol=1e-10, rtol=0)


class WithModules(Dense):
    """The same cell with its nonlinearity as a module, which DeepLift replaces the derivative of."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.tanh = nn.Tanh()

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        return self.tanh(self.hidden(h) + self.input(x))


def test_deep_lift_refuses_a_cell_whose_nonlinearity_is_a_module() -> None:
    """It replaces the derivative at each call of the module, and a solve calls it without a graph."""
    model, (x, _) = Model(EXACT, WithModules(4)), inputs()
    with pytest.raises(RuntimeError, match="cannot register a hook on a tensor that doesn't require gradient"):
        attr.DeepLift(model).attribute(x, torch.zeros_like(x), target=TARGET)


def test_deep_lift_does_not_see_a_function_and_its_attributions_do_not_add_up() -> None:
    model, (x, _) = Model(EXACT), inputs()
    baselines = torch.zeros_like(x)
    found, delta = attr.DeepLift(model).attribute(x, baselines, target=TARGET, return_convergence_delta=True)
    torch.testing.assert_close(found, x * gradient_of_inputs(model, x), atol=1e-9, rtol=0)  # nothing was replaced
    assert delta.abs().max() > 1e-2
