"""Batches of images, in memory or in files."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader

from ..program import TrainingError
from . import data
from .data.imagenet import LAYOUT, MEAN, STD, ImageFolder, central_view, random_view
from .settings import Settings


@dataclass(frozen=True)
class Source:
    """Images to train on and to test on.

    Attributes
    ----------
    train, test
        :class:`.data.Images`, or an :class:`.data.imagenet.ImageFolder`.
    mean, std
        Of each channel: (channels,).
    classes
        How many.
    workers
        Processes that read files, for each process that trains; with 0 it reads them itself.
    """

    train: Any
    test: Any
    mean: Tensor
    std: Tensor
    classes: int
    workers: int = 0

    @classmethod
    def of(cls, settings: Settings, folder: Path | None, workers: int = 0) -> "Source":
        """The images that a run is about, in ``folder``.

        Raises
        ------
        TrainingError
            If they are missing, damaged, or can't have the size in the settings.
        """
        if settings.data == "imagenet":
            if folder is None:
                raise TrainingError(f"ImageNet needs --data-dir: {LAYOUT}.")
            train, test = ImageFolder(folder, "train", random_view), ImageFolder(folder, "val", central_view)
            return cls(train, test, torch.tensor(MEAN), torch.tensor(STD), len(train.classes), workers)
        size, most, most_tests = (number or None for number in (settings.pixels, settings.train, settings.test))
        found = data.load(settings.data, folder, size=size, train=most, test=most_tests)
        return cls(*found, data.CLASSES)

    @property
    def channels(self) -> int:
        """Of an image."""
        return len(self.mean)

    def batches(
        self, part: Any, rows: Sequence[Tensor], generator: Generator | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels.

        Parameters
        ----------
        part
            :attr:`train` or :attr:`test`.
        rows
            The places of each batch's images in it.
        generator
            Gives files their random views.
        """
        if isinstance(part, data.Images):
            for batch in rows:
                yield part.pixels[batch], part.labels[batch]
        else:
            yield from DataLoader(
                part, batch_sampler=[batch.tolist() for batch in rows], num_workers=self.workers, generator=generator
            )

    def augmented(self, images: Tensor, generator: Generator) -> Tensor:
        """Images, cropped and mirrored at random; those from files are already."""
        return images if isinstance(self.train, ImageFolder) else data.augment(images, generator)

    def normalized(self, images: Tensor) -> Tensor:
        """float32 images."""
        return data.normalized(images, self.mean, self.std)


def size_of(part: Any) -> int:
    """How many images."""
    return len(part.labels)
