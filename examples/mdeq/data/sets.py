"""The data sets that fit in memory."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from implicit_core import checks

from . import cifar10, fashion_mnist
from .images import Images
from .pixels import mean_and_std, pooled

NAMES = ("digits", "fashion-mnist", "cifar10")


class Data(NamedTuple):
    """Images to train on and to test on.

    Attributes
    ----------
    train, test
        They have no image in common.
    mean, std
        Of each channel, for pixels in [0, 1]: float32 (channels,).
    """

    train: Images
    test: Images
    mean: Tensor
    std: Tensor


def load(
    name: str,
    folder: Path | None = None,
    *,
    size: int | None = None,
    train: int | None = None,
    test: int | None = None,
    seed: int = 0,
) -> Data:
    """A data set, or a part of it.

    The digits are 8 x 8 in one channel. Fashion-MNIST is 32 x 32 in one channel: the 28 x 28 of the files, and a border
    of zeros. CIFAR-10 is 32 x 32 in three channels.

    A part is random, but depends on the data set alone. So runs with different seeds train on the same images and are
    tested on the same images. A smaller part is contained in a larger one.

    Parameters
    ----------
    name
        One of ``NAMES``.
    folder
        Where the files are. For Fashion-MNIST, None is where Debian installs them. The digits need none.
    size
        Side that larger images are reduced to, 32, 16 or 8: pixels are averaged over squares. None leaves them as they
        are.
    train, test
        The most training and test images, the same number of each class as far as possible. None takes all.
    seed
        Splits the digits, which have no official test set: 80 % for training, 20 % for testing, with the same share of
        each class in both. Runs that are compared need the same split, so this is not the seed of a run.

    Returns
    -------
    Data
        ``mean`` and ``std`` are those of the returned training images, or the constants in common use for CIFAR-10.

    Raises
    ------
    TrainingError
        If a file is missing or damaged, or the images can't have that size.
    """
    for kind, count in (("train", train), ("test", test)):
        if count is not None:
            checks.integer(kind, count, 1)
    official = _official(name, folder, seed)
    ours, held_out = (
        _sized(_part(images, count), size, name) for images, count in zip(official, (train, test), strict=True)
    )
    if name == "cifar10":
        return Data(ours, held_out, torch.tensor(cifar10.MEAN), torch.tensor(cifar10.STD))
    return Data(ours, held_out, *mean_and_std(ours.pixels))


def _official(name: str, folder: Path | None, seed: int) -> tuple[Images, Images]:
    """All training and test images, in their own size."""
    match name:
        case "digits":
            return _digits(seed)
        case "fashion-mnist":
            return fashion_mnist.read(folder or fashion_mnist.DEBIAN)
        case "cifar10":
            return cifar10.read(folder)
    raise ValueError(f"name is {name!r}, expected one of {', '.join(NAMES)}")


def _digits(seed: int) -> tuple[Images, Images]:
    """The digits: pixels float32 (n, 1, 8, 8) in [0, 1]."""
    from ...digits.data import load as load_digits  # needs scikit-learn, which the other data sets don't

    digits = load_digits(seed)
    train, test, train_labels, test_labels = map(torch.from_numpy, digits)
    return (
        Images(train.reshape(-1, 1, 8, 8), train_labels.long()),
        Images(test.reshape(-1, 1, 8, 8), test_labels.long()),
    )


def _part(images: Images, count: int | None) -> Images:
    """At most so many of the images; None for all."""
    if count is None or count >= len(images.labels):
        return images
    rows = balanced(images.labels, count)
    return Images(images.pixels[rows], images.labels[rows])


def _sized(images: Images, size: int | None, name: str) -> Images:
    """The images with sides that are a power of two, and of the size asked for."""
    pixels = images.pixels
    if name == "fashion-mnist":
        pixels = pad(pixels, (2, 2, 2, 2))  # 28 can be halved only twice
    return Images(pooled(pixels, size or pixels.shape[-1], name), images.labels)


def balanced(labels: Tensor, count: int) -> Tensor:
    """Random rows, of each class the same number as far as possible.

    In a random order that is always the same, the first image of each class is taken, then the second one, and so on.

    Parameters
    ----------
    labels
        int64 (n,).
    count
        At most n.

    Returns
    -------
    int64 (count,)
        Ascending.

    Examples
    --------
    >>> import torch
    >>> from implicit_core.examples.mdeq.data.sets import balanced
    >>> labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2])
    >>> labels[balanced(labels, 5)]
    tensor([0, 0, 1, 1, 2])
    """
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(labels)))
    shuffled = labels[order]
    rank = one_hot(shuffled).cumsum(0).gather(1, shuffled[:, None])[:, 0]  # 1 for the first of its class
    return order[rank.argsort(stable=True)[:count]].sort().values
