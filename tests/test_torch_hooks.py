"""Hooks in a cell see each evaluation once, with the cotangent of the loss, or are refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook

import implicit_core as ic
from implicit_core.adapters import torch as ict
from implicit_core.coupling import coupling, differences

F64 = torch.float64
N, D = 6, 5
UNROLLED = [ic.Unroll(5, 0.5), ic.Unroll(5, 0.5, recompute=True), ic.BPTT(5)]
AT_THE_POINT = [ic.OneStep(), ic.Neumann(5, 0.5), ic.NeumannSeries(0.8), ic.Implicit(ic.GMRES(rtol=1e-10))]
WITH_PRODUCTS = AT_THE_POINT[1:]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


class Cell(nn.Module):
    """tanh(W h + b + x), which shows W h + b to a function."""

    def __init__(self, shown: Callable[[Tensor], object] = lambda _: None) -> None:
        super().__init__()
        self.inner, self.shown = nn.Linear(D, D, dtype=F64), shown
        nn.init.orthogonal_(self.inner.weight, gain=0.6)

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        y = self.inner(h)
        if y.requires_grad:
            self.shown(y)
        return torch.tanh(y + x)


def trained(cell: nn.Module, estimator: ic.Estimator, **options: Any) -> ict.ImplicitLayer:
    """The layer after a backward pass."""
    layer = ict.ImplicitLayer(cell, gradient=estimator, **options)
    layer(normal(N, D, seed=1).requires_grad_()).pow(3).sum().backward()
    return layer


Seen = list[Tensor]
TENSOR_HOOKS: dict[str, Callable[[Tensor, Seen], object]] = {
    "register_hook": lambda y, seen: y.register_hook(seen.append),
    "hook=": lambda y, seen: y.register_hook(hook=seen.append),
    "multi_grad": lambda y, seen: register_multi_grad_hook([y], lambda grads: seen.append(grads[0])),
    "multi_grad any": lambda y, seen: register_multi_grad_hook([y], seen.append, mode="any"),
}


@pytest.mark.parametrize("estimator", UNROLLED + AT_THE_POINT, ids=repr)
@pytest.mark.parametrize("kind", TENSOR_HOOKS)
def test_hooks_on_tensors_see_the_true_cotangents(kind: str, estimator: ic.Estimator) -> None:
    """The gradient of a bias is the sum of the cotangents behind it."""
    seen: Seen = []
    layer = trained(Cell(lambda y: TENSOR_HOOKS[kind](y, seen)), estimator)
    assert len(seen) == (estimator.k if estimator in UNROLLED else 1)
    torch.testing.assert_close(sum(seen).sum(0), layer.cell.inner.bias.grad)
    unwatched = trained(Cell(), estimator)
    unwatched.load_state_dict(layer.state_dict())
    unwatched.zero_grad()
    unwatched(normal(N, D, seed=1)).pow(3).sum().backward()
    torch.testing.assert_close(layer.cell.inner.bias.grad, unwatched.cell.inner.bias.grad)


@pytest.mark.parametrize("estimator", AT_THE_POINT, ids=repr)
def test_a_hook_that_changes_the_cotangent_does_so_once(estimator: ic.Estimator) -> None:
    """It acts on the gradients of the parameters, and not on the products with the Jacobian."""
    layers = [trained(Cell(shown), estimator) for shown in (lambda _: None, lambda y: y.register_hook(lambda v: 2 * v))]
    layers[1].load_state_dict(layers[0].state_dict())
    for layer in layers:
        layer.zero_grad()
        layer(normal(N, D, seed=1)).pow(3).sum().backward()
    torch.testing.assert_close(layers[1].cell.inner.bias.grad, 2 * layers[0].cell.inner.bias.grad)


@pytest.mark.parametrize("estimator", AT_THE_POINT, ids=repr)
def test_a_hook_is_called_once_for_each_of_two_backward_passes(estimator: ic.Estimator) -> None:
    seen: Seen = []
    layer = ict.ImplicitLayer(Cell(lambda y: y.register_hook(seen.append)), gradient=estimator)
    loss = layer(normal(N, D, seed=1)).pow(3).sum()
    loss.backward(retain_graph=True)
    first = layer.cell.inner.bias.grad.clone()
    loss.backward()
    assert len(seen) == 2
    torch.testing.assert_close([x.sum(0) for x in seen], [first, first])


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("estimator", UNROLLED + AT_THE_POINT, ids=repr)
@pytest.mark.parametrize("watch", ["register_hook", "full", "retain_grad"])
def test_hooks_where_a_gradient_is_itself_differentiated(watch: str, estimator: ic.Estimator) -> None:
    """An estimator at the fixed point evaluates F again, and takes its products with create_graph: this is refused."""
    seen: Seen = []
    shown = {
        "register_hook": lambda y: y.register_hook(lambda v: seen.append(v.detach())),
        "full": lambda y: None,
        "retain_grad": lambda y: y.retain_grad(),
    }
    layer = ict.ImplicitLayer(Cell(shown[watch]), gradient=estimator)
    if watch == "full":
        watch_fully(layer.cell, seen)
    x, bias = normal(N, D, seed=1).requires_grad_(), layer.cell.inner.bias
    loss = layer(x).pow(3).sum()
    if estimator in AT_THE_POINT:
        with pytest.raises(NotImplementedError, match=r"use Unroll\(k, lam\)|Unroll\(k, lam\) and BPTT\(k\) have"):
            torch.autograd.grad(loss, bias, create_graph=True)
        return
    (gradient,) = torch.autograd.grad(loss, bias, create_graph=True)
    if watch != "retain_grad":
        torch.testing.assert_close(sum(seen).sum(0), gradient)
        assert len(seen) == estimator.k


def watch_fully(cell: Cell, seen: Seen) -> Any:
    return cell.inner.register_full_backward_hook(lambda module, inputs, outputs: seen.append(outputs[0]))


def watch_before(cell: Cell, seen: Seen) -> Any:
    return cell.inner.register_full_backward_pre_hook(lambda module, outputs: seen.append(outputs[0]))


def watch_everywhere(cell: Cell, seen: Seen) -> Any:
    def hook(module: nn.Module, inputs: object, outputs: Any) -> None:
        if module is cell.inner:
            seen.append(outputs[0])

    return nn.modules.module.register_module_full_backward_hook(hook)


def watch_the_cell(cell: Cell, seen: Seen) -> Any:
    """The output of the cell is tanh(y + x)."""
    return cell.register_full_backward_hook(lambda module, inputs, outputs: seen.append(inputs[1]))


MODULE_HOOKS = [watch_fully, watch_before, watch_everywhere, watch_the_cell]


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # the first step starts at a constant
@pytest.mark.parametrize("estimator", [*UNROLLED, ic.OneStep()], ids=repr)
@pytest.mark.parametrize("watch", MODULE_HOOKS)
def test_full_backward_hooks_see_each_evaluation_once(watch: Any, estimator: ic.Estimator) -> None:
    seen: Seen = []
    cell = Cell()
    handle = watch(cell, seen)
    try:
        layer = trained(cell, estimator)
    finally:
        handle.remove()
    assert len(seen) == getattr(estimator, "k", 1)
    torch.testing.assert_close(sum(seen).sum(0), layer.cell.inner.bias.grad)


@pytest.mark.parametrize("estimator", WITH_PRODUCTS, ids=repr)
@pytest.mark.parametrize("watch", MODULE_HOOKS)
def test_full_backward_hooks_are_refused_where_they_would_see_every_product(watch: Any, estimator: Any) -> None:
    seen: Seen = []
    cell = Cell()
    handle = watch(cell, seen)
    try:
        with pytest.raises(NotImplementedError, match=f"full backward hooks.* {type(estimator).__name__} would reach"):
            trained(cell, estimator)
    finally:
        handle.remove()
    assert not seen
    trained(cell, estimator)  # without the hook


def test_one_term_takes_no_product_and_is_not_refused() -> None:
    seen: Seen = []
    cell = Cell()
    watch_fully(cell, seen)
    layer = trained(cell, ic.Neumann(1, 0.5))
    torch.testing.assert_close(seen[0].sum(0), layer.cell.inner.bias.grad)


@pytest.mark.parametrize("estimator", UNROLLED + AT_THE_POINT, ids=repr)
def test_gradients_that_a_cell_retains(estimator: ic.Estimator) -> None:
    """``retain_grad`` would add up the cotangents of all products."""
    kept: Seen = []

    def retain(y: Tensor) -> None:
        y.retain_grad()
        kept.append(y)

    if estimator in WITH_PRODUCTS:
        with pytest.raises(NotImplementedError, match="calls retain_grad"):
            trained(Cell(retain), estimator)
        return
    layer = trained(Cell(retain), estimator)
    total = sum(y.grad for y in kept if y.grad is not None)
    torch.testing.assert_close(total.sum(0), layer.cell.inner.bias.grad)


@pytest.mark.parametrize("estimator", UNROLLED + AT_THE_POINT, ids=repr)
def test_forward_hooks_see_each_evaluation_and_may_change_the_value(estimator: ic.Estimator) -> None:
    evaluations = 0

    def halve(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        nonlocal evaluations
        evaluations += 1
        return 0.5 * output

    watched, plain = Cell(), Cell()
    with torch.no_grad():
        plain.inner.weight.copy_(0.5 * watched.inner.weight)
        plain.inner.bias.copy_(0.5 * watched.inner.bias)
    watched.inner.register_forward_hook(halve)
    layers = [trained(cell, estimator, check=False) for cell in (watched, plain)]
    in_value = 0 if estimator in AT_THE_POINT else estimator.k
    again = in_value if getattr(estimator, "recompute", False) else 0
    assert evaluations == layers[0].stats.evaluations + (in_value or 1) + again
    torch.testing.assert_close(2 * layers[1].cell.inner.bias.grad, 2 * plain.inner.bias.grad)
    torch.testing.assert_close(watched.inner.bias.grad, 0.5 * plain.inner.bias.grad)


class Statistics(nn.Module):
    """Counts its calls in a buffer, draws a random number, and keeps activations while there is a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.kept: list[Tensor] = []

    def forward(self, y: Tensor) -> Tensor:
        self.calls += 1
        torch.rand(3)
        if torch.is_grad_enabled():
            self.kept.append(y)
        return y


@pytest.mark.parametrize("estimator", UNROLLED + AT_THE_POINT, ids=repr)
def test_the_layers_own_test_leaves_no_trace(estimator: ic.Estimator) -> None:
    """Of coupled samples: hooks that store under grad, buffers and random numbers are as without it."""
    found = []
    for check in (False, True):
        torch.manual_seed(0)
        seen: list[Tensor] = []

        def store(module: nn.Module, inputs: Any, output: Tensor, seen: list[Tensor] = seen) -> None:
            if torch.is_grad_enabled():
                seen.append(output.detach().clone())

        statistics, cotangents = Statistics(), Seen()
        cell = Cell(lambda y, seen=cotangents: y.register_hook(seen.append))
        cell.inner.register_forward_hook(store)
        cell.inner.register_forward_hook(lambda m, i, o, statistics=statistics: statistics(o))
        cell.statistics = statistics
        layer = trained(cell, estimator, check=check)
        random = torch.get_rng_state()
        found.append(
            (seen, cotangents, statistics.kept, statistics.calls, [p.grad for p in layer.parameters()], random)
        )
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def batch_norm(h: Tensor) -> Tensor:
    return (h - h.mean(0)) / (h.var(0, correction=0) + 1e-5).sqrt()


def attention(h: Tensor) -> Tensor:
    return torch.softmax(h @ h.mT, dim=-1) @ h


def graph(h: Tensor) -> Tensor:
    """The mean of two neighbours on a ring."""
    return 0.5 * (h.roll(1, 0) + h.roll(-1, 0))


def one_neighbour(h: Tensor) -> Tensor:
    """Only the first sample depends on another."""
    return torch.cat([h[:1] + h[-1:], h[1:]])


FORCED = ic.Anderson(max_steps=6, rtol=0.0, atol=0.0)
"""A solve without a test for its end, which might find coupled samples itself."""

COUPLINGS = {
    "batch norm": batch_norm,
    "attention": attention,
    "mean": lambda h: h + h.mean(0),
    "graph": graph,
    "maximum": lambda h: h / (1 + h.abs().amax()),
    "sort": lambda h: h.sort(0).values,
    "cumulative sum": lambda h: h.cumsum(0) / N,
}


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("estimator", UNROLLED + AT_THE_POINT, ids=repr)
@pytest.mark.parametrize("name", COUPLINGS)
def test_coupled_samples_are_found(name: str, estimator: ic.Estimator, dtype: torch.dtype) -> None:
    f = COUPLINGS[name]
    layer = ict.ImplicitLayer(lambda h, x: torch.tanh(0.4 * f(h) + x), solver=FORCED, gradient=estimator)
    with pytest.raises(ic.CoupledSamplesError, match="ImplicitLayer: F couples the 6 samples"):
        layer(normal(N, D, seed=1).to(dtype).requires_grad_())


@pytest.mark.filterwarnings("ignore:the cell has BatchNorm1d in train mode")
@pytest.mark.parametrize("norm", [nn.BatchNorm1d(D, dtype=F64), nn.BatchNorm1d(D, dtype=F64, affine=False)])
def test_batch_norm_in_train_mode_is_found_and_its_statistics_are_kept(norm: nn.BatchNorm1d) -> None:
    class Normalized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = norm

        def forward(self, h: Tensor, x: Tensor) -> Tensor:
            return torch.tanh(0.3 * self.norm(h) + x)

    x = normal(N, D, seed=1).requires_grad_()
    kept = []
    for check in (True, False):
        norm.reset_running_stats()
        layer = ict.ImplicitLayer(Normalized(), solver=FORCED)
        if check:
            with pytest.raises(ic.CoupledSamplesError):
                layer(x)
        else:
            ic.solve(layer.cell, torch.zeros_like(x), x, solver=FORCED, batch_ndim=1)
        kept.append([buffer.clone() for buffer in norm.buffers()])
    torch.testing.assert_close(kept[0], kept[1], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("dtype", "autocast", "found", "lost"),
    [(F64, False, 1e-15, 1e-19), (torch.float32, False, 1e-7, 1e-10), (torch.float32, True, 1e-3, 1e-9)],
    ids=["float64", "float32", "bfloat16"],
)
def test_how_weak_a_coupling_is_found(dtype: torch.dtype, autocast: bool, found: float, lost: float) -> None:
    """One that moves no sample by a rounding error of F is not: ``differences`` says so."""
    w = (0.5 * torch.linalg.qr(normal(D, D, seed=3)).Q).to(dtype)
    for size, refused in ((found, True), (lost, False)):
        layer = ict.ImplicitLayer(lambda h, x, size=size: torch.tanh((h + size * h.mean(0)) @ w + x), solver=FORCED)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            try:
                layer(normal(N, D, seed=1).to(dtype).requires_grad_())
            except ic.CoupledSamplesError:
                assert refused, size
            else:
                assert not refused, size


def test_differences_are_zero_where_samples_are_independent() -> None:
    h = normal(N, D)
    for f, coupled in ((lambda h, z: h * h, False), (lambda h, z: h * h.sum(0), True)):
        problem = differences(f, 1)
        assert bool(coupling(problem.space(h), problem.linearize(h, None)).found) is coupled


@pytest.mark.parametrize("where", ["before", "layer", "model"])
@pytest.mark.parametrize("gradient", [ic.Neumann(3, 0.5), ic.Implicit(), ic.Unroll(3, 0.5)], ids=repr)
def test_hooks_of_modules_around_a_cell_are_called_once(gradient: ic.Estimator, where: str) -> None:
    layer = ict.ImplicitLayer(lambda h, x: torch.tanh(0.3 * h + x), gradient=gradient)
    model = nn.Sequential(nn.Linear(D, D, dtype=F64), layer)
    seen: list[Tensor] = []
    hooked = {"before": model[0], "layer": layer, "model": model}[where]
    hooked.register_full_backward_hook(lambda _module, _inputs, outputs: seen.append(outputs[0]))
    value = model(normal(N, D, seed=1).requires_grad_())
    value.backward(torch.ones_like(value))
    assert len(seen) == 1
    if where != "before":
        torch.testing.assert_close(seen[0], torch.ones_like(value), rtol=0, atol=0)
