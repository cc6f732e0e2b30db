"""The PyTorch layer in programs that are recorded: ``torch.export``, ONNX and ``torch.jit.trace``; and the meta device.

A program makes ``max_steps`` steps, in which finished samples keep their points: its numbers are the layer's.
"""

import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cells import Injected
from torch import Tensor, nn

import implicit_core as ic
from implicit_core.adapters import torch as ict

# While it traces, PyTorch warns of every comparison of sizes.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning"
)

# Each step is a part of the program, and takes a tenth of a second to export. In three steps at this tolerance some
# samples of `inputs` converge, and some do not.
PLAIN = ic.FixedPointIteration(max_steps=3, rtol=0.03)
BATCH = ({0: torch.export.Dim("batch", min=2, max=64)},)


def inputs(batch: int = 3, seed: int = 1) -> Tensor:
    """Samples whose solves take different numbers of steps."""
    x = torch.randn(batch, 4, generator=torch.Generator().manual_seed(seed))
    return (x + torch.sign(x)) * torch.logspace(-1, 1, batch)[:, None]


def exported(layer: nn.Module, *args: Any, shapes: Any = BATCH) -> torch.export.ExportedProgram:
    return torch.export.export(layer, args, dynamic_shapes=shapes, strict=False)


def assert_same(program: Callable[..., Any], layer: Callable[..., Any], *cases: tuple[Any, ...]) -> None:
    """The program's numbers are the layer's, also for inputs and batch sizes that it was not recorded with."""
    for args in cases:
        got, wanted = program(*args), layer(*args)
        tolerance = 2 * torch.finfo(torch.utils._pytree.tree_leaves(wanted)[0].dtype).eps
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


def layer_of(cell: Any = None, **options: Any) -> ict.ImplicitLayer[Any, Any]:
    torch.manual_seed(0)
    return ict.ImplicitLayer(Injected(4) if cell is None else cell, **{"solver": PLAIN, **options}).eval()


OTHERS = (inputs(3, seed=2),), (inputs(7, seed=3),), (torch.zeros(2, 4),)


# torch.export

SOLVERS: dict[str, Any] = {
    "FixedPointIteration": PLAIN,
    "no tolerance": ic.FixedPointIteration(max_steps=4, rtol=0),
    "Anderson": ic.Anderson(max_steps=4, rtol=1e-2),
    "Broyden": ic.Broyden(max_steps=4, rtol=1e-2),
    "Compacting": ic.Compacting(PLAIN),
    "a callable": lambda problem, h, x: problem.f(problem.f(h, x), x),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_solvers(name: str) -> None:
    layer = layer_of(solver=SOLVERS[name], gradient=ic.OneStep())
    program = exported(layer, inputs()).module()
    assert_same(program, layer, (inputs(),), *OTHERS)
    if name in ("FixedPointIteration", "Compacting"):
        layer(inputs(7))
        assert len(set(layer.stats.steps.tolist())) > 1, "some samples were done earlier"


@pytest.mark.filterwarnings("ignore::implicit_core.adapters.torch.GraphFallbackWarning")
def test_cuda_graphs() -> None:
    layer = layer_of(solver=ict.CUDAGraphs(PLAIN), gradient=ic.OneStep())
    assert_same(exported(layer, inputs()).module(), layer, (inputs(),), *OTHERS)


def test_newton_is_refused_with_what_to_do() -> None:
    layer = layer_of(solver=ic.NewtonKrylov())
    with pytest.raises(NotImplementedError, match=r"NewtonKrylov solves linear systems.*give the layer an eval_solve"):
        exported(layer, inputs())
    layer.eval_solver = PLAIN
    assert_same(exported(layer, inputs()).module(), layer, (inputs(),), *OTHERS)


ESTIMATORS = [
    ic.Implicit(),
    ic.Neumann(),
    ic.NeumannSeries(),
    ic.OneStep(),
    ic.Unroll(2, 0.5),
    ic.Unroll(2, 0.5, recompute=True),
    ic.BPTT(3),
]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_estimators(estimator: ic.Estimator) -> None:
    """The value, and, for those whose steps are a part of the program, the gradient."""
    layer = layer_of(gradient=estimator)
    program = exported(layer, inputs()).module()
    assert not [node for node in program.graph.nodes if "set_grad_enabled" in node.name], "a context is in the program"
    assert_same(program, layer, (inputs(),), *OTHERS)
    if not isinstance(estimator, (ic.Unroll, ic.BPTT)):
        assert not program(inputs()).requires_grad
        return
    x = inputs(5).requires_grad_()
    got = torch.autograd.grad(program(x).square().sum(), [x, *program.parameters()])
    wanted = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_a_model_in_train_mode_is_told_which_gradient_its_program_lacks(estimator: ic.Estimator) -> None:
    layer = layer_of(gradient=estimator).train()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        program = exported(layer, inputs()).module()
    told = [x for x in caught if issubclass(x.category, ic.InexactGradientWarning)]
    assert bool(told) != program(inputs()).requires_grad
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", ic.InexactGradientWarning)
        exported(layer, inputs())


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # PyTorch before 2.12 loads into bytes
def test_a_program_is_saved_loaded_and_decomposed() -> None:
    layer, file = layer_of(gradient=ic.Unroll(2, 0.5)), io.BytesIO()
    program = exported(layer, inputs())
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file)
    for made in (loaded, loaded.run_decompositions()):
        assert_same(made.module(), layer, (inputs(),), *OTHERS)


def two_parts(h: dict[str, Tensor], x: dict[str, Tensor]) -> dict[str, Tensor]:
    wide = nn.functional.pad(h["b"], (0, 1))
    return {"a": torch.tanh(0.5 * wide + x["u"]), "b": torch.tanh(0.3 * h["a"][:, :3] + x["v"])}


def test_pytrees() -> None:
    def start(x: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"a": torch.zeros_like(x["u"]), "b": torch.zeros_like(x["v"])}

    def pair(batch: int) -> dict[str, Tensor]:
        return {"u": inputs(batch), "v": inputs(batch, seed=5)[:, :3].clone()}

    layer = layer_of(two_parts, h0=start, gradient=ic.Unroll(2, 0.5))
    program = exported(layer, pair(3), shapes=({"u": BATCH[0], "v": BATCH[0]},)).module()
    assert_same(program, layer, (pair(3),), (pair(6),))


def test_a_start_that_is_given() -> None:
    layer = layer_of()
    program = exported(layer, inputs(), torch.ones(3, 4), shapes=(BATCH[0], BATCH[0])).module()
    assert_same(program, layer, (inputs(), torch.ones(3, 4)), (inputs(5), 0.5 * inputs(5, seed=4)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    layer = layer_of().to(dtype)
    program = exported(layer, inputs().to(dtype)).module()
    assert_same(program, layer, *((x.to(dtype),) for (x,) in OTHERS))


class Autocast(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.layer(x)


def test_autocast() -> None:
    """The cell's products are in half precision, in the program too."""
    model = Autocast(layer_of())
    program = exported(model, inputs()).module()
    assert_same(program, model, (inputs(),), *OTHERS)
    assert not torch.equal(program(inputs()), model.layer(inputs()))


@pytest.mark.parametrize("batch_ndim", [0, 2])
def test_batch_axes(batch_ndim: int) -> None:
    layer = layer_of(batch_ndim=batch_ndim)
    x, shapes = (inputs(), BATCH) if batch_ndim == 0 else (inputs(6).reshape(2, 3, 4), ({1: BATCH[0][0]},))
    program = exported(layer, x, shapes=shapes).module()
    assert_same(program, layer, (x,), (2 * torch.cat([x, x], dim=-2),))


@pytest.mark.filterwarnings("ignore:.*get_attr.*Node")  # PyTorch 2.6, of a constant
@pytest.mark.parametrize("scale", [2.0, torch.tensor([0.5, 1.0, 2.0, 4.0])], ids=["number", "tensor"])
def test_units(scale: Any) -> None:
    layer = layer_of(scale=scale)
    assert_same(exported(layer, inputs()).module(), layer, *OTHERS)
    with torch.no_grad():
        assert_same(torch.jit.trace(layer, inputs()), layer, *OTHERS)


class Dropped(Injected):
    def __init__(self) -> None:
        super().__init__(4)
        self.dropout = ict.VariationalDropout(0.3)

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        return self.dropout(super().forward(h, x))


def test_dropout_in_eval_mode() -> None:
    layer = layer_of(Dropped())
    assert_same(exported(layer, inputs()).module(), layer, (inputs(),), *OTHERS)


@pytest.mark.parametrize("normalize", ["spectral_norm", "weight_norm"])
def test_parametrized_weights(normalize: str) -> None:
    cell = Injected(4)
    getattr(nn.utils.parametrizations, normalize)(cell.linear)
    layer = layer_of(cell)
    program = exported(layer, inputs()).module()
    assert_same(program, layer, (inputs(),), *OTHERS)


def fake_tensors(value: object) -> bool:
    return any(type(x).__name__ in ("FakeTensor", "FunctionalTensor") for x in torch.utils._pytree.tree_leaves(value))


@pytest.mark.parametrize("training", [False, True])
def test_a_layer_is_as_it_was_and_trains_afterwards(training: bool) -> None:
    layer, plain = layer_of(Dropped()), layer_of(Dropped())
    layer.load_state_dict(plain.state_dict())
    layer(inputs())
    exported(layer, inputs())
    assert (layer.status.shape, layer.stats.steps.tolist()[0]) == ((3,), 3), "those of the last call"
    assert not any(fake_tensors(value) for module in layer.modules() for value in vars(module).values())
    for module in (layer, plain):
        module.train(training)
        torch.manual_seed(3)
        module(inputs()).square().sum().backward()
    for a, b in zip(layer.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    assert layer.status.tolist() == plain.status.tolist()


class Function(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        solution = ict.fixed_point(
            lambda h, x: torch.tanh(0.3 * self.linear(h) + x), torch.zeros_like(x), x, solver=PLAIN, batch_ndim=1
        )
        return solution.value, solution.status, solution.stats.residual


def test_fixed_point_itself_and_its_status() -> None:
    torch.manual_seed(0)
    model = Function()
    program = exported(model, inputs()).module()
    for x in (inputs(), inputs(6, seed=2)):
        (value, status, residual), wanted = program(x), model(x)
        torch.testing.assert_close(value, wanted[0])
        torch.testing.assert_close(residual, wanted[2])
        assert status.tolist() == wanted[1].tolist()


def test_throw_is_refused_with_what_to_do() -> None:
    with pytest.raises(NotImplementedError, match=r"throw=True cannot read statuses.*use throw=False"):
        exported(layer_of(throw=True), inputs())


# torch.jit


@pytest.mark.parametrize(
    "estimator", [ic.Implicit(), ic.Neumann(), ic.OneStep(), ic.Unroll(2, 0.5), ic.BPTT(3)], ids=repr
)
def test_a_trace_without_gradients(estimator: ic.Estimator) -> None:
    layer = layer_of(gradient=estimator)
    with torch.no_grad():
        torch.jit.trace(layer, inputs(), check_trace=False)
        assert layer.status is None, "a tensor of the trace"
        assert layer.stats is None
        program = torch.jit.trace(layer, inputs())
    assert_same(program, layer, (inputs(),), *OTHERS)


@pytest.mark.parametrize("solver", [ic.Anderson(max_steps=4), ic.Broyden(max_steps=4)], ids=repr)
def test_a_trace_of_other_solvers(solver: ic.Solver) -> None:
    layer = layer_of(solver=solver)
    with torch.no_grad():
        program = torch.jit.trace(layer, inputs())
    assert_same(program, layer, (inputs(),), *OTHERS)


def test_a_trace_of_a_frozen_layer() -> None:
    layer = layer_of().requires_grad_(False)
    assert_same(torch.jit.trace(layer, inputs()), layer, (inputs(),), *OTHERS)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("estimator", [ic.Implicit(), ic.Neumann(), ic.OneStep(), ic.Unroll(2, 0.5)], ids=repr)
def test_a_trace_with_gradients_is_refused(estimator: ic.Estimator, frozen: bool) -> None:
    """By the cell's parameters, and by x alone."""
    layer = layer_of(gradient=estimator).requires_grad_(not frozen)
    with pytest.raises(NotImplementedError, match=r"without the layer's gradient: trace within torch.no_grad\(\)"):
        torch.jit.trace(layer, inputs().requires_grad_(frozen), check_trace=False)


@pytest.mark.parametrize("called", [False, True])
def test_a_script_is_refused(called: bool) -> None:
    layer = layer_of()
    if called:
        layer(inputs())
    for module in (layer, nn.Sequential(nn.Linear(4, 4), layer)):
        with pytest.raises(NotImplementedError, match=r"torch.jit.script cannot compile: use torch.export"):
            torch.jit.script(module)
    assert torch.jit.script(layer.cell)(inputs(), inputs()).shape == (3, 4)


# The meta device


META_SOLVERS = [
    PLAIN,
    ic.Anderson(),
    ic.Broyden(),
    ic.NewtonKrylov(),
    ic.Compacting(PLAIN),
    ict.CUDAGraphs(),
    lambda problem, h, x: problem.f(h, x),
]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
@pytest.mark.parametrize("solver", META_SOLVERS, ids=lambda solver: type(solver).__name__)
def test_shapes_without_numbers(solver: Any, estimator: ic.Estimator) -> None:
    layer = layer_of(Injected(4).to("meta"), solver=solver, gradient=estimator).train()
    x = torch.zeros(3, 4, device="meta", requires_grad=True)
    h = layer(x)
    assert (h.shape, h.dtype, h.device.type) == (x.shape, x.dtype, "meta")
    for tensor in (x, *layer.parameters()):
        (gradient,) = torch.autograd.grad(h.sum(), tensor, retain_graph=True)
        assert (gradient.shape, gradient.device.type) == (tensor.shape, "meta")


def test_fixed_point_without_numbers() -> None:
    z = torch.zeros(5, 2, device="meta", dtype=torch.float64)
    h = {"a": z[:, :1], "b": z}
    f = lambda h, z: {"a": 0.5 * h["a"] + z[:, :1], "b": 0.5 * h["b"] + z}  # noqa: E731
    for throw in (False, True):
        solution = ict.fixed_point(f, h, z, batch_ndim=1, throw=throw)
        assert [(x.shape, x.dtype) for x in solution.value.values()] == [(x.shape, x.dtype) for x in h.values()]
        assert (solution.status.shape, solution.stats.steps.shape) == ((5,), (5,))
        assert "not known yet" in repr(solution)


@pytest.mark.filterwarnings("ignore::implicit_core.adapters.torch.GraphFallbackWarning")
@pytest.mark.parametrize("batch_ndim", [0, 1])
@pytest.mark.parametrize("solver", META_SOLVERS[:-1], ids=lambda solver: type(solver).__name__)
def test_a_solve_without_numbers_says_what_to_do(solver: Any, batch_ndim: int) -> None:
    z = torch.zeros(3, 4, device="meta")
    if batch_ndim == 0 and isinstance(solver, ic.Compacting):
        solver = solver.solver
    with pytest.raises(NotImplementedError, match="no numbers, by which a solve stops: use fixed_point or Implicit"):
        ic.solve(lambda h, z: 0.5 * h + z, z, z, batch_ndim=batch_ndim, solver=solver)


# ONNX

ONNX = ["FixedPointIteration", "Anderson", "Broyden"]


@pytest.mark.parametrize("solver", [SOLVERS[name] for name in ONNX], ids=ONNX)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_onnx(solver: ic.Solver) -> None:
    pytest.importorskip("onnxscript", reason="torch.onnx.export needs onnxscript")
    runtime = pytest.importorskip("onnxruntime", reason="runs the exported model")
    layer, file = layer_of(solver=solver), io.BytesIO()
    program = torch.onnx.export(layer, (inputs(),), dynamo=True, dynamic_shapes=BATCH, verbose=False)
    program.save(file)
    session = runtime.InferenceSession(file.getvalue())
    name = session.get_inputs()[0].name
    for (x,) in ((inputs(),), *OTHERS):
        with torch.no_grad():
            wanted = layer(x)
        got = torch.from_numpy(session.run(None, {name: x.numpy()})[0])
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
