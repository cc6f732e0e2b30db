"""An implicit layer as a Flax NNX module. As Flax's own layers it takes batches: x of shape (n, inputs)."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import implicit_core as ic

from .task import Metrics, measure

Solve = Callable[..., ic.Solution[jax.Array]]


class Cell(nnx.Module):
    """The equilibrium map tanh(W h + U x + b), h of shape (n, width) and x of shape (n, inputs)."""

    def __init__(self, inputs: int, width: int, *, rngs: nnx.Rngs) -> None:
        half = nnx.initializers.orthogonal(0.5)
        self.recurrent = nnx.Linear(width, width, use_bias=False, kernel_init=half, rngs=rngs)
        self.feed = nnx.Linear(inputs, width, rngs=rngs)

    def __call__(self, h: jax.Array, x: jax.Array) -> jax.Array:
        """F(h, x)."""
        return jnp.tanh(self.recurrent(h) + self.feed(x))


class Equilibrium(nnx.Module):
    """The fixed point h = cell(h, x). A cell may read its variables, not write to them: a solve calls it many times.

    ``solve`` finds it and differentiates it: :func:`implicit_core.fixed_point` with options, or
    :func:`implicit_core.root` for an h with cell(h, x) = 0.
    """

    def __init__(
        self,
        cell: Any,
        width: int,
        solve: Solve = partial(ic.fixed_point, gradient=ic.Neumann(k=5, lam=0.5)),
    ) -> None:
        self.cell, self.width, self.solve = cell, width, solve

    def __call__(self, x: jax.Array) -> ic.Solution[jax.Array]:
        """The fixed points (n, width) for x of shape (n, inputs), and how the solves went."""
        h0 = jnp.zeros((len(x), self.width))
        # The cell's parameters get their gradients as what F closes over.
        return self.solve(self.cell, h0, x, batch_ndim=1)


class Classifier(nnx.Module):
    """An implicit layer and a linear one."""

    def __init__(self, inputs: int, width: int, classes: int, *, rngs: nnx.Rngs, **options: Any) -> None:
        self.layer = Equilibrium(Cell(inputs, width, rngs=rngs), width, **options)
        self.readout = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, ic.Solution[jax.Array]]:
        """Logits (n, classes), and the solves behind them."""
        solution = self.layer(x)
        return self.readout(solution.value), solution


def contract(model: Classifier, bound: float = 0.9) -> None:
    """Keep ‖W‖₂ at most ``bound``: tanh is 1-Lipschitz, so F is a contraction, and every solve converges."""
    kernel = model.layer.cell.recurrent.kernel
    kernel[...] *= jnp.minimum(1.0, bound / jnp.linalg.norm(kernel[...], 2))


def loss(model: Classifier, x: jax.Array, labels: jax.Array) -> tuple[jax.Array, Metrics]:
    """The mean cross-entropy of a batch: x (n, inputs), labels (n,)."""
    metrics = measure(*model(x), labels)
    return metrics.loss, metrics


def train(
    model: Classifier, x: jax.Array, labels: jax.Array, steps: int, learning_rate: float = 1e-2
) -> Iterator[Metrics]:
    """Full-batch steps of Adam, in place, each of which gives its metrics."""
    optimizer = nnx.Optimizer(model, optax.adam(learning_rate), wrt=nnx.Param)

    @nnx.jit
    def step(model: Classifier, optimizer: nnx.Optimizer[Classifier]) -> Metrics:
        metrics: Metrics
        (_, metrics), gradient = nnx.value_and_grad(loss, has_aux=True)(model, x, labels)
        optimizer.update(model, gradient)
        contract(model)
        return metrics

    for _ in range(steps):
        yield step(model, optimizer)
