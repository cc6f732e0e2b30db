"""A log of one evaluation of F: the functions of PyTorch that it called, and their arguments.

Two evaluations with equal logs computed the same function of h and of the externals.
"""

import numbers
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from implicit_core.arrays import H, Z
from implicit_core.problem import Map

from ..function_modes import ObserveInputs
from ..identity import IdentityMap
from ..tensors import Tensors, nested_tensors, tensors

CONSTANTS = (
    *(numbers.Number, str, bytes, type(None), type(Ellipsis)),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)
"""Types of immutable arguments, which are logged as they are."""


class CallLog(NamedTuple):
    """One evaluation of F.

    Attributes
    ----------
    calls
        The functions that were called, in order, with the numbers of their tensors and all other arguments.
    externals
        The tensors other than h that entered, the leaves of z first.
    """

    calls: tuple[Hashable, ...]
    externals: Tensors


def log_calls(f: Map[H, Z], h: H, z: Z) -> CallLog:
    """Evaluate F at (h, z), and log its calls."""
    with _Logger(tensors(h), tensors(z)) as logger:
        value = f(h, z)
    logger.collect(tensors(value))  # f may return a closed-over tensor as it is
    results = tuple(logger.described(x) for x in tensors(value))
    return CallLog((*logger.calls, results), tuple(logger.inputs))


class _Logger(ObserveInputs):
    """Also logs the calls. Tensors are numbered in the order in which they appear."""

    def __init__(self, h: Sequence[Tensor], z: Sequence[Tensor]) -> None:
        super().__init__(h)
        self.calls: list[Hashable] = []
        self._numbers: IdentityMap[Tensor, int] = IdentityMap()
        self.collect(z)
        for x in (*h, *z):
            self.described(x)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        call = func, self.described(args), self.described(kwargs)
        result = super().__torch_function__(func, types, args, kwargs)
        has_tensors = next(nested_tensors(result), None) is not None
        self.calls.append((*call, self.described(result) if has_tensors else None))
        return result

    def described(self, a: object) -> Hashable:
        """An argument or a result as a hashable value; a tensor as its number and layout."""
        if isinstance(a, Tensor):
            number = self._numbers.setdefault(a, len(self._numbers))
            return number, tuple(a.shape), a.dtype, a.device, a.stride() if a.layout is torch.strided else None
        if isinstance(a, (float, complex)):
            return type(a), repr(a)  # 0.0 equals -0.0, and NaN does not equal itself
        if isinstance(a, CONSTANTS):
            return type(a), a
        if isinstance(a, (list, tuple)):
            return type(a), tuple(self.described(b) for b in a)
        if isinstance(a, dict):
            return type(a), tuple((name, self.described(b)) for name, b in a.items())
        if isinstance(a, slice):
            return slice, self.described((a.start, a.stop, a.step))
        try:
            view = memoryview(a)  # type: ignore[arg-type]  # raises without a buffer
        except TypeError:
            return _ByIdentity(a)
        return type(a), view.format, view.shape, view.tobytes()  # the numbers, for an array that may be written to


class _ByIdentity:
    """An object that equals only itself. It is held, so that its id is not reused."""

    def __init__(self, it: object) -> None:
        self._it = it

    def __hash__(self) -> int:
        return id(self._it)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByIdentity) and self._it is other._it
