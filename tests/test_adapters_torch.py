"""The PyTorch binding: the same layer, with autograd around it."""

import weakref
from typing import Any

import numpy as np
import pytest
import torch
from implicit_core.adapters import torch as ict
from libraries import LIBRARIES, NUMPY
from problems import Case, layer, symmetric_layer

import implicit_core as ic

TORCH = LIBRARIES[-1]
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
def test_gradients_equal_those_of_a_long_loop(estimator: ic.Estimator) -> None:
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
    assert int(solution.stats.evaluations) <= 8 < calls, "the pushforwards evaluate F in forward mode"


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
    assert cell.weight.grad is not None
    assert cell.bias.grad is None
    assert leaf.grad is not None
    assert torch.any(leaf.grad != 0)


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


def test_a_second_derivative_is_right_or_raises() -> None:
    h0, w, x = tensors(layer())
    for estimator in (EXACT, ic.Neumann(5, 0.5), ic.OneStep()):
        value = ic.fixed_point(layer_of(w), h0, x, solver=SOLVER, gradient=estimator, batch_ndim=1).value
        with pytest.raises(NotImplementedError, match="Unroll and BPTT"):
            torch.autograd.grad(loss(value), x, create_graph=True)
    unrolled = ic.fixed_point(layer_of(w), h0, x, solver=SOLVER, gradient=ic.Unroll(200, 1.0), batch_ndim=1).value
    gradient = torch.autograd.grad(loss(unrolled), x, create_graph=True)[0]
    h = h0
    for _ in range(300):
        h = layer_of(w)(h, x)
    expected = torch.autograd.grad(loss(h), x, create_graph=True)[0]
    torch.testing.assert_close(
        torch.autograd.grad(gradient.sum(), w)[0], torch.autograd.grad(expected.sum(), w)[0], atol=1e-8, rtol=0
    )


def test_torch_func_differentiates_the_unrolled_layer_and_refuses_the_others() -> None:
    h0, w, x = (a.detach() for a in tensors(layer()))

    def value_of(estimator: ic.Estimator) -> Any:
        return lambda x: loss(ic.fixed_point(layer_of(w), h0, x, solver=SOLVER, gradient=estimator, batch_ndim=1).value)

    unrolled, v = value_of(ic.Unroll(200, 1.0)), torch.ones_like(x)
    leaf = x.clone().requires_grad_()
    expected = torch.autograd.grad(value_of(EXACT)(leaf), leaf)[0]
    torch.testing.assert_close(torch.func.grad(unrolled)(x), expected, atol=1e-9, rtol=0)
    torch.testing.assert_close(torch.func.jacrev(unrolled)(x), expected, atol=1e-9, rtol=0)
    torch.testing.assert_close(torch.func.jvp(unrolled, (x,), (v,))[1], (expected * v).sum(), atol=1e-9, rtol=0)
    step = 1e-5
    ahead, behind = (torch.func.grad(unrolled)(x + t * v) for t in (step, -step))
    along = torch.func.jvp(torch.func.grad(unrolled), (x,), (v,))[1]
    torch.testing.assert_close(along, (ahead - behind) / (2 * step), atol=1e-6, rtol=0)
    for estimator in (EXACT, ic.Neumann(5, 0.5), ic.OneStep()):
        for transform in (torch.func.grad, torch.func.jacrev, torch.func.hessian):
            with pytest.raises(RuntimeError):
                transform(value_of(estimator))(x)


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
    """Neither the output nor what it closes over outlives a step."""
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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device was found")
def test_on_a_gpu_a_solve_reads_one_flag_a_step() -> None:
    case = symmetric_layer()
    w, x = (torch.asarray(case.z[name], device="cuda", dtype=torch.float32) for name in ("w", "x"))
    f = layer_of(w)
    for solver in (ic.FixedPointIteration(), ic.Anderson(), ic.Broyden()):
        with torch.profiler.profile() as profile:
            solution = ic.solve(f, torch.zeros_like(x), x, solver=solver, batch_ndim=1)
        assert torch.all(solution.status == ic.CONVERGED)
        reads = sum(e.count for e in profile.key_averages() if e.key == "aten::_local_scalar_dense")
        assert reads == int(solution.stats.evaluations)
