"""MNIST-1D: ten shapes, scaled, shifted and sheared at random in a noisy signal of 40 points.

S. Greydanus and D. Kobak, *Scaling Down Deep Learning with MNIST-1D*, ICML 2024. They report a test accuracy of 94 %
for a convolutional network, 68 % for a multilayer perceptron and 32 % for logistic regression.
"""

from typing import NamedTuple

import torch
from mnist1d.data import get_dataset_args, make_dataset
from torch import Tensor


class Samples(NamedTuple):
    """Signals (n, 1, 40), float32, and labels (n,)."""

    signals: Tensor
    labels: Tensor


class Data(NamedTuple):
    """Samples to train on, and samples to test on once."""

    train: Samples
    test: Samples


def load() -> Data:
    """The 4000 training and 1000 test samples that the authors' package makes by default.

    They are generated, not downloaded, from a seed that the package sets in NumPy's global generator.
    """
    made = make_dataset(get_dataset_args())
    return Data(samples(made["x"], made["y"]), samples(made["x_test"], made["y_test"]))


def samples(signals: object, labels: object) -> Samples:
    """As tensors, with an axis for the one channel of a signal."""
    return Samples(torch.tensor(signals, dtype=torch.float32)[:, None], torch.tensor(labels))
