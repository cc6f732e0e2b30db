"""The files of CIFAR-10 in its Python version: pickled batches, in a folder or in the archive."""

import io
import pickle
import tarfile
import zlib
from collections.abc import Mapping
from operator import index
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...program import TrainingError
from .images import Images, checked, read_bytes

BATCHES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
FOLDER = "cifar-10-batches-py"
ARCHIVE = "cifar-10-python.tar.gz"
HOW = f"get the Python version from https://www.cs.toronto.edu/~kriz/cifar.html, {ARCHIVE}, unpacked"

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
"""The constants in common use. ``STD`` is the mean over images of their own deviations; over all pixels it is 0.25."""


def read(folder: Path | None) -> tuple[Images, Images]:
    """The official training and test images: pixels uint8 (n, 3, 32, 32).

    Parameters
    ----------
    folder
        Has ``cifar-10-batches-py`` or ``cifar-10-python.tar.gz``, or is ``cifar-10-batches-py`` itself.

    Raises
    ------
    TrainingError
        If a file is missing, damaged, or another one.
    """
    if folder is None:
        raise TrainingError(f"CIFAR-10 needs --data-dir, the folder that has {FOLDER}; {HOW}.")
    for place in (folder / FOLDER, folder):
        contents = {name: content for name in BATCHES if (content := read_bytes(place / name)) is not None}
        if contents:
            return _from_batches(place, contents)
    archive = folder / ARCHIVE
    content = read_bytes(archive)
    if content is None:
        raise TrainingError(f"CIFAR-10 is missing: there is no {BATCHES[0]} in {folder / FOLDER} or {folder}; {HOW}.")
    return _from_batches(archive / FOLDER, _unpacked(archive, content))


def _from_batches(place: Path, contents: Mapping[str, bytes]) -> tuple[Images, Images]:
    """The images in the batch files, given by their names."""
    for name in BATCHES:
        if name not in contents:
            raise TrainingError(f"CIFAR-10 is incomplete: there is no {name} in {place}; {HOW}.")
    *train, test = [read_batch(place / name, contents[name]) for name in BATCHES]
    pixels, labels = zip(*train, strict=True)
    return Images(torch.cat(pixels), torch.cat(labels)), test


def _unpacked(archive: Path, content: bytes) -> dict[str, bytes]:
    """The batch files in the archive, by their names."""
    found = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(content)) as members:
            for member in members:  # in one pass: compressed files can't be read from the middle
                folder, _, name = member.name.rpartition("/")
                if folder == FOLDER and name in BATCHES and (file := members.extractfile(member)):
                    found[name] = file.read()
    except (EOFError, OSError, tarfile.TarError, zlib.error) as error:
        raise TrainingError(f"{archive} is damaged ({error}); {HOW}.") from error
    return found


def read_batch(path: Path, content: bytes) -> Images:
    """The images in a batch file: pixels uint8 (n, 3, 32, 32).

    Parameters
    ----------
    path
        Names the file in errors.
    content
        A pickled dictionary. ``data`` is an array of bytes (n, 3072): a row has all red pixels of an image, then all
        green and all blue ones, each in C order. ``labels`` is a list of n classes.

    Raises
    ------
    TrainingError
        If it is anything else.
    """
    try:
        batch = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
        data, labels = batch[b"data"], torch.tensor([index(label) for label in batch[b"labels"]])
    except Exception as error:  # of any type, which depends on the bytes
        raise TrainingError(f"{path} is not a batch of CIFAR-10, or is damaged ({error!r}); {HOW}.") from error
    shape = getattr(data, "shape", None)
    if shape is None or len(shape) != 2 or shape[1] != 3072:
        raise TrainingError(f"{path} has data of shape {shape}, not (n, 3072).")
    return checked(path, torch.from_numpy(data.copy()).unflatten(1, (3, 32, 32)), labels)


class _ArrayUnpickler(pickle.Unpickler):
    """Makes containers, numbers, strings and arrays of bytes alone: an ordinary one calls what the file names."""

    def find_class(self, module: str, name: str) -> Any:
        match module, name:
            case (("numpy.core.multiarray" | "numpy._core.multiarray"), "_reconstruct"):
                return _empty_array
            case "numpy", "dtype":
                return _byte_type
            case "numpy", "ndarray":
                return None  # the first argument of _reconstruct
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _empty_array(_class: None, _shape: object, _type: object) -> np.ndarray[Any, Any]:
    """An array, which then gets its shape, type and bytes from the file."""
    return np.empty(0, dtype=np.uint8)


def _byte_type(name: str | bytes, _align: object, _copy: object) -> np.dtype[Any]:
    """The only type of arrays in these files."""
    if name not in ("u1", b"u1"):
        raise pickle.UnpicklingError(f"it has an array of {name!r}, not of 'u1'")
    return np.dtype(np.uint8)
