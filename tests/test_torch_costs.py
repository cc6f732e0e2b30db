"""The cost table of the design for the layer on tensors: products and bytes, counted in torch itself."""

import gc
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from problems import layer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import implicit_core as ic
from benchmarks.counting import Dispatched
from benchmarks.memory import LiveTensors
from implicit_core.adapters import torch as ict

K = [1, 2, 5, 9]
BATCH, WIDTH = 4, 6
FORMS = ["closed over", "explicit"]
ESTIMATORS = [
    ic.OneStep(),
    ic.Neumann(3, 0.5),
    ic.Unroll(3, 0.5),
    ic.Unroll(3, 0.5, recompute=True),
    ic.Implicit(ic.GMRES(rtol=1e-3)),
    ic.BPTT(3),
]


class Products(TorchDispatchMode):
    """Counts matrix products by the shape of the result."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: Counter[tuple[int, ...]] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.shapes[tuple(result.shape)] += 1
        return result


def backward_products(estimator: ic.Estimator, form: str) -> tuple[int, int]:
    """Matrix products in a backward pass of tanh(h Wᵀ + x) for the cotangent of h, and for the cotangent of W.

    F evaluated again is taken off: its product has the shape of h, too.
    """
    case, calls = layer(BATCH, WIDTH), 0
    w, x = (torch.tensor(case.z[name], requires_grad=True) for name in ("w", "x"))

    def f(h: Tensor, z: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return torch.tanh(h @ (w if form == "closed over" else z["w"]).T + z["x"])

    value = ic.fixed_point(f, torch.zeros_like(x), {"w": w, "x": x}, gradient=estimator, batch_ndim=1).value
    calls = 0
    with Products() as products:
        value.sum().backward()
    shapes = products.shapes
    assert set(shapes) <= {(BATCH, WIDTH), (WIDTH, WIDTH)}
    return shapes[BATCH, WIDTH] - calls, shapes[WIDTH, WIDTH]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("estimator", "h_vjps"), [(ic.OneStep(), 0), *((ic.Neumann(k, 0.5), k - 1) for k in K)], ids=repr
)
def test_at_the_fixed_point_the_parameters_are_reached_once(estimator: ic.Estimator, h_vjps: int, form: str) -> None:
    for_h, for_w = backward_products(estimator, form)
    assert for_w == 1
    assert h_vjps <= for_h <= h_vjps + 1, "autograd may walk the graph of F to its end, h"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "estimator",
    [make(k) for k in K for make in (ic.Unroll, lambda k: ic.Unroll(k, 0.5, recompute=True), ic.BPTT)],
    ids=repr,
)
def test_unrolled_steps_reach_the_parameters_once_each(estimator: Any, form: str) -> None:
    assert backward_products(estimator, form) == (estimator.k - 1, estimator.k)


@pytest.mark.parametrize("form", FORMS)
def test_the_exact_gradient_pays_for_the_linear_solve_and_one_pullback(form: str) -> None:
    solver = ic.GMRES(rtol=1e-8)
    case = layer(BATCH, WIDTH)
    w, x = (torch.tensor(case.z[name]) for name in ("w", "x"))
    root = ic.solve(lambda h, z: torch.tanh(h @ w.T + z), torch.zeros_like(x), x, batch_ndim=1).value
    slope = 1 - torch.tanh(root @ w.T + x) ** 2
    adjoint = ic.solve_linear(lambda v: v - (slope * v) @ w, torch.ones_like(x), solver=solver, batch_ndim=1)
    for_h, for_w = backward_products(ic.Implicit(solver), form)
    assert for_w == 1
    assert int(adjoint.stats.evaluations) <= for_h <= int(adjoint.stats.evaluations) + 1


def bytes_held(estimator: ic.Estimator) -> tuple[int, int]:
    """Held from the forward pass to the backward pass, and the most in the backward pass, in states.

    F keeps eight activations of the size of a state for its backward pass.
    """
    weight = torch.full((8,), 0.9, requires_grad=True)

    def f(h: Tensor, z: Tensor) -> Tensor:
        for scale in weight:
            h = torch.tanh(scale * h + z)
        return h

    z = torch.ones(32, 64)
    with LiveTensors() as live:
        value = ic.fixed_point(f, torch.zeros_like(z), z, gradient=estimator, batch_ndim=1).value
        held = live.peak = live.bytes
        value.backward(torch.ones_like(z))
    state = z.nbytes
    return round(held / state), round(live.peak / state)


def test_an_unrolled_gradient_holds_an_activation_graph_a_step() -> None:
    (held_2, peak_2), (held_12, peak_12) = (bytes_held(ic.Unroll(k, 0.5)) for k in (2, 12))
    assert held_12 - held_2 == peak_12 - peak_2 == 10 * (8 + 1), "and the state itself, which is damped"


def test_recomputation_holds_a_state_a_step_and_one_activation_graph_at_a_time() -> None:
    (held_2, peak_2), (held_12, peak_12) = (bytes_held(ic.Unroll(k, 0.5, recompute=True)) for k in (2, 12))
    assert held_12 - held_2 == peak_12 - peak_2 == 10


@pytest.mark.parametrize("make", [lambda k: ic.Neumann(k, 0.5), lambda k: ic.Implicit(ic.GMRES(restart=k))])
def test_at_the_fixed_point_one_activation_graph_is_held(make: Any) -> None:
    assert bytes_held(ic.OneStep())[0] <= 8 + 2, "activations, the layer's value and F's"
    for k in (2, 12):
        assert bytes_held(make(k))[0] == bytes_held(ic.OneStep())[0]


def test_more_terms_of_the_series_take_no_more_memory() -> None:
    assert bytes_held(ic.Neumann(3, 0.5)) == bytes_held(ic.Neumann(12, 0.5))


class Watched(nn.Module):
    """A cell that keeps weak references to all it has made."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        nn.init.orthogonal_(self.inner.weight, gain=0.5)
        self.made: list[weakref.ref[Tensor]] = []

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        product = self.inner(h)
        value = torch.tanh(product + x)
        self.made += [weakref.ref(product), weakref.ref(value)]
        return value


@pytest.mark.parametrize(
    ("estimator", "as_module"),
    [*((estimator, False) for estimator in ESTIMATORS), (ic.Neumann(3, 0.5), True), (ic.Unroll(3, 0.5), True)],
    ids=repr,
)
def test_70_training_steps_leave_nothing_behind(estimator: ic.Estimator, as_module: bool) -> None:
    """Reference counts must suffice: the garbage collector is off."""
    cell, x = Watched(), torch.ones(BATCH, WIDTH)
    solver = ic.Anderson(max_steps=3)
    layer = ict.ImplicitLayer(cell, solver=solver, gradient=estimator)
    optimizer = torch.optim.SGD(cell.parameters(), lr=0.01)

    def step() -> None:
        if as_module:
            h = layer(x)
        else:
            h = ic.fixed_point(cell, torch.zeros_like(x), x, solver=solver, gradient=estimator, batch_ndim=1).value
        h.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        del h
        assert cell.made
        assert not any(made() is not None for made in cell.made)
        cell.made.clear()

    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            alive = []
            with LiveTensors() as live:
                for _ in range(10):
                    step()
                    alive.append((live.count, live.bytes))
            assert alive[1] == alive[-1]
            for _ in range(25):
                step()
    finally:
        gc.enable()


@pytest.mark.parametrize(("gradient", "steps"), [(ic.Unroll, (2, 12)), (ic.BPTT, (2, 12))])
def test_an_undamped_step_is_f_alone(gradient: Any, steps: tuple[int, int]) -> None:
    """Four operations of F forward, and none of the estimator's."""
    w, x = 0.1 * torch.ones(8, 8), torch.ones(4, 8)

    def operations(k: int) -> int:
        estimator = ic.BPTT(k) if gradient is ic.BPTT else ic.Unroll(k, 1.0)
        solver = ic.FixedPointIteration(max_steps=1)
        with Dispatched() as mode, torch.no_grad():
            ic.fixed_point(
                lambda h, z: torch.tanh(h @ w.T + z), torch.zeros(4, 8), x, solver=solver, gradient=estimator
            )
        return mode.operations.total()

    few, many = steps
    assert operations(many) - operations(few) == 4 * (many - few)
