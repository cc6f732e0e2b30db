"""The paper's theorems as properties, with their explicit rates, on random maps; and the maps that attain them."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from libraries import JAX, LIBRARIES, NUMPY, TORCH, Library, flat, unflat
from problems import Case, affine, layer, scalar

import implicit_core as ic

SOLVER = ic.NewtonKrylov(rtol=1e-14, atol=1e-14, max_steps=60)

maps = st.builds(
    lambda linear, width, contraction, seed, scale: (
        affine_of_norm(width, contraction, seed)
        if linear
        else layer(batch=1, width=width, contraction=contraction, seed=seed, scale=scale)
    ),
    linear=st.booleans(),
    width=st.integers(1, 6),
    contraction=st.floats(0.05, 0.9),
    seed=st.integers(0, 10**6),
    scale=st.floats(0.0, 2.0),
)
terms, dampings = st.integers(1, 60), st.floats(0.05, 1.0)
# JAX compiles each operation for each shape: test_jax_properties.py has the theorem for it, in one shape.
libraries = st.sampled_from([library for library in LIBRARIES if library is not JAX])


def affine_of_norm(n: int, norm: float, seed: int) -> Case:
    case = affine(n, 0.5, seed)
    m = case.z["m"] * norm / np.linalg.norm(case.z["m"], 2)
    root = np.linalg.solve(np.eye(n) - m, case.z["b"])
    return Case(case.name, case.f, case.vjp, case.jvp, case.h0, {"m": m, "b": case.z["b"]}, root, contraction=norm)


def root_of(case: Case) -> Any:
    return ic.solve(case.problem(), case.h0, case.z, solver=SOLVER).value


def jacobians(case: Case, h: Any) -> tuple[np.ndarray, np.ndarray]:
    """∂F/∂h and ∂F/∂z, dense, one JVP a column."""
    zero_h, zero_z = np.zeros(flat(h).size), np.zeros(flat(case.z).size)

    def column(dh: np.ndarray, dz: np.ndarray) -> np.ndarray:
        return flat(case.jvp(NUMPY.xp, h, case.z, unflat(dh, h), unflat(dz, case.z)))

    return (
        np.stack([column(e, zero_z) for e in np.eye(zero_h.size)], axis=1),
        np.stack([column(zero_h, e) for e in np.eye(zero_z.size)], axis=1),
    )


def matrix(estimator: ic.Estimator, case: Case, h: Any, library: Library = NUMPY) -> np.ndarray:
    """The estimator's A, d_z × d_h as in the paper, one pullback a column."""
    _, pullback = estimator.vjp(case.problem(library), library.array(h), library.array(case.z))
    columns = [flat(library.numpy(pullback(library.array(unflat(e, h))))) for e in np.eye(flat(h).size)]
    return np.stack(columns, axis=1)


@given(case=maps, k=terms, lam=dampings, library=libraries)
def test_theorem_2_neumann_rate(case: Case, k: int, lam: float, library: Library) -> None:
    """‖A^neu - A‖ ≤ ‖∂F/∂z‖ qᵏ / (1 - L_h), q = 1 - λ (1 - L_h)."""
    h = root_of(case)
    j_h, j_z = jacobians(case, h)
    exact = j_z.T @ np.linalg.inv(np.eye(len(j_h)) - j_h.T)
    error = np.linalg.norm(matrix(ic.Neumann(k, lam), case, h, library) - exact, 2)
    l_h = np.linalg.norm(j_h, 2)
    bound = np.linalg.norm(j_z, 2) * (1 - lam * (1 - l_h)) ** k / (1 - l_h)
    assert error <= bound * (1 + 1e-9) + 1e-9


@given(case=maps, k=terms, lam=dampings, library=libraries)
def test_theorem_2_unrolled_form_obeys_the_same_rate_at_the_fixed_point(
    case: Case, k: int, lam: float, library: Library
) -> None:
    """At an exact fixed point h_t stays, and Eq. (17) is Eq. (18)."""
    h = root_of(case)
    j_h, j_z = jacobians(case, h)
    exact = j_z.T @ np.linalg.inv(np.eye(len(j_h)) - j_h.T)
    unrolled = matrix(ic.Unroll(k, lam), case, h, library)
    l_h = np.linalg.norm(j_h, 2)
    bound = np.linalg.norm(j_z, 2) * (1 - lam * (1 - l_h)) ** k / (1 - l_h)
    assert np.linalg.norm(unrolled - exact, 2) <= bound * (1 + 1e-9) + 1e-9
    np.testing.assert_allclose(unrolled, matrix(ic.Neumann(k, lam), case, h), atol=1e-9)


@given(case=maps, k=terms, lam=dampings, seed=st.integers(0, 10**6), library=libraries)
def test_theorem_2_unrolled_rate_from_anywhere(case: Case, k: int, lam: float, seed: int, library: Library) -> None:
    """Eq. (17) from a point far from the root, against the bound its recursion obeys.

    With G_t = ∂h_t/∂z and G the exact Jacobian, G_{t+1} - G = B_t (G_t - G) + (B_t - B) G + λ (Z_t - Z), Z = ∂F/∂z. So
    ‖G_k - G‖ ≤ qᵏ ‖G‖ + λ Σ_t q^{k-1-t} (‖J_t - J‖ ‖G‖ + ‖Z_t - Z‖), and every term vanishes as k grows: h_t → h*.
    """
    h = start = unflat(np.random.default_rng(seed).normal(size=flat(case.h0).size), case.h0)
    j_h, j_z = jacobians(case, root_of(case))
    exact = np.linalg.solve(np.eye(len(j_h)) - j_h, j_z)
    size, q = np.linalg.norm(exact, 2), 1 - lam * (1 - case.contraction)
    bound = size
    for _ in range(k):
        at_h, at_z = jacobians(case, h)
        bound = q * bound + lam * (np.linalg.norm(at_h - j_h, 2) * size + np.linalg.norm(at_z - j_z, 2))
        h = lam * case.f(NUMPY.xp, h, case.z) + (1 - lam) * h
    error = np.linalg.norm(matrix(ic.Unroll(k, lam), case, start, library) - exact.T, 2)
    assert error <= bound * (1 + 1e-9) + 1e-9


@settings(max_examples=20)
@given(case=maps, lam=st.floats(0.5, 1.0), seed=st.integers(0, 10**6))
def test_theorem_2_unrolled_form_converges_to_the_exact_jacobian(case: Case, lam: float, seed: int) -> None:
    """Eq. (16), from any start: q ≤ 0.95 here, so 500 steps leave less than 1e-9 of it."""
    start = unflat(np.random.default_rng(seed).normal(size=flat(case.h0).size), case.h0)
    j_h, j_z = jacobians(case, root_of(case))
    exact = j_z.T @ np.linalg.inv(np.eye(len(j_h)) - j_h.T)
    error = np.linalg.norm(matrix(ic.Unroll(500, lam), case, start) - exact, 2)
    assert error <= 1e-7 * max(1.0, np.linalg.norm(exact, 2))


# Theorem 2 is attained where F's Jacobian is normal with ‖∂F/∂h‖ as an eigenvalue, along its eigenvector.


def normal_case(slopes: list[float], scale: float, width: int, seed: int) -> tuple[Case, np.ndarray]:
    """tanh(aᵢ W h + s x) at x = 0 and its root h = 0: ∂F/∂hᵢ = aᵢ W and ∂F/∂x = s I, and cotangents along W's e.

    W is normal, not symmetric, of norm 1 with W e = e; every third time it is the identity. Derivatives in a and W are
    zero at h = 0.
    """
    rng = np.random.default_rng(seed)
    q, w = np.linalg.qr(rng.normal(size=(width, width)))[0], np.eye(width)
    if seed % 3:
        for i in range(1, width - 1, 2):  # turned and shrunk planes
            angle, size = rng.uniform(0, np.pi), rng.uniform(0, 1)
            cos, sin = size * np.cos(angle), size * np.sin(angle)
            w[i : i + 2, i : i + 2] = [[cos, -sin], [sin, cos]]
        w = q @ w @ q.T
    slope = np.asarray(slopes)[:, None]

    def inner(h: Any, z: Any) -> Any:
        return z["slope"] * (h @ z["w"].T) + scale * z["x"]

    def vjp(xp: Any, h: Any, z: Any, v: Any) -> Any:
        g = v * (1 - xp.tanh(inner(h, z)) ** 2)
        in_slope = xp.sum(g * (h @ z["w"].T), axis=1, keepdims=True)
        return (z["slope"] * g) @ z["w"], {"slope": in_slope, "w": (z["slope"] * g).T @ h, "x": scale * g}

    def jvp(xp: Any, h: Any, z: Any, dh: Any, dz: Any) -> Any:
        tangent = z["slope"] * (dh @ z["w"].T + h @ dz["w"].T) + dz["slope"] * (h @ z["w"].T) + scale * dz["x"]
        return (1 - xp.tanh(inner(h, z)) ** 2) * tangent

    zeros = np.zeros((len(slopes), width))
    z = {"slope": slope, "w": w, "x": zeros}
    case = Case("normal", lambda xp, h, z: xp.tanh(inner(h, z)), vjp, jvp, h0=zeros, z=z, root=zeros, batch_ndim=1)
    return case, rng.uniform(0.5, 2.0, size=slope.shape) * (q[:, 0] if seed % 3 else rng.normal(size=zeros.shape))


@st.composite
def rates(draw: Any) -> tuple[int, float, list[float]]:
    """k, λ and an L for each sample, such that qᵏ - qᵏ⁺¹ ≥ 1e-6: one term more or less is detectable."""
    lam = draw(st.floats(0.05, 1.0))
    slopes = draw(st.lists(st.floats(0.0, 0.95), min_size=1, max_size=3))
    q = [1 - lam * (1 - slope) for slope in slopes]
    assume(min(q) > 1e-5)
    most = min(math.floor(math.log(1e-6 / (1 - rate)) / math.log(rate)) for rate in q)
    return draw(st.integers(1, min(60, most))), lam, slopes


def assert_attained(gradient: Any, v: np.ndarray, scale: float, k: int, lam: float, slopes: list[float]) -> None:
    """The error of each sample is ‖∂F/∂x‖ qᵏ / (1 - L), against the exact gradient, both to 1e-12 of its norm."""
    slope = np.asarray(slopes)[:, None]
    q = 1 - lam * (1 - slope)
    exact = scale * v / (1 - slope)
    error, size = exact - np.asarray(gradient), np.linalg.norm(exact, axis=1)
    bound = scale * q[:, 0] ** k / (1 - slope[:, 0]) * np.linalg.norm(v, axis=1)
    assert np.all(np.abs(np.linalg.norm(error, axis=1) - bound) <= 1e-12 * size)
    assert np.all(np.linalg.norm(error - q**k * exact, axis=1) <= 1e-12 * size)


FORMS: dict[str, Callable[[int, float], ic.Estimator]] = {
    "Neumann": ic.Neumann,
    "Unroll": ic.Unroll,
    "Unroll, recompute": lambda k, lam: ic.Unroll(k, lam, recompute=True),
}
forms = pytest.mark.parametrize("form", FORMS)
attained = given(
    rate=rates(), scale=st.floats(0.1, 10.0), width=st.integers(1, 6), seed=st.integers(0, 10**6), library=libraries
)


@forms
@attained
@example(rate=(3, 0.5, [0.8]), scale=2.0, width=3, seed=1, library=NUMPY)
@example(rate=(1, 0.3, [0.5, 0.9]), scale=0.5, width=2, seed=0, library=NUMPY)
def test_theorem_2_is_attained(
    form: str, rate: tuple[int, float, list[float]], scale: float, width: int, seed: int, library: Library
) -> None:
    """In both modes. One term more or less, another λ, or the exact gradient would miss the rate."""
    k, lam, slopes = rate
    case, v = normal_case(slopes, scale, width, seed)
    problem, h, z = case.problem(library), library.array(case.root), library.array(case.z)
    value, pullback = FORMS[form](k, lam).vjp(problem, h, z)
    np.testing.assert_array_equal(library.numpy(value), case.root)
    assert_attained(library.numpy(pullback(library.array(v)))["x"], v, scale, k, lam, slopes)
    # ∂F/∂x is a multiple of the identity, and W and its transpose share this eigenvector.
    dz = library.array({"slope": 0 * case.z["slope"], "w": 0 * case.z["w"], "x": v})
    _, tangent = FORMS[form](k, lam).jvp(problem, h, z, dz)
    assert_attained(library.numpy(tangent), v, scale, k, lam, slopes)


@forms
@settings(max_examples=30)
@attained
@example(rate=(3, 0.5, [0.8]), scale=2.0, width=3, seed=1, library=TORCH)
def test_theorem_2_is_attained_by_autograd(
    form: str, rate: tuple[int, float, list[float]], scale: float, width: int, seed: int, library: Library
) -> None:
    k, lam, slopes = rate
    case, v = normal_case(slopes, scale, width, seed)
    z = TORCH.array(case.z)
    z["x"].requires_grad_()
    f = functools.partial(case.f, TORCH.xp)
    value = ic.fixed_point(f, TORCH.array(case.root), z, gradient=FORMS[form](k, lam), batch_ndim=1).value
    (gradient,) = torch.autograd.grad(value, z["x"], TORCH.array(v))
    assert_attained(gradient, v, scale, k, lam, slopes)


@functools.cache
def by_jax(form: str, k: int, lam: float) -> Callable[..., Any]:
    """The pullback of v and the tangent along it, of tanh(a W h + s x) in x."""

    @jax.jit
    def run(z: Any, v: Any, scale: Any) -> Any:
        def layer_of(x: Any) -> Any:
            f = lambda h, x: jax.numpy.tanh(z["slope"] * (h @ z["w"].T) + scale * x)  # noqa: E731
            h0 = jax.numpy.zeros(x.shape)
            return ic.fixed_point(f, h0, x, gradient=FORMS[form](k, lam), batch_ndim=1).value

        return jax.vjp(layer_of, z["x"])[1](v)[0], jax.jvp(layer_of, (z["x"],), (v,))[1]

    return run


@forms
@pytest.mark.parametrize(("k", "lam"), [(1, 0.4), (3, 0.5), (12, 0.8)])
@settings(max_examples=20)
@given(
    slopes=st.lists(st.floats(0.3, 0.95), min_size=2, max_size=2),
    scale=st.floats(0.1, 10.0),
    seed=st.integers(0, 10**6),
)
def test_theorem_2_is_attained_by_jax(
    form: str, k: int, lam: float, slopes: list[float], scale: float, seed: int
) -> None:
    """Three values of k and λ, each compiled once; the numbers vary."""
    case, v = normal_case(slopes, scale, 4, seed)
    gradients = by_jax(form, k, lam)(JAX.array(case.z), JAX.array(v), scale)
    for gradient in gradients:
        assert_attained(gradient, v, scale, k, lam, slopes)


@pytest.mark.parametrize("form", [ic.Neumann, ic.Unroll])
@pytest.mark.parametrize(("slope", "lam"), [(0.9, 1.0), (0.9, 0.5), (-0.6, 0.4)])
def test_theorem_1_holds_from_the_term_on_that_it_says(slope: float, lam: float, form: type) -> None:
    """J = L I and ∂F/∂z of condition κ = 10: A (I - J) - ∂F/∂z = -qᵏ ∂F/∂z, so (6) is qᵏ ≤ 1/κ²."""
    n, q = 4, 1 - lam * (1 - slope)
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=(n, n)))[0] for _ in range(2))
    g = (left * np.geomspace(2.0, 0.2, n)) @ right
    problem = ic.Problem(lambda h, z: slope * h + g @ z, vjp=lambda h, z, v: (slope * v, g.T @ v))
    first = math.ceil(math.log(1e-2) / math.log(q))
    for k in (first - 1, first):
        pullback = form(k, lam).vjp(problem, np.zeros(n), np.zeros(n))[1]
        a = np.stack([pullback(e) for e in np.eye(n)], axis=1)
        side = np.linalg.norm(a * (1 - slope) - g.T, 2)
        assert side == pytest.approx(2.0 * q**k, rel=1e-12)
        assert bool(side <= 0.2**2 / 2.0) == (k == first)


@pytest.mark.parametrize("form", [ic.Neumann, ic.Unroll])
def test_without_condition_6_a_gradient_may_ascend(form: type) -> None:
    """J = -1.5 with λ = 1: two terms are 1 - 1.5 = -0.5, where the exact gradient is 0.4; λ = 0.5 gives 0.375."""
    case = scalar(-1.5)

    def gradient(k: int, lam: float) -> float:
        return float(form(k, lam).vjp(case.problem(), case.root, case.z)[1](np.asarray(1.0)))

    assert gradient(2, 1.0) == -0.5
    assert gradient(3, 1.0) == 1.75
    assert gradient(2, 0.5) == 0.375


def test_theorem_1_is_not_vacuous() -> None:
    """(6) fails for one small step and holds for many, as Eq. (19) with Theorem 2 says it must."""
    case = affine_of_norm(4, 0.9, 0)
    case = Case(**{**vars(case), "z": {"m": 0 * case.z["m"] + np.diag([0.9, 0.5, 0.1, -0.9]), "b": np.zeros(4)}})
    h = np.zeros(4)
    j_h, j_z = jacobians(case, h)
    singular = np.linalg.svd(j_z, compute_uv=False)
    threshold = singular.min() ** 2 / singular.max()
    left = [
        np.linalg.norm(matrix(ic.Neumann(k, 0.5), case, h) @ (np.eye(4) - j_h.T) - j_z.T, 2) for k in (1, 5, 20, 100)
    ]
    assert left == sorted(left, reverse=True)
    assert left[1] <= threshold
    assert left[-1] < 0.01 * threshold


@pytest.mark.parametrize("form", [ic.Neumann, ic.Unroll])
@pytest.mark.parametrize("k", [2, 4])
def test_theorem_3_descent_ends_where_the_error_leaves_it(k: int, form: type) -> None:
    """Steps 1/√τ on an ε-accurate gradient end where that vanishes, and ‖∇R‖ there is of the size of the error.

    One parameter, h*(z) = c z with c = 1/(1 - a) and R(z) = ½ ‖h*(z) - y‖². The phantom gradient is d·(c z - y) with
    d = (1 - ρᵏ) c and ρ = 1 - λ (1 - a), which is zero at z = d·y / d·c and no stationary point of R.
    """
    a, lam = np.asarray([0.8, 0.5, -0.6, 0.2]), 0.7
    y = np.asarray([1.0, -2.0, 0.5, 3.0])
    c = 1 / (1 - a)
    d = (1 - (1 - lam * (1 - a)) ** k) * c
    problem = ic.Problem(lambda h, z: a * h + z, vjp=lambda h, z, v: (a * v, np.sum(v)))
    z = np.asarray(3.0)
    for tau in range(1, 1001):
        z = z - 0.05 / np.sqrt(tau) * form(k, lam).vjp(problem, c * z, z)[1](c * z - y)
    assert z == pytest.approx((d @ y) / (d @ c), rel=1e-9)
    v = c * z - y
    slope, error = abs(c @ v), abs((d - c) @ v)  # ∇R, and the gradient's error there
    assert slope == pytest.approx(error, rel=1e-6)
    bound = 2.0 * np.max(1 - lam * (1 - np.abs(a))) ** k / (1 - np.max(np.abs(a))) * np.linalg.norm(v)  # ‖∂F/∂z‖ = 2
    assert 0.01 * bound < slope <= bound
