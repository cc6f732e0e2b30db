"""An implicit layer as an Equinox module, for one sample as Equinox's own layers; ``jax.vmap`` batches it."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import implicit_core as ic

from .task import Metrics, measure

Solve = Callable[..., ic.Solution[jax.Array]]


class Cell(eqx.Module):
    """The equilibrium map tanh(W h + U x + b), h of shape (width,) and x of shape (inputs,)."""

    recurrent: eqx.nn.Linear
    feed: eqx.nn.Linear

    def __init__(self, inputs: int, width: int, key: jax.Array) -> None:
        keys = jax.random.split(key)
        recurrent = eqx.nn.Linear(width, width, use_bias=False, key=keys[0])
        weight = jax.nn.initializers.orthogonal(0.5)(keys[0], (width, width))
        self.recurrent = eqx.tree_at(lambda linear: linear.weight, recurrent, weight)
        self.feed = eqx.nn.Linear(inputs, width, key=keys[1])

    def __call__(self, h: jax.Array, x: jax.Array) -> jax.Array:
        """F(h, x)."""
        return jnp.tanh(self.recurrent(h) + self.feed(x))


class Equilibrium(eqx.Module):
    """The fixed point h = cell(h, x) of one sample. Under ``jax.vmap`` each sample has its own stop test and status.

    ``solve`` finds it and differentiates it: :func:`implicit_core.fixed_point` with options, or
    :func:`implicit_core.root` for an h with cell(h, x) = 0.
    """

    cell: Any
    width: int = eqx.field(static=True)
    solve: Solve = eqx.field(static=True, default=partial(ic.fixed_point, gradient=ic.Neumann(k=5, lam=0.5)))

    def __call__(self, x: jax.Array) -> ic.Solution[jax.Array]:
        """The fixed point (width,) for x of shape (inputs,), and how the solve went."""
        # The cell's parameters get their gradients as what F closes over.
        return self.solve(self.cell, jnp.zeros(self.width), x)


class Classifier(eqx.Module):
    """An implicit layer and a linear one, for one sample."""

    layer: Equilibrium
    readout: eqx.nn.Linear

    def __init__(self, inputs: int, width: int, classes: int, key: jax.Array, **options: Any) -> None:
        keys = jax.random.split(key)
        self.layer = Equilibrium(Cell(inputs, width, keys[0]), width, **options)
        self.readout = eqx.nn.Linear(width, classes, key=keys[1])

    def __call__(self, x: jax.Array) -> tuple[jax.Array, ic.Solution[jax.Array]]:
        """Logits (classes,), and the solve behind them."""
        solution = self.layer(x)
        return self.readout(solution.value), solution


def contracted(model: Classifier, bound: float = 0.9) -> Classifier:
    """The model with ‖W‖₂ at most ``bound``: tanh is 1-Lipschitz, so F is a contraction, and every solve converges."""
    weight = model.layer.cell.recurrent.weight
    scale = jnp.minimum(1.0, bound / jnp.linalg.norm(weight, 2))
    bounded: Classifier = eqx.tree_at(lambda model: model.layer.cell.recurrent.weight, model, scale * weight)
    return bounded


def loss(model: Classifier, x: jax.Array, labels: jax.Array) -> tuple[jax.Array, Metrics]:
    """The mean cross-entropy of a batch: x (n, inputs), labels (n,)."""
    metrics = measure(*jax.vmap(model)(x), labels)
    return metrics.loss, metrics


def train(
    model: Classifier, x: jax.Array, labels: jax.Array, steps: int, learning_rate: float = 1e-2
) -> Iterator[Metrics]:
    """Full-batch steps of Adam, each of which gives its metrics."""
    optimizer = optax.adam(learning_rate)
    state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model: Classifier, state: optax.OptState) -> tuple[Classifier, optax.OptState, Metrics]:
        (_, metrics), gradient = eqx.filter_value_and_grad(loss, has_aux=True)(model, x, labels)
        updates, state = optimizer.update(gradient, state)
        return contracted(eqx.apply_updates(model, updates)), state, metrics

    for _ in range(steps):
        model, state, metrics = step(model, state)
        yield metrics
