"""Preconditioners save products and do not change what a solve promises; forms of an operator besides a function."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
import torch
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
    (ic.MINRES(**TIGHT), SYMMETRIC, 17),
    (ic.MINRES(**TIGHT), SYMMETRIC * np.where(np.arange(N) % 2, 1.0, -1.0) * np.eye(N), 17),
]
METHODS = pytest.mark.parametrize(("solver", "a", "most"), SOLVERS, ids=lambda x: repr(x).partition("(")[0])


@METHODS
def test_a_preconditioner_saves_products_and_not_accuracy(solver: ic.LinearSolver, a: np.ndarray, most: int) -> None:
    """cond(A) = 1e4, and 1.2 of A / diag(A)."""
    diagonal = abs(np.diag(a)) if isinstance(solver, ic.MINRES) else np.diag(a)
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


@pytest.mark.parametrize("solver", [ic.GMRES(), ic.BiCGSTAB(), ic.CG(), ic.MINRES()], ids=repr)
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
        (np.ma.array(np.eye(3), mask=np.eye(3)), TypeError, "operator must not be or hold .* a masked array"),
        (np.eye(3).view(np.matrix), TypeError, r"numpy.matrix, .* write np.asarray\(operator\)"),
        (torch.eye(3), TypeError, "operator is an array of type Tensor, and b one of numpy: .* lambda v: operator @ v"),
    ],
)
def test_what_is_no_operator_is_refused(operator: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ic.solve_linear(operator, np.ones(3))


@pytest.mark.parametrize("solver", [ic.GMRES(rtol=1e-10), ic.LSMR(rtol=1e-10)], ids=repr)
def test_a_sparse_tensor_is_a_matrix_and_no_vector(solver: ic.LinearSolver) -> None:
    a = np.eye(5) + 0.3 * np.eye(5, k=2)
    matrix, b = torch.asarray(a).to_sparse(), torch.asarray(B[:, :5])
    x = ic.solve_linear(matrix, b, batch_ndim=1, solver=solver, throw=True).value
    np.testing.assert_allclose(x.numpy(), np.linalg.solve(a, B[:, :5].T).T, rtol=1e-8)
    with pytest.raises(TypeError, match=r"b must not .* layout torch.sparse_coo, .* write b.to_dense\(\)"):
        ic.solve_linear(torch.eye(3), torch.ones(3).to_sparse())


def test_a_start_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="x0 must have the shape"):
        ic.solve_linear(np.eye(3), np.ones(3), x0=np.ones(4))
    near = ic.solve_linear(np.diag([1.0, 2.0, 3.0]), np.ones(3), x0=1 / np.asarray([1.0, 2.0, 3.0]))
    assert (near.converged, near.stats.evaluations) == (True, 1)
    assert NUMPY.numpy(near.value)[2] == pytest.approx(1 / 3)


# The adjoint system: h = tanh(S h + z) - (S D) h with a stiff diagonal, whose Jacobian is far from symmetric.

STIFF = np.logspace(0, 3, 20)
COUPLING = 0.3 * np.random.default_rng(4).normal(size=(20, 20))
Z = np.random.default_rng(5).normal(size=(2, 20))


def stiff_map(xp: Any, coupling: Any, stiff: Any) -> Any:
    return lambda h, z: xp.tanh(h @ coupling.T) + z - stiff * h


def preconditioner(xp: Any, coupling: Any, stiff: Any) -> ic.Preconditioner:
    """A block triangular approximation of 1 + D - tanh' W: not symmetric, and made from the point."""

    def prepare(h: Any, z: Any) -> Any:
        slope = 1 - xp.tanh(h @ coupling.T) ** 2
        return {"inverse": xp.linalg.inv(xp.diag(1 + stiff) - slope[..., :, None] * xp.tril(coupling))}

    def times(matrix: Any, v: Any) -> Any:
        return (matrix @ v[..., None])[..., 0]

    return ic.Preconditioner(
        lambda v, data: times(data["inverse"], v), lambda v, data: times(data["inverse"].mT, v), prepare
    )


def fixed_point(z: np.ndarray) -> np.ndarray:
    h = np.zeros_like(z)
    for _ in range(100):
        h = (np.tanh(h @ COUPLING.T) + z) / (1 + STIFF)
    return h


def exact_gradient(z: np.ndarray, v: np.ndarray) -> np.ndarray:
    slope = 1 - np.tanh(fixed_point(z) @ COUPLING.T) ** 2
    return np.linalg.solve(np.swapaxes(np.diag(1 + STIFF) - slope[..., None] * COUPLING, -1, -2), v[..., None])[..., 0]


@pytest.mark.parametrize("solver", [ic.GMRES(**TIGHT), ic.BiCGSTAB(**TIGHT), ic.Richardson(**TIGHT)], ids=repr)
def test_a_preconditioner_of_the_gradient_saves_products(solver: ic.LinearSolver) -> None:
    products = 0
    f, given = stiff_map(np, COUPLING, STIFF), preconditioner(np, COUPLING, STIFF)

    def vjp(h: np.ndarray, z: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        nonlocal products
        products += 1
        return (v * (1 - np.tanh(h @ COUPLING.T) ** 2)) @ COUPLING - STIFF * v, v

    def jvp(h: np.ndarray, z: np.ndarray, dh: np.ndarray, dz: np.ndarray) -> np.ndarray:
        return (1 - np.tanh(h @ COUPLING.T) ** 2) * (dh @ COUPLING.T) - STIFF * dh + dz

    problem = ic.Problem(f, vjp=vjp, jvp=jvp, batch_ndim=1, scale=np.logspace(-1, 1, 20))
    h, v = fixed_point(Z), np.ones((2, 20))
    found, counts = [], []
    for each in (given, None):
        products = 0
        gradient = ic.Implicit(solver, preconditioner=each, on_failure="ignore")
        found.append(gradient.vjp(problem, h, Z)[1](v))
        counts.append(products)
    np.testing.assert_allclose(found[0], exact_gradient(Z, v), rtol=1e-7)
    assert counts[0] < 0.6 * counts[1]
    tangent = ic.Implicit(solver, preconditioner=given).jvp(problem, h, Z, v)[1]
    assert np.sum(tangent * v[::-1]) == pytest.approx(np.sum(exact_gradient(Z, v[::-1]) * v), rel=1e-7)


@pytest.mark.parametrize("products", [None, 5])
@pytest.mark.parametrize(
    "solver", [ic.GMRES(), ic.BiCGSTAB(), ic.CG(), ic.MINRES()], ids=lambda x: repr(x).partition("(")[0]
)
def test_functions_that_return_the_same_array_at_every_call(solver: ic.LinearSolver, products: int | None) -> None:
    def times(scale: np.ndarray, *, kept: bool) -> Any:
        memory = np.zeros(N)
        return lambda v, *_: np.multiply(scale, v, out=memory if kept else None)

    slopes, found = np.linspace(-3.0, 0.5, N), []
    for kept in (True, False):
        jacobian, inverse = times(slopes, kept=kept), times(0.8 / (1 - slopes), kept=kept)
        problem = ic.Problem(lambda h, z: slopes * h + z, vjp=lambda h, z, v, j=jacobian: (j(v), v))
        gradient = ic.Implicit(solver, preconditioner=ic.Preconditioner(inverse), products=products)
        w = gradient.vjp(problem, B[0], B[0])[1](B[0])
        a, inverse = times(1 - slopes, kept=kept), times(0.8 / (1 - slopes), kept=kept)
        found.append((w, ic.solve_linear(a, B[0], solver=solver, preconditioner=inverse).value))
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_allclose(found[0][1], B[0] / (1 - slopes), rtol=1e-4)


def test_a_preconditioner_of_the_gradient_in_torch() -> None:
    coupling, stiff = torch.asarray(COUPLING), torch.asarray(STIFF)
    f, h = stiff_map(torch, coupling, stiff), torch.asarray(fixed_point(Z))
    given = preconditioner(torch, coupling, stiff)

    counts: list[int] = []

    class Counting(ic.GMRES):
        def run(self, *arguments: Any, **keywords: Any) -> Any:
            result = super().run(*arguments, **keywords)
            counts.append(result.products)
            return result

    def loss(z: Any, inverse: Any) -> Any:
        gradient = ic.Implicit(Counting(rtol=1e-11, max_steps=500), preconditioner=inverse)
        solver = ic.CallableSolver(lambda problem, h0, z: h + 0.0 * z.detach())
        return (ic.fixed_point(f, h, z, solver=solver, gradient=gradient, batch_ndim=1).value ** 2).sum()

    z = torch.asarray(Z).requires_grad_()
    for inverse in (given, None):
        (grad,) = torch.autograd.grad(loss(z, inverse), z)
        np.testing.assert_allclose(grad.numpy(), exact_gradient(Z, 2 * fixed_point(Z)), rtol=1e-7)
    assert counts[0] < 0.6 * counts[1]
    v = torch.asarray(np.random.default_rng(0).normal(size=Z.shape))
    seconds = []
    for inverse in (given, None):
        (grad,) = torch.autograd.grad(loss(z, inverse), z, create_graph=True)
        seconds.append(torch.autograd.grad((grad * v).sum(), z)[0].numpy())
    np.testing.assert_allclose(seconds[0], seconds[1], rtol=1e-6, atol=1e-12)


def test_a_preconditioner_of_the_gradient_in_jax() -> None:
    """Within ``jit`` of ``vmap``, from arrays that are traced, and twice differentiated."""
    h = jnp.asarray(fixed_point(Z))

    def derivatives(h: Any, z: Any, coupling: Any, inverse: bool) -> Any:
        f, given = stiff_map(jnp, coupling, jnp.asarray(STIFF)), preconditioner(jnp, coupling, jnp.asarray(STIFF))

        def loss(z: Any) -> Any:
            # With 11 products there is no gradient but with the preconditioner.
            gradient = ic.Implicit(ic.GMRES(rtol=1e-9, max_steps=11), preconditioner=given if inverse else None)
            solver = ic.FixedPointIteration(max_steps=1)
            return jnp.sum(ic.fixed_point(f, h, z, solver=solver, gradient=gradient).value ** 2)

        grad = jax.grad(loss)
        return grad(z), jax.jvp(grad, (z,), (jnp.ones(20),))[1]

    def twice(z: np.ndarray) -> np.ndarray:
        return exact_gradient(z, 2 * fixed_point(z))

    mapped = jax.jit(jax.vmap(derivatives, in_axes=(0, 0, None, None)), static_argnums=3)
    first, along = mapped(h, jnp.asarray(Z), jnp.asarray(COUPLING), True)
    np.testing.assert_allclose(first, twice(Z), rtol=1e-7)
    np.testing.assert_allclose(along, (twice(Z + 1e-5) - twice(Z - 1e-5)) / 2e-5, rtol=1e-5, atol=1e-9)
    assert np.all(np.isnan(mapped(h, jnp.asarray(Z), jnp.asarray(COUPLING), False)[0]))
