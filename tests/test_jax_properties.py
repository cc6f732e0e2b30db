"""Properties of the JAX layer under ``jit`` on random layers: compiled once, the numbers vary."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from libraries import JAX, flat
from problems import Case, layer

import implicit_core as ic
from implicit_core.adapters import jax as icj

BATCH, WIDTH = 3, 4
SOLVER = ic.Anderson(rtol=1e-12, atol=1e-13, max_steps=200)
ESTIMATORS = [
    ic.OneStep(),
    ic.Neumann(k=7, lam=0.6),
    ic.Unroll(k=7, lam=0.6),
    ic.Unroll(k=3, lam=0.9, recompute=True),
    ic.BPTT(k=4),
    ic.Implicit(ic.GMRES(rtol=1e-12)),
]
PHANTOM = [kind(k, lam) for kind in (ic.Neumann, ic.Unroll) for k, lam in ((1, 1.0), (12, 0.8))]

cases = st.builds(
    lambda contraction, seed, scale: layer(BATCH, WIDTH, contraction=contraction, seed=seed, scale=scale),
    contraction=st.floats(0.05, 0.9),
    seed=st.integers(0, 10**6),
    scale=st.floats(0.0, 2.0),
)
seeds = st.integers(0, 10**6)


def solution_of(z: Any, gradient: ic.Estimator) -> ic.Solution:
    """W closed over, x explicit."""
    f = lambda h, x: jnp.tanh(h @ z["w"].T + x)  # noqa: E731
    return icj.fixed_point(f, jnp.zeros((BATCH, WIDTH)), z["x"], solver=SOLVER, gradient=gradient, batch_ndim=1)


@functools.cache
def both_modes(gradient: ic.Estimator) -> Callable[..., Any]:
    """The value, the tangent along dz, and the pullback of u."""

    @jax.jit
    def run(z: Any, dz: Any, u: Any) -> Any:
        value, push = jax.linearize(lambda z: solution_of(z, gradient).value, z)
        return value, push(dz), jax.linear_transpose(push, z)(u)[0]

    return run


@functools.cache
def jacobian(gradient: ic.Estimator) -> Callable[..., Any]:
    """The value of each sample, and its derivative in its own x."""

    @jax.jit
    def run(z: Any) -> Any:
        value = solution_of(z, gradient).value
        derivative = jax.jacrev(lambda x: solution_of({**z, "x": x}, gradient).value)(z["x"])
        return value, derivative

    return run


@given(case=cases, seed=seeds, estimator=st.sampled_from(ESTIMATORS))
def test_forward_and_reverse_mode_are_adjoint(case: Case, seed: int, estimator: ic.Estimator) -> None:
    rng = np.random.default_rng(seed)
    dz = {name: rng.normal(size=a.shape) for name, a in case.z.items()}
    u = rng.normal(size=case.h0.shape)
    _, tangent, z_bar = JAX.numpy(both_modes(estimator)(*map(JAX.array, (case.z, dz, u))))
    left, right = flat(u) @ flat(tangent), flat(z_bar) @ flat(dz)
    size = np.linalg.norm(u) * np.linalg.norm(tangent) + np.linalg.norm(flat(z_bar)) * np.linalg.norm(flat(dz))
    assert abs(left - right) <= 1e-12 * max(1.0, size)


@given(case=cases, seed=seeds, estimator=st.sampled_from(ESTIMATORS))
def test_the_layer_is_the_estimator_on_callbacks(case: Case, seed: int, estimator: ic.Estimator) -> None:
    """JAX's transformations of the layer, against the estimator's own methods on NumPy arrays."""
    rng = np.random.default_rng(seed)
    dz = {name: rng.normal(size=a.shape) for name, a in case.z.items()}
    u = rng.normal(size=case.h0.shape)
    value, tangent, z_bar = JAX.numpy(both_modes(estimator)(*map(JAX.array, (case.z, dz, u))))
    start = case.h0 if estimator.starts_from_h0 else ic.solve(case.problem(), case.h0, case.z, solver=SOLVER).value
    expected, pullback = estimator.vjp(case.problem(), start, case.z)
    np.testing.assert_allclose(value, expected, rtol=0, atol=1e-9)
    np.testing.assert_allclose(tangent, estimator.jvp(case.problem(), start, case.z, dz)[1], rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(flat(z_bar), flat(pullback(u)), rtol=1e-8, atol=1e-8)


@given(case=cases, estimator=st.sampled_from(PHANTOM))
def test_theorem_2(case: Case, estimator: ic.Estimator) -> None:
    """‖A - (I - J)⁻¹ ∂F/∂x‖ ≤ ‖∂F/∂x‖ qᵏ / (1 - L_h), sample by sample; samples have no derivatives in each other.

    test_theorems.py has the maps that attain it.
    """
    value, derivative = JAX.numpy(jacobian(estimator)(JAX.array(case.z)))
    q = 1 - estimator.lam * (1 - case.contraction)
    for i in range(BATCH):
        slope = np.diag(1 - np.tanh(value[i] @ case.z["w"].T + case.z["x"][i]) ** 2)
        exact = np.linalg.solve(np.eye(WIDTH) - slope @ case.z["w"], slope)
        bound = np.linalg.norm(slope, 2) * q**estimator.k / (1 - case.contraction)
        assert np.linalg.norm(derivative[i, :, i, :] - exact, 2) <= bound * (1 + 1e-9) + 1e-8
        for other in set(range(BATCH)) - {i}:
            assert np.all(derivative[i, :, other, :] == 0)


@functools.cache
def solved(solver: ic.Solver) -> Callable[..., ic.Solution]:
    f = lambda h, z: jnp.tanh(h @ z["w"].T + z["x"])  # noqa: E731
    return jax.jit(lambda h0, z: icj.fixed_point(f, h0, z, solver=solver, gradient=ic.OneStep(), batch_ndim=1))


@given(
    case=cases,
    odd=st.integers(0, BATCH - 1),
    x=st.floats(width=64),
    h=st.floats(width=64),
    solver=st.sampled_from([ic.FixedPointIteration(), ic.Anderson(), ic.Broyden(), ic.NewtonKrylov()]),
)
def test_other_samples_are_bit_identical_whatever_one_holds(
    case: Case, odd: int, x: float, h: float, solver: ic.Solver
) -> None:
    at_x, at_h = case.z["x"].copy(), case.h0.copy()
    at_x[odd, 0], at_h[odd, 1] = x, h
    run = solved(solver)
    plain = run(JAX.array(case.h0), JAX.array(case.z))
    with_other = run(JAX.array(at_h), JAX.array({"w": case.z["w"], "x": at_x}))
    keep = [i for i in range(BATCH) if i != odd]
    pairs = zip(
        (plain.value, plain.status, plain.stats.steps, plain.stats.residual),
        (with_other.value, with_other.status, with_other.stats.steps, with_other.stats.residual),
        strict=True,
    )
    for one, other in pairs:
        np.testing.assert_array_equal(np.asarray(one)[keep], np.asarray(other)[keep])
