"""Tensors that f reads, and has to find again where a backward pass evaluates it once more (Decision 99)."""

from collections.abc import Iterable, Sequence

from torch import Tensor

from implicit_core.backends.torch import writes

from .tensors import OnLeaves, Tensors, is_expanded

CHANGED = (
    "f reads a tensor of shape {} that was written to after the solve, and this backward pass evaluates f again: write "
    "to it after the backward pass, or give the layer a copy"
)


class ChangedTensorError(RuntimeError):
    """What autograd raises for a tensor that it saved, and that was written to since."""


class Unchanged:
    """Tensors of which nobody but f itself knows, and how often they were written to.

    Autograd looks after tensors that require a gradient. Tensors without a counter are left out.
    """

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        self._counts: list[tuple[Tensor, list[int]]] = []
        for x in tensors:
            self.add(x)

    def add(self, x: Tensor) -> None:
        """Watch ``x``, as it is before f reads it."""
        if not (is_expanded(x) or x.requires_grad) and (count := writes(x)) is not None:
            self._counts.append((x, count))

    def settle(self) -> None:
        """Leave out what f has written to itself, such as the statistics of a normalization."""
        self._counts = [(x, count) for x, count in self._counts if writes(x) == count]

    def check(self) -> None:
        """Raise if one of them was written to."""
        for x, count in self._counts:
            if writes(x) != count:
                raise ChangedTensorError(CHANGED.format(tuple(x.shape)))

    def checked(self, f: OnLeaves) -> OnLeaves:
        """``f``, which finds them as they are now."""

        def call(h: Sequence[Tensor], externals: Sequence[Tensor]) -> Tensors:
            self.check()
            return f(h, externals)

        return call
