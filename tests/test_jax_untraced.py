"""``jit=False``, for an F that JAX cannot trace."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax_layers import GRADIENTS

import implicit_core as ic
from implicit_core.adapters import jax as icj

SOLVERS = [ic.FixedPointIteration(), ic.Anderson(), ic.Broyden()]


def reads(h: Any, z: Any) -> Any:
    """A slope that depends on a number, which JAX cannot trace."""
    return (0.5 if float(jax.lax.stop_gradient(h).sum()) < 100.0 else 0.25) * h + z


@pytest.mark.parametrize("gradient", GRADIENTS, ids=repr)
def test_an_f_that_is_never_traced(gradient: ic.Estimator) -> None:
    problem = icj.problem(reads, jit=False)
    if isinstance(gradient, ic.Unroll) and gradient.recompute:
        with pytest.raises(NotImplementedError, match="recompute=False"):
            ic.fixed_point(problem, jnp.zeros(2), jnp.ones(2), gradient=gradient)
        return

    def total(z: Any) -> Any:
        return ic.fixed_point(problem, jnp.zeros(2), z, gradient=gradient).value.sum()

    derivative = 1.0 if isinstance(gradient, ic.OneStep) else 2.0
    np.testing.assert_allclose(total(jnp.ones(2)), 4.0, rtol=1e-4)
    np.testing.assert_allclose(jax.grad(total)(jnp.ones(2)), derivative, rtol=1e-4)
    np.testing.assert_allclose(jax.jvp(total, (jnp.ones(2),), (jnp.ones(2),))[1], 2 * derivative, rtol=1e-4)
    with pytest.raises(jax.errors.ConcretizationTypeError) as told:
        ic.fixed_point(reads, jnp.zeros(2), jnp.ones(2), gradient=gradient)
    assert "jit=False" in "".join(told.value.__notes__)


def test_an_f_of_numpy_is_solved_as_it_is() -> None:
    def f(h: Any, z: Any) -> Any:
        return np.tanh(0.5 * np.asarray(h)) + np.asarray(z)

    x = np.zeros(2)
    for _ in range(60):
        x = np.tanh(0.5 * x) + 1
    problem = icj.problem(f, jit=False)
    for solver in SOLVERS:
        np.testing.assert_allclose(
            ic.fixed_point(problem, jnp.zeros(2), jnp.ones(2), solver=solver, gradient=ic.OneStep()).value, x, rtol=1e-4
        )
        np.testing.assert_allclose(ic.solve(problem, jnp.zeros(2), jnp.ones(2), solver=solver).value, x, rtol=1e-4)
        as_array = ic.solve(lambda h, z: jnp.asarray(f(h, z)), jnp.zeros(2), jnp.ones(2), solver=solver)
        np.testing.assert_allclose(as_array.value, x, rtol=1e-4)


def test_arrays_that_an_f_which_is_never_traced_closes_over_are_refused_derivatives() -> None:
    def total(w: Any) -> Any:
        problem = icj.problem(lambda h, z: w * h + 1.0, jit=False)
        return ic.fixed_point(problem, jnp.zeros(2), None, gradient=ic.Implicit()).value.sum()

    assert total(jnp.asarray(0.5)) == pytest.approx(4.0, rel=1e-4)
    with pytest.raises(ValueError, match="pass them in z"):
        jax.grad(total)(jnp.asarray(0.5))


@pytest.mark.parametrize("gradient", [ic.Neumann(60, 1.0), ic.NeumannSeries(1.0, 1e-6), ic.Implicit(), ic.Unroll(60)])
def test_where_jax_traces_the_solve_they_have_derivatives(gradient: ic.Estimator) -> None:
    """F is traced then, whatever its problem says."""

    def total(w: Any) -> Any:
        problem = icj.problem(lambda h, z: w * h + 1.0, jit=False)
        return ic.fixed_point(problem, jnp.zeros(2), None, gradient=gradient).value.sum()

    w = jnp.asarray(0.5)  # the derivative of 2 / (1 - w) is 8
    np.testing.assert_allclose(jax.jit(jax.grad(total))(w), 8.0, rtol=1e-3)
    np.testing.assert_allclose(jax.jit(lambda w: jax.jvp(total, (w,), (w,)))(w)[1], 4.0, rtol=1e-3)
