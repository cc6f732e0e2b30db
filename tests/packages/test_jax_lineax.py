"""Lineax solves the linear systems of a layer: an estimator and a solver of one's own, by dense linear algebra."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packages.jax_models import EXACT, SOLVER, W, close

import implicit_core as ic
from implicit_core.estimators import AtFixedPoint, Derivative

lx = pytest.importorskip("lineax", reason="lineax is not installed")

GMRES = lx.GMRES(rtol=1e-13, atol=1e-13)
X = np.array([[0.3, -0.4, 0.5], [1.0, 0.2, -0.7]])


@dataclass(frozen=True)
class Lineax(AtFixedPoint):
    """(I - J)⁻¹ v by one of Lineax' solvers."""

    solver: Any
    derivative = Derivative.OF_SOLUTION

    def inverse(self, space: Any, jacobian: Any, v: Any) -> Any:
        shapes = jax.eval_shape(lambda: v)
        operator = lx.FunctionLinearOperator(lambda u: space.sub(u, jacobian(u)), shapes)
        return lx.linear_solve(operator, v, self.solver).value


def newton(problem: Any, h0: Any, z: Any) -> Any:
    """Newton's method, on the dense Jacobian."""

    def step(_: Any, h: Any) -> Any:
        operator = lx.JacobianLinearOperator(lambda h, _: h - problem(h, z), h)
        return h - lx.linear_solve(operator, h - problem(h, z), lx.LU()).value

    return jax.lax.fori_loop(0, 20, step, h0)


def f(h: Any, z: Any) -> Any:
    return jnp.tanh(h @ z[0].T + z[1])


def dense() -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """The fixed points, and the gradients of the sum of their squares in w and in x."""
    h = np.zeros_like(X)
    for _ in range(400):
        h = np.tanh(h @ W.T + X)
    slopes = 1 - h**2
    v = np.stack([np.linalg.solve((np.eye(3) - s[:, None] * W).T, 2 * a) * s for s, a in zip(slopes, h, strict=True)])
    return h, (v.T @ h, v)


@pytest.mark.parametrize("gradient", [Lineax(GMRES), Lineax(lx.BiCGStab(rtol=1e-13, atol=1e-13)), EXACT], ids=repr)
@pytest.mark.parametrize("solver", [SOLVER, newton], ids=["Anderson", "Newton"])
def test_gradients_are_those_of_dense_linear_algebra(gradient: ic.Estimator, solver: Any) -> None:
    def loss(z: Any) -> Any:
        value = ic.fixed_point(f, jnp.zeros_like(X), z, solver=solver, gradient=gradient, batch_ndim=1).value
        return jnp.sum(value**2), value

    run = jax.grad(loss, has_aux=True)
    if solver is newton:  # it has no derivative of its own, and no batch axis to know of
        run = jax.jit(run)
    gradients, value = run((jnp.asarray(W), jnp.asarray(X)))
    close(value, dense()[0])
    close(gradients, dense()[1])


def test_second_derivatives_and_vmap() -> None:
    def energy(x: Any) -> Any:
        z = jnp.asarray(W), x
        return jnp.sum(ic.fixed_point(f, jnp.zeros(3), z, solver=SOLVER, gradient=Lineax(GMRES)).value ** 2)

    def plain(x: Any) -> Any:
        return jnp.sum(jax.lax.scan(lambda h, _: (f(h, (W, x)), None), jnp.zeros(3), length=200)[0] ** 2)

    hessians = [jax.jit(jax.vmap(jax.jacrev(jax.grad(function))))(jnp.asarray(X)) for function in (energy, plain)]
    close(*hessians, atol=1e-7)
