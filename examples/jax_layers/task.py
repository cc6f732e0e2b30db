"""A toy problem, two interleaved spirals, and the metrics of a training step."""

from typing import NamedTuple

import jax
import numpy as np
import optax

import implicit_core as ic


class Metrics(NamedTuple):
    """Measured in a training step before its update: mean loss, and the shares of correct and of converged samples."""

    loss: jax.Array
    accuracy: jax.Array
    converged: jax.Array


def spirals(samples: int, seed: int = 0) -> tuple[jax.Array, jax.Array]:
    """Points (samples, 2) with a little noise, and which of the two spirals each is of (samples,)."""
    rng = np.random.default_rng(seed)
    labels = np.arange(samples) % 2
    angle = 4.0 * np.sqrt(rng.uniform(size=samples)) + 0.3
    turned = angle + np.pi * labels
    points = (angle * np.stack([np.cos(turned), np.sin(turned)])).T / 4.0
    return jax.numpy.asarray(points + 0.01 * rng.normal(size=points.shape)), jax.numpy.asarray(labels)


def measure(logits: jax.Array, solution: ic.Solution[jax.Array], labels: jax.Array) -> Metrics:
    """The metrics of a batch: logits (n, 2), the layer's solves, labels (n,)."""
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return Metrics(loss, (logits.argmax(axis=-1) == labels).mean(), solution.converged.mean())
