"""Differentiable inner optimizers of TorchOpt, whose steps are derivatives of the layer: second derivatives."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from packages.models import EXACT, Model, inputs, name, plain, squares
from torch import Tensor
from torch.func import functional_call

import implicit_core as ic

torchopt = pytest.importorskip("torchopt", reason="torchopt is not installed")

LONG = ic.Unroll(300, 1.0)
"""Long enough that it does not matter that the steps start at a constant."""

STEPS, RATE = 3, 0.05
Inner = Callable[[Model, Tensor, Callable[[Model, Tensor], Tensor]], Tensor]


def call(model: Model, x: Tensor) -> Tensor:
    """The model with its layer."""
    return model(x)


def inner_loss(model: Model, meta: Tensor, forward: Callable[[Model, Tensor], Tensor]) -> Tensor:
    """A loss with weight decay, and a shift of the inputs: both are trained by the outer problem."""
    x, y = inputs(5)
    decay = sum(p.square().sum() for p in model.parameters())
    return squares(forward(model, x + meta[1:]), y) / len(x) + meta[0] * decay


def outer_loss(model: Model, forward: Callable[[Model, Tensor], Tensor]) -> Tensor:
    """The loss on other data, after the inner steps."""
    x, y = inputs(6, seed=2)
    return squares(forward(model, x), y) / len(x)


def by_meta_optimizer(make: Any) -> Inner:
    """Inner steps in place, with their graph."""

    def run(model: Model, meta: Tensor, forward: Callable[[Model, Tensor], Tensor]) -> Tensor:
        optimizer = make(model, lr=RATE)
        for _ in range(STEPS):
            optimizer.step(inner_loss(model, meta, forward))
        return outer_loss(model, forward)

    return run


class Functional:
    """A model with given parameters, called like the model."""

    def __init__(self, model: Model, parameters: dict[str, Tensor]) -> None:
        self.model, self.values = model, parameters

    def __call__(self, x: Tensor) -> Tensor:
        return functional_call(self.model, self.values, (x,))

    def parameters(self) -> Any:
        return self.values.values()


def by_autograd(loss: Callable[[dict[str, Tensor]], Tensor], at: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(zip(at, torch.autograd.grad(loss(at), at.values(), create_graph=True), strict=True))


def by_func_grad(loss: Callable[[dict[str, Tensor]], Tensor], at: dict[str, Tensor]) -> dict[str, Tensor]:
    return torch.func.grad(loss)(at)


def functionally(make: Any, differentiate: Any) -> Inner:
    """Inner steps as functions of parameters."""

    def run(model: Model, meta: Tensor, forward: Callable[[Model, Tensor], Tensor]) -> Tensor:
        assert forward is call
        parameters = dict(model.named_parameters())
        optimizer = make(lr=RATE)
        state = optimizer.init(parameters)
        for _ in range(STEPS):
            found = differentiate(lambda p: inner_loss(Functional(model, p), meta, call), parameters)
            updates, state = optimizer.update(found, state, inplace=False)
            parameters = torchopt.apply_updates(parameters, updates, inplace=False)
        return outer_loss(Functional(model, parameters), call)

    return run


RUNS = {
    "MetaSGD": by_meta_optimizer(torchopt.MetaSGD),
    "MetaAdam": by_meta_optimizer(torchopt.MetaAdam),
    "sgd": functionally(torchopt.sgd, by_autograd),
    "adam": functionally(torchopt.adam, by_autograd),
    "adam, torch.func": functionally(torchopt.adam, by_func_grad),
}
META = torch.tensor([0.02, 0.1, -0.2, 0.3], dtype=torch.float64)


def gradient_of(run: Inner, gradient: ic.Estimator, forward: Callable[[Model, Tensor], Tensor] = call) -> Tensor:
    """The outer gradient, back through the inner steps."""
    meta = META.clone().requires_grad_()
    return torch.autograd.grad(run(Model(gradient), meta, forward), meta)[0]


IN_PLACE = ["MetaSGD", "MetaAdam"]
CASES = [
    pytest.param(g, run, id=f"{name(g)}-{run}")
    for g in (EXACT, ic.BPTT(6), LONG, ic.Neumann(300, 1.0))
    for run in RUNS
    if g is not EXACT or run not in IN_PLACE
]


@pytest.mark.parametrize("run", IN_PLACE)
def test_the_exact_gradient_refuses_parameters_that_were_replaced(run: str) -> None:
    """Its second derivative evaluates F again, in the outer backward pass."""
    with pytest.raises(RuntimeError, match=r"f used another parameter .* or an optimizer that is differentiated"):
        gradient_of(RUNS[run], EXACT)


@pytest.mark.parametrize(("gradient", "run"), CASES)
def test_the_gradient_through_inner_steps_is_that_of_finite_differences(gradient: ic.Estimator, run: str) -> None:
    step = 1e-6
    signs = [(META + step * e, META - step * e) for e in torch.eye(4, dtype=torch.float64)]
    ends = [[RUNS[run](Model(gradient), meta, call).detach() for meta in pair] for pair in signs]
    expected = torch.stack([(up - down) / (2 * step) for up, down in ends])
    assert expected.abs().min() > 1e-3
    torch.testing.assert_close(gradient_of(RUNS[run], gradient), expected, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("run", IN_PLACE)
@pytest.mark.parametrize("recompute", [False, True])
def test_few_unrolled_steps_have_the_second_derivatives_of_their_graph(recompute: bool, run: str) -> None:
    expected = gradient_of(RUNS[run], ic.Unroll(3, 0.5), plain)
    ours = gradient_of(RUNS[run], ic.Unroll(3, 0.5, recompute=recompute))
    torch.testing.assert_close(ours, expected, atol=1e-9, rtol=1e-9)
    assert not torch.allclose(gradient_of(RUNS[run], LONG), expected, rtol=1e-2)
