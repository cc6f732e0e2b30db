"""Normalized weights and dropout masks stay constant during a solve."""

import math
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import CheckpointError, checkpoint

import implicit_core as ic
from implicit_core.adapters import torch as ict
from implicit_core.adapters.torch.training.constant import VariationalDropout, constant_within_solve
from implicit_core.theory import contraction

F64 = torch.float64
SOLVER = ic.Anderson(rtol=1e-12, max_steps=200)
ESTIMATORS = [
    ic.OneStep(),
    ic.Neumann(4, 0.5),
    ic.Unroll(4, 0.5),
    ic.Unroll(4, 0.5, recompute=True),
    ic.Implicit(ic.GMRES(rtol=1e-12)),
]
NORMALIZATIONS = {
    "weight": parametrizations.weight_norm,
    "spectral": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}


class Cell(nn.Module):
    """0.6 tanh(W dropout(h) + x), which notes the weights, and what dropout makes of a row of ones, at every call."""

    def __init__(
        self, normalize: Callable[[nn.Module], nn.Module] | None = None, p: float = 0.0, width: int = 6
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        inner = nn.Linear(width, width, dtype=F64)
        self.inner = inner if normalize is None else normalize(inner)
        self.dropout = VariationalDropout(p)
        self.weights: list[torch.Tensor] = []
        self.masks: list[torch.Tensor] = []

    def forward(self, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        self.weights.append(self.inner.weight)
        self.masks.append(self.dropout(torch.ones_like(x)))
        return 0.6 * torch.tanh(self.inner(self.dropout(h)) + x)


def inputs(batch: int = 3, width: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(batch, width, generator=torch.Generator().manual_seed(1), dtype=F64)
    return torch.zeros_like(x), x.requires_grad_()


def run(f: Any, gradient: ic.Estimator, solver: Any = SOLVER) -> ic.Solution:
    h0, x = inputs()
    return ict.fixed_point(f, h0, x, solver=solver, gradient=gradient, batch_ndim=1)


# Parametrized weights.


@pytest.mark.parametrize("gradient", ESTIMATORS, ids=repr)
@pytest.mark.parametrize("kind", NORMALIZATIONS)
def test_gradients_flow_through_the_one_weight(kind: str, gradient: ic.Estimator) -> None:
    """The reference uses the weight as a leaf tensor; the parametrization then pulls its gradient back."""
    cell = Cell(NORMALIZATIONS[kind])
    if kind == "spectral":
        cell.inner.parametrizations.weight.eval()  # the same weight for the oracle
    weight = cell.inner.weight
    held = weight.detach().requires_grad_()
    bias = cell.inner.bias
    value = run(lambda h, x: 0.6 * torch.tanh(h @ held.T + bias + x), gradient).value
    (cotangent,) = torch.autograd.grad((value**3).sum(), held)
    originals = list(cell.inner.parametrizations.parameters())
    expected = torch.autograd.grad(weight, originals, cotangent)

    ours = run(constant_within_solve(cell), gradient).value
    torch.testing.assert_close(ours, value, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(torch.autograd.grad((ours**3).sum(), originals), expected, rtol=1e-7, atol=1e-9)
    assert all(grad.abs().max() > 1e-4 for grad in expected)


@pytest.mark.parametrize("gradient", ESTIMATORS, ids=repr)
def test_spectral_norm_makes_one_power_iteration_a_call(gradient: ic.Estimator) -> None:
    cell, reference = Cell(parametrizations.spectral_norm), Cell(parametrizations.spectral_norm)
    reference.load_state_dict(cell.state_dict())
    ours, once = (c.inner.parametrizations.weight[0] for c in (cell, reference))
    for _ in range(2):
        value = run(constant_within_solve(cell), gradient).value
        value.sum().backward()
        assert torch.all(torch.isfinite(reference.inner.weight))  # one access
        assert torch.equal(ours._u, once._u)
        assert torch.equal(ours._v, once._v)
    before = once._u.clone()
    assert torch.all(torch.isfinite(reference.inner.weight))
    assert not torch.equal(once._u, before), "an access more would show"


@pytest.mark.parametrize("gradient", ESTIMATORS, ids=repr)
def test_every_evaluation_finds_one_weight(gradient: ic.Estimator) -> None:
    """Evaluations in the backward pass too, with another solve in between."""
    cell = Cell(parametrizations.spectral_norm)
    first = run(constant_within_solve(cell), gradient).value
    weights, cell.weights = cell.weights, []
    other = run(constant_within_solve(cell), gradient).value
    others, cell.weights = cell.weights, []
    first.sum().backward()
    assert len(cell.weights) == (4 if getattr(gradient, "recompute", False) else 0)
    assert len(weights) > 5
    assert len({id(weight) for weight in weights + cell.weights}) == 1
    assert not torch.equal(weights[0], others[0]), "the next call has the next weight"
    other.sum().backward()


def test_the_module_is_left_as_it_was() -> None:
    cell = Cell(parametrizations.weight_norm)
    f = constant_within_solve(cell)
    h0, x = inputs()
    f(h0, x)
    with pytest.raises(RuntimeError):
        f(h0[:, :2], x)
    held = cell.weights[0]
    assert cell.inner.weight is not held
    torch.testing.assert_close(cell.inner.weight, held)
    assert "forward" not in vars(cell.inner.parametrizations.weight)
    with torch.no_grad():
        cell.inner.parametrizations.weight.original0.mul_(2)
    torch.testing.assert_close(cell.inner.weight, 2 * held)


def test_a_parametrization_is_computed_once_a_call() -> None:
    calls = 0

    class Twice(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            nonlocal calls
            calls += 1
            return 2 * weight

    cell = Cell()
    cell.inner.weight.data.div_(4)
    parametrize.register_parametrization(cell.inner, "weight", Twice())
    parametrize.register_parametrization(cell.inner, "bias", Twice())
    calls = 0
    run(constant_within_solve(cell), ic.Unroll(3, 0.5, recompute=True)).value.sum().backward()
    assert calls == 2
    assert cell.inner.parametrizations.bias.original.grad is not None


def test_functions_name_their_modules() -> None:
    inner = parametrizations.spectral_norm(nn.Linear(6, 6, dtype=F64))
    original = inner.parametrizations.weight.original
    seen = []

    def f(h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        seen.append(inner.weight)
        return 0.6 * torch.tanh(inner(h) + x)

    run(constant_within_solve(f, inner), ic.Neumann(3, 0.5)).value.sum().backward()
    assert len({id(weight) for weight in seen}) == 1
    assert original.grad.abs().max() > 1e-4
    # One that was not named is computed each time, and still gets its gradient.
    original.grad = None
    seen.clear()
    run(constant_within_solve(f), ic.Neumann(3, 0.5)).value.sum().backward()
    assert len({id(weight) for weight in seen}) == len(seen)
    assert original.grad.abs().max() > 1e-4


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("solver", [SOLVER, ic.NewtonKrylov()], ids=["anderson", "newton"])
def test_without_grad_weights_and_masks_are_held_too(mode: Callable[..., Any], solver: ic.Solver) -> None:
    """Newton linearizes with a graph of its own, even in inference mode."""
    cell = Cell(parametrizations.spectral_norm, p=0.3)
    with mode():
        solution = run(constant_within_solve(cell), ic.Neumann(3, 0.5), solver)
    assert torch.all(solution.converged)
    assert not solution.value.requires_grad
    assert len({id(weight) for weight in cell.weights}) == 1
    assert not cell.weights[0].requires_grad


def test_a_mask_of_inference_mode_serves_a_linearization() -> None:
    cell = Cell(p=0.3)
    h0, x = inputs()
    with torch.inference_mode():
        f = constant_within_solve(cell)
        value = ict.fixed_point(f, h0, x, solver=SOLVER, batch_ndim=1).value
        norm = contraction(f, value, x, batch_ndim=1, steps=200)
    mask, w, b = cell.masks[0], cell.inner.weight, cell.inner.bias
    with torch.no_grad():
        slope = 0.6 * (1 - torch.tanh(value * mask @ w.T + b + x) ** 2)
        expected = torch.linalg.matrix_norm(slope[:, :, None] * w * mask[:, None, :], 2)
    torch.testing.assert_close(norm, expected, rtol=1e-5, atol=0)


def test_a_cache_around_the_layer_is_used() -> None:
    cell = Cell(parametrizations.spectral_norm)
    vectors = cell.inner.parametrizations.weight[0]
    with parametrize.cached():
        first = run(constant_within_solve(cell), ic.Neumann(3, 0.5)).value
        after_one = vectors._u.clone()
        second = run(constant_within_solve(cell), ic.Neumann(3, 0.5)).value
    assert len({id(weight) for weight in cell.weights}) == 1
    assert torch.equal(vectors._u, after_one)
    (first + second).sum().backward()
    assert cell.inner.parametrizations.weight.original.grad.abs().max() > 1e-4


@pytest.mark.parametrize("gradient", [ic.Unroll(2, 1.0), ic.Neumann(200, 1.0), ESTIMATORS[-1]], ids=repr)
@pytest.mark.parametrize("functional", [False, True])
def test_second_derivatives_through_the_held_weight(gradient: ic.Estimator, functional: bool) -> None:
    """With the module's own parameters, and with parameters that replace them during the call."""
    cell = Cell(parametrizations.weight_norm, p=0.3)
    name = "inner.parametrizations.weight.original0"
    h0, x = inputs()
    g = dict(cell.named_parameters())[name]
    if functional:
        g = (1.1 * g).detach().requires_grad_()

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = cell

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            f = constant_within_solve(self.cell)
            return ict.fixed_point(f, h0, x, solver=SOLVER, gradient=gradient, batch_ndim=1).value

    def twice(value: torch.Tensor) -> torch.Tensor:
        first = torch.autograd.grad((value**3).sum(), x, create_graph=True)[0]
        return torch.autograd.grad(first.sum(), g)[0]

    layer = Layer()
    ours = twice(torch.func.functional_call(layer, {f"cell.{name}": g}, (x,)) if functional else layer(x))
    mask = cell.masks[0]
    v = cell.inner.parametrizations.weight.original1.detach()
    w = g * v / v.norm(dim=1, keepdim=True)

    def f(h: torch.Tensor) -> torch.Tensor:
        return 0.6 * torch.tanh((mask * h) @ w.T + cell.inner.bias + x)

    h = h0
    for _ in range(200):
        h = f(h)
    if isinstance(gradient, ic.Unroll):
        h = f(f(h.detach()))
    torch.testing.assert_close(ours, twice(h), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("gradient", [ic.Unroll(3, 0.5), ic.Neumann(3, 0.5), ESTIMATORS[-1]], ids=repr)
def test_transforms_of_torch_func(gradient: ic.Estimator) -> None:
    cell = Cell(parametrizations.spectral_norm, p=0.3)
    vectors = cell.inner.parametrizations.weight
    h0, x = inputs()

    def loss(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(5)
        f = constant_within_solve(cell)
        return (ict.fixed_point(f, h0, x, solver=SOLVER, gradient=gradient, batch_ndim=1).value ** 3).sum()

    before = vectors[0]._u.clone()
    vectors.train()
    ours = torch.func.grad(loss)(x.detach())
    assert not torch.equal(vectors[0]._u, before)
    vectors.eval()  # the weight as it was then
    torch.testing.assert_close(ours, torch.autograd.grad(loss(x), x)[0], rtol=1e-8, atol=1e-10)


# Dynamo reads .grad of each tensor that a compiled function closes over.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_cell_is_held_too() -> None:
    cell, plain = (Cell(parametrizations.weight_norm) for _ in range(2))
    compiled = torch.compile(cell, backend="aot_eager")
    gradients = []
    for c, f in ((cell, compiled), (plain, plain)):
        for _ in range(3):
            c.zero_grad()
            run(constant_within_solve(f), ic.Neumann(3, 0.5)).value.sum().backward()
        gradients.append(c.inner.parametrizations.weight.original0.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


# Dropout masks.


@pytest.mark.parametrize("gradient", ESTIMATORS, ids=repr)
def test_one_mask_in_each_solve_and_a_new_one_in_the_next(gradient: ic.Estimator) -> None:
    cell = Cell(p=0.4)
    first = run(constant_within_solve(cell), gradient)
    masks, cell.masks = cell.masks, []
    second = run(constant_within_solve(cell), gradient)
    other, cell.masks = cell.masks[0], []
    first.value.sum().backward()
    again = cell.masks
    assert torch.all(first.converged & second.converged)
    assert len(again) == (4 if getattr(gradient, "recompute", False) else 0)
    assert len(masks) > 5
    for mask in masks + again:
        assert torch.equal(mask, masks[0])
    assert not torch.equal(other, masks[0])
    assert set(masks[0].unique().tolist()) == {0.0, 1 / 0.6}


@pytest.mark.parametrize("gradient", ESTIMATORS, ids=repr)
def test_gradients_equal_gradients_with_a_constant_mask(gradient: ic.Estimator) -> None:
    cell = Cell(p=0.4)
    ours = run(constant_within_solve(cell), gradient).value
    mask, w, b = cell.masks[0], cell.inner.weight, cell.inner.bias
    gradients = torch.autograd.grad((ours**3).sum(), (w, b))
    value = run(lambda h, x: 0.6 * torch.tanh((h * mask) @ w.T + b + x), gradient).value
    torch.testing.assert_close(ours, value, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(gradients, torch.autograd.grad((value**3).sum(), (w, b)), rtol=1e-7, atol=1e-9)


def test_dropout_rate_scale_and_shared_axes() -> None:
    torch.manual_seed(0)
    x = torch.full((200, 8, 5, 5), 3.0, dtype=F64)
    out = VariationalDropout(0.25)(x)
    assert set(out.unique().tolist()) == {0.0, 4.0}
    dropped = float((out == 0).double().mean())
    assert abs(dropped - 0.25) < 5 * math.sqrt(0.25 * 0.75 / x.numel())
    shared = VariationalDropout(0.25, dims=(-2, -1))(x)
    assert torch.equal(shared, shared[:, :, :1, :1].expand_as(x))
    assert set(shared[:, 0, 0, 0].unique().tolist()) == {0.0, 4.0}
    assert not torch.equal(shared[:, 0], shared[:, 1])
    assert torch.equal(VariationalDropout(1.0)(x), torch.zeros_like(x))
    for identity in (VariationalDropout(0.0), VariationalDropout(0.5).eval()):
        assert identity(x) is x
    assert VariationalDropout(0.5)(x.half()).dtype == torch.float16


def test_eval_mode_is_the_cell_without_dropout() -> None:
    cell = Cell(p=0.4).eval()
    value = run(constant_within_solve(cell), ic.OneStep()).value
    expected = run(lambda h, x: 0.6 * torch.tanh(cell.inner(h) + x), ic.OneStep()).value
    assert torch.equal(value, expected)


def test_masks_of_two_modules_and_two_shapes_are_their_own() -> None:
    a, b = VariationalDropout(0.5), VariationalDropout(0.5)
    outputs = []

    def f(h: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        outputs.append([a(z), b(z), a(z[:3]), a(z)])
        return h

    g = constant_within_solve(f, a, b)
    z = torch.ones(40, 40, dtype=F64)
    g(z, z)
    g(z, z)
    for first, again in zip(*outputs, strict=True):
        assert torch.equal(first, again)
    assert not torch.equal(outputs[0][0], outputs[0][1])
    assert torch.equal(outputs[0][0], outputs[0][3])
    outside = a(z)
    assert not torch.equal(outside, outputs[0][0])
    assert not torch.equal(outside, a(z))


def test_masks_and_weights_are_freed_with_the_function() -> None:
    cell = Cell(parametrizations.spectral_norm, p=0.5)
    f = constant_within_solve(cell)
    value = run(f, ic.Unroll(2, 0.5, recompute=True)).value
    value.sum().backward()
    weight = weakref.ref(cell.weights[0])
    cell.weights.clear()
    assert weight() is not None
    del f, value
    assert weight() is None


# Around and inside.


class Nested(nn.Module):
    """A cell that solves for an inner state at every call."""

    def __init__(self, inner: Cell) -> None:
        super().__init__()
        self.inner = inner
        self.outer = parametrizations.spectral_norm(nn.Linear(6, 6, dtype=F64))
        self.dropout = VariationalDropout(0.3)

    def forward(self, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        solution = ict.fixed_point(
            constant_within_solve(self.inner),
            torch.zeros_like(x).detach(),
            0.3 * self.dropout(h) + x,
            solver=SOLVER,
            gradient=ic.Unroll(30, 1.0, recompute=True),
            batch_ndim=1,
        )
        return 0.5 * torch.tanh(self.outer(solution.value))


@pytest.mark.parametrize("gradient", [ic.Unroll(30, 1.0), ic.Unroll(30, 1.0, recompute=True)], ids=repr)
def test_an_implicit_layer_inside_another(gradient: ic.Estimator) -> None:
    cell = Nested(Cell(parametrizations.spectral_norm, p=0.3))
    inner, before = cell.inner.inner.parametrizations.weight[0], Cell(parametrizations.spectral_norm)
    before.inner.parametrizations.weight[0].load_state_dict(inner.state_dict())
    before.inner.parametrizations.weight.original.data.copy_(cell.inner.inner.parametrizations.weight.original)
    assert torch.all(torch.isfinite(before.inner.weight))  # one access

    torch.manual_seed(3)
    solution = run(constant_within_solve(cell), gradient, ic.Anderson(rtol=1e-9, max_steps=60))
    assert torch.all(solution.converged)
    weights, masks = cell.inner.weights, cell.inner.masks
    assert len({id(weight) for weight in weights}) == 1
    assert all(torch.equal(mask, masks[0]) for mask in masks)
    assert torch.equal(inner._u, before.inner.parametrizations.weight[0]._u)

    originals = [cell.inner.inner.parametrizations.weight.original, cell.outer.parametrizations.weight.original]
    gradients = torch.autograd.grad(solution.value.square().sum(), originals)
    assert len({id(weight) for weight in weights}) == 1
    assert all(torch.equal(mask, masks[0]) for mask in masks)

    # The oracle: one long loop over both states, with the weights and masks that were drawn.
    for part in (cell.inner.inner, cell.outer):
        part.parametrizations.weight.eval()
    torch.manual_seed(3)
    w_in, w_out = cell.inner.inner.weight, cell.outer.weight
    torch.testing.assert_close(w_in, weights[0])
    h, x = inputs()
    outer_mask = torch.bernoulli(torch.full_like(h, 0.7)) / 0.7
    for _ in range(60):
        u, g = torch.zeros_like(x), 0.3 * outer_mask * h + x
        for _ in range(60):
            u = 0.6 * torch.tanh((u * masks[0]) @ w_in.T + cell.inner.inner.bias + g)
        h = 0.5 * torch.tanh(u @ w_out.T + cell.outer.bias)
    torch.testing.assert_close(solution.value, h, rtol=1e-6, atol=1e-7)
    expected = torch.autograd.grad(h.square().sum(), originals)
    torch.testing.assert_close(gradients, expected, rtol=1e-5, atol=1e-7)


def test_a_function_inside_another_gives_the_weight_back() -> None:
    linear = parametrizations.spectral_norm(nn.Linear(6, 6, dtype=F64))
    seen = []

    def outer(h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        seen.append(linear.weight)
        h = constant_within_solve(lambda h, x: linear(h) + x, linear)(h, x)
        seen.append(linear.weight)
        return h

    constant_within_solve(outer, linear)(*inputs())
    assert seen[0] is seen[1]


def test_a_cell_with_nothing_to_hold_is_returned_itself() -> None:
    plain = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.1))
    assert constant_within_solve(plain) is plain
    assert constant_within_solve(Cell()) is not None
    assert constant_within_solve(plain, VariationalDropout()) is not plain


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match="cell must be callable"):
        constant_within_solve(None)
    with pytest.raises(TypeError, match="each of modules must be a Module"):
        constant_within_solve(lambda h, x: h, 3)
    with pytest.raises(ValueError, match=r"p must lie in \[0, 1\]"):
        VariationalDropout(1.5)
    with pytest.raises(TypeError, match="dims must be a sequence"):
        VariationalDropout(0.5, dims=1)
    with pytest.raises(TypeError, match="each of dims must be an integer"):
        VariationalDropout(0.5, dims=(0.5,))
    with pytest.raises(ValueError, match=r"needs an axis 2, which an input of shape \(3, 4\) lacks"):
        VariationalDropout(0.5, dims=(2,))(torch.ones(3, 4))
    assert repr(VariationalDropout(0.2, dims=(1,))) == "VariationalDropout(p=0.2, dims=(1,))"
    assert repr(VariationalDropout(0.2)) == "VariationalDropout(p=0.2)"


def test_each_thread_holds_its_own_weight_and_restores_the_module() -> None:
    """Evaluations of several threads overlap; each must find its own weight, and the last must restore the module."""
    linear = parametrizations.weight_norm(nn.Linear(3, 3).double())
    part = linear.parametrizations.weight
    inside = threading.Barrier(2, timeout=20)

    def solve(results: list[Any], scale: float) -> None:
        f = ict.constant_within_solve(lambda h, x: (inside.wait(), linear.weight * 1.0, inside.wait())[1], linear)
        held = linear.weight.detach().clone()
        inside.wait()
        if scale != 1.0:
            with torch.no_grad():
                linear.parametrizations.weight.original0.mul_(scale)
        inside.wait()
        results.append((held, f(torch.zeros(3).double(), None).detach()))

    found: list[list[Any]] = [[], []]
    threads = [threading.Thread(target=solve, args=(found[i], scale)) for i, scale in enumerate((1.0, 3.0))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ((held, seen),) in found:
        assert torch.equal(held, seen)
    assert "forward" not in vars(part)
    before = linear.weight.detach().clone()
    with torch.no_grad():
        part.original0.mul_(0.5)
    torch.testing.assert_close(linear.weight, 0.5 * before)


@pytest.mark.parametrize("estimator", [ic.Neumann(3, 0.5), ic.Unroll(3, 0.5, recompute=True)], ids=repr)
def test_the_mask_outlives_train_mode(estimator: ic.Estimator) -> None:
    """A model is often in eval mode by the time its gradient is asked for."""
    dropout = ict.VariationalDropout(0.5)
    x = torch.linspace(0.1, 1, 12, dtype=torch.float64).reshape(2, 6).requires_grad_()

    def gradient(mode_in_backward: bool) -> torch.Tensor:
        torch.manual_seed(0)
        f = ict.constant_within_solve(lambda h, x: dropout(torch.tanh(0.5 * h + x)), dropout)
        value = ict.fixed_point(f, torch.zeros_like(x), x, gradient=estimator, batch_ndim=1).value
        dropout.train(mode_in_backward)
        first = torch.autograd.grad(value.sum(), x, create_graph=not getattr(estimator, "recompute", False))[0]
        dropout.train()
        return first.detach()

    assert torch.equal(gradient(True), gradient(False))


SETTINGS = {
    "BPTT": {"solver": ic.steps(0), "gradient": ic.BPTT(3)},
    "BPTT after a solve": {"solver": ic.steps(2), "gradient": ic.BPTT(3)},
    "Unroll": {"gradient": ic.Unroll(2)},
    "Neumann": {"gradient": ic.Neumann(2)},
    "Implicit": {"gradient": ic.Implicit()},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_masks_do_not_depend_on_the_check_of_the_cell(name: str) -> None:
    """The check evaluates F at the first call, before a solve or after it."""
    found = []
    for check in (True, False):
        torch.manual_seed(0)
        inner, dropout = nn.Linear(6, 6), ict.VariationalDropout(0.5)
        cell = nn.Sequential(inner, dropout)
        layer = ict.ImplicitLayer(OfSum(cell), **SETTINGS[name], check=check)
        found.append([layer(torch.ones(3, 6)).detach() for _ in range(3)])
    for checked, unchecked in zip(*found, strict=True):
        assert torch.equal(checked, unchecked)
    assert not torch.equal(found[0][0], found[0][1])


class OfSum(nn.Module):
    """A contraction in h, with dropout."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * torch.tanh(self.body(h + x))


class Checkpointed(Cell):
    """A cell that computes its linear part again in the backward pass."""

    options: dict[str, Any] | None = None
    """Of the checkpoint; None for none."""

    def forward(self, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        def part(h: torch.Tensor) -> torch.Tensor:
            return self.dropout(self.inner(torch.sin(h)))

        y = part(h) if self.options is None else checkpoint(part, h, use_reentrant=False, **self.options)
        return 0.6 * torch.tanh(y + x)


@pytest.mark.parametrize("kind", ["dropout", "weight", "spectral"])
@pytest.mark.parametrize("gradient", [*ESTIMATORS, ic.BPTT(4)], ids=repr)
def test_a_checkpoint_in_a_cell_has_the_masks_and_weights_of_the_solve(gradient: ic.Estimator, kind: str) -> None:
    """Or raises an error. Also in a second backward pass, and with another solve in between."""
    solver = ic.steps(0) if isinstance(gradient, ic.BPTT) else SOLVER
    cell = Checkpointed(NORMALIZATIONS.get(kind), p=0.5 if kind == "dropout" else 0.0)
    layer = ict.ImplicitLayer(cell, solver=solver, gradient=gradient)
    state = {name: value.clone() for name, value in layer.state_dict().items()}

    def gradients(options: dict[str, Any] | None) -> list[torch.Tensor]:
        layer.load_state_dict(state)  # spectral_norm makes power iterations
        cell.options = options
        torch.manual_seed(2)
        x = inputs()[1]
        loss, _ = layer(x).square().sum(), layer(x)
        wanted = [x, *layer.parameters()]
        found = torch.autograd.grad(loss, wanted, retain_graph=True)
        torch.testing.assert_close(torch.autograd.grad(loss, wanted), found, rtol=0, atol=0)
        return list(found)

    expected = gradients(None)
    again = gradients({"context_fn": ict.constant_in_checkpoint})
    torch.testing.assert_close(again, expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(CheckpointError):
        gradients({})


def test_dropout_in_a_checkpoint_outside_of_a_layer_needs_nothing() -> None:
    dropout, x = VariationalDropout(0.5), torch.ones(64, requires_grad=True)
    y = checkpoint(dropout, x, use_reentrant=False)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(slope, y)
