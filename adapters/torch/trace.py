"""What an evaluation of F consisted of: which functions of PyTorch it called, on which tensors, with which numbers."""

import numbers
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from implicit_core.problem import Map

from .closure import Tensors, Watch, nested, tensors

PyTree = Any

PLAIN = (
    *(numbers.Number, str, bytes, type(None), type(Ellipsis)),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)
"""Types of what is described by itself."""


class _Itself:
    """An object that is equal to none but itself. It is held, so that no other gets its id."""

    def __init__(self, it: object) -> None:
        self._it = it

    def __hash__(self) -> int:
        return id(self._it)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self._it is other._it


class Trace(NamedTuple):
    """One evaluation of F.

    Attributes
    ----------
    calls
        The functions that were called, in order, with the numbers of the tensors they were given and all else. Two
        evaluations of equal calls compute the same function of h and their externals.
    externals
        The tensors beside h that went in, the leaves of z first.
    """

    calls: tuple[Hashable, ...]
    externals: Tensors


def trace(f: Map, h: PyTree, z: PyTree) -> Trace:
    """Evaluate F at (h, z), and tell what it consisted of."""
    with _Log(tensors(h), tensors(z)) as log:
        value = f(h, z)
    log.enter(tensors(value))  # f may return what it closes over, untouched
    end = tuple(log.described(x) for x in tensors(value))
    return Trace((*log.calls, end), tuple(log.outside.values()))


class _Log(Watch):
    """Also writes down what is called. Tensors are numbered in the order in which they are met."""

    def __init__(self, h: Sequence[Tensor], z: Sequence[Tensor]) -> None:
        super().__init__(h)
        self.calls: list[Hashable] = []
        self._numbers: dict[int, tuple[Tensor, int]] = {}  # with the tensors, so that no id is given out anew
        self.enter(z)
        for x in (*h, *z):
            self.described(x)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        call = func, self.described(args), self.described(kwargs)
        result = super().__torch_function__(func, types, args, kwargs)
        has_tensors = next(nested(result), None) is not None
        self.calls.append((*call, self.described(result) if has_tensors else None))
        return result

    def described(self, a: Any) -> Hashable:
        """An argument, or a result; of a tensor, which one it is and what it looks like."""
        if isinstance(a, Tensor):
            number = self._numbers.setdefault(id(a), (a, len(self._numbers)))[1]
            return number, tuple(a.shape), a.dtype, a.device, a.stride() if a.layout is torch.strided else None
        if isinstance(a, (float, complex)):
            return type(a), repr(a)  # zero has two signs, and NaN is not equal to itself
        if isinstance(a, PLAIN):
            return type(a), a
        if isinstance(a, (list, tuple)):
            return type(a), tuple(self.described(b) for b in a)
        if isinstance(a, dict):
            return type(a), tuple((name, self.described(b)) for name, b in a.items())
        if isinstance(a, slice):
            return slice, self.described((a.start, a.stop, a.step))
        try:
            view = memoryview(a)
        except TypeError:
            return _Itself(a)
        return type(a), view.format, view.shape, view.tobytes()  # as of NumPy's arrays, which may be written to
