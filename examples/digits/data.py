"""The handwritten digits that come with scikit-learn: 1797 scans of 8 x 8 pixels, in ten classes."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from .model import Array


class Digits(NamedTuple):
    """Images (n, 64) in [0, 1] and labels (n,), split into a training and a test set."""

    train_images: Array
    test_images: Array
    train_labels: Array
    test_labels: Array


def load(seed: int) -> Digits:
    """The digits, 80 % for training and 20 % for testing, with the same share of each class in both."""
    images, labels = load_digits(return_X_y=True)
    scaled = (images / 16).astype(np.float32)
    return Digits(*train_test_split(scaled, labels, test_size=0.2, stratify=labels, random_state=seed))


def batches(digits: Digits, size: int, rng: np.random.Generator) -> Iterator[tuple[Array, Array]]:
    """One epoch of shuffled training batches, all of the same size."""
    order = rng.permutation(len(digits.train_labels))
    for start in range(0, len(order) - size + 1, size):
        batch = order[start : start + size]
        yield digits.train_images[batch], digits.train_labels[batch]
