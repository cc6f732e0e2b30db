"""The memory of tensors on the CPU, counted instead of sampled."""

import weakref
from typing import Any

import optree
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode

MB = 1e6


class LiveTensors(TorchDispatchMode):
    """Watches the storages that operations make within the context, until they are freed.

    What was there before, and views of it, don't count; nor does what a kernel takes and gives back within one
    operation. The same program gives the same numbers in every run.

    Attributes
    ----------
    bytes, count
        Of the storages alive now.
    peak
        Most bytes since the beginning, or since it was last set.
    made
        Bytes of all storages so far, the freed ones included.

    Examples
    --------
    >>> import torch
    >>> x = torch.ones(1000)
    >>> with LiveTensors() as live:
    ...     y = torch.exp(x[10:] + 1)  # 990 numbers, and as many for the sum
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
