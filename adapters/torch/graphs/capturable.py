"""The operations that a CUDA graph cannot contain, found before a capture."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..tensors import nested_tensors
from .errors import NotRecordableError

aten = torch.ops.aten
READING_TAGS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
READING = (aten._linalg_check_errors.default,)
"""Operations that read numbers without a tag that says so."""
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)
"""Operations that read numbers if an index is a mask."""
COPYING = (aten._to_copy.default, aten.copy_.default)
"""Operations that copy a tensor without axes too; all others take it as a number."""
MAKING = (torch.tensor, torch.as_tensor, torch.asarray)
"""Functions whose copy of numbers to a device is hidden from modes."""


@contextmanager
def only_capturable(device: torch.device) -> Iterator[None]:
    """Within this context an operation that cannot be captured raises :class:`NotRecordableError`.

    These are the operations that wait for the device: because they read numbers, or have a result whose shape depends
    on numbers, or copy between the device and the host.
    """
    with _Functions(device), _Operations(device):
        yield


class _Operations(TorchDispatchMode):
    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self._device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = list(nested_tensors((args, tuple(kwargs.values()))))
        if self._device in {x.device for x in inputs} and _reads(func, args, kwargs):
            raise NotRecordableError(f"F reads numbers of a tensor ({func})")
        result = func(*args, **kwargs)
        devices = {x.device for x in (*inputs, *nested_tensors(result)) if x.ndim or func in COPYING}
        if self._device in devices and len(devices) > 1:
            raise NotRecordableError(f"F copies a tensor to or from another device ({func})")
        return result


class _Functions(TorchFunctionMode):
    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in MAKING and result.device == self._device and not result.is_cpu:
            given = next(nested_tensors((args, tuple(kwargs.values()))), None)
            if given is None or given.device != self._device:
                raise NotRecordableError(f"F copies numbers to the device ({func.__name__})")
        return result


def _reads(func: Any, args: Any, kwargs: Any) -> bool:
    if func in INDEXING:
        return any(isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    if func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is not None:
        return False
    return func in READING or any(tag in func.tags for tag in READING_TAGS)
