"""An estimate that grows with its terms is told in every framework, and a contraction is never accused."""

import dataclasses
import time
import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial
from threading import Thread
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax import export
from libraries import JAX, NUMPY, Library

import implicit_core as ic
from implicit_core.backends.torch import Unread
from implicit_core.estimators.growth import GrowthTest
from implicit_core.space import Space
from implicit_core.theory import certify

WIDTH, EACH = 8, 50
FAMILIES = ["normal contraction", "contraction", "non-normal, radius < 1", "expansive", "stiff", "mixed"]
CONTRACTIONS, RADII = FAMILIES[:2], FAMILIES[:3]
ANNOUNCED = pytest.warns(ic.GrowingGradientWarning, match="does not estimate the gradient")
SETTINGS = [(2, 0.5), (2, 1.0), (5, 0.5), (5, 1.0), (12, 0.3)]


@cache
def maps() -> tuple[np.ndarray, np.ndarray, list[str]]:
    """300 matrices, a cotangent for each, and their families."""
    rng = np.random.default_rng(0)
    found = []
    for family in FAMILIES:
        for _ in range(EACH):
            m = rng.normal(size=(WIDTH, WIDTH))
            q, _ = np.linalg.qr(m)
            if family == "normal contraction":
                m = q * rng.uniform(0.3, 0.999)
            elif family == "contraction":
                m *= rng.uniform(0.3, 0.999) / np.linalg.norm(m, 2)
            elif family == "non-normal, radius < 1":
                m = [m, np.diag(rng.uniform(-1, 1, WIDTH)) + 0.5 * np.triu(m, 1)][len(found) % 2]
                m *= rng.uniform(0.5, 0.97) / np.abs(np.linalg.eigvals(m)).max()
            elif family == "expansive":
                m *= rng.uniform(1.5, 20.0) / np.linalg.norm(m, 2)
            elif family == "stiff":
                m = (q * -(10 ** rng.uniform(-1, 3, WIDTH))) @ q.T
            else:  # one direction that grows in a contraction
                m = (q * np.concatenate([rng.uniform(-0.9, 0.9, WIDTH - 1), [rng.uniform(-30, -3)]])) @ q.T
            found.append(m)
    return np.stack(found), rng.normal(size=(len(found), WIDTH)), [f for f in FAMILIES for _ in range(EACH)]


def terms(k: int, lam: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """By dense matrices: which maps grew, the estimate, and its error relative to the exact gradient."""
    m, v, _ = maps()
    identity = np.eye(WIDTH)
    b = lam * m.transpose(0, 2, 1) + (1 - lam) * identity
    term, total = v[..., None], v[..., None]
    for _ in range(k - 1):
        term = b @ term
        total = total + term
    exact = np.linalg.solve(identity - m.transpose(0, 2, 1), v[..., None])[..., 0]
    estimate, growth = lam * total[..., 0], np.linalg.norm(term[..., 0], axis=1) / np.linalg.norm(v, axis=1)
    error = np.linalg.norm(estimate - exact, axis=1) / np.linalg.norm(exact, axis=1)
    return growth > 10 ** ((k - 1) / k), estimate, error


def estimators(k: int, lam: float, on_growth: Any) -> list[ic.Estimator]:
    found: list[ic.Estimator] = [
        ic.Neumann(k, lam, on_growth=on_growth),
        ic.Unroll(k, lam, on_growth=on_growth),
        ic.Unroll(k, lam, recompute=True, on_growth=on_growth),
    ]
    return found + [ic.BPTT(k, on_growth=on_growth)] * (lam == 1.0)


def problem(m: Any, xp: Any = np, scale: Any = None) -> ic.Problem:
    def times(m: Any, h: Any) -> Any:
        return xp.matmul(m, h[:, :, None])[:, :, 0]

    return ic.Problem(
        lambda h, z: times(m, h) + z,
        vjp=lambda h, z, v: (times(xp.permute_dims(m, (0, 2, 1)), v), v),
        jvp=lambda h, z, dh, dz: times(m, dh) + dz,
        batch_ndim=1,
        scale=scale,
    )


def by_core(library: Library) -> Callable[[ic.Estimator, np.ndarray, np.ndarray], np.ndarray]:
    def pull(estimator: ic.Estimator, m: np.ndarray, v: np.ndarray) -> np.ndarray:
        zero = library.array(np.zeros_like(v))
        pullback = estimator.vjp(problem(library.array(m), library.xp), zero, zero)[1]
        return library.numpy(pullback(library.array(v)))

    return pull


def by_torch(estimator: ic.Estimator, m: np.ndarray, v: np.ndarray) -> np.ndarray:
    matrices, z = torch.tensor(m), torch.zeros(v.shape, dtype=torch.float64, requires_grad=True)
    f = lambda h, z: torch.einsum("nij,nj->ni", matrices, h) + z  # noqa: E731
    h = ic.fixed_point(f, torch.zeros_like(z), z, gradient=estimator, batch_ndim=1).value
    return torch.autograd.grad(h, z, torch.tensor(v))[0].numpy()


def jax_layer(estimator: ic.Estimator, m: np.ndarray) -> Callable[[Any], Any]:
    f = lambda h, z: jnp.einsum("nij,nj->ni", m, h) + z  # noqa: E731
    return lambda z: ic.fixed_point(f, jnp.zeros_like(z), z, gradient=estimator, batch_ndim=1).value


def by_jax(estimator: ic.Estimator, m: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.asarray(jax.vjp(jax_layer(estimator, m), jnp.zeros(v.shape))[1](jnp.asarray(v))[0])


def by_jitted_jax(estimator: ic.Estimator, m: np.ndarray, v: np.ndarray) -> np.ndarray:
    pull = jax.jit(lambda z, v: jax.vjp(jax_layer(estimator, m), z)[1](v)[0])
    return np.asarray(pull(jnp.zeros(v.shape), jnp.asarray(v)))


LAYERS = {"torch layer": by_torch, "jax layer": by_jax, "jax jit": by_jitted_jax}


def assert_told(pull: Any, k: int, lam: float) -> None:
    """The part of a sample is NaN exactly where the dense terms grew, and the estimate elsewhere."""
    m, v, _ = maps()
    grew, estimate, _ = terms(k, lam)
    for estimator in estimators(k, lam, "nan"):
        gradient = pull(estimator, m, v)
        np.testing.assert_array_equal(np.isnan(gradient).all(axis=1), grew)
        np.testing.assert_array_equal(np.isnan(gradient).any(axis=1), grew)
        np.testing.assert_allclose(gradient[~grew], estimate[~grew], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("k", "lam"), SETTINGS)
def test_what_grows_is_wrong_and_what_contracts_is_not_accused(k: int, lam: float) -> None:
    """The rule itself, on 300 maps, by dense linear algebra."""
    m, v, families = maps()
    grew, _, error = terms(k, lam)
    radius = np.abs(np.linalg.eigvals(m)).max(axis=1)
    norm = np.linalg.norm(m, 2, axis=(1, 2))
    wrong = (error > 10) & (norm >= 1)
    assert wrong.sum() >= 40
    assert np.mean(grew[wrong]) > 0.99
    assert np.all(grew[wrong & (error > 11)])
    assert not np.any(grew[np.isin(families, CONTRACTIONS)])
    assert not np.any(grew[np.isin(families, RADII)])
    assert np.any(norm[np.isin(families, RADII)] > 2)
    assert np.all(radius[np.isin(families, RADII)] < 1)
    # Theorem 2 bounds the error of every contraction in the norm of the gradient itself.
    contracts = norm < 1
    q = 1 - lam * (1 - norm[contracts])
    exact = np.linalg.solve(np.eye(WIDTH) - m.transpose(0, 2, 1), v[..., None])[contracts, :, 0]
    bound = q**k / (1 - norm[contracts]) * np.linalg.norm(v[contracts], axis=1) / np.linalg.norm(exact, axis=1)
    assert np.all(error[contracts] <= bound * (1 + 1e-9))


@pytest.mark.parametrize(("k", "lam"), SETTINGS)
def test_the_core_tells_in_every_library(k: int, lam: float, library: Library) -> None:
    if library is JAX and k > 2:
        pytest.skip("eager JAX compiles each operation")
    assert_told(by_core(library), k, lam)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(("k", "lam"), SETTINGS[1:3])
def test_layers_tell(k: int, lam: float, name: str) -> None:
    assert_told(LAYERS[name], k, lam)


def pushed(estimator: ic.Estimator, m: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The tangent along v of the transposed map, whose terms are those of a pullback of v."""
    z = np.zeros_like(v)
    return estimator.jvp(problem(m.transpose(0, 2, 1)), z, z, v)[1]


def pushed_by_jax(estimator: ic.Estimator, m: np.ndarray, v: np.ndarray) -> np.ndarray:
    layer = jax_layer(estimator, m.transpose(0, 2, 1))
    return np.asarray(jax.jit(lambda z, v: jax.jvp(layer, (z,), (v,))[1])(jnp.zeros(v.shape), jnp.asarray(v)))


def mapped_by_jax(estimator: ic.Estimator, m: np.ndarray, v: np.ndarray) -> np.ndarray:
    """One map a call, and ``vmap`` over all of them."""

    def pull(m: Any, v: Any) -> Any:
        layer = lambda z: ic.fixed_point(lambda h, z: m @ h + z, jnp.zeros_like(z), z, gradient=estimator).value  # noqa: E731
        return jax.vjp(layer, jnp.zeros_like(v))[1](v)[0]

    return np.asarray(jax.jit(jax.vmap(pull))(jnp.asarray(m), jnp.asarray(v)))


@pytest.mark.parametrize("push", [pushed, pushed_by_jax], ids=["numpy", "jax jit"])
def test_tangents_of_the_series_are_told_as_cotangents_are(push: Any) -> None:
    m, v, _ = maps()
    grew, estimate, _ = terms(5, 0.5)
    tangent = push(ic.Neumann(5, 0.5, on_growth="nan"), m, v)
    np.testing.assert_array_equal(np.isnan(tangent).all(axis=1), grew)
    np.testing.assert_allclose(tangent[~grew], estimate[~grew], rtol=1e-9, atol=1e-9)


def test_samples_of_vmap_are_told_apart() -> None:
    assert_told(mapped_by_jax, 5, 0.5)


ONE_OF_THREE = np.asarray([0.5, -400.0, 0.9])[:, None, None] * np.eye(2)


UNITS = 10.0 ** np.linspace(-6, 6, WIDTH)


def in_units(name: str, estimator: ic.Estimator, m: np.ndarray, v: np.ndarray, scale: Any) -> np.ndarray:
    """The gradient of the unknown in other units, S h, with ``scale=``: its Jacobian is S M S⁻¹."""
    m, v = UNITS[:, None] * m / UNITS, v / UNITS
    if name == "core":
        return estimator.vjp(problem(m, scale=scale), np.zeros_like(v), np.zeros_like(v))[1](v)
    if name == "torch":
        matrices, z = torch.tensor(m), torch.zeros(v.shape, dtype=torch.float64, requires_grad=True)
        f = lambda h, z: torch.einsum("nij,nj->ni", matrices, h) + z  # noqa: E731
        scale = torch.tensor(scale)
        h = ic.fixed_point(f, torch.zeros_like(z), z, gradient=estimator, batch_ndim=1, scale=scale).value
        return torch.autograd.grad(h, z, torch.tensor(v))[0].numpy()
    f = lambda h, z: jnp.einsum("nij,nj->ni", m, h) + z  # noqa: E731
    scale = jnp.asarray(scale)

    def layer(z: Any) -> Any:
        return ic.fixed_point(f, jnp.zeros_like(z), z, gradient=estimator, batch_ndim=1, scale=scale).value

    def pull(z: Any, v: Any) -> Any:
        return jax.vjp(layer, z)[1](v)[0]

    pull = jax.jit(pull) if name == "jitted" else pull
    return np.asarray(pull(jnp.zeros(v.shape), jnp.asarray(v)))


@pytest.mark.parametrize("each", [False, True], ids=["one scale", "a scale for each sample"])
@pytest.mark.parametrize("name", ["core", "torch", "jax", "jitted"])
@pytest.mark.parametrize("make", [ic.Neumann, ic.Unroll])
def test_growth_is_that_of_the_unknown_without_units(make: Any, name: str, each: bool) -> None:
    m, v, _ = maps()
    grew = terms(5, 0.5)[0]
    scale = np.tile(UNITS, (len(v), 1)) if each else UNITS
    gradient = in_units(name, make(5, 0.5, on_growth="nan"), m, v, scale)
    np.testing.assert_array_equal(np.isnan(gradient).all(axis=1), grew)
    assert 50 < grew.sum() < len(grew) - 50
    np.testing.assert_allclose((gradient * UNITS)[~grew], terms(5, 0.5)[1][~grew], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("make", [ic.Neumann, ic.Unroll, ic.BPTT])
def test_transforms_of_torch_say_nothing_untrue_of_growth(make: Any) -> None:
    """Within torch.func the terms are not tested, but values and derivatives are those of the estimator."""
    m, v, _ = (x[:3] if isinstance(x, np.ndarray) else x for x in maps())
    matrices = torch.tensor(m)
    f = lambda h, z: torch.einsum("nij,nj->ni", matrices, h) + z  # noqa: E731
    settings = {"k": 4} if make is ic.BPTT else {"k": 4, "lam": 0.5}

    def layer(z: torch.Tensor) -> torch.Tensor:
        return ic.fixed_point(f, torch.zeros_like(z), z, gradient=make(**settings), batch_ndim=1).value

    z, w = torch.zeros(v.shape, dtype=torch.float64), torch.tensor(v)
    (pulled,) = torch.func.vjp(layer, z)[1](w)
    expected = terms(4, 0.5 if make is not ic.BPTT else 1.0)[1][:3]
    np.testing.assert_allclose(pulled.numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("pull", [by_core(library) for library in (JAX,)] + [by_torch, by_jax], ids=["core", "t", "j"])
@pytest.mark.parametrize("estimator", [ic.Neumann(5, 0.5), ic.Unroll(5, 0.5), ic.Unroll(5, 0.5, True), ic.BPTT(5)])
def test_a_warning_names_the_samples_the_growth_and_the_remedy(pull: Any, estimator: Any) -> None:
    growth = "2e+09" if estimator.growth.lam == 0.5 else "3e+10"
    words = (
        rf"{type(estimator).__name__}\(k=5.*in 1 of 3 samples \(1\): .* {growth.replace('+', '.')} times .*Implicit\(\)"
    )
    with pytest.warns(ic.GrowingGradientWarning, match=words) as caught:
        gradient = pull(estimator, ONE_OF_THREE, np.ones((3, 2)))
    assert [w.category for w in caught].count(ic.GrowingGradientWarning) == 1
    assert np.abs(gradient[1]).max() > 1e8
    assert np.all(np.abs(gradient[[0, 2]]) < 10)


@pytest.mark.parametrize("solver", [ic.NewtonKrylov(), ic.Anderson(), ic.Broyden()], ids=lambda s: type(s).__name__)
def test_a_stiff_step_is_told_by_the_default_gradient_and_right_by_the_exact_one(solver: ic.Solver) -> None:
    """Implicit Euler of u' = -400 u."""

    def gradient(xp: Any, **options: Any) -> Any:
        if xp is torch:
            u0 = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
            u = ic.fixed_point(lambda u, z: z - 400 * u, torch.zeros_like(u0), u0, solver=solver, **options).value
            return torch.autograd.grad(u.sum(), u0)[0].numpy()
        f = lambda z: ic.fixed_point(lambda u, z: z - 400 * u, jnp.zeros(2), z, solver=solver, **options).value.sum()  # noqa: E731
        return np.asarray(jax.grad(f)(jnp.asarray([1.0, 2.0])))

    for xp in (torch, jnp):
        with ANNOUNCED:
            gradient(xp)
        np.testing.assert_allclose(gradient(xp, gradient=ic.Implicit()), 1 / 401, rtol=1e-9)


def test_a_compiled_program_holds_no_callback_and_says_nothing_unless_nan_is_asked_for() -> None:
    for estimator in (ic.Neumann(), ic.Unroll()):
        program = jax.jit(jax.grad(lambda z, e=estimator: jax_layer(e, ONE_OF_THREE)(z).sum()))
        assert "callback" not in str(jax.make_jaxpr(program)(jnp.zeros((3, 2))))
        assert "growth" not in str(jax.make_jaxpr(program)(jnp.zeros((3, 2))))
        assert float(jnp.abs(program(jnp.zeros((3, 2)))).max()) > 1e8
    for estimator in (ic.Neumann(on_growth="nan"), ic.Unroll(on_growth="nan")):
        program = jax.jit(jax.grad(lambda z, e=estimator: jax_layer(e, ONE_OF_THREE)(z).sum()))
        exported = export.export(program)(jnp.zeros((3, 2)))
        assert np.isnan(np.asarray(exported.call(jnp.zeros((3, 2))))).tolist() == [[False] * 2, [True] * 2, [False] * 2]


@pytest.mark.parametrize("bad", [np.inf, np.nan])
@pytest.mark.parametrize("pull", [by_core(JAX), by_torch, by_jax], ids=["core", "torch", "jax"])
def test_a_cotangent_that_is_not_finite_has_not_grown(pull: Any, bad: float) -> None:
    m, v = np.asarray([0.5, 0.5])[:, None, None] * np.eye(2), np.ones((2, 2))
    v[1, 0] = bad
    for estimator in (ic.Neumann(), ic.Unroll(), ic.BPTT(3)):
        gradient = pull(estimator, m, v)  # no warning, which would be an error
        assert not np.any(np.isfinite(gradient[1, 0]))
        assert np.all(np.isfinite(gradient[0]))


def test_small_and_zero_cotangents_have_not_grown_and_an_overflow_has() -> None:
    m = np.asarray([0.9, -0.9, 0.9])[:, None, None] * np.eye(2)
    v = np.asarray([[0.0, 0.0], [1e-300, 1e-310], [5e-324, 0.0]])
    for estimator in (ic.Neumann(), ic.Unroll(), ic.BPTT(5)):
        by_core(JAX)(estimator, m, v)
        by_torch(estimator, m, v)
    # Squares of the first term underflow, and squares of the last, three times as large, do not.
    for library in (NUMPY, JAX):
        by_core(library)(ic.Neumann(5, 1.0), 3**0.25 * np.eye(2)[None], np.asarray([[1.4e-162, 0.0]]))
    huge = np.asarray([-1e200])[:, None, None] * np.eye(2)
    with ANNOUNCED, np.errstate(all="ignore"):
        by_torch(ic.Unroll(5, 1.0), huge, np.ones((1, 2)))


def test_one_term_is_exempt_and_growth_may_be_ignored() -> None:
    for estimator in (ic.OneStep(), ic.Neumann(1), ic.Unroll(1), ic.BPTT(1), *estimators(5, 1.0, "ignore")):
        for pull in (by_torch, by_jax):
            pull(estimator, ONE_OF_THREE, np.ones((3, 2)))
    for make in (ic.Neumann, ic.Unroll, ic.BPTT):
        with pytest.raises(ValueError, match="on_growth must be 'warn', 'nan' or 'ignore', got 'raise'"):
            make(on_growth="raise")


def test_tangents_of_the_series_are_tested() -> None:
    z, dz = np.zeros((3, 2)), np.ones((3, 2))
    with pytest.warns(ic.GrowingGradientWarning, match=r"1 of 3 samples \(1\)"):
        ic.Neumann().jvp(problem(ONE_OF_THREE), z, z, dz)
    nan = ic.Neumann(on_growth="nan")
    by_hand = ic.Neumann(on_growth="nan").jvp(problem(ONE_OF_THREE), z, z, dz)[1]
    compiled = jax.jit(lambda z, dz: jax.jvp(jax_layer(nan, ONE_OF_THREE), (z,), (dz,))[1])(z, dz)
    m = torch.tensor(ONE_OF_THREE)

    def layer(z: Any) -> Any:
        f = lambda h, z: torch.einsum("nij,nj->ni", m, h) + z  # noqa: E731
        return ic.fixed_point(f, torch.zeros_like(z), z, gradient=nan, batch_ndim=1).value

    tensors = torch.func.jvp(layer, (torch.tensor(z),), (torch.tensor(dz),))[1]
    for tangent in (by_hand, np.asarray(compiled), tensors.numpy()):
        assert np.isnan(tangent).all(axis=1).tolist() == [False, True, False]


# A test that passes changes no derivative, of any order, in either mode.

W = np.random.default_rng(1).normal(size=(3, 3))
W *= 0.9 / np.linalg.norm(W, 2)
X = np.random.default_rng(2).normal(size=(2, 3))


@pytest.mark.parametrize("on_growth", ["warn", "nan"])
@pytest.mark.parametrize("make", [ic.Neumann, ic.Unroll, partial(ic.Unroll, recompute=True)], ids=["n", "u", "r"])
def test_jax_has_the_same_derivatives_of_every_order(make: Any, on_growth: Any) -> None:
    def loss(x: Any, on_growth: str) -> Any:
        estimator = make(4, 0.7, on_growth=on_growth)
        f = lambda h, x: jnp.tanh(h @ W.T + x)  # noqa: E731
        h = ic.fixed_point(f, jnp.zeros_like(x), x, gradient=estimator, batch_ndim=1).value
        return 1e-3 * jnp.sum(h) + jnp.sum(h**3)

    for order in (
        jax.grad,
        jax.jacfwd,
        jax.hessian,
        lambda f: jax.jacrev(jax.jacrev(f)),
        lambda f: jax.jacrev(jax.jacfwd(f)),
        lambda f: jax.jit(jax.jacfwd(jax.grad(jax.checkpoint(f)))),
        lambda f: jax.grad(lambda x: jax.lax.scan(lambda c, _: (c + f(x + c), None), 0.0, length=2)[0]),
        lambda f: lambda x: jax.vmap(jax.grad(f))(jnp.stack([x, 2 * x])),
    ):
        ours = order(partial(loss, on_growth=on_growth))(jnp.asarray(X))
        theirs = order(partial(loss, on_growth="ignore"))(jnp.asarray(X))
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("on_growth", ["warn", "nan"])
@pytest.mark.parametrize("make", [ic.Neumann, ic.Unroll, partial(ic.Unroll, recompute=True)], ids=["n", "u", "r"])
def test_torch_has_the_same_derivatives_of_every_order(make: Any, on_growth: Any) -> None:
    w = torch.tensor(W)

    def loss(x: Any, on_growth: str) -> Any:
        f = lambda h, x: torch.tanh(h @ w.T + x)  # noqa: E731
        h = ic.fixed_point(f, torch.zeros_like(x), x, gradient=make(4, 0.7, on_growth=on_growth), batch_ndim=1).value
        return 1e-3 * h.sum() + (h**3).sum()

    orders: list[Any] = [
        lambda f: torch.autograd.functional.jacobian(f, torch.tensor(X)),
        lambda f: torch.autograd.functional.hessian(f, torch.tensor(X)),
        lambda f: torch.autograd.functional.hessian(f, torch.tensor(X), vectorize=True),
    ]
    if not isinstance(make, partial):
        orders += [lambda f: torch.func.grad(f)(torch.tensor(X)), lambda f: torch.func.hessian(f)(torch.tensor(X))]
        orders += [lambda f: torch.func.vmap(torch.func.grad(f))(torch.tensor(np.stack([X, 2 * X])))]
    for order in orders:
        ours, theirs = (order(partial(loss, on_growth=setting)) for setting in (on_growth, "ignore"))
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)


def test_a_second_derivative_is_not_taken_for_growth() -> None:
    """Its cotangents join between the two points compared: here a million times the one at the end."""
    x = torch.tensor(X, requires_grad=True)
    h = ic.fixed_point(lambda h, x: torch.sin(0.9 * h + x), torch.zeros_like(x), x, batch_ndim=1).value
    (gradient,) = torch.autograd.grad(h.sum() + 1e-6 * h.square().sum(), x, create_graph=True)
    torch.autograd.grad(gradient.sum(), x)
    z = jnp.asarray(X)
    layer = lambda x: ic.fixed_point(lambda h, x: jnp.sin(0.9 * h + x), jnp.zeros_like(x), x, batch_ndim=1).value  # noqa: E731
    total = lambda x: jnp.sum(layer(x)) + 1e-6 * jnp.sum(layer(x) ** 2)  # noqa: E731
    jax.grad(lambda x: jax.grad(total)(x).sum())(z)
    jax.jvp(jax.grad(total), (z,), (z,))


def test_growth_in_one_leaf_is_growth_of_the_sample() -> None:
    """A sample extends over all leaves: the norms are joint, and its part is NaN in every leaf."""

    def f(h: Any, z: Any) -> Any:
        return {"a": 0.5 * h["a"] + z, "b": -9.0 * h["b"] + 0.0 * h["a"] + z}

    x = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    h0 = {"a": torch.zeros_like(x), "b": torch.zeros_like(x)}
    h = ic.fixed_point(f, h0, x, gradient=ic.Unroll(5, 1.0, on_growth="nan"), solver=ic.NewtonKrylov(), batch_ndim=1)
    (gradient,) = torch.autograd.grad(1e5 * h.value["a"][0].sum() + h.value["b"].sum(), x)
    assert torch.isnan(gradient).all(dim=1).tolist() == [False, True]  # beside 1e5, 9⁴ has not grown


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_tells_too(dtype: torch.dtype) -> None:
    x = torch.ones(2, 3, dtype=dtype, requires_grad=True)
    slope = torch.tensor([[0.5], [-6.0]], dtype=dtype)
    for estimator in (ic.Neumann(5, 1.0), ic.Unroll(5, 1.0), ic.Unroll(5, 1.0, True), ic.BPTT(5)):
        h = ic.fixed_point(lambda h, z: slope * h + z, torch.zeros_like(x), x, gradient=estimator, batch_ndim=1).value
        with pytest.warns(ic.GrowingGradientWarning, match=r"1 of 2 samples \(1\)"):
            h.sum().backward()


# Costs.


@pytest.fixture
def norms(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    calls: list[int] = []
    for space in {Space, *Space.__subclasses__()}:
        if "norm" in vars(space):
            norm = space.norm
            monkeypatch.setattr(space, "norm", lambda self, x, norm=norm: calls.append(1) or norm(self, x))
    return calls


@pytest.mark.parametrize("estimator", [*estimators(5, 1.0, "warn"), *estimators(5, 1.0, "nan")], ids=repr)
def test_a_pullback_pays_two_norms(estimator: ic.Estimator, norms: list[int]) -> None:
    m, v = 0.5 * np.eye(2)[None], np.ones((1, 2))
    zero = np.zeros_like(v)
    pullback = estimator.vjp(problem(m), zero, zero)[1]
    norms.clear()
    pullback(v)
    assert len(norms) == 2
    x = torch.ones(1, 2, requires_grad=True)
    h = ic.fixed_point(lambda h, z: 0.5 * h + z, torch.zeros_like(x), x, gradient=estimator, batch_ndim=1).value
    norms.clear()
    h.sum().backward()
    assert len(norms) == 2


def test_a_device_is_not_waited_for() -> None:
    """Numbers are read once they have arrived: at the next pullback, or later, in order."""
    arrived, read = set[int](), list[float]()

    class Slow(Unread):
        def send(self, numbers: torch.Tensor) -> tuple[torch.Tensor, Callable[[], bool]]:
            name = int(numbers)
            return numbers, lambda: name in arrived

    unread = Slow()
    for i in range(20):
        unread.add(lambda x: read.append(float(x)), torch.tensor(i))
    assert read == []
    arrived |= {0, 1, 3}
    unread.add(lambda x: read.append(float(x)), torch.tensor(20))
    assert read == [0, 1]
    arrived |= set(range(30))
    unread.add(lambda x: read.append(float(x)), torch.tensor(21))
    assert read == [*range(8), 21]


def test_two_threads_read_only_what_has_arrived() -> None:
    """Both ask for the first numbers at the same time, and one of them may take them."""
    read, arrived = list[float](), set[int]()

    class Slow(Unread):
        def send(self, numbers: torch.Tensor) -> tuple[torch.Tensor, Callable[[], bool]]:
            name = int(numbers)

            def query() -> bool:
                time.sleep(0.05)
                return name in arrived

            return numbers, query

    unread = Slow()
    for i in range(2):
        unread.add(lambda x: read.append(float(x)), torch.tensor(i))
    arrived.add(0)
    threads = [Thread(target=unread.add, args=(lambda x: read.append(float(x)), torch.tensor(i))) for i in (2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read == [0]


def test_the_setting_is_part_of_the_record() -> None:
    assert repr(ic.Neumann()) == "Neumann(k=5, lam=0.5)"
    for estimator in estimators(5, 1.0, "nan"):
        assert "on_growth='nan'" in repr(estimator)
        assert eval(repr(estimator), vars(ic)) == estimator
        assert estimator != eval(repr(estimator).replace(", on_growth='nan'", ""), vars(ic))


def test_the_limit_is_an_error_of_ten_for_a_scalar_map() -> None:
    for k in (2, 3, 5, 30):
        test = GrowthTest("it", k, 1.0, "warn")
        slope = 10 ** (1 / k)  # of which the error relative to the exact derivative is slopeᵏ = 10
        assert test.limit == pytest.approx(slope ** (k - 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        by_torch(ic.Unroll(2, 1.0), np.asarray([[[3.1]]]), np.ones((1, 1)))
    with ANNOUNCED:
        by_torch(ic.Unroll(2, 1.0), np.asarray([[[3.2]]]), np.ones((1, 1)))


def test_a_certificate_measures_what_grows_and_does_not_warn() -> None:
    """Its error is measured, whatever is done about growth, and is the one without a test."""
    one = np.asarray([[-9.0]])[None] * np.eye(2)
    z, v = np.zeros((1, 2)), np.ones((1, 2))
    found = [
        certify(problem(one), z, z, ic.Neumann(5, 1.0, on_growth=s), cotangent=v) for s in ("warn", "nan", "ignore")
    ]
    assert found[0].relative_error == found[1].relative_error == found[2].relative_error
    assert found[0].relative_error == pytest.approx(9.0**5, rel=1e-6)


@pytest.mark.parametrize("gradient", [ic.Unroll(3, 1.0), ic.BPTT(3)], ids=repr)
def test_unrolled_steps_behind_a_forced_number_do_not_warn(gradient: Any, recwarn: pytest.WarningsRecorder) -> None:
    """They are the steps of a recurrent model. ``"nan"`` is obeyed, and a series of terms warns as ever."""
    slope = torch.full((2, 1), -3.0, requires_grad=True)

    def backward(gradient: Any) -> Any:
        options: Any = {"solver": ic.steps(2), "gradient": gradient, "batch_ndim": 1}
        value = ic.fixed_point(lambda h, z: slope * h + z, torch.zeros(2, 1), torch.ones(2, 1), **options).value
        return torch.autograd.grad(value.sum(), slope)[0]

    assert backward(gradient).isfinite().all()
    assert not recwarn.list
    assert backward(dataclasses.replace(gradient, on_growth="nan")).isnan().all()
    with pytest.warns(ic.GrowingGradientWarning):
        backward(ic.Neumann(3, 1.0))
