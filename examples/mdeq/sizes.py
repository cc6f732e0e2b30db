"""Sizes of the published models."""

from dataclasses import dataclass

from implicit_core import checks


@dataclass(frozen=True)
class Sizes:
    """The sizes of a multiscale model.

    Attributes
    ----------
    channels
        Of each branch. Height and width are halved from branch to branch.
    head
        Widths of the head, for each branch; it makes four times as many channels of it.
    final
        Channels behind the head.
    classes, image_channels
        Of the data.
    expansion
        How many times wider a residual block is inside.
    groups
        Of the group norms, an even number that divides all channels.
    halvings
        How often height and width of the images are halved before the first branch, at most twice.
    dropout
        Probability that a channel is left out inside the blocks, for a whole solve.
    """

    channels: tuple[int, ...] = (24, 24)
    head: tuple[int, ...] = (8, 16)
    final: int = 200
    classes: int = 10
    image_channels: int = 3
    expansion: int = 5
    groups: int = 8
    halvings: int = 0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("final", "classes", "image_channels", "expansion"):
            checks.integer(name, getattr(self, name), 1)
        checks.integer("groups", self.groups, 2)
        checks.integer("halvings", self.halvings, 0)
        if self.halvings > 2:
            raise ValueError(f"halvings must be at most 2, got {self.halvings}")
        checks.real("dropout", self.dropout, 0.0, 1.0)
        if not self.channels or len(self.head) != len(self.channels):
            raise ValueError(f"head must have a width for each of channels {self.channels}, got {self.head}")
        if self.groups % 2:
            raise ValueError(f"groups must be even, since the last norm has half of them, got {self.groups}")
        for name in ("channels", "head"):
            for width in getattr(self, name):
                checks.integer(f"each of {name}", width, 1)
        if any(width % self.groups for width in self.channels):
            raise ValueError(f"groups must divide all channels {self.channels}, got {self.groups}")

    @property
    def least_side(self) -> int:
        """What height and width of an image have to be multiples of."""
        return 1 << (self.halvings + len(self.channels) - 1)


TINY = Sizes()
"""MDEQ-Tiny for CIFAR-10."""
LARGE = Sizes(channels=(32, 64, 128, 256), head=(14, 28, 56, 112), final=1680)
"""MDEQ for CIFAR-10."""
IMAGENET = Sizes(channels=(32, 64, 128, 256), head=(24, 48, 96, 192), final=2048, classes=1000, halvings=2)
"""MDEQ for ImageNet."""
