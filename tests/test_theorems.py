"""The paper's theorems as properties, with their explicit rates, on random maps."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from libraries import LIBRARIES, NUMPY, Library, flat, unflat
from problems import Case, affine, layer

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
libraries = st.sampled_from(LIBRARIES)


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


@given(case=maps, lam=st.floats(0.5, 1.0), seed=st.integers(0, 10**6))
def test_theorem_2_unrolled_form_converges_to_the_exact_jacobian(case: Case, lam: float, seed: int) -> None:
    """Eq. (16), from any start: q ≤ 0.95 here, so 500 steps leave less than 1e-9 of it."""
    start = unflat(np.random.default_rng(seed).normal(size=flat(case.h0).size), case.h0)
    j_h, j_z = jacobians(case, root_of(case))
    exact = j_z.T @ np.linalg.inv(np.eye(len(j_h)) - j_h.T)
    error = np.linalg.norm(matrix(ic.Unroll(500, lam), case, start) - exact, 2)
    assert error <= 1e-7 * max(1.0, np.linalg.norm(exact, 2))


@given(case=maps, k=terms, lam=dampings, seed=st.integers(0, 10**6), form=st.sampled_from([ic.Neumann, ic.Unroll]))
def test_theorem_1_descent_direction(case: Case, k: int, lam: float, seed: int, form: type) -> None:
    """Where (6) holds, the phantom gradient has a non-negative inner product (7) with the exact one.

    (6) needs ∂F/∂z of full rank d_h: it always is here, since F has an additive input.
    """
    h = root_of(case)
    j_h, j_z = jacobians(case, h)
    singular = np.linalg.svd(j_z, compute_uv=False)
    a = matrix(form(k, lam), case, h)
    left = np.linalg.norm(a @ (np.eye(len(j_h)) - j_h.T) - j_z.T, 2)
    v = np.random.default_rng(seed).normal(size=len(j_h))
    exact = j_z.T @ np.linalg.solve(np.eye(len(j_h)) - j_h.T, v)
    if left <= singular.min() ** 2 / singular.max():
        assert (a @ v) @ exact >= -1e-10


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


@given(case=maps, k=terms, lam=dampings)
def test_equation_19(case: Case, k: int, lam: float) -> None:
    """‖A (I - J) - ∂F/∂z‖ ≤ (1 + L_h) ‖A - (∂F/∂z)(I - J)^-1‖, the link from Theorem 2 to condition (6)."""
    h = root_of(case)
    j_h, j_z = jacobians(case, h)
    regular = np.eye(len(j_h)) - j_h.T
    a = matrix(ic.Neumann(k, lam), case, h)
    left = np.linalg.norm(a @ regular - j_z.T, 2)
    right = (1 + np.linalg.norm(j_h, 2)) * np.linalg.norm(a - j_z.T @ np.linalg.inv(regular), 2)
    assert left <= right * (1 + 1e-9) + 1e-10


@pytest.mark.parametrize("k", [2, 4, 8])
def test_theorem_3_sgd_reaches_the_neighbourhood_the_error_allows(k: int) -> None:
    """SGD with steps 1/√τ on an ε-accurate estimate: the weighted mean of ‖∇R‖² is bounded by O(ε + log T / √T).

    R(z) is the mean of ½ ‖h*(z) - y‖² over noisy targets y; ∇R has a closed form, and ε is measured along the way.
    """
    rng = np.random.default_rng(0)
    a = np.asarray([0.8, 0.5, -0.6, 0.2])
    inverse = 1 / (1 - a)
    target = rng.normal(size=4)
    problem = ic.Problem(lambda h, z: a * h + z, vjp=lambda h, z, v: (a * v, v))
    estimator = ic.Neumann(k, 0.7)
    z, steps = 3 * rng.normal(size=4), 3000
    weights, squares, errors, noises = [], [], [], []
    for tau in range(1, steps + 1):
        y = target + 0.3 * np.clip(rng.normal(size=4), -2, 2)
        v = inverse * z - y
        phantom = estimator.vjp(problem, inverse * z, z)[1](v)
        eta = 0.05 / np.sqrt(tau)
        weights.append(eta)
        squares.append(np.sum((inverse * (inverse * z - target)) ** 2))
        errors.append(np.linalg.norm(phantom - inverse * v))
        noises.append(np.linalg.norm(inverse * v))
        z = z - eta * phantom
    mean = np.average(squares, weights=weights)
    epsilon, largest = max(errors), max(noises)
    smoothness, start = np.max(inverse) ** 2, squares[0] / np.min(inverse) ** 2 / 2
    # The descent lemma summed over the steps: Σ η ‖∇R‖² ≤ R_0 + Σ η ε G + ½ ℓ Σ η² (G + ε)².
    total = np.sum(weights)
    bound = (
        start / total
        + epsilon * largest
        + 0.5 * smoothness * np.sum(np.square(weights)) / total * (largest + epsilon) ** 2
    )
    assert mean <= bound
    assert squares[-1] < 0.02 * squares[0]
