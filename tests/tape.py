"""Records and replays operations on the CPU, with the rules of CUDA graphs."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import optree
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

READS = (torch.ops.aten._local_scalar_dense.default,)


class Tape:
    """Takes down sections of operations with the tensors they read and write; a replay carries them out on these.

    As in a capture, numbers can't be read, every function must have been called while warming up, and what happened in
    Python is not repeated. What is not imitated is that nothing is carried out while it is taken down.
    """

    def __init__(self) -> None:
        self._section: _Section | None = None
        self._loaded = _Functions()

    def warming_up(self) -> AbstractContextManager[Any]:
        return self._loaded

    def begin(self) -> None:
        assert self._section is None
        self._section = _Section(self._loaded.seen)
        self._section.__enter__()

    def end(self) -> Callable[[], None]:
        section = self._section
        assert section is not None
        self.abandon()
        return section.replay

    def abandon(self) -> None:
        section, self._section = self._section, None
        if section is not None:
            section.__exit__(None, None, None)

    def in_order(self, inputs: Any) -> AbstractContextManager[Any]:
        return nullcontext()


class _Functions(TorchDispatchMode):
    """Collects the functions that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[Any] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(function)
        return function(*args, **(kwargs or {}))


class _Section(TorchDispatchMode):
    def __init__(self, loaded: set[Any]) -> None:
        super().__init__()
        self._loaded = loaded
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in READS:
            raise RuntimeError("operation not permitted when stream is capturing")
        assert function in self._loaded, f"the kernel of {function} would be loaded within a capture"
        result = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for function, args, kwargs, result in self.operations:
            again = function(*args, **kwargs)
            for to, x in zip(optree.tree_leaves(result), optree.tree_leaves(again), strict=True):
                if isinstance(to, Tensor) and to.data_ptr() != x.data_ptr():
                    to.copy_(x)
