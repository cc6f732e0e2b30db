"""The root of a module as a layer of PyTorch: gradients by the implicit function theorem, and what modules do."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import implicit_core as ic
from implicit_core.adapters import torch as ict

TIGHT = {"solver": ic.Polyalgorithm(rtol=1e-12), "gradient": ic.Implicit(ic.GMRES(rtol=1e-12))}


class Cell(nn.Module):
    """-3 (h + a h³ - tanh(W h + b) - x), which decreases where it moves."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.cubic = nn.Parameter(torch.tensor(0.5))

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        return -3 * (h + self.cubic * h**3 - torch.tanh(self.inner(h)) - x)


def layer_and_input(**options: Any) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    layer = ict.RootLayer(Cell().double(), **{**TIGHT, **options})
    return layer, torch.randn(3, 4, dtype=torch.float64).requires_grad_()


def by_theorem(cell: nn.Module, h: Tensor, x: Tensor) -> list[Tensor]:
    """The gradients of Σ sin h for x and the parameters: -(∂g/∂h)⁻ᵀ cos h, pulled back."""
    h, x = h.detach(), x.detach().requires_grad_()
    jacobians = [torch.autograd.functional.jacobian(lambda a, i=i: cell(a, x[i]), h[i]) for i in range(len(h))]
    w = torch.stack([torch.linalg.solve(j.T, a.cos()) for j, a in zip(jacobians, h, strict=True)])
    return list(torch.autograd.grad(cell(h, x), [x, *cell.parameters()], -w))


@pytest.mark.parametrize("options", [{}, {"scale": 0.1, "g_scale": 7.0}, {"solver": ic.Newton(rtol=1e-12)}])
def test_gradients_reach_x_and_the_parameters(options: dict[str, Any]) -> None:
    layer, x = layer_and_input(**options)
    h = layer(x)
    assert layer.cell(h, x).abs().max() < 1e-10
    assert layer.status.tolist() == [ic.CONVERGED] * 3
    assert (layer.samples, layer.unconverged) == (3, 0)
    found = torch.autograd.grad(h.sin().sum(), [x, *layer.parameters()])
    for ours, theirs in zip(found, by_theorem(layer.cell, h, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


def test_neumann_and_unroll_know_the_sign_of_the_cell() -> None:
    for gradient in (ic.Neumann(k=200, lam=0.5), ic.Unroll(k=200, lam=0.5)):
        layer, x = layer_and_input(gradient=gradient)
        h = layer(x)
        found = torch.autograd.grad(h.sin().sum(), [x, *layer.parameters()])
        for ours, theirs in zip(found, by_theorem(layer.cell, h, x), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


def test_state_dict_copies_and_functional_call() -> None:
    layer, x = layer_and_input()
    assert list(layer.state_dict()) == ["cell.cubic", "cell.inner.weight", "cell.inner.bias"]
    other, _ = layer_and_input()
    nn.init.zeros_(other.cell.inner.weight)
    other.load_state_dict(copy.deepcopy(layer).state_dict())
    torch.testing.assert_close(other(x), layer(x))
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    found = torch.func.grad(lambda p: functional_call(layer, p, (x.detach(),)).sin().sum())(parameters)
    for ours, theirs in zip(found.values(), by_theorem(layer.cell, layer(x), x)[1:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


def test_compiled() -> None:
    layer, x = layer_and_input()
    h = torch.compile(layer, backend="eager")(x)
    found = torch.autograd.grad(h.sin().sum(), [x, *layer.parameters()])
    for ours, theirs in zip(found, by_theorem(layer.cell, h, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning", "ignore::FutureWarning")
def test_a_recorded_program() -> None:
    """A solver without a Jacobian makes its steps in the program, and the layer's value is its point."""
    layer, x = layer_and_input(eval_solver=ic.Anderson(max_steps=12, rtol=1e-9))
    layer.eval()
    with torch.no_grad():
        for program in (torch.export.export(layer, (x,), strict=False).module(), torch.jit.trace(layer, (x,))):
            torch.testing.assert_close(program(x + 0.3), layer(x + 0.3), rtol=1e-8, atol=1e-9)
    for gradient in (ic.Unroll(2, 0.5), ic.BPTT(2)):
        layer.gradient = gradient
        with pytest.raises(NotImplementedError, match="takes a product with ∂g/∂x, which an exported program cannot"):
            torch.export.export(layer, (x,), strict=False)


def test_a_bracket_for_each_number() -> None:
    x = torch.tensor([[2.0, 10.0], [-30.0, 0.0]], dtype=torch.float64, requires_grad=True)
    weight = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
    layer = ict.RootLayer(lambda h, x: h**3 + weight * h - x, solver=ic.Brent(-5.0, 5.0, rtol=1e-12), batch_ndim=2)
    h = layer(x)
    torch.testing.assert_close(h.detach(), torch.tensor([[1.0, 2.0], [-3.0, 0.0]], dtype=torch.float64))
    found = torch.autograd.grad(h.sum(), [x, weight])
    slope = (3 * h**2 + 1).detach()
    torch.testing.assert_close(found, (1 / slope, -(h.detach() / slope).sum()))


def test_certificate() -> None:
    """Of F = h - α g: the exact gradient is the gradient."""
    layer, x = layer_and_input()
    found = layer.certify(x[:2], steps=10, cotangent=torch.ones(2, 4, dtype=torch.float64))
    assert found.cosine == pytest.approx(1.0, abs=1e-6)


def test_errors_speak_of_the_cell() -> None:
    x = torch.zeros(3, 2)
    with pytest.raises(ValueError, match="the result of the cell must have the shape of h") as raised:
        ict.RootLayer(lambda h, x: h[:, :1])(x)
    assert "give RootLayer an h0" in raised.value.__notes__[0]
    with pytest.raises(ic.CoupledSamplesError, match="RootLayer: "):
        ict.RootLayer(lambda h, x: h - h.mean(0) / 2 - x)(x.requires_grad_())
    with pytest.raises(TypeError, match="RootLayer computes with tensors"):
        ict.RootLayer(lambda h, x: h)([1.0], [1.0])
    with pytest.raises(ValueError, match="g_scale must"):
        ict.RootLayer(lambda h, x: h, g_scale=0.0)
