"""Common to the classifiers of all frameworks: parameters, settings and counters."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

import implicit_core as ic

Array = NDArray[Any]
Parameters = dict[str, Array]

PIXELS, WIDTH, CLASSES = 64, 64, 10
LEARNING_RATE, MOMENTUM = 0.05, 0.9

RTOL = 1e-4
"""Relative tolerance of the solves, forward and adjoint; within reach of float32."""

CONTRACTION = 0.95
"""Bound on ‖W‖₂, kept by rescaling W after each update: tanh is 1-Lipschitz, so F stays a contraction in h."""

SOLVER = ic.Anderson(rtol=RTOL)
ESTIMATORS: dict[str, ic.Estimator] = {
    "Implicit": ic.Implicit(ic.GMRES(rtol=RTOL)),
    "Unroll(5, 0.5)": ic.Unroll(k=5, lam=0.5),
    "Neumann(5, 0.5)": ic.Neumann(k=5, lam=0.5),
    "OneStep": ic.OneStep(),
}


def initial_parameters(seed: int) -> Parameters:
    """W, U and b of the layer and V and c of the output, float32; ‖W‖₂ = CONTRACTION."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(WIDTH, WIDTH))
    parameters = {
        "W": w * (CONTRACTION / np.linalg.norm(w, 2)),
        "U": rng.normal(size=(WIDTH, PIXELS)) / PIXELS**0.5,
        "b": np.zeros(WIDTH),
        "V": rng.normal(size=(CLASSES, WIDTH)) / WIDTH**0.5,
        "c": np.zeros(CLASSES),
    }
    return {name: value.astype(np.float32) for name, value in parameters.items()}


@dataclass
class Counts:
    """The cost of training so far.

    Attributes
    ----------
    evaluations, solve_evaluations
        Evaluations of F in the training steps: all of them, and the ones by the solver.
    vjps
        Pullbacks through one evaluation of F in the training steps: of h, of z, or of both at once.
    solves, unconverged
        Samples solved, in training and in testing, and those that did not converge.
    """

    evaluations: int = 0
    solve_evaluations: int = 0
    vjps: int = 0
    solves: int = 0
    unconverged: int = 0

    def solved(self, solution: ic.Solution[Any]) -> None:
        """Count the samples of a solve."""
        self.solves += len(solution.converged)
        self.unconverged += int((~solution.converged).sum())


class Model(Protocol):
    """A classifier in one framework; images (n, 64) and labels (n,) are NumPy arrays."""

    counts: Counts

    def parameters(self) -> Parameters:
        """The parameters, as NumPy arrays."""

    def train_step(self, images: Array, labels: Array) -> float:
        """One step of stochastic gradient descent; returns the loss before it."""

    def count(self, images: Array, labels: Array) -> None:
        """Count the operations of the next step, on this batch, if a step can't count them while it runs."""

    def gradient(self, images: Array, labels: Array) -> Parameters:
        """The estimator's gradient of the loss with respect to every parameter."""

    def predict(self, images: Array) -> Array:
        """The most probable class of each image."""
