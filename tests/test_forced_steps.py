"""Forced steps where squares leave the range of numbers, memory is used twice, or a part of a state is not measured.

Each value is compared with a loop by hand.
"""

import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from libraries import Library

import implicit_core as ic
from implicit_core.adapters import torch as ict

LAST = {"gradient": ic.Unroll(1, 1.0), "batch_ndim": 1}


def halved(h: Any, x: Any) -> Any:
    return 0.5 * h + x


def after(n: int, x: float = 1.0) -> float:
    """The point after n steps of :func:`halved` from zero."""
    return 2 * x * (1 - 0.5**n)


# Compacting.


@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_compacting_makes_the_same_steps(n: int, library: Library) -> None:
    h0, x = library.array(np.zeros((4, 1))), library.array(np.ones((4, 1)))
    solution = ic.solve(halved, h0, x, solver=ic.Compacting(ic.steps(n)), batch_ndim=1)
    np.testing.assert_allclose(library.numpy(solution.value), after(n), rtol=1e-12)
    assert list(library.numpy(solution.stats.steps)) == 4 * [n]
    assert solution.stats.evaluations == n
    layer = ic.fixed_point(halved, h0, x, solver=ic.Compacting(ic.steps(n)), **LAST)
    np.testing.assert_allclose(library.numpy(layer.value), after(n + 1), rtol=1e-12)


# Squares beyond the range of numbers.


def spread(library: Library, sizes: Any) -> tuple[Any, Any]:
    x = library.array(np.array(sizes, np.float32)[:, None])
    return library.array(np.zeros((len(sizes), 1), np.float32)), x


@pytest.mark.parametrize("gradient", [None, ic.Unroll(1, 1.0), ic.OneStep()], ids=repr)
def test_a_traced_program_makes_all_steps_of_tiny_and_of_large_samples(gradient: Any) -> None:
    sizes = np.array([1.0, 1e-30, 1e-14, 1e18, 1e30], np.float32)

    def run(x: Any) -> Any:
        options: Any = {} if gradient is None else {"gradient": gradient}
        solver = ic.solve if gradient is None else ic.fixed_point
        solution = solver(halved, jnp.zeros_like(x), x, solver=ic.steps(3), batch_ndim=1, **options)
        return solution.value, solution.status, solution.stats.residual

    value, status, residual = jax.jit(run)(sizes[:, None])
    steps = 4 if isinstance(gradient, ic.Unroll) else 3
    np.testing.assert_allclose(value[:, 0], after(steps) * sizes, rtol=1e-6)
    assert list(status) == 5 * [ic.MAX_STEPS]
    np.testing.assert_allclose(residual, 0.5 ** (steps - 1) * sizes, rtol=1e-5)


@pytest.mark.parametrize("gradient", [ic.Unroll(1, 1.0), ic.OneStep()], ids=repr)
def test_so_does_an_exported_one(gradient: ic.Estimator) -> None:
    layer = ict.ImplicitLayer(halved, solver=ic.steps(2), gradient=gradient).eval()
    program = torch.export.export(layer, (torch.ones(3, 1),), strict=False).module()
    x = torch.tensor([[1e-14], [1.0], [1e18]])
    torch.testing.assert_close(program(x), layer(x), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("trace", [False, True])
@pytest.mark.parametrize("of_samples", [False, True])
def test_a_norm_that_overflows_stops_no_step(of_samples: bool, trace: bool, library: Library) -> None:
    h0 = library.array(np.ones((2, 2), np.float32))
    n = library.array(np.array([25, 24])) if of_samples else 25
    with warnings.catch_warnings():
        warnings.simplefilter("error", ic.ConvergenceWarning)
        solution = ic.fixed_point(lambda h, z: 10 * h, h0, None, solver=ic.steps(n), trace=trace, **LAST)
    expected = [1e26, 1e25 if of_samples else 1e26]
    np.testing.assert_allclose(library.numpy(solution.value)[:, 0], expected, rtol=1e-5)
    assert list(library.numpy(solution.status)) == 2 * [ic.MAX_STEPS]
    np.testing.assert_allclose(
        library.numpy(solution.stats.residual), 0.9 * math.sqrt(2) * np.array(expected), rtol=1e-5
    )
    if trace:
        rows = library.numpy(solution.stats.trace)
        np.testing.assert_allclose(rows[:20, 0], 9 * math.sqrt(2) * 10.0 ** np.arange(20), rtol=1e-5)
        np.testing.assert_allclose(rows[24, 0], 9e24 * math.sqrt(2), rtol=1e-5)


def test_nor_does_it_end_a_stepper(library: Library) -> None:
    stepper = ic.Stepper(lambda h, z: 10 * h, solver=ic.steps(1), batch_ndim=1)
    state = stepper.init(library.array(np.array([[1e18], [1e-18]], np.float32)), None)
    for _ in range(6):
        state = stepper.step(state, None)
    np.testing.assert_allclose(library.numpy(state.value)[:, 0], [1e24, 1e-12], rtol=1e-5)
    np.testing.assert_allclose(library.numpy(state.residual), [9e24, 9e-12], rtol=1e-5)
    assert not library.numpy(state.finished).any()


def test_an_infinite_sample_keeps_its_last_finite_point(library: Library) -> None:
    h0 = library.array(np.array([[1.0], [1e30]], np.float32))
    for options in ({}, {"trace": True}):
        solution = ic.solve(lambda h, z: 100 * h, h0, None, solver=ic.steps(6), batch_ndim=1, **options)
        np.testing.assert_allclose(library.numpy(solution.value)[:, 0], [1e12, 1e38], rtol=1e-5)
        assert list(library.numpy(solution.status)) == [ic.MAX_STEPS, ic.NONFINITE]


@pytest.mark.parametrize("size", [3, 5000], ids=["small", "large"])
def test_one_nan_in_a_sample_of_any_size(size: int, library: Library) -> None:
    """XLA's maximum on a CPU passes over NaN in 4096 numbers or more."""
    h0, x = np.zeros((2, size)), np.ones((2, size))
    x[1, size // 2] = np.nan

    def run(h0: Any, x: Any) -> Any:
        found = ic.solve(halved, h0, x, solver=ic.steps(3), batch_ndim=1)
        beside = ic.solve(  # the part that has a NaN is not measured
            lambda h, z: (0.5 * h[0] + z[0], 0.5 * h[1] + z[1]), (h0[:, :1], h0), (x[:, :1], x),
            solver=ic.steps(3), scale=(1.0, math.inf), batch_ndim=1,
        )  # fmt: skip
        return found.value, found.status, beside.status

    for solve in (run, jax.jit(run)) if library.name == "jax" else (run,):
        value, *status = solve(library.array(h0), library.array(x))
        np.testing.assert_allclose(library.numpy(value)[0], after(3))
        assert not library.numpy(value)[1].any()
        for found in status:
            assert list(library.numpy(found)) == [ic.MAX_STEPS, ic.NONFINITE]


def test_a_negative_number_of_steps_that_is_traced_is_nan() -> None:
    def run(n: Any) -> Any:
        solution = ic.fixed_point(halved, jnp.zeros((3, 1)), jnp.ones((3, 1)), solver=ic.steps(n), **LAST)
        return solution.value[:, 0], solution.status

    value, status = jax.jit(run)(jnp.array([-1, 0, 2]))
    np.testing.assert_allclose(value, [math.nan, 1.0, 1.75])
    assert list(status) == [ic.NONFINITE, ic.MAX_STEPS, ic.MAX_STEPS]


# Statuses.


@pytest.mark.parametrize("gradient", [ic.Unroll(1, 1.0), ic.BPTT(2), ic.OneStep()], ids=repr)
def test_an_exact_fixed_point_has_converged(gradient: ic.Estimator, library: Library) -> None:
    h0 = library.array(np.array([[0.0], [2.0]]))
    solution = ic.fixed_point(lambda h, z: 0.5 * h, h0, None, solver=ic.steps(2), gradient=gradient, batch_ndim=1)
    assert list(library.numpy(solution.status)) == [ic.CONVERGED, ic.MAX_STEPS]


def test_a_residual_that_is_not_finite_is_told_although_f_is(library: Library) -> None:
    """F of an infinite start is finite, and so is its norm."""
    globals().pop("__warningregistry__", None)
    f, h0 = library.xp.tanh, library.array(np.array([[math.inf], [1.0]]))
    with pytest.warns(ic.ConvergenceWarning, match=r"numbers that are not finite: NONFINITE in 1 of 2 samples \(0\)"):
        solution = ic.fixed_point(lambda h, z: f(h), h0, None, solver=ic.steps(0), **LAST)
    assert list(library.numpy(solution.status)) == [ic.NONFINITE, ic.MAX_STEPS]


def below(limit: float) -> Any:
    return lambda h, f: abs(f - h)[:, 0] < limit


@pytest.mark.parametrize("gradient", [ic.Unroll(1, 1.0), ic.OneStep()], ids=repr)
def test_a_sample_that_stop_ends_has_converged(gradient: ic.Estimator, library: Library) -> None:
    """Its own test is what the solver was asked for; a sample that it does not end has not met it."""
    solver = ic.FixedPointIteration(rtol=0.0, atol=0.0, max_steps=4, stop=below(0.1))
    h0, x = (library.array(np.array(a)) for a in ([[0.0], [0.0]], [[0.5], [5.0]]))
    options: Any = {"solver": solver, "gradient": gradient, "batch_ndim": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solution = ic.fixed_point(halved, h0, x, **options)
    assert list(library.numpy(solution.status)) == [ic.CONVERGED, ic.MAX_STEPS]
    with pytest.raises(ic.SolveError, match="MAX_STEPS in 1 of 2"):
        ic.fixed_point(halved, h0, x, throw=True, **options)


def test_stop_may_end_a_sample_whose_residual_rises_after_it(library: Library) -> None:
    solver = ic.FixedPointIteration(rtol=1e-9, max_steps=9, stop=lambda h, f: h[:, 0] > 2.5)
    h0 = library.array(np.ones((1, 1)))
    solution = ic.fixed_point(lambda h, z: 1.2 * h, h0, None, solver=solver, **LAST)
    assert list(library.numpy(solution.status)) == [ic.CONVERGED]


def test_stop_may_end_a_sample_whose_norm_overflows(library: Library) -> None:
    solver = ic.FixedPointIteration(rtol=0.0, atol=0.0, max_steps=26, stop=lambda h, f: h[:, 0] > 3e23)
    h0 = library.array(np.ones((1, 2), np.float32))
    solution = ic.solve(lambda h, z: 10 * h, h0, None, solver=solver, batch_ndim=1)
    np.testing.assert_allclose(library.numpy(solution.value)[0], 2 * [1e24], rtol=1e-5)
    assert list(library.numpy(solution.status)) == [ic.CONVERGED]


def test_a_layer_counts_what_stop_did_not_end() -> None:
    solver = ic.FixedPointIteration(rtol=0.0, atol=0.0, max_steps=4, stop=below(0.1))
    layer = ict.ImplicitLayer(halved, solver=solver, gradient=ic.Unroll(1, 1.0))
    layer(torch.tensor([[0.5], [5.0]]))
    assert (layer.samples, layer.unconverged) == (2, 1)


@pytest.mark.parametrize("gradient", [ic.Unroll(1, 1.0), ic.Unroll(3, 0.5), ic.OneStep()], ids=repr)
def test_throw_within_a_transform(gradient: ic.Estimator) -> None:
    def loss(x: torch.Tensor) -> torch.Tensor:
        options: Any = {"solver": ic.steps(3), "gradient": gradient, "batch_ndim": 1, "throw": True}
        return ic.fixed_point(halved, torch.zeros_like(x), x, **options).value.sum()

    x = torch.ones(2, 2, requires_grad=True)
    (expected,) = torch.autograd.grad(loss(x), x)
    torch.testing.assert_close(torch.func.grad(loss)(torch.ones(2, 2)), expected)
    with pytest.raises(ic.SolveError, match="NONFINITE in 1 of 2"):
        torch.func.grad(loss)(torch.tensor([[math.nan, 1.0], [1.0, 1.0]]))


# No default gradient.


def test_nor_is_there_one_for_another_solver_of_a_layer() -> None:
    with pytest.raises(TypeError, match="no default gradient"):
        ict.ImplicitLayer(halved, eval_solver=ic.steps(3))
    x, layer = torch.ones(1, 1), ict.ImplicitLayer(halved)
    with pytest.raises(TypeError, match="no default gradient"):
        layer(x, solver=ic.steps(3))
    assert layer(x, solver=ic.steps(3), gradient=ic.OneStep()).item() == after(3)
    layer.solver = ic.steps(2)
    with pytest.raises(TypeError, match="no default gradient"):
        layer(x)
    layer.gradient = ic.Unroll(5, 0.5)
    layer(x)


def test_nor_for_a_derived_solver() -> None:
    class Mine(ic.FixedPointIteration):
        pass

    with pytest.raises(TypeError, match="no default gradient"):
        ic.fixed_point(halved, torch.zeros(1), torch.ones(1), solver=Mine(rtol=0.0, atol=0.0, max_steps=2))


def test_a_test_of_ones_own_has_the_default_gradient() -> None:
    solver = ic.FixedPointIteration(rtol=0.0, atol=0.0, max_steps=9, stop=below(1e-2))
    solution = ic.fixed_point(halved, torch.zeros(1, 1), torch.ones(1, 1), solver=solver, batch_ndim=1)
    assert solution.value.item() > after(7)


# A part of the state that is not measured.


@pytest.mark.parametrize("size", [1e-30, 1e-8, 7.0, 1e30])
def test_a_part_that_is_not_measured_keeps_its_numbers(size: float, library: Library) -> None:
    y, rest = (library.array(np.array(a, np.float32)) for a in ([[1.0, 1.0]], [[size]]))
    solution = ic.fixed_point(
        lambda s, z: (0.5 * s[0], s[1]), (y, rest), None, solver=ic.steps(2), scale=(1.0, math.inf), **LAST
    )
    assert library.numpy(solution.value[1]).item() == np.float32(size)
    np.testing.assert_allclose(library.numpy(solution.stats.residual), [0.125 * math.sqrt(2)], rtol=1e-6)


def test_a_fixed_point_beside_a_count_has_converged(library: Library) -> None:
    state = library.array(np.ones((1, 2), np.float32)), library.array(np.zeros((1, 1), np.float32))
    solution = ic.fixed_point(
        lambda s, z: (s[0], s[1] + 1), state, None, solver=ic.steps(2), scale=(1.0, math.inf), **LAST
    )
    assert list(library.numpy(solution.status)) == [ic.CONVERGED]
    assert library.numpy(solution.stats.residual).item() == 0.0


@pytest.mark.parametrize("solver", [ic.FixedPointIteration(), ic.Anderson(), ic.Broyden()], ids=repr)
def test_solvers_pass_by_a_part_that_is_not_measured(solver: ic.Solver, library: Library) -> None:
    y, count, x = (library.array(np.array(a)) for a in (np.zeros((1, 6)), [[0.0]], [np.linspace(0, 1, 6)]))
    xp = library.xp

    def f(s: Any, z: Any) -> Any:
        return 0.5 * xp.cos(s[0]) + z, s[1] + 1

    found = ic.solve(f, (y, count), x, solver=solver, batch_ndim=1, scale=(1.0, math.inf))
    alone = ic.solve(lambda h, z: 0.5 * xp.cos(h) + z, y, x, solver=solver, batch_ndim=1)
    np.testing.assert_array_equal(library.numpy(found.value[0]), library.numpy(alone.value))
    assert list(library.numpy(found.stats.steps)) == list(library.numpy(alone.stats.steps))


def test_what_is_not_measured_is_noticed_if_it_is_not_finite(library: Library) -> None:
    state = library.array(np.ones((2, 1))), library.array(np.array([[math.nan], [1.0]]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ic.ConvergenceWarning)
        solution = ic.fixed_point(
            lambda s, z: (0.5 * s[0], s[1]), state, None, solver=ic.steps(2), scale=(1.0, math.inf), **LAST
        )
    assert list(library.numpy(solution.status)) == [ic.NONFINITE, ic.MAX_STEPS]


@pytest.mark.parametrize("forward", [False, True])
@pytest.mark.parametrize("gradient", [ic.Implicit(ic.GMRES(rtol=1e-13)), ic.Neumann(200, 1.0)], ids=repr)
def test_a_part_that_is_not_measured_has_its_derivative(gradient: ic.Estimator, forward: bool) -> None:
    """Of h = A h + b x, whose second part alone depends on what follows."""
    a, b = np.array([[0.2, 0.3], [0.1, 0.4]]), np.array([1.0, 2.0])

    def solved(x: Any) -> Any:
        def f(h: Any, z: Any) -> Any:
            return a[0, 0] * h[0] + a[0, 1] * h[1] + b[0] * z, a[1, 0] * h[0] + a[1, 1] * h[1] + b[1] * z

        solver = ic.FixedPointIteration(rtol=1e-13, max_steps=300)
        start = (jnp.zeros_like(x),) * 2
        options: Any = {"solver": solver, "gradient": gradient, "batch_ndim": 1, "scale": (1.0, math.inf)}
        return ic.fixed_point(f, start, x, **options).value[1].sum()

    derivative = (jax.jacfwd if forward else jax.jacrev)(solved)(jnp.ones((1, 1)))
    np.testing.assert_allclose(derivative, [[np.linalg.solve(np.eye(2) - a, b)[1]]], rtol=1e-10)


# Memory that is used twice.


def test_a_stepper_keeps_what_f_writes_over() -> None:
    buffer = np.zeros((1, 2))

    def f(h: Any, z: Any) -> Any:
        np.multiply(h, 0.5, out=buffer)
        buffer[...] += z
        return buffer

    stepper = ic.Stepper(f, solver=ic.steps(1), batch_ndim=1)
    state = stepper.init(np.full((1, 2), 5.0), 1.0)
    for _ in range(2):
        later = stepper.step(state, 1.0)
        stepper.step(later, 1.0)
        np.testing.assert_array_equal(stepper.step(state, 1.0).value, np.full((1, 2), 3.5))
    f(np.zeros((1, 2)), 7.0)
    np.testing.assert_array_equal(stepper.step(state, 1.0).value, np.full((1, 2), 3.5))


@pytest.mark.parametrize("gradient", [ic.Unroll(2, 1.0), ic.BPTT(3)], ids=repr)
def test_a_buffer_that_torch_does_not_know_of_has_its_residual(gradient: ic.Estimator) -> None:
    memory = np.zeros((2, 2), np.float32)
    buffer = torch.from_numpy(memory)

    def f(h: torch.Tensor, z: Any) -> torch.Tensor:
        memory[...] = 0.5 * h.numpy() + 1
        return buffer

    with torch.no_grad():
        solution = ic.fixed_point(f, torch.zeros(2, 2), None, solver=ic.steps(1), gradient=gradient, batch_ndim=1)
    assert solution.value.tolist() == 2 * [2 * [1.75]]
    torch.testing.assert_close(solution.stats.residual, torch.full((2,), 0.25 * math.sqrt(2)))
    assert solution.value.data_ptr() != buffer.data_ptr()


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("gradient", [ic.Unroll(1, 1.0), ic.BPTT(1), ic.OneStep()], ids=repr)
@pytest.mark.parametrize("n", [0, 2])
def test_no_result_shares_memory_with_a_tensor_of_the_users(n: int, gradient: ic.Estimator, grad: bool) -> None:
    h0, x, buffer = torch.zeros(2, 1), torch.ones(2, 1), torch.full((2, 1), 3.0)
    for f, mine in ((lambda h, z: buffer, buffer), (lambda h, z: z, x), (lambda h, z: h, h0)):
        with torch.set_grad_enabled(grad):
            value = ic.fixed_point(f, h0, x, solver=ic.steps(n), gradient=gradient, batch_ndim=1).value
        assert value.data_ptr() not in (h0.data_ptr(), mine.data_ptr())
        solved = ic.solve(f, h0, x, solver=ic.steps(n), batch_ndim=1).value
        assert solved.data_ptr() not in (h0.data_ptr(), mine.data_ptr())


def test_a_cell_that_writes_leaves_the_start_alone() -> None:
    for n in (0, 1, 2):
        h0 = torch.full((2, 1), -1.0)
        cell = torch.nn.ReLU(inplace=True)
        ic.fixed_point(lambda h, z, cell=cell: cell(h), h0, None, solver=ic.steps(n), **LAST)
        assert h0.tolist() == [[-1.0], [-1.0]]


# Shards.


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize(
    ("n", "gradient"), [(2, ic.Unroll(1, 1.0)), (0, ic.Unroll(2, 1.0)), (0, ic.BPTT(2)), (0, ic.OneStep())]
)
def test_a_mesh_shards_the_numbers_of_samples(n: int, gradient: ic.Estimator, jitted: bool) -> None:
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2], axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        over = NamedSharding(mesh, PartitionSpec("data", None))
        x, h0 = jax.device_put(jnp.ones((4, 3)), over), jax.device_put(jnp.zeros((4, 3)), over)

        def run(x: Any, h0: Any) -> Any:
            return ic.fixed_point(halved, h0, x, solver=ic.steps(n), gradient=gradient, batch_ndim=1)

        solution = (jax.jit(run) if jitted else run)(x, h0)
        assert jax.typeof(solution.value).sharding.spec == PartitionSpec("data", None)
        for numbers in (solution.status, solution.stats.residual, solution.stats.steps):
            assert jax.typeof(numbers).sharding.spec == PartitionSpec("data")
        moved = n if isinstance(gradient, ic.OneStep) else n + gradient.k  # type: ignore[attr-defined]  # theirs
        np.testing.assert_allclose(solution.value, after(moved))


# Where F and its argument have sizes that are far apart.


@pytest.mark.parametrize("options", [{}, {"trace": True}], ids=["", "trace"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_small_result_of_a_large_argument_has_its_residual(dtype: Any, options: Any, library: Library) -> None:
    xp, tiny = library.xp, float(np.finfo(dtype).tiny) ** 0.7
    h0 = library.array(np.zeros((2, 2), dtype))

    def f(h: Any, z: Any) -> Any:
        return xp.where(h > 0.5, 0 * h + tiny, 0 * h + 1.0)

    for solution in (
        ic.solve(f, h0, None, solver=ic.steps(2), batch_ndim=1, **options),
        ic.fixed_point(f, h0, None, solver=ic.steps(1), **LAST, **options),
    ):
        np.testing.assert_allclose(library.numpy(solution.stats.residual), math.sqrt(2), rtol=1e-6)
        assert list(library.numpy(solution.status)) == 2 * [ic.MAX_STEPS]


def test_a_small_start_of_a_zero_map_has_not_converged(library: Library) -> None:
    h0 = library.array(np.full((1, 2), 1e-30, np.float32))
    solution = ic.solve(lambda h, z: 0 * h, h0, None, solver=ic.steps(1), batch_ndim=1)
    np.testing.assert_allclose(library.numpy(solution.stats.residual), 1e-30 * math.sqrt(2), rtol=1e-6)
    assert list(library.numpy(solution.status)) == [ic.MAX_STEPS]


def test_a_tiny_part_beside_a_large_count(library: Library) -> None:
    state = library.array(np.full((1, 2), 1e-30, np.float32)), library.array(np.array([[1e9]], np.float32))
    for solved, options in ((ic.solve, {"batch_ndim": 1}), (ic.fixed_point, LAST)):
        solution = solved(  # type: ignore[operator]  # either
            lambda s, z: (0.5 * s[0], s[1] + 1), state, None, solver=ic.steps(3), scale=(1.0, math.inf), **options
        )
        assert list(library.numpy(solution.status)) == [ic.MAX_STEPS]
        assert library.numpy(solution.stats.residual).item() > 0


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_steps_to_a_root_of_any_size(size: float, library: Library) -> None:
    x0, z = (library.array(np.full((1, 2), part * size, np.float32)) for part in (1.0, 0.25))
    problem = ic.RootProblem(lambda x, z: 0.5 * x - z, batch_ndim=1)
    solution = ic.solve(problem, x0, z, solver=ic.steps(3))
    np.testing.assert_allclose(library.numpy(solution.value) / size, 0.5625, rtol=1e-6)
    np.testing.assert_allclose(library.numpy(solution.stats.relative), 0.25, rtol=1e-6)
    assert list(library.numpy(solution.status)) == [ic.MAX_STEPS]


class Normalized(ic.Solver):
    """A plain step whose factor, which is 1, is a quotient of inner products."""

    keeps_best = False

    def init(self, system: Any, x: Any) -> None:
        return None

    def step(self, system: Any, memory: None, point: Any) -> Any:
        space, r = system.space, point.residual
        return space.axpy(space.dot(r, r) / space.dot(r, r), r, point.x), None


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_a_solver_of_ones_own_has_inner_products_of_numbers_in_range(size: float) -> None:
    h0, z = np.full((1, 2), size, np.float32), np.full((1, 2), size, np.float32)
    solution = ic.solve(halved, h0, z, solver=Normalized(rtol=0.0, atol=0.0, max_steps=5), batch_ndim=1)
    np.testing.assert_allclose(solution.value / size, 2 - 0.5**5, rtol=1e-5)


@pytest.mark.parametrize("size", [1e-25, 1.0, 1e25])
def test_compacting_finds_a_wrong_batch_at_any_size(size: float) -> None:
    z = size * np.array([[1.0], [1.0], [1.0], [8.0]], np.float32)
    solver = ic.FixedPointIteration(
        rtol=0.0, atol=0.0, max_steps=30, stop=lambda h, f: abs(f - h)[:, 0] < np.float32(size) * 1e-3
    )
    compacting = ic.Compacting(solver, batched=False)
    with pytest.raises(ValueError, match="Either batched= is wrong"):
        ic.solve(lambda h, z: 0.5 * h + z[: len(h)], np.zeros_like(z), z, solver=compacting, batch_ndim=1)


# Beside forced steps.


@pytest.mark.parametrize("solver", [ic.FixedPointIteration(), ic.Anderson(), ic.Broyden()], ids=repr)
def test_a_solve_that_met_no_numbers_has_not_converged_behind_more_steps(solver: ic.Solver) -> None:
    h = jnp.full((1, 2), 1e30, jnp.float32)
    run = jax.jit(lambda h, z: ic.fixed_point(halved, h, z, solver=solver, **LAST).status)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ic.ConvergenceWarning)
        assert list(run(h, h)) == [ic.NONFINITE]


@pytest.mark.parametrize("solver", [ic.FixedPointIteration, ic.Anderson])
def test_stop_says_nothing_of_steps_that_run_away(solver: Any, library: Library) -> None:
    xp = library.xp
    h0, z = (library.array(np.full((2, 1), x)) for x in (0.0, 1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ic.ConvergenceWarning)
        solution = ic.fixed_point(
            lambda h, z: xp.where(h < 1.5, h + z, 30.0 * h),
            h0,
            z,
            solver=solver(stop=lambda h, f: h[:, 0] >= 2),
            gradient=ic.Unroll(5, 1.0),
            batch_ndim=1,
        )
    assert list(library.numpy(solution.status)) == 2 * [ic.DIVERGED]


@pytest.mark.parametrize("options", [{"scale": (1.0, math.inf)}, {"g_scale": (1.0, math.inf)}], ids=str)
def test_no_equation_is_left_out(options: Any) -> None:
    """It would not determine its unknown."""
    x0 = (np.ones(2), np.ones(1))
    with pytest.raises(ValueError, match=r"scale must lie in \(0, inf\), got inf"):
        ic.root(lambda x, z: x, x0, None, **options)
    if "scale" in options:
        with pytest.raises(ValueError, match=r"scale must lie in \(0, inf\), got inf"):
            ic.solve_linear(lambda v: v, x0, **options)


def test_some_part_is_measured() -> None:
    with pytest.raises(ValueError, match=r"scale must lie in \(0, inf\), got inf"):
        ic.solve(lambda h, z: h, (np.ones(2), np.ones(1)), None, scale=(math.inf, math.inf))
