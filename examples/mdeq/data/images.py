"""What the readers of all file formats share."""

from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from ...program import TrainingError

CLASSES = 10
"""Of the digits, of Fashion-MNIST and of CIFAR-10."""


class Images(NamedTuple):
    """Images and their classes.

    Attributes
    ----------
    pixels
        uint8 in 0..255 or float32 in [0, 1], of shape (n, channels, height, height).
    labels
        int64 (n,), from 0.
    """

    pixels: Tensor
    labels: Tensor


def read_bytes(path: Path) -> bytes | None:
    """What a file contains; None if it does not exist.

    Raises
    ------
    TrainingError
        If it can't be read.
    """
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise TrainingError(f"{path} can't be read: {error.strerror}.") from error


def checked(path: Path, pixels: Tensor, labels: Tensor) -> Images:
    """Images, and labels from a file.

    Raises
    ------
    TrainingError
        If there is not one label for each image, a label is not a class, or there is nothing.
    """
    if len(labels) != len(pixels) or not len(labels):
        raise TrainingError(f"{path} has {len(labels)} labels, and there are {len(pixels)} images.")
    wrong = labels[(labels < 0) | (labels >= CLASSES)]
    if len(wrong):
        raise TrainingError(f"{path} has the label {wrong[0]}, which is not in 0..{CLASSES - 1}.")
    return Images(pixels, labels)
