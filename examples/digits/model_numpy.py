"""The classifier in NumPy: every derivative is written by hand, and reaches the estimators as a callback.

All but F and its derivatives also runs on the arrays of other libraries.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from array_api_compat import array_namespace

import implicit_core as ic

from .model import CONTRACTION, LEARNING_RATE, MOMENTUM, SOLVER, Array, Counts, Parameters

Layer = ic.Problem[Array, Any]
"""Problems with arrays h and dictionaries z, in whose gradient some leaves are None."""


def f(h: Array, z: Parameters) -> Array:
    """The equilibrium map tanh(W h + U x + b) for a batch of states (n, width)."""
    value: Array = np.tanh(h @ z["W"].T + z["x"] @ z["U"].T + z["b"])
    return value


def vjp(h: Array, z: Parameters, v: Array) -> tuple[Array, dict[str, Array | None]]:
    """The cotangent v of F(h, z), pulled back to h and z; images need no gradient."""
    g = v * (1 - f(h, z) ** 2)
    return g @ z["W"], {"W": g.T @ h, "U": g.T @ z["x"], "b": g.sum(axis=0), "x": None}


def cross_entropy(logits: Array, labels: Array) -> tuple[Array, Array]:
    """Mean softmax cross-entropy, and its gradient with respect to the logits (n, classes)."""
    xp = array_namespace(logits)
    shifted = logits - xp.max(logits, axis=1, keepdims=True)
    log_p = shifted - xp.log(xp.sum(xp.exp(shifted), axis=1, keepdims=True))
    one_hot = xp.take(xp.eye(logits.shape[1], dtype=logits.dtype), labels, axis=0)
    return -xp.mean(xp.sum(one_hot * log_p, axis=1)), (xp.exp(log_p) - one_hot) / len(labels)


def inputs(parameters: Parameters, images: Array) -> Parameters:
    """z, the second argument of F."""
    return {"W": parameters["W"], "U": parameters["U"], "b": parameters["b"], "x": images}


def solve(problem: Layer, z: Parameters, solver: ic.Solver) -> ic.Solution[Array]:
    """The fixed points of a batch, from zero."""
    h0 = array_namespace(z["b"]).zeros((len(z["x"]), len(z["b"])), dtype=z["b"].dtype)
    return ic.solve(problem, h0, z, solver=solver)


def loss_and_gradient(
    problem: Layer,
    parameters: Parameters,
    images: Array,
    labels: Array,
    solver: ic.Solver,
    estimator: ic.Estimator,
) -> tuple[float, Parameters, ic.Solution[Array]]:
    """The loss, its gradient with respect to every parameter, and the solve behind it."""
    z = inputs(parameters, images)
    solution = solve(problem, z, solver)
    h, pullback = estimator.vjp(problem, solution.value, z)
    loss, logits_bar = cross_entropy(h @ parameters["V"].T + parameters["c"], labels)
    z_bar = pullback(logits_bar @ parameters["V"])
    gradient = {"V": logits_bar.T @ h, "c": logits_bar.sum(axis=0)} | {name: z_bar[name] for name in "WUb"}
    return float(loss), gradient, solution


PROBLEM = Layer(f, vjp=vjp, batch_ndim=1)


def exact_gradient(parameters: Parameters, images: Array, labels: Array) -> Parameters:
    """The gradient by the implicit function theorem, in float64 and to ten digits."""
    wide = {name: value.astype(np.float64) for name, value in parameters.items()}
    solver, estimator = ic.Anderson(rtol=1e-10), ic.Implicit(ic.GMRES(rtol=1e-10))
    _, gradient, solution = loss_and_gradient(PROBLEM, wide, images.astype(np.float64), labels, solver, estimator)
    solution.raise_for_status()
    return gradient


def counted(problem: Layer, counts: Counts) -> Layer:
    """``problem``, whose evaluations and pullbacks add to ``counts``."""

    def f(h: Array, z: Parameters) -> Array:
        counts.evaluations += 1
        value: Array = problem.f(h, z)
        return value

    def linearize(h: Array, z: Parameters) -> ic.Linearization[Array, Any]:
        counts.evaluations += 1
        at = problem.linearize(h, z)

        def counting(pull: Callable[[Array], Any]) -> Callable[[Array], Any]:
            def call(v: Array) -> Any:
                counts.vjps += 1
                return pull(v)

            return call

        return ic.Linearization(at.value, vjp=counting(at.vjp), vjp_h=counting(at.vjp_h), vjp_z=counting(at.vjp_z))

    return Layer(f, linearize=linearize, batch_ndim=problem.batch_ndim)


class NumPyModel:
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
        self._parameters = parameters
        self._velocity = {name: 0 * value for name, value in parameters.items()}
        self._estimator = estimator
        self._problem = self.problem()
        self._counting = counted(self._problem, self.counts)

    def problem(self) -> Layer:
        """F and its derivatives: the only part that a subclass for another library has to replace."""
        return Layer(f, vjp=vjp, batch_ndim=1)

    def parameters(self) -> Parameters:
        """See :class:`Model`."""
        return self._parameters

    def train_step(self, images: Array, labels: Array) -> float:
        """See :class:`Model`."""
        loss, gradient, solution = loss_and_gradient(
            self._counting, self._parameters, images, labels, SOLVER, self._estimator
        )
        self.counts.solve_evaluations += solution.stats.evaluations
        self.counts.solved(solution)
        self._velocity = {name: MOMENTUM * self._velocity[name] + gradient[name] for name in gradient}
        updated = {name: value - LEARNING_RATE * self._velocity[name] for name, value in self._parameters.items()}
        norm = array_namespace(updated["W"]).linalg.matrix_norm(updated["W"], ord=2)
        updated["W"] *= min(1.0, CONTRACTION / float(norm))
        self._parameters = updated
        return loss

    def count(self, images: Array, labels: Array) -> None:
        """See :class:`Model`: the step counts itself."""

    def gradient(self, images: Array, labels: Array) -> Parameters:
        """See :class:`Model`."""
        return loss_and_gradient(self._problem, self._parameters, images, labels, SOLVER, self._estimator)[1]

    def predict(self, images: Array) -> Array:
        """See :class:`Model`."""
        solution = solve(self._problem, inputs(self._parameters, images), SOLVER)
        self.counts.solved(solution)
        logits = solution.value @ self._parameters["V"].T + self._parameters["c"]
        labels: Array = logits.argmax(axis=1)
        return labels
