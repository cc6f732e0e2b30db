"""``Implicit(products=n)``: so many products, the iterate with the least residual, and its residual reported."""

import math
import warnings
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from array_api_compat import array_namespace
from jax import export
from libraries import Library

import implicit_core as ic

N = 24
SLOPES = np.random.default_rng(0).normal(size=(N, N)) / math.sqrt(N) * 1.5
"""∂F/∂h, of spectral radius above one."""
V = np.random.default_rng(1).normal(size=(3, N)) * np.array([[1.0], [1e-5], [1e3]])
A = np.eye(N) - SLOPES.T
SOLVERS = [None, ic.GMRES(restart=4), ic.BiCGSTAB(), ic.CG(), ic.Richardson(), ic.MINRES()]


def implicit(solver: ic.LinearSolver | None, **settings: Any) -> ic.Implicit:
    return ic.Implicit(**settings) if solver is None else ic.Implicit(solver, **settings)


def pulled(gradient: ic.Implicit, v: Any = V, slopes: Any = SLOPES) -> tuple[Any, int]:
    """w of h = J h + z, and the products of the pullback."""
    products = 0

    def vjp_h(v: Any) -> Any:
        nonlocal products
        products += 1
        return v @ slopes

    def linearize(h: Any, z: Any) -> Any:
        return ic.Linearization(h @ slopes.T + z, vjp_h=vjp_h, vjp_z=lambda v: v)

    problem = ic.Problem(linearize=linearize, f=lambda h, z: h @ slopes.T + z, batch_ndim=1)
    zeros = array_namespace(v).zeros_like(v)
    return gradient.vjp(problem, zeros, zeros)[1](v), products


def relative(w: np.ndarray, v: np.ndarray = V) -> np.ndarray:
    return np.linalg.norm(v - w @ A.T, axis=-1) / np.linalg.norm(v, axis=-1)


def least_squares(k: int, v: np.ndarray = V) -> np.ndarray:
    """The w with the least residual in the Krylov space of dimension k, by dense linear algebra."""
    rows = []
    for b in v:
        q = b[:, None] / np.linalg.norm(b)
        for _ in range(k - 1):
            q = np.linalg.qr(np.column_stack([q, A @ q[:, -1]]))[0]
        rows.append(q @ np.linalg.lstsq(A @ q, b, rcond=None)[0])
    return np.stack(rows)


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda x: type(x).__name__)
def test_products_are_counted_and_the_residual_is_the_true_one(
    solver: ic.LinearSolver | None, library: Library
) -> None:
    """The first one tests w = v, the gradient of one step. Nothing warns or raises, as without ``products``."""
    if library.name == "numpy":
        with pytest.raises(ic.SolveError):
            pulled(ic.Implicit(replace(solver or ic.GMRES(), max_steps=8)))
    slopes, v, least = library.array(SLOPES), library.array(V), np.full(3, np.inf)
    for products in (1, 2, 8):
        told: list[Any] = []
        w, used = pulled(implicit(solver, products=products, report=told.append), v, slopes)
        assert used <= products
        if not isinstance(solver, (ic.CG, ic.BiCGSTAB)):  # two products a step, or no step that helps
            assert used == products
        [found] = map(library.numpy, told)
        assert found.shape == (3,)
        np.testing.assert_allclose(found, relative(library.numpy(w)), rtol=1e-10)
        if not isinstance(solver, ic.MINRES):  # whose recurrence needs a symmetric system
            assert np.all(found <= least * (1 + 1e-12))
            least = found
        if products == 1:
            np.testing.assert_array_equal(library.numpy(w), V)


@pytest.mark.parametrize("products", [2, 6, 24, 40])
def test_the_residual_is_the_least_one_over_the_krylov_space(products: int) -> None:
    told: list[Any] = []
    w, used = pulled(ic.Implicit(products=products, report=told.append))
    expected = least_squares(min(products - 1, N))
    np.testing.assert_allclose(w / np.linalg.norm(w, axis=1, keepdims=True),
                               expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-10)  # fmt: skip
    np.testing.assert_allclose(told[0], relative(expected), rtol=1e-10, atol=1e-12)
    assert used == min(products, N + 1)  # the tolerance ends it sooner


def test_gmres_restarts_within_a_budget_only_where_it_is_told_to() -> None:
    """Whatever its other settings are, which a layer may change."""
    told: list[Any] = []
    for solver in (None, ic.GMRES(), ic.GMRES(check=False), ic.GMRES(rtol=1e-5), ic.GMRES(restart=20)):
        pulled(implicit(solver, products=24, report=told.append))
    *whole, restarted = told
    for residual in whole:
        np.testing.assert_allclose(residual, relative(least_squares(23)), rtol=1e-8)
    assert np.all(restarted > 1.5 * whole[0])


def test_bicgstab_keeps_the_iterate_with_the_least_residual() -> None:
    """Its own residual rises again. The iterates are those of other budgets, so one of them is the best."""
    steps = [pulled(ic.Implicit(ic.BiCGSTAB(), products=2 * k + 1))[0] for k in range(1, 12)]
    last = [pulled(ic.Implicit(ic.BiCGSTAB(max_steps=2 * k, rtol=1e-15), on_failure="ignore"))[0] for k in range(1, 12)]
    raw = np.stack([relative(w) for w in last])
    assert np.any(raw[1:] > 1.5 * raw[:-1])
    np.testing.assert_array_less(np.diff([relative(w) for w in steps], axis=0), 1e-12)


@pytest.mark.parametrize(
    "solver", [s for s in SOLVERS if not isinstance(s, ic.Richardson)], ids=lambda x: type(x).__name__
)
def test_a_singular_system_is_solved_in_the_sense_of_least_squares(
    solver: ic.LinearSolver | None,
) -> None:
    """The recurrences solve the singular system at last, as it is rounded, by a w of 1e16 or more."""
    basis, _ = np.linalg.qr(SLOPES)
    a = (basis * np.append(np.linspace(0.2, 2.0, 15), np.zeros(9))) @ basis.T
    least = np.linalg.norm(V @ basis[:, 15:], axis=1) / np.linalg.norm(V, axis=1)
    for products in (16, 17, 26, 40, 80):
        told: list[Any] = []
        w, _ = pulled(implicit(solver, products=products, report=told.append), V, np.eye(N) - a)
        np.testing.assert_allclose(told[0], np.linalg.norm(V - w @ a, axis=1) / np.linalg.norm(V, axis=1), rtol=1e-6)
        assert np.all(told[0] < (2 if isinstance(solver, ic.CG) else 1.1) * least)  # CG's residuals rise and fall
        assert np.all(np.linalg.norm(w, axis=1) < 100 * np.linalg.norm(V, axis=1))


@pytest.mark.parametrize("solver", [None, ic.BiCGSTAB(), ic.MINRES()], ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("state", [torch.bfloat16, torch.float32])
def test_rounding_errors_of_a_product_do_not_outgrow_the_residual(
    state: torch.dtype, solver: ic.LinearSolver | None
) -> None:
    """In half precision, and under autocast, a w that is too long loses what a shorter one has found."""
    basis, _ = np.linalg.qr(SLOPES)
    slopes = torch.asarray(np.eye(N) - (basis * np.geomspace(2.0, 1e-4, N)) @ basis.T).to(state)
    b = torch.zeros(3, N, dtype=state, requires_grad=True)
    told: list[Any] = []
    for products in (8, 24, 60, 100):
        gradient = implicit(solver, products=products, report=told.append)
        with torch.autocast("cpu", torch.bfloat16, enabled=state == torch.float32):
            h = ic.fixed_point(
                lambda h, b: (h @ slopes.T).to(state) + b,
                torch.zeros_like(b),
                b,
                solver=at_solution,
                gradient=gradient,
                batch_ndim=1,
            ).value
        torch.autograd.grad(h, b, torch.asarray(V).to(state))
    for more in told[1:]:
        assert torch.all(more < 1.1 * told[0])
    assert torch.all(told[0] < 0.95)


@pytest.mark.parametrize("solver", [None, ic.BiCGSTAB(), ic.GMRES(restart=3)], ids=lambda x: type(x).__name__)
def test_where_no_iterate_helps_the_gradient_is_that_of_one_step(solver: ic.LinearSolver | None) -> None:
    """A is a cyclic shift of some basis: the least residual over all Krylov spaces but the last is that of zero."""
    basis = np.linalg.qr(SLOPES)[0]
    shift = basis @ np.roll(np.eye(N), 1, axis=0) @ basis.T
    told: list[Any] = []
    v = basis.T[:2]
    w, used = pulled(implicit(solver, products=7, report=told.append), v, np.eye(N) - shift)
    assert used == 7  # a second cycle starts at v
    if solver is None:
        np.testing.assert_array_equal(w, v)
    residual = np.linalg.norm(v - w @ shift, axis=1)
    np.testing.assert_allclose(told[0], residual, rtol=1e-12)
    assert np.all(np.linalg.norm(w, axis=1) > 0.5)
    if solver is None:
        np.testing.assert_allclose(residual, math.sqrt(2))


def test_cotangents_that_are_zero_or_not_finite(library: Library) -> None:
    v = np.concatenate([V, V[:1]])
    v[1], v[2, 3], v[3, 0] = 0.0, np.nan, np.inf
    for settings in ({"products": 5}, {"linear_solver": ic.GMRES(restart=N)}):
        told: list[Any] = []
        w, _ = pulled(ic.Implicit(report=told.append, **settings), library.array(v), library.array(SLOPES))
        w, [found] = library.numpy(w), map(library.numpy, told)
        assert np.all(np.isfinite(w[:2]))
        assert np.all(w[1] == 0)
        assert np.all(np.isnan(w[2:]))
        assert found[1] == 0
        assert np.all(np.isnan(found[2:]))
        np.testing.assert_allclose(found[0], relative(w[:1], v[:1])[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("settings", [{"products": 9}, {"on_failure": "ignore"}], ids=str)
def test_a_w_beyond_the_range_of_its_numbers_is_nan_and_has_no_residual(settings: Any) -> None:
    told: list[Any] = []
    b = torch.zeros(3, 4, dtype=torch.float16, requires_grad=True)
    gradient = ic.Implicit(report=told.append, **settings)
    f, start = (lambda h, b: 0.9375 * h + b), torch.zeros_like(b)
    h = ic.fixed_point(f, start, b, solver=at_solution, gradient=gradient, batch_ndim=1).value
    [w] = torch.autograd.grad(h, b, torch.asarray([[60000.0], [1.0], [0.0]]).half().expand(3, 4))
    np.testing.assert_array_equal(w[:, 0], [math.nan, 16.0, 0.0])
    np.testing.assert_allclose(told[0], [math.nan, 0.0, 0.0], atol=1e-3)


def test_a_report_of_any_solve_costs_nothing() -> None:
    """It comes before an error is raised."""
    told: list[Any] = []
    solver = ic.GMRES(restart=N - 1, rtol=1e-3, max_steps=500)
    quiet, count = pulled(ic.Implicit(solver))
    w, same = pulled(ic.Implicit(solver, report=told.append))
    assert count == same
    np.testing.assert_array_equal(w, quiet)
    np.testing.assert_allclose(told.pop(), relative(w), rtol=1e-10)
    with pytest.raises(ic.SolveError):
        pulled(ic.Implicit(ic.GMRES(max_steps=3, restart=3), report=told.append))
    np.testing.assert_allclose(told, [relative(least_squares(3))], rtol=1e-10)


def test_starts_and_preconditioners_share_the_products() -> None:
    exact = np.linalg.solve(A, V.T).T
    for x0, products, used in [(exact, 2, 1), (exact, 1, 1), (1e6 * exact, 2, 2), (0.9 * exact, 6, 6)]:
        told: list[Any] = []
        w, count = pulled(ic.Implicit(ic.GMRES(restart=N), x0=x0, products=products, report=told.append))
        assert count == used
        np.testing.assert_allclose(told[0], relative(w), rtol=1e-9, atol=1e-12)
        if products == 1 or x0[0, 0] == 1e6 * exact[0, 0]:  # no product for the start, or a start that is worse
            np.testing.assert_allclose(w, V)
        else:
            assert np.all(told[0] < 0.11)
    assert pulled(ic.Implicit(ic.Richardson(check_every=3), x0=0.9 * exact, products=3))[1] == 3
    inverse = ic.Preconditioner(lambda v, _: np.linalg.solve(A.T, v.T).T, lambda v, _: np.linalg.solve(A, v.T).T)
    w, count = pulled(ic.Implicit(preconditioner=inverse, products=1))
    assert count == 1
    np.testing.assert_allclose(w, exact, rtol=1e-9)


def test_a_root_with_a_jacobian_a_pytree_and_one_system() -> None:
    told: list[Any] = []

    def g(x: Any, z: Any) -> Any:
        return {"a": x["a"] @ SLOPES.T[:, :N] - z, "b": 3 * x["b"] + x["a"].sum()}

    def vjp(x: Any, z: Any, v: Any) -> Any:
        return {"a": v["a"] @ SLOPES + v["b"], "b": 3 * v["b"]}, -v["a"]

    problem = ic.RootProblem(g, vjp=vjp, batch_ndim=0)
    x, v = {"a": np.zeros(N), "b": np.zeros(())}, {"a": V[0], "b": np.ones(())}
    whole = np.block([[SLOPES.T, np.ones((N, 1))], [np.zeros((1, N)), np.full((1, 1), 3.0)]])
    w = np.linalg.solve(whole, np.append(V[0], 1.0))
    z_bar = ic.Implicit(products=N + 2, report=told.append).vjp(problem, x, np.zeros(N))[1](v)
    np.testing.assert_allclose(z_bar, w[:N], rtol=1e-8)
    assert told[0].shape == ()
    assert told[0] < 1e-9
    cut = ic.Implicit(products=5, report=told.append).vjp(problem, x, np.zeros(N))[1](v)
    assert np.all(np.isfinite(cut))
    assert 0.01 < told[1] < 1


H = np.tanh(np.random.default_rng(2).normal(size=(3, N)))
Z = np.arctanh(H) - H @ SLOPES.T
AT_H = (1 - H**2)[:, :, None] * SLOPES


def at_solution(problem: Any, h0: Any, z: Any) -> Any:
    """A solver that knows the solution."""
    return h0


def layer(xp: Any, b: Any, gradient: ic.Implicit) -> Any:
    """h of h = tanh(J h + z) + b at a solution: its derivative along b is the inverse of I - ∂F/∂h."""
    asarray = jnp.asarray if xp is jnp else lambda x: torch.asarray(x).to(b.dtype)
    slopes, h, z = map(asarray, (SLOPES, H, Z))

    def f(h: Any, z: Any) -> Any:
        return xp.tanh(h @ slopes.T + z[0]) + z[1]

    return ic.fixed_point(f, h, (z, b), solver=at_solution, gradient=gradient, batch_ndim=1).value


def residual_at_h(w: np.ndarray) -> np.ndarray:
    r = V - w + (w[:, None, :] @ AT_H)[:, 0]
    return np.linalg.norm(r, axis=1) / np.linalg.norm(V, axis=1)


def test_jax_traces_products_and_calls_back_when_the_program_runs() -> None:
    told: list[Any] = []

    def bar(b: Any, products: Any) -> Any:
        gradient = ic.Implicit(products=products, report=told.append)
        return jax.grad(lambda b: (layer(jnp, b, gradient) * V).sum())(b)

    b = jnp.zeros((3, N))
    found = {}
    for name, slope in {"static": jax.jit(bar, static_argnums=1), "traced": jax.jit(bar), "eager": bar}.items():
        w = slope(b, 6 if name != "traced" else jnp.asarray(6))
        jax.effects_barrier()
        np.testing.assert_allclose(told.pop(), residual_at_h(np.asarray(w)), rtol=1e-9)
        assert not told
        found[name] = np.asarray(w)
    for w in found.values():
        np.testing.assert_allclose(w, found["eager"], rtol=1e-9)
    assert np.all(residual_at_h(found["eager"]) > 1e-3)
    np.testing.assert_array_equal(jax.jit(bar)(b, jnp.asarray(1)), V)
    jax.effects_barrier()
    told.clear()

    # Two cotangents by vmap are one batch, and one call.
    mapped = jax.jit(jax.vmap(lambda b: bar(b, 6)))(jnp.zeros((2, 3, N)))
    jax.effects_barrier()
    np.testing.assert_allclose(mapped[1], found["eager"], rtol=1e-9)
    assert [x.shape for x in told] == [(2, 3)]
    told.clear()
    exported = export.export(jax.jit(lambda b: bar(b, 6)))(b)
    np.testing.assert_allclose(exported.call(b), found["eager"], rtol=1e-9)
    assert not told
    one = ic.Implicit(products=6, report=told.append)
    assert hash(one) == hash(ic.Implicit(products=6, report=told.append))
    assert one == ic.Implicit(products=6, report=told.append) != ic.Implicit(products=7, report=told.append)


@pytest.mark.parametrize("solver", [None, ic.BiCGSTAB(), ic.Richardson()], ids=lambda x: type(x).__name__)
def test_products_of_a_compiled_program_are_counted(solver: ic.LinearSolver | None) -> None:
    counts: list[int] = []

    def vjp(h: Any, z: Any, v: Any) -> Any:
        jax.debug.callback(lambda: counts.append(1))
        return v @ SLOPES, v

    problem = ic.Problem(lambda h, z: h @ SLOPES.T + z, vjp=vjp, batch_ndim=1)
    for products in (1, 2, 7):
        gradient = implicit(solver, products=products)
        w = jax.jit(lambda v, gradient=gradient: gradient.vjp(problem, 0 * v, 0 * v)[1](v))(jnp.asarray(V))
        jax.effects_barrier()
        used = len(counts) - 1  # the last one is that of z
        counts.clear()
        expected, eager = pulled(gradient)
        assert used == eager <= products
        np.testing.assert_allclose(w, expected, rtol=1e-8, atol=1e-8 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_torch_reports_in_every_precision_and_transform(dtype: torch.dtype) -> None:
    told: list[Any] = []
    gradient = ic.Implicit(products=6, report=told.append)
    b = torch.zeros(3, N, dtype=dtype, requires_grad=True)
    v = torch.asarray(V / np.linalg.norm(V, axis=1, keepdims=True)).to(dtype)

    def loss(b: Any) -> Any:
        return (layer(torch, b, gradient) * v).sum()

    [w] = torch.autograd.grad(loss(b), b)
    size = np.linalg.norm(V, axis=1)[:, None]
    expected = residual_at_h(w.double().numpy() * size)
    np.testing.assert_allclose(
        told.pop(), expected, atol=1e-12 if dtype == torch.float64 else 4 * torch.finfo(dtype).eps
    )
    transformed = torch.func.vmap(torch.func.grad(loss))(torch.zeros(2, 3, N, dtype=dtype))
    np.testing.assert_allclose(transformed[1].float(), w.float(), rtol=1e-6)
    assert not told[0].requires_grad
    assert told[0].shape == (2, 3)


def test_second_derivatives_are_as_accurate_as_the_solves() -> None:
    b = torch.zeros(3, N, dtype=torch.float64, requires_grad=True)
    told: list[Any] = []
    v = torch.asarray(V / np.linalg.norm(V, axis=1, keepdims=True))

    def both(gradient: ic.Implicit) -> tuple[Any, Any]:
        [first] = torch.autograd.grad((layer(torch, b, gradient) ** 3).sum(), b, create_graph=True)
        return first.detach(), torch.autograd.grad((first * v).sum(), b)[0]

    exact = both(ic.Implicit(ic.GMRES(restart=N, rtol=1e-12)))
    for ours, theirs in zip(both(ic.Implicit(products=N + 1, report=told.append)), exact, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6 * float(theirs.abs().max()))
    assert len(told) > 1
    first, _ = both(ic.Implicit(products=5))
    again = torch.autograd.grad((layer(torch, b, ic.Implicit(products=5)) ** 3).sum(), b)[0]
    np.testing.assert_allclose(first, again, rtol=1e-9)


def test_settings() -> None:
    for on_failure in ("raise", "ignore"):
        with pytest.raises(ValueError, match="on_failure must be None with products"):
            ic.Implicit(products=5, on_failure=on_failure)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="products must be at least 1, got 0"):
        ic.Implicit(products=0)
    with pytest.raises(TypeError, match="report must be callable, got 3"):
        ic.Implicit(report=3)  # type: ignore[arg-type]
    assert repr(ic.Implicit(products=20)) == f"Implicit(linear_solver={ic.GMRES()!r}, products=20)"
    assert math.isnan(ic.Implicit(products=20).inverse_error(0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pulled(ic.Implicit(products=np.int64(5)))
