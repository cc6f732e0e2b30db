"""Every solver on every problem and library: results, stop tests, frozen samples and costs of a step."""

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from libraries import JAX, NUMPY, TORCH, Library, flat, unflat
from problems import CASES, Case, affine, layer, pytree, rotation, scalar, symmetric_layer

import implicit_core as ic

TIGHT = {"rtol": 1e-12, "atol": 1e-13, "max_steps": 100}
ACCELERATED = [ic.Anderson(**TIGHT), ic.Broyden(**TIGHT), ic.NewtonKrylov(**TIGHT)]
SOLVERS = [ic.FixedPointIteration(**TIGHT), *ACCELERATED]
ITERATION = SOLVERS[0]
ONE_STEP = ic.FixedPointIteration(rtol=0.0, max_steps=1)


def named(solver: ic.Solver) -> str:
    return type(solver).__name__


def run(case: Case, library: Library, solver: Any, **options: Any) -> tuple[ic.Solution, Any]:
    h0, z = library.array(case.h0), library.array(case.z)
    solution = ic.solve(case.problem(library), h0, z, solver=solver, **options)
    return solution, library.numpy(solution.value)


@pytest.mark.parametrize("solver", ACCELERATED, ids=named)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_accelerated_solvers_find_every_root(case: Case, solver: ic.Solver, library: Library) -> None:
    solution, value = run(case, library, solver)
    root = case.oracle()
    assert np.all(library.numpy(solution.status) == ic.CONVERGED)
    np.testing.assert_allclose(flat(value), flat(root), atol=1e-9, rtol=0)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_plain_iteration_finds_a_root_or_says_that_it_did_not(case: Case, library: Library) -> None:
    solution, value = run(case, library, ITERATION)
    root = case.oracle()
    if case.contraction < 0.85:
        assert np.all(library.numpy(solution.status) == ic.CONVERGED)
        np.testing.assert_allclose(flat(value), flat(root), atol=1e-9, rtol=0)
    elif np.any(library.numpy(solution.status) != ic.CONVERGED):
        assert np.max(np.abs(flat(value) - flat(root))) > 1e-9
    else:
        np.testing.assert_allclose(flat(value), flat(root), atol=1e-9, rtol=0)


@pytest.mark.parametrize("framework", [TORCH, JAX], ids=lambda library: library.name)
@pytest.mark.parametrize("called", ["solve", "solver", "compacting", "callable"])
@pytest.mark.parametrize("case", [layer(), pytree()], ids=lambda case: case.name)
def test_frameworks_with_autodiff_differentiate_a_plain_f(case: Case, called: str, framework: Library) -> None:
    """Newton's steps are those with the Jacobian of the user's callbacks."""
    given = case.problem(framework)
    plain = ic.Problem(given.f, batch_ndim=given.batch_ndim)
    h0, z, newton = framework.array(case.h0), framework.array(case.z), ic.NewtonKrylov(**TIGHT)
    expected = ic.solve(given, h0, z, solver=newton)
    if called == "solve":
        solution = ic.solve(given.f, h0, z, solver=newton, batch_ndim=given.batch_ndim)
    elif called == "solver":
        solution = newton.solve(plain, h0, z)
    elif called == "compacting":
        batched: Any = {"w": False, "x": True} if case.name == "layer" else False
        solution = ic.solve(plain, h0, z, solver=ic.Compacting(newton, batched=batched))
    else:
        products = []

        def function(problem: Any, h: Any, z: Any) -> Any:
            products.append(problem.linearize(h, z).jvp_h(h))
            return expected.value

        ic.solve(plain, h0, z, solver=function)
        reference = given.linearize(h0, z).jvp_h(h0)
        np.testing.assert_allclose(flat(framework.numpy(products[0])), flat(framework.numpy(reference)), atol=1e-12)
        return
    assert np.all(framework.numpy(solution.status) == ic.CONVERGED)
    np.testing.assert_allclose(flat(framework.numpy(solution.value)), flat(case.oracle()), atol=1e-9, rtol=0)
    np.testing.assert_array_equal(*(framework.numpy(s.stats.steps) for s in (solution, expected)))


@pytest.mark.parametrize("z", [NUMPY, TORCH], ids=lambda library: library.name)
def test_numpy_has_no_derivative_of_a_plain_f(z: Library) -> None:
    """Whatever z holds: f computes with arrays of NumPy, which nothing differentiates."""
    with pytest.raises(NotImplementedError, match="needs the JVP of F, which this problem doesn't have: pass jvp="):
        ic.solve(lambda h, z: np.tanh(h) + 1, np.zeros(2), z.array(np.ones(2)), solver=ic.NewtonKrylov())


@pytest.mark.parametrize("solver", [ITERATION, dataclasses.replace(ITERATION, damping=0.9)])
def test_plain_iteration_on_a_rotation_reports_that_it_did_not_converge(solver: ic.Solver) -> None:
    solution, _ = run(rotation(angle=3.0), NUMPY, dataclasses.replace(solver, max_steps=20))
    assert solution.status == ic.MAX_STEPS


@pytest.mark.parametrize("solver", SOLVERS, ids=named)
@pytest.mark.parametrize("case", [layer(), pytree(), scalar(0.5)], ids=lambda case: case.name)
def test_residual_is_the_true_one_at_the_returned_point(case: Case, solver: ic.Solver, library: Library) -> None:
    loose = dataclasses.replace(solver, rtol=1e-3, atol=1e-5, max_steps=4)
    solution, value = run(case, library, loose)
    f = case.f(NUMPY.xp, value, case.z)
    samples = max(1, int(np.prod(library.numpy(solution.status).shape)))
    gaps, sizes = _per_sample(f, samples), _per_sample(value, samples)
    residual = np.linalg.norm(gaps - sizes, axis=1)
    np.testing.assert_allclose(np.ravel(library.numpy(solution.stats.residual)), residual, rtol=1e-9, atol=1e-14)
    converged = residual <= 1e-5 + 1e-3 * np.linalg.norm(gaps, axis=1)
    np.testing.assert_array_equal(np.ravel(library.numpy(solution.status)) == ic.CONVERGED, converged)


def _per_sample(tree: Any, samples: int) -> np.ndarray:
    leaves = [np.reshape(leaf, (samples, -1)) for leaf in (tree.values() if isinstance(tree, dict) else [tree])]
    return np.concatenate(leaves, axis=1)


def test_damping_does_not_flatter_the_residual() -> None:
    """The damped step is a hundredth of the residual here, and would pass a test of 1e-2."""
    solver = ic.FixedPointIteration(damping=0.01, rtol=0.0, atol=1e-2, max_steps=3)
    solution = ic.solve(lambda h, z: 0.5 * h + z, np.asarray(1.0), np.asarray(0.0), solver=solver)
    assert solution.status == ic.MAX_STEPS
    assert solution.stats.residual > 0.4


@pytest.mark.parametrize("solver", SOLVERS, ids=named)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_n_steps_evaluate_f_n_times(solver: ic.Solver, steps: int, library: Library) -> None:
    case = layer()
    exhausted = dataclasses.replace(solver, rtol=0.0, atol=0.0, max_steps=steps)
    for problem in (case.problem(library), case.linearized(library)):
        case.counts.clear()
        solution = ic.solve(problem, library.array(case.h0), library.array(case.z), solver=exhausted)
        # JAX traces F once, and test_jax_costs.py counts what its program does.
        assert case.counts["f"] == (1 if library is JAX and not solver.uses_jacobian else steps)
        assert steps == int(solution.stats.evaluations)
        assert np.all(library.numpy(solution.stats.steps) == steps)


@pytest.mark.parametrize("solver", SOLVERS, ids=named)
def test_a_warm_start_costs_one_evaluation(solver: ic.Solver, library: Library) -> None:
    case = affine(20)
    h0 = library.array(case.root)
    solution = ic.solve(case.problem(library), h0, library.array(case.z), solver=solver)
    assert case.counts["f"] == 1 == int(solution.stats.evaluations)
    assert int(solution.stats.steps) == 1
    np.testing.assert_array_equal(library.numpy(solution.value), case.root)


@pytest.mark.parametrize("solver", SOLVERS, ids=named)
def test_a_one_step_solve_still_measures_its_start(solver: ic.Solver) -> None:
    case = layer()
    solution, value = run(case, NUMPY, dataclasses.replace(solver, max_steps=1))
    np.testing.assert_array_equal(value, case.h0)
    assert np.all(solution.status == ic.MAX_STEPS)


@pytest.mark.parametrize("check_every", [1, 2, 3, 7])
@pytest.mark.parametrize("solver", SOLVERS, ids=named)
def test_check_every_changes_when_the_loop_ends_but_no_result(solver: ic.Solver, check_every: int) -> None:
    case = layer()
    every, value = run(case, NUMPY, solver)
    seldom, same = run(case, NUMPY, dataclasses.replace(solver, check_every=check_every))
    np.testing.assert_array_equal(value, same)
    np.testing.assert_array_equal(every.stats.steps, seldom.stats.steps)
    assert every.stats.evaluations <= seldom.stats.evaluations < every.stats.evaluations + check_every


def test_check_every_never_exceeds_max_steps() -> None:
    case = layer()
    solver = ic.FixedPointIteration(rtol=0.0, atol=0.0, max_steps=11, check_every=4)
    ic.solve(case.problem(), case.h0, case.z, solver=solver)
    assert case.counts["f"] == 11


@pytest.mark.parametrize("solver", SOLVERS, ids=named)
def test_trace_holds_every_residual_until_a_sample_is_finished(solver: ic.Solver, library: Library) -> None:
    case = layer()
    solution, _ = run(case, library, solver, trace=True)
    trace, steps = library.numpy(solution.stats.trace), library.numpy(solution.stats.steps)
    assert trace.shape == (solver.max_steps, 4)
    for sample in range(4):
        assert np.all(np.isfinite(trace[: steps[sample], sample]))
        assert np.all(np.isnan(trace[steps[sample] :, sample]))
        assert trace[steps[sample] - 1, sample] == library.numpy(solution.stats.residual)[sample]
    start = np.linalg.norm(case.f(NUMPY.xp, case.h0, case.z) - case.h0, axis=1)
    np.testing.assert_allclose(trace[0], start)


# Evaluations TorchDEQ 0.1.0 needs for the same batches, float64, at relative tolerance 1e-5.
TORCHDEQ = {
    "FixedPointIteration": [56, 59, 60, 58],
    "Anderson": [116, 127, 117, 114],
    "Broyden": [23, 23, 25, 25],
}


@pytest.mark.parametrize("seed", range(4))
def test_evaluations_on_the_symmetric_layer(seed: int) -> None:
    """Spectral radius 0.95, where an absolute ridge makes Anderson slower than plain iteration."""
    case = symmetric_layer(seed=seed)
    for solver in (ic.FixedPointIteration(), ic.Anderson(), ic.Broyden()):
        solution, _ = run(case, NUMPY, solver)
        assert np.all(solution.status == ic.CONVERGED)
        assert solution.stats.evaluations <= TORCHDEQ[named(solver)][seed]
        if not isinstance(solver, ic.FixedPointIteration):
            assert solution.stats.evaluations <= 30


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("solver", [ic.FixedPointIteration, ic.Anderson, ic.Broyden])
def test_half_precision_states_stay_so_and_their_residuals_are_true(solver: type, dtype: torch.dtype) -> None:
    case = layer(contraction=0.6)
    w, x = (torch.asarray(case.z[name]).to(dtype) for name in ("w", "x"))

    def f(h: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        assert h.dtype == dtype
        return torch.tanh(h @ w.T + z)

    solution = ic.solve(f, torch.zeros_like(x), x, solver=solver(rtol=2e-2), batch_ndim=1)
    assert solution.value.dtype == dtype
    assert solution.stats.residual.dtype == torch.float32
    assert torch.all(solution.status == ic.CONVERGED)
    residual = (f(solution.value, x).float() - solution.value.float()).norm(dim=1)
    torch.testing.assert_close(solution.stats.residual, residual)


def test_leaves_of_two_dtypes_keep_them(library: Library) -> None:
    xp = library.xp
    h0 = (library.array(np.zeros((2, 3))), library.array(np.zeros((2, 2), dtype=np.float32)))

    def f(h: Any, z: Any) -> Any:
        mean = xp.mean(h[0], axis=1, keepdims=True)
        return 0.5 * h[0] + 1.0, 0.25 * h[1] + xp.astype(mean, xp.float32) * xp.ones((1, 2), dtype=xp.float32)

    for solver in (ic.FixedPointIteration(), ic.Anderson(), ic.Broyden()):
        solution = ic.solve(f, h0, None, solver=solver, batch_ndim=1)
        assert [leaf.dtype for leaf in solution.value] == [xp.float64, xp.float32]
        np.testing.assert_allclose(library.numpy(solution.value[1]), 8 / 3, rtol=1e-4)


@pytest.mark.parametrize(
    ("residuals", "status"),
    [
        ([5.0, 4.0, 3.0, 2.0, 1.0, 1.5], ic.MAX_STEPS),
        ([1.0] + 9 * [2.0], ic.MAX_STEPS),
        ([1.0] + 10 * [2.0], ic.STAGNATED),
        ([3.0, 1.0] + 10 * [1.0 + 1e-9], ic.STAGNATED),
    ],
)
@pytest.mark.parametrize("solver", [ic.Anderson, ic.Broyden])
def test_stagnation_is_ten_steps_without_a_new_best(solver: type, residuals: list[float], status: ic.Status) -> None:
    script = iter(residuals)
    turns = iter(np.random.default_rng(0).normal(size=(len(residuals), 5)))

    def f(h: np.ndarray, z: Any) -> np.ndarray:
        direction = next(turns)
        return h + next(script) * direction / np.linalg.norm(direction)

    solution = ic.solve(f, np.zeros(5), None, solver=solver(rtol=0.0, atol=1e-3, max_steps=len(residuals)))
    assert solution.status == status
    assert not solution.converged
    assert solution.stats.residual == pytest.approx(min(residuals))


def test_an_error_has_the_samples_that_failed_and_their_largest_residual() -> None:
    residuals = np.asarray([[1.0], [3.0], [0.0], [2.0]])
    solution = ic.solve(lambda h, z: h + z, np.zeros((4, 1)), residuals, solver=ONE_STEP, batch_ndim=1)
    with pytest.raises(ic.SolveError, match=r"MAX_STEPS in 3 of 4 samples \(0, 1, 3\), largest residual 3\b") as error:
        solution.raise_for_status()
    (failure,) = error.value.failures
    assert (failure.status, failure.samples, failure.residual) == (ic.MAX_STEPS, ((0,), (1,), (3,)), 3.0)


def test_norms_whose_squares_overflow_are_measured() -> None:
    """‖F‖² overflows where the residual's square does not, and the other way round."""
    for step, status in ((1e150, ic.CONVERGED), (1e160, ic.MAX_STEPS)):
        solver = ic.FixedPointIteration(max_steps=3)
        solution = ic.solve(lambda h, z, step=step: h + step, np.asarray([1e160, 1e160]), None, solver=solver)
        assert solution.status == status
        np.testing.assert_allclose(solution.stats.residual, 2**0.5 * step, rtol=1e-5)


@pytest.mark.parametrize("solver", [ic.Anderson(max_steps=30), ic.Broyden(max_steps=30)], ids=named)
def test_without_convergence_the_best_point_is_returned(solver: ic.Solver) -> None:
    rng = np.random.default_rng(1)
    seen = []

    def f(h: np.ndarray, z: Any) -> np.ndarray:
        noise = rng.normal(size=4)
        seen.append((float(np.linalg.norm(noise)), h.copy()))
        return h + noise

    solution = ic.solve(f, np.zeros(4), None, solver=solver)
    least, best = min(seen, key=lambda pair: pair[0])
    assert solution.status != ic.CONVERGED
    assert solution.stats.residual == pytest.approx(least, rel=1e-9)
    np.testing.assert_array_equal(solution.value, best)
    assert not np.array_equal(seen[-1][1], best)


def test_the_point_that_met_the_tolerance_is_returned_even_where_an_earlier_one_was_nearer() -> None:
    """The residual rises from 1.2 to 1.8 tolerances of the start, but F rises more: the second point meets the test."""
    solution = ic.solve(
        lambda h, z: np.where(h < 1.5, h + 1.2e-3, h + 1.8e-3),
        np.asarray([1.0]),
        None,
        solver=Jump(rtol=1e-3, atol=0.0),
    )
    assert solution.converged
    assert solution.value == 2.0
    assert solution.stats.residual == pytest.approx(1.8e-3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Jump(ic.Solver):
    """A solver whose step is 2 whatever F is."""

    def init(self, system: Any, x: Any) -> None:
        return None

    def step(self, system: Any, memory: Any, point: Any) -> Any:
        return (np.full_like(point.x[0], 2.0),), None


def test_newton_leaves_a_trial_where_f_is_not_finite() -> None:
    """F(h) = h - log h from 3: the full step lands below zero; one halving is enough. The second sample never was."""
    problem = ic.Problem(lambda h, z: h - np.log(h), jvp=lambda h, z, dh, dz: dh - dh / h, batch_ndim=1)
    solution = ic.solve(problem, np.asarray([[3.0], [-1.0], [1.5]]), None, solver=ic.NewtonKrylov(rtol=1e-12))
    np.testing.assert_array_equal(solution.status, [ic.CONVERGED, ic.NONFINITE, ic.CONVERGED])
    np.testing.assert_allclose(solution.value[[0, 2]], 1.0, atol=1e-10)
    assert solution.stats.steps[1] == 1
    assert np.isnan(solution.stats.residual[1])
    nowhere = ic.Problem(lambda h, z: np.where(h == 0, 1.0, np.nan), jvp=lambda h, z, dh, dz: 0 * dh)
    given_up = ic.solve(nowhere, np.asarray([0.0]), None, solver=ic.NewtonKrylov())
    assert given_up.status == ic.NONFINITE
    assert given_up.stats.evaluations < 20


def test_regularization_shrinks_the_mix() -> None:
    case = layer(contraction=0.95, seed=2)
    evaluations = [
        ic.solve(case.problem(), case.h0, case.z, solver=ic.Anderson(regularization=r, rtol=1e-10)).stats.evaluations
        for r in (0.0, 1.0)
    ]
    assert evaluations[0] < evaluations[1]


def test_the_tolerance_is_relative_to_f() -> None:
    """At h = 0 with F = 3 the residual is ‖F‖, at h = 3 with F = 0 it is ‖h‖."""
    solver = ic.FixedPointIteration(rtol=1.0, atol=0.0, max_steps=1)
    assert ic.solve(lambda h, z: h + 3.0, np.asarray(0.0), None, solver=solver).status == ic.CONVERGED
    assert ic.solve(lambda h, z: h - 3.0, np.asarray(3.0), None, solver=solver).status == ic.MAX_STEPS
    absolute = ic.FixedPointIteration(rtol=0.0, atol=3.0, max_steps=1)
    assert ic.solve(lambda h, z: h - 3.0, np.asarray(3.0), None, solver=absolute).status == ic.CONVERGED


def test_newton_backtracks_where_full_steps_diverge() -> None:
    """F(h) = h - arctan(h): Newton on arctan overshoots for ever from |h| > 1.39."""
    problem = ic.Problem(lambda h, z: h - np.arctan(h), jvp=lambda h, z, dh, dz: dh - dh / (1 + h**2), batch_ndim=1)
    h0 = np.asarray([[3.0], [-20.0], [0.5]])
    solution = ic.solve(problem, h0, None, solver=ic.NewtonKrylov(rtol=0.0, atol=1e-10))
    assert np.all(solution.status == ic.CONVERGED)
    np.testing.assert_allclose(solution.value, 0.0, atol=1e-9)


@pytest.mark.parametrize("regularization", [1e-6, 1e-4, 1e-2, 1.0])
def test_anderson_weights_sum_to_one(regularization: float, library: Library) -> None:
    """With F(h) = h + 1, a step adds exactly the sum of the weights, which must be one."""
    solver = ic.Anderson(regularization=regularization, max_steps=12)
    seen = []

    def f(h: Any, z: Any) -> Any:
        seen.append(library.to_numpy(h))
        return h + 1.0

    ic.solve(f, library.array(np.asarray([5.0, 7.0])), None, solver=solver)
    differences = [point[1] - point[0] for point in seen]
    np.testing.assert_allclose(differences, 2.0, rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_equal_residuals_do_not_make_anderson_singular(dtype: Any, library: Library) -> None:
    """The ridge is at least of the size of rounding errors: without one all weights would be 0 / 0."""
    solver = ic.Anderson(regularization=0.0, max_steps=9)
    h0 = library.array(np.zeros(3, dtype=dtype))
    solution = ic.solve(lambda h, z: h + 1.0, h0, None, solver=solver, trace=True)
    assert library.numpy(solution.status) == ic.MAX_STEPS
    np.testing.assert_allclose(library.numpy(solution.stats.trace), np.sqrt(3), rtol=1e-6)


@pytest.mark.parametrize("memory", [1, 2, 3, 5, 30])
def test_broyden_is_its_product_of_rank_one_updates(memory: int) -> None:
    """The iterates of the recursion in the docstring, over the last ``memory`` steps, one sample at a time."""
    case, count = layer(batch=3, width=8, contraction=0.95, seed=2), 12
    seen: list[np.ndarray] = []

    def f(h: np.ndarray, z: Any) -> np.ndarray:
        seen.append(h.copy())
        return case.f(NUMPY.xp, h, z)

    ic.solve(f, case.h0, case.z, solver=ic.Broyden(memory=memory, rtol=0.0, atol=0.0, max_steps=count), batch_ndim=1)
    for sample in range(3):
        h, steps = case.h0, []
        for n in range(count):
            np.testing.assert_allclose(seen[n][sample], h[sample], atol=1e-9)
            z = (case.f(NUMPY.xp, h, case.z) - h)[sample]
            window = steps[-memory:]
            for s, after in itertools.pairwise(window):
                z = z + (s @ z) / (s @ s) * after
            if window:
                z = z / (1 - (window[-1] @ z) / (window[-1] @ window[-1]))
            steps.append(z)
            h = h.copy()
            h[sample] += z


@pytest.mark.parametrize("size", [2, 4, 6])
def test_broyden_on_skew_maps(size: int, library: Library) -> None:
    """F = h + S h + z with ⟨v, S v⟩ = 0, where Broyden's first update is singular: the root solves S h = -z."""
    draws = np.random.default_rng(size)
    m = draws.standard_normal((size, size))
    skew, z = m - m.T, draws.standard_normal((8, size))
    if size == 2:  # exactly, in any arithmetic
        skew, z = np.asarray([[0.0, 1.0], [-1.0, 0.0]]), np.arange(1.0, 17.0).reshape(8, 2)
    matrix, shift = library.array(skew.T), library.array(z)
    solver = ic.Broyden(rtol=1e-10)
    h0 = library.array(np.zeros((8, size)))
    solution = ic.solve(lambda h, z: h + h @ matrix + z, h0, shift, solver=solver, batch_ndim=1)
    assert np.all(library.numpy(solution.status) == ic.CONVERGED)
    np.testing.assert_allclose(library.numpy(solution.value), np.linalg.solve(skew, -z.T).T, rtol=1e-6, atol=1e-6)


def test_anderson_minimizes_the_combined_residual() -> None:
    """Against a constrained least-squares problem solved densely, over the last ``memory`` points."""
    case, count, memory = layer(batch=3, width=8, contraction=0.95, seed=2), 9, 3
    seen: list[np.ndarray] = []

    def f(h: np.ndarray, z: Any) -> np.ndarray:
        seen.append(h.copy())
        return case.f(NUMPY.xp, h, z)

    damping = 0.8
    solver = ic.Anderson(memory=memory, damping=damping, regularization=0.0, rtol=0.0, atol=0.0, max_steps=count)
    ic.solve(f, case.h0, case.z, solver=solver, batch_ndim=1)
    values = [case.f(NUMPY.xp, h, case.z) for h in seen]
    for n in range(count - 1):
        last = range(max(0, n - memory + 1), n + 1)
        for sample in range(3):
            residuals = np.stack([(values[i] - seen[i])[sample] for i in last])
            gram = residuals @ residuals.T
            border = np.ones((len(last), 1))
            bordered = np.block([[gram, border], [border.T, np.zeros((1, 1))]])
            weights = np.linalg.solve(bordered, np.eye(len(last) + 1)[-1])[:-1]
            mixed = np.stack([seen[i][sample] for i in last]) + damping * residuals
            np.testing.assert_allclose(seen[n + 1][sample], weights @ mixed, atol=1e-6)


def test_scipy_as_a_solver(library: Library) -> None:
    case = layer()

    def powell(problem: ic.Problem, h0: Any, z: Any) -> Any:
        def residual(x: np.ndarray) -> np.ndarray:
            h = library.array(x.reshape(case.h0.shape))
            return library.to_numpy(problem(h, z) - h).ravel()

        found = scipy.optimize.root(residual, library.to_numpy(h0).ravel(), tol=1e-13)
        return library.array(found.x.reshape(case.h0.shape))

    solution, value = run(case, library, powell)
    assert np.all(library.numpy(solution.status) == ic.CONVERGED)
    np.testing.assert_allclose(value, case.oracle(), atol=1e-9)
    assert case.counts["f"] == int(solution.stats.evaluations)
    assert np.all(library.numpy(solution.stats.steps) == case.counts["f"])


def test_a_callable_that_falls_short_is_reported() -> None:
    case = layer()
    solution, _ = run(case, NUMPY, lambda problem, h0, z: problem(h0, z))
    assert np.all(solution.status == ic.STAGNATED)
    assert solution.stats.evaluations == 3
    within, _ = run(case, NUMPY, ic.CallableSolver(lambda problem, h0, z: problem(h0, z), rtol=1.0))
    assert np.all(within.status == ic.CONVERGED)


def test_a_user_written_solver() -> None:
    """A solver needs two methods; here it is Aitken's extrapolation, element by element."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Aitken(ic.Solver):
        def init(self, system: Any, x: Any) -> Any:
            return x, system.space.zeros()

        def step(self, system: Any, memory: Any, point: Any) -> Any:
            (older,), (residual,) = memory
            slope = (point.residual[0] - residual) / np.where(point.x[0] == older, 1.0, point.x[0] - older)
            first = np.all(residual == 0)
            step = point.residual[0] if first else point.residual[0] / -slope
            return (point.x[0] + step,), (point.x, point.residual)

    case = CASES[3]
    solution, value = run(case, NUMPY, Aitken(rtol=1e-12))
    assert np.all(solution.status == ic.CONVERGED)
    np.testing.assert_allclose(value, case.root, atol=1e-10)
    assert solution.stats.evaluations < 10


@pytest.mark.parametrize("solver", SOLVERS, ids=named)
@pytest.mark.parametrize("batch_ndim", [0, 1, 2])
def test_batch_axes_only_group_the_samples(solver: ic.Solver, batch_ndim: int, library: Library) -> None:
    case = layer(batch=6)
    w = library.array(case.z["w"])
    x = library.array(case.z["x"].reshape(2, 3, 6))
    problem = ic.Problem(
        lambda h, z: library.xp.tanh(h @ w.T + z),
        jvp=lambda h, z, dh, dz: (1 - library.xp.tanh(h @ w.T + z) ** 2) * (dh @ w.T + dz),
        batch_ndim=batch_ndim,
    )
    solution = ic.solve(problem, library.xp.zeros_like(x), x, solver=solver)
    shape = (2, 3)[:batch_ndim]
    assert tuple(solution.status.shape) == tuple(solution.stats.steps.shape) == shape
    np.testing.assert_allclose(library.numpy(solution.value).reshape(6, 6), case.oracle(), atol=1e-9)


def test_nothing_passed_in_is_changed(library: Library) -> None:
    case = layer()
    h0, z = library.array(case.h0.copy()), library.array(unflat(flat(case.z), case.z))
    for solver in SOLVERS:
        ic.solve(case.problem(library), h0, z, solver=solver)
    np.testing.assert_array_equal(library.numpy(h0), case.h0)
    np.testing.assert_array_equal(flat(library.numpy(z)), flat(case.z))


@pytest.mark.parametrize("solver", SOLVERS, ids=named)
@pytest.mark.parametrize("warm", [False, True])
def test_the_result_shares_no_memory_with_the_arguments(solver: ic.Solver, warm: bool) -> None:
    case = affine(20)
    h0 = case.root.copy() if warm else case.h0.copy()
    solution = ic.solve(case.problem(), h0, case.z, solver=solver)
    assert not np.shares_memory(solution.value, h0)
    tensor = torch.asarray(h0.copy())
    again = ic.solve(case.problem(TORCH), tensor, TORCH.array(case.z), solver=solver)
    again.value.zero_()
    np.testing.assert_array_equal(tensor.numpy(), h0)


@pytest.mark.parametrize("solver", SOLVERS[:3], ids=named)
def test_a_map_may_write_into_one_buffer_at_every_call(solver: ic.Solver) -> None:
    case = layer()
    buffer = np.empty_like(case.h0)
    w, x = case.z["w"], case.z["x"]
    solution = ic.solve(lambda h, z: np.tanh(h @ w.T + z, out=buffer), case.h0, x, solver=solver, batch_ndim=1)
    assert np.all(solution.converged)
    np.testing.assert_allclose(solution.value, case.oracle(), atol=1e-9)


@pytest.mark.parametrize("calls", [0, 1, 2, 7])
@pytest.mark.parametrize("solver", SOLVERS[:3], ids=named)
def test_a_map_may_begin_to_write_into_one_buffer(solver: ic.Solver, calls: int) -> None:
    """As a captured map does after some warm-up calls; every evaluation is counted."""
    case = layer()
    w, x, h0 = (torch.from_numpy(a) for a in (case.z["w"], case.z["x"], case.h0))
    buffer, evaluations = torch.empty_like(h0), 0

    def f(h: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        nonlocal evaluations
        evaluations += 1
        value = torch.tanh(h @ w.T + z)
        return buffer.copy_(value) if evaluations > calls else value

    solution = ic.solve(f, h0, x, solver=solver, batch_ndim=1)
    assert torch.all(solution.converged)
    np.testing.assert_allclose(solution.value.numpy(), case.oracle(), atol=1e-9)
    assert solution.stats.evaluations == evaluations


@pytest.mark.parametrize("solver", [ic.FixedPointIteration, ic.Anderson, ic.Broyden])
def test_f_never_gets_memory_that_it_has_returned(solver: type) -> None:
    case = layer()
    w, x, h0 = (torch.from_numpy(a) for a in (case.z["w"], case.z["x"], case.h0))
    results: list[torch.Tensor] = []

    def f(h: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        assert h.data_ptr() not in [result.data_ptr() for result in results]
        results.append(torch.tanh(h @ w.T + z))
        return results[-1]

    solution = ic.solve(f, h0, x, solver=solver(rtol=0.0, atol=0.0, max_steps=6), batch_ndim=1)
    assert len(results) == 6
    assert solution.value.data_ptr() not in [result.data_ptr() for result in results]


def in_turns(f: Any) -> Any:
    """``f`` with results that are written to two buffers alternately."""
    buffers: list[torch.Tensor] = []

    def call(h: torch.Tensor, z: Any) -> torch.Tensor:
        value = f(h)
        if len(buffers) < 2:
            buffers.append(value.clone())
            return buffers[-1]
        buffers.reverse()
        return buffers[1].copy_(value)

    return call


def test_a_returned_value_is_not_overwritten_by_the_next_evaluation() -> None:
    f = in_turns(lambda h: torch.tanh(0.5 * h + 1.0))
    value = ic.solve(f, torch.zeros(3), None, solver=ic.FixedPointIteration()).value
    before = value.clone()
    for _ in range(2):
        f(torch.full((3,), 9.0), None)
    assert torch.equal(value, before)


class Keeping(ic.FixedPointIteration):
    """Plain iteration that returns its best point."""

    keeps_best = True


def test_a_best_point_is_not_written_to() -> None:
    factors = itertools.chain([0.1], itertools.repeat(2.0))
    solution = ic.solve(in_turns(lambda h: next(factors) * h), torch.ones(3), None, solver=Keeping(max_steps=6))
    np.testing.assert_allclose(solution.value.numpy(), 0.1 * np.ones(3), rtol=1e-6)
