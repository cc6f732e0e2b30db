"""Deep supervision in JAX: the training step is one program."""

import time
from collections.abc import Callable
from dataclasses import astuple
from functools import cache, partial
from typing import IO, Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import implicit_core as ic

from .batches import SOLVED, Places, Totals
from .evaluation import Functions
from .model_jax import Prediction, RecursiveModel, State
from .settings import Settings
from .sudoku import Array, Puzzles


def loss_of(prediction: Prediction, targets: jax.Array) -> jax.Array:
    """Cross entropy of all cells, and of the belief that all of them are right."""
    cells = optax.softmax_cross_entropy_with_integer_labels(prediction.logits, targets).mean()
    right = (prediction.logits.argmax(axis=-1) == targets).all(axis=1).astype(cells.dtype)
    loss: jax.Array = cells + SOLVED * optax.sigmoid_binary_cross_entropy(prediction.solved, right).mean()
    return loss


class Carry(NamedTuple):
    """What a step takes from the one before: the model, its averaged weights, the optimizer's memory, the places."""

    model: RecursiveModel
    average: RecursiveModel
    memory: Any
    state: State


class Training:
    """A run, step by step; the attributes are those of :class:`.training.Training`.

    Parameters
    ----------
    settings, puzzles
        What determines it, and the puzzles to train on.
    """

    def __init__(self, settings: Settings, puzzles: Puzzles) -> None:
        self.settings, self.loop = settings, settings.loop()
        self.clues, self.targets = puzzles.clues, puzzles.solutions - 1
        self.passes = 0
        self.places = Places(settings, len(self.clues), self._permutation)
        model = RecursiveModel(
            settings.width, settings.latent_steps, last_step=self.loop.last_step, key=jax.random.key(settings.seed)
        )
        self.optimizer = optimizer(settings)
        memory = self.optimizer.init(eqx.filter(model, eqx.is_inexact_array))
        self.carry = Carry(model, model, memory, model.start(self.clues[: settings.batch]))
        self.done, self.diverged, self.residual = 0, False, float("inf")
        self.totals = Totals()
        self.wall = 0.0

    def _permutation(self, n: int) -> Array:
        self.passes += 1
        return np.random.default_rng((self.settings.seed, self.passes)).permutation(n)

    def step(self) -> None:
        """One step of supervision: recursions, loss, backward pass and a step of the optimizer."""
        begun = time.perf_counter()
        fresh, rows = self.places.fill(self.done), self.places.rows
        options = self.loop.options(self.residual)
        batch = tuple(map(jnp.asarray, (self.clues[rows], self.targets[rows], fresh)))
        self.carry, numbers = advance(self.settings, self.optimizer, self.carry, batch, options)
        loss, cells, exact, self.residual = map(float, numbers)
        self.diverged = not np.isfinite(loss) or np.isnan(self.residual)
        self.totals.add(loss, cells, exact, self.residual)
        self.done += 1
        self.wall += time.perf_counter() - begun

    def averaged(self) -> Functions:
        """The functions of the model with the averaged weights."""
        model = self.carry.average
        return Functions(
            model.start, partial(call, model.embed), partial(call, model.recursion), partial(call, model.read)
        )

    def state(self) -> tuple[Any, ...]:
        """All that the next step depends on: arrays and numbers."""
        places, totals = self.places, self.totals
        numbers = self.done, self.diverged, self.residual, self.wall, self.passes, places.used
        return self.carry, places.order, places.rows, numbers, astuple(totals)

    def save(self, file: IO[bytes]) -> None:
        """Write the state into a file."""
        eqx.tree_serialise_leaves(file, self.state())

    def load(self, file: IO[bytes]) -> None:
        """Go on from the state in a file."""
        self.carry, self.places.order, self.places.rows, numbers, totals = eqx.tree_deserialise_leaves(
            file, self.state()
        )
        self.done, self.diverged, self.residual, self.wall, self.passes, self.places.used = numbers
        self.totals = Totals(*totals)


@eqx.filter_jit
def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """A function of a model, compiled once for all parameters."""
    return function(*arguments)


@cache
def optimizer(settings: Settings) -> optax.GradientTransformation:
    """AdamW, whose rate goes up from zero, then down to a twentieth on a cosine."""

    def rate(step: jax.Array) -> jax.Array:
        part = step / settings.steps * jnp.pi
        warm_up, cosine = (step + 1) / settings.warm_up, (1 + jnp.cos(part)) / 2
        return settings.rate * jnp.minimum(1.0, warm_up) * jnp.maximum(0.05, cosine)

    return optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=settings.decay)


def loss_and_prediction(
    model: RecursiveModel, clues: jax.Array, targets: jax.Array, state: State, options: dict[str, Any]
) -> tuple[jax.Array, Prediction]:
    """The loss of a step of supervision, and the prediction behind it."""
    prediction = model(clues, state, **options)
    return loss_of(prediction, targets), prediction


@eqx.filter_jit
def advance(
    settings: Settings,
    optimizer: optax.GradientTransformation,
    carry: Carry,
    batch: tuple[jax.Array, ...],
    options: dict[str, Any],
) -> tuple[Carry, tuple[jax.Array, ...]]:
    """A step, with its loss, right cells, solved puzzles and relative residual.

    The batch has clues, targets, and which places are new.
    """
    (model, average, memory, state), (clues, targets, fresh) = carry, batch
    state = ic.reset(state, model.start(clues), where=fresh)
    both = eqx.filter_value_and_grad(loss_and_prediction, has_aux=True)
    (loss, prediction), gradient = both(model, clues, targets, state, options)
    updates, memory = optimizer.update(gradient, memory, eqx.filter(model, eqx.is_inexact_array))
    model = eqx.apply_updates(model, updates)
    kept = jnp.where(memory[0].count == 1, 0.0, settings.average)  # the first average is the model
    average = jax.tree.map(lambda a, b: kept * a + (1 - kept) * b if eqx.is_inexact_array(a) else a, average, model)
    right = prediction.logits.argmax(axis=-1) == targets
    numbers = loss, right.mean(), right.all(axis=1).mean(), jnp.median(prediction.relative)
    return Carry(model, average, memory, prediction.state), numbers
