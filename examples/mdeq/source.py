"""Batches of images, in memory or in files."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from ..program import TrainingError
from . import data
from .data.imagenet import LAYOUT, MEAN, SIZE, STD, ImageFolder, central_view, random_view
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
        if settings.data == "digits" and folder is not None:
            raise TrainingError("The digits come with scikit-learn: --data-dir belongs to other --data.")
        if settings.data == "imagenet":
            if folder is None:
                raise TrainingError(f"ImageNet needs --data-dir: {LAYOUT}.")
            view = random_view if settings.augment else central_view
            train, test = ImageFolder(folder, "train", view), ImageFolder(folder, "val", central_view)
            return cls(train, test, torch.tensor(MEAN), torch.tensor(STD), len(train.classes), workers)
        size, most, most_tests = (number or None for number in (settings.pixels, settings.train, settings.test))
        found = data.load(settings.data, folder, size=size, train=most, test=most_tests)
        return cls(*found, data.CLASSES)

    @property
    def side(self) -> int:
        """Height and width of the images."""
        return SIZE if isinstance(self.test, ImageFolder) else int(self.test.pixels.shape[-1])

    @property
    def channels(self) -> int:
        """Of an image."""
        return len(self.mean)

    def batches(
        self, part: Any, rows: Iterable[Tensor], seed_of: Callable[[int], int] = int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels.

        Parameters
        ----------
        part
            :attr:`train` or :attr:`test`.
        rows
            The places of each batch's images in it.
        seed_of
            The seed of the random view of an image in a file, by its place.
        """
        if isinstance(part, data.Images):
            for batch in rows:
                yield part.pixels[batch], part.labels[batch]
        else:
            keys = ([(place, seed_of(place)) for place in batch.tolist()] for batch in rows)
            for made in DataLoader(Views(part), batch_sampler=keys, num_workers=self.workers, collate_fn=collate):
                if isinstance(made, TrainingError):
                    raise made
                yield made

    def augmented(self, images: Tensor, generator: Generator) -> Tensor:
        """Images, cropped and mirrored at random; those from files are already."""
        return images if isinstance(self.train, ImageFolder) else data.augment(images, generator)

    def normalized(self, images: Tensor) -> Tensor:
        """float32 images."""
        return data.normalized(images, self.mean, self.std)


class Views(Dataset[tuple[Tensor, int] | TrainingError]):
    """Images whose random views are those of a seed, whatever process reads them.

    In place of an image that can't be read it has the error: one that is raised in a worker would reach the program as
    the text of a traceback.
    """

    def __init__(self, images: ImageFolder) -> None:
        self.images = images

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int] | TrainingError:
        place, seed = key
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                return self.images[place]
            except TrainingError as error:
                return error


def collate(made: list[tuple[Tensor, int] | TrainingError]) -> Any:
    """A batch, or the first error in it."""
    return next((item for item in made if isinstance(item, TrainingError)), None) or default_collate(made)


def size_of(part: Any) -> int:
    """How many images."""
    return len(part.labels)
