"""The PyTorch layer and ``torch.compile``: the layer runs as it is, between graphs."""

import copy
import inspect
import math
import pickle
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cells import Injected
from torch import Tensor, nn

import implicit_core as ic
from implicit_core.adapters import torch as ict

# The compiler reads .grad of tensors that are not leaves, and uses deprecated functions of Python and PyTorch.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:The .grad attribute of a Tensor:UserWarning"
)

SECONDS = 30.0
"""Until the end of a first compiled step, on any machine; it takes a tenth of a second to two on one core."""
FRAMES = 10
"""Of Python, which the compiler looks at in a first step. With the library's own there were more than a hundred."""

ESTIMATORS = [
    ic.Implicit(ic.GMRES(rtol=1e-6)),
    ic.Neumann(5, 0.5),
    ic.NeumannSeries(),
    ic.OneStep(),
    ic.Unroll(3, 0.5),
    ic.Unroll(3, 0.5, recompute=True),
    ic.BPTT(6),
]


SHOWS_REASONS = pytest.mark.skipif(
    "reason" not in inspect.signature(torch.compiler.disable).parameters,
    reason="this version of PyTorch shows the first layer's error alone, and no reason of later ones",
)


class Model(nn.Sequential):
    """Not a plain nn.Sequential, of which nothing is compiled with a part that is not: it calls them in a loop."""

    def forward(self, x: Tensor) -> Tensor:
        return self[2](self[1](self[0](x)))


def model(gradient: ic.Estimator, **options: Any) -> Model:
    torch.manual_seed(0)
    layer = ict.ImplicitLayer(Injected(), gradient=gradient, **options)
    return Model(nn.Linear(4, 8), layer, nn.Linear(8, 2))


def inputs(batch: int = 5, seed: int = 1) -> Tensor:
    return torch.randn(batch, 4, generator=torch.Generator().manual_seed(seed))


def gradients(net: nn.Module, x: Tensor, call: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
    net.zero_grad()
    (net if call is None else call)(x).square().sum().backward()
    return [p.grad.clone() for p in net.parameters()]


def assert_close(got: Any, wanted: Any) -> None:
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


class Frames:
    """What was compiled, of which there is no public count."""

    @property
    def graphs(self) -> int:
        return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])

    @property
    def names(self) -> list[str]:
        """The functions that the compiler looked at, without those of the compiler itself."""
        return [metric.co_name for metric in torch._dynamo.utils.get_compilation_metrics() if metric.co_name]

    @property
    def of_the_library(self) -> list[str]:
        """The library's own functions."""
        metrics = torch._dynamo.utils.get_compilation_metrics()
        folders = "adapters/torch/", "backends/", "implicit_core/"
        return [m.co_name for m in metrics if m.co_name and any(part in m.co_filename for part in folders)]


@pytest.fixture
def frames() -> Iterator[Frames]:
    import torch._dynamo.utils

    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    torch._dynamo.utils.clear_compilation_metrics()
    yield Frames()
    torch.compiler.reset()


# A training step


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_a_training_step(estimator: ic.Estimator, backend: str, frames: Frames) -> None:
    """Eager gradients, a few frames in the first step, and in later ones nothing of the library, or nothing at all."""
    net, plain = model(estimator), model(estimator)

    def step(x: Tensor) -> Tensor:
        net.zero_grad()
        loss = net(x).square().sum()
        loss.backward()
        return loss

    compiled = torch.compile(step, backend=backend)
    graphs = []
    for seed, batch in enumerate((5, 5, 3, 3, 7, 7)):
        x, start = inputs(batch, seed), time.perf_counter()
        compiled(x)
        if seed == 0:
            assert time.perf_counter() - start < SECONDS
            assert 1 <= len(frames.names) <= FRAMES
            own = frames.of_the_library
            # Where the compiler turns back. It does not come there again, once the class's methods are left out.
            assert {name.split("_in_")[-1].split("_at_")[0] for name in own} <= {"call"}
        assert_close([p.grad for p in net.parameters()], gradients(plain, x))
        graphs.append(frames.graphs)
    assert graphs[0] >= 1
    assert graphs[0] == graphs[1], "the second step compiles nothing"
    assert graphs[2] == graphs[-1], "sizes are symbols from the second one on"
    assert frames.of_the_library == own


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
@pytest.mark.parametrize("what", ["model", "cell", "both"])
def test_a_model_or_its_cell(what: str, estimator: ic.Estimator, frames: Frames) -> None:
    """The same gradients, and nothing is compiled again once the second step has been."""
    net, plain = model(estimator), model(estimator)
    if what != "model":
        net[1].cell = torch.compile(net[1].cell, backend="aot_eager")
    compiled = net if what == "cell" else torch.compile(net, backend="aot_eager")
    graphs = []
    for seed in range(4):
        assert_close(gradients(net, inputs(seed=seed), compiled), gradients(plain, inputs(seed=seed)))
        graphs.append(frames.graphs)
    assert graphs[0] >= 1
    assert graphs[1] == graphs[-1]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_sequential(backend: str, frames: Frames) -> None:
    net = nn.Sequential(*model(ic.Neumann()))
    compiled = torch.compile(net, backend=backend)
    for batch in (5, 3):
        x = inputs(batch)
        assert_close(gradients(net, x, compiled), gradients(model(ic.Neumann()), x))


def test_fixed_point_itself(frames: Frames) -> None:
    w = torch.full((3,), 0.5, requires_grad=True)

    def loss(x: Tensor) -> Tensor:
        solution = ic.fixed_point(lambda h, z: torch.tanh(w * h + z), torch.zeros(3), 2 * x, gradient=ic.Neumann())
        return solution.value.square().sum()

    compiled, graphs = torch.compile(loss, backend="eager"), []
    for seed in range(4):
        x = torch.randn(3, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(torch.autograd.grad(compiled(x), w)[0], torch.autograd.grad(loss(x), w)[0])
        graphs.append(frames.graphs)
    assert graphs[0] >= 1
    assert graphs[1] == graphs[-1]


@pytest.mark.parametrize("estimator", [ic.Implicit(), ic.Neumann(5, 0.5), ic.Unroll(3, 0.5)], ids=repr)
def test_a_gradient_of_a_gradient(estimator: ic.Estimator, frames: Frames) -> None:
    """A gradient penalty, by double backward in a step that is compiled."""

    def step(x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        f = lambda h, x: torch.sin(0.5 * h + x)  # noqa: E731
        value = ict.fixed_point(f, torch.zeros(5, 4), x, gradient=estimator, batch_ndim=1).value
        (first,) = torch.autograd.grad(value.sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    torch.testing.assert_close(torch.compile(step, backend="eager")(inputs()), step(inputs()))


# Transforms of torch.func


def loss_of(estimator: ic.Estimator) -> Callable[[Tensor], Tensor]:
    def loss(x: Tensor) -> Tensor:
        value = ict.fixed_point(lambda h, x: torch.tanh(0.5 * h + x), torch.zeros(3), x, gradient=estimator).value
        return (value * value).sum()

    return loss


TRANSFORMS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "grad": (torch.func.grad, (3,)),
    "vmap of grad": (lambda loss: torch.vmap(torch.func.grad(loss)), (4, 3)),
    "vmap": (torch.vmap, (4, 3)),
    "jvp": (lambda loss: lambda x: torch.func.jvp(loss, (x,), (torch.ones_like(x),))[1], (3,)),
    "jacrev": (torch.func.jacrev, (3,)),
}


@pytest.mark.parametrize("estimator", [ic.Implicit(), ic.Neumann(5, 0.5), ic.Unroll(3, 0.5)], ids=repr)
@pytest.mark.parametrize(
    "transform",
    [
        pytest.param(
            name,
            marks=pytest.mark.skipif(
                name == "jacrev" and torch.__version__ < (2, 12),
                reason="before PyTorch 2.12 a compiled jacrev is zero wherever its function has a graph break",
            ),
        )
        for name in TRANSFORMS
    ],
)
def test_transforms(transform: str, estimator: ic.Estimator, frames: Frames) -> None:
    """Not with the backend "eager", which fails at any function within torch.func.grad that is not compiled."""
    of, shape = TRANSFORMS[transform]
    x = torch.linspace(-1.0, 1.0, math.prod(shape)).reshape(shape)
    function = of(loss_of(estimator))
    compiled = torch.compile(function, backend="aot_eager")
    for point in (x, 0.3 * x):
        torch.testing.assert_close(compiled(point), function(point))


COLD = """
import torch, implicit_core as ic
from implicit_core.adapters import torch as ict
def step(x):
    ic.fixed_point(lambda h, x: torch.tanh(0.3 * h + x), torch.zeros_like(x), x).value.sum().backward()
torch.compile(step, backend="eager")(torch.ones(3, requires_grad=True))
print(torch._dynamo.utils.counters["frames"]["total"])
"""


def test_the_compiler_does_not_walk_through_fixed_point() -> None:
    """In a process of its own, where it meets the library for the first time."""
    run = subprocess.run([sys.executable, "-c", COLD], capture_output=True, text=True, timeout=120, check=True)
    # Before 2.12 the compiler also counts frames that it skips at once: 7 are compiled.
    assert int(run.stdout) <= (FRAMES if torch.__version__ >= (2, 12) else 3 * FRAMES)


# What cannot be compiled


class Transposed(nn.Module):
    """A cell that reads an attribute of its parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.eye(8))

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(h @ self.weight.T + x)


@pytest.mark.parametrize("estimator", [ic.Unroll(3, 0.5), ic.Neumann(5, 0.5)], ids=repr)
def test_an_attribute_of_a_parameter_in_a_compiled_cell(estimator: ic.Estimator, frames: Frames) -> None:
    x = torch.ones(3, 8)
    layer = ict.ImplicitLayer(torch.compile(Transposed(), backend="eager"), gradient=estimator)
    plain = ict.ImplicitLayer(Transposed(), gradient=estimator)
    try:
        value = layer(x)
    except AssertionError as error:
        assert not isinstance(estimator, ic.Unroll)
        assert any("write W.t()" in note for note in error.__notes__)  # noqa: PT017  # likewise
    else:
        torch.testing.assert_close(value, plain(x))


FIRST = """
import torch, implicit_core as ic
from implicit_core.adapters import torch as ict
layer = ict.ImplicitLayer(torch.nn.Bilinear(4, 4, 4), solver=ic.FixedPointIteration(max_steps=3))
x = torch.ones(3, 4)
if {warm}:
    import torch._dynamo
    layer(x)
try:
    {call}
except Exception as error:
    print(error)
    raise SystemExit(3)
"""


LAYER = "torch.compile(layer, backend='eager', fullgraph=True)(x)"
FUNCTION = "torch.compile(lambda x: ic.fixed_point(layer.cell, x, x).value, backend='eager', fullgraph=True)(x)"
STRICT = "torch.export.export(layer, (x,), strict=True)"


@pytest.mark.parametrize(
    ("call", "warm", "remedy"),
    [
        (LAYER, False, "use no fullgraph=True"),
        pytest.param(LAYER, True, "compile without fullgraph=True", marks=SHOWS_REASONS),
        (FUNCTION, False, "use no fullgraph=True"),
        (FUNCTION, True, "use no fullgraph=True"),
        (STRICT, False, "export with strict=False"),
        pytest.param(STRICT, True, "export it with strict=False", marks=SHOWS_REASONS),
    ],
)
def test_one_graph_is_refused_and_the_error_says_what_to_do(call: str, warm: bool, remedy: str) -> None:
    """In a process of its own: the first layer that the compiler meets shows another message than later ones."""
    program = FIRST.format(warm=warm, call=call)
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 3, run.stderr
    assert remedy in run.stdout


def by_compiled_autograd(estimator: ic.Estimator) -> list[Tensor]:
    net = model(estimator)
    loss = net(inputs()).square().sum()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        loss.backward()
    return [p.grad for p in net.parameters()]


@pytest.mark.parametrize("estimator", [ic.Unroll(3, 0.5), ic.BPTT(6)], ids=repr)
def test_compiled_autograd(estimator: ic.Estimator, frames: Frames) -> None:
    assert_close(by_compiled_autograd(estimator), gradients(model(estimator), inputs()))


@pytest.mark.parametrize("estimator", [ic.Implicit(), ic.Neumann(5, 0.5), ic.NeumannSeries()], ids=repr)
def test_compiled_autograd_frees_a_graph_that_is_needed(estimator: ic.Estimator, frames: Frames) -> None:
    with pytest.raises(RuntimeError) as caught:
        by_compiled_autograd(estimator)
    assert "compiled_autograd = False" in "".join(traceback.format_exception(caught.value))


# Modules and imports


@pytest.mark.parametrize("module", ["implicit_core.adapters.torch", "implicit_core"])
def test_the_compiler_is_not_imported(module: str) -> None:
    """It takes a second to import. A layer does without it, forward and backward."""
    program = f"""
import sys, torch, {module}
import implicit_core as ic
assert "torch._dynamo" not in sys.modules, "at import"
w = torch.tensor([0.5], requires_grad=True)
for gradient in (ic.Unroll(3, 0.5), ic.Neumann(3, 0.5), ic.Implicit()):
    solution = ic.fixed_point(lambda h, x: torch.tanh(w * h + x), torch.zeros(1), torch.ones(1), gradient=gradient)
    solution.value.backward()
    assert "torch._dynamo" not in sys.modules, gradient
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr


class Twice(ict.ImplicitLayer):
    """A user's own subclass."""

    def forward(self, x: Tensor, h0: Tensor | None = None) -> Tensor:
        return 2 * super().forward(x, h0)


def test_copies_and_subclasses_once_there_is_a_compiler(frames: Frames) -> None:
    """The methods that the compiler is kept out of are those of the class, and still its own functions."""
    net, x = model(ic.Neumann()), inputs()
    wanted = gradients(net, x)
    compiled = torch.compile(net, backend="eager")
    assert_close(gradients(net, x, compiled), wanted)
    for copied in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert_close(gradients(copied, x), wanted)
        assert_close(gradients(copied, x, torch.compile(copied, backend="eager")), wanted)
    assert ict.ImplicitLayer.forward.__name__ == "forward"
    assert ict.ImplicitLayer.forward.__doc__.startswith("The fixed point h, shaped as h0.")


def test_a_subclass(frames: Frames) -> None:
    layer = Twice(Injected(), gradient=ic.Neumann())
    x = torch.randn(3, 8)
    once = ict.ImplicitLayer(layer.cell, gradient=ic.Neumann())
    wanted = gradients(once, x)
    for call in (layer, torch.compile(layer, backend="eager")):
        torch.testing.assert_close(call(x), 2 * once(x))
        assert_close(gradients(layer, x, call), [4 * g for g in wanted])
    assert pickle.loads(pickle.dumps(layer))(x).shape == (3, 8)
