"""Optimizers of Optax on a loss with a layer: the parameters of training through a long loop."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from packages.jax_models import EXACT, LONG, Solve, W, X, close, layer, loop

optax = pytest.importorskip("optax", reason="optax is not installed")

TARGETS = jnp.asarray(X[:, ::-1]) / 3


def loss(solve: Solve, w: Any) -> Any:
    x = jnp.asarray(X)
    value = solve(lambda h: jnp.tanh(h @ w.T + x), jnp.zeros_like(x))
    return jnp.mean((value - TARGETS) ** 2) + 0.3 * jnp.sum(w**2)  # small weights: the cell stays a contraction


OPTIMIZERS = {
    "adam": lambda: optax.adam(1e-2),
    "sgd with clipping": lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.3, momentum=0.9)),
    "lbfgs": optax.lbfgs,
}


def trained(solve: Solve, name: str, steps: int) -> Any:
    optimizer = OPTIMIZERS[name]()

    def value_of(w: Any) -> Any:
        return loss(solve, w)

    def step(carry: Any, _: None) -> Any:
        w, state = carry
        value, gradient = jax.value_and_grad(value_of)(w)
        extra = {"value": value, "grad": gradient, "value_fn": value_of} if name == "lbfgs" else {}
        updates, state = optimizer.update(gradient, state, w, **extra)
        return (optax.apply_updates(w, updates), state), value

    w = jnp.asarray(0.7 * W)
    (w, _), values = jax.jit(lambda w: jax.lax.scan(step, (w, optimizer.init(w)), length=steps))(w)
    return w, values


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("gradient", [LONG, EXACT], ids=["Neumann", "Implicit"])
def test_training_is_that_of_a_long_loop(name: str, gradient: Any) -> None:
    steps = 6
    expected, values = trained(loop, name, steps)
    assert values[-1] < 0.98 * values[0]
    close(trained(layer(gradient, batch_ndim=1), name, steps), (expected, values), atol=1e-7)
