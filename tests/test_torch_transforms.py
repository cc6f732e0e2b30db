"""Second derivatives, and every transform of ``torch.func``, through the PyTorch layer."""

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from problems import layer
from torch.utils.checkpoint import checkpoint

import implicit_core as ic
from implicit_core.adapters import torch as ict

SOLVER = ic.Anderson(rtol=1e-14, max_steps=200)
EXACT = ic.Implicit(ic.GMRES(rtol=1e-14, max_steps=400))
CONVERGED = [EXACT, ic.Neumann(250, 1.0), ic.Unroll(120, 1.0)]
AT_FIXED_POINT = [EXACT, ic.Neumann(4, 0.5), ic.OneStep()]
Layer = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

func = torch.func


def data(batch: int = 2, width: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    case = layer(batch=batch, width=width, contraction=0.7)
    return torch.tensor(case.z["w"]), torch.tensor(case.z["x"])


def loop(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    h = torch.zeros_like(x)
    for _ in range(150):
        h = torch.tanh(h @ w.T + x)
    return h


def layer_of(estimator: ic.Estimator, closed: bool = False, solver: Any = SOLVER) -> Layer:
    """The fixed point as a function of w and x, in z or closed over."""

    def explicit(h: torch.Tensor, z: Any) -> torch.Tensor:
        return torch.tanh(h @ z["w"].T + z["x"][0])

    def call(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        options = {"solver": solver, "gradient": estimator, "batch_ndim": x.ndim - 1}
        if closed:
            return ic.fixed_point(lambda h, _: torch.tanh(h @ w.T + x), torch.zeros_like(x), None, **options).value
        return ic.fixed_point(explicit, torch.zeros_like(x), {"w": w, "x": (x,)}, **options).value

    return call


def loss(fixed_point: Layer) -> Layer:
    return lambda w, x: (fixed_point(w, x) ** 3).sum()


def mapped_pullback(f: Layer) -> Layer:
    def jacobian(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_()
        y = f(w, x)
        basis = torch.eye(y.numel(), dtype=y.dtype).reshape(-1, *y.shape)
        return func.vmap(lambda v: torch.autograd.grad(y, x, v, retain_graph=True)[0])(basis)

    return jacobian


TRANSFORMS: dict[str, Callable[[Layer], Layer]] = {
    "grad": lambda f: func.grad(loss(f), (0, 1)),
    "jacrev": lambda f: func.jacrev(f, (0, 1)),
    "jacfwd": lambda f: func.jacfwd(f, (0, 1)),
    "jvp": lambda f: lambda w, x: func.jvp(f, (w, x), (torch.ones_like(w), torch.cos(x)))[1],
    "jvp in w": lambda f: lambda w, x: func.jvp(lambda w: f(w, x), (w,), (torch.ones_like(w),))[1],
    "vjp": lambda f: lambda w, x: func.vjp(f, w, x)[1](torch.sin(x)),
    "hessian": lambda f: func.hessian(loss(f), (0, 1)),
    "jacrev(jacrev)": lambda f: func.jacrev(func.jacrev(loss(f), (0, 1)), (0, 1)),
    "jacrev(jacfwd)": lambda f: func.jacrev(func.jacfwd(loss(f), (0, 1)), (0, 1)),
    "vmap": lambda f: func.vmap(f, (None, 0)),
    "vmap of batches": lambda f: lambda w, x: func.vmap(f, (None, 0))(w, torch.stack([x, 2 * x, -x])),
    "vmap over parameters": lambda f: lambda w, x: func.vmap(f)(torch.stack([w, 0.5 * w]), x),
    "vmap(vmap)": lambda f: lambda w, x: func.vmap(func.vmap(f, (None, 0)), (0, None))(torch.stack([w, -w]), x),
    "vmap(grad)": lambda f: func.vmap(func.grad(loss(f), (0, 1)), (None, 0)),
    "grad(vmap)": lambda f: func.grad(lambda w, x: (func.vmap(f, (None, 0))(w, x) ** 3).sum(), (0, 1)),
    "vmap of plain autograd": mapped_pullback,
    "vmap(hessian)": lambda f: func.vmap(func.hessian(loss(f), (0, 1)), (None, 0)),
    "jvp(vmap)": lambda f: lambda w, x: func.jvp(func.vmap(f, (None, 0)), (w, x), (w, x))[1],
}


def difference(ours: Any, theirs: Any) -> float:
    if isinstance(theirs, torch.Tensor):
        assert ours.shape == theirs.shape
        return float((ours - theirs).detach().abs().max())
    return max(difference(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("closed", [False, True], ids=["explicit", "closed over"])
@pytest.mark.parametrize("estimator", CONVERGED, ids=repr)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_equal_transforms_of_a_long_loop(name: str, estimator: ic.Estimator, closed: bool) -> None:
    w, x = data()
    transform = TRANSFORMS[name]
    assert difference(transform(layer_of(estimator, closed))(w, x), transform(loop)(w, x)) < 1e-10


def test_a_third_derivative() -> None:
    w, x = data(batch=1, width=2)

    def third(f: Layer) -> torch.Tensor:
        return func.jacfwd(func.jacrev(func.jacrev(lambda x: loss(f)(w, x))))(x)

    assert difference(third(layer_of(EXACT)), third(loop)) < 1e-9


@pytest.mark.parametrize("closed", [False, True], ids=["explicit", "closed over"])
@pytest.mark.parametrize("estimator", [*CONVERGED, ic.Unroll(3, 0.5), ic.BPTT(4)], ids=repr)
def test_gradgradcheck(estimator: ic.Estimator, closed: bool) -> None:
    w, x = (a.requires_grad_() for a in data())
    if estimator in CONVERGED:
        assert torch.autograd.gradcheck(layer_of(estimator, closed), (w, x))
        assert torch.autograd.gradgradcheck(layer_of(estimator, closed), (w, x))
    else:  # a gradient that is not a derivative of the value is checked as a function itself
        steps = surrogate_loop(estimator, w, x)
        ours = layer_of(estimator, closed)
        for a, b in zip(second(ours, w, x), second(steps, w, x), strict=True):
            torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def second(f: Layer, w: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    gradient = torch.autograd.grad(loss(f)(w, x), (w, x), create_graph=True)
    return torch.autograd.grad(sum((g**2).sum() for g in gradient), (w, x))


def surrogate_loop(estimator: Any, w: torch.Tensor, x: torch.Tensor) -> Layer:
    """k damped steps from the fixed point, or plain ones from zero."""
    start = torch.zeros_like(x) if isinstance(estimator, ic.BPTT) else loop(w, x).detach()
    lam = getattr(estimator, "lam", 1.0)

    def steps(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        h = start
        for _ in range(estimator.k):
            h = lam * torch.tanh(h @ w.T + x) + (1 - lam) * h
        return h

    return steps


@pytest.mark.parametrize("way", ["create_graph", "torch.func"])
@pytest.mark.parametrize("estimator", [ic.Neumann(3, 0.5), ic.Neumann(2, 1.0), ic.OneStep()], ids=repr)
def test_a_second_derivative_is_the_surrogates(estimator: ic.Estimator, way: str) -> None:
    """By dense matrices: G(h, x) = (∂F/∂x)ᵀ Dᵀ ∂L/∂h, and the derivative of h is the surrogate again."""
    w, x = data(batch=1)
    w, x = w, x[0]
    k, lam = getattr(estimator, "k", 1), getattr(estimator, "lam", 1.0)

    def f(h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(h @ w.T + x)

    def surrogate(h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        b = lam * func.jacrev(f)(h, x) + (1 - lam) * torch.eye(3, dtype=h.dtype)
        return lam * sum(torch.linalg.matrix_power(b, i) for i in range(k)) @ func.jacrev(f, 1)(h, x)

    def gradient(h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return 3 * h**2 @ surrogate(h, x)

    h = loop(w, x)
    expected = func.jacrev(gradient, 1)(h, x) + func.jacrev(gradient)(h, x) @ surrogate(h, x)
    ours = loss(layer_of(estimator))
    if way == "torch.func":
        got = func.jacrev(func.grad(ours, 1), 1)(w, x)
        torch.testing.assert_close(func.hessian(ours, 1)(w, x), expected, atol=1e-10, rtol=0)
    else:
        x.requires_grad_()
        first = torch.autograd.grad(ours(w, x), x, create_graph=True)[0]
        got = torch.stack([torch.autograd.grad(g, x, retain_graph=True)[0] for g in first])
    torch.testing.assert_close(got, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("estimator", AT_FIXED_POINT, ids=repr)
def test_reverse_and_forward_mode_are_adjoint(estimator: ic.Estimator) -> None:
    w, x = data()
    rows, columns = func.jacrev(layer_of(estimator), (0, 1))(w, x), func.jacfwd(layer_of(estimator), (0, 1))(w, x)
    assert difference(rows, columns) < 1e-12


def test_a_gradient_penalty_reaches_an_intermediate_tensor_that_f_closes_over() -> None:
    """Its gradient is requested explicitly, so it must be an input of the layer, not only a node of its graph."""
    w, x = data()
    t = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)

    def penalty(f: Layer) -> torch.Tensor:
        scaled = t * w
        first = torch.autograd.grad(loss(f)(scaled, x), scaled, create_graph=True)[0]
        return torch.autograd.grad((first**2).sum(), t)[0]

    torch.testing.assert_close(penalty(layer_of(EXACT, closed=True)), penalty(loop), atol=1e-9, rtol=0)


def test_pytrees_and_several_losses_in_second_order() -> None:
    a = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    z = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)

    def f(h: Any, z: torch.Tensor) -> Any:
        return {"x": torch.tanh(a * h["x"]) + z, "y": (0.3 * h["y"][0] + h["x"].sum(1),)}

    h0 = {"x": torch.zeros(2, 3).double(), "y": (torch.zeros(2).double(),)}

    def solved() -> Any:
        return ic.fixed_point(f, h0, z, solver=SOLVER, gradient=EXACT, batch_ndim=1).value

    def looped() -> Any:
        h = h0
        for _ in range(150):
            h = f(h, z)
        return h

    def second(h: Any) -> Any:
        first = torch.autograd.grad(h["y"][0].prod() + h["x"].prod(), (a, z), create_graph=True)
        return torch.autograd.grad(first[0] + (first[1] ** 2).sum(), (a, z))

    for ours, theirs in zip(second(solved()), second(looped()), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-8, rtol=1e-10)


@pytest.mark.parametrize("estimator", AT_FIXED_POINT, ids=repr)
def test_forward_over_forward_says_what_to_use_instead(estimator: ic.Estimator) -> None:
    """PyTorch's forward mode silently loses the outer tangent in an autograd.Function."""
    w, x = data()
    for outer, inner in ((func.jacfwd, func.jacfwd), (func.jacfwd, lambda f: func.jacrev(func.jacfwd(f)))):
        with pytest.raises(NotImplementedError, match="hessian"):
            outer(inner(lambda x: loss(layer_of(estimator))(w, x)))(x)


def test_forward_over_forward_through_unroll() -> None:
    w, x = data()
    steps = surrogate_loop(ic.Unroll(3, 0.5), w, x)
    ours, theirs = (func.jacfwd(func.jacfwd(loss(f), 1), 1)(w, x) for f in (layer_of(ic.Unroll(3, 0.5)), steps))
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)


@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("closed", [False, True], ids=["explicit", "closed over"])
@pytest.mark.parametrize("estimator", AT_FIXED_POINT, ids=repr)
def test_plain_forward_mode_says_what_to_use_instead(estimator: ic.Estimator, closed: bool, grad_mode: Any) -> None:
    w, x = data()
    with torch.autograd.forward_ad.dual_level(), grad_mode():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match=r"use torch\.func\.jvp"):
            layer_of(estimator, closed)(w, dual)
        assert layer_of(estimator, closed)(w, x).shape == x.shape  # nothing here has a tangent


@pytest.mark.parametrize("solver", [ic.FixedPointIteration(), ic.Anderson(), ic.Broyden(), ic.NewtonKrylov()], ids=repr)
def test_vmap_keeps_statuses_and_stops_each_sample_by_itself(solver: ic.Solver) -> None:
    w, x = data(batch=4)
    x = x * torch.tensor([0.0, 0.1, 1.0, 5.0]).double()[:, None]

    def solve(y: torch.Tensor, batch_ndim: int) -> list[torch.Tensor]:
        solution = ic.fixed_point(
            lambda h, y: torch.tanh(h @ w.T + y),
            torch.zeros_like(y),
            y,
            solver=solver,
            batch_ndim=batch_ndim,
            trace=True,
        )
        stats = solution.stats
        return [solution.value, solution.status, stats.steps, stats.residual, stats.trace]

    mapped, batched = func.vmap(lambda y: solve(y, 0))(x), solve(x, 1)
    batched[-1] = batched[-1].T
    for ours, theirs in zip(mapped, batched, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0, equal_nan=True)
    assert len(set(mapped[2].tolist())) > 1


def test_vmap_with_a_fixed_number_of_steps() -> None:
    w, x = data()
    steps = ic.FixedPointIteration(rtol=0.0, max_steps=8)
    run = layer_of(ic.OneStep(), solver=steps)
    expected = torch.zeros_like(x)
    for _ in range(8):
        expected = torch.tanh(expected @ w.T + x)
    torch.testing.assert_close(func.vmap(run, (None, 0))(w, x), expected, atol=1e-14, rtol=0)


def test_throw_names_the_samples_of_a_vmap() -> None:
    slope = torch.tensor([0.5, 2.0, -0.5])

    def solve(a: torch.Tensor) -> torch.Tensor:
        return ic.fixed_point(
            lambda h, a: a * h + 1.0, torch.zeros(2), a, solver=ic.FixedPointIteration(max_steps=60), throw=True
        ).value

    with pytest.raises(ic.SolveError, match=r"in 1 of 3 samples \(1\)"):
        func.vmap(solve)(slope)


def test_a_model_in_functional_form() -> None:
    """Parameters closed over by a module, replaced by ``functional_call``: per-sample gradients, as for any module."""
    torch.manual_seed(0)
    cell = torch.nn.Linear(3, 3).double()
    torch.nn.init.orthogonal_(cell.weight, gain=0.5)
    model = ict.ImplicitLayer(lambda h, x: torch.tanh(cell(h) + x), solver=SOLVER, gradient=EXACT)
    model.inner = cell
    _, x = data()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def sample_loss(parameters: Any, x: torch.Tensor) -> torch.Tensor:
        return (func.functional_call(model, parameters, (x[None],)) ** 3).sum()

    per_sample = func.vmap(func.grad(sample_loss), (None, 0))(parameters, x)
    for i in range(len(x)):
        gradients = torch.autograd.grad((model(x[i : i + 1]) ** 3).sum(), (cell.weight, cell.bias))
        torch.testing.assert_close(per_sample["inner.weight"][i], gradients[0], atol=1e-10, rtol=0)
        torch.testing.assert_close(per_sample["inner.bias"][i], gradients[1], atol=1e-10, rtol=0)


class Scaled(torch.autograd.Function):
    """0.5 h + w, with w held by the function."""

    @staticmethod
    def forward(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return 0.5 * torch.sin(h) + w

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, v: torch.Tensor) -> Any:
        return 0.5 * torch.cos(ctx.saved_tensors[0]) * v, v


def plain(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return 0.5 * torch.sin(h) + w


OPAQUE: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "all of f": Scaled.apply,
    "half of w": lambda h, w: Scaled.apply(h, 0.5 * w) + 0.5 * w,
    "w before it is used": lambda h, w: 0.5 * torch.sin(h) + Scaled.apply(torch.zeros_like(h), w),
}


@pytest.mark.parametrize("name", OPAQUE)
def test_second_derivatives_through_an_autograd_function_in_f(name: str) -> None:
    def second(f: Any) -> torch.Tensor:
        w = torch.tensor([0.3, 0.4], dtype=torch.float64, requires_grad=True)
        closed = ic.fixed_point(lambda h, _: f(h, w), torch.zeros(2).double(), None, solver=SOLVER, gradient=EXACT)
        first = torch.autograd.grad((closed.value**2).sum(), w, create_graph=True)[0]
        return torch.autograd.grad(first.sum(), w)[0]

    torch.testing.assert_close(second(OPAQUE[name]), second(plain), atol=1e-10, rtol=0)


# PyTorch 2.14 has another category.
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
def test_tensors_hidden_in_compiled_code_have_a_first_derivative_only() -> None:
    class Traced(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.tensor([0.3, 0.4]))

        def forward(self, h: torch.Tensor) -> torch.Tensor:
            return plain(h, self.w)

    module = torch.jit.trace(Traced(), torch.zeros(2))
    w = next(module.parameters())
    for f in (lambda h, _: module(h), lambda h, _: 2 * module(h) - module(h)):
        h = ic.fixed_point(f, torch.zeros(2), None, solver=ic.Anderson(rtol=1e-6), gradient=ic.Neumann(3, 1.0)).value
        same = ic.fixed_point(
            plain, torch.zeros(2), w, solver=ic.Anderson(rtol=1e-6), gradient=ic.Neumann(3, 1.0)
        ).value
        gradients = [torch.autograd.grad((a**2).sum(), w, retain_graph=True)[0] for a in (h, same)]
        torch.testing.assert_close(*gradients, atol=1e-4, rtol=0)
        with pytest.raises(NotImplementedError, match="Pass them in z"):
            torch.autograd.grad((h**2).sum(), w, create_graph=True)


@pytest.mark.parametrize("estimator", [ic.Unroll(3, 0.5, recompute=True)], ids=repr)
def test_recompute_is_refused_by_name(estimator: ic.Estimator) -> None:
    w, x = data()
    with pytest.raises(NotImplementedError, match="recompute=False"):
        func.grad(loss(layer_of(estimator)))(w, x)


def test_a_problem_with_callbacks_is_refused_by_name() -> None:
    case = layer(batch=2, width=3)
    w, x = data()

    def run(w: torch.Tensor) -> torch.Tensor:
        problem = ic.Problem(lambda h, z: torch.tanh(h @ z["w"].T + z["x"]), vjp=case.vjp, batch_ndim=1)
        return ic.fixed_point(problem, torch.zeros_like(x), {"w": w, "x": x}, gradient=ic.Neumann(2, 0.5)).value.sum()

    for transform in (func.grad, func.jacfwd, lambda f: func.vmap(lambda _: f(w))):
        with pytest.raises(NotImplementedError, match="pass the plain function f"):
            transform(run)(w)


def test_integer_tensors_can_be_mapped_over() -> None:
    table = torch.tensor(np.linspace(-1, 1, 5))

    def run(index: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        def f(h: torch.Tensor, _: None) -> torch.Tensor:  # PyTorch 2.6 cannot map table[index]
            return torch.tanh(0.5 * h) + table.index_select(0, index.reshape(1))[0]

        return ic.fixed_point(f, torch.zeros(()).double(), None).value

    index = torch.tensor([0, 3, 3])
    mapped = func.vmap(run, (0, None))(index, table)
    torch.testing.assert_close(mapped, torch.stack([run(i, table) for i in index]), atol=1e-12, rtol=0)


def unpacked(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    a, b = h
    u, v = w
    return torch.stack((torch.tanh(0.5 * a * u), 0.3 * torch.sin(b + v) + 0.1 * a))


def in_place(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    y = h.clone()
    y *= 0.3
    y[0] += w[0] ** 2
    return torch.tanh(y + w)


SPELLINGS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "lists": lambda h, w: torch.cat(
        [torch.tanh(0.5 * h[:1] * w[:1]), 0.5 * torch.sin(torch.cat((w[1:], h[1:])).sum(0, True))]
    ),
    "keywords": lambda h, w: torch.tanh(torch.add(input=0.3 * h, other=w, alpha=2)),
    "operands": lambda h, w: torch.tanh(torch.einsum("i,i,j->j", h, w, w)) * 0.3,
    "unpacking": unpacked,
    "in place": in_place,
    "w itself": lambda h, w: w,
    "constant parts": lambda h, w: 0.3 * h.detach() * w + torch.no_grad()(torch.sin)(w),
}


@pytest.mark.parametrize("way", ["create_graph", "hessian"])
@pytest.mark.parametrize("name", SPELLINGS)
def test_second_derivatives_however_f_is_written(name: str, way: str) -> None:
    f = SPELLINGS[name]

    def solved(w: torch.Tensor) -> torch.Tensor:
        start = torch.zeros_like(w)
        h = ic.fixed_point(lambda h, _: f(h, w), start, None, solver=SOLVER, gradient=EXACT).value
        return (h**3).sum()

    def looped(w: torch.Tensor) -> torch.Tensor:
        h = torch.zeros_like(w)
        for _ in range(100):
            h = f(h, w)
        return (h**3).sum()

    w = torch.tensor([0.7, -0.4], dtype=torch.float64)
    if way == "hessian":
        torch.testing.assert_close(func.hessian(solved)(w), func.hessian(looped)(w), atol=1e-9, rtol=0)
    else:
        w.requires_grad_()
        results = []
        for root in (solved, looped):
            first = torch.autograd.grad(root(w), w, create_graph=True)[0]
            results.append(torch.autograd.grad((first**2).sum(), w)[0])
        torch.testing.assert_close(*results, atol=1e-9, rtol=0)


def test_an_output_of_an_autograd_function_must_be_in_z_for_a_second_derivative() -> None:
    """The layer cannot know that it was not created within f."""
    w = torch.tensor([0.3, 0.4], dtype=torch.float64, requires_grad=True)
    made = Scaled.apply(torch.zeros_like(w), w)

    def gradient(f: Any, z: Any, create_graph: bool) -> torch.Tensor:
        h = ic.fixed_point(f, torch.zeros(2).double(), z, solver=SOLVER, gradient=EXACT).value
        return torch.autograd.grad((h**2).sum(), w, create_graph=create_graph, retain_graph=True)[0]

    def closed(h: torch.Tensor, _: Any) -> torch.Tensor:
        return 0.5 * torch.sin(h) + made

    torch.testing.assert_close(gradient(closed, None, False), gradient(plain, made, True).detach())
    with pytest.raises(NotImplementedError, match="Pass them in z"):
        gradient(closed, None, True)


@pytest.mark.parametrize("way", ["create_graph", "hessian"])
def test_second_derivatives_of_a_layer_within_a_layer(way: str) -> None:
    a = torch.tensor([0.5, 0.3], dtype=torch.float64, requires_grad=True)
    b = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)

    def solved(f: Any, x: torch.Tensor) -> torch.Tensor:
        return ic.fixed_point(f, torch.zeros(2).double(), x, solver=SOLVER, gradient=EXACT).value

    def looped(f: Any, x: torch.Tensor) -> torch.Tensor:
        h = torch.zeros(2).double()
        for _ in range(60):
            h = f(h, x)
        return h

    def nested(root: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        def outer(h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(a * root(lambda g, h: 0.5 * torch.sin(b * g) + h, h)) + x

        return (root(outer, torch.ones(2).double()) ** 3).sum()

    results = []
    for root in (solved, looped):
        if way == "hessian":
            results += [func.hessian(lambda a, b, root=root: nested(root, a, b), (0, 1))(a.detach(), b.detach())]
        else:
            first = torch.autograd.grad(nested(root, a, b), (a, b), create_graph=True)
            results += [torch.autograd.grad((first[0] ** 2).sum() + first[1] ** 2, (a, b))]
    assert difference(*results) < 1e-9


class Affine:
    """An object that holds a module but is not a module."""

    def __init__(self, inner: torch.nn.Module) -> None:
        self.inner = [inner]

    def method(self, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.inner[0](h) + x)


HOLDERS: dict[str, Callable[[torch.nn.Module], Any]] = {
    "closure": lambda cell: lambda h, x: torch.tanh(cell(h) + x),
    "list": lambda cell: (lambda cells: lambda h, x: torch.tanh(cells[0](h) + x))([cell]),
    "dict": lambda cell: (lambda cells: lambda h, x: torch.tanh(cells["a"](h) + x))({"a": (cell,)[0]}),
    "partial": lambda cell: functools.partial(lambda cell, h, x: torch.tanh(cell(h) + x), cell),
    "method": lambda cell: Affine(cell).method,
    "module and its part": lambda cell: (lambda both: lambda h, x: torch.tanh(both[0](h) + 0 * cell(h) + x))(
        torch.nn.ModuleList([cell])
    ),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_a_cell_replaced_by_functional_call_in_second_order(holder: str) -> None:
    """As in meta-learning: after the call the module has its own parameters again, which must not be used."""
    _, x = data()
    cell = torch.nn.Linear(3, 3).double()
    layer = ict.ImplicitLayer(HOLDERS[holder](cell), solver=SOLVER, gradient=EXACT)
    layer.inner = cell
    fast = {"inner.weight": data()[0].requires_grad_(), "inner.bias": torch.zeros(3).double().requires_grad_()}

    def second(output: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, ...]:
        first = torch.autograd.grad((output() ** 3).sum(), list(fast.values()), create_graph=True)
        return torch.autograd.grad(sum((g**2).sum() for g in first), list(fast.values()))

    ours = second(lambda: func.functional_call(layer, fast, (x,)))
    theirs = second(lambda: loop(fast["inner.weight"], x + fast["inner.bias"]))
    assert difference(ours, theirs) < 1e-9


def test_parameters_that_are_gone_are_not_replaced_by_others() -> None:
    class Holder:
        def __init__(self) -> None:
            self.w = torch.nn.Parameter(torch.full((2,), 0.5))

    holder = Holder()
    h = ic.fixed_point(lambda h, _: torch.tanh(holder.w * h) + 1, torch.zeros(2), None, gradient=ic.Neumann()).value
    w, holder.w = holder.w, torch.nn.Parameter(torch.full((2,), 0.1))
    with pytest.raises(RuntimeError, match="another parameter"):
        torch.autograd.grad(h.sum(), w, create_graph=True)


class Cell(torch.nn.Module):
    def __init__(self, width: int = 3, norm: Any = None) -> None:
        super().__init__()
        self.linear = norm(torch.nn.Linear(width, width)) if norm else torch.nn.Linear(width, width)

    def forward(self, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(0.5 * self.linear(h) + x)


@pytest.mark.parametrize("norm", [None, torch.nn.utils.parametrizations.weight_norm], ids=["plain", "weight_norm"])
@pytest.mark.parametrize("estimator", [*AT_FIXED_POINT, ic.Unroll(3, 0.5)], ids=repr)
def test_a_module_is_itself_again_after_a_transform(estimator: ic.Estimator, norm: Any) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(ict.ImplicitLayer(Cell(norm=norm), gradient=estimator), torch.nn.Linear(3, 1)).double()
    _, x = data()
    before = {name: id(p) for name, p in model.named_parameters()}
    state = {name: p.detach().clone() for name, p in model.named_parameters()}

    def sample_loss(parameters: Any, x: torch.Tensor) -> torch.Tensor:
        return func.functional_call(model, parameters, (x[None],)).square().sum()

    func.grad(sample_loss)(state, x[0])
    func.vmap(func.grad(sample_loss), (None, 0))(state, x)
    fast = {name: p.clone().requires_grad_() for name, p in state.items()}
    first = torch.autograd.grad(sample_loss(fast, x[0]), list(fast.values()), create_graph=True)
    sum((g**2).sum() for g in first).backward()
    assert {name: id(p) for name, p in model.named_parameters()} == before
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


# PyTorch 2.14 has another category.
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("transform", [func.grad, lambda f: lambda w: func.jvp(f, (w,), (w,))[1]], ids=["grad", "jvp"])
def test_hidden_tensors_are_refused_by_torch_func(transform: Any) -> None:
    product = torch.jit.trace(lambda h, w: h @ w, (torch.zeros(2, 3).double(), torch.zeros(3, 3).double()))
    w, x = data()

    def run(w: torch.Tensor, gradient: ic.Estimator) -> torch.Tensor:
        return ic.fixed_point(
            lambda h, z: torch.tanh(product(h, w) + z), torch.zeros_like(x), x, gradient=gradient, batch_ndim=1
        ).value.sum()

    assert transform(lambda w: run(w, ic.Unroll(2)))(w).abs().sum() > 0
    with pytest.raises(NotImplementedError, match="Pass them in z"):
        transform(lambda w: run(w, ic.Neumann(2)))(w)


class Pair(NamedTuple):
    a: torch.Tensor
    b: torch.Tensor


@pytest.mark.parametrize("way", ["create_graph", "grad", "hessian"])
def test_tensors_in_a_named_tuple(way: str) -> None:
    pair = Pair(torch.tensor([0.3, 0.5]).double().requires_grad_(), torch.tensor([0.2]).double().requires_grad_())

    def value(root: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        pair = Pair(a, b)
        return (root(lambda h: torch.tanh(0.5 * h * torch.cat(pair) + 1)) ** 3).sum()

    def solved(f: Any) -> torch.Tensor:
        start = torch.zeros(3).double()
        return ic.fixed_point(lambda h, _: f(h), start, None, solver=SOLVER, gradient=EXACT).value

    def looped(f: Any) -> torch.Tensor:
        h = torch.zeros(3).double()
        for _ in range(60):
            h = f(h)
        return h

    results, leaves = [], [a.detach() for a in pair]
    for root in (solved, looped):
        if way == "create_graph":
            first = torch.autograd.grad(value(root, *pair), pair, create_graph=True)
            results.append(torch.autograd.grad(sum((g**2).sum() for g in first), pair))
        else:
            results.append(getattr(func, way)(lambda a, b, root=root: value(root, a, b), (0, 1))(*leaves))
    assert difference(*results) < 1e-10


@pytest.mark.parametrize("estimator", CONVERGED, ids=repr)
@pytest.mark.parametrize("name", ["grad", "jvp", "hessian", "vmap(grad)"])
def test_buffers_have_no_derivative_to_ask_for(name: str, estimator: ic.Estimator) -> None:
    norm = torch.nn.BatchNorm1d(3).double().eval()
    norm.running_var.mul_(2)
    norm.running_mean.add_(0.3)

    def normalized(root: Any) -> Layer:
        return lambda w, x: root(lambda h: torch.tanh(0.5 * norm(h @ w.T) + x), torch.zeros_like(x))

    def solved(f: Any, start: torch.Tensor) -> torch.Tensor:
        return ic.fixed_point(lambda h, _: f(h), start, None, solver=SOLVER, gradient=estimator, batch_ndim=1).value

    def looped(f: Any, h: torch.Tensor) -> torch.Tensor:
        for _ in range(120):
            h = f(h)
        return h

    w, x = data()
    x = x if name != "vmap(grad)" else x[:, None]
    ours, theirs = (TRANSFORMS[name](normalized(root))(w, x) for root in (solved, looped))
    assert difference(ours, theirs) < 1e-9


@pytest.mark.parametrize("estimator", CONVERGED, ids=repr)
@pytest.mark.parametrize("name", ["grad", "jvp", "hessian", "vmap", "vmap(grad)"])
def test_a_vmap_within_f(name: str, estimator: ic.Estimator) -> None:
    def rowwise(root: Any) -> Layer:
        def call(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return root(lambda h, x: func.vmap(lambda r, y: torch.tanh(w @ r + y))(h, x), x)

        return call

    def solved(f: Any, x: torch.Tensor) -> torch.Tensor:
        return ic.fixed_point(f, torch.zeros_like(x), x, solver=SOLVER, gradient=estimator, batch_ndim=1).value

    def looped(f: Any, x: torch.Tensor) -> torch.Tensor:
        h = torch.zeros_like(x)
        for _ in range(150):
            h = f(h, x)
        return h

    w, x = data()
    x = x if "vmap" not in name else x[:, None]
    ours, theirs = (TRANSFORMS[name](rowwise(root))(w, x) for root in (solved, looped))
    assert difference(ours, theirs) < 1e-9


def test_tensors_that_f_passes_to_vmap_are_refused() -> None:
    w, x = data()

    def run(x: torch.Tensor) -> torch.Tensor:
        def f(h: torch.Tensor, _: Any) -> torch.Tensor:
            return func.vmap(lambda r, y: torch.tanh(w @ r + y))(h, x)

        return ic.fixed_point(f, torch.zeros_like(x), None, gradient=EXACT, batch_ndim=1).value.sum()

    with pytest.raises(NotImplementedError, match=r"hands them to torch\.vmap"):
        func.grad(run)(x)


def test_a_vmap_or_a_gradient_within_f_in_second_order() -> None:
    w, x = (a.requires_grad_() for a in data())

    def energy(w: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        return torch.cos(w @ h).sum()

    inner = {
        "vmap": lambda h, x: func.vmap(lambda r, y: torch.tanh(w @ r + y))(h, x),
        "grad": lambda h, x: x + 0.3 * func.vmap(func.grad(lambda r: energy(w, r)))(h),
    }
    for f in inner.values():
        h = torch.zeros_like(x)
        for _ in range(150):
            h = f(h, x)
        ours = ic.fixed_point(f, torch.zeros_like(x), x, solver=SOLVER, gradient=EXACT, batch_ndim=1).value
        results = []
        for value in (ours, h):
            first = torch.autograd.grad((value**3).sum(), (w, x), create_graph=True)
            results.append(torch.autograd.grad(sum((g**2).sum() for g in first), (w, x)))
        assert difference(*results) < 1e-9


@pytest.mark.parametrize("name", ["grad", "vmap", "vmap(grad)", "jacfwd", "jvp"])
@pytest.mark.parametrize("estimator", [EXACT, ic.Unroll(2, 0.5)], ids=repr)
def test_variational_dropout_under_transforms(name: str, estimator: ic.Estimator) -> None:
    """The mask is drawn once; if it were drawn in each evaluation, the solve would not converge."""
    w, x = data()
    dropout = ict.VariationalDropout(0.4)

    def run(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        f = ict.constant_within_solve(lambda h, z: dropout(torch.tanh(h @ w.T + z)), dropout)
        options = {"solver": SOLVER, "gradient": estimator, "batch_ndim": x.ndim - 1}
        solution = ic.fixed_point(f, torch.zeros_like(x), x, **options)
        return solution.value + 0 * (
            solution.stats.residual.unsqueeze(-1) / (solution.stats.residual < 1e-9).unsqueeze(-1)
        )

    transform = TRANSFORMS[name]
    if "vmap" in name:
        in_dims = (None, 0)
        inner = func.grad(loss(run), (0, 1)) if "grad" in name else run
        result = func.vmap(inner, in_dims, randomness="different")(w, x)
    else:
        result = func.jacfwd(run, (0, 1), randomness="same")(w, x) if name == "jacfwd" else transform(run)(w, x)
    leaves = result if isinstance(result, tuple) else (result,)
    assert all(torch.isfinite(leaf).all() for leaf in leaves)


def test_statuses_after_a_transform_are_not_kept() -> None:
    layer = ict.ImplicitLayer(Cell()).double()
    _, x = data()
    layer(x)
    assert torch.all(layer.status == ic.CONVERGED)
    func.vmap(lambda y: layer(y[None]))(x)
    assert layer.status is None
    assert layer.stats is None
    copy.deepcopy(layer)


def test_unsupported_derivatives_are_refused_with_an_alternative() -> None:
    w, x = (a.requires_grad_() for a in data())

    def counted(h: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return checkpoint(lambda h, z: torch.tanh(h @ w.T + z), h, z, use_reentrant=False)

    value = ic.fixed_point(counted, torch.zeros_like(x), x, gradient=ic.Neumann(), batch_ndim=1).value
    with pytest.raises(NotImplementedError, match=r"Unroll\(k, lam\) and BPTT\(k\) have every derivative"):
        torch.autograd.grad(value.sum(), w, create_graph=True)
