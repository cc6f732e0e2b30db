"""Tools for training: the Jacobian penalty, and losses on intermediate states. PyTorch's own tools on a layer."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import layer
from torch import nn
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import implicit_core as ic
from implicit_core.adapters import torch as ict
from implicit_core.adapters.torch.training.correction import Trajectory, fixed_point_correction
from implicit_core.adapters.torch.training.penalty import jacobian_penalty
from implicit_core.theory import certify, contraction, spectral_radius

F64 = torch.float64


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=draws(seed), dtype=F64)


def tanh_layer(
    width: int = 5, batch: int = 4, gain: float = 0.5
) -> tuple[Callable[..., Any], torch.Tensor, torch.Tensor, torch.Tensor]:
    """F, and h, x and W, which want gradients."""
    w = (gain * normal(width, width, seed=1) / math.sqrt(width)).requires_grad_()
    h, x = (normal(batch, width, seed=s).requires_grad_() for s in (2, 3))
    return lambda h, z: torch.tanh(h @ w.T + z), h, x, w


def dense(f: Callable[..., Any], h: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """∂F/∂h of each sample, (batch, d, d), with its graph."""
    rows = [
        torch.autograd.functional.jacobian(lambda a, i=i: f(a, z[i : i + 1])[0], h[i : i + 1], create_graph=True)
        for i in range(len(h))
    ]
    return torch.stack([row[:, 0] for row in rows])


# The Jacobian penalty.


def test_the_penalty_of_a_pytree_equals_the_penalty_of_the_concatenated_state() -> None:
    m, shift = normal(6, 6, seed=7) / 6, normal(6)

    def f(h: Any, z: Any) -> Any:
        flat = torch.cat([h["a"], h["b"][0].flatten(1)], 1) @ m.T + z
        return {"a": flat[:, :2], "b": (flat[:, 2:].reshape(-1, 2, 2),)}

    h = {"a": torch.zeros(3, 2, dtype=F64), "b": (torch.zeros(3, 2, 2, dtype=F64),)}
    z = shift.expand(3, 6)
    mean = jacobian_penalty(f, h, z, samples=4000, generator=draws())
    torch.testing.assert_close(mean, m.square().sum().expand(3), rtol=0.05, atol=0)


def test_samples_keep_to_themselves_and_a_zero_jacobian_gives_zero() -> None:
    slope = torch.tensor([[0.5], [float("nan")], [0.0]], dtype=F64)
    got = jacobian_penalty(lambda h, z: slope * h + z, normal(3, 2), normal(3, 2), generator=draws())
    torch.testing.assert_close(got[[0, 2]], torch.tensor([2 * 0.25, 0.0], dtype=F64))
    assert got[1].isnan()
    constant = jacobian_penalty(lambda h, z: z, normal(3, 2), normal(3, 2))
    torch.testing.assert_close(constant, torch.zeros(3, dtype=F64))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_penalty_without_grad(mode: Callable[..., Any]) -> None:
    f, h, x, _ = tanh_layer()
    outside = jacobian_penalty(f, h, x, generator=draws())
    with mode():
        inside = jacobian_penalty(f, h * 1, x * 1, generator=draws())
    assert not inside.requires_grad
    torch.testing.assert_close(inside, outside.detach(), rtol=1e-12, atol=0)
    with mode():  # an input that the derivative holds, and a state that is one row at all samples
        z = [torch.full((2, 3), 0.5), 1.0]
        held = jacobian_penalty(lambda h, z: h * z[0] + z[1], torch.ones(3).expand(2, 3), z)
    torch.testing.assert_close(held, torch.full((2,), 3 * 0.25))


def test_the_penalty_in_half_precision_and_of_one_system() -> None:
    h, z, expected = torch.zeros(2, 8).half(), torch.ones(2, 8).half(), 8 * 0.25
    half = jacobian_penalty(lambda h, z: 0.5 * h + z, h, z, generator=draws())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, torch.full((2,), expected), rtol=2e-3, atol=0)
    alone = jacobian_penalty(lambda h, z: 0.5 * h, torch.zeros(2, 4, dtype=F64), None, batch_ndim=0)
    torch.testing.assert_close(alone, torch.tensor(expected, dtype=F64))


def test_the_penalty_evaluates_f_once() -> None:
    calls = 0

    def f(h: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return torch.tanh(h + z)

    jacobian_penalty(f, normal(2, 3), normal(2, 3), samples=7)
    assert calls == 1


def test_the_penalty_is_unbiased_and_so_is_its_gradient() -> None:
    f, h, x, w = tanh_layer(width=4, batch=3)
    frobenius = dense(f, h, x).square().sum((1, 2))
    penalties = jacobian_penalty(f, h.expand(20000, 3, 4), x.expand(20000, 3, 4), batch_ndim=2, generator=draws())
    assert penalties.shape == (20000, 3)
    penalty = penalties.mean(0)
    torch.testing.assert_close(penalty, frobenius, rtol=0.02, atol=0)
    torch.testing.assert_close(jacobian_penalty(f, h, x, samples=500, generator=draws()), frobenius, rtol=0.1, atol=0)
    expected = torch.autograd.grad(frobenius.sum(), (h, x, w))
    for ours, theirs in zip(torch.autograd.grad(penalty.sum(), (h, x, w)), expected, strict=True):
        assert torch.linalg.vector_norm(ours - theirs) < 0.03 * torch.linalg.vector_norm(theirs)


def test_the_penalty_is_exact_where_the_rows_of_the_jacobian_are_orthogonal() -> None:
    q = torch.linalg.qr(normal(5, 5, seed=8)).Q
    h, x = (normal(4, 5, seed=s).requires_grad_() for s in (2, 3))
    slope = 1 - torch.tanh(h @ q.T + x) ** 2
    frobenius = slope.square().sum(1)
    penalty = jacobian_penalty(lambda h, z: torch.tanh(h @ q.T + z), h, x, generator=draws())
    torch.testing.assert_close(penalty, frobenius)
    expected = torch.autograd.grad(frobenius.sum(), (h, x))
    torch.testing.assert_close(torch.autograd.grad(penalty.sum(), (h, x)), expected)


def test_the_gradient_of_the_penalty_agrees_with_finite_differences() -> None:
    _, h, x, w = tanh_layer(width=3, batch=2)

    def penalty(h: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return jacobian_penalty(lambda h, z: torch.tanh(h @ w.T + z), h, x, samples=2, generator=draws())

    assert torch.autograd.gradcheck(penalty, (h, x, w))


def test_the_penalty_takes_the_partial_derivative() -> None:
    """The input is itself a function of h."""
    h = normal(3, 2).requires_grad_()
    torch.testing.assert_close(
        jacobian_penalty(lambda h, z: 0.5 * h + z, h, 3 * h), torch.full((3,), 2 * 0.25, dtype=F64)
    )


def test_a_constant_state_takes_no_gradient() -> None:
    f, _, x, w = tanh_layer()
    solution = ict.fixed_point(f, torch.zeros_like(x), x, batch_ndim=1)
    solution.value.retain_grad()
    jacobian_penalty(f, solution.value.detach(), x).mean().backward()
    assert solution.value.grad is None
    assert w.grad is not None


def test_a_smaller_penalty_is_learnt() -> None:
    f, h, x, w = tanh_layer(width=8)
    before = contraction(f, h, x, batch_ndim=1)
    optimizer = torch.optim.SGD([w], lr=0.1)
    generator = draws()
    for _ in range(30):
        optimizer.zero_grad()
        jacobian_penalty(f, h.detach(), x.detach(), generator=generator).mean().backward()
        optimizer.step()
    assert torch.all(contraction(f, h, x, batch_ndim=1) < 0.7 * before)


def test_the_penalty_refuses_wrong_arguments() -> None:
    h, z = torch.zeros(2, 3), torch.zeros(2, 3)
    with pytest.raises(TypeError, match="f must be callable"):
        jacobian_penalty(None, h, z)
    with pytest.raises(TypeError, match="pass its f"):
        jacobian_penalty(ict.problem(lambda h, z: 0.5 * h), h, z)
    with pytest.raises(ValueError, match="samples must be at least 1"):
        jacobian_penalty(lambda h, z: h, h, z, samples=0)
    with pytest.raises(TypeError, match="real floating-point"):
        jacobian_penalty(lambda h, z: h, torch.zeros(2, 3, dtype=torch.int64), z)
    with pytest.raises(ValueError, match="the result of f must have the shape of h"):
        jacobian_penalty(lambda h, z: h[:, :2], h, z)
    with pytest.raises(ValueError, match="batch_ndim must be at least 0"):
        jacobian_penalty(lambda h, z: h, h, z, batch_ndim=-1)


# Fixed-point correction.

SOLVERS = [ic.FixedPointIteration(), ic.FixedPointIteration(damping=0.8), ic.Anderson(), ic.Broyden()]


def iterates(f: Callable[..., Any], h0: torch.Tensor, z: torch.Tensor, solver: ic.Solver) -> list[torch.Tensor]:
    """The points at which the solver evaluates F."""
    seen: list[torch.Tensor] = []

    def noted(h: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        seen.append(h.clone())
        return f(h, z)

    with torch.no_grad():
        ic.solve(noted, h0, z, solver=solver, batch_ndim=1)
    return seen


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("gradient", [ic.Unroll(3, 0.5), ic.Unroll(2, 1.0), ic.OneStep()], ids=repr)
def test_states_carry_the_gradient_of_damped_steps_from_the_iterates(solver: ic.Solver, gradient: ic.Estimator) -> None:
    f, _, x, w = tanh_layer()
    h0 = torch.zeros_like(x).detach()
    trajectory = fixed_point_correction(f, h0, x, at=(1, 3), solver=solver, gradient=gradient, batch_ndim=1)
    assert list(trajectory.states) == [1, 3]
    seen = iterates(f, h0, x, solver)
    for step, state in trajectory.states.items():
        h = seen[step]
        if isinstance(gradient, ic.Unroll):
            for _ in range(gradient.k):
                h = gradient.lam * f(h, x) + (1 - gradient.lam) * h
            value = h
        else:
            value, h = h, f(h, x)
        torch.testing.assert_close(state, value, rtol=0, atol=1e-14)
        ours = torch.autograd.grad((state**3).sum(), (x, w))
        theirs = torch.autograd.grad(h, (x, w), 3 * value.detach() ** 2)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_the_solution_equals_the_solution_of_fixed_point() -> None:
    f, _, x, w = tanh_layer()
    h0 = torch.zeros_like(x).detach()
    for solver in (*SOLVERS, ic.NewtonKrylov(), ic.Anderson(max_steps=5), ic.Anderson(check_every=20)):
        corrected = fixed_point_correction(f, h0, x, at=(1,), solver=solver, batch_ndim=1, trace=True)
        plain = ict.fixed_point(f, h0, x, solver=solver, batch_ndim=1, trace=True)
        for ours, theirs in zip(corrected.solution[:2], plain[:2], strict=True):
            assert torch.equal(ours, theirs)
        for ours, theirs in zip(corrected.solution.stats, plain.stats, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
        gradients = [torch.autograd.grad(s.value.square().sum(), (x, w)) for s in (corrected.solution, plain)]
        torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


def test_a_solve_that_diverges_ends_where_it_would() -> None:
    """Fixed-point iteration returns its last point, Anderson its best."""
    for solver in (ic.FixedPointIteration(max_steps=4), ic.Anderson(max_steps=2)):
        options = {"solver": solver, "gradient": ic.OneStep(), "batch_ndim": 1}
        arguments = (lambda h, z: -3 * h + z, torch.zeros(1, 2), torch.tensor([[1.0, -1.0]]))
        corrected = fixed_point_correction(*arguments, at=(1,), **options)
        assert torch.equal(corrected.solution.value, ict.fixed_point(*arguments, **options).value)
        assert torch.equal(corrected.solution.status, ict.fixed_point(*arguments, **options).status)


def test_newtons_iterates_are_its_points_not_its_derivatives() -> None:
    f, _, x, _ = tanh_layer()
    h0 = torch.zeros_like(x).detach()
    trajectory = fixed_point_correction(
        f, h0, x, at=(1, 2), solver=ic.NewtonKrylov(rtol=1e-12), gradient=ic.OneStep(), batch_ndim=1
    )
    root = ic.solve(f, h0, x, solver=ic.Anderson(rtol=1e-13, max_steps=200), batch_ndim=1).value
    errors = [(h.detach() - root).norm() for h in trajectory.states.values()]
    assert errors[1] < 0.2 * errors[0] < 0.2 * root.norm()


def test_costs_of_fixed_point_correction() -> None:
    f, _, x, _ = tanh_layer()
    calls = 0

    def counted(h: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return f(h, z)

    trajectory = fixed_point_correction(
        counted, torch.zeros_like(x).detach(), x, at=(1, 2, 4), gradient=ic.Unroll(3, 0.5), batch_ndim=1
    )
    assert calls == int(trajectory.solution.stats.evaluations) + 3 + 3 * (1 + 3)


def test_a_step_that_the_solve_does_not_pass_yields_nothing() -> None:
    f, _, x, _ = tanh_layer()
    h0 = torch.zeros_like(x).detach()
    ends_at = len(iterates(f, h0, x, ic.Anderson())) - 1
    trajectory = fixed_point_correction(f, h0, x, at=(ends_at - 1, ends_at, 1000), batch_ndim=1)
    assert list(trajectory.states) == [ends_at - 1]
    warm = fixed_point_correction(f, trajectory.solution.value.detach(), x, at=(1,), batch_ndim=1)
    assert warm.states == {}
    torch.testing.assert_close(warm.loss(torch.sum), warm.solution.value.sum())


def test_the_loss_is_weighted_by_age() -> None:
    h = [torch.full((2,), float(i), dtype=F64) for i in (1, 10, 100)]
    solution = ic.Solution(h[2], torch.zeros(2), None)
    total = Trajectory(solution, {3: h[0], 7: h[1]}).loss(lambda h: h.mean(), gamma=0.5)
    torch.testing.assert_close(total, torch.tensor(0.25 * 1 + 0.5 * 10 + 100, dtype=F64))


def test_the_loss_trains_through_every_state() -> None:
    f, _, x, w = tanh_layer()
    h0 = torch.zeros_like(x).detach()
    trajectory = fixed_point_correction(f, h0, x, at=(2, 4), gradient=ic.Neumann(3, 0.5), batch_ndim=1)

    def criterion(h: torch.Tensor) -> torch.Tensor:
        return (h**3).sum()

    whole = torch.autograd.grad(trajectory.loss(criterion, gamma=0.9), (x, w), retain_graph=True)
    weighted = [(0.81, trajectory.states[2]), (0.9, trajectory.states[4]), (1.0, trajectory.solution.value)]
    parts = [torch.autograd.grad(weight * criterion(h), (x, w), retain_graph=True) for weight, h in weighted]
    for total, terms in zip(whole, zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(total, sum(terms))


def test_correction_through_callbacks_and_pytrees() -> None:
    case = layer()
    w, x = (torch.tensor(case.z[name], requires_grad=True) for name in ("w", "x"))
    problem = ict.problem(lambda h, z: (torch.tanh(h[0] @ z["w"].T + z["x"]),), batch_ndim=1)
    callbacks = ic.Problem(problem.f, vjp=lambda h, z, v: problem.linearize(h, z).vjp(v), batch_ndim=1)
    gradients = []
    for given in (problem, callbacks):
        trajectory = fixed_point_correction(
            given, (torch.zeros_like(x).detach(),), {"w": w, "x": x}, at=(2,), gradient=ic.Neumann(3, 0.5)
        )
        gradients.append(torch.autograd.grad(trajectory.loss(lambda h: h[0].square().sum()), (w, x)))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_correction_refuses_wrong_arguments() -> None:
    f, _, x, _ = tanh_layer()

    def run(**options: Any) -> Trajectory:
        return fixed_point_correction(f, torch.zeros_like(x), x, **{"at": (1,), "batch_ndim": 1, **options})

    with pytest.raises(TypeError, match="at must be a sequence"):
        run(at=3)
    with pytest.raises(TypeError, match="each step of at must be an integer"):
        run(at=(1.5,))
    with pytest.raises(ValueError, match="each step of at must be at least 1"):
        run(at=(0, 1))
    for at in ((), (3, 2), (2, 2)):
        with pytest.raises(ValueError, match="ascending order"):
            run(at=at)
    with pytest.raises(TypeError, match="whose steps are available"):
        run(solver=lambda problem, h0, z: h0)
    with pytest.raises(ValueError, match="has no states to correct"):
        run(gradient=ic.BPTT(3))
    with pytest.raises(ic.SolveError):
        run(solver=ic.Anderson(rtol=1e-14, max_steps=2), throw=True)
    with pytest.raises(TypeError, match="criterion must be callable"):
        run().loss(None)
    with pytest.raises(ValueError, match=r"gamma must lie in \[0, 1\]"):
        run().loss(torch.sum, gamma=1.5)


# PyTorch's own tools.

TIGHT = ic.Anderson(rtol=1e-13, max_steps=200)
FIXED_COST = [ic.Unroll(5, 0.5), ic.Unroll(5, 0.5, recompute=True), ic.BPTT(5), ic.OneStep(), ic.Neumann(5, 0.5)]
READING = [ic.Implicit(ic.GMRES(rtol=1e-12)), ic.NeumannSeries(0.8, rtol=1e-10)]
ESTIMATORS = FIXED_COST + READING
every_estimator = pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)


def of_x(estimator: ic.Estimator, solver: Any = TIGHT) -> Callable[..., torch.Tensor]:
    """The value of a layer with four numbers, as a function of x."""
    w = 0.6 * torch.linalg.qr(normal(4, 4)).Q
    return lambda x: of_x_and_w(x, w, estimator, solver)


def of_x_and_w(x: torch.Tensor, w: torch.Tensor, estimator: ic.Estimator, solver: Any = TIGHT) -> torch.Tensor:
    start = torch.zeros(4, dtype=F64)
    return ict.fixed_point(lambda h, x: torch.tanh(w @ h + x), start, x, solver=solver, gradient=estimator).value


BATCHED = {
    "jacobian": lambda f, x: jacobian(f, x, vectorize=True),
    "is_grads_batched": lambda f, x: torch.autograd.grad(f(x), x, torch.eye(4, dtype=F64), is_grads_batched=True)[0],
    "hessian": lambda f, x: hessian(lambda x: f(x).pow(3).sum(), x, vectorize=True),
}
ROW_BY_ROW = {
    "jacobian": jacobian,
    "is_grads_batched": jacobian,
    "hessian": lambda f, x: hessian(lambda x: f(x).pow(3).sum(), x),
}


@pytest.mark.parametrize("name", BATCHED)
@every_estimator
def test_batched_cotangents(estimator: ic.Estimator, name: str) -> None:
    f, x = of_x(estimator), normal(4, seed=1).requires_grad_()
    if estimator in READING:
        with pytest.raises(NotImplementedError, match=f"{type(estimator).__name__} stops on a test.*torch.func.jacrev"):
            BATCHED[name](f, x)
        return
    torch.testing.assert_close(BATCHED[name](f, x), ROW_BY_ROW[name](f, x), rtol=1e-12, atol=1e-14)


@every_estimator
def test_what_the_sentence_on_batched_cotangents_names_is_right(estimator: ic.Estimator) -> None:
    f, x = of_x(estimator), normal(4, seed=1).requires_grad_()
    h = f(x)
    mapped = torch.vmap(lambda v: torch.autograd.grad(h, x, v, retain_graph=True)[0])(torch.eye(4, dtype=F64))
    torch.testing.assert_close(mapped, jacobian(f, x), rtol=1e-9, atol=1e-11)
    if not getattr(estimator, "recompute", False):
        torch.testing.assert_close(torch.func.jacrev(f)(x.detach()), jacobian(f, x), rtol=1e-8, atol=1e-10)


EXACT_TO = [ic.Unroll(60, 1.0), ic.Unroll(60, 1.0, recompute=True), ic.BPTT(60), ic.Neumann(60, 1.0)]


@pytest.mark.parametrize("estimator", EXACT_TO, ids=repr)
@pytest.mark.filterwarnings("ignore:Please use `torch.vmap`:FutureWarning")  # PyTorch 2.6 warns of its own call
def test_checks_of_gradients_with_batched_cotangents(estimator: ic.Estimator) -> None:
    """60 steps of a map that contracts by 0.6 are exact to 1e-13."""
    f, x = of_x(estimator), normal(4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(f, x, check_batched_grad=True)
    if not isinstance(estimator, ic.Neumann):  # whose second derivative is that of the surrogate at h*
        assert torch.autograd.gradgradcheck(f, x, check_batched_grad=True)


@pytest.mark.parametrize("estimator", READING, ids=repr)
def test_checks_of_gradients_without_batched_cotangents(estimator: ic.Estimator) -> None:
    f, x = of_x(estimator), normal(4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(f, x, check_batched_grad=False)
    if isinstance(estimator, ic.Implicit):
        assert torch.autograd.gradgradcheck(f, x, check_batched_grad=False)


@pytest.mark.parametrize("solver", [ic.Anderson(), ic.FixedPointIteration(max_steps=3, rtol=0.0, atol=0.0)], ids=repr)
@every_estimator
def test_a_trace_that_would_keep_the_number_of_steps_is_refused(estimator: ic.Estimator, solver: ic.Solver) -> None:
    f, x = of_x(estimator, solver=solver), normal(4, seed=1)

    def gradient(x: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(f(x).sum(), x)[0]

    own_steps = isinstance(estimator, ic.Unroll) and solver.rtol == 0.0  # behind a number of steps
    if own_steps or isinstance(estimator, ic.BPTT):  # whose number of steps is its own
        torch.testing.assert_close(make_fx(f)(x)(x + 1), f(x + 1))
        torch.testing.assert_close(make_fx(gradient)(x)(x + 1), gradient(x + 1))
        return
    for run in (lambda: torch.func.linearize(f, x), lambda: make_fx(f)(x), lambda: make_fx(gradient)(x)):
        with pytest.raises(NotImplementedError, match="which make_fx cannot trace"):
            run()


@every_estimator
def test_a_trace_without_numbers_is_refused_or_right(estimator: ic.Estimator) -> None:
    """BPTT evaluates F a fixed number of times, and such a program is right for other arguments."""
    w, x = 0.6 * torch.linalg.qr(normal(4, 4)).Q, normal(4, seed=1)

    def f(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return of_x_and_w(x, w, estimator)

    try:
        program = make_fx(f, tracing_mode="fake")(x, w)
    except Exception as error:  # PyTorch's own, of a number that depends on data
        assert "data-dependent" in str(error)  # noqa: PT017
    else:
        assert isinstance(estimator, ic.BPTT)
        torch.testing.assert_close(program(x + 1, 0.5 * w), f(x + 1, 0.5 * w))


def test_a_derivative_within_f() -> None:
    """A step down an energy, 0.5 h² - h x, whose minimum is x."""
    x = normal(3, 4).requires_grad_()

    def energy(h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return (0.5 * h.square() - h * x).sum()

    def with_autograd(h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return h - 0.5 * torch.autograd.grad(energy(h, x), h, create_graph=True)[0]

    def with_func(h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return h - 0.5 * torch.func.grad(energy)(h, x)

    with pytest.raises(RuntimeError, match="does not require grad") as caught:
        ict.fixed_point(with_autograd, torch.zeros_like(x), x, batch_ndim=1)
    assert "use torch.func.grad: h - 0.5 * torch.func.grad(energy)(h, x)" in str(caught.value)
    rates = {"Unroll": 1 - 0.75**5, "BPTT": 1 - 0.5**5, "OneStep": 0.5, "Neumann": 1 - 0.75**5}
    for estimator in ESTIMATORS:
        module = ict.ImplicitLayer(with_func, solver=TIGHT, gradient=estimator)
        if getattr(estimator, "recompute", False):
            with pytest.raises(RuntimeError, match="hooks") as caught:
                module(x)
            assert "torch.func within f does not work in a checkpoint" in caught.value.__notes__[0]
            continue
        rate = rates.get(type(estimator).__name__, 1.0)
        solution = ict.fixed_point(with_func, torch.zeros_like(x), x, solver=TIGHT, gradient=estimator, batch_ndim=1)
        for result in (solution.value, module(x), module(x)):
            (gradient,) = torch.autograd.grad(result.sum(), x)
            torch.testing.assert_close(gradient, torch.full_like(x, rate), rtol=1e-9, atol=0)
        value = rate * x if isinstance(estimator, ic.BPTT) else x
        torch.testing.assert_close(solution.value, value, rtol=1e-10, atol=1e-12)


class Linear(nn.Module):
    """tanh(W h + b + x). ``alias`` is a second name of the linear map."""

    def __init__(self, alias: bool = False) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4, dtype=F64)
        nn.init.orthogonal_(self.inner.weight, 0.6)
        if alias:
            self.alias = self.inner

    def forward(self, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.inner(h) + x)


PRODUCT = 2 * 3 * 4 * 4
"""The FLOPs of one product of three states with W."""


@pytest.mark.parametrize("k", [1, 4])
def test_flops_of_a_step_of_training(k: int) -> None:
    """The cost table, in products with W: an evaluation, an h-VJP and a z-VJP are one each."""
    steps = 7
    forced = ic.FixedPointIteration(max_steps=steps, rtol=0.0, atol=0.0)
    expected = {
        ic.Unroll(k, 0.5): steps + k + k + k - 1,
        ic.Unroll(k, 0.5, recompute=True): steps + k + k + k + k - 1,
        ic.BPTT(k): k + k + k - 1,
        ic.OneStep(): steps + 1 + 1,
        ic.Neumann(k, 0.5): steps + 1 + k - 1 + 1,
    }
    for estimator, products in expected.items():
        layer = ict.ImplicitLayer(Linear(), solver=forced, gradient=estimator, check=False)
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(layer(normal(3, 4)).sum(), list(layer.parameters()))
        assert counter.get_total_flops() == products * PRODUCT, estimator


@every_estimator
def test_flops_change_nothing(estimator: ic.Estimator) -> None:
    layer, x = ict.ImplicitLayer(Linear(), gradient=estimator), normal(3, 4)
    value = layer(x)
    gradients = torch.autograd.grad(value.pow(3).sum(), list(layer.parameters()))
    with FlopCounterMode(display=False) as counter:
        counted = layer(x)
        theirs = torch.autograd.grad(counted.pow(3).sum(), list(layer.parameters()))
    assert torch.equal(value, counted)
    torch.testing.assert_close(theirs, gradients, rtol=0, atol=0)
    assert counter.get_total_flops() >= 3 * PRODUCT


def test_flops_of_the_theory() -> None:
    cell, h, x = Linear(), normal(3, 4, seed=2), normal(3, 4)
    problem = ict.problem(cell, batch_ndim=1)
    tools: dict[str, Callable[[], Any]] = {
        "spectral_radius": lambda: spectral_radius(problem, h, x, steps=20),
        "contraction": lambda: contraction(problem, h, x),
        "jacobian_penalty": lambda: jacobian_penalty(cell, h, x, generator=draws()),
        "certify": lambda: certify(problem, h, x, ic.Neumann(5, 0.5), steps=4).residual,
        "of the layer": lambda: ict.ImplicitLayer(cell).certify(x, steps=4).residual,
    }
    flops = {}
    for name, run in tools.items():
        alone = run()
        with FlopCounterMode(display=False) as counter:
            torch.testing.assert_close(run(), alone, rtol=0, atol=0)
        flops[name] = counter.get_total_flops() / PRODUCT
    assert flops["spectral_radius"] == 1 + 20 + 1, "an evaluation, 20 h-VJPs, and one that looks for coupled samples"
    assert flops["jacobian_penalty"] == 1 + 1
    assert min(flops.values()) >= 2


# Parameters and inputs that change between the call and the backward pass.

OTHERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "a plain tensor": lambda p: (0.3 * p).detach().requires_grad_(),
    "a tensor with a graph": lambda p: 0.3 * p,
    "a parameter": lambda p: nn.Parameter(0.3 * p.detach()),
}


def replace(module: nn.Module, others: Callable[[torch.Tensor], torch.Tensor], old: list[torch.Tensor]) -> None:
    """Put other tensors in the place of parameters, as optimizers that are differentiated do."""
    for name, p in zip(("weight", "bias"), old, strict=True):
        module._parameters[name] = others(p)


@pytest.mark.parametrize("second", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("alias", [False, True], ids=["", "two names"])
@pytest.mark.parametrize("form", ["module", "closure"])
@every_estimator
def test_parameters_replaced_between_call_and_backward(estimator: Any, form: str, alias: bool, second: bool) -> None:
    """The gradient is that of the call. A second derivative that evaluates F later is so, or is refused."""
    x = normal(3, 4)

    def gradients(others: Callable[[torch.Tensor], torch.Tensor] | None, scale: float | None = None) -> Any:
        torch.manual_seed(0)
        cell = Linear(alias)
        old = [cell.inner.weight, cell.inner.bias]
        if scale is not None:  # they are plain tensors already
            replace(cell.inner, lambda p: scale * p, old)
        f = cell if form == "module" else lambda h, x: cell(h, x)
        value = ict.fixed_point(f, torch.zeros_like(x), x, solver=TIGHT, gradient=estimator, batch_ndim=1).value
        if others is not None and not second:
            replace(cell.inner, others, old)
        first = torch.autograd.grad(value.pow(3).sum(), old, create_graph=second)
        if not second:
            return first
        if others is not None:
            replace(cell.inner, others, old)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in first), old)

    for scale in (None, 0.9):
        expected = gradients(None, scale)
        for others in OTHERS.values():
            try:
                found = gradients(others, scale)
            except RuntimeError as error:
                assert second
                assert estimator in READING
                assert "f used another parameter when it was called again" in str(error)  # noqa: PT017
            else:
                torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("second", [False, True], ids=["first", "second"])
@every_estimator
def test_a_functional_call_before_a_backward_pass(estimator: ic.Estimator, second: bool) -> None:
    """The same as parameters in z."""
    cell, x = Linear(), normal(3, 4)
    layer = ict.ImplicitLayer(cell, solver=TIGHT, gradient=estimator)
    results = []
    for through_z in (False, True):
        leaves = {name: (0.9 * p).detach().requires_grad_() for name, p in cell.named_parameters()}
        if through_z:
            f, h0 = (lambda h, z: functional_call(cell, z[1], (h, z[0]))), torch.zeros_like(x)
            value = ict.fixed_point(f, h0, (x, leaves), solver=TIGHT, gradient=estimator, batch_ndim=1).value
        else:
            value = functional_call(layer, {f"cell.{name}": p for name, p in leaves.items()}, (x,))
        gradients = torch.autograd.grad(value.pow(3).sum(), list(leaves.values()), create_graph=second)
        if second:
            gradients = torch.autograd.grad(sum(g.pow(2).sum() for g in gradients), list(leaves.values()))
        results.append(gradients)
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-11)


CHANGED = "modified by an inplace operation"


@pytest.mark.parametrize("closed_over", [False, True], ids=["module", "tensor"])
@every_estimator
def test_parameters_changed_in_place_before_the_backward_pass(estimator: ic.Estimator, closed_over: bool) -> None:
    """As an optimizer's step does. Autograd says so, also where F is evaluated again."""
    cell, x = Linear(), normal(3, 4)
    w = (0.5 * torch.eye(4, dtype=F64)).requires_grad_()
    f = (lambda h, x: torch.tanh(h @ w.T + x)) if closed_over else cell
    trained = w if closed_over else cell.inner.weight
    value = ict.fixed_point(f, torch.zeros_like(x), x, gradient=estimator, batch_ndim=1).value
    with torch.no_grad():
        trained.mul_(0.3)
    with pytest.raises(RuntimeError, match=CHANGED):
        torch.autograd.grad(value.pow(3).sum(), trained)


def stale(z: Any, estimator: ic.Estimator) -> Callable[[], Any]:
    """A backward pass through callbacks: h = tanh(0.5 h w + table[index])."""

    def f(h: torch.Tensor, z: Any) -> torch.Tensor:
        return torch.tanh(0.5 * h * z["w"] + z["table"][z["index"]])

    def vjp(h: torch.Tensor, z: Any, v: torch.Tensor) -> Any:
        v = v * (1 - f(h, z) ** 2)
        table = torch.zeros_like(z["table"]).index_add(0, z["index"], v)
        return 0.5 * v * z["w"], {"w": (0.5 * v * h).sum(0), "table": table, "index": None}

    h0 = torch.zeros(3, 4, dtype=F64)
    value = ict.fixed_point(ic.Problem(f, vjp=vjp, batch_ndim=1), h0, z, gradient=estimator).value
    plain = ict.fixed_point(f, h0, z, gradient=estimator, batch_ndim=1).value
    wanted = torch.autograd.grad(plain.pow(3).sum(), (z["w"], z["table"]))

    def backward() -> None:
        found = torch.autograd.grad(value.pow(3).sum(), (z["w"], z["table"]), retain_graph=True)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)

    return backward


@pytest.mark.parametrize("changed", ["w", "table", "index", None])
@every_estimator
def test_callbacks_at_a_z_that_was_changed(estimator: ic.Estimator, changed: str | None) -> None:
    """Leaves with a gradient, and integer ones."""
    z = {
        "w": normal(4).requires_grad_(),
        "table": normal(5, 4, seed=1).requires_grad_(),
        "index": torch.tensor([4, 0, 2]),
    }
    backward = stale(z, estimator)
    for _ in range(2):  # the graph is retained
        backward()
    if changed is None:
        return
    with torch.no_grad():
        z[changed].copy_(z[changed].flip(0))
    with pytest.raises(RuntimeError, match=CHANGED):
        backward()
