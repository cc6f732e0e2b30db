"""ImageNet as folders of images, which are read when they are needed."""

import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ...program import TrainingError

NAME = "imagenet"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""The constants in common use, of red, green and blue in [0, 1]."""
SPLITS = ("train", "val")
ENDINGS = (".jpeg", ".jpg", ".png")
LAYOUT = "the images of ImageNet (https://image-net.org) have to lie in train/<class>/*.JPEG and val/<class>/*.JPEG"

SIZE = 224
AREA = (0.1, 1.0)
"""Of a random part, as a share of the image."""
ASPECT = (0.8, 1.25)
"""Of a random part, width over height."""
TRIES = 10


class ImageFolder(Dataset[tuple[Tensor, int]]):
    """Images in one folder for each class, and their labels.

    Parameters
    ----------
    folder
        Has the folders ``train`` and ``val``.
    split
        ``"train"`` or ``"val"``.
    transform
        Makes a tensor of an RGB image, as :func:`random_view` and :func:`central_view` do.

    Attributes
    ----------
    classes
        Names of the classes, sorted; a label is a place in this list. ``train`` and ``val`` must have the same.
    labels
        int64 (n,).

    Raises
    ------
    TrainingError
        If the folders are not like this, or, when an item is read, if its file is not an image.
    """

    def __init__(self, folder: Path, split: str, transform: Callable[[Image.Image], Tensor]) -> None:
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}, expected one of {', '.join(SPLITS)}")
        self.folder, self.transform = folder / split, transform
        self.classes, others = (_names(folder / each, "folder of a class", _is_folder) for each in SPLITS)
        if differing := {*self.classes} ^ {*others}:
            raise TrainingError(f"{folder} has the class {min(differing)} in only one of train and val; {LAYOUT}.")
        names = [_names(self.folder / each, "image", _is_image) for each in self.classes]
        # Arrays, because each worker process gets a copy of every Python object that it reads.
        self.files = np.array([os.fsencode(name) for of_class in names for name in of_class])
        self.labels = np.repeat(np.arange(len(names)), [len(of_class) for of_class in names])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        label = int(self.labels[index])
        path = self.folder / self.classes[label] / os.fsdecode(self.files[index])
        return self.transform(read_image(path)), label


def _names(folder: Path, what: str, wanted: Callable[["os.DirEntry[str]"], bool]) -> list[str]:
    """Names of the wanted entries of a folder, sorted."""
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if wanted(entry) and not entry.name.startswith("."))
    except OSError as error:
        raise TrainingError(f"{folder} can't be read ({error.strerror}); {LAYOUT}.") from error
    if not names:
        raise TrainingError(f"There is no {what} in {folder}; {LAYOUT}.")
    return names


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    return entry.is_dir()


def _is_image(entry: "os.DirEntry[str]") -> bool:
    return entry.name.lower().endswith(ENDINGS)


def read_image(path: Path) -> Image.Image:
    """The image in a file, in RGB.

    Raises
    ------
    TrainingError
        If it can't be read, or has more than 8 bits per channel, which Pillow would cut off at 255.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"its mode is {image.mode}, expected 8 bits per channel")
            return image.convert("RGB")
    except (Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:  # Pillow raises all of these
        raise TrainingError(f"{path} can't be read as an image ({error}).") from error


def random_view(image: Image.Image, size: int = SIZE) -> Tensor:
    """A random part of an image, scaled and perhaps mirrored, to train on: uint8 (3, size, size).

    The random numbers come from PyTorch's default generator, which a ``DataLoader`` seeds in each worker.
    """
    pixels = _scaled(image, random_box(*image.size), size)
    return pixels.flip(-1) if torch.rand(()) < 0.5 else pixels


def central_view(image: Image.Image, size: int = SIZE) -> Tensor:
    """The center of an image, to test on: uint8 (3, size, size).

    It is the central square of 224 in the image scaled to a shorter side of 256, or has the same share of the image.
    """
    side = min(image.size) * 224 / 256
    left, top = ((length - side) / 2 for length in image.size)
    return _scaled(image, (left, top, left + side, top + side), size)


def random_box(width: int, height: int) -> tuple[int, int, int, int]:
    """A random box in an image of this size: its left, upper, right and lower end, in pixels.

    Its share of the area is uniform in ``AREA``, and the logarithm of its aspect ratio is uniform in ``ASPECT``. A box
    that does not fit is drawn again. After ``TRIES`` of them, it is the largest central box of an allowed aspect ratio.
    """
    for _ in range(TRIES):
        u = torch.rand(4).tolist()
        area = width * height * (AREA[0] + (AREA[1] - AREA[0]) * u[0])
        aspect = ASPECT[0] * (ASPECT[1] / ASPECT[0]) ** u[1]
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(u[2] * (width - w + 1)), int(u[3] * (height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * ASPECT[1])), min(height, round(width / ASPECT[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _scaled(image: Image.Image, box: tuple[float, float, float, float], size: int) -> Tensor:
    """The box of an image: uint8 (3, size, size)."""
    scaled = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    return torch.from_numpy(np.array(scaled)).permute(2, 0, 1).contiguous()
