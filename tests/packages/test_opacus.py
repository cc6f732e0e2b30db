"""Per-sample gradients and differentially private training by Opacus."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from packages.models import EXACT, Model, close, gradients, inputs, name, plain, squares
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import implicit_core as ic

opacus = pytest.importorskip("opacus", reason="opacus is not installed")

WRAPPERS: dict[str, Callable[..., Any]] = {
    "hooks": opacus.GradSampleModule,
    "functorch": lambda model, **options: opacus.GradSampleModule(model, force_functorch=True, **options),
    "expanded weights": opacus.grad_sample.GradSampleModuleExpandedWeights,
}
GRAPHS = [ic.Unroll(3, 0.5), ic.BPTT(6), ic.OneStep()]
"""Estimators whose backward pass goes through each evaluation once."""

PRODUCTS = [ic.Neumann(4, 0.5), EXACT]
"""Estimators that take products with the Jacobian, for each of which backward hooks are called."""


def per_sample(model: Model, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The gradient of each sample's loss, by a plain loop of a batch of one."""
    found = [gradients(squares(plain(model, x[i : i + 1]), y[i : i + 1]), model) for i in range(len(x))]
    return {name: torch.stack([g[name] for g in found]) for name in found[0]}


def by_opacus(wrap: Callable[..., Any], model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The per-sample gradients of Opacus."""
    wrapped = wrap(model, loss_reduction="sum")
    squares(wrapped(x), y).backward()
    return {name: p.grad_sample for name, p in model.named_parameters()}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("gradient", GRAPHS, ids=name)
@pytest.mark.parametrize("check", [False, True])
def test_per_sample_gradients_are_right(check: bool, gradient: ic.Estimator, wrap: Callable[..., Any]) -> None:
    model, (x, y) = Model(gradient, check=check), inputs()
    expected = per_sample(model, x, y)
    close(by_opacus(wrap, model, x, y), expected)


@pytest.mark.parametrize("check", [False, True])
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("gradient", PRODUCTS, ids=name)
def test_estimators_that_take_products_refuse(gradient: ic.Estimator, wrap: Callable[..., Any], check: bool) -> None:
    model, (x, y) = Model(gradient, check=check), inputs()
    with pytest.raises(NotImplementedError, match=rf"per-sample gradients in it\. {name(gradient)} would"):
        by_opacus(wrap, model, x, y)


def private(model: Model, noise: float, clip: float, batch: int = 8) -> tuple[Any, Any, Any, Any]:
    """An engine, the model, an optimizer of rate 0.1 and a loader of one batch."""
    data = DataLoader(TensorDataset(*inputs(batch)), batch_size=batch)
    engine = opacus.PrivacyEngine(accountant="rdp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapped, optimizer, loader = engine.make_private(
        module=model,
        optimizer=optimizer,
        data_loader=data,
        noise_multiplier=noise,
        max_grad_norm=clip,
        poisson_sampling=False,
    )
    return engine, wrapped, optimizer, loader


@pytest.mark.parametrize("gradient", GRAPHS, ids=name)
def test_a_private_step_is_that_of_clipped_gradients(gradient: ic.Estimator) -> None:
    clip, (x, y) = 3.0, inputs(8)
    model = Model(gradient)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    each = per_sample(model, x, y)
    norms = sum(g.flatten(1).square().sum(1) for g in each.values()).sqrt()
    assert norms.min() < clip < norms.max()  # some are clipped
    factors = (clip / (norms + 1e-6)).clamp(max=1.0)
    _, wrapped, optimizer, loader = private(model, 0.0, clip)
    for inputs_, targets in loader:
        optimizer.zero_grad()
        (squares(wrapped(inputs_), targets) / len(inputs_)).backward()
        optimizer.step()
    step = {name: torch.einsum("n,n...->...", factors, g) / len(x) for name, g in each.items()}
    close(dict(model.named_parameters()), {name: p - 0.1 * step[name] for name, p in before.items()})


def test_noise_is_accounted_for_and_training_goes_on() -> None:
    model = Model(ic.Unroll(3, 0.5))
    engine, wrapped, optimizer, loader = private(model, 1.0, 1.0)
    losses = []
    for _ in range(3):
        for x, y in loader:
            optimizer.zero_grad()
            loss = squares(wrapped(x), y) / len(x)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert len(set(losses)) == 3
    assert torch.all(model.layer.status == ic.CONVERGED)
    assert 0.1 < engine.get_epsilon(delta=1e-2) < 100


def test_recomputed_steps_leave_no_per_sample_gradients_and_the_optimizer_says_so() -> None:
    model = Model(ic.Unroll(3, 0.5, recompute=True))
    _, wrapped, optimizer, loader = private(model, 0.0, 1.0)
    x, y = next(iter(loader))
    squares(wrapped(x), y).backward()
    with pytest.raises(ValueError, match="Per sample gradient is not initialized"):
        optimizer.step()
