"""Pixels: means over squares, normalization, and random changes."""

import torch
from torch import Generator, Tensor
from torch.nn.functional import avg_pool2d, pad

from ...program import TrainingError

SIZES = (32, 16, 8)
"""Sides of the images that :func:`pooled` makes."""
PART = 4096
"""Images that are converted together: all of them as floats would take four times their memory."""


def as_floats(pixels: Tensor) -> Tensor:
    """Pixels in [0, 1], from pixels of either kind and of any shape."""
    return pixels / 255 if pixels.dtype == torch.uint8 else pixels


def pooled(pixels: Tensor, size: int, name: str = "the data set") -> Tensor:
    """Means over squares of pixels.

    Parameters
    ----------
    pixels
        Of shape (n, channels, height, height).
    size
        The side of the result, one of ``SIZES`` that divides ``height``. Smaller images stay as they are.
    name
        Names the images in the error.

    Returns
    -------
    (n, channels, size, size)
        float32 in [0, 1], or the pixels themselves if they have this size.

    Raises
    ------
    TrainingError
        If the images can't have this size.
    """
    side = pixels.shape[-1]
    if size >= side:
        return pixels
    sizes = [each for each in SIZES if side % each == 0]
    if size not in sizes:
        raise TrainingError(f"The images of {name} can have the size {' or '.join(map(str, sizes))}, not {size}.")
    return torch.cat([avg_pool2d(as_floats(part), side // size) for part in pixels.split(PART)])


def mean_and_std(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over the pixels of a channel, in [0, 1].

    Parameters
    ----------
    pixels
        Of shape (n, channels, height, width).

    Returns
    -------
    (channels,), (channels,)
        float32.
    """
    std, mean = torch.std_mean(as_floats(pixels), dim=(0, 2, 3), correction=0)
    return mean, std


def normalized(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Pixels in [0, 1] minus the mean, divided by the standard deviation.

    Parameters
    ----------
    pixels
        uint8 or float32, of shape (..., channels, height, width).
    mean, std
        Of each channel: (channels,).

    Returns
    -------
    (..., channels, height, width)
        float32, on the device of the pixels.
    """
    mean, std = (x.to(pixels.device)[:, None, None] for x in (mean, std))
    return (as_floats(pixels) - mean) / std


def augment(batch: Tensor, generator: Generator) -> Tensor:
    """Shift each image at random, and mirror half of them.

    An image gets a border of zeros, an eighth of its side, which is 4 pixels for 32. A part of the original size is cut
    out at a random place, and left and right are exchanged with probability 1/2. Normalize the pixels afterwards, so
    that the border is black.

    Parameters
    ----------
    batch
        Of shape (n, channels, height, height), of any dtype and on any device.
    generator
        Draws the random numbers on its own device. One on the CPU makes the same images on all devices.

    Returns
    -------
    (n, channels, height, height)
        Of the same dtype, on the same device.
    """
    n, channels, height, width = batch.shape
    border = height // 8

    def draw(count: int) -> Tensor:
        numbers = torch.randint(count, (n, 1), generator=generator, device=generator.device)
        return numbers.to(batch.device)

    top, left, mirrored = draw(2 * border + 1), draw(2 * border + 1), draw(2)
    image, channel, row, column = (torch.arange(k, device=batch.device) for k in (n, channels, height, width))
    rows = top + row
    columns = left + torch.where(mirrored == 1, column.flip(0), column)
    bordered = pad(batch, (border, border, border, border))
    return bordered[image[:, None, None, None], channel[:, None, None], rows[:, None, :, None], columns[:, None, None]]
