"""A cell that draws random numbers: F evaluated again for a derivative draws the same ones."""

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import implicit_core as ic
from implicit_core.adapters import torch as ict
from implicit_core.adapters.torch.function import Rule, _cotangents

H = torch.linspace(-1, 1, 6, dtype=torch.float64)
Z = torch.linspace(0.1, 0.9, 6, dtype=torch.float64)


def dropped(h: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    return torch.tanh(0.5 * nn.functional.dropout(h * z, 0.5) + z)


def with_mask(mask: torch.Tensor) -> Callable[..., torch.Tensor]:
    return lambda h, z: torch.tanh(0.5 * mask * (h * z) + z)


def stay(problem: Any, h0: Any, z: Any) -> Any:
    """A solver that returns its start, so that only the derivative draws."""
    return h0


def last_mask(seed: int, drawn_before: int) -> torch.Tensor:
    """The dropout mask of the evaluation after ``drawn_before`` others."""
    torch.manual_seed(seed)
    for _ in range(drawn_before):
        nn.functional.dropout(torch.ones_like(H), 0.5)
    return nn.functional.dropout(torch.ones_like(H), 0.5)


@pytest.mark.parametrize("gradient", [ic.Neumann(3, 0.5), ic.Implicit(ic.GMRES(rtol=1e-12)), ic.OneStep()], ids=repr)
def test_a_second_derivative_has_the_mask_of_the_first(gradient: ic.Estimator) -> None:
    def derivatives(f: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        z = Z.clone().requires_grad_()
        value = ic.fixed_point(f, H, z, solver=stay, gradient=gradient).value
        [first] = torch.autograd.grad((value * Z).sum(), z, create_graph=True)
        [second] = torch.autograd.grad((first * H).sum(), z)
        return first.detach(), second

    torch.manual_seed(3)
    state, found = torch.get_rng_state(), derivatives(dropped)
    consumed = torch.get_rng_state()
    masks = [last_mask(3, n) for n in range(3)]
    assert any(
        all(torch.allclose(a, b, rtol=1e-9) for a, b in zip(found, derivatives(with_mask(mask)), strict=True))
        for mask in masks
    )
    assert not torch.equal(state, consumed), "the layer draws, and goes on where its solve has ended"


def test_a_recomputed_step_has_the_mask_of_the_first() -> None:
    def gradient(recompute: bool) -> torch.Tensor:
        torch.manual_seed(3)
        z = Z.clone().requires_grad_()
        rule = ic.Unroll(3, 0.5, recompute=recompute)
        value = ic.fixed_point(dropped, H, z, solver=stay, gradient=rule).value
        torch.manual_seed(4)  # between the two
        return torch.autograd.grad((value * Z).sum(), z)[0]

    torch.testing.assert_close(gradient(True), gradient(False), rtol=1e-12, atol=0.0)


def test_transforms_draw_one_mask_in_a_derivative() -> None:
    def loss(z: torch.Tensor, f: Callable[..., torch.Tensor]) -> torch.Tensor:
        return (ic.fixed_point(f, H, z, solver=stay, gradient=ic.Neumann(3, 0.5)).value * Z).sum()

    torch.manual_seed(3)
    found = torch.func.grad(loss)(Z, dropped)
    expected = [torch.func.grad(loss)(Z, with_mask(last_mask(3, n))) for n in range(4)]
    assert any(torch.allclose(found, x, rtol=1e-9) for x in expected)


def test_a_pushforward_has_the_mask_of_the_value() -> None:
    torch.manual_seed(3)
    at = ict.problem(dropped).linearize(H, Z)
    mask = last_mask(3, 0)
    exact = ict.problem(with_mask(mask)).linearize(H, Z)
    torch.testing.assert_close(at.value, exact.value)
    torch.testing.assert_close(at.jvp(Z, H), exact.jvp(Z, H), rtol=1e-12, atol=0.0)
    torch.testing.assert_close(at.vjp_h(Z), exact.vjp_h(Z), rtol=1e-12, atol=0.0)


def test_a_second_evaluation_leaves_the_generator_as_it_was() -> None:
    z = Z.clone().requires_grad_()
    value = ic.fixed_point(dropped, H, z, solver=stay, gradient=ic.Neumann(3, 0.5)).value
    before = torch.get_rng_state()
    torch.autograd.grad(value.sum(), z, create_graph=True)
    assert torch.equal(torch.get_rng_state(), before)


def test_memory_that_ran_out_is_reported_as_that() -> None:
    def exhausted(h: Any, externals: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    rule = Rule(exhausted, ic.OneStep(), None, 1, 0, vjp_h=lambda v: [v])
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        _cotangents(rule, (H, Z), (H,), [True])


@pytest.mark.parametrize("cell", [lambda h, x: h @ torch.ones(8, 8), lambda h, x: torch.ones(4, 8)])
def test_a_start_inferred_from_a_narrower_x_is_named(cell: Any) -> None:
    with pytest.raises((RuntimeError, ValueError)) as caught:
        ict.ImplicitLayer(cell)(torch.ones(4, 2))
    assert "the shape of h, (4, 2), was taken from x" in caught.value.__notes__[0]
    with pytest.raises((RuntimeError, ValueError)) as caught:
        ict.ImplicitLayer(cell)(torch.ones(4, 2), torch.ones(4, 2))
    assert not hasattr(caught.value, "__notes__")


# A generator of the user's own, which noise in each step is drawn from.


class Noisy(nn.Module):
    """A cell that adds noise from its own generator."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(5)

    def forward(self, h: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        noise = torch.empty_like(h).normal_(generator=self.generator)
        return torch.tanh(0.5 * h * z + z + 0.3 * noise * h)


def in_closure() -> tuple[Callable[..., torch.Tensor], torch.Generator]:
    cell = Noisy()
    generator = cell.generator

    def f(h: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        noise = torch.empty_like(h).normal_(generator=generator)
        return torch.tanh(0.5 * h * z + z + 0.3 * noise * h)

    return f, generator


def noises(n: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.empty_like(H).normal_(generator=generator) for _ in range(n)]


@pytest.mark.parametrize("in_module", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_noise_in_each_step_is_the_same_when_recomputed(recompute: bool, in_module: bool) -> None:
    f, generator = in_closure()
    if in_module:
        f = Noisy()
        generator = f.generator
    z = Z.clone().requires_grad_()
    value = ic.fixed_point(f, H, z, solver=ic.steps(2), gradient=ic.Unroll(3, 1.0, recompute=recompute)).value
    consumed = generator.get_state()
    generator.manual_seed(77)  # between the two
    between = generator.get_state()
    (gradient,) = torch.autograd.grad((value * Z).sum(), z)
    assert torch.equal(generator.get_state(), between)
    h = H
    for t, noise in enumerate(noises(5)):
        h = torch.tanh(0.5 * h * z + z + 0.3 * noise * h)
        h = h if t > 1 else h.detach()
    assert torch.equal(value, h)
    torch.testing.assert_close(gradient, torch.autograd.grad((h * Z).sum(), z)[0], rtol=1e-12, atol=0.0)
    reference = torch.Generator().manual_seed(5)
    for _ in range(5):
        torch.empty_like(H).normal_(generator=reference)
    assert torch.equal(consumed, reference.get_state()), "one draw for each step"


@pytest.mark.parametrize("place", ["a default", "a keyword", "a list of a module", "a plain object"])
def test_a_generator_is_found_wherever_f_refers_to_it(place: str) -> None:
    def gradient(recompute: bool) -> torch.Tensor:
        generator = torch.Generator().manual_seed(5)
        cell, owner = nn.Module(), types.SimpleNamespace(generator=generator)
        cell.generators = [generator]

        def step(h: torch.Tensor, z: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
            return torch.tanh(0.5 * h * z + z + 0.3 * torch.empty_like(h).normal_(generator=generator) * h)

        f: Any = {
            "a default": lambda h, z, generator=generator: step(h, z, generator),
            "a keyword": lambda h, z, *, generator=generator: step(h, z, generator),
            "a list of a module": lambda h, z: step(h, z, cell.generators[0]),
            "a plain object": lambda h, z: step(h, z, owner.generator),
        }[place]
        z = Z.clone().requires_grad_()
        value = ic.fixed_point(f, H, z, solver=ic.steps(1), gradient=ic.Unroll(2, 1.0, recompute=recompute)).value
        return torch.autograd.grad((value * Z).sum(), z)[0]

    torch.testing.assert_close(gradient(True), gradient(False), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("gradient", [ic.Neumann(3, 0.5), ic.Implicit(ic.GMRES(rtol=1e-12)), ic.OneStep()], ids=repr)
def test_a_second_derivative_has_the_noise_of_the_first(gradient: ic.Estimator) -> None:
    def derivatives(f: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        z = Z.clone().requires_grad_()
        value = ic.fixed_point(f, H, z, solver=ic.steps(1), gradient=gradient).value
        [first] = torch.autograd.grad((value * Z).sum(), z, create_graph=True)
        return first.detach(), torch.autograd.grad((first * H).sum(), z)[0]

    first, second = noises(2)
    start = torch.tanh(0.5 * H * Z + Z + 0.3 * first * H)

    def known(h: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        noise = first if torch.equal(h, H) else second
        return torch.tanh(0.5 * h * z + z + 0.3 * noise * h)

    assert not torch.equal(start, H)
    for a, b in zip(derivatives(Noisy()), derivatives(known), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_a_check_of_the_layer_draws_nothing() -> None:
    """The test for coupled samples, and ``ic.check``, evaluate the cell, whose generator they leave as it was."""
    cell = Noisy()
    layer = ict.ImplicitLayer(cell, solver=ic.steps(2), gradient=ic.Unroll(1, 1.0))
    layer(Z[None].requires_grad_(), h0=H[None])
    drawn = torch.Generator().manual_seed(5)
    for _ in range(3):
        torch.empty_like(H).normal_(generator=drawn)
    assert torch.equal(cell.generator.get_state(), drawn.get_state())
    ic.check(cell, H[None], Z[None].detach(), batch_ndim=1)
    assert torch.equal(cell.generator.get_state(), drawn.get_state())
