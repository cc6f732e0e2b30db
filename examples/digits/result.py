"""What training with one estimator gave, and what it cost."""

from dataclasses import dataclass

import numpy as np

from .model import Array, Counts

TARGET = 0.95
"""Test accuracy that every estimator is to exceed."""


@dataclass(frozen=True)
class Result:
    """How training with one estimator went.

    Attributes
    ----------
    name
        The estimator.
    losses, seconds
        Training loss of each step, and the time it took; (steps,).
    accuracies, cosines
        After each epoch: test accuracy, and the cosine between the estimator's gradient of W, U and b and the exact
        one on the first training images; (epochs,).
    counts
        What the training steps cost.
    """

    name: str
    losses: Array
    seconds: Array
    accuracies: Array
    cosines: Array
    counts: Counts

    @property
    def accuracy(self) -> float:
        """Test accuracy at the end."""
        return float(self.accuracies[-1])

    @property
    def passed(self) -> bool:
        """Whether the test accuracy is above TARGET."""
        return self.accuracy > TARGET

    @property
    def cosine(self) -> float:
        """Mean of ``cosines``."""
        return float(np.mean(self.cosines))

    @property
    def step_ms(self) -> float:
        """Median time of a training step in milliseconds."""
        return 1e3 * float(np.median(self.seconds))

    @property
    def solve_evaluations(self) -> float:
        """Evaluations of F by the solver, a training step."""
        return self.counts.solve_evaluations / len(self.losses)

    @property
    def value_evaluations(self) -> float:
        """Evaluations of F by the estimator, a training step."""
        return (self.counts.evaluations - self.counts.solve_evaluations) / len(self.losses)

    @property
    def vjps(self) -> float:
        """Pullbacks through F, a training step."""
        return self.counts.vjps / len(self.losses)
