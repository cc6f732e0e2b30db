"""The matrix-free linear solvers against dense linear algebra, and how they report failures."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from libraries import NUMPY, Library
from problems import layer

import implicit_core as ic
from implicit_core.adapters import torch as ict
from implicit_core.backend import Backend
from implicit_core.backends.jax import coupled_axes
from implicit_core.backends.torch import recording_loops
from implicit_core.linear_solvers import arnoldi
from implicit_core.registry import find_backend
from implicit_core.space import Space

TIGHT = {"rtol": 1e-11, "max_steps": 400}
GENERAL = [ic.GMRES(**TIGHT), ic.GMRES(restart=7, **TIGHT), ic.BiCGSTAB(**TIGHT), ic.Richardson(**TIGHT)]


def named(solver: ic.LinearSolver) -> str:
    return f"{type(solver).__name__}{getattr(solver, 'restart', '')}"


def near_identity(batch: int, n: int, radius: float, seed: int, *, symmetric: bool = False) -> np.ndarray:
    """I - J with ‖J‖₂ = radius."""
    j = np.random.default_rng(seed).normal(size=(batch, n, n))
    j = (j + np.swapaxes(j, 1, 2)) / 2 if symmetric else j
    return np.eye(n) - radius * j / np.linalg.norm(j, 2, axis=(1, 2))[:, None, None]


def apply(library: Library, matrices: np.ndarray) -> Any:
    a = library.array(matrices)
    return library.sealed(lambda v: (a @ v[..., None])[..., 0])


@pytest.mark.parametrize("solver", GENERAL, ids=named)
def test_against_dense_solves(solver: ic.LinearSolver, library: Library) -> None:
    a = near_identity(5, 12, 0.9, seed=0)
    b = np.random.default_rng(1).normal(size=(5, 12)) * np.asarray([1e-6, 1.0, 1e6, 3.0, 0.0])[:, None]
    solution = ic.solve_linear(apply(library, a), library.array(b), solver=solver, batch_ndim=1)
    exact = np.linalg.solve(a, b[..., None])[..., 0]
    value = library.numpy(solution.value)
    assert np.all(library.numpy(solution.status) == ic.CONVERGED)
    np.testing.assert_allclose(value, exact, atol=0, rtol=1e-8)
    residual = np.linalg.norm(b - np.einsum("nij,nj->ni", a, value), axis=1)
    assert np.all(residual <= 1.0000001e-11 * np.linalg.norm(b, axis=1))
    steps = library.numpy(solution.stats.steps)
    assert steps[4] == 0
    assert np.all(steps[:4] > 0)
    assert np.max(steps) <= int(solution.stats.evaluations)


def test_cg_on_symmetric_positive_definite_systems(library: Library) -> None:
    a = near_identity(4, 20, 0.95, seed=2, symmetric=True)
    b = np.random.default_rng(1).normal(size=(4, 20))
    solution = ic.solve_linear(apply(library, a), library.array(b), solver=ic.CG(**TIGHT), batch_ndim=1)
    assert np.all(library.numpy(solution.status) == ic.CONVERGED)
    np.testing.assert_allclose(library.numpy(solution.value), np.linalg.solve(a, b[..., None])[..., 0], rtol=1e-8)


def indefinite(batch: int, n: int) -> np.ndarray:
    """Symmetric, with eigenvalues of both signs, and ten different ones."""
    rng = np.random.default_rng(7)
    q = np.linalg.qr(rng.normal(size=(batch, n, n)))[0]
    values = np.linspace(-2, 3, 10)[np.arange(n) % 10]
    return (q * values) @ np.swapaxes(q, 1, 2)


def test_minres_on_symmetric_indefinite_systems(library: Library) -> None:
    a, b = indefinite(4, 40), np.random.default_rng(1).normal(size=(4, 40))
    solution = ic.solve_linear(apply(library, a), library.array(b), solver=ic.MINRES(rtol=1e-9), batch_ndim=1)
    assert np.all(library.numpy(solution.status) == ic.CONVERGED)
    np.testing.assert_allclose(library.numpy(solution.value), np.linalg.solve(a, b[..., None])[..., 0], rtol=1e-6)
    assert int(solution.stats.evaluations) == 11  # as many as there are eigenvalues, and one that verifies


@pytest.mark.parametrize("steps", [1, 3, 6, 9])
def test_minres_finds_the_least_residual_of_the_krylov_space(steps: int) -> None:
    a, b = indefinite(1, 40)[0], np.random.default_rng(1).normal(size=40)
    krylov = np.stack([np.linalg.matrix_power(a, i) @ b for i in range(steps)], axis=1)
    weights = np.linalg.lstsq(a @ krylov, b, rcond=None)[0]
    least = np.linalg.norm(b - a @ krylov @ weights)
    found = ic.solve_linear(a, b, solver=ic.MINRES(max_steps=steps, rtol=1e-14))
    assert found.stats.residual == pytest.approx(least, rel=1e-8)


def test_minres_does_not_pretend_on_other_systems() -> None:
    for a in (near_identity(1, 12, 0.9, seed=0)[0] + 3 * np.triu(np.ones((12, 12)), 1), np.diag([1.0, 0.0, 2.0])):
        found = ic.solve_linear(a, np.ones(a.shape[0]), solver=ic.MINRES(max_steps=100))
        assert not found.converged
        np.testing.assert_allclose(found.stats.residual, np.linalg.norm(np.ones(a.shape[0]) - a @ found.value))


def test_the_residual_is_measured_and_not_updated() -> None:
    """Where products are rounded, those of the corrections do not add up to the product of the solution."""
    a, b = near_identity(1, 12, 0.9, seed=0)[0], np.random.default_rng(1).normal(size=12)
    b /= np.max(np.abs(b))

    def rounded(v: np.ndarray) -> np.ndarray:
        return (a @ v).astype(np.float16).astype(np.float64)

    solution = ic.solve_linear(rounded, b, solver=ic.GMRES(restart=4, rtol=1e-8))
    assert solution.status == ic.STAGNATED
    assert solution.stats.residual == pytest.approx(np.linalg.norm(b - rounded(solution.value)), rel=1e-12)


def started(solver: ic.LinearSolver, library: Library, a: np.ndarray, b: np.ndarray, start: np.ndarray | None) -> Any:
    space = find_backend(library.array(b)).space(library.array(b), 1)
    x0 = None if start is None else (library.array(start),)
    return solver.run(space, lambda v: (apply(library, a)(v[0]),), (library.array(b),), x0=x0)


@pytest.mark.parametrize("solver", [*GENERAL, ic.CG(**TIGHT)], ids=named)
def test_a_start_does_not_change_the_tolerance(solver: ic.LinearSolver, library: Library) -> None:
    """The samples start at the solution, near to it, at zero, at a start that is no number, and at a bad one."""
    a = near_identity(5, 60, 0.8, seed=0, symmetric=True)
    b = np.random.default_rng(1).normal(size=(5, 60)) * np.asarray([1e-30, 1.0, 0.0, 1e30, 1.0])[:, None]
    exact = np.linalg.solve(a, b[..., None])[..., 0]
    start = exact * np.asarray([1.0, 1.0 + 1e-7, 1.0, np.nan, 1e3])[:, None]
    found = started(solver, library, a, b, start)
    assert np.all(library.numpy(found.status) == ic.CONVERGED)
    np.testing.assert_allclose(library.numpy(found.x[0]), exact, rtol=1e-8)
    size = np.linalg.norm(b, axis=1)
    assert np.all(library.numpy(found.residual)[:, 0] <= 1.0000001e-11 * size)
    np.testing.assert_array_equal(library.numpy(found.steps)[[0, 2], 0], 1)


@pytest.mark.parametrize("solver", [*GENERAL, ic.CG(**TIGHT)], ids=named)
def test_a_good_start_saves_products(solver: ic.LinearSolver) -> None:
    a, b = near_identity(1, 60, 0.8, seed=0, symmetric=True), np.ones((1, 60))
    exact = np.linalg.solve(a, b[..., None])[..., 0]
    cold, near, bad = (started(solver, NUMPY, a, b, x0).products for x0 in (None, exact * (1 + 1e-7), exact * 1e3))
    assert near < 0.6 * cold
    assert bad == cold + 1
    assert started(dataclasses.replace(solver, max_steps=1), NUMPY, a, b, 0.5 * b).status == ic.MAX_STEPS


def test_a_tolerance_for_each_sample(library: Library) -> None:
    a, b = near_identity(3, 40, 0.9, seed=0), np.random.default_rng(1).normal(size=(3, 40))
    rtol = np.asarray([[1e-1], [1e-4], [1e-9]])
    space = find_backend(library.array(b)).space(library.array(b), 1)
    found = ic.GMRES(rtol=0.5).run(
        space, lambda v: (apply(library, a)(v[0]),), (library.array(b),), rtol=library.array(rtol)
    )
    relative = library.numpy(found.residual) / np.linalg.norm(b, axis=1, keepdims=True)
    assert np.all(library.numpy(found.status) == ic.CONVERGED)
    assert np.all((1e-3 * rtol < relative) & (relative <= rtol))


def test_every_product_is_counted() -> None:
    a, b = near_identity(3, 10, 0.8, seed=3), np.ones((3, 10))
    for solver in [*GENERAL, ic.CG(max_steps=5), ic.MINRES(max_steps=5)]:
        calls = 0

        def operator(v: np.ndarray) -> np.ndarray:
            nonlocal calls
            calls += 1
            return np.einsum("nij,nj->ni", a, v)

        solution = ic.solve_linear(operator, b, solver=solver, batch_ndim=1)
        assert calls == solution.stats.evaluations


def test_gmres_is_exact_after_n_steps_where_short_recurrences_are_not() -> None:
    """A cyclic shift: GMRES makes no progress before step n, and then converges."""
    n = 12
    shift = np.roll(np.eye(n), 1, axis=0)
    b = np.eye(n)[0]
    full = ic.solve_linear(lambda v: shift @ v, b, solver=ic.GMRES(restart=n, rtol=1e-12))
    assert full.status == ic.CONVERGED
    np.testing.assert_allclose(shift @ full.value, b, atol=1e-12)
    short = ic.solve_linear(lambda v: shift @ v, b, solver=ic.GMRES(restart=n - 1, rtol=1e-12))
    assert short.status == ic.STAGNATED


@pytest.mark.parametrize(("steps", "factor"), [(1, 1 + 1e-9), (10, 1 + 1e-9), (20, 1 + 1e-9), (40, 5.0)])
def test_a_gmres_cycle_reaches_the_least_residual_of_its_krylov_space(steps: int, factor: float) -> None:
    """cond(A) = 1e6, against a dense least-squares problem; the last step is at rounding error, where only a basis that
    was orthogonalized twice gets."""
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.normal(size=(40, 40)))
    a = (q * np.logspace(0, -6, 40)) @ q.T
    b = rng.normal(size=40)
    basis = [b / np.linalg.norm(b)]
    for _ in range(steps - 1):
        w = a @ basis[-1]
        for v in 3 * basis:
            w = w - (v @ w) * v
        basis.append(w / np.linalg.norm(w))
    krylov = np.stack(basis, axis=1)
    weights = np.linalg.lstsq(a @ krylov, b, rcond=None)[0]
    least = np.linalg.norm(b - a @ krylov @ weights)
    solver = ic.GMRES(restart=steps, max_steps=steps, rtol=1e-16)
    assert ic.solve_linear(lambda v: a @ v, b, solver=solver).stats.residual <= factor * least


def test_gmres_stops_within_a_cycle() -> None:
    """Three distinct eigenvalues make a Krylov space of three: three products, and one to verify the result."""
    a = np.diag(np.asarray([1.0, 0.5, 2.0])[np.arange(30) % 3])
    solution = ic.solve_linear(lambda v: a @ v, np.ones(30), solver=ic.GMRES(rtol=1e-10))
    assert solution.converged
    assert solution.stats.evaluations == 4


@pytest.mark.parametrize("solver", [*GENERAL, ic.CG(**TIGHT), ic.MINRES(**TIGHT)], ids=named)
def test_failure_is_reported(solver: ic.LinearSolver, library: Library) -> None:
    singular = np.diag([1.0, 0.5, 0.0])[None]
    solution = ic.solve_linear(apply(library, singular), library.array(np.ones((1, 3))), solver=solver, batch_ndim=1)
    assert library.numpy(solution.status)[0] in (ic.MAX_STEPS, ic.STAGNATED)
    assert library.numpy(solution.stats.residual)[0] >= 1.0 - 1e-12
    with pytest.raises(ic.SolveError, match=r"in 1 of 1 samples \(0\)"):
        ic.solve_linear(
            apply(library, singular), library.array(np.ones((1, 3))), solver=solver, batch_ndim=1, throw=True
        )


def test_bicgstab_gets_through_a_vanishing_coefficient() -> None:
    """Found by search: the residual of the first step is orthogonal to the first one, exactly."""
    a, b = np.asarray([[-1.0, 2.0, -1.0], [-1.0, -2.0, -2.0], [1.0, -1.0, 2.0]]), np.asarray([0.0, 2.0, 0.0])
    v = a @ b
    s = b - (b @ b) / (b @ v) * v
    t = a @ s
    assert b @ (s - (t @ s) / (t @ t) * t) == 0.0
    solution = ic.solve_linear(lambda v: a @ v, b, solver=ic.BiCGSTAB(rtol=1e-10, max_steps=20))
    assert solution.converged
    np.testing.assert_allclose(solution.value, np.linalg.solve(a, b), rtol=1e-8)


def test_cg_does_not_pretend_on_an_indefinite_system() -> None:
    """Here the first direction has no curvature and CG fails; on diag(1, -2) it converges to the solution."""
    a = np.diag([1.0, -1.0, 2.0])
    broken = ic.solve_linear(lambda v: a @ v, np.asarray([1.0, 1.0, 0.0]), solver=ic.CG())
    assert broken.status == ic.STAGNATED
    assert broken.stats.evaluations < 5
    lucky = ic.solve_linear(lambda v: np.asarray([1.0, -2.0]) * v, np.asarray([1.0, 1.0]), solver=ic.CG())
    assert lucky.converged
    np.testing.assert_allclose(lucky.value, [1.0, -0.5])


@pytest.mark.parametrize("solver", [ic.GMRES(max_steps=3), ic.BiCGSTAB(max_steps=3), ic.Richardson(max_steps=3)])
def test_running_out_of_steps(solver: ic.LinearSolver) -> None:
    a = near_identity(1, 40, 0.99, seed=5)[0]
    solution = ic.solve_linear(lambda v: a @ v, np.ones(40), solver=dataclasses.replace(solver, rtol=1e-12))
    assert solution.status == ic.MAX_STEPS
    np.testing.assert_allclose(solution.stats.residual, np.linalg.norm(np.ones(40) - a @ solution.value))


@pytest.mark.parametrize("solver", [ic.GMRES(), ic.BiCGSTAB(), ic.CG(), ic.MINRES()], ids=named)
def test_single_precision_counts_as_converged_at_its_own_rounding_error(solver: ic.LinearSolver) -> None:
    """cond(A) = 199: not even the exact solution, rounded to float32, always has a relative residual of 1e-6."""
    for seed in range(10):
        rng = np.random.default_rng(seed)
        q, _ = np.linalg.qr(rng.normal(size=(64, 64)))
        a = np.eye(64) - (q * np.linspace(-0.99, 0.99, 64)) @ q.T
        b = rng.normal(size=(64, 64)).astype(np.float32)
        single = a.astype(np.float32)
        solution = ic.solve_linear(lambda v, single=single: v @ single, b, solver=solver, batch_ndim=1, throw=True)
        exact = np.linalg.solve(a, b.T.astype(np.float64)).T
        error = np.linalg.norm(solution.value - exact, axis=1) / np.linalg.norm(exact, axis=1)
        assert np.max(error) < 199 * 16 * np.finfo(np.float32).eps


def test_the_absolute_tolerance_counts() -> None:
    a, b = near_identity(1, 30, 0.9, seed=1)[0], np.ones(30)
    loose = ic.solve_linear(lambda v: a @ v, b, solver=ic.GMRES(rtol=0.0, atol=1.0))
    tight = ic.solve_linear(lambda v: a @ v, b, solver=ic.GMRES(rtol=0.0, atol=1e-9))
    assert loose.converged
    assert tight.converged
    assert 1e-9 < loose.stats.residual <= 1.0
    assert tight.stats.residual <= 1e-9


def test_relaxation_is_the_damping_of_the_series() -> None:
    """Richardson stopped after k products is the Neumann series of k terms, Eq. (15) with λ = ω."""
    a, b = near_identity(1, 8, 0.9, seed=1)[0], np.ones(8)
    for relaxation in (0.3, 1.0):
        solver = ic.Richardson(relaxation=relaxation, rtol=0.0, max_steps=4)
        terms = [np.linalg.matrix_power(np.eye(8) - relaxation * a, i) @ b for i in range(4)]
        solution = ic.solve_linear(lambda v: a @ v, b, solver=solver)
        np.testing.assert_allclose(solution.value, relaxation * sum(terms), rtol=1e-12)


def test_a_huge_x_does_not_hide_a_residual() -> None:
    """A large x has large rounding errors; the residual must still be at most a thousandth of b."""

    class Bad(ic.LinearSolver):
        def cycle(self, space: Any, operator: Any, r: Any, norm: Any, target: Any, active: Any) -> Any:
            return (np.asarray([[0.99, 0.99e7]], dtype=np.float32),), 0

    diagonal = np.asarray([1.0, 1e-7], dtype=np.float32)
    solution = ic.solve_linear(lambda v: diagonal * v, np.ones(2, dtype=np.float32), solver=Bad(max_steps=1))
    assert 16 * np.finfo(np.float32).eps * np.linalg.norm(solution.value) > solution.stats.residual
    assert not solution.converged


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_adjoints_converge_by_default(dtype: torch.dtype) -> None:
    case = layer(contraction=0.7)
    w, x = (torch.asarray(case.z[name]).to(dtype) for name in ("w", "x"))
    h = torch.asarray(case.oracle()).to(dtype)
    problem = ict.problem(lambda h, z: torch.tanh(h @ w.T + z), batch_ndim=1)
    exact = ic.Implicit(ic.GMRES(rtol=1e-12)).vjp(case.problem(), case.oracle(), case.z)[1](np.ones_like(case.h0))
    for solver in (ic.GMRES(), ic.BiCGSTAB()):
        ours = ic.Implicit(solver).vjp(problem, h, x)[1](torch.ones_like(x))
        np.testing.assert_allclose(ours.float().numpy(), exact["x"], rtol=0, atol=40 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("solver", [ic.GMRES(), ic.BiCGSTAB(), ic.Richardson()], ids=named)
@pytest.mark.parametrize("size", [1e-35, 1e-25, 1e30])
def test_squares_that_leave_the_range_of_the_dtype(solver: ic.LinearSolver, size: float, library: Library) -> None:
    a = near_identity(2, 10, 0.5, seed=4)
    b = np.stack([np.ones(10), size * np.ones(10)]).astype(np.float32)
    solution = ic.solve_linear(apply(library, a.astype(np.float32)), library.array(b), solver=solver, batch_ndim=1)
    exact = np.linalg.solve(a, b.astype(np.float64)[..., None])[..., 0]
    assert np.all(library.numpy(solution.converged))
    np.testing.assert_allclose(library.numpy(solution.value), exact, rtol=2e-5)


def test_pytrees_are_one_system_per_sample() -> None:
    """Two leaves that form a regular system only together."""

    def swap(v: Any) -> Any:
        return {"x": v["y"] + 0.1 * v["x"], "y": v["x"]}

    b = {"x": np.asarray([[1.0, 2.0]]), "y": np.asarray([[3.0, -1.0]])}
    for solver in (ic.GMRES(rtol=1e-12), ic.BiCGSTAB(rtol=1e-12)):
        solution = ic.solve_linear(swap, b, solver=solver, batch_ndim=1)
        np.testing.assert_allclose(solution.value["x"], b["y"], atol=1e-10)
        np.testing.assert_allclose(solution.value["y"], b["x"] - 0.1 * b["y"], atol=1e-10)


@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 15),
    batch=st.integers(1, 4),
    radius=st.floats(0.0, 0.95),
    which=st.integers(0, 2),
)
def test_any_well_conditioned_system_is_solved(seed: int, n: int, batch: int, radius: float, which: int) -> None:
    solver = [ic.GMRES(**TIGHT), ic.BiCGSTAB(**TIGHT), ic.Richardson(rtol=1e-11, max_steps=2000)][which]
    a = near_identity(batch, n, radius, seed)
    b = np.random.default_rng(seed + 1).normal(size=(batch, n))
    solution = ic.solve_linear(apply(NUMPY, a), b, solver=solver, batch_ndim=1, throw=True)
    error = np.linalg.norm(solution.value - np.linalg.solve(a, b[..., None])[..., 0], axis=1)
    assert np.all(error <= 1e-11 * np.linalg.norm(b, axis=1) / (1 - radius) * 1.01 + 1e-15)


@pytest.mark.parametrize("method", [ic.GMRES, ic.BiCGSTAB, ic.CG, ic.Richardson])
def test_fewer_reads_find_the_same_solution(method: Any, library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples that are finished are frozen in the steps between two reads."""
    a = near_identity(4, 12, 0.8, seed=5, symmetric=True)
    b = np.random.default_rng(1).normal(size=(4, 12)) * np.asarray([1.0, 1e-3, 0.0, 1e3])[:, None]
    backend = find_backend(library.array(b))
    reads, count = 0, type(backend).count

    def counted(self: Backend, masks: Any) -> Any:
        nonlocal reads
        reads += 1
        return count(self, masks)

    monkeypatch.setattr(type(backend), "count", counted)
    found = []
    for check_every in (1, 4):
        reads = 0
        solver = method(rtol=1e-10, check_every=check_every)
        solution = ic.solve_linear(apply(library, a), library.array(b), solver=solver, batch_ndim=1)
        assert np.all(library.numpy(solution.status) == ic.CONVERGED)
        np.testing.assert_allclose(
            library.numpy(solution.value), np.linalg.solve(a, b[..., None])[..., 0], atol=0, rtol=1e-7
        )
        found.append(reads)
    assert found[1] < 0.6 * found[0]


@pytest.mark.parametrize("gradient", [ic.Implicit(), ic.NeumannSeries()], ids=repr)
def test_linear_solvers_refuse_while_a_graph_is_captured(gradient: ic.Estimator) -> None:
    """A fixed number of products can be captured, a test that depends on data cannot."""
    problem, h = ict.problem(lambda h, z: 0.5 * h + z), torch.ones(2)
    with recording_loops(lambda cond, body, carry, max_steps, check_every: carry):
        with pytest.raises(NotImplementedError, match=r"Linear solvers cannot run while .* Use Neumann, Unroll or"):
            gradient.vjp(problem, h, h)[1](h)
        torch.testing.assert_close(ic.Neumann(2, 1.0).vjp(problem, h, h)[1](h), 1.5 * h)


def heat(n: int, ratio: float) -> np.ndarray:
    """I - Δt ∂²/∂x², an implicit step of the heat equation: symmetric, of norm 1 + 4 Δt/Δx²."""
    return np.eye(n) + ratio * (2 * np.eye(n) - np.eye(n, k=1) - np.eye(n, k=-1))


def backward_error(a: np.ndarray, x: np.ndarray, b: np.ndarray) -> float:
    """Of one system, in float64."""
    a, x, b = (np.asarray(v, dtype=np.float64) for v in (a, x, b))
    residual = np.linalg.norm(b - a @ x)
    return float(residual / (np.linalg.norm(a, 2) * np.linalg.norm(x) + np.linalg.norm(b)))


@pytest.mark.parametrize("norm", [1.0, 1e-4, 1e4])
@pytest.mark.parametrize(
    "solver",
    [ic.GMRES(restart=100, max_steps=1000), ic.CG(max_steps=1000), ic.BiCGSTAB(max_steps=1000), ic.MINRES()],
    ids=named,
)
def test_a_stiff_system_is_solved_as_well_as_lapack_solves_it(
    solver: ic.LinearSolver, norm: float, library: Library
) -> None:
    """In float32, with ‖A‖ = 400: LAPACK's answer has a residual of 6.5e-6 ‖b‖, more than rtol."""
    a = (norm * heat(100, 100.0)).astype(np.float32)
    b = np.ones((1, 100), dtype=np.float32)
    solution = ic.solve_linear(apply(library, a[None]), library.array(b), solver=solver, batch_ndim=1)
    assert library.numpy(solution.converged)[0]
    assert backward_error(a, library.numpy(solution.value)[0], b[0]) < 2 * np.finfo(np.float32).eps


@pytest.mark.parametrize("trace", [False, True], ids=["eager", "jit"])
def test_a_stiff_adjoint_has_a_gradient_in_jax(trace: bool) -> None:
    a, root = heat(100, 100.0), np.linalg.solve(heat(100, 100.0), np.ones(100))
    matrix = jnp.asarray(a, jnp.float32)
    gradient = ic.Implicit(ic.GMRES(restart=100, max_steps=1000))

    def loss(u: jax.Array) -> jax.Array:
        start = jnp.asarray(root, jnp.float32)
        once = ic.Anderson(max_steps=1)
        return ic.fixed_point(lambda h, u: u + h - matrix @ h, start, u, solver=once, gradient=gradient).value.sum()

    grad = jax.grad(loss)
    found = (jax.jit(grad) if trace else grad)(jnp.ones(100, jnp.float32))
    np.testing.assert_allclose(found, root, rtol=1e-5)


class Sweeps(ic.LinearSolver):
    """A user's method that returns no bound of ‖A‖: fifty steps x ← x + r / 2."""

    def cycle(self, space: Any, operator: Any, r: Any, norm: Any, target: Any, active: Any) -> Any:
        x = space.scale(0.5, r)
        for _ in range(49):
            x = space.axpy(0.5, space.sub(r, operator(x)), x)
        return x, 49


EVERY = [
    ic.MINRES(),
    ic.GMRES(),
    ic.GMRES(restart=7),
    ic.CG(),
    ic.BiCGSTAB(),
    ic.Richardson(),
    ic.Richardson(relaxation=0.02, max_steps=600),
    Sweeps(),
]


def rotated(rng: np.random.Generator, values: np.ndarray, *, symmetric: bool = True) -> np.ndarray:
    q, _ = np.linalg.qr(rng.normal(size=(values.size, values.size)))
    p, _ = np.linalg.qr(rng.normal(size=(values.size, values.size)))
    return (q * values) @ (q if symmetric else p).T


@pytest.mark.parametrize("solver", EVERY, ids=lambda s: f"{named(s)}-{getattr(s, 'relaxation', '')}")
def test_what_is_called_converged_has_a_small_backward_error(solver: ic.LinearSolver) -> None:
    """200 systems in each of float32, float64 and float16, judged in float64 by dense algebra."""
    rng = np.random.default_rng(0)
    systems = []
    for n in (3, 30):
        for _ in range(20):
            values = np.logspace(0, -rng.uniform(1, 6), n)
            systems += [(n, rotated(rng, values)), (n, rotated(rng, values, symmetric=False))]
            systems += [(n, 10 ** rng.uniform(-5, 3) * near_identity(1, n, 0.9, int(rng.integers(10**6)))[0])]
            systems += [(n, heat(n, 10 ** rng.uniform(0, 3)))]
            systems += [(n, np.eye(n) + 10 ** rng.uniform(0, 2) * np.triu(rng.normal(size=(n, n)), 1) / n)]
    accepted = 0
    for dtype in (np.float32, np.float64, np.float16):
        eps = float(np.finfo(dtype).eps)
        for n in (3, 30):
            a = np.stack([matrix for size, matrix in systems if size == n]).astype(dtype)
            b = rng.normal(size=(a.shape[0], n)).astype(dtype)
            with np.errstate(over="ignore"):  # an answer that failed may leave the range of float16
                solution = ic.solve_linear(apply(NUMPY, a), b, solver=solver, batch_ndim=1)
            for i in np.flatnonzero(solution.converged):
                residual = np.linalg.norm(b[i].astype(float) - a[i].astype(float) @ solution.value[i].astype(float))
                if not residual <= 1.05e-6 * np.linalg.norm(b[i].astype(float)):
                    assert backward_error(a[i], solution.value[i], b[i]) < 17 * eps
                accepted += 1
    assert accepted > 50


@pytest.mark.parametrize("solver", EVERY, ids=lambda s: f"{named(s)}-{getattr(s, 'relaxation', '')}")
def test_singular_systems_are_refused_in_single_precision(solver: ic.LinearSolver) -> None:
    """Condition 1e10, and projections with b outside of the range: no x has a residual below ‖b‖ / 1000."""
    rng = np.random.default_rng(1)
    values = [np.logspace(0, -10, 40), np.repeat([1.0, 0.0], 20), np.repeat([300.0, 0.0], [39, 1])]
    a = np.stack([rotated(rng, v) for v in values for _ in range(10)]).astype(np.float32)
    b = rng.normal(size=(30, 40)).astype(np.float32)
    assert not np.any(ic.solve_linear(apply(NUMPY, a), b, solver=solver, batch_ndim=1).converged)


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_gmres_builds_no_more_directions_than_a_sample_has_numbers(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    history = Space.history
    monkeypatch.setattr(Space, "history", lambda self, m: rows.append(m) or history(self, m))
    b = {"x": np.ones((4, size - size // 2)), "y": np.ones((4, size // 2))}
    a = near_identity(4, size, 0.8, seed=size)

    def operator(v: Any) -> Any:
        whole = np.einsum("nij,nj->ni", a, np.concatenate([v["x"], v["y"]], axis=1))
        return {"x": whole[:, : size - size // 2], "y": whole[:, size - size // 2 :]}

    solution = ic.solve_linear(operator, b, solver=ic.GMRES(rtol=1e-12), batch_ndim=1, throw=True)
    assert set(rows) == {size + 1}
    found = np.concatenate([solution.value["x"], solution.value["y"]], axis=1)
    np.testing.assert_allclose(found, np.linalg.solve(a, np.ones((4, size, 1)))[..., 0], rtol=1e-10)


def test_restarts_go_on_where_all_directions_were_not_enough() -> None:
    """Products that are right to 1e-3 only for the first three: the second cycle refines the answer of the first."""
    a, calls = near_identity(1, 3, 0.8, seed=0)[0], 0

    def operator(v: np.ndarray) -> np.ndarray:
        nonlocal calls
        calls += 1
        return a @ v * (1.001 if calls == 2 else 1.0)

    solution = ic.solve_linear(operator, np.ones(3), solver=ic.GMRES(rtol=1e-12))
    assert solution.converged
    assert calls == solution.stats.evaluations > 4
    np.testing.assert_allclose(solution.value, np.linalg.solve(a, np.ones(3)), rtol=1e-10)


def test_a_sample_along_a_named_axis_has_the_numbers_of_all_its_parts() -> None:
    """A cyclic shift over four devices' parts of three numbers: GMRES needs all twelve directions."""

    def solve(b: jax.Array) -> tuple[jax.Array, jax.Array]:
        def shift(v: jax.Array) -> jax.Array:
            whole = jax.lax.all_gather(v, "parts").reshape(-1)
            return jax.lax.dynamic_slice(jnp.roll(whole, 1), (3 * jax.lax.axis_index("parts"),), (3,))

        with coupled_axes(("parts",)):
            solution = ic.solve_linear(shift, b, solver=ic.GMRES())
        return solution.value, solution.status

    value, status = jax.vmap(solve, axis_name="parts")(jnp.eye(12)[0].reshape(4, 3))
    assert np.all(np.asarray(status) == ic.CONVERGED)
    np.testing.assert_allclose(np.asarray(value).reshape(-1), np.eye(12)[11], atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_an_answer_that_leaves_the_range_of_the_dtype_is_not_finite(dtype: Any) -> None:
    large = np.asarray([[float(np.finfo(dtype).max) / 2], [1.0]], dtype=dtype)
    with np.errstate(over="ignore"):
        solution = ic.solve_linear(lambda v: v / 8, large, batch_ndim=1)
    np.testing.assert_array_equal(solution.status, [ic.Status.NONFINITE, ic.CONVERGED])
    assert solution.value[1] == 8.0


def contractions(n: int, radius: float = 0.95) -> dict[str, np.ndarray]:
    """Jacobians J of norm ``radius``: with all directions alike, symmetric, and almost of low rank."""
    rng = np.random.default_rng(0)
    general, (left, right) = rng.normal(size=(n, n)), np.linalg.qr(rng.normal(size=(2, n, n)))[0]
    made = {"general": general, "symmetric": general + general.T, "low rank": (left * 0.6 ** np.arange(n)) @ right}
    return {name: radius * j / np.linalg.norm(j, 2) for name, j in made.items()}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ["general", "symmetric", "low rank", "ill-conditioned"])
def test_the_basis_is_orthonormal_by_passes_that_are_made_where_needed(name: str, dtype: Any, monkeypatch: Any) -> None:
    """A second pass in every step is what Arnoldi's method needs for A = I - J if v is not taken out of A v first."""
    n, m = 200, 30
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(n, n)))[0]
    made = contractions(n) | {"ill-conditioned": np.eye(n) - rotation * np.logspace(0, -10, n)}
    a = (np.eye(n) - made[name]).astype(dtype)
    passes, project = [], arnoldi.project
    monkeypatch.setattr(arnoldi, "project", lambda *args: passes.append(1) or project(*args))
    x = np.random.default_rng(2).normal(size=(1, n)).astype(dtype)
    space = find_backend(x).space(x, 1)
    basis, v, steps = space.history(m + 1), arnoldi.unit(space, (x,), space.norm((x,))), []
    basis = space.set_row(basis, 0, v)
    for j in range(m):
        image = (v[0] @ a.T,)
        step = arnoldi.arnoldi_step(space, image, v, basis, space.all_samples(), selective=True)
        column = step.column[0] + step.along[0] * (np.arange(m + 1) == j)
        np.testing.assert_allclose(column @ basis[0][0] + step.rest[0][0], image[0][0], atol=20 * space.eps)
        v = arnoldi.unit(space, step.rest, step.height)
        basis = space.set_row(basis, j + 1, v)
        steps.append(step)
    rows = basis[0][0].astype(float)
    assert np.linalg.norm(rows @ rows.T - np.eye(m + 1), 2) < 30 * space.eps
    assert (len(passes) == m) == (name in ("general", "symmetric"))
    assert len(passes) < 2 * m


def test_a_second_pass_of_one_sample_changes_no_other(library: Library) -> None:
    made, b = contractions(60), np.random.default_rng(1).normal(size=(2, 60))
    found = [
        library.numpy(ic.solve_linear(apply(library, a), library.array(b), solver=ic.GMRES(), batch_ndim=1).value)
        for a in (np.eye(60) - np.stack([made["general"], made[other]]) for other in ("general", "low rank"))
    ]
    np.testing.assert_array_equal(found[0][0], found[1][0])
