"""Preconditioners save products and do not change what a solve promises; forms of an operator besides a function."""

from typing import Any

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
from libraries import NUMPY, Library

import implicit_core as ic

N = 60
SCALES = np.logspace(0, 4, N)
MATRIX = np.diag(SCALES) + 0.1 * np.sqrt(np.outer(SCALES, SCALES)) * np.eye(N, k=1)
SYMMETRIC = (MATRIX + MATRIX.T) / 2
B = np.random.default_rng(0).normal(size=(3, N))

TIGHT = {"rtol": 1e-10, "max_steps": 600}
SOLVERS = [
    (ic.GMRES(**TIGHT), MATRIX, 16),
    (ic.GMRES(restart=5, **TIGHT), MATRIX, 16),
    (ic.BiCGSTAB(**TIGHT), MATRIX, 20),
    (ic.CG(**TIGHT), SYMMETRIC, 16),
    (ic.Richardson(**TIGHT), MATRIX, 25),
]
METHODS = pytest.mark.parametrize(("solver", "a", "most"), SOLVERS, ids=lambda x: repr(x).partition("(")[0])


@METHODS
def test_a_preconditioner_saves_products_and_not_accuracy(solver: ic.LinearSolver, a: np.ndarray, most: int) -> None:
    """cond(A) = 1e4, and 1.2 of A / diag(A)."""
    diagonal = np.diag(a)
    solution = ic.solve_linear(a, B, solver=solver, batch_ndim=1, preconditioner=lambda v: v / diagonal)
    residual = np.linalg.norm(B - solution.value @ a.T, axis=1)
    assert np.all(solution.converged)
    assert np.all(residual <= 1.0001e-10 * np.linalg.norm(B, axis=1))
    np.testing.assert_allclose(solution.stats.residual, residual, rtol=1e-3, atol=1e-12)
    np.testing.assert_allclose(solution.value, np.linalg.solve(a, B.T).T, rtol=1e-5, atol=1e-9)
    assert solution.stats.evaluations <= most
    plain = ic.solve_linear(a, B, solver=solver, batch_ndim=1)
    assert plain.stats.evaluations > 3 * most or not np.any(plain.converged)


@METHODS
@pytest.mark.parametrize("bad", [0.0, np.nan, -1.0, 1e30], ids=str)
def test_a_bad_preconditioner_is_never_silent(solver: ic.LinearSolver, a: np.ndarray, most: int, bad: float) -> None:
    with np.errstate(all="ignore"):
        solution = ic.solve_linear(a, B[0], solver=solver, preconditioner=lambda v: bad * v)
    residual = np.linalg.norm(B[0] - a @ solution.value)
    assert residual == pytest.approx(float(solution.stats.residual), rel=1e-3)
    assert not solution.converged or residual <= 1.0001e-10 * np.linalg.norm(B[0])


@pytest.mark.parametrize("solver", [ic.GMRES(), ic.BiCGSTAB(), ic.CG()], ids=repr)
def test_a_stiff_system_reaches_rounding_error_with_a_preconditioner(solver: ic.LinearSolver) -> None:
    """In float32 with ‖A‖ = 400, where a relative residual of 1e-6 is out of reach: ‖A‖ is seen behind M⁻¹ too."""
    grid = 100.0**2 * 0.01 * (2 * np.eye(100) - np.eye(100, k=1) - np.eye(100, k=-1)) + np.eye(100)
    inverse = np.linalg.inv(grid + 3 * np.eye(100)).astype(np.float32)
    a, b = grid.astype(np.float32), np.ones(100, dtype=np.float32)
    solution = ic.solve_linear(a, b, solver=solver, preconditioner=inverse)
    assert solution.converged
    x = solution.value.astype(float)
    backward = np.linalg.norm(b - a.astype(float) @ x) / (np.linalg.norm(a, 2) * np.linalg.norm(x) + 10)
    assert backward < 2 * np.finfo(np.float32).eps


def forms(a: np.ndarray) -> list[Any]:
    return [
        lambda v: v @ a.T,
        a,
        np.stack([a] * 3),
        scipy.sparse.csr_array(a),
        scipy.sparse.dia_matrix(a),
        scipy.sparse.linalg.aslinearoperator(a),
    ]


@pytest.mark.parametrize("form", range(6))
def test_every_form_of_an_operator_is_the_same_operator(form: int) -> None:
    inverse = np.linalg.inv(MATRIX * (1 + 0.1 * np.eye(N)))
    operator, preconditioner = forms(MATRIX)[form], forms(inverse)[form]
    solution = ic.solve_linear(
        operator, B, preconditioner=preconditioner, batch_ndim=1, solver=ic.GMRES(rtol=1e-12), throw=True
    )
    np.testing.assert_allclose(solution.value, np.linalg.solve(MATRIX, B.T).T, rtol=1e-8)
    if form not in (0, 2):
        single = form > 2 and ic.solve_linear(operator, B[0].astype(np.float32), preconditioner=preconditioner)
        assert not single or single.value.dtype == np.float32
        whole = ic.solve_linear(operator, B[0].reshape(6, 10), preconditioner=preconditioner, throw=True)
        np.testing.assert_allclose(whole.value.reshape(-1), np.linalg.solve(MATRIX, B[0]), rtol=1e-4, atol=1e-9)


def test_matrices_of_each_sample_and_one_for_all(library: Library) -> None:
    a = np.eye(5) + 0.1 * np.random.default_rng(1).normal(size=(4, 5, 5))
    b = np.random.default_rng(2).normal(size=(4, 5))
    inverse, solver = library.array(np.linalg.inv(a[0])), ic.GMRES(rtol=1e-12)
    solution = ic.solve_linear(
        library.array(a), library.array(b), batch_ndim=1, solver=solver, preconditioner=inverse, throw=True
    )
    np.testing.assert_allclose(library.numpy(solution.value), np.linalg.solve(a, b[..., None])[..., 0], rtol=1e-9)


@pytest.mark.parametrize(
    ("operator", "error", "message"),
    [
        (3.0, TypeError, "operator must be callable, a matrix"),
        (np.eye(4), ValueError, r"operator must have the shape \(3, 3\), got \(4, 4\)"),
        (np.eye(3, dtype=np.float32), TypeError, "operator must have the dtype float64 of b, got float32"),
        (scipy.sparse.eye_array(4), ValueError, r"operator must have the shape \(3, 3\), got \(4, 4\)"),
    ],
)
def test_what_is_no_operator_is_refused(operator: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ic.solve_linear(operator, np.ones(3))


def test_a_start_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="x0 must have the shape"):
        ic.solve_linear(np.eye(3), np.ones(3), x0=np.ones(4))
    near = ic.solve_linear(np.diag([1.0, 2.0, 3.0]), np.ones(3), x0=1 / np.asarray([1.0, 2.0, 3.0]))
    assert (near.converged, near.stats.evaluations) == (True, 1)
    assert NUMPY.numpy(near.value)[2] == pytest.approx(1 / 3)
