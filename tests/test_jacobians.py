"""Jacobians that are given as matrices: Newton's step and the exact gradient, dense and sparse."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
import torch
from libraries import Library

import implicit_core as ic
from implicit_core.examples.roots import sparse_reaction_diffusion
from implicit_core.solvers.regularized import DenseJacobian, SparseJacobian

N, BATCH = 5, 3
W = 0.4 * np.random.default_rng(0).normal(size=(N, N))
X = np.random.default_rng(1).normal(size=(BATCH, N))
V = np.random.default_rng(2).normal(size=(BATCH, N))
SCALE = np.logspace(-2, 2, N)


def root(x: np.ndarray, z: np.ndarray) -> np.ndarray:
    """g = x³ + x - W x - z, with a root for every z."""
    return x**3 + x - x @ W.T - z


def jacobian(x: Any, z: Any) -> np.ndarray:
    return np.eye(N) * (3 * x[..., None] ** 2 + 1) - W


def root_vjp(x: np.ndarray, z: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return (3 * x**2 + 1) * v - v @ W, -v


def reference(z: np.ndarray) -> np.ndarray:
    x = np.zeros_like(z)
    for _ in range(60):
        x = x - np.linalg.solve(jacobian(x, z), root(x, z)[..., None])[..., 0]
    return x


@pytest.mark.parametrize("units", [{}, {"scale": SCALE, "g_scale": 10 * SCALE[::-1]}], ids=["plain", "units"])
@pytest.mark.parametrize("form", ["root", "fixed point"])
def test_newton_with_a_dense_jacobian(form: str, units: dict[str, Any], library: Library) -> None:
    """Quadratic convergence, and no products."""
    w, eye = library.array(W), library.array(np.eye(N)[None])

    def g(x: Any, z: Any) -> Any:
        return x**3 + x - x @ w.T - z

    def of_g(x: Any, z: Any) -> Any:
        return eye * (3 * x[:, :, None] ** 2 + 1) - w[None, :, :]

    problem: ic.Problem[Any, Any]
    if form == "root":
        problem = ic.RootProblem(g, jacobian=of_g, batch_ndim=1, **units)
    else:
        units = {"scale": units["scale"]} if units else {}
        problem = ic.Problem(
            lambda x, z: x - 0.1 * g(x, z), jacobian=lambda x, z: eye - 0.1 * of_g(x, z), batch_ndim=1, **units
        )
    solution = ic.solve(problem, library.array(np.zeros((BATCH, N))), library.array(X), solver=ic.Newton(rtol=1e-11))
    assert np.all(library.numpy(solution.status) == ic.CONVERGED)
    assert int(solution.stats.evaluations) < 16
    np.testing.assert_allclose(library.numpy(solution.value), reference(X), rtol=1e-9, atol=1e-10)


def exact(v: np.ndarray) -> np.ndarray:
    return np.linalg.solve(np.swapaxes(jacobian(reference(X), X), 1, 2), v[..., None])[..., 0]


@pytest.mark.parametrize("units", [{}, {"scale": SCALE, "g_scale": 10 * SCALE[::-1]}], ids=["plain", "units"])
@pytest.mark.parametrize("wrong", [1.0, 1.3])
def test_the_gradient_takes_two_products(wrong: float, units: dict[str, Any]) -> None:
    """Of a Jacobian that is not right it takes more, and has the accuracy of the products."""
    products = 0

    def vjp(x: np.ndarray, z: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        nonlocal products
        products += 1
        return root_vjp(x, z, v)

    def given(x: np.ndarray, z: np.ndarray) -> np.ndarray:
        return jacobian(x, z) + (wrong - 1) * W

    problem = ic.RootProblem(root, vjp=vjp, jacobian=given, batch_ndim=1, **units)
    pullback = ic.Implicit(ic.GMRES(rtol=1e-11)).vjp(problem, reference(X), X)[1]
    before = products
    np.testing.assert_allclose(pullback(V), exact(V), rtol=1e-7 if wrong != 1 else 1e-10, atol=1e-8)
    assert products - before == 2 + 1 if wrong == 1 else products - before > 3


def test_products_come_from_the_jacobian_where_nothing_else_gives_them() -> None:
    def linearize(x: np.ndarray, z: np.ndarray) -> Any:
        return ic.Linearization(root(x, z), vjp_z=lambda v: -v, jvp_z=lambda dz: -dz)

    problem = ic.RootProblem(root, linearize=linearize, jacobian=jacobian, batch_ndim=1)
    np.testing.assert_allclose(ic.Implicit().vjp(problem, reference(X), X)[1](V), exact(V), rtol=1e-9)
    pushed = ic.Implicit().jvp(problem, reference(X), X, V)[1]
    expected = np.linalg.solve(jacobian(reference(X), X), V[..., None])[..., 0]
    np.testing.assert_allclose(pushed, expected, rtol=1e-9)
    solved = ic.solve(problem, np.zeros((BATCH, N)), X, solver=ic.NewtonKrylov(rtol=1e-10))
    np.testing.assert_allclose(solved.value, reference(X), rtol=1e-7, atol=1e-9)


def test_a_singular_jacobian_is_inverted_by_least_squares() -> None:
    """x² = 0 from zero, beside a regular sample."""
    problem = ic.RootProblem(lambda x, z: x**2 - z, jacobian=lambda x, z: 2 * x[..., None], batch_ndim=1)
    solution = ic.solve(problem, np.asarray([[0.0], [1.0]]), np.asarray([[1.0], [2.0]]), solver=ic.Newton(max_steps=30))
    assert solution.status[1] == ic.CONVERGED
    assert solution.status[0] != ic.CONVERGED
    sparse = ic.RootProblem(lambda x, z: x**2 - z, jacobian=lambda x, z: scipy.sparse.diags_array(2 * x, format="csr"))
    solution = ic.solve(sparse, np.asarray([0.0, 1.0]), np.asarray([1.0, 2.0]), solver=ic.Newton(max_steps=60))
    assert np.isfinite(solution.value[1])


def test_finished_rows_are_taken_out_of_a_batch() -> None:
    problem = ic.RootProblem(root, jacobian=jacobian, batch_ndim=1)
    solver = ic.Compacting(ic.Newton(rtol=1e-11), batched=True)
    x, z = np.tile(X, (3, 1)), np.tile(X, (3, 1))
    x[:6] = np.tile(reference(X), (2, 1)) + 1e-3
    solution = ic.solve(problem, x, z, solver=solver)
    assert np.all(solution.converged)
    np.testing.assert_allclose(solution.value, np.tile(reference(X), (3, 1)), atol=1e-9)


def test_leaves_stand_one_after_the_other() -> None:
    def g(x: Any, z: Any) -> Any:
        return {"a": x["a"] ** 3 - z, "b": x["b"] + x["a"][:1]}

    def of_g(x: Any, z: Any) -> np.ndarray:
        a = 3 * x["a"] ** 2
        return np.asarray([[a[0], 0.0, 0.0], [0.0, a[1], 0.0], [1.0, 0.0, 1.0]])

    problem = ic.RootProblem(g, jacobian=of_g)
    solver = ic.Newton(rtol=1e-10)
    solution = ic.solve(problem, {"a": np.ones(2), "b": np.zeros(1)}, np.asarray([8.0, 27.0]), solver=solver)
    np.testing.assert_allclose(np.concatenate([solution.value["a"], solution.value["b"]]), [2.0, 3.0, -2.0], rtol=1e-8)


@pytest.mark.parametrize("units", [{}, {"scale": {"a": 0.1, "b": 10.0}, "g_scale": {"a": 5.0, "b": 1.0}}], ids=str)
@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_blocks_as_autodiff_returns_them(framework: str, units: dict[str, Any]) -> None:
    """Newton's method is exact in one step for a linear g, and the gradient takes two products."""
    blocks = np.random.default_rng(0).normal(size=(8, 8)) / 5 + 2 * np.eye(8)
    xp: Any = jnp if framework == "jax" else torch
    m, z = xp.asarray(blocks), xp.asarray(np.random.default_rng(1).normal(size=(3, 8)))

    def g(x: Any, z: Any) -> Any:
        y = m @ xp.concatenate([x["a"].reshape(-1), x["b"]]) - z
        return {"a": y[:6].reshape(3, 2), "b": y[6:]}

    transforms: Any = jax if framework == "jax" else torch.func
    mapped = transforms.vmap(g)
    of_g = transforms.vmap(transforms.jacrev(g))
    problem = ic.RootProblem(mapped, jacobian=of_g, batch_ndim=1, **units)
    start = {"a": xp.zeros_like(z[:, :6]).reshape(3, 3, 2), "b": xp.zeros_like(z[:, 6:])}
    solution = ic.solve(problem, start, z, solver=ic.Newton(rtol=1e-10))
    found = np.concatenate([np.asarray(solution.value["a"]).reshape(3, 6), np.asarray(solution.value["b"])], axis=1)
    np.testing.assert_allclose(found, np.linalg.solve(blocks, np.asarray(z).T).T, rtol=1e-8)
    assert int(solution.stats.evaluations) <= 3


def test_the_order_of_numbers_in_memory_does_not_matter() -> None:
    """A state in channels-last order, which a solve keeps, and a Jacobian in C order: convergence is quadratic."""
    w = torch.asarray(0.1 * np.random.default_rng(0).normal(size=(2, 2, 3, 3)))
    z = torch.asarray(np.random.default_rng(1).normal(size=(1, 2, 3, 4)))

    def g(x: Any, z: Any) -> Any:
        return x + x**3 - torch.nn.functional.conv2d(x, w, padding=1) - z

    def of_g(x: Any, z: Any) -> Any:
        return torch.func.jacrev(lambda x: g(x, z))(x).reshape(1, 24, 24)

    start = torch.zeros_like(z).contiguous(memory_format=torch.channels_last)
    solution = ic.solve(ic.RootProblem(g, jacobian=of_g, batch_ndim=1), start, z, solver=ic.Newton(rtol=1e-11))
    assert solution.converged.all()
    assert solution.stats.evaluations < 10


# A sparse Jacobian: one step of implicit Euler for u' = Δu + u - u³ + z on a square.


def reaction_diffusion(m: int) -> tuple[ic.RootProblem[Any, Any], Any]:
    line = scipy.sparse.diags_array([np.ones(m - 1), -2 * np.ones(m), np.ones(m - 1)], offsets=[-1, 0, 1])
    laplacian = m**2 * scipy.sparse.kronsum(line, line, format="csr")
    dt = 0.01

    def g(u: np.ndarray, z: np.ndarray) -> np.ndarray:
        return u - dt * (laplacian @ u + u - u**3 + z)

    def vjp(u: np.ndarray, z: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return v - dt * (laplacian @ v + (1 - 3 * u**2) * v), -dt * v

    def of_g(u: np.ndarray, z: np.ndarray) -> Any:
        return scipy.sparse.eye_array(m * m) - dt * (laplacian + scipy.sparse.diags_array(1 - 3 * u**2))

    return ic.RootProblem(g, vjp=vjp, jacobian=of_g), laplacian


@pytest.mark.parametrize("solver", [ic.Newton(rtol=1e-10), ic.Polyalgorithm(rtol=1e-10)], ids=["Newton", "default"])
def test_newton_with_a_sparse_jacobian_of_many_unknowns(solver: Any) -> None:
    """10,000 unknowns: a dense matrix would have 800 MB. The gradient is compared with central differences."""
    m = 100
    problem, _ = reaction_diffusion(m)
    rng = np.random.default_rng(0)
    z = 300 * rng.normal(size=m * m)
    solution = ic.solve(problem, np.zeros(m * m), z, solver=solver)
    assert solution.converged
    assert np.linalg.norm(problem.f(solution.value, z)) <= 1e-10 * np.linalg.norm(problem.f(np.zeros(m * m), z))
    assert solution.stats.evaluations < 10
    v, dz = rng.normal(size=(2, m * m))
    pulled = ic.Implicit().vjp(problem, solution.value, z)[1](v)
    after, before = (
        ic.solve(problem, solution.value, z + step * dz, solver=ic.Newton(rtol=0.0, atol=1e-11)).value
        for step in (1e-2, -1e-2)
    )
    assert pulled @ dz == pytest.approx(v @ (after - before) / 2e-2, rel=1e-7)


def test_a_sparse_jacobian_in_units_and_of_a_fixed_point() -> None:
    rng = np.random.default_rng(3)
    m = scipy.sparse.csr_array(0.3 * rng.random((20, 20)) * (rng.random((20, 20)) < 0.2))
    scale = np.logspace(-1, 1, 20)

    def f(h: np.ndarray, z: np.ndarray) -> np.ndarray:
        return np.tanh(m @ h + z)

    def slope(h: np.ndarray, z: np.ndarray) -> np.ndarray:
        return 1 - np.tanh(m @ h + z) ** 2

    def vjp(h: np.ndarray, z: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return m.T @ (slope(h, z) * v), slope(h, z) * v

    def of_f(h: np.ndarray, z: np.ndarray) -> Any:
        return scipy.sparse.diags_array(slope(h, z)) @ m

    z, v = rng.normal(size=(2, 20))
    problem = ic.Problem(f, vjp=vjp, jacobian=of_f, scale=scale)
    solution = ic.solve(problem, np.zeros(20), z, solver=ic.Newton(rtol=1e-12))
    assert solution.converged
    assert solution.stats.evaluations < 8
    dense = np.eye(20) - of_f(solution.value, z).toarray()
    expected = slope(solution.value, z) * np.linalg.solve(dense.T, v)
    np.testing.assert_allclose(ic.Implicit().vjp(problem, solution.value, z)[1](v), expected, rtol=1e-9)


# Autodiff frameworks: the matrix saves products, and the derivatives are those of autodiff.


def test_a_layer_in_torch() -> None:
    w = torch.asarray(W)
    products = 0

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(x: Any) -> Any:
            return x.clone()

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

        @staticmethod
        def jvp(ctx: Any, dx: Any) -> Any:
            return dx.clone()

        @staticmethod
        def backward(ctx: Any, v: Any) -> Any:
            nonlocal products
            products += 1
            return v

    def g(x: Any, z: Any) -> Any:
        x = Counted.apply(x)
        return x**3 + x - x @ w.T - z

    def of_g(x: Any, z: Any) -> Any:
        return torch.eye(N, dtype=x.dtype) * (3 * x[..., None] ** 2 + 1) - w

    counts = []
    for given in (of_g, None):
        problem = ic.RootProblem(g, jacobian=given, batch_ndim=1)
        z = torch.asarray(X, dtype=torch.float64).requires_grad_()
        solver = ic.Newton(rtol=1e-12)
        value = ic.root(problem, torch.zeros(BATCH, N, dtype=torch.float64), z, solver=solver).value
        products = 0
        (grad,) = torch.autograd.grad((value * torch.asarray(V)).sum(), z)
        counts.append(products)
        np.testing.assert_allclose(grad.numpy(), exact(V), rtol=1e-6 if given is None else 1e-9, atol=1e-8)
    assert counts[0] <= 4 < counts[1]

    def loss(z: Any) -> Any:
        problem = ic.RootProblem(lambda x, z: x**3 + x - x @ w.T - z, jacobian=of_g, batch_ndim=1)
        gradient = ic.Implicit(ic.GMRES(rtol=1e-12))
        return (
            ic.root(problem, torch.zeros_like(z), z, solver=ic.Newton(rtol=1e-12), gradient=gradient).value ** 2
        ).sum()

    z = torch.asarray(X, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradgradcheck(loss, z)
    np.testing.assert_allclose(torch.func.grad(loss)(z.detach()), torch.autograd.grad(loss(z), z)[0], rtol=1e-9)


def test_a_layer_in_jax() -> None:
    """Under ``jit`` and ``vmap``, and twice differentiated."""
    w = jnp.asarray(W)

    def g(x: Any, z: Any) -> Any:
        return x**3 + x - w @ x - z

    problem = ic.RootProblem(g, jacobian=jax.jacfwd(g))
    gradient = ic.Implicit(ic.GMRES(rtol=1e-12))

    def loss(z: Any) -> Any:
        return jnp.sum(ic.root(problem, jnp.zeros(N), z, solver=ic.Newton(rtol=1e-12), gradient=gradient).value ** 2)

    def expected(z: np.ndarray) -> np.ndarray:
        x = reference(z)
        return np.linalg.solve(np.swapaxes(jacobian(x, z), -1, -2), 2 * x[..., None])[..., 0]

    np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(X[0])), expected(X[:1])[0], rtol=1e-9)
    np.testing.assert_allclose(jax.vmap(jax.jit(jax.grad(loss)))(jnp.asarray(X)), expected(X), rtol=1e-9)
    hessian = jax.jit(jax.hessian(loss))(jnp.asarray(X[0]))
    step = 1e-5 * np.eye(N)
    rows = [(expected(X[:1] + e)[0] - expected(X[:1] - e)[0]) / 2e-5 for e in step]
    np.testing.assert_allclose(hessian, np.stack(rows), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_check_finds_a_wrong_jacobian(sparse: bool) -> None:
    m = 0.1 * np.random.default_rng(0).normal(size=(4, 4))
    for wrong in (1.0, 1.01):
        given = scipy.sparse.csr_array(wrong * m) if sparse else wrong * m
        problem = ic.Problem(lambda h, z: m @ h + z, vjp=lambda h, z, v: (m.T @ v, v), jacobian=lambda h, z: given)  # noqa: B023  # used at once
        texts = [finding.text for finding in ic.check(problem, np.ones(4), np.ones(4)).findings]
        assert any("the jacobian with respect to h differs" in text for text in texts) == (wrong != 1)
        assert texts or wrong == 1
        root = ic.RootProblem(lambda x, z: x - m @ x - z, jacobian=lambda x, z: np.eye(4) - given, g_scale=2.0)  # noqa: B023  # used at once
        form = root.fixed_point_form(np.ones(4), np.ones(4))
        kinds = [finding.kind for finding in ic.check(form, np.ones(4), np.ones(4)).findings]
        assert ("derivatives" in kinds) == (wrong != 1)


@pytest.mark.parametrize(
    ("result", "batch_ndim", "error", "message"),
    [
        (np.eye(3), 0, ValueError, r"result of jacobian must have the shape \(2, 2\), got \(3, 3\)"),
        (np.eye(2), 1, ValueError, r"result of jacobian must have the shape \(2, 1, 1\), got \(2, 2\)"),
        ([[1.0]], 0, TypeError, "jacobian must return an array of numpy"),
        (scipy.sparse.eye_array(2), 1, TypeError, "sparse result of jacobian is for NumPy, and for one system"),
        (scipy.sparse.linalg.aslinearoperator(np.eye(2)), 0, TypeError, "got MatrixLinearOperator: give its products"),
        (np.ma.array(np.eye(2), mask=np.eye(2)), 0, TypeError, "result of jacobian must not be or hold .* masked"),
        (np.eye(2).view(np.matrix), 0, TypeError, r"numpy.matrix, .* write np.asarray\(x\)"),
    ],
)
def test_another_result_is_refused(result: Any, batch_ndim: int, error: type[Exception], message: str) -> None:
    problem = ic.Problem(lambda h, z: 0.5 * h, jacobian=lambda h, z: result, batch_ndim=batch_ndim)
    with pytest.raises(error, match=message):
        ic.solve(problem, np.ones(2), None, solver=ic.Newton())


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        ({"a": {"a": torch.eye(2)}}, TypeError, "a pytree of blocks, one for each pair of leaves of h0"),
        ([[torch.eye(2)] * 2] * 2, TypeError, "a pytree of blocks, one for each pair of leaves of h0"),
        ({k: dict.fromkeys("ab", torch.eye(2)) for k in "ab"}, ValueError, r"block \(0, 1\) .* \(2, 1\), got \(2, 2\)"),
        (torch.eye(3).to_sparse(), TypeError, r"layout torch.sparse_coo, .* write x.to_dense\(\)"),
    ],
)
def test_other_blocks_are_refused(result: Any, error: type[Exception], message: str) -> None:
    problem = ic.Problem(lambda h, z: {k: 0.5 * x for k, x in h.items()}, jacobian=lambda h, z: result)
    with pytest.raises(error, match=message):
        ic.solve(problem, {"a": torch.ones(2), "b": torch.ones(1)}, None, solver=ic.Newton())


def test_a_singular_matrix_does_not_change_the_gradient() -> None:
    """It is wrong; the products of autodiff are right."""
    matrix = jnp.diag(jnp.asarray([1.0, 1.0, 0.0]))
    problem = ic.RootProblem(lambda x, z: x**3 + 2 * x - z, jacobian=lambda x, z: matrix)
    z = jnp.asarray([1.0, 2.0, 3.0])

    def total(z: Any) -> Any:
        return ic.root(problem, jnp.zeros(3), z, solver=ic.Anderson(rtol=1e-10)).value.sum()

    root = ic.root(lambda x, z: x**3 + 2 * x - z, jnp.zeros(3), z, solver=ic.Newton(rtol=1e-10)).value
    np.testing.assert_allclose(jax.grad(total)(z), 1 / (3 * root**2 + 2), rtol=1e-4)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_sparse_system_goes_on_by_pseudo_transient_continuation(seed: int, sign: float) -> None:
    """A long implicit Euler step of Schnakenberg's system from noise, at which every line search fails."""
    step = sparse_reaction_diffusion.implicit_euler(10, 1e-3)
    before = np.random.default_rng(seed).normal(size=(2, 10, 10))
    z = before, np.full((10, 10), 0.1)
    problem = ic.RootProblem(lambda w, z: sign * step.f(w, z), jacobian=lambda w, z: sign * step.jacobian(w, z))  # type: ignore[misc]  # it has one
    solution = ic.solve(problem, before, z, solver=ic.Newton(rtol=1e-10, max_steps=200))
    assert solution.converged
    assert np.linalg.norm(step.f(solution.value, z)) <= 1e-10 * np.linalg.norm(step.f(before, z))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_regularized_steps(sign: float) -> None:
    """Of least ‖A d - r‖² + s² ‖d‖² for each sample, also of a singular A; with A ± s I if it is sparse."""
    space = ic.Problem(lambda h, z: h, batch_ndim=1).space(X, "h0")
    a, shift = np.stack([W + np.eye(N), np.ones((N, N)), np.zeros((N, N))]), np.asarray([[0.1], [0.3], [2.0]])
    step, left = DenseJacobian(np.swapaxes(a, 1, 2), a).regularized(space, space.pack(X), shift)
    for i in range(BATCH):
        stacked, right = np.vstack([a[i], shift[i] * np.eye(N)]), np.concatenate([X[i], np.zeros(N)])
        expected = np.linalg.lstsq(stacked, right, rcond=None)[0]
        np.testing.assert_allclose(step[0][i], expected, atol=1e-13)
        np.testing.assert_allclose(left[i, 0], np.linalg.norm(a[i] @ expected - X[i]), atol=1e-13)
    one = ic.Problem(lambda h, z: h).space(X[0], "h0")
    matrix = sign * a[0]
    (found,), _ = SparseJacobian(scipy.sparse.csc_array(matrix)).regularized(one, one.pack(X[0]), shift[:1])
    np.testing.assert_allclose(found[0], np.linalg.solve(matrix + sign * 0.1 * np.eye(N), X[0]), rtol=1e-10)


@pytest.mark.parametrize(("slope", "status"), [(np.nan, ic.Status.NONFINITE), (0.0, ic.Status.STAGNATED)])
def test_a_jacobian_that_leads_nowhere_ends_a_sample_at_once(slope: float, status: ic.Status) -> None:
    """Beside a sample that goes on; sparse matrices have one sample."""
    start, wrong = np.asarray([[0.5], [2.0]]), np.asarray([[[slope]], [[0.0]]])
    problem = ic.RootProblem(
        lambda x, z: x**2 - 1, jacobian=lambda x, z: 2 * x[..., None] * (x[..., None] > 1) + wrong, batch_ndim=1
    )
    solution = ic.solve(problem, start, None, solver=ic.Newton(rtol=1e-9))
    assert solution.status.tolist() == [status, ic.CONVERGED]
    assert solution.stats.steps[0] == 1
    np.testing.assert_allclose(solution.value, [[0.5], [1.0]])
    sparse = ic.RootProblem(lambda x, z: x**2 - 1, jacobian=lambda x, z: scipy.sparse.csc_array(wrong[0]))
    alone = ic.solve(sparse, start[0], None, solver=ic.Newton())
    assert (alone.status, alone.stats.evaluations) == (status, 1)
    krylov = ic.solve(problem, start, None, solver=ic.NewtonKrylov(rtol=1e-9))
    assert krylov.status.tolist() == [ic.STAGNATED, ic.CONVERGED]
    assert krylov.stats.steps[0] == 1


def uneven(x: Any, z: Any) -> Any:
    """Two equations for each sample, the second of them tiny."""
    return np.stack([x[:, 0] - 1, 1e-17 * (x[:, 1] ** 3 - 8)], axis=1)


def uneven_jacobian(x: Any, z: Any) -> Any:
    made = np.zeros((len(x), 2, 2))
    made[:, 0, 0], made[:, 1, 1] = 1.0, 3e-17 * x[:, 1] ** 2
    return made


@pytest.mark.parametrize("neighbour", [[1.0, 2.0], [np.nan, 2.0], [1.0, 0.0]], ids=["finished", "NaN", "singular"])
@pytest.mark.parametrize("solver", [ic.Newton(rtol=1e-9, atol=0.0), ic.Broyden(rtol=1e-9, atol=0.0)], ids=repr)
def test_a_singular_jacobian_of_a_neighbour_changes_nothing(solver: Any, neighbour: list[float]) -> None:
    """NumPy's linear algebra raises for the whole batch if one matrix is singular."""
    problem = ic.RootProblem(uneven, jacobian=uneven_jacobian, batch_ndim=1)
    alone = ic.solve(problem, np.array([[1.0, 3.0]]), None, solver=solver)
    solution = ic.solve(problem, np.array([[1.0, 3.0], neighbour]), None, solver=solver)
    assert solution.status[0] == alone.status[0] == ic.CONVERGED
    np.testing.assert_array_equal(solution.value[0], alone.value[0])
    assert solution.stats.steps[0] == alone.stats.steps[0]


def two_cubics(x: Any, z: Any) -> Any:
    """Of the second sample a singular linear system, whose numbers are huge."""
    first = np.stack([x[:1, 0] ** 3 - 2 * x[:1, 0] + 2, x[:1, 1] - 1], axis=1)
    return np.concatenate([first, x[1:] @ HUGE.T - HUGE @ np.array([3.0, 0.0])])


HUGE = np.array([[-3e19, -6e19], [4e19, 8e19]])


def two_jacobians(x: Any, z: Any) -> Any:
    first = np.array([[3 * x[0, 0] ** 2 - 2, 0.0], [0.0, 1.0]])
    return np.stack([first, *len(x[1:]) * [HUGE]])


@pytest.mark.parametrize("start", [1.5, 0.5])
def test_regularized_steps_do_not_depend_on_a_neighbour(start: float) -> None:
    problem = ic.RootProblem(two_cubics, jacobian=two_jacobians, batch_ndim=1)
    solver = ic.Newton(rtol=1e-9, max_steps=200)
    alone = ic.solve(problem, np.array([[start, 3.0]]), None, solver=solver)
    solution = ic.solve(problem, np.array([[start, 3.0], [0.0, 0.0]]), None, solver=solver)
    assert solution.status[0] == alone.status[0] == ic.CONVERGED
    assert solution.stats.steps[0] == alone.stats.steps[0] > solution.stats.steps[1]


@pytest.mark.parametrize("solver", [ic.Newton(rtol=1e-6), ic.NewtonKrylov(rtol=1e-6)], ids=repr)
def test_a_tiny_unknown_in_float32_has_steps(solver: Any) -> None:
    """The squares of its steps are zero."""
    unit = np.float32(1e-22)
    problem = ic.RootProblem(
        lambda x, z: (x / unit) ** 3 - np.float32(8),
        jvp=lambda x, z, dx, dz: 3 * (x / unit) ** 2 * (dx / unit),
    )
    solution = ic.solve(problem, np.array([3e-22], np.float32), None, solver=solver)
    assert solution.converged
    np.testing.assert_allclose(solution.value, [2e-22], rtol=1e-6)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
@pytest.mark.parametrize("solver", [ic.Newton(), ic.Polyalgorithm()], ids=repr)
def test_nothing_is_unknown(solver: Any, wrap: Any) -> None:
    solution = wrap(lambda x: ic.solve(ic.RootProblem(lambda x, z: x**2), x, None, solver=solver))(jnp.zeros((0,)))
    assert solution.value.shape == (0,)


def test_a_last_trial_that_is_not_finite_says_nothing_of_the_best_point() -> None:
    """The whole step from 1 leaves the domain; no step is left to undo it."""
    problem = ic.RootProblem(
        lambda x, z: np.where(x > 0, np.sqrt(np.abs(x)) - 0.1, np.nan), jvp=lambda x, z, dx, dz: dx / (2 * np.sqrt(x))
    )
    for solver in (ic.Newton(max_steps=2), ic.NewtonKrylov(max_steps=2)):
        solution = ic.solve(problem, np.array([1.0]), None, solver=solver)
        assert solution.status == ic.MAX_STEPS
        np.testing.assert_array_equal(solution.value, [1.0])


def test_complex_matrices_are_refused() -> None:
    problem = ic.RootProblem(lambda x, z: x - 1, jacobian=lambda x, z: np.eye(2) * (1 + 5j))
    with pytest.raises(TypeError, match="the result of jacobian must be real, got the dtype complex128"):
        ic.solve(problem, np.zeros(2), None, solver=ic.Newton())
