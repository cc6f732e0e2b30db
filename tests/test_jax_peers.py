"""The fixed-point problems that jaxopt and optimistix publish, through our JAX layer under ``jit``, in float64.

Derivatives are compared with closed forms where a root has one, else with dense linear algebra at the root.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from libraries import JAX, flat, unflat
from problems import CASES, Case

import implicit_core as ic
from implicit_core.adapters import jax as icj

TIGHT = {"rtol": 1e-12, "atol": 1e-13, "max_steps": 100}
ACCELERATED = [ic.Anderson(memory=15, **TIGHT), ic.Broyden(**TIGHT), ic.NewtonKrylov(**TIGHT)]
PLAIN = ic.FixedPointIteration(**TIGHT)
EXACT = ic.Implicit(ic.GMRES(rtol=1e-13, max_steps=600))


def rotations() -> Case:
    """Seven planes turned by seven angles about c: fourteen unknowns, each plane an orbit of its own."""
    angles = np.pi / np.asarray([2, 3, 4, 5, 6, 1.27, 1.73])
    turn = np.zeros((14, 14))
    for i, angle in enumerate(angles):
        turn[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    center = np.arange(1.0, 15.0)
    return Case(
        "rotations",
        f=lambda xp, h, z: xp.asarray(turn) @ (h - z) + z,
        vjp=lambda xp, h, z, v: (turn.T @ v, v - turn.T @ v),
        jvp=lambda xp, h, z, dh, dz: turn @ (dh - dz) + dz,
        h0=np.linspace(0.0, 1.0, 14),
        z=center,
        root=center,
        contraction=1.0,
    )


def network() -> Case:
    """A tenth of a network with one hidden layer of softplus units, on a state of two leaves and 28 numbers."""
    rng = np.random.default_rng(0)

    def f(xp: Any, h: Any, z: Any) -> Any:
        hidden = xp.logaddexp(z["w1"] @ xp.concat([xp.reshape(h["a"], (24,)), h["b"]]) + z["b1"], xp.zeros(8))
        out = 0.1 * (z["w2"] @ hidden + z["b2"])
        return {"a": xp.reshape(out[:24], (3, 2, 4)), "b": out[24:]}

    shapes = {"w1": (8, 28), "b1": (8,), "w2": (28, 8), "b2": (28,)}
    return Case(
        "network",
        f,
        vjp=None,
        jvp=None,
        h0={"a": np.full((3, 2, 4), 0.5), "b": np.full(4, 0.5)},
        z={name: rng.uniform(-0.35, 0.35, size=shape) for name, shape in shapes.items()},
        contraction=0.2,
    )


BY_NAME = {case.name: case for case in [*CASES, rotations(), network()]}
PUBLISHED = [
    "diagonal",
    "cosine(0.00)",
    "cosine(1.57)",
    "exponential",
    "pytree",
    "rotation",
    "rotations",
    "network",
    "affine(200)",
    "heat",
    "midpoint",
    "constant",
]
CONTRACTIVE = [name for name in PUBLISHED if BY_NAME[name].contraction < 0.85]

# dh*/dz · dz at the root, by hand: for F = cos h + z it is dz / (1 + sin h*), and so on. An affine map depends on its
# matrix too; the network, heat and midpoint have no closed form.
CLOSED_FORMS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "diagonal": lambda h, z, dz: h * dz / (1 - z),
    "cosine(0.00)": lambda h, z, dz: dz / (1 + np.sin(h)),
    "cosine(1.57)": lambda h, z, dz: dz / 2,
    "exponential": lambda h, z, dz: -h * h * dz / (1 + z * h),
    "pytree": lambda h, z, dz: {"x": dz[0], "y": dz[1]},
    "rotation": lambda h, z, dz: dz,
    "rotations": lambda h, z, dz: dz,
    "affine(200)": lambda h, z, dz: np.linalg.solve(np.eye(200) - z["m"], dz["m"] @ h + dz["b"]),
    "constant": lambda h, z, dz: dz,
}


def layer_on(case: Case, solver: Any, gradient: ic.Estimator = EXACT) -> Callable[[Any], ic.Solution]:
    """z -> the solution, under jit."""
    return jax.jit(
        lambda z: icj.fixed_point(
            functools.partial(case.f, jnp),
            JAX.array(case.h0),
            z,
            solver=solver,
            gradient=gradient,
            batch_ndim=case.batch_ndim,
        )
    )


def derivatives_of(case: Case, gradient: ic.Estimator, dz: Any, u: Any) -> tuple[Any, Any, Any]:
    """The layer's value, its tangent along dz and its pullback of u, all under one jit."""

    @jax.jit
    def run(z: Any, dz: Any, u: Any) -> tuple[Any, Any, Any]:
        # `diagonal` has condition 1000, so its derivatives have 1000 times the error of the value.
        solver = ic.Broyden(**{**TIGHT, "atol": 1e-15})
        value, push = jax.linearize(lambda z: layer_on(case, solver, gradient)(z).value, z)
        return value, push(dz), jax.linear_transpose(push, z)(u)[0]

    return JAX.numpy(run(*map(JAX.array, (case.z, dz, u))))


def expected_tangent(case: Case, h: Any, dz: Any) -> np.ndarray:
    """(I - ∂F/∂h)⁻¹ (∂F/∂z) dz with the Jacobian of JAX, dense; without the layer, and without our derivatives."""

    def on_vector(x: Any) -> Any:
        leaves = jax.tree.leaves(h)
        parts = jnp.split(x, np.cumsum([leaf.size for leaf in leaves])[:-1])
        shaped = [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
        value = case.f(jnp, jax.tree.unflatten(jax.tree.structure(h), shaped), case.z)
        return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(value)])

    j_h = np.asarray(jax.jit(jax.jacfwd(on_vector))(jnp.asarray(flat(h))))
    _, push_z = jax.linearize(lambda z: case.f(jnp, JAX.array(h), z), JAX.array(case.z))
    return np.linalg.solve(np.eye(len(j_h)) - j_h, flat(JAX.numpy(push_z(JAX.array(dz)))))


def test_all_of_them_are_here() -> None:
    assert set(PUBLISHED) <= set(BY_NAME)
    assert set(CLOSED_FORMS) | {"heat", "midpoint", "network"} == set(PUBLISHED)
    affine = BY_NAME["affine(200)"]
    assert np.abs(np.linalg.eigvals(affine.z["m"])).max() < 0.5
    for name in ("heat", "midpoint"):
        assert flat(BY_NAME[name].h0).size == 100


@pytest.mark.parametrize("solver", ACCELERATED, ids=lambda solver: type(solver).__name__)
@pytest.mark.parametrize("name", PUBLISHED)
def test_accelerated_solvers_solve_all(name: str, solver: ic.Solver) -> None:
    case = BY_NAME[name]
    solution = layer_on(case, solver)(JAX.array(case.z))
    assert np.all(solution.status == ic.CONVERGED)
    np.testing.assert_allclose(flat(JAX.numpy(solution.value)), flat(case.oracle()), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", CONTRACTIVE)
def test_plain_iteration_solves_the_contractive_ones(name: str) -> None:
    case = BY_NAME[name]
    solution = layer_on(case, PLAIN)(JAX.array(case.z))
    assert np.all(solution.status == ic.CONVERGED)
    np.testing.assert_allclose(flat(JAX.numpy(solution.value)), flat(case.oracle()), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["rotation", "diagonal", "heat"])
def test_plain_iteration_says_that_it_did_not_solve_the_others(name: str) -> None:
    """A rotation goes round in circles, .999¹⁰⁰ is .9, and the step of the heat equation blows up."""
    case = BY_NAME[name]
    solution = layer_on(case, PLAIN)(JAX.array(case.z))
    expected = {"heat": (ic.NONFINITE, ic.DIVERGED), "rotation": (ic.STAGNATED,), "diagonal": (ic.MAX_STEPS,)}
    assert solution.status in expected[name]
    h = np.asarray(solution.value)
    assert np.all(np.isfinite(h))
    if name != "heat":
        residual = np.linalg.norm(case.f(np, h, case.z) - h)
        np.testing.assert_allclose(solution.stats.residual, residual, rtol=1e-9)
        assert residual > 1e-4


@pytest.mark.parametrize("name", PUBLISHED)
def test_exact_derivatives(name: str) -> None:
    """Forward and reverse mode along a random direction and cotangent."""
    case, rng = BY_NAME[name], np.random.default_rng(0)
    u, dz = (unflat(rng.normal(size=flat(like).size), like) for like in (case.h0, case.z))
    root = case.oracle()
    expected = expected_tangent(case, root, dz)
    if name in CLOSED_FORMS:
        np.testing.assert_allclose(flat(CLOSED_FORMS[name](root, case.z, dz)), expected, rtol=1e-8, atol=1e-8)
    value, tangent, z_bar = derivatives_of(case, EXACT, dz, u)
    np.testing.assert_allclose(flat(value), flat(root), rtol=0, atol=1e-9)
    np.testing.assert_allclose(flat(tangent), expected, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(flat(z_bar) @ flat(dz), flat(u) @ expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", CONTRACTIVE)
def test_many_terms_of_the_series_are_exact_where_it_converges(name: str) -> None:
    case, rng = BY_NAME[name], np.random.default_rng(1)
    u, dz = (unflat(rng.normal(size=flat(like).size), like) for like in (case.h0, case.z))
    expected = expected_tangent(case, case.oracle(), dz)
    _, tangent, z_bar = derivatives_of(case, ic.Neumann(k=120, lam=1.0), dz, u)
    np.testing.assert_allclose(flat(tangent), expected, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(flat(z_bar) @ flat(dz), flat(u) @ expected, rtol=1e-8, atol=1e-8)
