"""The result of training with one estimator, and its cost."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from .model import RTOL, Array, Counts, Parameters

TARGET = 0.95
"""Test accuracy that every estimator has to exceed."""

TOLERANCE = RTOL
"""Largest difference allowed after training between a parameter in NumPy and in another framework.

Both start from equal parameters. Rounding alone causes about 1e-7. If it changes which step of a solve first meets the
tolerance, the fixed points differ by up to that tolerance, RTOL; up to 4e-6 was measured. A wrong derivative
causes 1e-2.
"""


@dataclass(frozen=True)
class Result:
    """The result of training with one estimator.

    Attributes
    ----------
    framework, name
        Names of the framework and of the estimator.
    losses, seconds
        Training loss of each step, and the time it took; (steps,).
    accuracies, cosines
        After each epoch: test accuracy, and the cosine between the estimator's gradient of W, U and b and the exact
        one on the first training images; (epochs,).
    counts
        The cost of the training steps.
    parameters
        Parameters after training.
    """

    framework: str
    name: str
    losses: Array
    seconds: Array
    accuracies: Array
    cosines: Array
    counts: Counts
    parameters: Parameters

    @property
    def loss(self) -> float:
        """Mean training loss in the last epoch."""
        return float(np.mean(self.losses[-(len(self.losses) // len(self.accuracies)) :]))

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


def difference(a: Result, b: Result) -> float:
    """The largest difference between parameters of two results."""
    return float(np.max([np.max(np.abs(a.parameters[name] - b.parameters[name])) for name in a.parameters]))


def groups(results: Iterable[Result]) -> dict[str, tuple[Result, ...]]:
    """The results of each estimator, by its name."""
    by_name: dict[str, tuple[Result, ...]] = {}
    for result in results:
        by_name[result.name] = (*by_name.get(result.name, ()), result)
    return by_name


def failures(results: Iterable[Result]) -> list[str]:
    """Failures as sentences: accuracies below TARGET, parameters that differ by more than TOLERANCE."""
    found = []
    for name, group in groups(results).items():
        found += [
            f"{name}, {result.framework}: test accuracy {result.accuracy:.1%} is not above {TARGET:.0%}."
            for result in group
            if not result.passed
        ]
        found += [
            f"{name}: {group[0].framework} and {other.framework} differ by {difference(group[0], other):.1e}, "
            f"which is more than {TOLERANCE:.0e}."
            for other in group[1:]
            if not difference(group[0], other) <= TOLERANCE
        ]
    return found
