"""The PyTorch layer under the conditions of real training."""

import copy
import os
import pickle
import re
import subprocess
import sys
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from cells import Injected
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import implicit_core as ic
from implicit_core.adapters import torch as ict

ESTIMATORS = [
    ic.Implicit(ic.GMRES(rtol=1e-6)),
    ic.Neumann(5, 0.5),
    ic.OneStep(),
    ic.Unroll(3, 0.5),
    ic.Unroll(3, 0.5, recompute=True),
    ic.BPTT(6),
]
WORKER = Path(__file__).with_name("distributed_worker.py")


class EndsInALinear(Injected):
    """A cell that returns half precision under autocast."""

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        return self.linear(torch.tanh(h + x))


class Model(nn.Module):
    def __init__(self, gradient: ic.Estimator, cell: Any = None, **options: Any) -> None:
        super().__init__()
        self.encoder, self.head = nn.Linear(4, 8), nn.Linear(8, 2)
        self.layer = ict.ImplicitLayer(Injected() if cell is None else cell, gradient=gradient, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.encoder(x)))


def model(gradient: ic.Estimator, **options: Any) -> Model:
    torch.manual_seed(0)
    return Model(gradient, **options)


def inputs(batch: int = 5) -> Tensor:
    return torch.randn(batch, 4, generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return [p.grad.clone() for p in model.parameters()]


# Mixed precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_autocast(estimator: ic.Estimator, dtype: torch.dtype) -> None:
    """F in half precision, in the solve, in its graph and where the backward calls it again; the state in float32."""
    torch.manual_seed(0)
    net = Model(estimator, cell=EndsInALinear(), solver=ic.Anderson(rtol=1e-2))
    states, seen = set(), set()

    def spy(module: nn.Module, args: Any, output: Tensor) -> None:
        seen.add(output.dtype)

    net.layer.cell.linear.register_forward_hook(spy)
    net.layer.register_forward_hook(lambda module, args, output: states.add((args[0].dtype, output.dtype)))
    expected = gradients(copy.deepcopy(net), inputs())
    seen.clear()
    with torch.autocast("cpu", dtype=dtype):
        output = net(inputs())
    assert states == {(torch.float32, torch.float32), (dtype, torch.float32)}
    assert output.dtype == dtype
    assert seen == {dtype}
    output.float().square().sum().backward()
    assert seen == {dtype}
    for p, gradient in zip(net.parameters(), expected, strict=True):
        assert p.grad.dtype == torch.float32
        torch.testing.assert_close(p.grad, gradient, atol=0.1 * float(gradient.abs().max()), rtol=0)


def half(cache: bool = True) -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=cache)


class OwnSolver:
    """A solver of the user's, which disables autograd itself."""

    def solve(self, problem: Any, h0: Any, z: Any, *, trace: bool = False) -> Any:
        with torch.no_grad():
            for _ in range(30):
                h, h0 = h0, problem.f(h0, z)
            residual = torch.linalg.vector_norm(h0 - h, dim=1)
        steps = torch.full(residual.shape, 30, dtype=torch.int32)
        return ic.Solution(h0, torch.full_like(steps, ic.CONVERGED), ic.Stats(steps, 30, residual))


def at_fixed_point(net: Model, x: Tensor) -> Tensor:
    options = {"solver": ic.Anderson(rtol=1e-2), "gradient": ic.Neumann(3, 0.5), "batch_ndim": 1}
    return ict.fixed_point(net.layer.cell, torch.zeros_like(x), x, **options).value


SOLVERS = [
    ic.FixedPointIteration(rtol=1e-2),
    ic.Anderson(rtol=1e-2),
    ic.Broyden(rtol=1e-2),
    ic.NewtonKrylov(rtol=1e-2),
    ic.CallableSolver(lambda problem, h, x: problem.f(problem.f(h, x), x), rtol=0.1),
    OwnSolver(),
]
LIBRARY: dict[str, Any] = {
    **{
        f"a solve by {type(solver).__name__}": lambda net, x, s=solver: ic.solve(
            ict.problem(net.layer.cell, batch_ndim=1), 0 * x, x, solver=s
        )
        for solver in SOLVERS
        if not isinstance(solver, ic.Anderson)  # whose own products would be autocast: only a layer prevents it
    },
    "the first call of the layer": lambda net, x: net.layer(x),
    "certify": lambda net, x: ict.ImplicitLayer(net.layer.cell, solver=SOLVERS[0]).certify(x),
    "a pushforward": lambda net, x: ic.Neumann(3, 0.5).jvp(ict.problem(net.layer.cell, batch_ndim=1), 0 * x, x, x),
    "check": lambda net, x: ic.check(ict.problem(net.layer.cell, batch_ndim=1), 0 * x, x, solver=SOLVERS[0]),
    "vmap": lambda net, x: torch.vmap(lambda x: at_fixed_point(net, x))(x[None]),
    "func.jvp": lambda net, x: torch.func.jvp(lambda x: at_fixed_point(net, x), (x,), (x,)),
}
"""Evaluations of a cell that the library makes without a graph."""


def without_a_graph(mode: Any, part: Any) -> Any:
    def call(net: Model, x: Tensor) -> None:
        with mode():
            part(net)(x) if part is not cell_of else part(net)(x, x)

    return call


def cell_of(net: Model) -> nn.Module:
    return net.layer.cell


def layer_of(net: Model) -> nn.Module:
    return net.layer


CALLERS: dict[str, Any] = {
    "the layer without a graph": without_a_graph(torch.no_grad, layer_of),
    "the layer in inference mode": without_a_graph(torch.inference_mode, layer_of),
    "the cell without a graph": without_a_graph(torch.no_grad, cell_of),
    "the cell in inference mode": without_a_graph(torch.inference_mode, cell_of),
}
"""Evaluations of a cell that the caller makes without a graph."""


@pytest.mark.parametrize("before", LIBRARY)
def test_the_library_leaves_no_casts_without_a_graph(before: str) -> None:
    """PyTorch before 2.11 would use them for the cell, whose weights would get no gradient."""
    net = model(ic.Neumann(3, 0.5), solver=ic.Anderson(rtol=1e-2))
    weights, h, x = list(net.layer.cell.parameters()), torch.ones(5, 8), torch.linspace(-1, 1, 40).reshape(5, 8)
    with half(cache=False):
        expected = torch.autograd.grad(net.layer.cell(h, x).sum(), weights)
    with half():
        LIBRARY[before](net, x)
        got = torch.autograd.grad(net.layer.cell(h, x).sum(), weights)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("before", [*LIBRARY, *CALLERS])
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_gradients_under_autocast_whatever_was_evaluated_before(estimator: ic.Estimator, before: str) -> None:
    """The oracle casts the weights anew at every evaluation."""
    net = model(estimator, solver=ic.Anderson(rtol=1e-2))
    weights, x = list(net.layer.cell.parameters()), torch.linspace(-1, 1, 40).reshape(5, 8)
    with half(cache=False):
        expected = torch.autograd.grad(net.layer(x).square().sum(), weights)
    with half():
        (LIBRARY | CALLERS)[before](net, x)
        got = torch.autograd.grad(net.layer(x).square().sum(), weights)
    for a, b in zip(got, expected, strict=True):  # which differ by where half precision is rounded
        torch.testing.assert_close(a, b, atol=0.02 * float(b.abs().max()), rtol=0)


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
def test_gradients_under_autocast_by_every_solver(solver: Any) -> None:
    net = model(ic.Unroll(3, 0.5), solver=solver)
    weights, x = list(net.layer.cell.parameters()), torch.linspace(-1, 1, 40).reshape(5, 8)
    gradients = []
    for cache in (False, True):
        with half(cache):
            gradients.append(torch.autograd.grad(net.layer(x).square().sum(), weights))
    for b, a in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=0.02 * float(b.abs().max()), rtol=0)


@pytest.mark.parametrize("transform", ["grad", "vmap"])
@pytest.mark.parametrize("estimator", [e for e in ESTIMATORS if not getattr(e, "recompute", False)], ids=repr)
def test_transforms_under_autocast(estimator: ic.Estimator, transform: str) -> None:
    layer = model(estimator, solver=ic.Anderson(rtol=1e-2)).layer
    weights, x = dict(layer.named_parameters()), torch.linspace(-1, 1, 40).reshape(5, 8)

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(layer, weights, (x,)).square().sum()

    with half(cache=False):
        expected = torch.autograd.grad(loss(weights), list(weights.values()))
    with half():
        if transform == "grad":
            got = list(torch.func.grad(loss)(weights).values())
        else:
            got = torch.autograd.grad(torch.vmap(layer)(x[:, None]).square().sum(), list(weights.values()))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=0.02 * float(b.abs().max()), rtol=0)


@pytest.mark.parametrize("estimator", [ic.Implicit(), ic.Neumann(5, 0.5), ic.Unroll(3, 0.5)], ids=repr)
def test_second_derivatives_under_autocast(estimator: ic.Estimator) -> None:
    """The backward pass evaluates F again, after the caller evaluated it without a graph."""
    net = model(estimator, solver=ic.Anderson(rtol=1e-2))
    weights, x = list(net.layer.cell.parameters()), torch.linspace(-1, 1, 40).reshape(5, 8).requires_grad_()

    def second(cache: bool) -> tuple[Tensor, ...]:
        with half(cache):
            value = net.layer(x).square().sum()
            CALLERS["the cell without a graph"](net, x.detach())
            first = torch.autograd.grad(value, x, create_graph=True)[0]
            return torch.autograd.grad(first.square().sum(), weights)

    for a, b in zip(second(True), second(False), strict=True):
        torch.testing.assert_close(a, b, atol=0.05 * float(b.abs().max()), rtol=0)


def test_certify_finds_a_weight_outside_of_the_cell_under_autocast() -> None:
    outside = nn.Parameter(0.1 * torch.eye(8))

    class Uses(Injected):
        def forward(self, h: Tensor, x: Tensor) -> Tensor:
            return torch.tanh(self.linear(h) + h @ outside + x)

    with half(), pytest.raises(ValueError, match=r"\(8, 8\)"):
        ict.ImplicitLayer(Uses(), solver=SOLVERS[0]).certify(torch.ones(5, 8))


def test_callbacks_that_leave_a_weight_out_are_refused_under_autocast() -> None:
    weight, x = nn.Parameter(0.5 * torch.eye(8)), torch.ones(5, 8)
    given = ic.Problem(lambda h, x: torch.tanh(h @ weight + x), vjp=lambda h, x, v: (v, v), batch_ndim=1)
    with half():
        with torch.no_grad():
            given.f(x, x)
        with pytest.raises(ValueError, match="closes over"):
            ict.fixed_point(given, 0 * x, x, solver=ic.Anderson(rtol=1e-2))


@pytest.mark.parametrize("steps", [4, 20])
@pytest.mark.parametrize("gradient", ESTIMATORS, ids=repr)
def test_a_layer_casts_the_weights_at_most_twice(gradient: ic.Estimator, steps: int) -> None:
    """Once in the solve and once with a graph; PyTorch from 2.11 on needs only one cast."""
    layer = ict.ImplicitLayer(Injected(), solver=ic.Broyden(max_steps=steps, rtol=0), gradient=gradient, check=False)
    with half(), torch.profiler.profile(record_shapes=True) as profile:
        layer(torch.ones(5, 8))
    events = profile.key_averages(group_by_input_shape=True)
    casts = [event.count for event in events if event.key == "aten::_to_copy" and event.input_shapes[0] == [8, 8]]
    assert 1 <= sum(casts) <= 2


@pytest.mark.parametrize("estimator", [ic.Implicit(), ic.Implicit(ic.BiCGSTAB()), ic.Neumann(5, 0.5)], ids=repr)
def test_the_estimator_is_not_autocast(estimator: ic.Estimator) -> None:
    """In every autocast state of backward(). F is elementwise, so only products of a linear solver could be cast."""

    def gradient(enabled: bool) -> Tensor:
        x = torch.linspace(-1, 1, 24).reshape(3, 8).requires_grad_()
        value = ict.fixed_point(lambda h, x: torch.tanh(0.9 * h + x), torch.zeros(3, 8), x, gradient=estimator).value
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            return torch.autograd.grad(value.square().sum(), x)[0]

    assert torch.equal(gradient(True), gradient(False))


@pytest.mark.parametrize("solver", [ic.Anderson(), ic.Broyden(), ic.NewtonKrylov()], ids=repr)
def test_the_solver_is_not_autocast(solver: ic.Solver) -> None:
    """Its Gram matrices and small solves stay in float32: the cell is excluded from autocast, so nothing is rounded."""

    def f(h: Tensor, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return torch.tanh(0.9 * h + x)

    plain = ict.fixed_point(f, torch.zeros(3, 8), torch.ones(3, 8), solver=solver, batch_ndim=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = ict.fixed_point(f, torch.zeros(3, 8), torch.ones(3, 8), solver=solver, batch_ndim=1)
    assert torch.equal(plain.value, mixed.value)
    assert torch.equal(plain.stats.residual, mixed.stats.residual)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_a_gradient_scaler_skips_steps_that_overflow(estimator: ic.Estimator) -> None:
    net = model(estimator, solver=ic.Anderson(rtol=1e-2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)  # float16 ends at 2**16
    before = copy.deepcopy(net.state_dict())
    losses, scales = [], []
    for step in range(40):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = (net(inputs()).float() - 1.0).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
        scales.append(scaler.get_scale())
        if step == 0:
            assert all(torch.equal(a, before[name]) for name, a in net.state_dict().items())
    assert scales[0] == 2.0**39
    assert scales[-1] < 2.0**30
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.isfinite(p).all() for p in net.parameters())


# Checkpointing


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_activation_checkpointing_of_the_cell(estimator: ic.Estimator) -> None:
    net = model(estimator)
    net.layer.cell = Checkpointed(net.layer.cell)
    for got, wanted in zip(gradients(net, inputs()), gradients(model(estimator), inputs()), strict=True):
        torch.testing.assert_close(got, wanted)


class Checkpointed(nn.Module):
    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.inner = cell

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        return checkpoint(self.inner, h, x, use_reentrant=False)


def test_a_reentrant_checkpoint_gives_gradients_or_an_error() -> None:
    """Its graph has no edge to its parameters, and it does not support a gradient with respect to chosen inputs."""
    cell = Injected()
    h0, x = torch.zeros(3, 8), torch.randn(3, 8)

    def f(h: Tensor, x: Tensor) -> Tensor:
        return checkpoint(cell, h, x, use_reentrant=True)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "None of the inputs have requires_grad", UserWarning)
        value = ict.fixed_point(f, h0, x, gradient=ic.OneStep(), batch_ndim=1).value
        value.sum().backward()
        got = cell.linear.weight.grad.clone()
        cell.zero_grad()
        ict.fixed_point(cell, h0, x, gradient=ic.OneStep(), batch_ndim=1).value.sum().backward()
        torch.testing.assert_close(got, cell.linear.weight.grad)
        value = ict.fixed_point(f, h0, x, gradient=ic.Neumann(3, 0.5), batch_ndim=1).value
        with pytest.raises(RuntimeError, match="use_reentrant"):
            value.sum().backward()


# Many processes


TOGETHER = {"ddp": 5, "ddp-selective": 3, "fsdp": 5, "fsdp-layer": 5, "ddp-recursive": 1}
"""Ways to train together, and how many estimators of the worker's are trained."""
REFUSED = {
    "fsdp-cell": "the cell is distributed over processes",
    "ddp-cell": "the cell is distributed over processes",
    "communicating-cell": "the cell communicates with other processes (c10d.allreduce_)",
}
RUN = [s for s in (*TOGETHER, *REFUSED) if "fsdp" not in s or hasattr(torch.cpu.Stream, "record_event")]


def can_run(strategy: str) -> Any:
    reason = "fully_shard runs on a GPU only, in this version of PyTorch"
    return pytest.param(strategy, marks=pytest.mark.skipif(strategy not in RUN, reason=reason))


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What each of two processes prints. If they do not find each other, the group is started again."""
    folder = tmp_path_factory.mktemp("processes")
    for attempt in ("first", "second"):
        files = [folder / f"{attempt}-{rank}.txt" for rank in range(2)]
        if run_group(files, folder / attempt):
            break
    return [file.read_text() for file in files]


@pytest.mark.parametrize("strategy", [*map(can_run, TOGETHER)])
def test_two_processes_train_as_one(strategy: str, outputs: list[str]) -> None:
    for rank, output in enumerate(outputs):
        agreed = re.findall(rf"^{strategy} rank {rank}: .* agrees$", output, re.MULTILINE)
        assert len(agreed) == TOGETHER[strategy], output


@pytest.mark.parametrize("strategy", [*map(can_run, REFUSED)])
def test_a_cell_in_which_processes_meet_is_refused(strategy: str, outputs: list[str]) -> None:
    """Its processes would wait for each other for ever."""
    for rank, output in enumerate(outputs):
        assert f"{strategy} rank {rank}: RuntimeError: {REFUSED[strategy]}" in output, output


def run_group(outputs: list[Path], store: Path) -> bool:
    """Whether all processes ended before the time limit."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with ExitStack() as stack:
        running = [
            subprocess.Popen(
                [sys.executable, str(WORKER), str(rank), str(len(outputs)), str(store), *RUN],
                stdout=stack.enter_context(output.open("w")),
                stderr=subprocess.STDOUT,
                env=environment,
            )
            for rank, output in enumerate(outputs)
        ]
        try:
            for process in running:
                process.wait(timeout=150)
        except subprocess.TimeoutExpired:
            return False
        finally:
            for process in running:
                process.kill()
                process.wait()
    return True


# The module


def test_deepcopy_and_pickle_after_a_call() -> None:
    net = model(ic.Neumann())
    x = inputs()
    expected = gradients(net, x)
    for copied in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert copied.layer.gradient == net.layer.gradient
        for got, wanted in zip(gradients(copied, x), expected, strict=True):
            torch.testing.assert_close(got, wanted)


def test_the_state_dict_is_the_cells() -> None:
    cell = Injected()
    own = cell.state_dict()
    layer = ict.ImplicitLayer(cell)
    layer(torch.zeros(2, 8))
    assert layer.state_dict().keys() == {f"cell.{name}" for name in own}
    assert layer.cell.state_dict().keys() == own.keys()


def test_modes_choose_the_solver_and_nothing_else() -> None:
    layer = ict.ImplicitLayer(
        Injected(), solver=ic.FixedPointIteration(max_steps=3), eval_solver=ic.FixedPointIteration(max_steps=5)
    )
    x = torch.randn(3, 8, requires_grad=True)
    for train, steps in ((True, 3), (False, 5)):
        layer.train(train)
        value = layer(x)
        assert layer.stats.steps.tolist() == [steps] * 3
        assert torch.all(layer.status == ic.MAX_STEPS)
        assert torch.autograd.grad(value.sum(), x)[0].abs().sum() > 0
    text = repr(layer)
    for part in ("FixedPointIteration", "max_steps=5", "Unroll(k=5, lam=0.5", "batch_ndim=1", "(cell): Injected("):
        assert part in text


def test_starts() -> None:
    cell = Injected()
    x = torch.randn(3, 8)
    layer = ict.ImplicitLayer(cell, solver=ic.Anderson(rtol=1e-6))
    h = layer(x)
    for call in (lambda: layer(x, h0=h.detach()), lambda: layer(x, h.detach())):
        call()
        assert layer.stats.evaluations == 1
    wide = ict.ImplicitLayer(lambda h, x: torch.tanh(0.5 * h + x[:, :1]), h0=lambda x: torch.zeros(len(x), 5))
    assert wide(x).shape == (3, 5)
    with pytest.raises(TypeError, match="function of x"):
        ict.ImplicitLayer(lambda h, x: h)({"x": x})
    with pytest.raises(TypeError, match="gradient"):
        ict.ImplicitLayer(cell, gradient="unroll")
    with pytest.raises(TypeError, match="cell"):
        ict.ImplicitLayer(3)


def test_throw() -> None:
    layer = ict.ImplicitLayer(lambda h, x: 2 * h + x, throw=True, solver=ic.FixedPointIteration(max_steps=5))
    with pytest.raises(ic.SolveError, match="2 of 2 samples"):
        layer(torch.ones(2, 3))


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_normalized_weights_and_masks_stay_the_same_through_a_call(estimator: ic.Estimator) -> None:
    """Forward and backward: with a new mask in each evaluation no solver would converge."""
    torch.manual_seed(0)
    cell = Injected()
    nn.utils.parametrizations.spectral_norm(cell.linear)
    dropout = ict.VariationalDropout(0.3)
    net = nn.Module()
    net.cell, net.dropout = cell, dropout
    net.forward = lambda h, x: dropout(0.8 * cell(h, x))
    layer = ict.ImplicitLayer(net, solver=ic.Anderson(rtol=1e-6), gradient=estimator)
    once = copy.deepcopy(cell)
    assert once.linear.weight.shape == (8, 8)  # reads it, which is one power iteration
    h = layer(torch.randn(3, 8))
    if not isinstance(estimator, ic.BPTT):
        assert torch.all(layer.status == ic.CONVERGED)
    h.sum().backward()
    (ours,), (one,) = ([*m.linear.parametrizations.weight] for m in (cell, once))
    assert torch.equal(ours._u, one._u)
    assert cell.linear.parametrizations.weight.original.grad.abs().sum() > 0
    assert not torch.equal(layer(torch.ones(3, 8)), layer(torch.ones(3, 8))), "the next call has masks of its own"


def test_weights_that_are_loaded_for_each_call_of_their_module() -> None:
    """Between calls they are on the meta device, where they have no numbers to compare."""

    def load(module: nn.Module, *_: Any) -> None:
        for name, tensor in weights.items():
            module.register_parameter(name, nn.Parameter(tensor))

    def unload(module: nn.Module, *_: Any) -> None:
        for name, tensor in weights.items():
            module.register_parameter(name, nn.Parameter(tensor.to("meta")))

    gradient = ic.Implicit(ic.GMRES(rtol=1e-6))
    expected, offloaded = model(gradient)(inputs()), model(gradient)
    part = offloaded.layer.cell.linear
    weights = {name: p.detach().clone() for name, p in part.named_parameters()}
    unload(part)
    part.register_forward_pre_hook(load)
    part.register_forward_hook(unload)
    assert torch.equal(offloaded(inputs()), expected)
    assert part.weight.is_meta
