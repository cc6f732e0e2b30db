"""The MDEQ example: its layers, and its gradients beside backpropagation."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

import implicit_core as ic
from implicit_core.adapters import torch as ict
from implicit_core.examples.mdeq import model as mdeq
from implicit_core.examples.mdeq.model import MDEQ, Cell, State
from implicit_core.examples.mdeq.settings import Settings
from implicit_core.examples.mdeq.sizes import IMAGENET, LARGE, TINY, Sizes
from implicit_core.theory import spectral_radius

pytestmark = pytest.mark.slow

SMALL = Sizes(channels=(8, 8), head=(2, 2), final=8, expansion=2, groups=4, image_channels=1)
RADIUS, STEPS = 0.8, 140
"""The spectral radius of ∂F/∂h, and steps after which its power is below 1e-13."""


def test_sizes_are_those_of_the_published_code() -> None:
    assert [mdeq.parameters(sizes) for sizes in (TINY, LARGE, IMAGENET)] == [158_986, 11_098_398, 16_808_936]


def test_initial_values() -> None:
    model = MDEQ(TINY, ic.steps(1), ic.OneStep())
    convolutions = [part for part in model.modules() if isinstance(part, nn.Conv2d)]
    normed = [part for part in convolutions if is_parametrized(part)]
    assert {type(part.dropout) for part in model.layer.cell.blocks} == {ict.VariationalDropout}
    # Two in each block, and the mixing of each fusion.
    assert len(normed) == 6
    for part in normed:  # PyTorch's are uniform
        bound = 1 / math.sqrt(part.weight[0].numel())
        assert 0.95 * bound < float(part.weight.detach().abs().max()) <= bound * (1 + 1e-6)
    for name in ("weight", "bias"):
        values = [getattr(part, name) for part in convolutions if not is_parametrized(part)]
        drawn = torch.cat([value.detach().flatten() for value in values if value is not None])
        assert float(drawn.std()) == pytest.approx(0.01, rel=0.03 if name == "weight" else 0.2)


# Gradients.


class Scaled(nn.Module):
    """s times a cell, and a constant, since the norms would make up for a state that is small as a whole."""

    def __init__(self, cell: Cell, scale: float) -> None:
        super().__init__()
        self.cell, self.scale = cell, scale
        self.constant = [torch.randn(8, 8 >> i, 8 >> i, dtype=torch.float64) for i in range(2)]

    def forward(self, h: State, x: Tensor) -> State:
        return tuple(c + self.scale * leaf for c, leaf in zip(self.constant, self.cell(h, x), strict=True))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def draw(f: Scaled) -> Callable[[State, Tensor], State]:
    """F with the weights and masks of a solve."""
    with seeded(1):
        held = ict.constant_within_solve(f)
        held(zeros(torch.zeros(2, 8, 8, 8).double()), torch.zeros(2, 8, 8, 8).double())
    return held


def zeros(x: Tensor) -> State:
    return x.new_zeros(x.shape), x.new_zeros(*x.shape[:2], x.shape[2] // 2, x.shape[3] // 2)


@pytest.fixture(scope="module", params=[0.0, 0.25], ids=["", "dropout"])
def equation(request: pytest.FixtureRequest) -> tuple[Scaled, Tensor]:
    """A cell, scaled so that the spectral radius at its fixed point is 0.8, and an injection (2, 8, 8, 8); float64."""
    torch.manual_seed(2)
    f = Scaled(Cell(replace(SMALL, dropout=request.param)), 0.44).double()
    x = torch.randn(2, 8, 8, 8, dtype=torch.float64)
    held = draw(f)
    with torch.no_grad():
        for _ in range(4):
            h = ic.solve(held, zeros(x), x, solver=ic.Broyden(rtol=1e-8, max_steps=200), batch_ndim=1).value
            found = float(spectral_radius(held, h, x, batch_ndim=1, steps=60).max())
            f.scale *= RADIUS / found
    assert found == pytest.approx(RADIUS, rel=0.03)
    return f, x.requires_grad_()


def loss(h: State) -> Tensor:
    return torch.stack(
        [(leaf.square() + leaf * torch.linspace(-1, 1, leaf.numel()).view(leaf.shape)).sum() for leaf in h]
    ).sum()


def leaves(f: Scaled, x: Tensor) -> dict[str, Tensor]:
    return {"x": x, **dict(f.named_parameters())}


def gradient(value: State, f: Scaled, x: Tensor, cotangent: Sequence[Tensor] | None = None) -> dict[str, Tensor]:
    """The gradient of the loss, or the pullback of a cotangent, for x and all parameters."""
    of = leaves(f, x)
    if cotangent is None:
        cotangent = torch.autograd.grad(loss(value), value, retain_graph=True)
    parts = torch.autograd.grad(value, list(of.values()), cotangent, retain_graph=True)
    return dict(zip(of, parts, strict=True))


def layered(f: Scaled, x: Tensor, estimator: ic.Estimator) -> State:
    """The value of a layer; equal seeds draw equal masks."""
    layer = ict.ImplicitLayer(f, solver=ic.Broyden(rtol=1e-12, max_steps=200), gradient=estimator, h0=zeros)
    with seeded(1):
        value: State = layer(x)
    assert layer.stats is not None
    assert float(layer.stats.relative.max()) < 1e-11
    return value


def agree(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert len(found) == 1 + 2 * (2 * 2 + 3 * 2) + 2 * (1 + 2 + 2 + 2)  # x, the blocks and the fusions
    largest = max(float(value.norm()) for value in expected.values())
    for name, value in expected.items():
        assert float(value.norm()) > 1e-6 * largest, name
        assert float((found[name] - value).norm()) < 1e-7 * float(value.norm()), name


def test_the_exact_gradient_is_that_of_backpropagation(equation: tuple[Scaled, Tensor]) -> None:
    f, x = equation
    held, h = draw(f), zeros(x)
    for _ in range(STEPS):
        h = held(h, x)
    value = layered(f, x, ic.Implicit(ic.GMRES(rtol=1e-12)))
    for ours, theirs in zip(value, h, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    agree(gradient(value, f, x), gradient(h, f, x))


@pytest.mark.parametrize(("k", "lam"), [(1, 0.5), (5, 0.5), (3, 1.0)])
def test_unrolled_gradients_are_those_of_damped_steps(equation: tuple[Scaled, Tensor], k: int, lam: float) -> None:
    f, x = equation
    held, h = draw(f), layered(f, x, ic.OneStep())
    h = tuple(leaf.detach() for leaf in h)
    for _ in range(k):
        h = tuple(lam * new + (1 - lam) * old for new, old in zip(held(h, x), h, strict=True))
    value = layered(f, x, ic.Unroll(k, lam))
    for ours, theirs in zip(value, h, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    agree(gradient(value, f, x), gradient(h, f, x))


@pytest.mark.parametrize(("k", "lam"), [(1, 0.5), (5, 0.5), (3, 1.0)])
def test_neumann_gradients_are_sums_of_products(equation: tuple[Scaled, Tensor], k: int, lam: float) -> None:
    f, x = equation
    held, value = draw(f), layered(f, x, ic.Neumann(k, lam))
    h = tuple(leaf.detach().requires_grad_() for leaf in value)
    made = held(h, x)
    term = torch.autograd.grad(loss(h), h)
    series = [torch.zeros_like(leaf) for leaf in h]
    for _ in range(k):
        series = [a + lam * b for a, b in zip(series, term, strict=True)]
        products = torch.autograd.grad(made, h, term, retain_graph=True)
        term = tuple(lam * a + (1 - lam) * b for a, b in zip(products, term, strict=True))
    agree(gradient(value, f, x), gradient(made, f, x, series))


# The model.


def test_a_mask_is_one_for_each_channel_and_sample_and_constant_within_a_solve() -> None:
    model = MDEQ(replace(SMALL, dropout=0.4), ic.Broyden(rtol=0.0, atol=0.0, max_steps=5), ic.Unroll(2, 0.5)).train()
    seen: list[Tensor] = []

    def notice(_module: nn.Module, given: tuple[Tensor], value: Tensor) -> None:
        assert (given[0] != 0).all()
        seen.append((value / given[0]).detach())

    model.layer.cell.blocks[0].dropout.register_forward_hook(notice)
    model.layer.check = False
    model.layer.h0 = lambda x: tuple(torch.randn_like(leaf) for leaf in model.start(x))
    solves = []
    for _ in range(2):
        seen.clear()
        model(torch.randn(6, 1, 8, 8))
        assert len(seen) == 5 + 2
        mask = seen[0][:, :, :1, :1]
        for value in seen:
            torch.testing.assert_close(value, mask.expand_as(value))
        solves.append((mask == 0).view(6, 8))
        torch.testing.assert_close(mask[mask != 0], torch.full_like(mask[mask != 0], 1 / 0.6))
    first, second = solves
    assert (first != second).any()
    assert len({tuple(row.tolist()) for row in first}) > 1  # not the same in all samples
    assert len({tuple(row.tolist()) for row in first.T}) > 1
    assert 10 < int(first.sum()) < 30


@pytest.mark.parametrize("with_graph", [True, False])
def test_in_eval_mode_the_value_is_the_solvers_point(*, with_graph: bool) -> None:
    solver = ic.Broyden(rtol=0.0, atol=0.0, max_steps=3)
    model = MDEQ(replace(SMALL, dropout=0.4), solver, ic.Unroll(5, 0.5)).eval()
    seen: list[State] = []
    model.head.register_forward_hook(lambda _module, given, _value: seen.append(given[0]))
    images = torch.randn(4, 1, 8, 8)
    with torch.set_grad_enabled(with_graph):
        logits = model(images)
    assert logits.requires_grad == with_graph
    with torch.no_grad():
        x = model.encoder(images)
        point = ic.solve(model.layer.cell, model.start(x), x, solver=solver, batch_ndim=1).value
        unrolled = model.layer(x)
    for value, expected, other in zip(seen[0], point, unrolled, strict=True):
        torch.testing.assert_close(value, expected)
        assert float((value - other).detach().norm()) > 1e-3 * float(other.norm())


@pytest.mark.parametrize("gradient", ["unroll", "neumann", "implicit"])
def test_in_eval_mode_the_gradient_is_the_layers_if_it_has_the_solvers_value(gradient: str) -> None:
    torch.manual_seed(0)
    estimator = Settings(gradient=gradient, products=12).estimator()
    model = MDEQ(SMALL, ic.Broyden(rtol=1e-4, max_steps=30), estimator).eval()
    images = torch.randn(2, 1, 8, 8)

    def derivative(**options: Any) -> Tensor:
        x = images.clone().requires_grad_()
        return torch.autograd.grad(model(x, **options).square().sum(), x)[0]

    used = ic.OneStep() if gradient == "unroll" else estimator
    assert torch.equal(derivative(), derivative(gradient=used))
    other = estimator if gradient == "unroll" else ic.OneStep()
    assert not torch.allclose(derivative(), derivative(gradient=other))
