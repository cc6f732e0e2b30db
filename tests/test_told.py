"""What a solve and a layer tell: statuses, residuals and tolerances that are true of the value that is returned."""

import random
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from libraries import Library
from torch import nn

import implicit_core as ic
from implicit_core.adapters import torch as ict
from implicit_core.space import signs

SOLVERS = [ic.FixedPointIteration, ic.Anderson, ic.Broyden]
OWN = "ConvergenceWarning"


def residual_cell(seed: int, root: bool = True, d: int = 16) -> tuple[Callable[..., Any], np.ndarray]:
    """h + tanh(W1 h + x) W2 + b, and a root of it; without one where ``root`` is False."""
    rng = np.random.default_rng(seed)
    w1, w2 = rng.normal(size=(2, d, d)) / 4
    x, star = rng.normal(size=(2, d))
    b = -np.tanh(w1 @ star + x) @ w2 if root else np.abs(w2).sum(0) + 0.1
    return lambda h, z: h + np.tanh(w1 @ h + x) @ w2 + b, star


def norm(x: Any) -> float:
    return float(np.linalg.norm(np.asarray(x, dtype=np.float64)))


# A state that runs away makes any relative tolerance.


@pytest.mark.parametrize("max_steps", [100, 1000])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("root", [True, False])
def test_a_state_that_runs_away_has_not_converged(root: bool, solver: type, max_steps: int) -> None:
    held = 0
    for seed in range(12):
        f, _ = residual_cell(seed, root)
        first = norm(f(np.zeros(16), None))
        solution = ic.solve(f, np.zeros(16), None, solver=solver(max_steps=max_steps))
        if solution.converged:
            assert norm(f(solution.value, None) - solution.value) <= 0.1 * first
        held += int(solution.stats.evaluations) == max_steps
    assert held <= 12 * (1 if solver is ic.Anderson and root else 0.5), "it ends early"


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_drift_without_a_fixed_point_ends_early(solver: type, dtype: Any, library: Library) -> None:
    """F(h) = h + 1 + sin(h) / 2: the residual is at least 1/2, and lost in rounding once h is large."""
    xp, h0 = library.xp, library.array(np.zeros(1, dtype))
    solution = ic.solve(lambda h, z: h + 1 + 0.5 * xp.sin(h), h0, None, solver=solver(max_steps=2000))
    assert int(library.numpy(solution.status)) in (ic.DIVERGED, ic.STAGNATED)
    assert int(solution.stats.evaluations) <= 256


@pytest.mark.parametrize("coupling", [8.0, 20.0])
def test_a_transient_that_falls_again_has_not_diverged(coupling: float, library: Library) -> None:
    """At 32 evaluations the residual is above the first one, within the tolerance of a large state, and falling."""
    m, ones = library.array(np.array([[0.85, coupling], [0.0, 0.85]])), library.array(np.ones(2))
    h0, solver = library.array(np.zeros(2)), ic.FixedPointIteration(rtol=1e-2)
    solution = ic.solve(lambda h, z: m @ h + z, h0, ones, solver=solver)
    assert int(library.numpy(solution.status)) == ic.CONVERGED


def test_a_transient_may_take_more_than_256_evaluations() -> None:
    m = 0.955 * np.eye(4) + np.eye(4, k=1)
    solution = ic.solve(lambda h, z: m @ h + z, np.zeros(4), np.ones(4), solver=ic.FixedPointIteration(max_steps=1000))
    assert solution.status == ic.CONVERGED
    assert solution.stats.evaluations > 256


def test_statuses_are_those_of_a_traced_solve() -> None:
    for seed in range(6):
        w1, w2 = np.random.default_rng(seed).normal(size=(2, 16, 16)) / 4

        def f(h: Any, z: Any, w1: Any = w1, w2: Any = w2) -> Any:
            return h + jnp.tanh(h @ w1 + 1) @ w2

        for solver in (ic.Broyden(), ic.Anderson(max_steps=300), ic.FixedPointIteration(max_steps=300)):
            h0 = jnp.zeros((3, 16))
            eager = ic.solve(f, h0, None, solver=solver, batch_ndim=1)
            traced = jax.jit(lambda h0, f=f, solver=solver: ic.solve(f, h0, None, solver=solver, batch_ndim=1))(h0)
            assert not np.any(np.asarray(traced.converged))
            np.testing.assert_array_equal(eager.converged, traced.converged)


@pytest.mark.parametrize("max_steps", [1, 2, 3, 100])
def test_a_traced_newton_solve_has_the_trace_of_an_eager_one(max_steps: int) -> None:
    a = 0.3 * np.random.default_rng(0).standard_normal((8, 8))
    z = np.random.default_rng(1).standard_normal((5, 8)) * np.asarray([0.0, 0.1, 1.0, 3.0, np.nan])[:, None]
    problem = ic.Problem(
        lambda h, z: np.sin(h @ a) * 2 + z,
        jvp=lambda h, z, dh, dz: np.cos(h @ a) * 2 * (dh @ a) + dz,
        batch_ndim=1,
    )
    solver = ic.NewtonKrylov(rtol=1e-10, max_steps=max_steps)
    expected = ic.solve(problem, np.zeros((5, 8)), z, solver=solver, trace=True)

    @jax.jit
    def solve(z: Any) -> Any:
        return ic.solve(
            lambda h, z: jnp.sin(h @ a) * 2 + z, jnp.zeros_like(z), z, solver=solver, batch_ndim=1, trace=True
        )

    solution = solve(jnp.asarray(z))
    np.testing.assert_allclose(solution.value, expected.value, atol=1e-12)
    np.testing.assert_array_equal(solution.status, expected.status)
    np.testing.assert_array_equal(solution.stats.steps, expected.stats.steps)
    assert solution.stats.evaluations == expected.stats.evaluations
    # Each inexact step carries rounding errors on.
    np.testing.assert_allclose(solution.stats.trace, expected.stats.trace, rtol=1e-5, atol=1e-13)


def test_random_signs(library: Library) -> None:
    space = ic.Problem(lambda h, z: h).space(library.array(np.zeros(50_000)), "h0")
    rows = library.numpy(signs(space, random.Random(0), 40)[0])
    assert rows.shape == (40, 50_000)
    assert set(np.unique(rows)) == {-1.0, 1.0}
    # The mean of n independent signs, or of products of them, has the standard deviation n^(-1/2).
    spread = 50_000**-0.5
    assert np.max(np.abs(rows.mean(axis=1))) < 4 * spread
    assert np.max(np.abs(np.corrcoef(rows) - np.eye(40))) < 5 * spread
    for lag in (1, 2, 7):
        assert np.abs((rows[:, :-lag] * rows[:, lag:]).mean()) < 5 * spread / 40**0.5
    numpy_space = ic.Problem(lambda h, z: h).space(np.zeros(50_000), "h0")
    np.testing.assert_array_equal(rows, signs(numpy_space, random.Random(0), 40)[0])


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_sample_without_a_fixed_point_does_not_hold_the_batch(solver: type) -> None:
    def f(h: Any, z: Any) -> Any:
        return np.where(z > 0, h + 1 + 0.5 * np.sin(h), 0.5 * h + 1)

    z = np.array([[1.0], [-1.0]])
    solution = ic.solve(f, np.zeros((2, 1)), z, solver=solver(max_steps=5000), batch_ndim=1)
    assert solution.status[1] == ic.CONVERGED
    assert solution.status[0] in (ic.DIVERGED, ic.STAGNATED)
    assert int(solution.stats.evaluations) <= 256
    alone = ic.solve(f, np.zeros((1, 1)), z[1:], solver=solver(), batch_ndim=1)
    np.testing.assert_array_equal(solution.value[1:], alone.value)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_forced_number_of_steps_is_made(solver: type) -> None:
    w = np.random.default_rng(0).normal(size=(30, 30)) / 20
    for f in (lambda h, z: h + 1 + 0.5 * np.sin(h), lambda h, z: np.tanh(w @ h + 1)):
        solution = ic.solve(f, np.zeros(30), None, solver=solver(rtol=0.0, atol=0.0, max_steps=70))
        at_the_root = solver is ic.Broyden and solution.stats.residual == 0  # from where its step is 0/0
        assert int(solution.stats.evaluations) == 70 or at_the_root


@pytest.mark.parametrize("rtol", [0.05, 1e-2, 1e-5])
@pytest.mark.parametrize("slope", [0.5, 0.85])
def test_warm_starts_and_loose_tolerances_cost_no_step_more(rtol: float, slope: float) -> None:
    """Against a loop that stops on the tolerance alone."""
    z = np.linspace(1.0, 2.0, 8)

    def steps(h: np.ndarray) -> int:
        for n in range(1, 1000):
            f = slope * h + z
            if norm(f - h) <= 1e-3 * rtol + rtol * norm(f):
                return n
            h = f
        raise AssertionError

    for start in (np.zeros(8), z / (1 - slope), z / (1 - slope) * (1 + 5 * rtol)):
        solver = ic.FixedPointIteration(rtol=rtol, max_steps=1000)
        assert int(ic.solve(lambda h, z: slope * h + z, start, z, solver=solver).stats.evaluations) == steps(start)


def test_an_infinite_start_is_no_start(library: Library) -> None:
    h0 = library.array(np.array([[np.inf], [0.0]]))
    solution = ic.solve(lambda h, z: library.xp.tanh(h), h0, None, batch_ndim=1)
    assert library.numpy(solution.status).tolist() == [ic.NONFINITE, ic.CONVERGED]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_default_tolerance_can_be_reached_in_every_precision(solver: type, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    w = (0.6 * nn.init.orthogonal_(torch.empty(16, 16))).to(dtype)
    x = torch.randn(32, 16).to(dtype)
    solution = ic.solve(lambda h, z: torch.tanh(h @ w + z), torch.zeros_like(x), x, solver=solver(), batch_ndim=1)
    assert torch.all(solution.converged)
    assert int(solution.stats.evaluations) <= 30


# What is told is told of the value.


@pytest.mark.parametrize("gradient", [ic.Unroll(5, 0.5), ic.Unroll(1, 1.0), ic.Unroll(12, 0.9)], ids=repr)
def test_the_residual_is_that_of_the_last_step(gradient: ic.Unroll, library: Library) -> None:
    z = np.linspace(-1, 1, 12).reshape(3, 4)
    solver = ic.FixedPointIteration(rtol=1e-2)
    point = ic.solve(lambda h, z: 0.7 * h + z, np.zeros((3, 4)), z, solver=solver, batch_ndim=1).value
    for _ in range(gradient.k - 1):
        point = gradient.lam * (0.7 * point + z) + (1 - gradient.lam) * point
    solution = ic.fixed_point(
        lambda h, z: 0.7 * h + z,
        library.array(np.zeros((3, 4))),
        library.array(z),
        solver=solver,
        gradient=gradient,
        batch_ndim=1,
    )
    told = library.numpy(solution.stats.residual)
    np.testing.assert_allclose(told, np.linalg.norm(0.7 * point + z - point, axis=1), rtol=1e-6)
    np.testing.assert_allclose(
        library.numpy(solution.stats.relative), told / np.linalg.norm(0.7 * point + z, axis=1), rtol=1e-6
    )
    assert np.all(library.numpy(solution.converged) == (told <= library.numpy(solution.stats.tolerance)))
    assert np.all(library.numpy(solution.converged))


@pytest.mark.parametrize("slope", [-30.0, -400.0, 5.0])
def test_a_value_that_left_the_fixed_point_has_not_converged(slope: float, library: Library) -> None:
    """The solver finds the root, and the k steps of the estimator leave it."""
    z = library.array(np.array([[31.0, 62.0], [1.0, 2.0]]))
    call = {"solver": ic.Anderson(rtol=1e-5), "batch_ndim": 1}
    h0 = library.array(np.zeros((2, 2)))
    assert np.all(library.numpy(ic.solve(lambda h, z: slope * h + z, h0, z, **call).converged))
    solution = ic.fixed_point(lambda h, z: slope * h + z, h0, z, gradient=ic.Unroll(5, 0.5), **call)
    assert library.numpy(solution.status).tolist() == [ic.DIVERGED, ic.DIVERGED]
    with pytest.raises(ic.SolveError, match="DIVERGED"):
        ic.fixed_point(lambda h, z: slope * h + z, h0, z, gradient=ic.Unroll(5, 0.5), throw=True, **call)
    at_the_root = ic.fixed_point(lambda h, z: slope * h + z, h0, z, gradient=ic.Neumann(1), throw=True, **call)
    assert np.all(library.numpy(at_the_root.converged))


def test_backpropagation_through_time_is_told_of_its_value(library: Library) -> None:
    z, h0 = library.array(np.array([1.0, 2.0])), library.array(np.zeros(2))
    for k, expected in ((60, ic.CONVERGED), (5, ic.MAX_STEPS)):
        solution = ic.fixed_point(lambda h, z: 0.5 * h + z, h0, z, gradient=ic.BPTT(k))
        assert int(library.numpy(solution.status)) == expected
        np.testing.assert_allclose(
            library.numpy(solution.stats.residual), np.sqrt(5) * 0.5 ** (k - 1), rtol=1e-6, atol=1e-15
        )
    with pytest.raises(ic.SolveError, match="MAX_STEPS"):
        ic.fixed_point(lambda h, z: 0.5 * h + z, h0, z, gradient=ic.BPTT(5), throw=True)


def test_a_gradient_does_not_flow_through_what_is_told() -> None:
    """Status and stats hold no graph, and a traced layer returns them beside the gradient."""
    z = torch.ones(2, requires_grad=True)
    solution = ic.fixed_point(lambda h, z: 0.5 * h + z, torch.zeros(2), z)
    assert not solution.stats.residual.requires_grad
    value, status = jax.jit(
        jax.value_and_grad(
            lambda z: (lambda s: (s.value.sum(), s.status))(
                ic.fixed_point(lambda h, z: 0.5 * h + z, jnp.zeros(2), z, gradient=ic.Unroll(20, 1.0))
            ),
            has_aux=True,
        )
    )(jnp.ones(2))
    assert int(value[1]) == ic.CONVERGED
    np.testing.assert_allclose(status, 2.0, rtol=1e-5)


# Units.


def scaled(library: Library, c: float) -> tuple[Callable[..., Any], Any, Any, dict[str, float], np.ndarray]:
    slopes = np.linspace(0.2, 0.9, 6)
    a = library.array(slopes)

    def f(h: Any, z: Any) -> Any:
        return {"big": a * h["big"] + c * z["a"], "small": -a * h["small"] + z["b"] / c}

    h0 = {name: library.array(np.zeros(6)) for name in ("big", "small")}
    z = {"a": library.array(np.ones(6)), "b": library.array(np.ones(6))}
    return f, h0, z, {"big": c, "small": 1 / c}, slopes


@pytest.mark.parametrize("c", [1e3, 1e8])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_scale_makes_every_part_accurate(solver: type, c: float, library: Library) -> None:
    f, h0, z, scale, slopes = scaled(library, c)
    solution = ic.solve(f, h0, z, solver=solver(rtol=1e-8, max_steps=400), scale=scale)
    assert int(library.numpy(solution.status)) == ic.CONVERGED
    np.testing.assert_allclose(library.numpy(solution.value["big"]) / c, 1 / (1 - slopes), rtol=1e-6)
    np.testing.assert_allclose(library.numpy(solution.value["small"]) * c, 1 / (1 + slopes), rtol=1e-6)


@pytest.mark.parametrize("gradient", [ic.Implicit(), ic.Implicit(ic.BiCGSTAB()), ic.NeumannSeries(1.0, 1e-6)], ids=repr)
def test_so_is_the_gradient(gradient: ic.Estimator) -> None:
    c = 1e6
    slopes = torch.linspace(0.2, 0.9, 6, dtype=torch.float64)
    scale = {"big": c, "small": torch.full((6,), 1 / c, dtype=torch.float64)}

    def f(h: Any, z: Any) -> Any:
        return {"big": slopes * h["big"] + c * z["a"], "small": -slopes * h["small"] + z["b"] / c}

    h0 = {name: torch.zeros(6, dtype=torch.float64) for name in ("big", "small")}
    z = {name: torch.ones(6, dtype=torch.float64, requires_grad=True) for name in ("a", "b")}
    solver = ic.Anderson(rtol=1e-10, max_steps=200)
    value = ic.fixed_point(f, h0, z, solver=solver, gradient=gradient, scale=scale).value
    (value["big"].sum() / c + value["small"].sum() * c).backward()
    torch.testing.assert_close(z["a"].grad, 1 / (1 - slopes), rtol=1e-4, atol=0)
    torch.testing.assert_close(z["b"].grad, 1 / (1 + slopes), rtol=1e-4, atol=0)

    a = jnp.asarray(slopes)

    def g(h: Any, z: Any) -> Any:
        return {"big": a * h["big"] + c * z["a"], "small": -a * h["small"] + z["b"] / c}

    def loss(z: Any) -> Any:
        start = {"big": jnp.zeros(6), "small": jnp.zeros(6)}
        units = {"big": c, "small": np.full(6, 1 / c)}
        value = ic.fixed_point(g, start, z, solver=solver, gradient=gradient, scale=units).value
        return value["big"].sum() / c + value["small"].sum() * c

    for of in (jax.grad(loss), jax.jit(jax.grad(loss))):
        grads = of({"a": jnp.ones(6), "b": jnp.ones(6)})
        np.testing.assert_allclose(grads["a"], 1 / (1 - slopes), rtol=1e-4)
        np.testing.assert_allclose(grads["b"], 1 / (1 + slopes), rtol=1e-4)


def test_a_scale_is_checked() -> None:
    def f(h: Any, z: Any) -> Any:
        return 0.5 * h

    for scale, message in ((0.0, "scale must lie in"), (np.array([1.0, -1.0]), "positive and finite")):
        with pytest.raises(ValueError, match=message):
            ic.solve(f, np.ones(2), None, scale=scale)
    with pytest.raises(ValueError, match=r"scale has a leaf of shape \(3,\) for one of shape \(2,\)"):
        ic.solve(f, np.ones(2), None, scale=np.ones(3))
    with pytest.raises(TypeError, match="have the structure"):
        ic.solve(f, np.ones(2), None, scale={"a": 1.0})
    with pytest.raises(TypeError, match="scale must not hold masked arrays"):
        ic.solve(f, np.ones(2), None, scale=np.ma.array([1.0, 2.0], mask=[False, True]))
    with pytest.raises(TypeError, match="belongs to the problem"):
        ic.solve(ic.Problem(f), np.ones(2), None, scale=2.0)
    with pytest.raises(TypeError, match="known when the program is traced"):
        jax.jit(lambda s: ic.solve(f, jnp.ones(2), None, scale=s).value)(jnp.ones(2))
    assert ic.solve(f, np.ones(2), None, scale=1e3).converged


@pytest.mark.parametrize("size", [1e20, 1e-25, 1e30, 1e-35])
@pytest.mark.parametrize("solver", SOLVERS)
def test_float32_states_of_any_size(solver: type, size: float, library: Library) -> None:
    z = library.array(np.array([[size, 2 * size], [1.0, 2.0]], np.float32))
    h0 = library.array(np.zeros((2, 2), np.float32))
    solution = ic.solve(lambda h, z: h / 2 + z, h0, z, solver=solver(atol=0.0), batch_ndim=1)
    assert library.numpy(solution.status).tolist() == [ic.CONVERGED] * 2
    np.testing.assert_allclose(library.numpy(solution.value) / (2 * library.numpy(z)), 1.0, rtol=3e-5)
    assert np.all(library.numpy(solution.stats.residual)[0] <= 2e-5 * 5 * size)
    layer = ic.fixed_point(lambda h, z: h / 2 + z, h0, z, solver=solver(atol=0.0), batch_ndim=1)
    assert library.numpy(layer.status).tolist() == [ic.CONVERGED] * 2


@pytest.mark.parametrize("size", [1e20, 1e-25])
def test_a_traced_solve_tells_that_squares_leave_the_range(size: float) -> None:
    z = jnp.array([[size, size], [1.0, 1.0]], jnp.float32)

    def solve(z: Any) -> Any:
        h0 = jnp.zeros((2, 2), jnp.float32)
        return ic.solve(lambda h, z: h / 2 + z, h0, z, solver=ic.Anderson(atol=0.0), batch_ndim=1).status

    assert jax.jit(solve)(z).tolist() == [ic.NONFINITE, ic.CONVERGED]


# Samples that are coupled, and samples that go on.


def test_a_finished_sample_that_moves_is_an_error() -> None:
    """Samples 0 and 1 finish first, and then sample 2 moves them."""
    mix = np.eye(3) + 0.3 * np.eye(3, k=2)

    def f(h: Any, z: Any) -> Any:
        return mix @ (0.5 * h) * np.array([[0.1], [0.1], [1.9]]) + z

    z = np.array([[0.0], [1.0], [1.0]])
    solver = ic.FixedPointIteration(rtol=1e-6, max_steps=500)
    with pytest.raises(ValueError, match="batch_ndim=0"):
        ic.solve(f, np.zeros((3, 1)), z, solver=solver, batch_ndim=1)
    together = ic.solve(f, np.zeros((3, 1)), z, solver=solver)
    assert together.converged
    unchecked = ic.FixedPointIteration(rtol=1e-6, max_steps=500, check=False)
    np.testing.assert_allclose(
        ic.solve(f, np.zeros((3, 1)), z, solver=unchecked, batch_ndim=1).value, together.value, rtol=1e-4
    )
    going_on = ic.FixedPointIteration(rtol=1e-6, max_steps=500, freeze=False)
    np.testing.assert_allclose(
        ic.solve(f, np.zeros((3, 1)), z, solver=going_on, batch_ndim=1).value, together.value, rtol=1e-4
    )


def test_a_random_cell_is_another_message() -> None:
    rng = np.random.default_rng(0)

    def f(h: Any, z: Any) -> Any:
        return 0.5 * h * (rng.random(h.shape) < 0.8) + z

    with pytest.warns(ic.ChangingFunctionWarning, match="random"):
        ic.solve(f, np.zeros((8, 6)), np.ones((8, 6)), solver=ic.FixedPointIteration(rtol=0.3), batch_ndim=1)


@pytest.mark.parametrize("solver", [ic.FixedPointIteration, ic.Anderson, ic.Broyden])
def test_samples_that_go_on_are_more_accurate_for_the_same_evaluations(solver: type, library: Library) -> None:
    slopes = np.linspace(0.05, 0.95, 16)[:, None] * np.ones((1, 4))
    z, root = np.ones((16, 4)), 1 / (1 - slopes)
    a = library.array(slopes)
    errors, evaluations = [], []
    for freeze in (True, False):
        settings = solver(rtol=1e-3, max_steps=300, freeze=freeze)
        solution = ic.solve(
            lambda h, z: a * h + z, library.array(np.zeros((16, 4))), library.array(z), solver=settings, batch_ndim=1
        )
        assert np.all(library.numpy(solution.converged))
        told = np.linalg.norm(slopes * library.numpy(solution.value) + z - library.numpy(solution.value), axis=1)
        np.testing.assert_allclose(library.numpy(solution.stats.residual), told, rtol=1e-6, atol=1e-13)
        errors.append(np.median(np.abs(library.numpy(solution.value) - root)))
        evaluations.append(int(solution.stats.evaluations))
    assert evaluations[0] == evaluations[1]
    assert errors[1] <= errors[0] * (0.5 if solver is ic.FixedPointIteration else 1.0)


# Failures are heard.


def forget_lines() -> None:
    """Forget which lines of this file have warned."""
    globals().get("__warningregistry__", {}).clear()


def failing(n: int = 16) -> dict[str, Any]:
    return {"h0": np.zeros((n, 2)), "z": np.ones((n, 2)), "solver": ic.FixedPointIteration(max_steps=3)}


def test_a_layer_that_fails_warns_once_a_line() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for n in (4, 5, 6):
            ic.fixed_point(lambda h, z: 0.9 * h + z, **failing(n), batch_ndim=1)
    assert [w.category for w in caught] == [ic.ConvergenceWarning]
    assert caught[0].filename == __file__
    assert "MAX_STEPS in 4 of 4 samples" in str(caught[0].message)
    assert "raise max_steps" in str(caught[0].message)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", ic.ConvergenceWarning)
        ic.fixed_point(lambda h, z: 0.9 * h + z, **failing(), batch_ndim=1)
        ic.fixed_point(lambda h, z: 0.1 * h + z, np.zeros(2), np.ones(2))
        ic.fixed_point(lambda h, z: 0.9 * h + z, np.zeros(2), np.ones(2), gradient=ic.BPTT(3))
        forced = ic.FixedPointIteration(rtol=0.0, atol=0.0, max_steps=3)
        ic.fixed_point(lambda h, z: 0.9 * h + z, np.zeros(2), np.ones(2), solver=forced, gradient=ic.Unroll())
    assert not caught


@pytest.mark.parametrize("gradient", [ic.Unroll(), ic.Neumann(), ic.Implicit()], ids=repr)
def test_so_does_a_torch_layer(gradient: ic.Estimator) -> None:
    layer = ict.ImplicitLayer(lambda h, x: 0.9 * h + x, gradient=gradient, solver=ic.FixedPointIteration(max_steps=3))
    forget_lines()
    with pytest.warns(ic.ConvergenceWarning, match="MAX_STEPS in 4 of 4 samples"):
        layer(torch.ones(4, 2))


def test_a_solution_counts() -> None:
    solution = ic.solve(lambda h, z: z * h + 1, np.zeros((4, 2)), np.array([[0.1], [0.2], [0.9], [0.99]]), batch_ndim=1,
                        solver=ic.FixedPointIteration(max_steps=20))  # fmt: skip
    assert repr(solution).startswith("<Solution: 2 of 4 CONVERGED, 2 MAX_STEPS, largest relative residual 0.")
    assert "float64 (4, 2)" in repr(solution)
    assert len(repr(solution)) < 120


@pytest.mark.filterwarnings("ignore::implicit_core.ConvergenceWarning")
@pytest.mark.parametrize("part", [nn.Dropout(0.2), nn.BatchNorm1d(8)], ids=lambda part: type(part).__name__)
def test_parts_that_change_are_noticed(part: nn.Module) -> None:
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.part = nn.Linear(8, 8), part
            nn.init.orthogonal_(self.inner.weight, 0.2)

        def forward(self, h: Any, x: Any) -> Any:
            return torch.tanh(0.5 * self.part(self.inner(h)) + x)

    solver = ic.Anderson(freeze=False)  # batch norm couples the samples
    layer = ict.ImplicitLayer(Cell(), gradient=ic.Neumann(), solver=solver, check=False)
    forget_lines()
    with pytest.warns(ic.ChangingFunctionWarning, match=type(part).__name__):
        layer(torch.randn(16, 8))
    layer.eval()
    layer(torch.randn(16, 8))


def test_a_callable_that_runs_away_has_not_converged(library: Library) -> None:
    """Far out the tolerance is met by the size of F(h) alone; farther out rounding hides the residual."""
    xp, h0 = library.xp, library.array(np.zeros((3, 1)))
    far = library.array(np.array([[1e9], [1e20], [0.0]]))

    def f(h: Any, z: Any) -> Any:
        return h + 1 + 0.5 * xp.sin(h)

    solution = ic.solve(f, h0, None, solver=lambda problem, h0, z: h0 + far, batch_ndim=1)
    assert library.numpy(solution.status).tolist() == [ic.DIVERGED, ic.DIVERGED, ic.STAGNATED]
    assert int(solution.stats.evaluations) == 2
    at_the_root = ic.solve(lambda h, z: 0.5 * h + 1, h0 + 2, None, solver=lambda problem, h0, z: h0, batch_ndim=1)
    assert np.all(library.numpy(at_the_root.converged))


def test_a_large_jacobian_does_not_make_a_map_without_a_root_converge() -> None:
    for k in 10.0 ** np.arange(0, 12, 2):
        with np.errstate(all="ignore"):
            problem = ic.Problem(
                lambda h, z, k=np.float32(k): h + k * (1 + h * h),
                jvp=lambda h, z, dh, dz, k=np.float32(k): dh + 2 * k * h * dh,
            )
            h0 = np.full(3, 0.5, np.float32)
            assert not ic.solve(problem, h0, None, solver=ic.NewtonKrylov()).converged


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_backpropagation_through_time_is_held_against_a_tolerance_that_can_be_reached(dtype: torch.dtype) -> None:
    """As a solve is: in half precision the default rtol is below rounding."""
    h0, z = torch.zeros(3, 8, dtype=dtype), torch.linspace(0.1, 1.0, 8, dtype=dtype).repeat(3, 1)
    f = lambda h, z: 0.3 * torch.tanh(h) + z  # noqa: E731
    for gradient in (ic.BPTT(20), ic.Unroll()):
        solution = ic.fixed_point(f, h0, z, gradient=gradient, batch_ndim=1, throw=True)
        assert torch.all(solution.stats.tolerance >= 8 * torch.finfo(dtype).eps * 0.9)


@pytest.mark.parametrize("solver", [ic.Anderson, ic.Broyden, ic.FixedPointIteration])
def test_a_large_start_near_its_tolerance_has_to_come_nearer(solver: type) -> None:
    """The tolerance of a state of 1e4 is 0.1, which a state that runs away raises as it likes."""
    for i in range(20):
        h0 = np.array([-1e4 + 0.1 * i])
        f = lambda h, z: h + 1 + 0.9 * np.cos(5 * h)  # noqa: E731  # at least 0.1 away from any fixed point
        solution = ic.solve(f, h0, None, solver=solver())
        first = abs(f(h0, None) - h0)[0]
        if solution.converged:
            assert solution.stats.residual <= max(first / 2, 2 * 1.01e-5 * 1e4)


def test_a_warm_start_needs_the_tolerance_alone() -> None:
    """A start that is within ten tolerances, and one that is within one."""
    for off, steps in ((5e-5, 2), (5e-6, 1)):
        h0 = np.full((2, 3), 2.0 * (1 + off))
        solution = ic.solve(
            lambda h, z: 0.1 * h + 1.8, h0, None, solver=ic.FixedPointIteration(rtol=1e-5), batch_ndim=1
        )
        assert np.all(solution.converged)
        assert np.all(solution.stats.steps == steps)


@pytest.mark.parametrize("k", [10.0, 1e2, 1e3, 3e3])
def test_newton_knows_what_rounding_explains_of_a_stiff_map(k: float, library: Library) -> None:
    """In float32 ‖F(h) - h‖ cannot fall below some ε ‖∂F/∂h‖ ‖h‖, however good the answer (Decision 90)."""
    n = 16
    heat = k * (np.diag(-2 * np.ones(n)) + np.diag(np.ones(n - 1), 1) + np.diag(np.ones(n - 1), -1))
    z = np.random.default_rng(0).normal(size=(4, n))
    a, shift = (library.array(x.astype(np.float32)) for x in (heat, z))
    problem = ic.Problem(lambda h, z: h @ a + z, jvp=lambda h, z, dh, dz: dh @ a + dz, batch_ndim=1)
    solver = ic.NewtonKrylov(linear_solver=ic.GMRES(restart=n), max_steps=40)
    solution = ic.solve(problem, library.array(np.zeros((4, n), np.float32)), shift, solver=solver)
    assert np.all(library.numpy(solution.converged))
    exact = np.linalg.solve(np.eye(n) - heat, z.T).T
    value = library.numpy(solution.value)
    assert np.all(np.linalg.norm(value - exact, axis=1) <= 1e-5 * np.linalg.norm(exact, axis=1))
    assert np.all(library.numpy(solution.stats.residual) <= library.numpy(solution.stats.tolerance))
    assert np.all(library.numpy(solution.stats.relative) <= 1e-3)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("root", [False, True])
def test_a_stiff_component_does_not_hide_a_soft_one(root: bool, dtype: Any) -> None:
    """The residual of the soft one is small beside what rounding does to the stiff one, but it is no rounding."""
    for stiff in (3e3, 1e6, 1e9):
        for soft in (1e-3, 1e-4, 1e-6):
            # Written so that the soft component can be resolved at all.
            slopes = np.asarray([-stiff, -soft if root else 0.0])

            def g(h: Any, soft: float = soft, stiff: float = stiff) -> Any:
                second = soft * (5 - h[1]) if root else soft * (1 + h[1] * h[1])
                return np.stack([-stiff * (h[0] - 1), second])

            def jvp(h: Any, z: Any, dh: Any, dz: Any, slopes: Any = slopes, soft: float = soft) -> Any:
                second = slopes[1] * dh[1] if root else 2 * soft * h[1] * dh[1]
                return (dh + np.stack([slopes[0] * dh[0], second])).astype(dtype)

            problem = ic.Problem(lambda h, z, g=g: (h + g(h)).astype(dtype), jvp=jvp)
            with np.errstate(all="ignore"):
                solution = ic.solve(problem, np.asarray([0.0, 0.3], dtype), None, solver=ic.NewtonKrylov())
            relative = float(solution.stats.relative)
            if solution.converged and relative > 1e-5:  # by rounding: then in both components
                assert root
                np.testing.assert_allclose(solution.value, [1.0, 5.0], rtol=1e-2)
