"""No sample affects another: results are bit-identical whatever the other samples do."""

from typing import Any

import numpy as np
import pytest
from libraries import Library
from problems import layer, tanh_layer

import implicit_core as ic

BATCH, WIDTH = 8, 16
NAN, DIVERGING, CONVERGED, ORDINARY = 1, 4, 6, [0, 2, 3, 5, 7]
OPTIONS = {"rtol": 1e-10, "max_steps": 400}
SOLVERS = [
    ic.FixedPointIteration(**OPTIONS),
    ic.FixedPointIteration(damping=0.7, **OPTIONS),
    ic.Anderson(**OPTIONS),
    ic.Broyden(**OPTIONS),
    ic.Broyden(memory=4, **OPTIONS),
    ic.NewtonKrylov(**OPTIONS),
    ic.Anderson(check_every=3, **OPTIONS),
]
LINEAR = [ic.GMRES(restart=5), ic.BiCGSTAB(), ic.CG(), ic.Richardson(relaxation=0.5)]


def mixed(library: Library, odd: bool) -> tuple[ic.Problem, Any, Any]:
    """The tanh layer plus gain · h³; with ``odd``, one sample is NaN, one diverges, and one starts at its root."""
    base = layer(BATCH, WIDTH, contraction=0.9, seed=3)
    w, x = base.z["w"], base.z["x"].copy()
    gain, h0 = np.zeros((BATCH, 1)), base.h0.copy()
    if odd:
        x[NAN] = np.nan
        x[DIVERGING], h0[DIVERGING], gain[DIVERGING] = 0.0, 10.0, 1.0
        alone = tanh_layer("alone", w, x[CONVERGED : CONVERGED + 1], 0.9)
        h0[CONVERGED] = alone.oracle()[0]
    xp = library.xp
    weights, slope = library.array(w), library.array(gain)

    def f(h: Any, z: Any) -> Any:
        return xp.tanh(h @ weights.T + z) + slope * h**3

    def jvp(h: Any, z: Any, dh: Any, dz: Any) -> Any:
        return (1 - xp.tanh(h @ weights.T + z) ** 2) * (dh @ weights.T + dz) + 3 * slope * h**2 * dh

    problem = ic.Problem(library.sealed(f), jvp=library.sealed(jvp), batch_ndim=1)
    return problem, library.array(h0), library.array(x)


@pytest.mark.parametrize("solver", SOLVERS, ids=[f"{type(s).__name__}{i}" for i, s in enumerate(SOLVERS)])
def test_odd_samples_are_reported_and_the_others_bit_identical(solver: ic.Solver, library: Library) -> None:
    results = []
    for odd in (False, True):
        problem, h0, z = mixed(library, odd)
        solution = ic.solve(problem, h0, z, solver=solver, trace=True)
        stats = solution.stats
        told = (solution.value, solution.status, stats.steps, stats.residual, stats.trace)
        results.append([library.numpy(a) for a in told])
    (plain, status, steps, residual, trace), (odd_plain, odd_status, odd_steps, odd_residual, odd_trace) = results

    assert np.all(status == ic.CONVERGED)
    assert odd_status[NAN] == ic.NONFINITE
    if odd_status[DIVERGING] == ic.CONVERGED:  # Newton's method may find a fixed point there
        assert isinstance(solver, ic.NewtonKrylov)
        image = library.numpy(problem.f(solution.value, z))
        np.testing.assert_allclose(image[DIVERGING], odd_plain[DIVERGING], atol=1e-8)
    else:
        assert odd_status[DIVERGING] in (ic.NONFINITE, ic.DIVERGED, ic.STAGNATED, ic.MAX_STEPS)
    if isinstance(solver, ic.FixedPointIteration):
        assert odd_status[DIVERGING] in (ic.NONFINITE, ic.DIVERGED)
        assert np.all(np.isfinite(odd_plain[DIVERGING])), "the last finite point is kept"
    assert odd_status[CONVERGED] == ic.CONVERGED
    assert odd_steps[CONVERGED] == 1
    assert np.all(odd_status[ORDINARY] == ic.CONVERGED)

    for ordinary, with_odd in ((plain, odd_plain), (steps, odd_steps), (residual, odd_residual)):
        np.testing.assert_array_equal(ordinary[ORDINARY], with_odd[ORDINARY])
    np.testing.assert_array_equal(trace[:, ORDINARY], odd_trace[:, ORDINARY])


@pytest.mark.parametrize("solver", LINEAR, ids=lambda solver: type(solver).__name__)
def test_linear_solves_are_isolated_too(solver: ic.LinearSolver, library: Library) -> None:
    rng = np.random.default_rng(0)
    symmetric = rng.normal(size=(BATCH, WIDTH, WIDTH))
    symmetric = symmetric @ np.swapaxes(symmetric, 1, 2)
    matrices = np.eye(WIDTH) + 0.9 * symmetric / np.linalg.norm(symmetric, 2, axis=(1, 2))[:, None, None]
    odd = matrices.copy()
    odd[NAN], odd[DIVERGING] = np.nan, 0.0
    rhs = rng.normal(size=(BATCH, WIDTH))
    results = []
    for a in (matrices, odd):
        operator = library.array(a)
        solution = ic.solve_linear(
            lambda v, operator=operator: (operator @ v[:, :, None])[:, :, 0],
            library.array(rhs),
            solver=solver,
            batch_ndim=1,
        )
        results.append([library.numpy(x) for x in (solution.value, solution.status, solution.stats.residual)])
    (value, status, residual), (odd_value, odd_status, odd_residual) = results
    assert np.all(status == ic.CONVERGED)
    np.testing.assert_allclose(np.einsum("nij,nj->ni", matrices, value), rhs, atol=1e-5)
    assert np.all(odd_status[[NAN, DIVERGING]] != ic.CONVERGED)
    keep = [i for i in range(BATCH) if i not in (NAN, DIVERGING)]
    np.testing.assert_array_equal(odd_status[keep], ic.CONVERGED)
    np.testing.assert_array_equal(value[keep], odd_value[keep])
    np.testing.assert_array_equal(residual[keep], odd_residual[keep])


def alone_and_together(solve: Any, samples: int) -> None:
    """``solve(rows)`` gives bit-identical results for all samples at once and for each sample alone."""
    together = solve(slice(None))
    evaluations = set()
    for i in range(samples):
        alone = solve(slice(i, i + 1))
        evaluations.add(int(alone.stats.evaluations))
        np.testing.assert_array_equal(alone.value, together.value[i : i + 1])
        np.testing.assert_array_equal(alone.stats.residual, together.stats.residual[i : i + 1])
        np.testing.assert_array_equal(alone.status, together.status[i : i + 1])
    assert len(evaluations) > 2, "samples take different numbers of steps"


@pytest.mark.parametrize("solver", SOLVERS, ids=[f"{type(s).__name__}{i}" for i, s in enumerate(SOLVERS)])
def test_a_sample_does_not_depend_on_the_steps_of_others(solver: ic.Solver) -> None:
    rng = np.random.default_rng(0)
    slope, x = np.linspace(0.05, 0.9, 6)[:, None], rng.normal(size=(6, 10))

    def solve(rows: slice) -> ic.Solution:
        a = slope[rows]
        problem = ic.Problem(
            lambda h, z: np.tanh(a * np.roll(h, 1, axis=1) + z),
            jvp=lambda h, z, dh, dz: (
                (1 - np.tanh(a * np.roll(h, 1, axis=1) + z) ** 2) * (a * np.roll(dh, 1, axis=1) + dz)
            ),
            batch_ndim=1,
        )
        return ic.solve(problem, np.zeros_like(x[rows]), x[rows], solver=solver)

    alone_and_together(solve, 6)


@pytest.mark.parametrize("solver", LINEAR, ids=lambda solver: type(solver).__name__)
def test_a_linear_system_does_not_depend_on_the_steps_of_others(solver: ic.LinearSolver) -> None:
    rng = np.random.default_rng(0)
    slope, b = np.linspace(0.01, 0.49, 6)[:, None], rng.normal(size=(6, 50))

    def solve(rows: slice) -> ic.Solution:
        a = slope[rows]  # symmetric, for CG
        return ic.solve_linear(
            lambda v: v - a * (np.roll(v, 1, axis=1) + np.roll(v, -1, axis=1)), b[rows], solver=solver, batch_ndim=1
        )

    alone_and_together(solve, 6)
