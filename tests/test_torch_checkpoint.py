"""Activation checkpoints around a layer, and around a block that holds it, change neither values nor gradients."""

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import (
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)
from torch.utils.flop_counter import FlopCounterMode

import implicit_core as ic
from implicit_core.adapters import torch as ict

F64 = torch.float64
N, D = 3, 6
TRIALS = 4
"""Fresh layers each time: their tensors and graphs lie elsewhere in memory, and an order that depends on it differs."""
EXACT = ic.Implicit(ic.GMRES(rtol=1e-12))
ESTIMATORS = [ic.Unroll(4, 0.5), ic.BPTT(4), ic.OneStep(), ic.Neumann(5, 0.5), ic.NeumannSeries(0.8, rtol=1e-8), EXACT]
RECOMPUTED = ic.Unroll(4, 0.5, recompute=True)


class Cell(nn.Module):
    """Several parameters, a skip connection, and a tensor that is computed outside of it: many inputs of one graph."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(D, D), nn.Linear(D, D, bias=False)
        self.gain, self.shift = nn.Parameter(torch.full((D,), 0.4)), nn.Parameter(torch.zeros(D))

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.gain * self.second(torch.tanh(self.first(h) + self.shift)) + x)


class Block(nn.Module):
    """What is around a layer: projections, dropout and a skip connection."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.into, self.layer, self.out = nn.Linear(D, D), layer, nn.Linear(D, D)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(self.layer(self.dropout(torch.tanh(self.into(x)))))


def layer(gradient: ic.Estimator, **options: Any) -> ict.ImplicitLayer:
    return ict.ImplicitLayer(Cell(), solver=ic.Anderson(rtol=1e-8), gradient=gradient, **options).double()


def around(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: checkpoint(module, x, use_reentrant=False)


def eager(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """Recomputes all of the module, and not only as far as the last tensor that is needed."""

    def run(x: Tensor) -> Tensor:
        with set_checkpoint_early_stop(False):
            return checkpoint(module, x, use_reentrant=False)

    return run


def nested(module: nn.Module) -> Callable[[Tensor], Tensor]:
    def inner(x: Tensor) -> Tensor:
        return checkpoint(module, x, use_reentrant=False)

    return lambda x: checkpoint(lambda x: inner(1.0 * x), x, use_reentrant=False)


WRAPPERS: dict[str, Callable[[nn.Module], Callable[[Tensor], Tensor]]] = {
    "checkpoint": around,
    "without early stop": eager,
    "nested": nested,
    "checkpoint_wrapper": checkpoint_wrapper,
}
"""The reentrant checkpoint has no gradients within ``torch.autograd.grad``, and is not among them."""


def results(run: Callable[[Tensor], Tensor], module: nn.Module, *, second: bool) -> Sequence[Tensor]:
    """Value and gradients of x and all parameters, and those of a function of these gradients."""
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(1), dtype=F64, requires_grad=True)
    torch.manual_seed(2)
    value = run(x)
    inputs = [x, *module.parameters()]
    first = torch.autograd.grad(value.pow(3).sum(), inputs, create_graph=second)
    if not second:
        return value, *first
    return value, *first, *torch.autograd.grad(sum(g.pow(2).sum() for g in first), inputs)


def compare(wrap: Callable[[nn.Module], Callable[[Tensor], Tensor]], module: nn.Module, *, second: bool) -> None:
    plain = results(module, module, second=second)
    assert all(g.abs().max() > 0 for g in plain)
    torch.testing.assert_close(results(wrap(module), module, second=second), plain, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
@pytest.mark.parametrize("name", WRAPPERS)
def test_a_checkpoint_around_the_layer(name: str, estimator: ic.Estimator) -> None:
    for _ in range(TRIALS):
        for second in (False, True):
            compare(WRAPPERS[name], layer(estimator), second=second)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
@pytest.mark.parametrize("name", WRAPPERS)
def test_a_checkpoint_around_a_block(name: str, estimator: ic.Estimator) -> None:
    for _ in range(TRIALS):
        for second in (False, True):
            compare(WRAPPERS[name], Block(layer(estimator)).double(), second=second)


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_checkpoint_around_a_layer_that_has_its_own(name: str) -> None:
    for module in (layer(RECOMPUTED), Block(layer(RECOMPUTED)).double()):
        compare(WRAPPERS[name], module, second=False)


@pytest.mark.parametrize("estimator", [*ESTIMATORS, RECOMPUTED], ids=repr)
def test_a_sequence_of_checkpoints(estimator: ic.Estimator) -> None:
    model = nn.Sequential(*(Block(layer(estimator)) for _ in range(2)), nn.Linear(D, D)).double()

    def wrap(model: Any) -> Callable[[Tensor], Tensor]:
        return lambda x: checkpoint_sequential(model, 2, x, use_reentrant=False)

    for second in (False, True)[: 1 + (estimator is not RECOMPUTED)]:
        compare(wrap, model, second=second)


@pytest.mark.parametrize("estimator", [*ESTIMATORS, RECOMPUTED], ids=repr)
def test_a_reentrant_checkpoint(estimator: ic.Estimator) -> None:
    """It supports ``backward`` alone."""
    for module in (layer(estimator), Block(layer(estimator)).double()):
        plain = results(module, module, second=False)
        x = torch.randn(N, D, generator=torch.Generator().manual_seed(1), dtype=F64, requires_grad=True)
        torch.manual_seed(2)
        value = checkpoint(module, x, use_reentrant=True)
        value.pow(3).sum().backward()
        found = value, x.grad, *(p.grad for p in module.parameters())
        torch.testing.assert_close(found, tuple(plain), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_a_checkpoint_within_the_cell(estimator: ic.Estimator) -> None:
    """First derivatives are right; a second one is right, or says why not."""

    class Within(nn.Module):
        def __init__(self, cell: nn.Module, inside: bool) -> None:
            super().__init__()
            self.cell, self.inside = cell, inside

        def forward(self, h: Tensor, x: Tensor) -> Tensor:
            return checkpoint(self.cell, h, x, use_reentrant=False) if self.inside else self.cell(h, x)

    for _ in range(TRIALS):
        cell = Cell().double()
        plain, within = (ict.ImplicitLayer(Within(cell, inside), gradient=estimator) for inside in (False, True))
        torch.testing.assert_close(
            results(within, within, second=False), results(plain, plain, second=False), rtol=1e-9, atol=1e-10
        )
        try:
            found = results(within, within, second=True)
        except NotImplementedError as error:
            assert "Unroll(k, lam) and BPTT(k) have every derivative" in str(error)  # noqa: PT017
        else:
            torch.testing.assert_close(found, results(plain, plain, second=True), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_a_checkpoint_that_is_passed_back_twice(estimator: ic.Estimator) -> None:
    module = Block(layer(estimator)).double().eval()
    x = torch.randn(N, D, dtype=F64)
    value = checkpoint(module, x, use_reentrant=False).pow(3).sum()
    value.backward(retain_graph=True)
    first = [p.grad.clone() for p in module.parameters()]
    value.backward()
    torch.testing.assert_close([p.grad for p in module.parameters()], [2 * g for g in first])


def test_closed_over_tensors_reach_autograd_in_one_order() -> None:
    """Many of them, in a plain f without a module, at fresh addresses in each trial."""
    for _ in range(25):
        weights = [(0.1 * torch.randn(D, D, dtype=F64)).requires_grad_() for _ in range(8)]
        x = torch.randn(N, D, dtype=F64)

        def f(h: Tensor, x: Tensor, weights: Sequence[Tensor] = weights) -> Tensor:
            return torch.tanh(sum(torch.sin(h @ w) for w in weights) + x)

        def run(x: Tensor, f: Any = f) -> Tensor:
            return ict.fixed_point(f, torch.zeros_like(x), x, gradient=ic.Neumann(3, 0.5), batch_ndim=1).value

        found = []
        for value in (run(x), checkpoint(run, x, use_reentrant=False)):
            first = torch.autograd.grad(value.pow(3).sum(), weights, create_graph=True)
            second = torch.autograd.grad(sum(g.pow(2).sum() for g in first), weights)
            found.append((*first, *second))
        torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-11)


# PyTorch 2.14 warns of the hooks that hide what a check of the cell saves.
@pytest.mark.filterwarnings("ignore:A saved_tensors_hooks context:FutureWarning")
@pytest.mark.parametrize("estimator", [*ESTIMATORS, RECOMPUTED], ids=repr)
def test_a_selective_checkpoint(estimator: ic.Estimator) -> None:
    """It serves one backward pass through an evaluation, and an estimator at the fixed point goes through several.

    What it saves is found again by its number: layers that check their cells in the first call alone would shift it.
    """
    module, x = nn.Sequential(*(layer(estimator) for _ in range(3))), torch.randn(N, D, dtype=F64)
    parameters = list(module.parameters())

    def gradient(call: Callable[[Tensor], Tensor]) -> Any:
        return torch.autograd.grad(call(x).square().sum(), parameters)

    def selective(x: Tensor) -> Tensor:
        saved = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
        options: dict[str, Any] = {"context_fn": lambda: create_selective_checkpoint_contexts(saved)}
        return checkpoint(module, x, use_reentrant=False, **options)

    if isinstance(estimator, ic.Unroll | ic.BPTT | ic.OneStep):
        for _ in range(2):
            torch.testing.assert_close(gradient(selective), gradient(module), rtol=1e-12, atol=0)
    else:
        with pytest.raises(RuntimeError, match="or a checkpoint that is not selective"):
            gradient(selective)


def test_a_step_that_raises_leaves_no_hooks_on() -> None:
    """As where memory runs out: the error is caught, and the next backward pass is of something else."""
    w = torch.tensor(0.1, requires_grad=True)
    evaluations = 0

    def f(h: Tensor, x: Tensor) -> Tensor:
        nonlocal evaluations
        evaluations += 1
        if torch.is_grad_enabled():
            raise MemoryError("no memory is left")
        return torch.tanh(w * h) + x

    with pytest.raises(MemoryError, match="no memory is left") as caught:
        ict.fixed_point(f, torch.zeros(N, D), torch.ones(N, D), gradient=RECOMPUTED)
    evaluations = 0
    assert torch.autograd.grad(w * w, w)[0] == 2 * w
    assert evaluations == 0
    assert caught.value.__traceback__ is not None  # alive, as in an except block


class Energy(Cell):
    """A step down an energy, by autograd within the cell."""

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        with torch.enable_grad():
            at = (h if h.requires_grad else h.detach().requires_grad_()).clone()
            energy = 0.5 * (at - super().forward(at, x).detach()).square().sum()
            (slope,) = torch.autograd.grad(energy, at, create_graph=True)
        return 0.4 * torch.tanh(self.second(h - 0.5 * slope)) + x


@pytest.mark.parametrize("where", ["forward", "backward", "both"])
@pytest.mark.parametrize("estimator", [ic.Unroll(4, 0.5), ic.Neumann(5, 0.5)], ids=repr)
def test_operations_are_counted_in_one_pass_alone(estimator: ic.Estimator, where: str) -> None:
    """A layer checks its cell in the recomputation, and not in the first pass, or the other way about."""
    x, solver = torch.randn(N, D, dtype=F64), ic.Anderson(rtol=1e-8)
    net = nn.Sequential(*(ict.ImplicitLayer(Energy(), solver=solver, gradient=estimator) for _ in range(2))).double()
    expected = torch.autograd.grad(copy.deepcopy(net)(x.requires_grad_()).square().sum(), x)[0]
    with FlopCounterMode(display=False) if where != "backward" else nullcontext():
        value = checkpoint(net, x, use_reentrant=False).square().sum()
    with FlopCounterMode(display=False) if where != "forward" else nullcontext():
        value.backward()
    torch.testing.assert_close(x.grad, expected)
