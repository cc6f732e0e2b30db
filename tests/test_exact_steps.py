"""Exactly T steps: a forced number of steps costs T evaluations of F, and BPTT(T) costs T, in every framework."""

import math
from typing import Any

import array_api_compat
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from libraries import Library

import implicit_core as ic
from implicit_core.adapters import jax as icj
from implicit_core.adapters import torch as ict
from implicit_core.solvers import CallableSolver

X = np.linspace(-1.0, 1.0, 6).reshape(2, 3)
W = np.random.default_rng(0).normal(size=(3, 3)) / 3


def cell(library: Library) -> tuple[Any, Any, list[int]]:
    """tanh(h W + x), the start, and a list that grows with each evaluation where calls are not traced."""
    xp, w, x, calls = library.xp, library.array(W), library.array(X), list[int]()

    def f(h: Any, z: Any) -> Any:
        calls.append(1)
        return xp.tanh(h @ w + x)

    return f, library.array(np.zeros_like(X)), calls


def loop(steps: int, damping: float = 1.0) -> list[np.ndarray]:
    """h_0, ..., h_steps by a loop."""
    states = [np.zeros_like(X)]
    for _ in range(steps):
        h = states[-1]
        states.append(damping * np.tanh(h @ W + X) + (1 - damping) * h)
    return states


def residual(h: np.ndarray) -> np.ndarray:
    return np.linalg.norm(np.tanh(h @ W + X) - h, axis=1)


@pytest.mark.parametrize("damping", [1.0, 0.6])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_forced_number_of_steps(steps: int, damping: float, library: Library) -> None:
    f, h0, calls = cell(library)
    solver = ic.FixedPointIteration(rtol=0.0, atol=0.0, max_steps=steps, damping=damping)
    solution = ic.solve(f, h0, None, solver=solver, batch_ndim=1, trace=True)
    states = loop(steps, damping)
    np.testing.assert_allclose(library.numpy(solution.value), states[steps], rtol=1e-12)
    np.testing.assert_allclose(library.numpy(solution.stats.residual), residual(states[steps - 1]), rtol=1e-9)
    assert int(solution.stats.evaluations) == steps
    assert list(library.numpy(solution.stats.steps)) == [steps, steps]
    assert list(library.numpy(solution.status)) == [ic.MAX_STEPS] * 2
    assert library.numpy(solution.stats.trace).shape == (steps, 2)
    if library.name != "jax":
        assert len(calls) == steps


def test_a_tolerance_keeps_the_measured_point(library: Library) -> None:
    f, h0, _ = cell(library)
    for tolerance in ({"rtol": 1e-3}, {"rtol": 0.0, "atol": 1e-3}):
        solution = ic.solve(f, h0, None, solver=ic.FixedPointIteration(max_steps=50, **tolerance), batch_ndim=1)
        value = library.numpy(solution.value)
        np.testing.assert_allclose(library.numpy(solution.stats.residual), residual(value), rtol=1e-10)


def test_the_steps_of_the_solver_and_of_unroll(library: Library) -> None:
    f, h0, calls = cell(library)
    solver = ic.FixedPointIteration(rtol=0.0, atol=0.0, max_steps=4)
    solution = ic.fixed_point(f, h0, None, solver=solver, gradient=ic.Unroll(k=3, lam=1.0), batch_ndim=1)
    states = loop(7)
    np.testing.assert_allclose(library.numpy(solution.value), states[7], rtol=1e-12)
    np.testing.assert_allclose(library.numpy(solution.stats.residual), residual(states[6]), rtol=1e-9)
    if library.name != "jax":
        assert len(calls) == 7


def test_a_sample_that_is_not_finite_stays() -> None:
    """Its last point is the one where F was found not to be finite; the others go on."""
    with np.errstate(invalid="ignore"):
        solution = ic.solve(
            lambda h, z: np.sqrt(z - h),
            np.zeros((2, 1)),
            np.array([[1.0], [-1.0]]),
            solver=ic.FixedPointIteration(rtol=0.0, atol=0.0, max_steps=3),
            batch_ndim=1,
        )
    assert list(solution.status) == [ic.MAX_STEPS, ic.NONFINITE]
    np.testing.assert_allclose(solution.value, [[1.0], [0.0]])  # 0, 1, 0, 1


@pytest.mark.parametrize("buffered", [False, True])
def test_the_result_is_in_memory_of_its_own(buffered: bool) -> None:
    """F may return the same array at every call, or its argument."""
    buffer = np.zeros(2)

    def f(h: Any, z: Any) -> Any:
        if not buffered:
            return h
        np.multiply(h, 0.5, out=buffer)
        return buffer

    h0 = np.ones(2)
    value = ic.solve(f, h0, None, solver=ic.FixedPointIteration(rtol=0.0, atol=0.0, max_steps=2)).value
    assert value is not h0
    assert not np.shares_memory(value, buffer)
    assert not np.shares_memory(value, h0)
    np.testing.assert_array_equal(value, np.full(2, 0.25 if buffered else 1.0))


def test_a_callable_solver_stays_where_it_is() -> None:
    """Its measurements, which have no tolerance, are no steps."""
    f = lambda h, z: 0.5 * h + z  # noqa: E731
    solver = CallableSolver(lambda problem, h0, z: h0 + 1.0, rtol=0.0, atol=0.0)
    solution = ic.solve(f, np.zeros(2), np.ones(2), solver=solver)
    np.testing.assert_array_equal(solution.value, np.ones(2))
    np.testing.assert_allclose(solution.stats.residual, np.sqrt(0.5))


@pytest.mark.parametrize("steps", [1, 3])
def test_a_traced_number_of_steps(steps: int) -> None:
    f, h0 = lambda h, z: jnp.tanh(h @ W + X), jnp.zeros_like(X)

    @jax.jit
    def solve(n: Any) -> Any:
        return ic.solve(f, h0, None, solver=ic.FixedPointIteration(rtol=0.0, atol=0.0, max_steps=n), batch_ndim=1)

    solution = solve(steps)
    np.testing.assert_allclose(solution.value, loop(steps)[steps], rtol=1e-12)
    assert int(solution.stats.evaluations) == steps


# Steps of each sample.

NUMBERS = np.array([1, 3, 10, 60], np.int32)


def halving(library: Library, solver: Any) -> Any:
    """Four samples of h / 2 + 1 from zero: h_n = 2 - 2⁻ⁿ⁺¹."""
    h0 = library.array(np.zeros((4, 2)))
    return ic.solve(lambda h, z: 0.5 * h + 1, h0, None, solver=solver, batch_ndim=1)


def test_each_sample_makes_its_own_number_of_steps(library: Library) -> None:
    most = library.array(NUMBERS)
    solution = halving(library, ic.FixedPointIteration(rtol=0.0, atol=0.0, max_steps=most))
    np.testing.assert_allclose(library.numpy(solution.value)[:, 0], 2 - 2 * 0.5**NUMBERS, rtol=1e-12)
    assert list(library.numpy(solution.stats.steps)) == list(NUMBERS)
    assert int(solution.stats.evaluations) == 60


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("solver", [ic.FixedPointIteration, ic.Anderson, ic.Broyden])
def test_a_sample_that_runs_out_of_its_steps_says_so(solver: type, freeze: bool, library: Library) -> None:
    settings = {"rtol": 1e-8, "check": False, "freeze": freeze}
    solution = halving(library, solver(max_steps=library.array(NUMBERS), **settings))
    status, residual = library.numpy(solution.status), library.numpy(solution.stats.residual)
    value = library.numpy(solution.value)
    for i, most in enumerate(NUMBERS):
        alone = halving(library, solver(max_steps=int(most), **settings))
        assert status[i] == library.numpy(alone.status)[i]
        np.testing.assert_allclose(value[i], library.numpy(alone.value)[i], rtol=1e-12)
    assert status[0] == ic.MAX_STEPS
    assert status[3] == ic.CONVERGED
    np.testing.assert_allclose(residual, np.linalg.norm(1 - 0.5 * value, axis=1), atol=1e-15)


def test_steps_of_samples_that_are_traced_or_compacted() -> None:
    def solve(most: Any, wrap: Any = lambda solver: solver) -> Any:
        solver = wrap(ic.FixedPointIteration(rtol=1e-8, max_steps=most))
        return ic.solve(lambda h, z: 0.5 * h + 1, jnp.zeros((4, 2)), None, solver=solver, batch_ndim=1)

    eager, traced = solve(jnp.asarray(NUMBERS)), jax.jit(solve)(jnp.asarray(NUMBERS))
    compacted = ic.solve(
        lambda h, z: 0.5 * h + 1,
        np.zeros((4, 2)),
        None,
        solver=ic.Compacting(ic.FixedPointIteration(rtol=1e-8, max_steps=NUMBERS), True),
        batch_ndim=1,
    )
    for found in (traced, compacted):
        np.testing.assert_array_equal(found.status, eager.status)
        np.testing.assert_array_equal(found.stats.steps, eager.stats.steps)
        np.testing.assert_allclose(found.value, eager.value, rtol=1e-12)


def test_steps_that_do_not_fit_to_the_batch() -> None:
    with pytest.raises(ValueError, match=r"one for each sample, of shape \(4,\); got an array of shape \(3,\)"):
        ic.solve(
            lambda h, z: 0.5 * h,
            np.ones((4, 2)),
            None,
            solver=ic.Anderson(max_steps=NUMBERS[:3]),
            batch_ndim=1,
        )


# A test of the user's own.

TARGETS = np.array([[1.0, 1.0], [0.5, 0.5], [2.0, 2.0]])


@pytest.mark.parametrize("many", [3, 300])
def test_a_sample_that_runs_out_of_steps_has_not_stagnated(many: int) -> None:
    """Whatever the others do then."""
    solver = ic.FixedPointIteration(rtol=1e-9, max_steps=np.array([3, many]))
    solution = ic.solve(lambda h, z: 0.9999 * h + 1, np.zeros((2, 1)), None, solver=solver, batch_ndim=1)
    assert list(solution.status) == [ic.MAX_STEPS] * 2


def halted(h: Any, f: Any) -> Any:
    return f[..., 0] >= 1.9


def to_twice(h: Any, z: Any) -> Any:
    """h_n = 2 z (1 - 2⁻ⁿ) from zero; F(h_n) is h_{n+1}."""
    return 0.5 * h + z


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("rtol", [0.0, 1e-8])
def test_a_sample_ends_where_the_users_test_says_so(rtol: float, freeze: bool, library: Library) -> None:
    h0, z = library.array(np.zeros((3, 2))), library.array(TARGETS)
    solver = ic.FixedPointIteration(rtol=rtol, max_steps=40, stop=halted, freeze=freeze)
    solution = ic.solve(to_twice, h0, z, solver=solver, batch_ndim=1)
    value, stats = library.numpy(solution.value), solution.stats
    np.testing.assert_allclose(value[[0, 2], 0], [1.875, 0.0], rtol=1e-12)
    np.testing.assert_allclose(value[1, 0], 1.0, rtol=1e-7)
    assert list(library.numpy(solution.status)) == [ic.CONVERGED, ic.CONVERGED if rtol else ic.MAX_STEPS, ic.CONVERGED]
    assert list(library.numpy(stats.steps))[::2] == [5, 1]
    residual = library.numpy(stats.residual)
    np.testing.assert_allclose(residual[[0, 2]], np.sqrt(2) * np.array([0.0625, 2.0]), rtol=1e-12)
    assert np.all((residual <= library.numpy(stats.tolerance))[::2])


@pytest.mark.parametrize(
    "wrap", [lambda f: f, jax.jit, lambda f: lambda z: jax.vmap(f)(z[None])], ids=["", "jit", "vmap"]
)
def test_the_users_test_in_a_layer_of_jax(wrap: Any) -> None:
    """It may close over arrays, and is no part of the gradient, which is that of the equation."""
    limit = jnp.asarray(1.9)

    def layer(z: Any) -> Any:
        solver = ic.FixedPointIteration(rtol=1e-8, stop=lambda h, f: f[:, 0] >= limit)
        return icj.fixed_point(
            to_twice, jnp.zeros((3, 2)), z, solver=solver, gradient=ic.Implicit(), batch_ndim=1
        ).value

    np.testing.assert_allclose(jnp.reshape(wrap(layer)(jnp.asarray(TARGETS)), (3, 2))[::2, 0], [1.875, 0.0])
    np.testing.assert_allclose(jax.grad(lambda z: wrap(layer)(z).sum())(jnp.asarray(TARGETS)), 2.0, rtol=1e-5)


def test_the_users_test_of_a_root_sees_g() -> None:
    seen = []

    def small(x: Any, g: Any) -> Any:
        seen.append((x.copy(), g.copy()))
        return abs(g[:, 0]) < 1e-2

    z = np.array([[2.0], [3.0]])
    solver = ic.Broyden(rtol=1e-12, stop=small)
    solution = ic.root(lambda x, z: x**2 - z, np.ones((2, 1)), z, batch_ndim=1, solver=solver)
    assert list(solution.status) == [ic.CONVERGED] * 2
    assert np.all(solution.stats.residual < 1e-2)
    assert np.any(solution.stats.residual > 1e-6)
    for x, g in seen:
        np.testing.assert_allclose(g, x**2 - z, rtol=1e-12)


@pytest.mark.parametrize("solver", [ic.FixedPointIteration, ic.Anderson, ic.Broyden])
def test_one_test_for_the_whole_batch(solver: Any, library: Library) -> None:
    """All samples end together, where the mean of their residuals is small, though single ones are larger."""
    factors = np.array([[0.95], [0.5], [0.1]]) * np.array([1.0, 0.9, 0.8, 0.7, 0.6])
    factor, h0 = library.array(factors), library.array(np.ones((3, 5)))

    def small(h: Any, f: Any) -> Any:
        xp = array_api_compat.array_namespace(h)
        return xp.sum((f - h) ** 2) <= 1e-4

    solution = ic.solve(
        lambda h, z: factor * h + z,
        h0,
        library.array(np.ones((3, 1))),
        solver=solver(rtol=0.0, atol=0.0, max_steps=200, stop=small),
        batch_ndim=1,
    )
    steps, value = library.numpy(solution.stats.steps), library.numpy(solution.value)
    assert list(library.numpy(solution.status)) == [ic.CONVERGED] * 3
    assert len(set(steps)) == 1
    assert steps[0] == solution.stats.evaluations > 2
    residual = factors * value + 1 - value
    assert (residual**2).sum() <= 1e-4
    np.testing.assert_allclose(library.numpy(solution.stats.residual), np.linalg.norm(residual, axis=1), atol=1e-12)


def test_what_the_users_test_returns_is_checked() -> None:
    for stop in (lambda h, f: 1.0, lambda h, f: f[:, 0], lambda h, f: f > 1, lambda h, f: np.array([True])):
        with pytest.raises(TypeError, match=r"of the batch's shape \(3,\), or one boolean for the whole batch; got"):
            ic.solve(to_twice, np.zeros((3, 2)), TARGETS, solver=ic.Anderson(stop=stop), batch_ndim=1)
    with pytest.raises(TypeError, match="stop must be"):
        ic.Anderson(stop=3)


# Backpropagation through time.


@pytest.mark.parametrize("steps", [1, 2, 3, 8])
def test_bptt_evaluates_f_once_for_each_step(steps: int, library: Library) -> None:
    f, h0, calls = cell(library)
    solution = ic.fixed_point(f, h0, None, gradient=ic.BPTT(steps), batch_ndim=1, trace=True)
    states = loop(steps)
    np.testing.assert_allclose(library.numpy(solution.value), states[steps], rtol=1e-12)
    np.testing.assert_allclose(library.numpy(solution.stats.residual), residual(states[steps - 1]), rtol=1e-9)
    assert int(solution.stats.evaluations) == 0
    assert library.numpy(solution.stats.trace).shape == (0, 2)
    if library.name != "jax":
        assert len(calls) == steps


@pytest.mark.parametrize("steps", [1, 3])
def test_bptt_in_torch_costs_its_steps(steps: int) -> None:
    """With gradients, by autograd, by callbacks and in a transform of torch.func, whose closure costs two more."""
    w, x, calls = torch.tensor(W), torch.tensor(X), list[int]()

    def f(h: Any, w: Any) -> Any:
        calls.append(1)
        return torch.tanh(h @ w + x)

    def loss(w: Any) -> Any:
        return ict.fixed_point(f, torch.zeros_like(x), w, gradient=ic.BPTT(steps), batch_ndim=1).value.sum()

    def plain(w: Any) -> Any:
        h = torch.zeros_like(x)
        for _ in range(steps):
            h = f(h, w)
        return h.sum()

    wanted = torch.func.grad(plain)(w)
    calls.clear()
    leaf = w.clone().requires_grad_()
    loss(leaf).backward()
    assert len(calls) == steps
    torch.testing.assert_close(leaf.grad, wanted)
    torch.testing.assert_close(torch.func.grad(loss)(w), wanted)


@pytest.mark.parametrize("steps", [1, 3])
def test_bptt_in_jax_costs_its_steps(steps: int) -> None:
    calls = list[int]()

    def f(h: Any, w: Any) -> Any:
        jax.debug.callback(lambda: calls.append(1))
        return jnp.tanh(h @ w + X)

    @jax.jit
    def run(w: Any) -> Any:
        return icj.fixed_point(f, jnp.zeros_like(X), w, gradient=ic.BPTT(steps), batch_ndim=1).value

    jax.block_until_ready(run(jnp.asarray(W)))
    jax.effects_barrier()
    assert len(calls) == steps
    np.testing.assert_allclose(run(jnp.asarray(W)), loop(steps)[steps], rtol=1e-12)


def test_bptt_tells_of_its_last_step(library: Library) -> None:
    """CONVERGED within the tolerance, MAX_STEPS above it, DIVERGED after a residual that grew."""
    half, h0 = lambda h, z: 0.5 * h + z, library.array(np.zeros((1, 2)))
    z = library.array(np.ones((1, 2)))
    for steps, status in ((40, ic.CONVERGED), (3, ic.MAX_STEPS)):
        found = ic.fixed_point(half, h0, z, gradient=ic.BPTT(steps, on_growth="ignore"), batch_ndim=1)
        assert int(library.numpy(found.status)[0]) == status
    grows = ic.fixed_point(lambda h, z: 4.0 * h + z, h0, z, gradient=ic.BPTT(20, on_growth="ignore"), batch_ndim=1)
    assert int(library.numpy(grows.status)[0]) == ic.DIVERGED


@pytest.mark.parametrize("unit", [1e-9, 1.0])
def test_bptt_on_a_root_is_told_in_the_units_of_g(unit: float) -> None:
    g = lambda x, z: unit * (x - 0.3 * torch.cos(x) - z)  # noqa: E731
    z = torch.ones(1, dtype=torch.float64)
    start = torch.zeros(1, dtype=torch.float64)
    for steps, status in ((60, ic.CONVERGED), (1, ic.MAX_STEPS)):
        found = ict.root(g, start, z, gradient=ic.BPTT(steps, on_growth="ignore"))
        assert int(found.status) == status
        bound = 2e-6 if status == ic.CONVERGED else 2.0
        assert float(found.stats.residual) <= bound * unit
        assert float(abs(g(found.value, z))) <= bound * unit


# No steps.


@pytest.mark.parametrize("gradient", [ic.Unroll(2, 1.0), ic.BPTT(2)])
def test_no_step_evaluates_nothing(gradient: ic.Estimator, library: Library) -> None:
    f, h0, calls = cell(library)
    solution = ic.solve(f, h0, None, solver=ic.steps(0), batch_ndim=1, trace=True)
    assert not calls or library.name == "jax"  # which traces f once
    np.testing.assert_array_equal(library.numpy(solution.value), np.zeros_like(X))
    assert solution.stats.evaluations == 0
    assert list(library.numpy(solution.stats.steps)) == [0, 0]
    assert list(library.numpy(solution.status)) == [ic.MAX_STEPS] * 2
    assert solution.stats.trace.shape == (0, 2)
    layer = ic.fixed_point(f, h0, None, solver=ic.steps(0), gradient=gradient, batch_ndim=1)
    np.testing.assert_allclose(library.numpy(layer.value), loop(2)[2], rtol=1e-12)
    np.testing.assert_allclose(library.numpy(layer.stats.residual), residual(loop(1)[1]), rtol=1e-9)


@pytest.mark.parametrize("numbers", [[0, 0, 0, 0], [0, 2, 0, 5]])
def test_no_step_of_some_samples(numbers: list[int], library: Library) -> None:
    solution = halving(library, ic.steps(library.array(np.array(numbers, np.int32))))
    np.testing.assert_allclose(library.numpy(solution.value)[:, 0], 2 - 2 * 0.5 ** np.array(numbers), rtol=1e-12)
    assert list(library.numpy(solution.stats.steps)) == numbers


@pytest.mark.parametrize("steps", [0, 2])
def test_a_traced_number_of_steps_may_be_zero(steps: int) -> None:
    f, h0 = lambda h, z: jnp.tanh(h @ W + X), jnp.zeros_like(X)
    solution = jax.jit(lambda n: ic.solve(f, h0, None, solver=ic.steps(n), batch_ndim=1))(steps)
    np.testing.assert_allclose(solution.value, loop(steps)[steps], rtol=1e-12)
    assert list(solution.stats.steps) == [steps, steps]


def test_a_number_of_torch_may_be_zero() -> None:
    solution = ic.solve(lambda h, z: h + 1, torch.zeros(2), None, solver=ic.steps(torch.tensor(0)))
    assert solution.value.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("make", [lambda: ic.steps(-1), lambda: ic.FixedPointIteration(max_steps=0)])
def test_fewer_steps_than_there_can_be(make: Any) -> None:
    with pytest.raises(ValueError, match=r"(n|max_steps) must be at least"):
        make()


@pytest.mark.parametrize(
    "solver",
    [ic.steps(2), ic.steps(0), ic.steps(np.array([1, 2])), ic.Compacting(ic.steps(2))],
    ids=["some", "none", "of samples", "compacting"],
)
@pytest.mark.parametrize(
    "layer",
    [
        lambda f, h0, solver: ic.fixed_point(f, h0, None, solver=solver, batch_ndim=1),
        lambda f, h0, solver: ic.root(f, h0, None, solver=solver, batch_ndim=1),
        lambda f, h0, solver: ict.ImplicitLayer(f, solver=solver),
        lambda f, h0, solver: ict.RootLayer(f, solver=solver),
    ],
    ids=["fixed_point", "root", "ImplicitLayer", "RootLayer"],
)
def test_a_number_of_steps_has_no_default_gradient(layer: Any, solver: Any) -> None:
    """The default one adds five damped steps, which nobody who counts steps has asked for."""
    with pytest.raises(TypeError, match=r"no default gradient: add gradient=ic\.Unroll\(k, 1\.0\)"):
        layer(lambda h, z: 0.5 * h, torch.ones(2, 1), solver)


@pytest.mark.parametrize("solver", [ic.FixedPointIteration(), ic.Anderson(rtol=0, atol=0, max_steps=3)], ids=repr)
def test_other_solvers_have_the_default_gradient(solver: Any) -> None:
    h0 = torch.ones(2, 1)
    default, given = (
        ic.fixed_point(lambda h, z: torch.cos(h), h0, None, solver=solver, batch_ndim=1, **options).value
        for options in ({}, {"gradient": ic.Unroll(5, 0.5)})
    )
    assert torch.equal(default, given)
    assert ict.ImplicitLayer(lambda h, x: h, solver=solver).gradient == ic.Unroll(5, 0.5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_count_in_the_state_is_exact_and_not_measured(dtype: Any, library: Library) -> None:
    """Recursive models count their steps in the state, to draw noise by them; restarts are compared without it."""
    starts = np.array([[[3e-4], [1e-5]], [[1e-5], [3e-4]]], dtype)
    state = library.array(starts), library.array(np.zeros((2, 2), dtype))
    solution = ic.solve(
        lambda state, z: (0.5 * state[0], state[1] + 1),
        state,
        None,
        solver=ic.steps(7),
        batch_ndim=2,
        scale=(1.0, math.inf),
    )
    assert (library.numpy(solution.value[1]) == 7).all()
    np.testing.assert_allclose(library.numpy(solution.stats.residual), 0.5**7 * starts[..., 0], rtol=1e-5)
    np.testing.assert_allclose(library.numpy(solution.best().value[0])[:, 0], 2 * [1e-5 * 0.5**7], rtol=1e-5)


def test_no_state_is_without_any_measure() -> None:
    with pytest.raises(ValueError, match="scale must lie in"):
        ic.solve(lambda h, z: h, np.ones(2), None, scale=math.inf)


@pytest.mark.parametrize("gradient", [ic.Unroll(1, 1.0), ic.OneStep(), ic.BPTT(3)], ids=repr)
@pytest.mark.parametrize("jitted", [False, True])
def test_a_value_that_is_not_finite_is_told_behind_forced_steps(
    gradient: ic.Estimator, jitted: bool, recwarn: pytest.WarningsRecorder
) -> None:
    """A warning names such samples alone, and ``throw`` raises for them; others need not have converged."""
    globals().pop("__warningregistry__", None)  # a line of the user's is warned of once
    options: Any = {"solver": ic.steps(2), "gradient": gradient, "batch_ndim": 1}
    if jitted:
        x, start, f = jnp.asarray([[1.0], [-1.0]]), jnp.zeros((2, 1)), lambda h, z: jnp.sqrt(z + 0.1 * h)
    else:
        x, start, f = torch.tensor([[1.0], [-1.0]]), torch.zeros(2, 1), lambda h, z: torch.sqrt(z + 0.1 * h)
    solution = ic.fixed_point(f, start, x, **options)
    assert [int(status) for status in solution.status] == [ic.MAX_STEPS, ic.NONFINITE]
    (warned,) = [str(w.message) for w in recwarn.list if issubclass(w.category, ic.ConvergenceWarning)]
    assert "NONFINITE in 1 of 2 samples (1)" in warned
    assert "MAX_STEPS" not in warned
    with pytest.raises(ic.SolveError, match=r"NONFINITE in 1 of 2 samples \(1\)"):
        ic.fixed_point(f, start, x, throw=True, **options)
    recwarn.clear()
    ic.fixed_point(f, start[:1], x[:1], throw=True, **options)
    ic.fixed_point(f, start[:1], x[:1], **options)
    assert not recwarn.list


def test_a_recurrent_model_may_drop_anew_in_each_step(recwarn: pytest.WarningsRecorder) -> None:
    globals().pop("__warningregistry__", None)
    cell = DroppingCell()
    layer = ict.ImplicitLayer(cell, solver=ic.steps(2), gradient=ic.Unroll(1, 1.0))
    layer(torch.ones(3, 4))
    assert not [w for w in recwarn.list if issubclass(w.category, ic.ChangingFunctionWarning)]
    with pytest.warns(ic.ChangingFunctionWarning, match="Dropout"):
        layer(torch.ones(3, 4), gradient=ic.OneStep())


class DroppingCell(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = torch.nn.Linear(4, 4), torch.nn.Dropout(0.5)

    def forward(self, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.dropout(self.linear(h)) + x)


def test_a_sample_that_is_not_finite_stays_with_a_damping_of_each() -> None:
    """The loop that looks at each point begins again, with the settings as they were given."""
    solver, z = ic.steps(3, damping=torch.tensor([1.0, 0.5])), torch.tensor([[1.0], [-1.0]])
    solution = ic.solve(lambda h, z: torch.sqrt(z - h), torch.zeros(2, 1), z, solver=solver, batch_ndim=1)
    assert solution.status.tolist() == [ic.MAX_STEPS, ic.NONFINITE]
    np.testing.assert_allclose(solution.value, [[1.0], [0.0]])
