"""Least squares of singular systems, against dense linear algebra and SciPy's LSMR."""

from typing import Any

import jax
import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
from libraries import Library

import implicit_core as ic

N = 24
FIRST, LAST = np.linalg.qr(np.random.default_rng(0).normal(size=(2, 4, N, N)))[0]
VALUES = {
    "regular": np.linspace(0.5, 2.0, N),
    "rank 15": np.where(np.arange(N) < 15, np.logspace(0, -2, N), 0.0),
    "rank 1": np.where(np.arange(N) < 1, 3.0, 0.0),
    "zero": np.zeros(N),
}
A = np.stack([(q * s) @ p for q, p, s in zip(FIRST, LAST, VALUES.values(), strict=True)])
X = np.random.default_rng(1).normal(size=(4, N))
NOISE = np.random.default_rng(2).normal(size=(4, N))
INVERSE = np.linalg.pinv(A, rcond=1e-10)


def times(matrices: np.ndarray, x: np.ndarray) -> np.ndarray:
    return (matrices @ x[..., None])[..., 0]


CONSISTENT = times(A, X)
ORTHOGONAL = NOISE - times(A @ INVERSE, NOISE)


@pytest.mark.parametrize("b", [CONSISTENT, NOISE, ORTHOGONAL], ids=["consistent", "inconsistent", "orthogonal"])
def test_the_shortest_least_squares_solution(b: np.ndarray, library: Library) -> None:
    solver = ic.LSMR(rtol=1e-11, max_steps=1000)
    solution = ic.solve_linear(library.array(A), library.array(b), solver=solver, batch_ndim=1)
    x, residual = library.numpy(solution.value), library.numpy(solution.stats.residual)
    assert np.all(library.numpy(solution.status) == ic.CONVERGED)
    np.testing.assert_allclose(x, times(INVERSE, b), rtol=1e-8, atol=1e-9)
    r = b - times(A, x)
    np.testing.assert_allclose(residual, np.linalg.norm(r, axis=1), rtol=1e-6, atol=1e-10)
    gradient = np.linalg.norm(times(np.swapaxes(A, 1, 2), r), axis=1)
    sizes = np.linalg.norm(A, 2, axis=(1, 2)) * np.linalg.norm(r, axis=1)
    solved = residual <= 1e-11 * np.linalg.norm(b, axis=1)
    assert np.all(solved | (gradient <= 1.1e-11 * sizes))


def test_every_product_is_counted_and_about_as_many_as_in_scipy() -> None:
    counts, a, b = {"a": 0, "t": 0}, A[1], NOISE[1]

    def counted(name: str, matrix: np.ndarray) -> Any:
        def product(v: np.ndarray) -> np.ndarray:
            counts[name] += 1
            return matrix @ v

        return product

    product, transposed = counted("a", a), counted("t", a.T)
    ours = ic.solve_linear(product, b, transposed=transposed, solver=ic.LSMR(rtol=1e-9))
    assert ours.stats.evaluations == counts["a"] + counts["t"]
    theirs = scipy.sparse.linalg.lsmr(a, b, atol=1e-9, btol=1e-9)
    assert ours.stats.evaluations <= 2 * theirs[2] + 8
    np.testing.assert_allclose(ours.value, theirs[0], rtol=1e-4)


def test_what_did_not_converge_says_so() -> None:
    few = ic.solve_linear(A[1], NOISE[1], solver=ic.LSMR(rtol=1e-9, max_steps=10))
    assert few.status == ic.MAX_STEPS
    wrong = ic.solve_linear(A[0], NOISE[0], transposed=A[0], solver=ic.LSMR(max_steps=400))
    assert not wrong.converged
    assert wrong.stats.residual == pytest.approx(np.linalg.norm(NOISE[0] - A[0] @ wrong.value), rel=1e-6)
    assert ic.solve_linear(A[0], np.nan * NOISE[0], solver=ic.LSMR()).status == ic.NONFINITE


@pytest.mark.parametrize("form", [scipy.sparse.csr_array, scipy.sparse.linalg.aslinearoperator])
def test_a_matrix_knows_its_transpose(form: Any) -> None:
    x = ic.solve_linear(form(A[1]), NOISE[:2], batch_ndim=1, solver=ic.LSMR(rtol=1e-11), throw=True).value
    np.testing.assert_allclose(x, NOISE[:2] @ INVERSE[1].T, rtol=1e-8, atol=1e-9)


def test_units_and_starts_choose_among_the_solutions() -> None:
    """The shortest in these units, and the closest to a start."""
    a, b, units = A[1], CONSISTENT[1], np.logspace(-1, 1, N)
    x = ic.solve_linear(a, b, scale=units, solver=ic.LSMR(rtol=1e-11, max_steps=2000), throw=True).value
    np.testing.assert_allclose(x, units * (np.linalg.pinv(a * units, rcond=1e-8) @ b), rtol=1e-5, atol=1e-7)
    x = ic.solve_linear(a, b, x0=0.1 * X[1] + 0.01, solver=ic.LSMR(rtol=1e-11), throw=True).value
    start = 0.1 * X[1] + 0.01
    np.testing.assert_allclose(x, start + INVERSE[1] @ (b - a @ start), rtol=1e-6, atol=1e-8)


def test_least_squares_of_a_traced_system_in_single_precision() -> None:
    @jax.jit
    def solve(a: Any, b: Any) -> Any:
        solution = ic.solve_linear(a, b, batch_ndim=1, solver=ic.LSMR())
        return solution.value, solution.status

    x, status = solve(A.astype(np.float32) * jax.numpy.float32(1), NOISE.astype(np.float32) * jax.numpy.float32(1))
    assert status.tolist() == [ic.CONVERGED] * 4
    np.testing.assert_allclose(x, times(INVERSE, NOISE), rtol=2e-2, atol=2e-3)


def test_what_has_no_transpose_is_refused() -> None:
    with pytest.raises(TypeError, match=r"LSMR needs products with Aᵀ: pass solve_linear\(A, b, transposed=...\)"):
        ic.solve_linear(lambda v: v, np.ones(3), solver=ic.LSMR())
    with pytest.raises(TypeError, match="LSMR takes no preconditioner"):
        ic.solve_linear(np.eye(3), np.ones(3), solver=ic.LSMR(), preconditioner=lambda v: v)
    problem = ic.Problem(lambda h, z: 0.5 * h + z, vjp=lambda h, z, v: (0.5 * v, v))
    with pytest.raises(TypeError, match="LSMR needs products with Aᵀ"):
        ic.Implicit(ic.LSMR()).vjp(problem, np.ones(2), np.ones(2))[1](np.ones(2))
    with pytest.raises(ValueError, match=r"transposed must have the shape \(3, 3\), got \(2, 2\)"):
        ic.solve_linear(lambda v: v, np.ones(3), solver=ic.LSMR(), transposed=np.eye(2))


@pytest.mark.parametrize("power", [-30, -25, -22, 22, 25])
def test_a_matrix_whose_squares_are_no_numbers(power: int) -> None:
    """In float32. Where ‖Aᵀb‖ underflows, nothing is a solution of least squares."""
    a = (np.array([[2.0, 1.0], [1.0, 3.0]]) * 10.0**power).astype(np.float32)
    b = np.array([1.0, 2.0], np.float32)
    solution = ic.solve_linear(a, b, solver=ic.LSMR())
    assert solution.converged
    np.testing.assert_allclose(a @ solution.value, b, rtol=1e-4)


def test_the_transpose_is_asked_for_where_it_is_used() -> None:
    class Untransposed:
        shape, dtype = (3, 3), np.dtype(float)

        def matvec(self, v: np.ndarray) -> np.ndarray:
            return 2 * v

        def __matmul__(self, v: np.ndarray) -> np.ndarray:
            return 2 * v

    np.testing.assert_allclose(ic.solve_linear(Untransposed(), np.ones(3)).value, 0.5)
    with pytest.raises(TypeError, match="LSMR needs products with Aᵀ"):
        ic.solve_linear(Untransposed(), np.ones(3), solver=ic.LSMR())
