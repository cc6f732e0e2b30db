"""The memory of tensors, counted exactly instead of sampled."""

import weakref
from typing import Any

import optree
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode

MB = 1e6


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of the storages that are allocated within the context, until they are freed.

    Storages from before the context, and their views, do not count. Memory that a kernel allocates and frees within one
    operation does not count either. The same program gives the same numbers in every run.

    Attributes
    ----------
    bytes, count
        Bytes and number of the storages alive now.
    peak
        Largest number of bytes alive at once, since the start or since the last assignment to ``peak``.
    made
        Bytes of all storages so far, including freed ones.

    Examples
    --------
    >>> import torch
    >>> x = torch.ones(1000)
    >>> with LiveTensors() as live:
    ...     y = torch.exp(x[10:] + 1)  # 990 numbers for the sum, 990 for the result
    >>> live.bytes, live.count, live.peak, live.made
    (3960, 1, 7920, 7920)
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.count = self.peak = self.made = 0
        self._known: dict[int, weakref.ref[UntypedStorage]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for storage in _storages((args, kwargs)):
            self._watch(storage, 0)
        result = function(*args, **(kwargs or {}))
        for storage in _storages(result):
            self._watch(storage, storage.nbytes())
        return result

    def _watch(self, storage: UntypedStorage, size: int) -> None:
        key = id(storage)
        if key in self._known:
            return

        def freed(_: object) -> None:
            del self._known[key]
            self.bytes -= size
            self.count -= size > 0

        self._known[key] = weakref.ref(storage, freed)
        self.bytes += size
        self.made += size
        self.count += size > 0
        self.peak = max(self.peak, self.bytes)


def _storages(tree: Any) -> list[UntypedStorage]:
    return [leaf.untyped_storage() for leaf in optree.tree_leaves(tree) if isinstance(leaf, Tensor)]
