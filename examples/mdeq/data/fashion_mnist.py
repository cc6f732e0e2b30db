"""The files of Fashion-MNIST: arrays in the IDX format, compressed or not."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...program import TrainingError
from .images import Images, checked, read_bytes

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts its files."""
HOW = (
    "install Debian's package dataset-fashion-mnist, or get the IDX files of "
    "https://github.com/zalandoresearch/fashion-mnist"
)
BYTES = 8
"""The type of numbers in these files."""


def read(folder: Path) -> tuple[Images, Images]:
    """The official training and test images: pixels uint8 (n, 1, 28, 28).

    Parameters
    ----------
    folder
        Has the four IDX files, each compressed by gzip or not.

    Raises
    ------
    TrainingError
        If a file is missing, damaged, or another one.
    """
    return _part(folder, "train"), _part(folder, "t10k")


def _part(folder: Path, name: str) -> Images:
    """The images and labels in two files."""
    images, pixels = _array(folder, f"{name}-images-idx3-ubyte", 3)
    path, labels = _array(folder, f"{name}-labels-idx1-ubyte", 1)
    if pixels.shape[1:] != (28, 28):
        raise TrainingError(f"{images} has an array of shape {tuple(pixels.shape)}, not images of 28 x 28.")
    return checked(path, pixels[:, None], labels.long())


def _array(folder: Path, name: str, axes: int) -> tuple[Path, Tensor]:
    """The array in a file with or without the ending .gz, and the path of that file."""
    for path in (folder / name, folder / f"{name}.gz"):
        content = read_bytes(path)
        if content is not None:
            return path, idx_array(path, content, axes)
    raise TrainingError(f"Fashion-MNIST is missing: there is no {name} or {name}.gz in {folder}; {HOW}.")


def idx_array(path: Path, content: bytes, axes: int) -> Tensor:
    """The array in an IDX file of bytes.

    The format is: two zeros, the type of the numbers, the number of axes, the length of each axis as a big-endian
    integer of 4 bytes, and the numbers in C order.

    Parameters
    ----------
    path
        Names the file in errors.
    content
        Its bytes, which may be compressed by gzip.
    axes
        How many the array must have.

    Returns
    -------
    Tensor
        uint8.

    Raises
    ------
    TrainingError
        If it is not such a file, or has more or fewer numbers than it should.
    """
    if content.startswith(b"\x1f\x8b"):
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise TrainingError(f"{path} is damaged: gzip can't decompress it ({error}).") from error
    magic, start = bytes((0, 0, BYTES, axes)), 4 + 4 * axes
    if content[:4] != magic:
        begins, expected = content[:4].hex(" "), magic.hex(" ")
        raise TrainingError(
            f"{path} is not an IDX file of bytes on {axes} axes: it begins with {begins}, not {expected}."
        )
    shape = [int.from_bytes(content[at : at + 4], "big") for at in range(4, start, 4)]
    expected_bytes = start + math.prod(shape)
    if len(content) != expected_bytes:
        raise TrainingError(
            f"{path} is damaged: an array of shape {tuple(shape)} takes {expected_bytes} bytes, not {len(content)}."
        )
    return torch.from_numpy(np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape).copy())
