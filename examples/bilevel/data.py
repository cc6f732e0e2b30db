"""Digits seen through a sensor that gets noisier from left to right."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from .model import Regression

Floats = NDArray[np.float64]

SIDE, CLASSES = 8, 10
FEATURES = SIDE * SIDE + 1
TRAINING, VALIDATION = 150, 600


class Samples(NamedTuple):
    """Features x (n, 65), the last of them 1 for the intercept, and one-hot labels y (n, 10); float64."""

    x: Any
    y: Any


class Data(NamedTuple):
    """The inner problem, and the samples that its solution is evaluated on."""

    training: Regression
    validation: Samples
    test: Samples


def load(seed: int = 0) -> Data:
    """150 digits to train on, 600 to validate and 1047 to test.

    Pixels are in [0, 1], with Gaussian noise of standard deviation 0 in the left column, rising to 1 in the right one.
    """
    rng = np.random.default_rng(seed)
    images, labels = load_digits(return_X_y=True)
    noise = np.tile(np.linspace(0.0, 1.0, SIDE), SIDE)
    images = images / 16 + noise * rng.normal(size=images.shape)
    order = rng.permutation(len(labels))
    x = np.column_stack([images - images[order[:TRAINING]].mean(axis=0), np.ones(len(labels))])
    y = np.eye(CLASSES)[labels]
    training, validation, test = (
        Samples(x[part], y[part]) for part in np.split(order, [TRAINING, TRAINING + VALIDATION])
    )
    # The Hessian of the softmax loss of one sample in its logits has eigenvalues of at most 1/2.
    curvature = 0.5 * np.linalg.norm(training.x, 2) ** 2 / TRAINING
    return Data(Regression(training.x, training.y, float(curvature)), validation, test)
