"""A layer in the vector field of Diffrax, and derivatives through its adjoints: a matrix exponential."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packages.jax_models import EXACT, LONG, W, close, layer, name
from scipy.linalg import expm

import implicit_core as ic

diffrax = pytest.importorskip("diffrax", reason="diffrax is not installed")

Y = np.array([1.0, -0.5, 0.3])


def end(w: Any, y: Any, gradient: ic.Estimator, adjoint: Any) -> Any:
    """y(1) for dy/dt = -h, where h = W h + y: h = (I - W)⁻¹ y."""

    def field(t: Any, y: Any, w: Any) -> Any:
        return -layer(gradient)(lambda h: w @ h + y, jnp.zeros_like(y))

    return diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        diffrax.Dopri5(),
        t0=0.0,
        t1=1.0,
        dt0=0.1,
        y0=y,
        args=w,
        stepsize_controller=diffrax.PIDController(rtol=1e-9, atol=1e-9),
        adjoint=adjoint,
        max_steps=256,
    ).ys[0]


def exact(w: Any, y: Any) -> float:
    return float(np.sum((expm(-np.linalg.inv(np.eye(3) - w)) @ y) ** 2))


def differences(function: Any, x: np.ndarray) -> np.ndarray:
    step, found = 1e-5, np.zeros_like(x)
    for i in np.ndindex(*x.shape):
        e = np.zeros_like(x)
        e[i] = step
        found[i] = (function(x + e) - function(x - e)) / (2 * step)
    return found


REVERSE = {
    "recursive checkpoints": diffrax.RecursiveCheckpointAdjoint,
    "direct": diffrax.DirectAdjoint,
    "backsolve": diffrax.BacksolveAdjoint,
}


@pytest.mark.parametrize("adjoint", REVERSE)
@pytest.mark.parametrize("gradient", [LONG, EXACT], ids=name)
def test_gradients_through_adjoints(adjoint: str, gradient: ic.Estimator) -> None:
    def loss(w: Any, y: Any) -> Any:
        return jnp.sum(end(w, y, gradient, REVERSE[adjoint]()) ** 2)

    value, ours = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(jnp.asarray(W), jnp.asarray(Y))
    assert float(value) == pytest.approx(exact(W, Y), rel=1e-7)
    expected = differences(lambda w: exact(w, Y), W), differences(lambda y: exact(W, y), Y)
    assert min(abs(part).min() for part in expected) > 1e-3
    close(ours, expected, atol=1e-6)


def test_forward_mode() -> None:
    adjoint = diffrax.ForwardMode()
    run = jax.jit(lambda y: jax.jvp(lambda y: end(jnp.asarray(W), y, LONG, adjoint), (y,), (jnp.ones(3),)))
    close(run(jnp.asarray(Y))[1], expm(-np.linalg.inv(np.eye(3) - W)) @ np.ones(3), atol=1e-7)
