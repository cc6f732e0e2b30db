"""JAX's strict settings: every solver and every estimator works under them, and their numbers stay right.

What a flag asks for is what the library has to keep to at every operation of its own: no rank and no dtype is promoted,
no NaN and no infinity is made, no tracer leaks, nothing is wider than the inputs.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import libraries  # noqa: F401  # configures JAX
import numpy as np
import pytest
from jax.experimental import checkify

import implicit_core as ic
from implicit_core.adapters import jax as icj
from implicit_core.theory import certify, contraction, spectral_radius

pytestmark = pytest.mark.slow

Gradients = tuple[Any, tuple[Any, Any]]


# The oracle, in NumPy: h = tanh(W h + x), for samples that are finished at different steps; the first starts at its
# root, where the residual is zero.

W = np.array([[0.3, -0.4], [0.2, 0.1]])
X = np.array([[0.0, 0.0], [0.7, -0.2], [0.1, 2.0]])
V = np.array([[1.0, 2.0], [-0.5, 1.0], [0.3, -1.0]])
"""The cotangent."""


def root() -> np.ndarray:
    h = np.zeros_like(X)
    for _ in range(200):
        h = np.tanh(h @ W.T + X)
    return h


def series(k: int, lam: float) -> Callable[[np.ndarray], np.ndarray]:
    """D = λ Σ Bᵗ over t < k, with B = λ J + (1 - λ) I (Eq. 18)."""

    def inverse(j: np.ndarray) -> np.ndarray:
        b = lam * j + (1 - lam) * np.eye(len(j))
        return lam * sum(np.linalg.matrix_power(b, t) for t in range(k))

    return inverse


def exact(j: np.ndarray) -> np.ndarray:
    """D = (I - J)⁻¹ (Eq. 4)."""
    return np.linalg.inv(np.eye(len(j)) - j)


def expected(inverse: Callable[[np.ndarray], np.ndarray], samples: Any) -> Gradients:
    """The root of some samples, and the gradients of ⟨V, h⟩ with respect to W and to x."""
    h, v = root()[samples], V[samples]
    slope = 1 - h**2
    jacobians = slope[:, :, None] * W
    w = np.stack([inverse(j).T @ each for j, each in zip(jacobians, v, strict=True)]) * slope
    return h, (w.T @ h, w)


ESTIMATORS: dict[str, tuple[ic.Estimator, Callable[[np.ndarray], np.ndarray]]] = {
    "one step": (ic.OneStep(), series(1, 1.0)),
    "Neumann": (ic.Neumann(4, 0.7, on_growth="nan"), series(4, 0.7)),
    "series": (ic.NeumannSeries(lam=1.0, rtol=1e-8), exact),
    "unrolled": (ic.Unroll(4, 0.7, on_growth="nan"), series(4, 0.7)),
    "implicit": (ic.Implicit(ic.GMRES(rtol=1e-10)), exact),
    "BPTT": (ic.BPTT(40, on_growth="nan"), exact),
}
SOLVERS = {
    "fixed point": ic.FixedPointIteration(damping=0.9),
    "Anderson": ic.Anderson(memory=2),
    "Broyden": ic.Broyden(memory=4),
    "Newton": ic.NewtonKrylov(),
}


# The settings.


@contextlib.contextmanager
def checked() -> Iterator[None]:
    """Nothing is promoted (which is so in all tests), and NaN and infinity raise, where an operation makes them."""
    ranks, dtypes = jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict")
    with ranks, dtypes, jax.debug_nans(True), jax.debug_infs(True):
        yield


@contextlib.contextmanager
def without_x64() -> Iterator[None]:
    with jax.enable_x64(False):
        yield


SETTINGS: dict[str, tuple[Callable[[], Any], float, float]] = {
    "checked": (checked, 1e-10, 1e-7),
    "leaks": (jax.checking_leaks, 1e-10, 1e-7),
    "float32": (without_x64, 1e-6, 2e-4),
}
"""A context, the rtol of the solve, and the accuracy of its results."""


def test_the_settings_are_on() -> None:
    """The flags raise at what they are for, so a test within them can fail."""
    one, zero = jnp.ones(2), jnp.zeros(2)
    quotient = jax.jit(lambda x, y: x / y)
    quotient(one, one)
    with pytest.raises(ValueError, match="rank_promotion"):
        jnp.ones((2, 2)) + one
    with pytest.raises(jax.dtypes.TypePromotionError):
        one + jnp.arange(2)
    with checked():
        for divide in (quotient, lambda x, y: x / y):
            divide(one, one)
            with pytest.raises(FloatingPointError):
                divide(zero, zero)
            with pytest.raises(FloatingPointError):
                divide(one, zero)
    with without_x64():
        assert jnp.asarray(X).dtype == jnp.float32
    kept = []
    with jax.checking_leaks(), pytest.raises(Exception, match="Leaked"):
        jax.jit(lambda x: kept.append(x + 1) or x)(one)


def gradients(solver: ic.Solver, estimator: ic.Estimator, rtol: float, h0: Any = None) -> Callable[[Any, Any], Any]:
    """The value, and the gradient of ⟨V, h⟩, as functions of W and of x and V."""
    solver = type(solver)(**{**vars(solver), "rtol": rtol, "max_steps": 60})

    def loss(w: Any, x: Any, v: Any) -> Any:
        start = jnp.zeros_like(x) if h0 is None else h0
        layer = ic.fixed_point(
            lambda h, z: jnp.tanh(h @ z[0].T + z[1]), start, (w, x), solver=solver, gradient=estimator, batch_ndim=1
        )
        return jnp.sum(v * layer.value), (layer.value, layer.status)

    def both(w: Any, xv: Any) -> Any:
        (_, (value, status)), found = jax.value_and_grad(loss, (0, 1), has_aux=True)(w, *xv)
        return value, found, status

    return both


def assert_equal(found: Any, wanted: Gradients, atol: float) -> None:
    value, (by_w, by_x), status = found
    assert np.all(np.asarray(status) == ic.CONVERGED)
    np.testing.assert_allclose(value, wanted[0], atol=atol, rtol=0)
    np.testing.assert_allclose(by_x, wanted[1][1], atol=atol, rtol=0)
    np.testing.assert_allclose(by_w, wanted[1][0], atol=atol, rtol=0)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_values_and_gradients(setting: str, solver: str, estimator: str) -> None:
    context, rtol, atol = SETTINGS[setting]
    gradient, inverse = ESTIMATORS[estimator]
    with context():
        both = gradients(SOLVERS[solver], gradient, rtol)
        w, xv = jnp.asarray(W), (jnp.asarray(X), jnp.asarray(V))
        every = expected(inverse, slice(None))
        assert_equal(both(w, xv), every, atol)
        assert_equal(jax.jit(both)(w, xv), every, atol)
        mapped = jax.vmap(both, (None, 0))(w, jax.tree.map(lambda a: a[:, None, :], xv))
        for i in range(len(X)):
            assert_equal(jax.tree.map(lambda a, i=i: np.asarray(a)[i], mapped), expected(inverse, [i]), atol)


@pytest.mark.parametrize("solver", SOLVERS)
def test_starts_of_numpy_in_double_precision_are_cast(solver: str) -> None:
    gradient, inverse = ESTIMATORS["implicit"]
    with without_x64():
        found = gradients(SOLVERS[solver], gradient, 1e-6, np.zeros_like(X))(jnp.asarray(W), (jnp.asarray(X), V))
        assert found[0].dtype == found[1][0].dtype == jnp.float32
        assert_equal(found, expected(inverse, slice(None)), 2e-4)


LINEAR = {
    "CG": ic.CG(rtol=1e-10),
    "BiCGSTAB": ic.BiCGSTAB(rtol=1e-10),
    "Richardson": ic.Richardson(rtol=1e-10),
    "GMRES restarted": ic.GMRES(restart=1, rtol=1e-10),
}


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_linear_solvers_make_no_nan(name: str, jit: bool) -> None:
    """Of a batch with one right-hand side that is zero, and one in the direction of an eigenvector."""
    a = np.array([[2.0, 0.5], [0.5, 1.0]])
    b = np.array([[0.0, 0.0], np.linalg.eigh(a)[1][0], [1.0, 3.0]])
    with checked():
        solve = lambda b: ic.solve_linear(  # noqa: E731
            lambda v: 0.5 * v @ jnp.asarray(a), b, solver=LINEAR[name], batch_ndim=1
        )
        solution = (jax.jit(solve) if jit else solve)(jnp.asarray(b))
        assert np.all(np.asarray(solution.status) == ic.CONVERGED)
    np.testing.assert_allclose(solution.value, 2 * np.linalg.solve(a, b.T).T, atol=1e-8)


MORE = {
    "one term": (ic.NeumannSeries(1.0, rtol=10.0, max_terms=1, contraction=0.5), series(1, 1.0)),
    "terms to a bound": (ic.NeumannSeries(1.0, rtol=1e-9, contraction=0.8), exact),
    "recomputed": (ic.Unroll(4, 0.7, recompute=True), series(4, 0.7)),
    "NaN on failure": (ic.Implicit(ic.BiCGSTAB(rtol=1e-10), on_failure="nan"), exact),
    "warning": (ic.Implicit(ic.Richardson(rtol=1e-10), on_failure="warn"), exact),
}


@pytest.mark.parametrize("estimator", MORE)
def test_other_settings_of_an_estimator_make_no_nan(estimator: str) -> None:
    gradient, inverse = MORE[estimator]
    with checked():
        found = gradients(ic.Anderson(memory=2), gradient, 1e-10)(jnp.asarray(W), (jnp.asarray(X), jnp.asarray(V)))
        assert_equal(found, expected(inverse, slice(None)), 1e-7)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_derivatives_that_are_called_directly(estimator: str) -> None:
    """Outside of a layer nothing of an estimator is compiled, so JAX looks at each of its operations."""
    gradient, inverse = ESTIMATORS[estimator]
    h, (by_w, by_x) = expected(inverse, slice(None))
    problem = icj.problem(lambda h, z: jnp.tanh(h @ z[0].T + z[1]), batch_ndim=1)
    start = np.zeros_like(h) if gradient.starts_from_h0 else h
    with checked():
        z = jnp.asarray(W), jnp.asarray(X)
        value, pullback = gradient.vjp(problem, jnp.asarray(start), z)
        found = pullback(jnp.asarray(V))
        _, tangent = gradient.jvp(problem, jnp.asarray(start), z, z)
        np.testing.assert_allclose(value, h, atol=1e-12)
        np.testing.assert_allclose(found[0], by_w, atol=1e-7)
        np.testing.assert_allclose(found[1], by_x, atol=1e-7)
        np.testing.assert_allclose(np.sum(V * tangent), np.sum(by_w * W) + np.sum(by_x * X), atol=1e-7)


@pytest.mark.parametrize("gradient", [ic.Implicit(), ic.NeumannSeries(), ic.Neumann(4)], ids=repr)
def test_no_nan_is_made_within_compiled_programs(gradient: ic.Estimator) -> None:
    """`jax_debug_nans` sees only the results of a program; `checkify` sees every operation in it."""
    for solver in SOLVERS.values():
        both = checkify.checkify(gradients(solver, gradient, 1e-10), errors=checkify.nan_checks | checkify.div_checks)
        error, _ = jax.jit(both)(jnp.asarray(W), (jnp.asarray(X), jnp.asarray(V)))
        error.throw()


# Samples that end early, forced steps, and samples that go on.


def one_of_three(array: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    """F of three samples: one converges, one turns for ever, one grows."""
    m = array(np.stack([0.1 * np.eye(2), [[0.0, 1.0], [-1.0, 0.0]], 3.0 * np.eye(2)]))
    return lambda h, z: (h[:, None, :] @ m)[:, 0, :] + z


def test_samples_that_end_early_make_no_nan() -> None:
    """A sample that was ended has a mark, which is no NaN."""
    solver = ic.FixedPointIteration(max_steps=300)
    with checked():
        solution = ic.solve(one_of_three(jnp.asarray), jnp.zeros((3, 2)), jnp.ones((3, 2)), solver=solver, batch_ndim=1)
        status, steps = solution.status.tolist(), solution.stats.steps.tolist()
    assert status == [ic.CONVERGED, ic.STAGNATED, ic.DIVERGED]
    plain = ic.solve(one_of_three(np.asarray), np.zeros((3, 2)), np.ones((3, 2)), solver=solver, batch_ndim=1)
    assert steps == plain.stats.steps.tolist()


FORCED = {"rtol": 0.0, "atol": 0.0, "max_steps": 9}


@pytest.mark.parametrize("settings", [FORCED, {"freeze": False}, {"check_every": 4}], ids=["forced", "free", "every 4"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_other_settings_of_a_solver_make_no_nan(solver: str, settings: dict[str, Any]) -> None:
    """A forced number of steps goes on at a root, where steps of zero length are made."""
    made = type(SOLVERS[solver])(**{**vars(SOLVERS[solver]), **settings})
    with checked():
        z = (jnp.asarray(W), jnp.asarray(X))
        solution = ic.solve(lambda h, z: jnp.tanh(h @ z[0].T + z[1]), jnp.zeros(X.shape), z, solver=made, batch_ndim=1)
        np.testing.assert_allclose(solution.value, root(), atol=1e-3)


# Residuals of finished samples are NaN in a trace, which is no mistake.


def traced(solver: Any, array: Callable[[Any], Any], xp: Any) -> Any:
    z = (array(W), array(X))
    return ic.solve(
        lambda h, z: xp.tanh(h @ z[0].T + z[1]), array(np.zeros_like(X)), z, solver=solver, batch_ndim=1, trace=True
    ).stats


@pytest.mark.parametrize(
    "solver",
    [ic.FixedPointIteration(), ic.Anderson(), ic.Broyden(), ic.Compacting(ic.Anderson(), batched=(False, True))],
    ids=lambda solver: type(solver).__name__,
)
def test_a_trace_has_nan_where_a_sample_was_finished(solver: Any) -> None:
    plain = traced(solver, np.asarray, np)
    with checked():
        stats = traced(solver, jnp.asarray, jnp)
        found, steps = np.asarray(stats.trace), np.asarray(stats.steps)
    assert found.shape == (100, 3)
    np.testing.assert_array_equal(np.isnan(found), np.arange(100)[:, None] >= steps)
    np.testing.assert_array_equal(steps, plain.steps)
    np.testing.assert_allclose(found, plain.trace, rtol=1e-4, atol=1e-12)


def test_a_trace_under_transformations() -> None:
    """Mapped, within a gradient, and within a compiled program that returns what it makes of it."""

    def trace(w: Any, x: Any) -> Any:
        f = lambda h, z: jnp.tanh(h @ z[0].T + z[1])  # noqa: E731
        solution = ic.fixed_point(f, jnp.zeros_like(x), (w, x), batch_ndim=x.ndim - 1, trace=True)
        return jnp.sum(solution.value), solution.stats.trace

    w, x = jnp.asarray(W), jnp.asarray(X)
    with jax.debug_nans(False):
        plain = np.asarray(trace(w, x)[1])
    with checked():
        mapped = np.asarray(jax.vmap(trace, (None, 0))(w, x)[1])
        within = np.asarray(jax.grad(trace, has_aux=True)(w, x)[1])
        largest = np.asarray(jax.jit(lambda w, x: jnp.nanmax(trace(w, x)[1], axis=0))(w, x))
        with pytest.raises(FloatingPointError):  # the NaN in a result of a compiled program cannot be told apart
            jax.jit(trace)(w, x)
    for found, expected in ((mapped.T, plain), (within, plain), (largest, np.nanmax(plain, axis=0))):
        np.testing.assert_allclose(found, expected, atol=1e-9)  # other programs, which may round otherwise


# What makes NaN on purpose.


@pytest.mark.parametrize("estimator", [ic.Neumann(6, 1.0, "nan"), ic.Unroll(6, 1.0, on_growth="nan")], ids=repr)
def test_a_gradient_that_grows_is_found_by_the_flag(estimator: ic.Estimator) -> None:
    """One step of size 4 away from the root in one sample, and a contraction in the other."""
    slopes = jnp.asarray([[0.5], [-4.0]])

    def total(z: Any) -> Any:
        layer = ic.fixed_point(
            lambda h, z: slopes * h + z, jnp.zeros_like(z), z, solver=ic.NewtonKrylov(), gradient=estimator,
            batch_ndim=1,
        )  # fmt: skip
        return jnp.sum(layer.value[:, :1])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = np.asarray(jax.grad(total)(jnp.zeros((2, 1))))
        assert np.isnan(found).tolist() == [[False], [True]]
        with checked(), pytest.raises(FloatingPointError):
            jax.grad(total)(jnp.zeros((2, 1)))


def test_estimates_of_the_jacobian_make_no_nan() -> None:
    w, x, h = (jnp.asarray(a) for a in (W, X, root()))
    jacobians = (1 - root() ** 2)[:, :, None] * W
    f = lambda h, z: jnp.tanh(h @ z[0].T + z[1])  # noqa: E731
    radius = functools.partial(spectral_radius, f, batch_ndim=1, steps=400)
    norm = functools.partial(contraction, f, batch_ndim=1, steps=100)
    with checked():
        for make in (lambda g: g, jax.jit):
            np.testing.assert_allclose(make(norm)(h, (w, x)), np.linalg.norm(jacobians, 2, axis=(1, 2)), rtol=1e-6)
            moduli = np.abs(np.linalg.eigvals(jacobians)).max(axis=1)
            np.testing.assert_allclose(make(radius)(h, (w, x)), moduli, rtol=2e-2)
        single = jax.vmap(lambda h, x: contraction(f, h[None], (w, x[None]), batch_ndim=1, steps=100)[0])
        np.testing.assert_allclose(single(h, x), np.linalg.norm(jacobians, 2, axis=(1, 2)), rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("scale", [None, 8.0], ids=["", "scale"])
def test_half_precision(dtype: Any, scale: Any) -> None:
    x = jnp.asarray(X, dtype)
    with checked():
        for solver in SOLVERS.values():
            for gradient, inverse in (ESTIMATORS["implicit"], ESTIMATORS["Neumann"]):

                def total(w: Any, x: Any, solver: Any = solver, gradient: Any = gradient) -> Any:
                    layer = ic.fixed_point(
                        lambda h, z: jnp.tanh(h @ z[0].T + z[1]),
                        jnp.zeros_like(x),
                        (w, x),
                        solver=solver,
                        gradient=gradient,
                        batch_ndim=1,
                        scale=scale,
                    )
                    return jnp.sum(jnp.asarray(V, dtype) * layer.value)

                by_w, by_x = jax.grad(total, (0, 1))(jnp.asarray(W, dtype), x)
                _, (wanted_w, wanted_x) = expected(inverse, slice(None))
                np.testing.assert_allclose(np.asarray(by_x, float), wanted_x, atol=0.05)
                np.testing.assert_allclose(np.asarray(by_w, float), wanted_w, atol=0.05)


@pytest.mark.parametrize("gradient", [ic.Neumann(3, 0.5), ic.Implicit(), ic.Unroll(3, 0.5)], ids=repr)
def test_a_certificate_makes_no_nan(gradient: ic.Estimator) -> None:
    """But its result may hold NaN, where no bound is known."""
    problem = icj.problem(lambda h, z: jnp.tanh(h @ z[0].T + z[1]), batch_ndim=1)
    h, z, v = jnp.asarray(root()), (jnp.asarray(W), jnp.asarray(X)), jnp.asarray(V)
    plain = certify(problem, h, z, gradient, cotangent=v)
    with checked():
        found = certify(problem, h, z, gradient, cotangent=v)
    jacobians = (1 - root() ** 2)[:, :, None] * W
    np.testing.assert_allclose(found.contraction.value, np.linalg.norm(jacobians, 2, axis=(1, 2)), rtol=1e-9)
    np.testing.assert_allclose(found.spectral_radius, np.abs(np.linalg.eigvals(jacobians)).max(axis=1), rtol=1e-9)
    assert str(found) == str(plain)
    assert np.isnan(np.asarray(found.error_bound)).all() == isinstance(gradient, ic.Implicit)
