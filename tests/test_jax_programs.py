"""Without ``jit``: a second call compiles nothing, and what is kept is bounded."""

import dataclasses
import functools
import gc
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax_layers import GRADIENTS

import implicit_core as ic
from implicit_core.adapters.jax import maps, programs

W = 0.4 * np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
X = np.random.default_rng(1).normal(size=(4, 3))
SOLVERS = [ic.FixedPointIteration(), ic.Anderson(), ic.Broyden(), ic.NewtonKrylov()]


def exact(w: Any, x: Any) -> tuple[Any, Any]:
    """The fixed point of tanh(h wᵀ + x) by a long loop, and the gradient of its sum by dense linear algebra."""
    h = np.zeros_like(x)
    for _ in range(200):
        h = np.tanh(h @ w.T + x)
    slopes, gradient = 1 - h**2, np.zeros_like(w)
    for row, slope in zip(h, slopes, strict=True):
        u = np.linalg.solve((np.eye(3) - slope[:, None] * w).T, np.ones(3))
        gradient += np.outer(u * slope, row)
    return h, gradient


def cell(w: Any) -> Callable[[Any, Any], Any]:
    return lambda h, x: jnp.tanh(h @ w.T + x)


def loss(w: Any, x: Any, solver: ic.Solver, gradient: ic.Estimator) -> Any:
    """A closure that is made anew at each call."""
    return ic.fixed_point(cell(w), jnp.zeros_like(x), x, solver=solver, gradient=gradient, batch_ndim=1).value.sum()


@pytest.mark.parametrize("gradient", GRADIENTS, ids=repr)
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_a_second_gradient_compiles_nothing(
    solver: ic.Solver, gradient: ic.Estimator, compilations: list[float]
) -> None:
    with jax.enable_x64(True):
        for transform in (jax.grad, jax.value_and_grad):  # one compiles, the other finds
            w, x = (jnp.asarray(a + 0.01 * len(compilations)) for a in (W, X))
            compilations.clear()
            result = transform(loss)(w, x, solver, gradient)
        assert compilations == []
        value, bar = exact(np.asarray(w), np.asarray(x))
        np.testing.assert_allclose(result[0], value.sum(), rtol=1e-4)
        if not isinstance(gradient, ic.OneStep):
            np.testing.assert_allclose(result[1], bar, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("transform", [jax.jacfwd, jax.jacrev, jax.hessian, lambda f: jax.vmap(jax.grad(f))])
@pytest.mark.parametrize("gradient", [ic.Neumann(9, 1.0), ic.Unroll(9, 1.0), ic.Implicit()], ids=repr)
def test_other_transformations_compile_nothing_again(
    transform: Any, gradient: ic.Estimator, compilations: list[float]
) -> None:
    results = []
    for _ in range(3):
        w = jnp.asarray(W)

        def one(x: Any, w: Any = w) -> Any:
            return ic.fixed_point(cell(w), jnp.zeros(3), x, gradient=gradient).value.sum()

        mapped = transform(one)
        compilations.clear()
        results.append(
            mapped(jnp.asarray(X) if mapped.__name__ == "vmap" or transform not in PLAIN else jnp.asarray(X[0]))
        )
    assert compilations == []
    np.testing.assert_array_equal(results[0], results[2])
    with jax.disable_jit():  # a loop of the steps, differentiated

        def steps(x: Any) -> Any:
            h = jnp.zeros(3)
            for _ in range(60):
                h = cell(jnp.asarray(W))(h, x)
            return h.sum()

        expected = transform(steps)(jnp.asarray(X) if transform not in PLAIN else jnp.asarray(X[0]))
    np.testing.assert_allclose(results[0], expected, rtol=5e-2, atol=2e-2)


PLAIN = (jax.jacfwd, jax.jacrev, jax.hessian)


def test_a_solve_within_a_step() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
    class Nested(ic.Solver):
        def init(self, system: Any, x: Any) -> None:
            return None

        def step(self, system: Any, memory: None, point: Any) -> tuple[Any, None]:
            inner = ic.solve(lambda h, z: 0.5 * (h + z), jnp.zeros((2, 1)), point.f[0], batch_ndim=1)
            return system.space.pack(inner.value), None

    h0, z = jnp.zeros((2, 1)), jnp.ones((2, 1))
    for gradient in (ic.OneStep(), ic.Unroll()):
        options: dict[str, Any] = {"solver": Nested(), "gradient": gradient, "batch_ndim": 1}
        solution = ic.fixed_point(lambda h, z: 0.5 * h + z, h0, z, **options)
        np.testing.assert_allclose(solution.value, 2.0, rtol=1e-3)


@pytest.mark.parametrize("make", [lambda a: jax.jit(lambda h: a * h), lambda a: jax.jit(jax.jit(lambda h: a * h))])
def test_arrays_that_a_compiled_function_within_f_closes_over_are_not_kept(
    make: Any, compilations: list[float]
) -> None:
    kept = []
    for number in (0.1, 0.2, 0.3):
        array = jnp.full(3, number)
        kept.append(weakref.ref(array))
        g = make(array)

        def total(z: Any, g: Any = g) -> Any:
            return ic.fixed_point(lambda h, z: g(h) + z, jnp.zeros(3), z, gradient=ic.Implicit()).value.sum()

        compilations.clear()
        np.testing.assert_allclose(jax.grad(total)(jnp.ones(3)), 1 / (1 - number), rtol=1e-4)
        del array, g, total
    assert compilations == []
    gc.collect()
    assert [ref() for ref in kept] == [None] * 3


def test_a_function_as_solver_made_anew_compiles_nothing(compilations: list[float]) -> None:
    for number in (1.0, 2.0, 3.0):
        array = jnp.full(2, number)

        def solver(f: Any, h0: Any, z: Any, array: Any = array) -> Any:
            return 0.0 * array + 2.0

        compilations.clear()
        value = ic.fixed_point(lambda h, z: 0.5 * h + z, jnp.zeros(2), jnp.ones(2), solver=solver).value
        np.testing.assert_allclose(value, 2.0)
        ref = weakref.ref(array)
        del array, solver
    assert compilations == []
    gc.collect()
    assert ref() is None


@jax.custom_batching.custom_vmap
def halved(h: Any) -> Any:
    return 0.5 * h


@halved.def_vmap
def _(size: int, is_mapped: Any, h: Any) -> Any:
    return 0.5 * h, is_mapped[0]


def test_a_rule_of_vmap_in_f_compiles_nothing_again(compilations: list[float]) -> None:
    for _ in range(2):
        compilations.clear()
        value = ic.fixed_point(lambda h, z: halved(h) + z, jnp.zeros(2), jnp.ones(2), gradient=ic.OneStep()).value
        np.testing.assert_allclose(value, 2.0, rtol=1e-4)
    assert compilations == []


def test_equal_layers_of_a_model_share_their_program() -> None:
    def model(layers: int) -> int:
        def total(ws: Any, x: Any) -> Any:
            for w in ws:
                x = ic.fixed_point(cell(w), jnp.zeros_like(x), x, gradient=ic.Implicit(), batch_ndim=1).value
            return x.sum()

        ws = [jnp.asarray(W, jnp.float32)] * layers
        return len(jax.jit(jax.grad(total)).lower(ws, jnp.asarray(X, jnp.float32)).as_text())

    one, six = model(1), model(6)
    assert six < 2.5 * one


def test_how_many_programs_are_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    made = functools.lru_cache(maxsize=4)(programs._compiled.__wrapped__)
    monkeypatch.setattr(programs, "_compiled", made)
    assert maps._kept_linearization.cache_info().maxsize == programs.KEPT
    gc.collect()
    size = len(programs._PROGRAMS)
    for i in range(8):
        ic.fixed_point(lambda h, z, i=i: (0.1 + 0.001 * i) * h + z, jnp.zeros(2), jnp.ones(2), gradient=ic.OneStep())
    gc.collect()
    before = len(programs._PROGRAMS)
    assert made.cache_info().currsize == 4
    assert before - size <= 4 + 8, "linearizations are kept, too"
    made.cache_clear()
    gc.collect()
    assert len(programs._PROGRAMS) < before, "a program lives as long as what is compiled for it"


def test_what_a_compiled_solve_notices_is_looked_into() -> None:
    """Coupled samples raise, failures warn and throw, and small units are taken, as in a Python loop."""
    mixing = jnp.asarray([[0.1], [1.0]])
    z = jnp.asarray([[0.0], [1.0]])

    def coupled(h: Any, z: Any) -> Any:
        return 0.9 * h.mean() * mixing + z

    for solve in (ic.solve, ic.fixed_point):
        with pytest.raises(ic.CoupledSamplesError):
            solve(coupled, jnp.zeros((2, 1)), z, batch_ndim=1, solver=ic.Broyden())
        free = solve(coupled, jnp.zeros((2, 1)), z, batch_ndim=1, solver=ic.Broyden(check=False))
        assert free.value.shape == (2, 1)
        with pytest.raises(ic.SolveError, match="MAX_STEPS"):
            solve(lambda h, z: h + z, jnp.zeros(2), jnp.ones(2), solver=ic.Anderson(max_steps=3), throw=True)
        small = solve(lambda h, z: 0.5 * h + z, jnp.zeros(2), jnp.full(2, 1e-30), solver=ic.Anderson(atol=0.0))
        assert small.converged
        np.testing.assert_allclose(small.value / 1e-30, 2.0, rtol=1e-3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ic.fixed_point(lambda h, z: h + z, jnp.zeros(2), jnp.ones(2), solver=ic.Anderson(max_steps=3))
    assert [each.category for each in caught] == [ic.ConvergenceWarning]


def host(h: Any) -> Any:
    RUNS.append(h.shape)
    return np.asarray(h)


RUNS: list[Any] = []


@pytest.mark.parametrize("solver", SOLVERS[:3], ids=lambda s: type(s).__name__)
def test_a_compiled_solve_evaluates_f_as_often_as_it_says(solver: ic.Solver, compilations: list[float]) -> None:
    def f(h: Any, z: Any) -> Any:
        return jnp.tanh(jax.pure_callback(host, jax.ShapeDtypeStruct(h.shape, h.dtype), 0.5 * h)) + z

    for solve in (ic.solve, lambda *a, **k: ic.fixed_point(*a, gradient=ic.OneStep(), **k)):
        solve(f, jnp.zeros(3), jnp.ones(3), solver=solver)
        RUNS.clear()
        compilations.clear()
        solution = solve(f, jnp.zeros(3), jnp.ones(3), solver=solver)
        assert compilations == []
        assert len(RUNS) == solution.stats.evaluations
        assert isinstance(solution.stats.evaluations, int)


def test_threads_find_their_own_programs() -> None:
    results: list[tuple[float, float]] = []

    def work(slope: float) -> None:
        def total(z: Any) -> Any:
            return ic.fixed_point(lambda h, z: slope * h + z, jnp.zeros(3), z, gradient=ic.Implicit()).value.sum()

        results.extend((slope, float(jax.grad(total)(jnp.ones(3))[0])) for _ in range(5))

    threads = [threading.Thread(target=work, args=(slope,)) for slope in (0.5, 0.25, 0.125)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 15
    np.testing.assert_allclose([found for _, found in results], [1 / (1 - slope) for slope, _ in results], rtol=1e-4)


def test_what_is_kept_within_a_transformation_serves_all_others() -> None:
    """No tracer stays in a cache, whichever transformation filled it."""

    def total(z: Any) -> Any:
        settings: dict[str, Any] = {"solver": ic.Anderson(rtol=1e-6), "gradient": ic.Implicit()}
        return ic.fixed_point(lambda h, z: jnp.tanh(0.31 * h) + z, jnp.zeros(3), z, **settings).value.sum()

    x, slope = jnp.ones(3), jax.grad(total)
    with jax.checking_leaks():
        first = jax.jit(slope)(x)
        others = [
            slope(x),
            jax.vmap(slope)(x[None])[0],
            jax.lax.scan(lambda c, _: (c, slope(c)), x, None, length=2)[1][0],
            jax.checkpoint(slope)(x),
        ]
        second = jax.jit(jax.hessian(total))(x), jax.hessian(total)(x)
    for other in others:
        np.testing.assert_allclose(other, first, rtol=1e-5)
    np.testing.assert_allclose(*second, rtol=1e-4, atol=1e-6)
