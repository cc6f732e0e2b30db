"""The PyTorch binding: the same layer, with autograd around it."""

import warnings
import weakref
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from gpus import on_gpu_with_torch
from libraries import NUMPY, TORCH
from problems import Case, layer, symmetric_layer
from torch.overrides import TorchFunctionMode

import implicit_core as ic
from implicit_core.adapters import torch as ict
from implicit_core.backends.torch import BACKEND
from implicit_core.theory import contraction

SOLVER = ic.Anderson(rtol=1e-13, max_steps=200)
EXACT = ic.Implicit(ic.GMRES(rtol=1e-13, max_steps=400))
ESTIMATORS = [ic.OneStep(), ic.Neumann(5, 0.5), ic.Unroll(5, 0.5), ic.Unroll(5, 0.5, recompute=True), EXACT]


def tensors(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """h0, and W and x that want gradients."""
    w, x = (torch.tensor(case.z[name], requires_grad=True) for name in ("w", "x"))
    return torch.zeros_like(x), w, x


def loss(h: torch.Tensor) -> torch.Tensor:
    return (h**3).sum()


def layer_of(w: torch.Tensor) -> Any:
    """F with W closed over and x explicit."""
    return lambda h, z: torch.tanh(h @ w.T + z)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_gradients_equal_the_numpy_callbacks(estimator: ic.Estimator) -> None:
    case = layer()
    h0, w, x = tensors(case)
    solution = ic.fixed_point(layer_of(w), h0, x, solver=SOLVER, gradient=estimator, batch_ndim=1)
    grad_w, grad_x = torch.autograd.grad(loss(solution.value), (w, x))

    plain = ic.solve(case.problem(), case.h0, case.z, solver=SOLVER)
    value, pullback = estimator.vjp(case.problem(), plain.value, case.z)
    expected = pullback(3 * value**2)
    np.testing.assert_allclose(solution.value.detach().numpy(), value, atol=1e-10)
    np.testing.assert_allclose(grad_w.numpy(), expected["w"], atol=1e-10)
    np.testing.assert_allclose(grad_x.numpy(), expected["x"], atol=1e-10)
    assert not solution.stats.residual.requires_grad
    np.testing.assert_array_equal(solution.status.numpy(), plain.status)


@pytest.mark.parametrize("estimator", [EXACT, ic.Neumann(300, 1.0), ic.Unroll(300, 1.0), ic.BPTT(300)], ids=repr)
def test_gradients_equal_gradients_of_a_long_loop(estimator: ic.Estimator) -> None:
    h0, w, x = tensors(layer())
    h = h0
    for _ in range(300):
        h = layer_of(w)(h, x)
    expected = torch.autograd.grad(loss(h), (w, x))
    solution = ic.fixed_point(layer_of(w), h0, x, solver=SOLVER, gradient=estimator, batch_ndim=1)
    for ours, theirs in zip(torch.autograd.grad(loss(solution.value), (w, x)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=0)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_a_problem_is_differentiated_with_its_own_callbacks(estimator: ic.Estimator) -> None:
    case = layer()
    h0, w, x = tensors(case)
    for problem in (case.problem(TORCH), ict.problem(lambda h, z: torch.tanh(h @ z["w"].T + z["x"]), batch_ndim=1)):
        solution = ic.fixed_point(problem, h0, {"w": w, "x": x}, solver=SOLVER, gradient=estimator)
        through = torch.autograd.grad(loss(solution.value), (w, x))
        plain = ic.fixed_point(layer_of(w), h0, x, solver=SOLVER, gradient=estimator, batch_ndim=1)
        for ours, theirs in zip(through, torch.autograd.grad(loss(plain.value), (w, x)), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)


@pytest.mark.parametrize("estimator", [*ESTIMATORS, ic.BPTT(4)], ids=repr)
def test_derivatives_of_an_autograd_problem_equal_hand_written_ones(estimator: ic.Estimator) -> None:
    case = layer()
    rng = np.random.default_rng(0)
    v, dz = rng.normal(size=case.h0.shape), {name: rng.normal(size=a.shape) for name, a in case.z.items()}
    h = case.oracle()
    problem = ict.problem(lambda h, z: torch.tanh(h @ z["w"].T + z["x"]), batch_ndim=1)
    gradient = estimator.vjp(problem, TORCH.array(h), TORCH.array(case.z))[1](TORCH.array(v))
    tangent = estimator.jvp(problem, TORCH.array(h), TORCH.array(case.z), TORCH.array(dz))[1]
    expected = estimator.vjp(case.problem(), h, case.z)[1](v)
    for name in ("w", "x"):
        np.testing.assert_allclose(gradient[name].numpy(), expected[name], atol=1e-10)
    np.testing.assert_allclose(tangent.numpy(), estimator.jvp(case.problem(), h, case.z, dz)[1], atol=1e-10)


def test_newton_solves_an_autograd_problem_with_one_evaluation_a_step() -> None:
    case = layer()
    h0, w, x = (a.detach() for a in tensors(case))
    calls = 0

    def f(h: torch.Tensor, z: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return torch.tanh(h @ w.T + z)

    solution = ic.solve(ict.problem(f, batch_ndim=1), h0, x, solver=ic.NewtonKrylov(rtol=1e-12))
    assert torch.all(solution.status == ic.CONVERGED)
    np.testing.assert_allclose(solution.value.numpy(), case.oracle(), atol=1e-10)
    assert calls == int(solution.stats.evaluations) <= 8, "products go backwards through the graph of a point"


def test_pushforwards_at_expanded_tensors() -> None:
    """Forward mode itself refuses them."""
    problem = ict.problem(lambda h, z: torch.sin(h) * z)
    h, z = torch.ones(1).expand(3), torch.full((1,), 0.5).expand(3)
    tangent = ic.Neumann(2, 1.0).jvp(problem, h, z, torch.ones(1).expand(3))[1]
    slope = 0.5 * torch.cos(h)
    torch.testing.assert_close(tangent, (1 + slope) * torch.sin(h))


def test_integer_and_unused_leaves_of_z() -> None:
    problem = ict.problem(lambda h, z: 0.5 * h + z["x"][z["index"]])
    z = {"x": torch.ones(4, dtype=torch.float64), "index": torch.tensor([1, 1, 3]), "unused": torch.ones(2), "n": None}
    h = torch.full((3,), 2.0, dtype=torch.float64)
    gradient = ic.Implicit().vjp(problem, h, z)[1](torch.ones_like(h))
    assert gradient["index"] is None
    torch.testing.assert_close(gradient["x"], torch.tensor([0.0, 4.0, 0.0, 2.0], dtype=torch.float64))
    torch.testing.assert_close(gradient["unused"], torch.zeros(2))


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_modules_frozen_parameters_and_non_leaf_inputs(estimator: ic.Estimator) -> None:
    torch.manual_seed(0)
    cell = torch.nn.Linear(6, 6).double()
    torch.nn.init.orthogonal_(cell.weight, gain=0.5)
    cell.bias.requires_grad_(False)
    leaf = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    x = leaf * 2
    cell.eval()  # gradients follow autograd's state, never the module's mode
    solution = ic.fixed_point(
        lambda h, z: torch.tanh(cell(h) + z), torch.zeros(4, 6).double(), x, gradient=estimator, batch_ndim=1
    )
    loss(solution.value).backward()
    w, doubled = cell.weight.detach().requires_grad_(), x.detach().requires_grad_()
    same = ic.fixed_point(
        lambda h, z: torch.tanh(h @ w.T + cell.bias + z),
        torch.zeros(4, 6).double(),
        doubled,
        gradient=estimator,
        batch_ndim=1,
    )
    expected = torch.autograd.grad(loss(same.value), (w, doubled))
    assert cell.bias.grad is None
    torch.testing.assert_close(cell.weight.grad, expected[0])
    torch.testing.assert_close(leaf.grad, 2 * expected[1])


@pytest.mark.parametrize(
    ("estimator", "value", "backward"),
    [
        (ic.OneStep(), 1, 0),
        (ic.Neumann(5, 0.5), 1, 0),
        (EXACT, 1, 0),
        (ic.Unroll(5, 0.5), 5, 0),
        (ic.Unroll(5, 0.5, recompute=True), 5, 5),
        (ic.BPTT(5), 5, 0),
    ],
    ids=repr,
)
def test_evaluations_of_the_layer(estimator: ic.Estimator, value: int, backward: int) -> None:
    h0, w, x = tensors(layer())
    calls = 0

    def f(h: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return layer_of(w)(h, z)

    solution = ic.fixed_point(f, h0, x, gradient=estimator, batch_ndim=1)
    assert calls == int(solution.stats.evaluations) + value
    loss(solution.value).backward()
    assert calls == int(solution.stats.evaluations) + value + backward


class Tanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        value = torch.tanh(x)
        ctx.save_for_backward(value)
        return value

    @staticmethod
    def backward(ctx: Any, v: torch.Tensor) -> torch.Tensor:
        return (1 - ctx.saved_tensors[0] ** 2) * v


@pytest.mark.parametrize("estimator", [*ESTIMATORS, ic.BPTT(30)], ids=repr)
def test_f_may_end_in_an_autograd_function(estimator: ic.Estimator) -> None:
    """Whose node in the graph must outlive the value of F."""
    h0, w, x = tensors(layer())

    def gradients(tanh: Any) -> list[torch.Tensor]:
        def f(h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return tanh(h @ w.T + x)

        value = ic.fixed_point(f, h0, x, solver=SOLVER, gradient=estimator, batch_ndim=1).value
        at = ict.problem(f, batch_ndim=1).linearize(value.detach(), x)
        penalty = ict.jacobian_penalty(f, value.detach(), x, generator=torch.Generator().manual_seed(0))
        return [*torch.autograd.grad(loss(value) + penalty.sum(), (w, x)), at.vjp_h(torch.ones_like(h0))]

    for ours, expected in zip(gradients(Tanh.apply), gradients(torch.tanh), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_h0_gets_no_gradient_and_the_graph_can_be_kept(estimator: ic.Estimator) -> None:
    h0, w, x = tensors(layer())
    h0 = h0.requires_grad_()
    solution = ic.fixed_point(layer_of(w), h0, x, gradient=estimator, batch_ndim=1)
    value = loss(solution.value)
    first = torch.autograd.grad(value, (w, x, h0), retain_graph=True, allow_unused=True)
    second = torch.autograd.grad(value, (w, x), retain_graph=True)
    assert first[2] is None
    torch.testing.assert_close(first[:2], second)


def test_several_losses_on_one_solve_add_up() -> None:
    h0, w, x = tensors(layer())
    solution = ic.fixed_point(layer_of(w), h0, x, gradient=EXACT, batch_ndim=1)
    whole = torch.autograd.grad(loss(solution.value) + solution.value.sum(), (w,), retain_graph=True)[0]
    parts = [torch.autograd.grad(v, (w,), retain_graph=True)[0] for v in (loss(solution.value), solution.value.sum())]
    torch.testing.assert_close(whole, parts[0] + parts[1], atol=1e-10, rtol=0)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_without_grad_there_is_no_graph(estimator: ic.Estimator) -> None:
    h0, w, x = tensors(layer())
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            solution = ic.fixed_point(layer_of(w), h0, x, gradient=estimator, batch_ndim=1)
        assert not solution.value.requires_grad


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("estimator", [e for e in ESTIMATORS if not getattr(e, "recompute", False)], ids=repr)
def test_pushforwards_in_every_mode_of_autograd(estimator: ic.Estimator, mode: Any) -> None:
    """In inference mode, PyTorch's own are zero before version 2.12."""
    case = layer()
    h0, w, x = tensors(case)
    with mode():
        problem = ict.problem(layer_of(w), batch_ndim=1)
        solution = ic.solve(problem, h0, x + 0, solver=SOLVER)
        at, v = problem.linearize(solution.value, x + 0), torch.ones_like(x) * 1.0
        along_h, along_z = at.jvp_h(v), at.jvp_z(v)
        tangent = estimator.jvp(problem, solution.value, x + 0, v)[1]
        norms = contraction(problem, solution.value, x + 0, steps=300)

    h, jacobian = solution.value.numpy(), case.z["w"]
    slope = 1 - np.tanh(h @ jacobian.T + case.z["x"]) ** 2
    np.testing.assert_allclose(along_z.detach().numpy(), slope, rtol=1e-12)
    np.testing.assert_allclose(along_h.detach().numpy(), slope * jacobian.sum(1), rtol=1e-9)
    jacobians = slope[:, :, None] * jacobian
    np.testing.assert_allclose(norms.detach().numpy(), np.linalg.norm(jacobians, 2, (1, 2)), rtol=1e-3)
    with_w = {"w": case.z["w"], "x": case.z["x"]}, {"w": np.zeros_like(jacobian), "x": np.ones_like(slope)}
    expected = estimator.jvp(case.problem(), h, *with_w)[1]
    np.testing.assert_allclose(tangent.detach().numpy(), expected, atol=1e-9)


@pytest.mark.parametrize("estimator", [ic.Unroll(2, 0.5), ic.Unroll(3, 1.0), ic.BPTT(3)], ids=repr)
def test_torch_func_differentiates_the_surrogate_itself(estimator: ic.Estimator) -> None:
    """With few steps, so that a tangent through the solver would change the result."""
    h0, w, x = (a.detach() for a in tensors(layer(batch=2, width=3)))
    h = ic.solve(layer_of(w), h0, x, solver=SOLVER, batch_ndim=1).value

    def steps(x: torch.Tensor) -> torch.Tensor:
        end = h0 if isinstance(estimator, ic.BPTT) else h
        lam = getattr(estimator, "lam", 1.0)
        for _ in range(estimator.k):
            end = lam * layer_of(w)(end, x) + (1 - lam) * end
        return loss(end)

    def run(x: torch.Tensor) -> torch.Tensor:
        return loss(ic.fixed_point(layer_of(w), h0, x, solver=SOLVER, gradient=estimator, batch_ndim=1).value)

    for transform in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):
        torch.testing.assert_close(transform(run)(x), transform(steps)(x), atol=1e-10, rtol=0)
    v = torch.ones_like(x)
    ours, theirs = (torch.func.jvp(f, (x,), (v,))[1] for f in (run, steps))
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)


def test_a_problem_works_in_inference_mode() -> None:
    problem = ict.problem(lambda h, z: 0.5 * h + z)
    for estimator in (ic.Neumann(3, 1.0), ic.Implicit(), ic.Unroll(3, 1.0)):
        expected = estimator.vjp(problem, torch.full((2,), 2.0), torch.ones(2))[1](torch.ones(2))
        with torch.inference_mode():
            inside = estimator.vjp(problem, torch.full((2,), 2.0), torch.ones(2))[1](torch.ones(2))
        torch.testing.assert_close(inside, expected)
        assert torch.all(inside >= 1.75)


@pytest.mark.parametrize("estimator", [EXACT, ic.Neumann(3, 0.5), ic.Unroll(3, 0.5)], ids=repr)
def test_an_autograd_problem_counts_as_its_function(estimator: ic.Estimator) -> None:
    h0, w, x = tensors(layer())
    results = []
    for f in (layer_of(w), ict.problem(layer_of(w), batch_ndim=1)):
        batch = None if isinstance(f, ic.Problem) else 1
        for solver in (SOLVER, ic.NewtonKrylov(rtol=1e-13)):
            value = ic.fixed_point(f, h0, x, solver=solver, gradient=estimator, batch_ndim=batch).value
            results.append(torch.autograd.grad(loss(value), (w, x)))
    for gradients in results[1:]:
        torch.testing.assert_close(gradients, results[0], atol=1e-10, rtol=0)


def test_a_problem_that_closes_over_parameters_is_refused() -> None:
    """Its callbacks give gradients with respect to z only, so the parameters would get no gradient."""
    _, w, x = tensors(layer())
    problem = ic.Problem(layer_of(w), vjp=lambda h, z, v: (v, v), batch_ndim=1)
    with pytest.raises(ValueError, match="put these tensors in z"):
        ic.fixed_point(problem, torch.zeros_like(x), x, gradient=ic.Neumann(2, 0.5))


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_the_output_requires_a_gradient_only_where_something_does(estimator: ic.Estimator) -> None:
    h0, w, x = tensors(layer())

    def requires(w: torch.Tensor, x: torch.Tensor) -> bool:
        return ic.fixed_point(layer_of(w), h0, x, gradient=estimator, batch_ndim=1).value.requires_grad

    assert not requires(w.detach(), x.detach())
    assert requires(w.detach(), x)
    assert requires(w, x.detach())
    assert requires(w.detach(), x * 2)


@pytest.mark.parametrize("estimator", [EXACT, ic.Neumann(5, 0.5), ic.OneStep()], ids=repr)
def test_the_value_is_the_solvers_point(estimator: ic.Estimator) -> None:
    h0, w, x = tensors(layer())
    loose = ic.Anderson(rtol=1e-1)
    value = ic.fixed_point(layer_of(w), h0, x, solver=loose, gradient=estimator, batch_ndim=1).value
    assert torch.equal(value, ic.solve(layer_of(w), h0, x, solver=loose, batch_ndim=1).value)


def test_the_adjoint_is_solved_sample_by_sample() -> None:
    """One sample of three is singular, and is named."""
    slope = torch.tensor([[0.5], [1.0], [-0.5]])
    z = torch.zeros(3, 2, requires_grad=True)
    value = ic.fixed_point(lambda h, z: slope * h + z, torch.zeros(3, 2), z, gradient=ic.Implicit(), batch_ndim=1).value
    with pytest.raises(ic.SolveError, match=r"in 1 of 3 samples \(1\)"):
        value.sum().backward()


def test_complex_parameters_get_gradients() -> None:
    z = torch.tensor([0.3 + 0.4j, 1.0 - 1.0j], requires_grad=True)

    def f(h: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return 0.5 * torch.tanh(h) + z.abs()

    grads = []
    for g in (f, ict.problem(f)):
        value = ic.fixed_point(g, torch.zeros(2), z, solver=ic.Anderson(rtol=1e-6), gradient=ic.Implicit()).value
        grads.append(torch.autograd.grad(value.sum(), z)[0])
    assert torch.all(grads[0].abs() > 0.5)
    torch.testing.assert_close(grads[0], grads[1])
    plain = ic.Implicit().vjp(ict.problem(f), value.detach(), z.detach())[1](torch.ones(2))
    torch.testing.assert_close(plain, grads[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("estimator", [*ESTIMATORS, ic.Unroll(2, 1.0), ic.BPTT(2)], ids=repr)
def test_the_output_shares_no_memory(estimator: ic.Estimator) -> None:
    z = torch.zeros(3)
    with torch.no_grad():
        value = ic.fixed_point(lambda h, z: z, torch.zeros(3), z, gradient=estimator).value
        value += 1
    assert torch.equal(z, torch.zeros(3))


def test_a_tangent_through_a_problems_closure_is_refused() -> None:
    h0, w, x = (a.detach() for a in tensors(layer()))

    def run(w: torch.Tensor) -> torch.Tensor:
        problem = ic.Problem(layer_of(w), vjp=lambda h, z, v: (v, v), batch_ndim=1)
        return ic.fixed_point(problem, h0, x, gradient=ic.Neumann(2, 0.5)).value

    with pytest.raises(NotImplementedError, match="pass the plain function f"):
        torch.func.jvp(run, (w,), (w,))


def test_the_adapter_reexports_fixed_point() -> None:
    assert ict.fixed_point is ic.fixed_point
    assert ict.root is ic.root


@pytest.mark.parametrize("h0", [0, 0.0, np.zeros(3), (0.0, np.zeros(3))], ids=repr)
@pytest.mark.parametrize("estimator", [ic.Unroll(), ic.Neumann()], ids=repr)
def test_a_start_of_numbers_becomes_tensors_like_z(h0: Any, estimator: ic.Estimator) -> None:
    z = torch.full((() if isinstance(h0, (int, float)) else (3,)), 0.5, dtype=torch.float64, requires_grad=True)

    def f(h: Any, z: torch.Tensor) -> Any:
        return (0.5 * h[0] + z[0], 0.5 * h[1] + z) if isinstance(h, tuple) else 0.5 * h + z

    leaf = BACKEND.flatten(ic.fixed_point(f, h0, z, gradient=estimator).value)[0][-1]
    torch.testing.assert_close(leaf, torch.ones_like(z), rtol=1e-4, atol=0)
    leaf.sum().backward()
    assert z.grad is not None


def test_scipy_solves_a_trainable_layer() -> None:
    h0, w, x = tensors(layer())

    def powell(problem: ic.Problem, h0: Any, z: Any) -> Any:
        def residual(flat: np.ndarray) -> np.ndarray:
            h = torch.asarray(flat).reshape(h0.shape)
            return (problem(h, z) - h).numpy().ravel()

        return torch.asarray(scipy.optimize.root(residual, h0.numpy().ravel(), tol=1e-13).x).reshape(h0.shape)

    gradients = [
        torch.autograd.grad(
            loss(ic.fixed_point(layer_of(w), h0, x, solver=s, gradient=EXACT, batch_ndim=1).value), (w, x)
        )
        for s in (powell, SOLVER)
    ]
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-9, rtol=0)


def test_pytrees_as_states() -> None:
    a = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    def f(h: Any, z: Any) -> Any:
        return {"x": torch.tanh(a * h["x"]) + z, "y": (0.3 * h["y"][0] + h["x"].sum(1),)}

    h0 = {"x": torch.zeros(2, 3).double(), "y": (torch.zeros(2).double(),)}
    z = torch.ones(2, 3).double().requires_grad_()
    h = h0
    for _ in range(200):
        h = f(h, z)
    expected = torch.autograd.grad(h["y"][0].sum() + h["x"].prod(), (a, z))
    for estimator in (EXACT, ic.Neumann(200, 1.0), ic.Unroll(200, 1.0)):
        value = ic.fixed_point(f, h0, z, solver=SOLVER, gradient=estimator, batch_ndim=1).value
        ours = torch.autograd.grad(value["y"][0].sum() + value["x"].prod(), (a, z))
        torch.testing.assert_close(ours, expected, atol=1e-8, rtol=0)


def test_training_holds_no_graph() -> None:
    """Neither the output nor the tensors that F closes over are kept after a step."""
    h0, w, x = tensors(symmetric_layer(batch=2, width=8))
    references = []
    for step in range(20):
        scale = torch.ones((), dtype=torch.float64)
        solution = ic.fixed_point(
            lambda h, z, scale=scale: torch.tanh(h @ w.T + z) * scale,
            h0,
            x,
            gradient=ESTIMATORS[step % len(ESTIMATORS)],
            batch_ndim=1,
        )
        loss(solution.value).backward()
        references += [weakref.ref(scale), weakref.ref(solution.value)]
        del scale, solution
    assert not [r for r in references if r() is not None]


def test_solve_builds_no_graph() -> None:
    h0, w, x = tensors(layer())
    solution = ic.solve(layer_of(w), h0.requires_grad_(), x, batch_ndim=1)
    assert not solution.value.requires_grad


def test_numpy_arrays_keep_the_same_call() -> None:
    """Without autodiff ``fixed_point`` gives the estimator's value."""
    case = layer()
    for estimator in (ic.Unroll(3, 0.5), ic.Neumann(3, 0.5)):
        solution = ic.fixed_point(case.problem(), case.h0, case.z, solver=SOLVER, gradient=estimator)
        np.testing.assert_allclose(solution.value, case.oracle(), atol=1e-9)
    unrolled = ic.fixed_point(case.problem(), case.h0, case.z, gradient=ic.BPTT(2))
    twice = case.f(NUMPY.xp, case.f(NUMPY.xp, case.h0, case.z), case.z)
    np.testing.assert_array_equal(unrolled.value, twice)


@pytest.mark.parametrize("check_every", [1, 4])
@pytest.mark.parametrize("estimator", ESTIMATORS[:-1], ids=repr)
def test_a_layer_reads_the_stop_flag_and_nothing_else(
    estimator: ic.Estimator, check_every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward. On a GPU every read waits for the device, so all masks are read at once."""
    one_step(estimator, check_every, "cpu")  # older versions of PyTorch read one in the first checkpoint
    masks: list[int] = []
    kind, count = type(BACKEND), BACKEND.count
    monkeypatch.setattr(kind, "count", lambda self, found: masks.append(len(found)) or count(found))
    with Reads() as reads:
        evaluations = one_step(estimator, check_every, "cpu")
    # Samples that are active, that have a new best point and that go on from their point, and, once some have finished,
    # finished ones that moved.
    assert set(masks) <= {3, 4}
    told = 2  # statuses and residuals, for the warning that samples failed: on a GPU they are sent, and read later
    # Of an estimator with steps of its own, the range of a norm, which is asked for on the CPU alone.
    told += 2 * isinstance(estimator, ic.Unroll)
    assert reads.count == sum(masks) + told
    assert len(masks) == flags(evaluations, check_every)


class Reads(TorchFunctionMode):
    """Counts how often Python reads a number of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += getattr(func, "__name__", "") in {
            "__bool__",
            "__int__",
            "__float__",
            "__index__",
            "item",
            "tolist",
            "numpy",
        }
        return func(*args, **(kwargs or {}))


def one_step(estimator: ic.Estimator, check_every: int, device: str) -> int:
    case = symmetric_layer()
    w, x = (torch.asarray(case.z[name], device=device, dtype=torch.float32).requires_grad_() for name in ("w", "x"))
    solver = ic.Anderson(check_every=check_every)
    solution = ic.fixed_point(layer_of(w), torch.zeros_like(x), x, solver=solver, gradient=estimator, batch_ndim=1)
    solution.value.square().mean().backward()
    return solution.stats.evaluations


def flags(evaluations: int, check_every: int) -> int:
    """One read in check_every steps, and one before the first step, which also checks that f did not modify h0."""
    return (evaluations - 1) // check_every + 1


@on_gpu_with_torch
@pytest.mark.parametrize("check_every", [1, 4])
@pytest.mark.parametrize("estimator", ESTIMATORS[:-1], ids=repr)
def test_on_a_gpu_nothing_else_waits_for_the_device(estimator: ic.Estimator, check_every: int) -> None:
    one_step(estimator, check_every, "cuda")  # libraries are loaded in the first
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            evaluations = one_step(estimator, check_every, "cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(w.message) for w in caught if "synchroniz" in str(w.message)]
    copies = 2  # W and x, to the device
    assert len(waits) <= flags(evaluations, check_every) + copies, waits


@on_gpu_with_torch
def test_on_a_gpu_a_solve_reads_one_flag_a_step() -> None:
    case = symmetric_layer()
    w, x = (torch.asarray(case.z[name], device="cuda", dtype=torch.float32) for name in ("w", "x"))
    f = layer_of(w)
    for solver in (ic.FixedPointIteration(), ic.Anderson(), ic.Broyden()):
        with torch.profiler.profile() as profile:
            solution = ic.solve(f, torch.zeros_like(x), x, solver=solver, batch_ndim=1)
        assert torch.all(solution.status == ic.CONVERGED)
        waits = sum(
            e.count for e in profile.key_averages() if e.key in ("cudaStreamSynchronize", "cuStreamSynchronize")
        )
        assert waits == int(solution.stats.evaluations)


class JacobianFree(ic.Estimator):
    """An estimator that is not derived from AtFixedPoint."""

    def value(self, problem: ic.Problem, h: Any, z: Any) -> Any:
        return h

    def vjp(self, problem: ic.Problem, h: Any, z: Any) -> Any:
        at = problem.linearize(h, z)
        return h, lambda v: at.vjp_z(v)

    def jvp(self, problem: ic.Problem, h: Any, z: Any, dz: Any) -> Any:
        return h, problem.linearize(h, z).jvp_z(dz)


def test_an_estimator_of_the_users_own_is_asked_for_its_vjp() -> None:
    h0, w, x = tensors(layer())

    def f(h: torch.Tensor, z: Any) -> torch.Tensor:
        return torch.tanh(h @ z[0].T + z[1])

    gradients = [
        torch.autograd.grad(loss(ic.fixed_point(f, h0, (w, x), solver=SOLVER, gradient=g, batch_ndim=1).value), (w, x))
        for g in (JacobianFree(), ic.OneStep())
    ]
    torch.testing.assert_close(gradients[0], gradients[1])
    with pytest.raises(ValueError, match="put these tensors in z"):
        ic.fixed_point(layer_of(w), h0, x, gradient=JacobianFree(), batch_ndim=1)


@pytest.mark.parametrize("estimator", ESTIMATORS[:-1], ids=repr)
def test_hooks_on_parameters_are_called_once_with_the_whole_gradient(estimator: ic.Estimator) -> None:
    h0, w, x = tensors(layer())
    seen: list[Any] = []
    w.register_hook(seen.append)
    w.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad))
    loss(ic.fixed_point(layer_of(w), h0, x, gradient=estimator, batch_ndim=1).value).backward()
    assert len(seen) == 2
    assert torch.equal(seen[0], w.grad)


@pytest.mark.parametrize("estimator", [EXACT, ic.Neumann(5, 0.5), ic.OneStep()], ids=repr)
def test_sparse_parameters(estimator: ic.Estimator) -> None:
    h0, w, x = tensors(layer())
    sparse = w.detach().to_sparse().requires_grad_()
    dense = ic.fixed_point(layer_of(w), h0, x, solver=SOLVER, gradient=estimator, batch_ndim=1).value
    value = ic.fixed_point(
        lambda h, z: torch.tanh(torch.sparse.mm(sparse, h.T).T + z),
        h0,
        x,
        solver=SOLVER,
        gradient=estimator,
        batch_ndim=1,
    ).value
    for root in (dense, value):
        loss(root).backward()
    torch.testing.assert_close(sparse.grad.to_dense(), w.grad, atol=1e-10, rtol=0)


def test_a_variable_that_is_yet_to_be_assigned() -> None:
    h0, w, x = tensors(layer())
    scaled = 1.0 * w  # not a parameter, so that the modules among f's variables are searched

    def f(h: Any, z: Any) -> Any:
        return torch.tanh(h @ scaled.T + z) if early else later

    early = True
    value = ic.fixed_point(f, h0, x, gradient=ic.Neumann(3), batch_ndim=1).value
    later = None
    assert torch.autograd.grad(loss(value), x, create_graph=True)[0].requires_grad
