"""Exported programs, the persistent compilation cache, and call backs from compiled programs."""

import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import implicit_core as ic
from implicit_core.adapters import jax as icj

W = 0.4 * np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
X = np.random.default_rng(1).normal(size=(4, 3))
SOLVER = ic.Anderson(rtol=1e-10)
FEW = ic.Richardson(rtol=1e-10, max_steps=2)
ESTIMATORS = [
    ic.Unroll(30, 1.0),
    ic.Unroll(30, 1.0, recompute=True),
    ic.Neumann(30, 1.0),
    ic.Neumann(30, 1.0, on_growth="nan"),
    ic.NeumannSeries(1.0, 1e-9),
    ic.NeumannSeries(1.0, 1e-9, on_failure="nan"),
    ic.OneStep(),
    ic.Implicit(),
    ic.Implicit(ic.BiCGSTAB(), on_failure="warn"),
    ic.Implicit(ic.BiCGSTAB(), on_failure="ignore"),
    ic.Implicit(products=4, report=print),
    ic.BPTT(40),
]


def loss(w: Any, x: Any, gradient: ic.Estimator, solver: ic.Solver = SOLVER) -> Any:
    f = lambda h, x: jnp.tanh(h @ w.T + x)  # noqa: E731
    return (icj.fixed_point(f, jnp.zeros_like(x), x, solver=solver, gradient=gradient, batch_ndim=1).value ** 2).sum()


def gradient_by_numpy() -> Any:
    h = np.zeros_like(X)
    for _ in range(200):
        h = np.tanh(h @ W.T + X)
    bar = np.zeros_like(W)
    for row, slope in zip(h, 1 - h**2, strict=True):
        bar += np.outer(np.linalg.solve((np.eye(3) - slope[:, None] * W).T, 2 * row) * slope, row)
    return bar


@pytest.mark.parametrize("gradient", ESTIMATORS, ids=repr)
def test_a_gradient_is_exported_and_calls_nothing(gradient: ic.Estimator) -> None:
    with jax.enable_x64(True):
        w, x = jnp.asarray(W), jnp.asarray(X)
        slope = jax.jit(jax.grad(lambda w, x: loss(w, x, gradient)))
        exported = export.export(slope)(*(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (w, x)))
        assert "callback" not in exported.mlir_module()
        np.testing.assert_allclose(exported.call(w, x), slope(w, x), rtol=1e-12, atol=1e-14)
        if not isinstance(gradient, ic.OneStep):
            np.testing.assert_allclose(exported.call(w, x), gradient_by_numpy(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("gradient", [ic.NeumannSeries(1.0, 1e-9, max_terms=3), ic.Implicit(FEW, on_failure="warn")])
def test_what_an_exported_program_cannot_tell_is_nan(gradient: ic.Estimator) -> None:
    slope = jax.jit(jax.grad(lambda w, x: loss(w, x, gradient)))
    w, x = jnp.asarray(W, jnp.float32), jnp.asarray(X, jnp.float32)
    exported = export.export(slope)(*(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (w, x)))
    assert np.all(np.isnan(exported.call(w, x)))
    with pytest.warns(ic.InexactGradientWarning):
        told = jax.block_until_ready(slope(w, x))
    assert np.all(np.isfinite(told))


@pytest.mark.parametrize("on_failure", ["raise", "warn", "nan", "ignore"])
@pytest.mark.parametrize(
    "make",
    [
        lambda on_failure: ic.NeumannSeries(1.0, 1e-9, max_terms=3, on_failure=on_failure),
        lambda on_failure: ic.Implicit(FEW, on_failure=on_failure),
    ],
    ids=["NeumannSeries", "Implicit"],
)
def test_samples_of_vmap_call_back_once(make: Any, on_failure: Any) -> None:
    """All of them fail. The gradient is that of the terms that there are, or NaN."""
    gradient = make(on_failure)

    def one(w: Any, x: Any) -> Any:
        return loss(w, x, gradient, ic.FixedPointIteration(rtol=1e-6))

    slope = jax.jit(jax.grad(lambda w: jax.vmap(lambda x: one(w, x[None]))(x).sum()))
    w, x = jnp.asarray(W, jnp.float32), jnp.asarray(np.tile(X, (8, 1)), jnp.float32)
    assert slope.lower(w).as_text().count("callback") == (on_failure == "warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = jax.block_until_ready(slope(w))
        jax.effects_barrier()
    assert len(caught) == (on_failure == "warn")
    if caught:
        assert "32 of 32 samples" in str(caught[0].message)
    assert np.all(np.isnan(found)) == (on_failure in ("raise", "nan"))
    if on_failure in ("warn", "ignore"):  # the sum of three terms, or of two, since one product tests the answer
        plain = ic.Neumann(3 if isinstance(gradient, ic.NeumannSeries) else 2, 1.0, on_growth="ignore")
        expected = jax.grad(lambda w: loss(w, x, plain, ic.FixedPointIteration(rtol=1e-6)))(w)
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_a_failure_outside_of_jax_is_as_the_setting_says() -> None:
    """NumPy: the four settings of the series, as of Implicit."""
    problem = ic.Problem(lambda h, z: 0.9 * h + z, vjp=lambda h, z, v: (0.9 * v, v))

    def pulled(on_failure: Any) -> Any:
        series = ic.NeumannSeries(1.0, 1e-9, max_terms=3, on_failure=on_failure)
        return series.vjp(problem, np.full(2, 10.0), np.ones(2))[1](np.ones(2))

    with pytest.raises(ic.SolveError, match="did not reach rtol"):
        pulled("raise")
    with pytest.warns(ic.InexactGradientWarning):
        np.testing.assert_allclose(pulled("warn"), 1 + 0.9 + 0.81)
    np.testing.assert_allclose(pulled("ignore"), 1 + 0.9 + 0.81)
    assert np.all(np.isnan(pulled("nan")))


@pytest.fixture
def cache_hits() -> Iterator[list[str]]:
    hits: list[str] = []

    def listen(event: str, **_: Any) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            hits.append(event)

    jax.monitoring.register_event_listener(listen)
    yield hits
    jax.monitoring.unregister_event_listener(listen)


@pytest.mark.parametrize(
    "gradient",
    [x for x in ESTIMATORS if getattr(x, "on_failure", "nan") != "warn" and not getattr(x, "report", None)],
    ids=repr,
)
def test_the_persistent_cache_stores_gradients(gradient: ic.Estimator, cache_hits: list[str]) -> None:
    def compiled() -> Any:
        slope = jax.jit(jax.grad(lambda w, x: loss(w, x, gradient)))
        return slope.lower(jnp.asarray(W, jnp.float32), jnp.asarray(X, jnp.float32)).compile()

    compiled()
    cache_hits.clear()
    compiled()
    assert cache_hits
