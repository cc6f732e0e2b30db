"""The options of a call of ImplicitLayer, its counts, its starts, and dropout that a library has made."""

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import profile

import implicit_core as ic
from implicit_core.adapters import torch as ict

WIDTH = 6


class Cell(nn.Module):
    """A contraction for a state of WIDTH numbers, and any number of inputs."""

    def __init__(self, inputs: int = WIDTH) -> None:
        super().__init__()
        self.hidden, self.input = nn.Linear(WIDTH, WIDTH), nn.Linear(inputs, WIDTH)
        nn.init.orthogonal_(self.hidden.weight, gain=0.6)
        self.double()

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.hidden(h) + self.input(x))


def start(x: Tensor) -> Tensor:
    return torch.full((len(x), WIDTH), 0.1, dtype=x.dtype)


class Tokens(nn.Module):
    """A cell whose inputs are integers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, WIDTH)

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(0.5 * h + self.embedding(x).mean(1))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def gradient_of(value: Tensor, layer: ict.ImplicitLayer) -> Tensor:
    return torch.autograd.grad(value.square().sum(), layer.cell.hidden.weight)[0]


def test_a_call_takes_a_solver_and_an_estimator(x: Tensor) -> None:
    layer = ict.ImplicitLayer(Cell(), eval_solver=ic.FixedPointIteration(max_steps=2))
    for training in (True, False):
        layer.train(training)
        got = layer(x, solver=ic.Broyden(rtol=1e-12), gradient=ic.Implicit(ic.GMRES(rtol=1e-12)))
        assert torch.equal(layer.status, torch.zeros(5, dtype=torch.int32)), "neither of the layer's solvers"
        exact = ict.ImplicitLayer(layer.cell, gradient=ic.BPTT(60))
        wanted = exact(x)
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-9)
        torch.testing.assert_close(gradient_of(got, layer), gradient_of(wanted, layer), rtol=0, atol=1e-9)
    assert isinstance(layer.gradient, ic.Unroll), "the layer's own stay"
    assert isinstance(layer.solver, ic.Anderson)


def test_a_call_refuses_what_is_no_solver_and_no_estimator(x: Tensor) -> None:
    layer = ict.ImplicitLayer(Cell())
    with pytest.raises(TypeError, match="gradient must be an Estimator"):
        layer(x, gradient=ic.Anderson())
    with pytest.raises(TypeError, match="solver must be a Solver") as caught:
        layer(x, solver=3)
    assert not hasattr(caught.value, "__notes__"), "it has nothing to do with the shape of h"


def test_samples_that_did_not_converge_are_counted(x: Tensor) -> None:
    layer = ict.ImplicitLayer(Cell(), solver=ic.Anderson(max_steps=3), check=False)
    assert (layer.samples, layer.unconverged) == (0, 0)
    with torch.no_grad():
        solved = layer(x, solver=ic.Anderson(rtol=1e-12))
        layer(x, h0=torch.cat([solved[:2], 0 * solved[2:]]))
        layer(x)
    failed = 3 + 5
    assert (layer.samples, layer.unconverged) == (15, failed)
    restored = pickle.loads(pickle.dumps(layer))
    assert (restored.samples, restored.unconverged) == (15, failed)
    layer.reset_counts()
    assert (layer.samples, layer.unconverged) == (0, 0)


def test_what_has_no_status_is_not_counted(x: Tensor) -> None:
    layer = ict.ImplicitLayer(Cell(), solver=ic.Anderson(rtol=0.0, atol=0.0, max_steps=3))
    layer(x)  # a fixed number of steps, after which no sample need have converged
    torch.func.grad(lambda x: layer(x, solver=ic.Anderson()).sum())(x)
    ict.ImplicitLayer(Cell().to("meta"))(x.to("meta"))
    assert (layer.samples, layer.unconverged) == (0, 0)


@pytest.mark.parametrize("inputs", [2, WIDTH])
@pytest.mark.parametrize(
    "h0", [(WIDTH,), [WIDTH], torch.Size([WIDTH]), start], ids=["tuple", "list", "size", "function"]
)
def test_starts_are_shapes_or_functions(h0: Any, inputs: int) -> None:
    x = torch.randn(4, inputs, dtype=torch.float64)
    layer = pickle.loads(pickle.dumps(ict.ImplicitLayer(Cell(inputs), h0=h0, solver=ic.Anderson(rtol=1e-12))))
    h = layer(x)
    torch.testing.assert_close(layer.cell(h, x), h, rtol=0, atol=1e-9)


def test_a_start_for_integers_and_for_a_pytree() -> None:
    tokens = torch.randint(10, (4, 3))
    assert ict.ImplicitLayer(Tokens(), h0=(WIDTH,))(tokens).shape == (4, WIDTH)
    with pytest.raises(TypeError, match=r"x of dtype torch.int64: give ImplicitLayer an h0.*h0=\(64,\)"):
        ict.ImplicitLayer(Tokens())(tokens)
    both = ict.ImplicitLayer(lambda h, x: torch.tanh(0.5 * h + x["a"] @ x["b"]), h0=(WIDTH,))
    assert both({"a": torch.randn(4, 3), "b": torch.randn(3, WIDTH)}).shape == (4, WIDTH)
    whole = ict.ImplicitLayer(lambda h, x: torch.tanh(0.5 * h + x), h0=(2, 3), batch_ndim=0)
    assert whole(torch.tensor(1.0)).shape == (2, 3)


@pytest.mark.parametrize("h0", ["64", 64, (6.5,), (-1,)])
def test_other_starts_are_refused(h0: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="h0"):
        ict.ImplicitLayer(Cell(), h0=h0)
    with pytest.raises(ValueError, match="tensor of batch_ndim=1"):
        ict.ImplicitLayer(Cell(), h0=(WIDTH,))({"name": "no tensor"})


def test_dropout_that_is_attached_later_is_noticed(x: Tensor) -> None:
    layer = ict.ImplicitLayer(Cell(), solver=ic.Anderson(max_steps=5), check=False)
    layer(x)
    layer.cell.hidden = nn.Sequential(nn.Dropout(0.5), layer.cell.hidden)
    with pytest.warns(ic.ChangingFunctionWarning, match="replace_dropout"):
        layer(x)
    assert ict.replace_dropout(layer.cell) is layer.cell
    layer(x, solver=ic.Anderson(rtol=1e-10))
    assert torch.all(layer.status == ic.CONVERGED), "the mask stays within a solve"
    layer.eval()
    assert not any(part.training for part in layer.cell.modules())


@pytest.mark.filterwarnings("ignore:the cell has Dropout in train mode", "ignore:F gave another value")
def test_dropout_is_not_taken_for_coupling(x: Tensor) -> None:
    layer = ict.ImplicitLayer(Cell(), solver=ic.Anderson(max_steps=5), gradient=ic.OneStep())
    layer.cell.hidden = nn.Sequential(nn.Dropout(0.5), layer.cell.hidden)
    layer(x.requires_grad_())
    assert layer._checked, "the test was made"


def test_replaced_dropout_keeps_probability_axes_mode_and_identity() -> None:
    kinds = [nn.Dropout(0.1), nn.Dropout1d(0.2), nn.Dropout2d(0.3), nn.Dropout3d(0.4), nn.AlphaDropout(0.5)]
    module = nn.ModuleDict({"a": nn.Sequential(*kinds), "b": kinds[0], "c": nn.Dropout(0.6).eval()})
    ict.replace_dropout(module)
    made = list(module["a"])
    assert [(part.p, part.dims) for part in made[:4]] == [(0.1, ()), (0.2, (-1,)), (0.3, (-2, -1)), (0.4, (-3, -2, -1))]
    assert made[4] is kinds[4]
    assert module["b"] is made[0]
    assert made[0].training
    assert not module["c"].training
    assert ict.replace_dropout(nn.Dropout(0.7)).p == 0.7
    channels = made[2](torch.ones(8, 5, 2, 2)).flatten(2)
    assert torch.equal(channels.amin(2), channels.amax(2)), "whole feature maps"
    with pytest.raises(TypeError, match="module must be a Module"):
        ict.replace_dropout(torch.tanh)


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")  # PyTorch 2.11 warns of its default
@pytest.mark.parametrize("gradient", [ic.Unroll(3, 0.5), ic.Neumann(3, 0.5), ic.Implicit()], ids=repr)
def test_a_solve_and_its_backward_pass_are_ranges_of_a_profile(gradient: ic.Estimator, x: Tensor) -> None:
    layer = ict.ImplicitLayer(Cell(), gradient=gradient)
    with profile() as measured:
        layer(x).sum().backward()
    names = {event.key for event in measured.key_averages()}
    assert "implicit_core.solve" in names
    assert ("implicit_core.backward" in names) is isinstance(gradient, ic.estimators.AtFixedPoint)


def test_data_parallel_without_devices_calls_the_layer(x: Tensor) -> None:
    layer = ict.ImplicitLayer(Cell())
    torch.testing.assert_close(nn.DataParallel(layer)(x), layer(x), rtol=0, atol=0)


class Leaves(Cell):
    """A cell that leaves something behind: an auxiliary loss, and its last state."""

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        value = super().forward(h, x)
        self.auxiliary, self.last = value.square().mean(), value.detach()
        return value


def test_a_call_that_raises_leaves_no_status_of_another(x: Tensor) -> None:
    layer = ict.ImplicitLayer(Cell(), throw=True)
    layer(x)
    with pytest.raises(ic.SolveError):
        layer(x, solver=ic.FixedPointIteration(max_steps=1, rtol=1e-12))
    assert layer.status is layer.stats is None


class Own(ic.Unroll):
    """An estimator of the user's, which has gradients in x alone."""


def test_what_the_cell_leaves_behind_is_that_of_an_estimator_of_ones_own(x: Tensor) -> None:
    layer = ict.ImplicitLayer(Leaves(), solver=ic.Anderson(rtol=1e-10), gradient=Own(3, 1.0)).requires_grad_(False)
    value = layer(x.requires_grad_())
    torch.testing.assert_close(layer.cell.last, value.detach(), rtol=1e-7, atol=1e-8)
    assert layer._checked


class Assigns(Cell):
    """A cell whose last state is a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.zeros(5, WIDTH, dtype=torch.float64))

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        value = super().forward(h, x)
        self.last = value.detach()
        return value


def test_a_buffer_that_a_cell_assigns_is_not_that_of_a_check(x: Tensor) -> None:
    """A recomputed step leaves no buffer behind, so that the check's would stay."""
    layer = ict.ImplicitLayer(Assigns(), solver=ic.Anderson(rtol=1e-10), gradient=ic.Unroll(2, 0.5, recompute=True))
    value = layer(x)
    torch.testing.assert_close(layer.cell.last, value.detach(), rtol=1e-7, atol=1e-8)
    before = layer.cell.last
    report = ic.check(layer.cell, torch.zeros(5, WIDTH, dtype=torch.float64), x, batch_ndim=1)
    assert report.kinds() == {"state"}
    assert layer.cell.last is before


@pytest.mark.parametrize(
    "gradient", [ic.Unroll(3, 1.0), ic.BPTT(8), ic.OneStep(), ic.Neumann(3, 0.5), ic.Implicit()], ids=repr
)
def test_what_the_cell_leaves_behind_is_the_estimators(gradient: ic.Estimator, x: Tensor) -> None:
    """The check in the first call evaluates the cell at another state, and leaves nothing behind."""
    torch.manual_seed(0)
    layer = ict.ImplicitLayer(Leaves(), solver=ic.Anderson(rtol=1e-10), gradient=gradient)
    found = []
    for _ in range(2):
        value = layer(x)
        torch.testing.assert_close(layer.cell.last, value, rtol=1e-7, atol=1e-8)
        loss = value.sum() + layer.cell.auxiliary
        found.append(torch.autograd.grad(loss, list(layer.parameters())))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


@pytest.mark.parametrize("gradient", [ic.Unroll(3, 0.5), ic.BPTT(8), ic.Neumann(3, 0.5)], ids=repr)
def test_another_cell_is_checked_anew(gradient: ic.Estimator, x: Tensor) -> None:
    class Coupled(Cell):
        def forward(self, h: Tensor, x: Tensor) -> Tensor:
            return super().forward(h - 0.5 * h.mean(0), x)

    layer = ict.ImplicitLayer(Cell(), gradient=gradient, solver=ic.FixedPointIteration(max_steps=30, rtol=0))
    layer(x)
    layer.cell = Coupled()
    with pytest.raises(ic.CoupledSamplesError, match="ImplicitLayer: F couples the 5 samples"):
        layer(x)


def test_a_problem_is_looked_at_anew_in_each_call(x: Tensor) -> None:
    """A module may write to its state in train mode alone, as dropout in place does."""
    writes = False
    problem = ict.problem(lambda h, x: 0.5 * (torch.tanh_(h) if writes else torch.tanh(h)) + x, batch_ndim=1)
    first = ict.fixed_point(problem, torch.ones_like(x), x.requires_grad_()).value
    writes = True
    second = ict.fixed_point(problem, torch.ones_like(x), x).value
    torch.testing.assert_close(second, first, rtol=0, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(value.sum(), x) for value in (first, second)), rtol=0, atol=0)


class Uncomparable(Tensor):
    """A weight that other code multiplies with, as a quantized one, and that has no other operations."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.eq, Tensor.__eq__):
            raise NotImplementedError("no comparison")
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.filterwarnings("ignore:Sparse (CSR|invariant)")
@pytest.mark.parametrize("kind", ["coo", "csr", "subclass", "uninitialized"])
def test_buffers_that_cannot_be_compared(kind: str, x: Tensor) -> None:
    """Such as the adjacency matrix of a graph."""
    mixing = 0.5 * torch.diag(torch.ones(WIDTH - 1, dtype=torch.float64), 1)
    made = {
        "coo": lambda: mixing.to_sparse(),
        "csr": lambda: mixing.to_sparse_csr(),
        "subclass": lambda: mixing.as_subclass(Uncomparable),
        "uninitialized": lambda: nn.parameter.UninitializedBuffer(),
    }

    class Mixed(Cell):
        def forward(self, h: Tensor, x: Tensor) -> Tensor:
            used = mixing if kind == "uninitialized" else self.mixing
            return super().forward((used @ h.T).T.as_subclass(Tensor), x)

    layer, dense = ict.ImplicitLayer(Mixed()), ict.ImplicitLayer(Mixed())
    dense.load_state_dict(layer.state_dict())
    layer.cell.register_buffer("mixing", made[kind]())
    dense.cell.register_buffer("mixing", mixing)
    torch.testing.assert_close(gradient_of(layer(x), layer), gradient_of(dense(x), dense))
    assert layer._checked
    if kind in ("subclass", "uninitialized"):  # PyTorch's forward mode has no rule for sparse tensors
        assert ic.check(layer.cell, torch.zeros(5, WIDTH, dtype=torch.float64), x, batch_ndim=1).ok
