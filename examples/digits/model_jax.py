"""The classifier in JAX: a differentiable layer in a jitted step, and an optimizer of Optax."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

import implicit_core as ic

from .counting_jax import counted
from .model import CONTRACTION, LEARNING_RATE, MOMENTUM, SOLVER, Array, Counts, Parameters

Arrays = dict[str, jax.Array]

OPTIMIZER = optax.sgd(LEARNING_RATE, momentum=MOMENTUM)


def f(h: jax.Array, z: Arrays) -> jax.Array:
    """The equilibrium map tanh(W h + U x + b) for a batch of states (n, width)."""
    return jnp.tanh(h @ z["W"].T + z["x"] @ z["U"].T + z["b"])


def start(parameters: Arrays, images: jax.Array) -> tuple[jax.Array, Arrays]:
    """The start of the solve, zero, and z, the second argument of F."""
    b = parameters["b"]
    return jnp.zeros((len(images), len(b)), b.dtype), {"W": parameters["W"], "U": parameters["U"], "b": b, "x": images}


def logits(parameters: Arrays, h: jax.Array) -> jax.Array:
    """V h + c, (n, classes)."""
    return h @ parameters["V"].T + parameters["c"]


def loss(
    parameters: Arrays,
    images: jax.Array,
    labels: jax.Array,
    equilibrium_map: ic.problem.Map[jax.Array, Arrays],
    solver: ic.Solver,
    estimator: ic.Estimator,
) -> tuple[jax.Array, ic.Solution[jax.Array]]:
    """The mean cross-entropy, and the solve behind it."""
    h0, z = start(parameters, images)
    solution = ic.fixed_point(equilibrium_map, h0, z, solver=solver, gradient=estimator, batch_ndim=1)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits(parameters, solution.value), labels)
    return losses.mean(), solution


# Arguments that are not arrays are static: JAX compiles one program for each of their values.
loss_and_gradient = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=(3, 4, 5))


@partial(jax.jit, static_argnums=(4, 5))
def step(
    parameters: Arrays,
    state: optax.OptState,
    images: jax.Array,
    labels: jax.Array,
    solver: ic.Solver,
    estimator: ic.Estimator,
) -> tuple[Arrays, optax.OptState, jax.Array, ic.Solution[jax.Array]]:
    """One step of training: new parameters and state, the loss before it, and the solve."""
    (value, solution), gradient = loss_and_gradient(parameters, images, labels, f, solver, estimator)
    updates, state = OPTIMIZER.update(gradient, state, parameters)
    new = optax.apply_updates(parameters, updates)
    w = new["W"] * jnp.minimum(1.0, CONTRACTION / jnp.linalg.norm(new["W"], 2))
    return {**new, "W": w}, state, value, solution


@partial(jax.jit, static_argnums=2)
def predict(parameters: Arrays, images: jax.Array, solver: ic.Solver) -> tuple[jax.Array, ic.Solution[jax.Array]]:
    """The most probable classes, and the solve behind them."""
    solution = ic.solve(f, *start(parameters, images), solver=solver, batch_ndim=1)
    return logits(parameters, solution.value).argmax(axis=1), solution


class JAXModel:
    """The classifier, trained with one estimator.

    Parameters
    ----------
    parameters
        Initial values; not changed.
    estimator
        How cotangents of the fixed point reach W, U and b.
    """

    def __init__(self, parameters: Parameters, estimator: ic.Estimator) -> None:
        self.counts = Counts()
        self._parameters = {name: jnp.asarray(value) for name, value in parameters.items()}
        self._state = OPTIMIZER.init(self._parameters)
        self._estimator = estimator
        self._counted = counted(f, self._count_evaluation, self._count_vjp)

    def parameters(self) -> Parameters:
        """See :class:`Model`."""
        return {name: np.asarray(value) for name, value in self._parameters.items()}

    def train_step(self, images: Array, labels: Array) -> float:
        """See :class:`Model`."""
        self._parameters, self._state, value, solution = step(
            self._parameters, self._state, images, labels, SOLVER, self._estimator
        )
        self.counts.solved(solution)
        return float(value)

    def count(self, images: Array, labels: Array) -> None:
        """See :class:`Model`: the gradient of the step once more, with callbacks, which double its time."""
        (_, solution), _ = loss_and_gradient(self._parameters, images, labels, self._counted, SOLVER, self._estimator)
        jax.effects_barrier()
        self.counts.solve_evaluations += int(solution.stats.evaluations)

    def gradient(self, images: Array, labels: Array) -> Parameters:
        """See :class:`Model`."""
        _, gradient = loss_and_gradient(self._parameters, images, labels, f, SOLVER, self._estimator)
        return {name: np.asarray(value) for name, value in gradient.items()}

    def predict(self, images: Array) -> Array:
        """See :class:`Model`."""
        labels, solution = predict(self._parameters, images, SOLVER)
        self.counts.solved(solution)
        return np.asarray(labels)

    def _count_evaluation(self) -> None:
        self.counts.evaluations += 1

    def _count_vjp(self) -> None:
        self.counts.vjps += 1
