"""Tensors in channels_last stay so: states, cotangents and outputs, and the numbers are those of contiguous ones."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import optree
import pytest
import torch
from tape import Tape
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import implicit_core as ic
from implicit_core.adapters import torch as ict
from implicit_core.backends.torch import BACKEND

CHANNELS = 3
FORMATS = {2: torch.channels_last, 3: torch.channels_last_3d}
DEFAULT = torch.contiguous_format


def iterated(problem: Any, h: Tensor, z: Tensor) -> Tensor:
    for _ in range(40):
        h = problem(h, z)
    return h


SOLVERS = [
    ic.FixedPointIteration(rtol=1e-10),
    ic.Anderson(rtol=1e-10),
    ic.Broyden(rtol=1e-10),
    ic.NewtonKrylov(rtol=1e-10),
    ic.Compacting(ic.FixedPointIteration(rtol=1e-10)),
    ic.Compacting(ic.Anderson(rtol=1e-10)),
    iterated,
]
ESTIMATORS = [
    ic.Unroll(4, 0.5),
    ic.Unroll(4, 0.5, recompute=True),
    ic.Unroll(4, 0.5, on_growth="nan"),
    ic.Neumann(4, 0.5),
    ic.NeumannSeries(rtol=1e-8),
    ic.Implicit(ic.GMRES(rtol=1e-10)),
    ic.Implicit(ic.BiCGSTAB(rtol=1e-10)),
    ic.BPTT(4),
]


def in_format(x: Tensor, memory: torch.memory_format) -> bool:
    return x.is_contiguous(memory_format=memory)


class Cell(nn.Module):
    """tanh(conv(h) + x), which notes the strides of its states and cotangents."""

    def __init__(self, dimensions: int, memory: torch.memory_format) -> None:
        super().__init__()
        make: Any = {2: nn.Conv2d, 3: nn.Conv3d}[dimensions]
        torch.manual_seed(0)
        self.conv = make(CHANNELS, CHANNELS, 3, padding=1).double()
        with torch.no_grad():
            self.conv.weight *= 0.5
        self.to(memory_format=memory)
        self.memory = memory
        self.states, self.cotangents = Counter[bool](), Counter[bool]()

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        self.states[in_format(h, self.memory)] += 1
        value = torch.tanh(self.conv(h) + x)
        if value.requires_grad:
            value.register_hook(lambda v: self.cotangents.update([in_format(v, self.memory)]))
        return value


def images(dimensions: int, samples: int = 6) -> Tensor:
    """Samples that take different numbers of steps."""
    shape = (samples, CHANNELS, 4, 5, 2)[: 2 + dimensions]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x * torch.linspace(0.01, 3.0, samples, dtype=torch.float64).reshape(-1, *[1] * (dimensions + 1))


@dataclass
class Run:
    cell: Cell
    value: Tensor
    status: Tensor
    steps: Tensor
    gradients: list[Tensor]


def run(dimensions: int, memory: torch.memory_format, loss: Callable[[Tensor], Tensor], **options: Any) -> Run:
    cell, x = Cell(dimensions, memory), images(dimensions).to(memory_format=memory).requires_grad_()
    layer = ict.ImplicitLayer(cell, **options)
    value = layer(x)
    loss(value).backward()
    assert layer.status is not None
    assert layer.stats is not None
    assert x.grad is not None
    gradients = [x.grad, *(p.grad for p in cell.parameters() if p.grad is not None)]
    return Run(cell, value, layer.status, layer.stats.steps, gradients)


def squares(h: Tensor) -> Tensor:
    return h.square().sum()


def alike(a: Run, b: Run) -> None:
    """The same numbers, up to sums in another order."""
    torch.testing.assert_close(a.value, b.value, rtol=0, atol=1e-9)
    assert torch.equal(a.status, b.status)
    assert torch.equal(a.steps, b.steps)
    for x, y in zip(a.gradients, b.gradients, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-7 * float(x.abs().max()))


@pytest.mark.parametrize("batch_ndim", [0, 1])
@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: "iterated" if solver is iterated else repr(solver))
def test_every_solver_keeps_it(solver: Any, dimensions: int, batch_ndim: int) -> None:
    if isinstance(solver, ic.Compacting) and not batch_ndim:
        solver = solver.solver
    options = {"solver": solver, "gradient": ic.Neumann(4, 0.5), "batch_ndim": batch_ndim}
    last = run(dimensions, FORMATS[dimensions], squares, **options)
    alike(last, run(dimensions, DEFAULT, squares, **options))
    if solver is not iterated:  # which calls F with what F returned, and a convolution in 3D returns C order
        assert set(last.cell.states) == {True}
    assert set(last.cell.cotangents) == {True}
    assert in_format(last.value, FORMATS[dimensions])
    assert in_format(last.gradients[0], FORMATS[dimensions])


# The cotangent of a sum is one number that is expanded to the shape of h, that of the other loss is contiguous.
LOSSES = {"squares": squares, "sum": torch.sum, "contiguous": lambda h: squares(h.contiguous().flatten(1))}


@pytest.mark.parametrize("loss", list(LOSSES))
@pytest.mark.parametrize("units", [False, True])
@pytest.mark.parametrize("gradient", ESTIMATORS, ids=repr)
def test_every_estimator_keeps_it(gradient: ic.Estimator, units: bool, loss: str) -> None:
    scale = torch.linspace(0.5, 2.0, images(2)[0].numel(), dtype=torch.float64).reshape(images(2)[0].shape)
    options = {"gradient": gradient, "scale": scale if units else None, "solver": ic.Anderson(rtol=1e-10)}
    last = run(2, torch.channels_last, LOSSES[loss], **options)
    alike(last, run(2, DEFAULT, LOSSES[loss], **options))
    assert set(last.cell.states) == {True}
    assert in_format(last.value, torch.channels_last)
    if isinstance(gradient, (ic.Unroll, ic.BPTT)):  # a plain graph, which the loss hands its cotangent to
        assert loss != "squares" or set(last.cell.cotangents) == {True}
    else:
        assert set(last.cell.cotangents) == {True}


def test_an_f_that_returns_another_format_is_copied_and_right() -> None:
    cell = Cell(2, torch.channels_last)
    x = images(2).to(memory_format=torch.channels_last)
    kept, made = (
        ict.ImplicitLayer(f, solver=ic.Broyden(rtol=1e-10), gradient=ic.Implicit())
        for f in (cell, lambda h, x: cell(h, x).contiguous())
    )
    values = [layer(x) for layer in (kept, made)]
    torch.testing.assert_close(*values, rtol=0, atol=1e-12)
    assert set(cell.states) == {True}
    assert in_format(values[1], torch.channels_last)
    ours, theirs = (torch.autograd.grad(squares(value), cell.conv.weight)[0] for value in values)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


class Copies(TorchDispatchMode):
    """Counts the copies of a tensor of some size."""

    OPERATIONS = "clone", "copy_", "_to_copy", "contiguous", "_reshape_copy", "index_put_"

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.found = numel, Counter[str]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name in self.OPERATIONS and isinstance(result, Tensor) and result.numel() == self.numel:
            self.found[name] += 1
        return result


@pytest.mark.parametrize("gradient", [ic.Unroll(4, 0.5), ic.Neumann(4, 0.5), ic.Implicit()], ids=repr)
@pytest.mark.parametrize("solver", SOLVERS[:4], ids=repr)
def test_it_takes_no_more_copies(solver: Any, gradient: ic.Estimator) -> None:
    found = []
    for memory in (DEFAULT, torch.channels_last):
        cell, x = nn.Tanh(), images(2).to(memory_format=memory).requires_grad_()
        layer = ict.ImplicitLayer(lambda h, x, cell=cell: cell(0.5 * h + x), solver=solver, gradient=gradient)
        with Copies(x.numel()) as copies:
            squares(layer(x)).backward()
        found.append(copies.found)
    assert found[0] == found[1]
    assert found[0].total() > 0, "the start of a solve is copied"


def test_half_precision() -> None:
    x = images(2).to(torch.bfloat16)
    values = []
    for memory in (DEFAULT, torch.channels_last):
        f = seen(lambda h, z: torch.tanh(0.5 * h + z), memory)
        start = torch.zeros_like(x).to(memory_format=memory)
        values.append(
            ic.solve(f, start, x.to(memory_format=memory), batch_ndim=1, solver=ic.FixedPointIteration()).value
        )
        assert in_format(values[-1], memory)
    assert torch.equal(*values)


def seen(f: Callable[..., Tensor], memory: torch.memory_format) -> Callable[..., Tensor]:
    """``f``, to which a state in another format is an error."""

    def call(h: Tensor, z: Any) -> Tensor:
        assert in_format(h, memory)
        return f(h, z)

    return call


def test_leaves_of_a_state_have_formats_of_their_own() -> None:
    x, w = images(2).to(memory_format=torch.channels_last), images(2)

    def f(h: Any, z: Any) -> Any:
        assert in_format(h["a"], torch.channels_last)
        assert h["b"].is_contiguous()
        assert h["c"].shape == (6,)
        a = torch.tanh(0.3 * h["a"] + 0.2 * h["b"] + x)
        return {"a": a, "b": torch.tanh(0.4 * h["a"] + w).contiguous(), "c": 0.5 * h["c"] + a.mean((1, 2, 3))}

    h0 = {"a": torch.zeros_like(x), "b": torch.zeros_like(w), "c": torch.zeros(6, dtype=torch.float64)}
    scale = {"a": torch.rand(CHANNELS, 4, 5, generator=torch.Generator().manual_seed(3)) + 0.5, "b": 1.0, "c": 2.0}
    solution = ic.solve(f, h0, None, solver=ic.Anderson(rtol=1e-12), batch_ndim=1, scale=scale)
    assert bool(solution.converged.all())
    residual = optree.tree_map(torch.sub, f(solution.value, None), solution.value)
    assert max(float(x.abs().max()) for x in optree.tree_leaves(residual)) < 1e-10


def test_units_are_in_the_order_of_the_state() -> None:
    """‖(F(h) - h) / scale‖ of each sample, by hand."""
    x = images(2).to(memory_format=torch.channels_last)
    scale = torch.rand(CHANNELS, 4, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.5
    whole = scale * torch.linspace(1, 2, 6, dtype=torch.float64).reshape(-1, 1, 1, 1)
    for units in (scale, whole, scale[:, :1, :1]):
        problem = ic.Problem(lambda h, z: torch.tanh(h + z), batch_ndim=1, scale=units)
        once = ic.solve(problem, torch.zeros_like(x), x, solver=ic.FixedPointIteration(max_steps=1))
        expected = (torch.tanh(x) / units).flatten(1).norm(dim=1)
        torch.testing.assert_close(once.stats.residual, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "gradient", [ic.Neumann(4, 0.5), ic.Implicit(ic.GMRES(rtol=1e-12)), ic.Unroll(4, 0.5)], ids=repr
)
def test_second_derivatives_and_forward_mode(gradient: ic.Estimator) -> None:
    def value(z: Tensor) -> Tensor:
        def f(h: Tensor, z: Tensor) -> Tensor:
            return torch.tanh(0.5 * h.roll(1, 1) + z)

        start = torch.zeros_like(z)
        return ic.fixed_point(f, start, z, gradient=gradient, solver=ic.Anderson(rtol=1e-12), batch_ndim=1).value

    found = []
    for memory in (DEFAULT, torch.channels_last):
        x = images(2, 3).to(memory_format=memory)
        along = (torch.cos(x),)
        tangent = torch.func.jvp(value, (x,), along)[1]
        forward = torch.func.jvp(torch.func.grad(lambda z: value(z).pow(3).sum()), (x,), along)[1]
        z = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(value(z).pow(3).sum(), z, create_graph=True)
        (backward,) = torch.autograd.grad(first, z, along)
        found.append((tangent, first.detach(), forward, backward))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_mapped_over_a_further_axis() -> None:
    x = torch.stack([images(2), 0.5 * images(2)])
    last = torch.stack([y.to(memory_format=torch.channels_last) for y in x])
    formats = Counter[bool]()

    def value(x: Tensor) -> Tensor:
        def f(h: Tensor, z: Tensor) -> Tensor:
            formats[h.stride(1) == 1] += 1
            return torch.tanh(0.5 * h + z)

        return ic.fixed_point(f, torch.zeros_like(x), x, solver=ic.Anderson(rtol=1e-10), batch_ndim=1).value

    torch.testing.assert_close(torch.vmap(value)(last), torch.vmap(value)(x), rtol=0, atol=1e-10)
    one = torch.stack([value(y) for y in x])
    torch.testing.assert_close(torch.vmap(value)(last), one, rtol=0, atol=1e-9)


@pytest.mark.parametrize("memory", list(FORMATS.values()), ids=str)
@pytest.mark.parametrize(("batch_ndim", "units"), [(1, False), (2, True)])
def test_certificates_of_batches_with_several_axes(batch_ndim: int, units: bool, memory: torch.memory_format) -> None:
    """The conditions take the whole batch as one system, whose states are those of the samples."""
    shape = (2, 2, 3, 2, 2) if memory is torch.channels_last_3d or batch_ndim == 2 else (2, 3, 2, 2)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    scale = torch.rand(shape[batch_ndim:], generator=generator, dtype=torch.float64) + 0.5 if units else None
    if x.ndim == 5 and memory is torch.channels_last:
        last = torch.stack([y.to(memory_format=memory) for y in x])
    else:
        last = x.to(memory_format=memory)

    def f(h: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(0.4 * h * z + 0.3 * h.roll(1, -1) + x)

    found = []
    for h in (x, last):
        problem = ict.problem(f, batch_ndim=batch_ndim, scale=scale)
        certificate = ic.theory.certify(problem, h, 0.5 + 0.1 * x.sum((0, 1)), ic.Neumann(3, 0.5), steps=24)
        found.append([c.left.value for c in (certificate.condition_6, certificate.condition_8) if c is not None])
        found[-1] += [certificate.sigma_max.value, float(certificate.contraction.value.max())]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-6)


@pytest.mark.parametrize("shape", [(4, 1, 3, 5), (4, 3, 1, 1), (1, 1, 2, 2)])
def test_a_tensor_that_is_also_contiguous_is_in_c_order(shape: tuple[int, ...]) -> None:
    x = torch.ones(shape).to(memory_format=torch.channels_last)
    assert in_format(x, torch.channels_last)
    assert x.is_contiguous()
    assert BACKEND.axis_order(x, 1) is None


@pytest.mark.parametrize("batch_ndim", [0, 1])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 3, 4, 5), (2, 3, 4, 1), (2, 3, 4, 5, 2), (2, 3, 1, 5, 1)])
def test_what_pytorch_calls_channels_last(shape: tuple[int, ...], batch_ndim: int) -> None:
    """Its own answer, ``is_contiguous(memory_format=...)``, for tensors in some formats."""
    memory = FORMATS[len(shape) - 2]
    x = torch.randn(shape)
    for y in (x, x.to(memory_format=memory), x.transpose(1, 2), x[:, :, ::2], x.expand(shape), x[:1].expand(shape)):
        expected = in_format(y, memory) and not y.is_contiguous()
        assert (BACKEND.axis_order(y, batch_ndim) is not None) == expected
    assert BACKEND.axis_order(x.to(memory_format=memory), 2) is None


def test_other_orders_are_brought_into_c_order() -> None:
    """A transposed start is no format of PyTorch's: F may reshape what it sees by ``view``."""
    x = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(2, 3, 4)
    f: Any = lambda h, z: torch.tanh(0.5 * h.view(2, -1).flip(1).view(h.shape) + z)  # noqa: E731
    turned = torch.zeros(2, 4, 3, dtype=torch.float64).mT
    expected = ic.solve(f, torch.zeros_like(x), x, batch_ndim=1)
    assert torch.equal(ic.solve(f, turned, x, batch_ndim=1).value, expected.value)


@pytest.mark.parametrize("solver", [ic.FixedPointIteration(), ic.Anderson(), ic.Broyden(), ic.NewtonKrylov()], ids=repr)
def test_numpy_keeps_c_order(solver: ic.Solver) -> None:
    """NumPy has no such format: whatever the order of h0, F sees C order, and the numbers are bit for bit the same."""
    x = np.linspace(-1, 1, 24).reshape(2, 3, 4)
    orders = Counter[bool]()

    def f(h: Any, z: Any) -> Any:
        orders[h.flags.c_contiguous] += 1
        return np.tanh(0.5 * h + z)

    def jvp(h: Any, z: Any, dh: Any, dz: Any) -> Any:
        return (1 - np.tanh(0.5 * h + z) ** 2) * (0.5 * dh + dz)

    problem = ic.Problem(f, jvp=jvp, batch_ndim=1)
    c, fortran = (ic.solve(problem, np.zeros((2, 3, 4), order=order), x, solver=solver) for order in ("C", "F"))
    assert np.array_equal(c.value, fortran.value)
    assert fortran.value.flags.c_contiguous
    assert set(orders) == {True}


class OnTape(ict.CUDAGraphs):
    """Records on the CPU."""

    def _recorder(self, device: torch.device) -> Any:
        return Tape


def test_recordings_are_of_one_format() -> None:
    graphs = OnTape(ic.Anderson(rtol=1e-10))
    conv, x = Cell(2, torch.channels_last).conv, images(2)

    def f(h: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(conv(h) + z)

    for _ in range(2):
        for memory in (DEFAULT, torch.channels_last):
            start, z = torch.zeros_like(x).to(memory_format=memory), x.to(memory_format=memory)
            with torch.no_grad():
                recorded = ic.solve(seen(f, memory), start, z, solver=graphs, batch_ndim=1)
                plain = ic.solve(f, start, z, solver=graphs.solver, batch_ndim=1)
            assert graphs.reason is None
            assert in_format(recorded.value, memory)
            torch.testing.assert_close(recorded.value, plain.value, rtol=0, atol=1e-9)
    assert len(graphs._recordings) == 2


def test_a_recording_of_an_f_that_ignores_its_state() -> None:
    graphs, x = OnTape(ic.Anderson()), images(2)
    for memory in (DEFAULT, torch.channels_last):
        start = torch.zeros_like(x).to(memory_format=memory)
        solution = ic.solve(lambda h, z: z, start, x, solver=graphs, batch_ndim=1)
        assert graphs.reason is None
        assert in_format(solution.value, memory)
        assert torch.equal(solution.value, x)
