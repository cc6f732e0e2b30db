"""One API, one answer: NumPy by hand-written callbacks, PyTorch by autograd, and JAX, eager and under ``jit``."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import optree
import pytest
import torch
from libraries import JAX, TORCH, Library, flat, unflat
from problems import Case, layer, pytree

import implicit_core as ic

POINT = ic.FixedPointIteration(max_steps=1)
"""Returns its start, so that every framework gets the same point."""
EXACT = ic.Implicit(ic.GMRES(rtol=1e-13))
ESTIMATORS = [
    ic.OneStep(),
    ic.Neumann(k=1, lam=0.4),
    ic.Neumann(k=6, lam=0.5),
    ic.Neumann(k=15, lam=1.0),
    ic.Unroll(k=6, lam=0.5),
    ic.Unroll(k=6, lam=0.5, recompute=True),
    ic.Unroll(k=11, lam=0.8),
    ic.BPTT(k=6),
    EXACT,
]
CASES = [layer(), pytree()]


def weighted(leaves: list[Any]) -> Any:
    """A loss whose cotangent depends on the value, and differs between entries only by it."""
    return sum(((leaf - 0.2) ** 3 + leaf).sum() for leaf in leaves)


def point_of(case: Case) -> Any:
    """Near the root, not at it: only there does Unroll's value differ from Neumann's."""
    noise = np.random.default_rng(0).normal(size=flat(case.h0).size)
    return unflat(flat(case.oracle()) + 0.05 * noise, case.h0)


def by_numpy(case: Case, estimator: ic.Estimator, h: Any) -> tuple[np.ndarray, np.ndarray]:
    value, pullback = estimator.vjp(case.problem(), h, case.z)
    return flat(value), flat(pullback(optree.tree_map(lambda a: 3 * (a - 0.2) ** 2 + 1, value)))


def by_torch(case: Case, estimator: ic.Estimator, h: Any) -> tuple[np.ndarray, np.ndarray]:
    z = optree.tree_map(lambda a: a.requires_grad_(), TORCH.array(case.z))
    f = functools.partial(case.f, TORCH.xp)
    solution = ic.fixed_point(f, TORCH.array(h), z, solver=POINT, gradient=estimator, batch_ndim=case.batch_ndim)
    leaves, structure = optree.tree_flatten(z)
    gradient = torch.autograd.grad(weighted(optree.tree_leaves(solution.value)), leaves)
    return flat(TORCH.numpy(solution.value)), flat(TORCH.numpy(optree.tree_unflatten(structure, gradient)))


def by_jax(case: Case, estimator: ic.Estimator, h: Any, transform: Any) -> tuple[np.ndarray, np.ndarray]:
    f, start = functools.partial(case.f, JAX.xp), JAX.array(h)

    def loss(z: Any) -> tuple[Any, Any]:
        value = ic.fixed_point(f, start, z, solver=POINT, gradient=estimator, batch_ndim=case.batch_ndim).value
        return weighted(jax.tree.leaves(value)), value

    gradient, value = transform(jax.grad(loss, has_aux=True))(JAX.array(case.z))
    return flat(JAX.numpy(value)), flat(JAX.numpy(gradient))


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_values_and_gradients(case: Case, estimator: ic.Estimator) -> None:
    h = point_of(case)
    value, gradient = by_numpy(case, estimator, h)
    others = {
        "torch": by_torch(case, estimator, h),
        "jax": by_jax(case, estimator, h, lambda f: f),
        "jax jitted": by_jax(case, estimator, h, jax.jit),
    }
    for name, (their_value, their_gradient) in others.items():
        np.testing.assert_allclose(their_value, value, rtol=1e-10, atol=1e-10, err_msg=name)
        np.testing.assert_allclose(their_gradient, gradient, rtol=1e-10, atol=1e-10, err_msg=name)


@pytest.mark.parametrize("solver", [ic.Anderson, ic.Broyden, ic.NewtonKrylov])
def test_solves(solver: type) -> None:
    """Solvers that need derivatives get each framework's own."""
    case, settings = layer(), solver(rtol=1e-9)
    expected = ic.solve(case.problem(), case.h0, case.z, solver=settings)
    assert np.all(expected.converged)
    for library in (TORCH, JAX):
        f = functools.partial(case.f, library.xp)
        solution = ic.fixed_point(
            f, library.array(case.h0), library.array(case.z), solver=settings, gradient=ic.Neumann(), batch_ndim=1
        )
        np.testing.assert_allclose(library.numpy(solution.value), expected.value, rtol=0, atol=1e-12)
        np.testing.assert_array_equal(library.numpy(solution.status), expected.status)
        np.testing.assert_array_equal(library.numpy(solution.stats.steps), expected.stats.steps)
        assert int(solution.stats.evaluations) == expected.stats.evaluations


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_second_derivatives(estimator: ic.Estimator) -> None:
    """Second derivatives of a loss with respect to scales of W and x."""
    case = layer(batch=2, width=4)
    h = point_of(case)

    def loss(library: Library, estimator: ic.Estimator, p: Any) -> Any:
        arrays = library.array(case.z)
        z = {"w": p[0] * arrays["w"], "x": p[1] * arrays["x"]}
        f = functools.partial(case.f, library.xp)
        solution = ic.fixed_point(f, library.array(h), z, solver=POINT, gradient=estimator, batch_ndim=1)
        return weighted([solution.value])

    at = np.asarray([0.9, 1.2])
    # torch.func can't recompute; it is the same derivative.
    held = dataclasses.replace(estimator, recompute=False) if isinstance(estimator, ic.Unroll) else estimator
    torchs = torch.func.hessian(functools.partial(loss, TORCH, held))(TORCH.array(at)).numpy()
    jaxs = jax.jit(jax.hessian(functools.partial(loss, JAX, estimator)))(JAX.array(at))
    np.testing.assert_allclose(jaxs, torchs, rtol=1e-8, atol=1e-8)
    assert np.linalg.norm(torchs) > 0.1


def test_second_derivatives_of_the_exact_gradient_are_the_roots() -> None:
    """Against central differences of NumPy's exact gradient, with a new solve at each point."""
    case = layer(batch=2, width=4)
    solver = ic.NewtonKrylov(rtol=1e-14, atol=1e-15)

    def gradient(p: np.ndarray) -> np.ndarray:
        z = {"w": p[0] * case.z["w"], "x": p[1] * case.z["x"]}
        h = ic.solve(case.problem(), case.h0, z, solver=solver).value
        z_bar = EXACT.vjp(case.problem(), h, z)[1](3 * (h - 0.2) ** 2 + 1)
        return np.asarray([np.sum(z_bar["w"] * case.z["w"]), np.sum(z_bar["x"] * case.z["x"])])

    def loss(p: Any) -> Any:
        arrays = JAX.array(case.z)
        z = {"w": p[0] * arrays["w"], "x": p[1] * arrays["x"]}
        f = functools.partial(case.f, JAX.xp)
        return weighted([ic.fixed_point(f, JAX.array(case.h0), z, solver=solver, gradient=EXACT, batch_ndim=1).value])

    at, step = np.asarray([0.9, 1.2]), 1e-5
    expected = np.stack([(gradient(at + step * e) - gradient(at - step * e)) / (2 * step) for e in np.eye(2)])
    np.testing.assert_allclose(jax.jit(jax.hessian(loss))(JAX.array(at)), expected, rtol=1e-6, atol=1e-7)
