"""Cells that write to their state in place: every result is that of the same cell without such writes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tape import Tape
from torch import Tensor, nn
from torch.nn import functional as nnf
from torch.utils._python_dispatch import TorchDispatchMode

import implicit_core as ic
from implicit_core.adapters import torch as ict
from implicit_core.adapters.torch.training.correction import fixed_point_correction
from implicit_core.adapters.torch.training.penalty import jacobian_penalty
from implicit_core.theory import certify, contraction, spectral_radius

F64 = torch.float64
N, D = 4, 6
Operation = Callable[[Tensor], Tensor]


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=draws(seed), dtype=F64)


def weight() -> Tensor:
    return (0.7 * torch.linalg.qr(normal(D, D, seed=1)).Q).requires_grad_()


def boundary(h: Tensor) -> Tensor:
    h[:, 0] = 0.25
    return h


def of_a_view(h: Tensor) -> Tensor:
    h.view(-1, 2, D // 2)[:, 1].tanh_()
    return h


def of_a_transposed_view(h: Tensor) -> Tensor:
    h.mT[2:4].mul_(0.5)
    return h


def masked_fill(h: Tensor) -> Tensor:
    return h.masked_fill_(torch.arange(D) == 1, 0.1)


def augmented(h: Tensor) -> Tensor:
    h *= 0.9
    h += 0.1
    return h


def dropped(h: Tensor) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nnf.dropout(h, 0.3, training=True, inplace=True)


OPERATIONS: dict[str, Operation] = {
    "relu_": torch.relu_,
    "ReLU": nn.ReLU(inplace=True),
    "clamp_": lambda h: h.clamp_(-0.4, 0.6),
    "mul_": lambda h: h.mul_(0.9),
    "boundary": boundary,
    "view": of_a_view,
    "transposed view": of_a_transposed_view,
    "masked_fill_": masked_fill,
    "augmented": augmented,
    "dropout": dropped,
    "add_ of itself": lambda h: h.add_(h.tanh(), alpha=-0.3),
}
SOME = ["relu_", "boundary", "view"]
ONE = OPERATIONS["view"]
EXACT = ic.Implicit(ic.GMRES(rtol=1e-12))
ESTIMATORS = [
    ic.Unroll(4, 0.5),
    ic.Unroll(3, 1.0),
    ic.Unroll(4, 0.5, recompute=True),
    ic.Neumann(5, 0.5),
    ic.NeumannSeries(0.8, rtol=1e-10),
    ic.OneStep(),
    EXACT,
    ic.BPTT(6),
]


def picard(problem: ic.Problem, h0: Any, z: Any) -> Any:
    """A callable solver, which hands on what F returned."""
    h = h0
    for _ in range(30):
        h = problem.f(h, z)
    return h


SOLVERS = [
    ic.FixedPointIteration(damping=0.8, rtol=1e-8),
    ic.Anderson(rtol=1e-8),
    ic.Anderson(rtol=1e-8, check_every=4),
    ic.Broyden(rtol=1e-8),
    ic.NewtonKrylov(rtol=1e-8),
    ic.Compacting(ic.Anderson(rtol=1e-8)),
    picard,
]
ids = {"ids": lambda x: getattr(x, "__name__", repr(x))}


def pure(operation: Operation) -> Operation:
    return lambda h: operation(h.clone())


def cell(operation: Operation, w: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda h, x: torch.tanh(operation(h) @ w) + x


def starts() -> list[Tensor]:
    """At zeros many operations write nothing new."""
    return [torch.zeros(N, D, dtype=F64), normal(N, D, seed=5)]


def both(run: Callable[[Operation, Tensor, Tensor, Tensor], Any], operation: Operation, **close: float) -> None:
    """Compare ``run(operation, h0, x, w)`` with and without writes, from each start."""
    for h0 in starts():
        results = []
        for each in (pure(operation), operation):
            start, x, w = h0.clone(), (0.3 * normal(N, D, seed=2)).requires_grad_(), weight()
            results.append(run(each, start, x, w))
            assert torch.equal(start, h0)
        torch.testing.assert_close(results[1], results[0], **{"rtol": 1e-11, "atol": 1e-12, **close})


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_in_every_estimator(name: str, estimator: ic.Estimator) -> None:
    def run(operation: Operation, h0: Tensor, x: Tensor, w: Tensor) -> Any:
        solution = ict.fixed_point(cell(operation, w), h0, x, gradient=estimator, batch_ndim=1)
        gradients = torch.autograd.grad(solution.value.pow(3).sum(), (x, w))
        return solution.value, solution.status, solution.stats.steps, solution.stats.residual, gradients

    both(run, OPERATIONS[name])


@pytest.mark.parametrize("solver", SOLVERS, **ids)
@pytest.mark.parametrize("name", SOME)
def test_operations_in_every_solver(name: str, solver: Any) -> None:
    def run(operation: Operation, h0: Tensor, x: Tensor, w: Tensor) -> Any:
        f = cell(operation, w)
        alone = ic.solve(f, h0, x.detach(), solver=solver, batch_ndim=1)
        solution = ict.fixed_point(f, h0, x, solver=solver, gradient=EXACT, batch_ndim=1)
        gradients = torch.autograd.grad(solution.value.pow(3).sum(), (x, w))
        return alone.value, alone.status, solution.value, solution.status, solution.stats.steps, gradients

    both(run, OPERATIONS[name])


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
@pytest.mark.parametrize("name", ["relu_", "boundary", "augmented", "dropout"])
def test_second_derivatives(name: str, estimator: ic.Estimator) -> None:
    def run(operation: Operation, h0: Tensor, x: Tensor, w: Tensor) -> Any:
        value = ict.fixed_point(cell(operation, w), h0, x, gradient=estimator, batch_ndim=1).value
        first = torch.autograd.grad(value.pow(3).sum(), (x, w), create_graph=True)
        second = torch.autograd.grad(sum(g.pow(2).sum() for g in first), (x, w))
        return *first, *second

    both(run, OPERATIONS[name], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("estimator", [e for e in ESTIMATORS if not getattr(e, "recompute", False)], ids=repr)
@pytest.mark.parametrize("name", ["relu_", "view", "augmented", "masked_fill_"])
def test_transforms(name: str, estimator: ic.Estimator) -> None:
    tangent = normal(N, D, seed=6)

    def run(operation: Operation, h0: Tensor, x: Tensor, w: Tensor) -> Any:
        def loss(x: Tensor, w: Tensor) -> Tensor:
            return layer(x, w).pow(3).sum()

        def layer(x: Tensor, w: Tensor, h0: Tensor = h0, batch_ndim: int = 1) -> Tensor:
            f = cell(operation, w)
            return ict.fixed_point(f, h0, x, gradient=estimator, batch_ndim=batch_ndim).value

        x, w = x.detach(), w.detach()
        gradients = torch.func.grad(loss, (0, 1))(x, w)
        value, pushed = torch.func.jvp(lambda x: layer(x, w), (x,), (tangent,))
        several = torch.vmap(lambda x, h0: layer(x, w, h0))(torch.stack([x, 2 * x]), torch.stack([h0, h0]))
        each = torch.vmap(torch.func.grad(lambda x: loss(x, w)))(torch.stack([x, 2 * x]))
        return gradients, value, pushed, several, each

    both(run, OPERATIONS[name], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("solver", SOLVERS, **ids)
@pytest.mark.parametrize("name", SOME)
def test_without_a_graph(name: str, solver: Any, mode: Callable[..., Any]) -> None:
    def run(operation: Operation, h0: Tensor, x: Tensor, w: Tensor) -> Any:
        with mode():
            alone = ic.solve(cell(operation, w), h0, x, solver=solver, batch_ndim=1)
            unrolled = ict.fixed_point(cell(operation, w), h0, x, solver=solver, batch_ndim=1)
            of_inference = ict.fixed_point(cell(operation, w), h0.clone(), x.clone(), solver=solver, batch_ndim=1)
        return alone.value.clone(), alone.stats.steps.clone(), unrolled.value.clone(), of_inference.value.clone()

    both(run, OPERATIONS[name])


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_a_layer_under_autocast(estimator: ic.Estimator) -> None:
    class Cell(nn.Module):
        def __init__(self, operation: Operation) -> None:
            super().__init__()
            self.linear, self.operation = nn.Linear(D, D), operation
            self.linear.weight.data = weight().detach().float()
            self.linear.bias.data.fill_(0.1)

        def forward(self, h: Tensor, x: Tensor) -> Tensor:
            return torch.tanh(self.linear(self.operation(h))) + x

    for autocast in (False, True):
        results = []
        for operation in (pure(ONE), ONE):
            layer = ict.ImplicitLayer(Cell(operation), gradient=estimator)
            x = normal(N, D, seed=2).float().requires_grad_()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                value = layer(x)
            (value**3).sum().backward()
            results.append((value, x.grad, [p.grad for p in layer.parameters()]))
        torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-7)


class Convolutional(nn.Module):
    """ReLU in place of h itself, then convolution, normalization and ReLU in place."""

    def __init__(self, norm: nn.Module, inplace: bool) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(2))
        self.norm, self.relu = norm, nn.ReLU(inplace=inplace)

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        h = self.relu(self.norm(self.first(self.relu(h))) + x)
        return 0.1 * self.second(h) + x


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
@pytest.mark.parametrize(
    ("norm", "memory"),
    [
        (lambda: nn.GroupNorm(3, 3), torch.contiguous_format),
        (lambda: nn.BatchNorm2d(3).eval(), torch.contiguous_format),
        (lambda: nn.BatchNorm2d(3).eval(), torch.channels_last),
    ],
    ids=["group", "batch", "channels_last"],
)
def test_a_convolutional_cell(norm: Callable[[], nn.Module], memory: torch.memory_format, estimator: Any) -> None:
    results = []
    for inplace in (False, True):
        torch.manual_seed(0)
        layer = ict.ImplicitLayer(Convolutional(norm(), inplace).double(), gradient=estimator)
        x = normal(2, 3, 4, 4, seed=3).to(memory_format=memory).requires_grad_()
        value = layer(x)
        value.pow(2).sum().backward()
        results.append((value, x.grad, [p.grad for p in layer.parameters()], layer.stats.residual))
    torch.testing.assert_close(results[1], results[0], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("solver", "estimator"), [*((s, EXACT) for s in SOLVERS), *((ic.Anderson(), e) for e in ESTIMATORS)], **ids
)
def test_a_leaf_of_a_pytree(solver: Any, estimator: ic.Estimator) -> None:
    results = []
    for operation in (pure(torch.relu_), torch.relu_):
        x, w = (0.3 * normal(N, D, seed=2)).requires_grad_(), weight()

        def f(h: Any, x: Tensor, operation: Operation = operation, w: Tensor = w) -> Any:
            return {"a": 0.5 * h["b"][0] + x, "b": (0.5 * torch.tanh(operation(h["b"][0]) @ w) + 0.3 * h["a"],)}

        h0 = {"a": normal(N, D), "b": (normal(N, D, seed=4),)}
        kept = {"a": h0["a"].clone(), "b": (h0["b"][0].clone(),)}
        value = ict.fixed_point(f, h0, x, solver=solver, gradient=estimator, batch_ndim=1).value
        torch.testing.assert_close(h0, kept, rtol=0, atol=0)
        results.append((value, torch.autograd.grad((value["a"] * value["b"][0]).sum(), (x, w))))
    torch.testing.assert_close(results[1], results[0], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", SOME)
def test_the_cores_products(name: str) -> None:
    """vjp, jvp and a linearization of ``problem(f)``, and the tools of the theory."""
    v = normal(N, D, seed=7)

    def run(operation: Operation, h0: Tensor, x: Tensor, w: Tensor) -> Any:
        x, w = x.detach(), w.detach()
        problem = ict.problem(cell(operation, w), batch_ndim=1)
        found: list[Any] = []
        at = problem.linearize(h0, x)
        found += [at.value, at.vjp_h(v), at.vjp_z(v), at.jvp_h(v), at.jvp_z(v), at.vjp_h(v)]
        h = ic.solve(problem, h0, x, solver=ic.Anderson(rtol=1e-10)).value
        for estimator in ESTIMATORS:
            kept = h.clone()
            value, pullback = estimator.vjp(problem, h, x)
            found += [value, pullback(v)]
            assert torch.equal(h, kept)
            if not isinstance(estimator, ic.NeumannSeries):
                found += [*estimator.jvp(problem, h, x, v)]
            assert torch.equal(h, kept)
        found += [spectral_radius(problem, h, x), contraction(problem, h, x)]
        plain = cell(operation, w)
        found += [contraction(plain, h, x, batch_ndim=1), jacobian_penalty(plain, h, x, generator=draws())]
        certificate = certify(problem, h, x, ic.Neumann(5, 0.5), cotangent=v, steps=10)
        found += [certificate.residual, *certificate.contraction, certificate.spectral_radius]
        found += [certificate.relative_error, certificate.cosine]
        corrected = fixed_point_correction(plain, h0, x, at=(1, 3), batch_ndim=1)
        found += [corrected.solution.value, *corrected.states.values()]
        return found

    both(run, OPERATIONS[name], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_callbacks(estimator: ic.Estimator) -> None:
    """F of a Problem with callbacks may write, too."""

    def run(operation: Operation, h0: Tensor, x: Tensor, w: Tensor) -> Any:
        problem = ict.problem(cell(pure(torch.relu_), w.detach()), batch_ndim=1)
        f = cell(operation, w.detach())
        given = ic.Problem(f, vjp=lambda h, z, v: problem.linearize(h, z).vjp(v), batch_ndim=1)
        solution = ict.fixed_point(given, h0, x, gradient=estimator)
        with torch.no_grad():
            alone = ict.fixed_point(given, h0, x, gradient=estimator)
        return solution.value, solution.status, alone.value, torch.autograd.grad(solution.value.pow(3).sum(), x)

    both(run, torch.relu_)


@pytest.mark.parametrize("solver", SOLVERS[:4], ids=repr)
@pytest.mark.parametrize("name", SOME)
def test_recorded_solves(name: str, solver: Any) -> None:
    class Recorded(ict.CUDAGraphs):
        def _recorder(self, device: torch.device) -> Any:
            return Tape

    def run(operation: Operation, h0: Tensor, x: Tensor, w: Tensor) -> Any:
        graphs = Recorded(solver)
        values = []
        for scale in (1.0, 0.5):  # the second is a replay
            with torch.no_grad():
                solution = ic.solve(cell(operation, w), h0, scale * x, solver=graphs, batch_ndim=1)
            values += [solution.value.clone(), solution.stats.steps.clone()]
        assert graphs.reason is None
        return values

    both(run, OPERATIONS[name])


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
@pytest.mark.parametrize("when", ["third evaluation", "with a graph"])
def test_a_cell_that_writes_only_later_is_refused(when: str, estimator: ic.Estimator) -> None:
    calls = 0

    def f(h: Tensor, x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        writes = calls > 2 if when == "third evaluation" else torch.is_grad_enabled()
        return torch.tanh((torch.relu_(h) if writes else torch.relu(h)) @ w) + x

    w, h0 = weight(), normal(N, D)
    kept = h0.clone()

    def gradient() -> None:
        value = ict.fixed_point(f, h0, normal(N, D, seed=2), gradient=estimator, batch_ndim=1).value
        torch.autograd.grad(value.sum(), w)

    if isinstance(estimator, ic.BPTT) and when == "with a graph":  # no evaluation without one comes before
        gradient()
        assert torch.equal(h0, kept)
        return
    with pytest.raises((ValueError, RuntimeError)) as caught:
        gradient()
    # A leaf of autograd's graph cannot be written to in place: PyTorch says so first.
    told = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert "f wrote to its argument h, which it did not in its first evaluation" in told
    assert torch.equal(h0, kept)


class Clones(TorchDispatchMode):
    """Counts the copies of tensors of the state's shape."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.aten.clone.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("solver", SOLVERS[:4], ids=repr)
def test_a_pure_cell_gets_one_copy_and_a_writing_one_a_copy_at_each_evaluation(solver: ic.Solver) -> None:
    counts: dict[str, list[int]] = {"pure": [], "writes": []}
    for name, operation in (("pure", torch.tanh), ("writes", torch.tanh_)):
        for steps in (1, 4, 8):
            short = type(solver)(max_steps=steps, rtol=0.0, atol=0.0)
            with Clones() as clones, torch.no_grad():
                x = normal(N, D)
                solution = ic.solve(lambda h, x, op=operation: 0.5 * op(h) + x, x, x, solver=short, batch_ndim=1)
            counts[name].append(clones.count)
            evaluations = int(solution.stats.evaluations)
        assert counts[name][0] - (counts["pure"][0]) == 0, "the first evaluation always has a copy"
    assert counts["writes"][2] - counts["pure"][2] == evaluations - 1


def test_each_call_looks_anew() -> None:
    """Nothing is remembered of a function from one call to the next."""
    writes = False

    def f(h: Tensor, x: Tensor) -> Tensor:
        return torch.tanh((torch.relu_(h) if writes else torch.relu(h)) @ w) + x

    w, x, problem = weight().detach(), normal(N, D), None
    values = []
    for writes in (False, True, False):  # noqa: B007  # f reads it
        problem = problem or ic.Problem(f, batch_ndim=1)
        values.append(ic.solve(problem, torch.zeros_like(x), x).value)
    assert torch.equal(values[0], values[1])
    assert torch.equal(values[0], values[2])


class Reads(nn.Module):
    """A cell that only adds a tensor of each kind, which autograd does not save."""

    def __init__(self, *, counts: bool) -> None:
        super().__init__()
        self.counts = counts
        self.weight, self.attribute = nn.Parameter(weight().detach()), 0.1 * torch.ones(D, dtype=F64)
        self.register_buffer("buffer", 0.2 * torch.ones(D, dtype=F64))
        self.register_buffer("evaluations", torch.zeros((), dtype=F64))

    def forward(self, h: Tensor, z: Any) -> Tensor:
        if self.counts:  # which is no reason for an error
            self.evaluations += 1
        return torch.tanh(h @ self.weight + z["x"] + self.buffer + self.attribute)


@pytest.mark.parametrize("changed", ["nothing", "x", "buffer", "attribute"])
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_what_a_second_evaluation_reads_is_as_it_was(estimator: ic.Estimator, changed: str) -> None:
    """The next batch is loaded into the memory of x, or a buffer is updated, before the backward pass."""

    def gradients(change: bool) -> list[Tensor]:
        cell, z = Reads(counts=not second), {"x": normal(N, D, seed=2)}
        value = ict.fixed_point(cell, torch.zeros(N, D, dtype=F64), z, gradient=estimator, batch_ndim=1).value
        with torch.no_grad():
            if change and changed == "x":
                z["x"].copy_(normal(N, D, seed=3))
            elif change and changed != "nothing":
                getattr(cell, changed).mul_(2)
        (first,) = torch.autograd.grad(value.square().sum(), cell.weight, create_graph=second)
        return [first, torch.autograd.grad(first.square().sum(), cell.weight)[0]] if second else [first]

    again = getattr(estimator, "recompute", False)
    for second in (False, True):
        evaluates_again = again or (second and not isinstance(estimator, ic.Unroll | ic.BPTT))
        if again and changed in ("buffer", "attribute"):  # as with any checkpoint
            continue
        if evaluates_again and changed != "nothing":
            with pytest.raises(RuntimeError, match="written to after the solve, and this backward pass") as caught:
                gradients(change=True)
            assert not isinstance(caught.value, NotImplementedError)
        else:
            torch.testing.assert_close(gradients(change=True), gradients(change=False), rtol=0, atol=0)


def test_what_lies_near_the_cell_is_not_what_it_reads() -> None:
    """A lambda refers to the whole model: its head's statistics, and a running sum that a trainer keeps."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = Reads(counts=True), nn.BatchNorm1d(D, dtype=F64)
            self.total, self.calls = torch.zeros((), dtype=F64), torch.zeros(())

        def forward(self, x: Tensor) -> Tensor:
            recomputed = ic.Unroll(4, 0.5, recompute=True)
            f = lambda h, x: self.cell(h, {"x": x})  # noqa: E731  # a lambda, as users write it
            value = self.head(ict.fixed_point(f, torch.zeros_like(x), x, gradient=recomputed, batch_ndim=1).value)
            self.calls += 1
            self.total += value.detach().sum()
            return value

    torch.manual_seed(0)
    net, x = Net(), normal(N, D, seed=2)
    values = net(x), net(2 * x)  # two forward passes before the backward passes
    found = [torch.autograd.grad(value.square()[:, 0].sum(), net.cell.weight)[0] for value in values]
    for gradient, scale in zip(found, (1, 2), strict=True):
        (alone,) = torch.autograd.grad(net(scale * x).square()[:, 0].sum(), net.cell.weight)
        torch.testing.assert_close(gradient, alone, rtol=1e-9, atol=1e-12)
