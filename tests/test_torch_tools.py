"""Tools for training: the Jacobian penalty, and losses on intermediate states."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import layer

import implicit_core as ic
from implicit_core.adapters import torch as ict
from implicit_core.adapters.torch.training.correction import Trajectory, fixed_point_correction
from implicit_core.adapters.torch.training.penalty import jacobian_penalty
from implicit_core.theory import contraction

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
