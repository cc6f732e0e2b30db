"""``NeumannSeries``: each sample gets as many terms as the requested accuracy needs."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from libraries import Library, flat
from problems import Case, layer

import implicit_core as ic
from implicit_core.estimators.base import on_states
from implicit_core.registry import find_backend

SOLVER = ic.Anderson(rtol=1e-13, atol=1e-13, max_steps=300)


def slopes(*slope: float) -> ic.Problem:
    """h = s h + z, a slope s for each sample."""
    s = np.asarray(slope)[:, None]
    return ic.Problem(
        lambda h, z: s * h + z,
        vjp=lambda h, z, v: (s * v, v),
        jvp=lambda h, z, dh, dz: s * dh + dz,
        batch_ndim=1,
    )


def root_of(case: Case) -> Any:
    return ic.solve(case.problem(), case.h0, case.z, solver=SOLVER).value


def inverse(estimator: ic.NeumannSeries, jacobian: Any, v: np.ndarray) -> np.ndarray:
    """D v, for one sample."""
    space = find_backend(v).space(v, 0)
    return space.unpack(estimator.inverse(space, on_states(jacobian, space, space), space.pack(v)))


def test_the_accuracy_is_the_requested_one() -> None:
    """500 random contractions: the relative error of (I - J)⁻¹ v is below rtol in all but some in a thousand.

    What is left out is estimated, not bounded: none is further off than five times.
    """
    shares = []
    for seed in range(500):
        rng = np.random.default_rng(seed)
        n = int(rng.integers(1, 30))
        m = rng.normal(size=(n, n))
        m = [m, m + m.T, np.triu(m), m - m.T][seed % 4]
        m *= rng.uniform(0.05, 0.97) / max(np.linalg.norm(m, 2), 1e-300)
        rtol, v = 10 ** rng.uniform(-8, -1), rng.normal(size=n)
        estimator = ic.NeumannSeries(lam=float(rng.uniform(0.1, 1.0)), rtol=rtol, max_terms=5000)
        w, exact = inverse(estimator, lambda w, m=m: m @ w, v), np.linalg.solve(np.eye(n) - m, v)
        shares.append(np.linalg.norm(w - exact) / np.linalg.norm(exact) / rtol)
    assert np.mean(np.asarray(shares) > 1) <= 0.004
    assert max(shares) < 5
    assert np.median(shares) > 0.1  # and it is not much more accurate than requested


def test_it_costs_as_much_as_a_fixed_number_of_terms(library: Library) -> None:
    """k terms cost one F, k - 1 h-VJPs and one z-VJP, and their sum equals Neumann(k), Eq. (18)."""
    case = layer(batch=1)
    h, z, v = library.array(root_of(case)), library.array(case.z), library.array(np.ones((1, 6)))
    problem = case.linearized(library)
    pullback = ic.NeumannSeries(lam=0.7, rtol=1e-4).vjp(problem, h, z)[1]
    gradient = library.numpy(pullback(v))
    k = case.counts["vjp_h"] + 1
    assert case.counts == {"f": 1, "vjp_h": k - 1, "vjp_z": 1}
    assert 5 < k < 60
    fixed = library.numpy(ic.Neumann(k, 0.7).vjp(problem, h, z)[1](v))
    np.testing.assert_allclose(flat(gradient), flat(fixed), rtol=1e-12)


def test_every_sample_ends_by_itself(library: Library) -> None:
    """A sample's gradient is bit-identical whatever the other samples hold; a fast sample gets no further terms."""
    case = layer(batch=3, contraction=0.9)
    case = replace(case, z=case.z | {"x": case.z["x"] * np.asarray([[0.0], [1.0], [5.0]])})
    h, v = root_of(case), np.random.default_rng(0).normal(size=case.h0.shape)
    estimator = ic.NeumannSeries(lam=1.0, rtol=1e-3)

    def gradient(rows: slice) -> np.ndarray:
        z = library.array(case.z | {"x": case.z["x"][rows]})
        pullback = estimator.vjp(case.problem(library), library.array(h[rows]), z)[1]
        return library.numpy(pullback(library.array(v[rows])))["x"]

    together = gradient(slice(None))
    for i in range(3):
        np.testing.assert_allclose(together[i : i + 1], gradient(slice(i, i + 1)), rtol=1e-12, atol=1e-15)
    problem = slopes(0.1, 0.9)
    w = estimator.vjp(problem, np.zeros((2, 3)), np.zeros((2, 3)))[1](np.ones((2, 3)))
    assert 1e-6 < abs(w[0, 0] - 1 / 0.9) * 0.9 < 1e-3
    assert 1e-6 < abs(w[1, 0] - 10.0) / 10 < 1e-3


def test_a_divergent_series_is_reported_and_changes_no_other_sample() -> None:
    estimator = ic.NeumannSeries(lam=1.0, max_terms=30)
    problem, z, v = slopes(0.5, -1.5, 0.25), np.zeros((3, 2)), np.ones((3, 2))
    with pytest.warns(ic.InexactGradientWarning, match=r"MAX_STEPS in 1 of 3 samples \(1\).*max_terms, which is 30"):
        w = estimator.vjp(problem, z, z)[1](v)
    np.testing.assert_allclose(w[[0, 2]], [[2.0, 2.0], [4 / 3, 4 / 3]], rtol=1e-3)
    alone = estimator.vjp(slopes(0.5, 0.25), z[:2], z[:2])[1](v[:2])
    np.testing.assert_array_equal(w[[0, 2]], alone)
    # A damped series converges if the spectral radius of B is below 1.
    damped = ic.NeumannSeries(lam=0.6).vjp(problem, z, z)[1](v)
    np.testing.assert_allclose(damped[:, 0], [2.0, 0.4, 4 / 3], rtol=1e-3)


@pytest.mark.parametrize("contraction", [None, 0.95])
def test_a_sum_that_overflows_has_not_reached_its_accuracy(contraction: float | None) -> None:
    """Its norm is infinite before that of the next term is: beside it any remainder is small."""
    estimator = ic.NeumannSeries(lam=1.0, rtol=1e-2, contraction=contraction)
    two = np.float32(2.0)
    problem = ic.Problem(lambda h, z: two * h + z, vjp=lambda h, z, v: (two * v, v))
    zero = np.zeros(2, np.float32)
    with pytest.warns(ic.InexactGradientWarning, match="did not reach"):
        estimator.vjp(problem, zero, zero)[1](np.ones(2, np.float32))


def test_cotangents_that_are_zero_tiny_or_not_finite() -> None:
    problem, z, estimator = slopes(0.5, 0.5, 0.5, 0.0), np.zeros((4, 2)), ic.NeumannSeries(lam=1.0, rtol=1e-6)
    v = np.asarray([[0.0, 0.0], [1e-300, 0.0], [np.nan, 1.0], [1.0, 1.0]])
    w = estimator.vjp(problem, z, z)[1](v)
    np.testing.assert_array_equal(w[0], 0.0)
    np.testing.assert_allclose(w[1], [2e-300, 0.0], rtol=1e-6)
    assert np.isnan(w[2, 0])
    np.testing.assert_array_equal(w[3], v[3])


def test_nan_reaches_every_leaf_it_would_by_another_estimator(library: Library) -> None:
    """A cotangent with an entry that is not finite makes its whole sample NaN, so that a gradient scaler sees it."""
    xp = library.xp
    problem = ic.Problem(
        lambda h, z: xp.stack([0.5 * h[0], z[0] * h[0] + z[1]]),
        vjp=lambda h, z, v: (xp.stack([0.5 * v[0] + z[0] * v[1], 0 * v[1]]), xp.stack([h[0] * v[1], v[1]])),
    )
    h, z = library.array(np.asarray([1.0, 1.0])), library.array(np.asarray([0.5, 0.5]))
    for v in ([np.inf, 0.0], [np.nan, 0.0]):
        with np.errstate(invalid="ignore"):
            found = library.numpy(ic.NeumannSeries().vjp(problem, h, z)[1](library.array(np.asarray(v))))
        assert np.all(np.isnan(found))


def slow_and_hidden(slow: float = 0.99, n: int = 2000) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues, one of which decays far more slowly than the others, and a vector with a small component in it."""
    rng = np.random.default_rng(0)
    return np.concatenate([[slow], rng.uniform(0.0, 0.45, size=n - 1)]), np.concatenate(
        [[0.015], rng.normal(size=n - 1)]
    )


def test_a_small_slow_component_is_missed_without_a_bound_and_found_with_one() -> None:
    """As documented: the estimate of the remainder uses the terms only; with a bound of L_h it is a bound."""
    d, v = slow_and_hidden()
    exact = v / (1 - d)

    def error(**options: float) -> float:
        w = inverse(ic.NeumannSeries(1.0, 1e-3, 5000, **options), lambda w: d * w, v)
        return float(np.linalg.norm(w - exact) / np.linalg.norm(exact))

    assert error() > 1e-2
    assert error(contraction=0.99) < 1e-3


def test_with_a_bound_of_the_contraction_the_accuracy_is_certain() -> None:
    """500 random contractions, normal or not, damped or not: no error exceeds rtol times the sum."""
    for seed in range(500):
        rng = np.random.default_rng(seed)
        n, lam, rtol = int(rng.integers(1, 30)), float(rng.uniform(0.1, 1.0)), 10 ** rng.uniform(-8, -0.5)
        m = rng.normal(size=(n, n))
        m = [m, m + m.T, np.triu(m), m - m.T][seed % 4]
        contraction = rng.uniform(0.05, 0.97)
        m *= contraction / max(np.linalg.norm(m, 2), 1e-300)
        v = rng.normal(size=n)
        estimator = ic.NeumannSeries(lam, rtol, 5000, contraction=contraction)
        w, exact = inverse(estimator, lambda w, m=m: m @ w, v), np.linalg.solve(np.eye(n) - m, v)
        assert np.linalg.norm(w - exact) <= rtol * np.linalg.norm(w) * (1 + 1e-6) + 1e-12


def test_a_series_that_overflows_warns_before_numpy_does() -> None:
    problem, z = slopes(0.5, 1e5), np.zeros((2, 1))
    with np.errstate(all="raise"), pytest.warns(ic.InexactGradientWarning, match=r"1 of 2 samples \(1\)"):
        ic.NeumannSeries(1.0, max_terms=500).vjp(problem, z, z)[1](np.ones((2, 1)))


def test_both_modes_are_adjoint_to_the_accuracy() -> None:
    case, estimator = layer(contraction=0.9), ic.NeumannSeries(lam=0.8, rtol=1e-10)
    h, rng = root_of(case), np.random.default_rng(0)
    u, dz = rng.normal(size=h.shape), {name: rng.normal(size=a.shape) for name, a in case.z.items()}
    tangent = estimator.jvp(case.problem(), h, case.z, dz)[1]
    z_bar = estimator.vjp(case.problem(), h, case.z)[1](u)
    assert np.vdot(u, tangent) == pytest.approx(np.vdot(flat(z_bar), flat(dz)), rel=1e-8)


AUTO, EXACT = ic.NeumannSeries(lam=0.8, rtol=1e-11), ic.Implicit(ic.GMRES(rtol=1e-12))


def loss_torch(gradient: ic.Estimator, w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    h = ic.fixed_point(
        lambda h, x: torch.tanh(h @ w.T + x),
        torch.zeros_like(x),
        x,
        gradient=gradient,
        solver=SOLVER,
        batch_ndim=1,
    ).value
    return h.square().sum()


def test_torch_differentiates_it_as_the_solution() -> None:
    """Twice, and under vmap, although each term is read."""
    case = layer()
    w, x = torch.tensor(case.z["w"], requires_grad=True), torch.tensor(case.z["x"])
    found = []
    for gradient in (AUTO, EXACT):
        (first,) = torch.autograd.grad(loss_torch(gradient, w, x), w, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), w)
        found.append((first.detach(), second))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-6, atol=1e-7)
    many = torch.stack([x, 2 * x])
    ours, theirs = (
        torch.func.vmap(torch.func.grad(lambda x, g=gradient: loss_torch(g, w.detach(), x)))(many)
        for gradient in (AUTO, EXACT)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)


def loss_jax(w: jax.Array, x: jax.Array, gradient: ic.Estimator) -> jax.Array:
    h = ic.fixed_point(
        lambda h, x: jnp.tanh(h @ w.T + x), jnp.zeros_like(x), x, gradient=gradient, solver=SOLVER, batch_ndim=1
    ).value
    return jnp.sum(h**2)


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: jax.jit(jax.grad(f), static_argnums=2),
        lambda f: lambda w, x, g: jax.jvp(lambda w: f(w, x, g), (w,), (w,))[1],
        lambda f: lambda w, x, g: jax.jvp(jax.grad(lambda w: f(w, x, g)), (w,), (w,))[1],
        lambda f: lambda w, x, g: jax.vmap(jax.grad(lambda x: f(w, x, g)))(jnp.stack([x, 2 * x])),
    ],
    ids=["jit(grad)", "jvp", "forward over reverse", "vmap(grad)"],
)
def test_jax_transforms_it_as_the_solution(transform: Any) -> None:
    case = layer()
    w, x = jnp.asarray(case.z["w"]), jnp.asarray(case.z["x"])
    ours, theirs = (transform(loss_jax)(w, x, gradient) for gradient in (AUTO, EXACT))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-8)


def test_jax_reports_a_divergent_series_when_it_has_run() -> None:
    z, estimator = jnp.ones(3), ic.NeumannSeries(lam=1.0, max_terms=9)

    def loss(z: jax.Array) -> jax.Array:
        return jnp.sum(ic.fixed_point(lambda h, z: -1.5 * h + z, jnp.zeros(3), z, gradient=estimator).value)

    def run() -> None:
        jax.block_until_ready(jax.jit(jax.grad(loss))(z))
        jax.effects_barrier()

    with pytest.warns(ic.InexactGradientWarning, match=r"did not reach rtol=0\.001"):
        run()


def test_a_record_as_the_others() -> None:
    estimator = ic.NeumannSeries(lam=0.5, rtol=1e-2)
    assert repr(estimator) == "NeumannSeries(lam=0.5, rtol=0.01, max_terms=200, contraction=None)"
    assert eval(repr(estimator), vars(ic)) == estimator
    assert hash(estimator) == hash(ic.NeumannSeries(0.5, 0.01))
    assert replace(estimator, rtol=1e-3) == ic.NeumannSeries() == ic.NeumannSeries(0.5, 1e-3, 200, None)
    assert replace(ic.Neumann(3, 0.5), k=4) == ic.Neumann(4, 0.5)
    with pytest.raises(ValueError, match="rtol must lie in"):
        ic.NeumannSeries(rtol=0.0)
    with pytest.raises(ValueError, match=r"contraction must lie in \[0, 1\)"):
        ic.NeumannSeries(contraction=1.0)
    with pytest.raises(ValueError, match="max_terms must be at least 1"):
        ic.NeumannSeries(max_terms=0)
    with pytest.raises(TypeError, match="k must be an integer, got 'auto'"):
        ic.Neumann("auto")


def test_one_term_takes_no_product() -> None:
    problem, z = slopes(0.5, 0.0), np.zeros((2, 1))
    with pytest.warns(ic.InexactGradientWarning, match="MAX_STEPS in 1 of 2 samples"):
        found = ic.NeumannSeries(1.0, max_terms=1).vjp(problem, z, z)[1](np.asarray([[1.0], [0.0]]))
    np.testing.assert_array_equal(found, [[1.0], [0.0]])


def test_half_precision_terms_are_added_in_single_precision() -> None:
    problem = slopes(0.9)
    single = np.float16
    low = ic.Problem(lambda h, z: h * single(0.9) + z, vjp=lambda h, z, v: (single(0.9) * v, v), batch_ndim=1)
    z = np.zeros((1, 3))
    exact = ic.Implicit().vjp(problem, z, z)[1](np.ones((1, 3)))
    found = ic.NeumannSeries(lam=1.0, rtol=1e-2).vjp(low, z.astype(single), z.astype(single))[1](
        np.ones((1, 3), dtype=single)
    )
    assert found.dtype == single
    np.testing.assert_allclose(found, exact, rtol=2e-2)


@pytest.mark.parametrize(
    ("slopes", "expected"),
    [([0.5, np.nan], [2.0, np.nan]), ([0.5, 1e200], [2.0, np.inf])],
    ids=["nan", "overflow"],
)
@pytest.mark.parametrize("contraction", [None, 0.5])
def test_a_jacobian_that_is_not_finite_shows_in_its_sample_alone(
    slopes: Any, expected: Any, contraction: float | None
) -> None:
    """A gradient scaler has to find it."""
    slope = np.asarray(slopes)[:, None]

    def vjp(h: Any, z: Any, v: Any) -> Any:
        with np.errstate(over="ignore"):
            return slope * v, v

    problem = ic.Problem(lambda h, z: slope * h + z, vjp=vjp, batch_ndim=1)
    estimator = ic.NeumannSeries(lam=1.0, rtol=1e-9, contraction=contraction)
    _, pullback = estimator.vjp(problem, np.zeros((2, 3)), np.zeros((2, 3)))
    with pytest.warns(ic.InexactGradientWarning, match="in 1 of 2 samples"):
        found = pullback(np.ones((2, 3)))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-8)
    assert not np.any(np.isfinite(found[1])) or np.all(found[1] >= 1e200)
