"""An evaluation of F that leaves no trace in the modules it refers to, nor in the random state."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import disable_saved_tensors_hooks, saved_tensors_hooks
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from implicit_core.arrays import PyTree
from implicit_core.backends.torch import BACKEND, writes

from .random_state import replayed
from .referenced_modules import generators_of, modules_of
from .tensors import is_expanded
from .training.constant import masks_of_a_trial


@contextmanager
def undisturbed(f: Callable[..., Any], h: PyTree) -> Iterator[list[str]]:
    """Restore parameters, buffers and the random state at the end, whatever F does to them. Masks are forgotten.

    Parameters
    ----------
    f
        F, a function that refers to modules, or a module.
    h
        The state, for its devices.

    Yields
    ------
    list of str
        Empty. At the end it holds the names of the parameters and buffers that were changed.
    """
    modules = modules_of(f)
    saved = [
        (name, tensor, tensor.detach().clone(), writes(tensor))
        for module in modules
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]
        if _can_be_restored(tensor)
    ]
    buffers = [
        (module, name, x)
        for given in modules
        for module in given.modules()
        for name, x in module.named_buffers(recurse=False)
    ]
    devices = {x.device.index for x in BACKEND.flatten(h)[0] if isinstance(x, Tensor) and x.is_cuda}
    changed: list[str] = []
    own = [(generator, generator.get_state()) for generator in generators_of(f)]
    with torch.random.fork_rng(devices=list(devices)), replayed(own), masks_of_a_trial():
        try:
            with _unsaved():
                yield changed
        finally:
            with torch.no_grad():
                for name, tensor, before, count in saved:
                    if not _is_same(tensor, before, count):
                        changed.append(name)
                        tensor.copy_(before)
            for module, name, x in buffers:
                if getattr(module, name) is not x:  # F assigned another tensor
                    changed.append(name)
                    setattr(module, name, x)


def _can_be_restored(x: Tensor) -> bool:
    # Expanded weights cannot be copied, and are only read. Hooks load an offloaded tensor for each call. Sparse
    # tensors, such as the adjacency matrix of a graph, cannot be compared.
    is_lazy = isinstance(x, (UninitializedBuffer, UninitializedParameter))
    return not (is_expanded(x) or x.is_meta or is_lazy or x.layout is not torch.strided)


def _is_same(x: Tensor, before: Tensor, count: list[int] | None) -> bool:
    try:
        return bool(((x == before) | (before != before)).all())
    except (NotImplementedError, RuntimeError, TypeError):  # a subclass, of quantized weights, may compare nothing
        return writes(x) == count


def _unsaved() -> AbstractContextManager[Any]:
    """Hide what is saved from the hooks of an activation checkpoint, which count it: this runs only once.

    Without such hooks there is nothing to hide, and functions such as ``torch.func.grad`` in F refuse hooks.
    """
    try:
        with disable_saved_tensors_hooks("hooks are on"):  # raises if so
            return nullcontext()
    except RuntimeError:
        # A tensor that is not detached would keep itself alive, as an output that its own graph saves.
        return saved_tensors_hooks(torch.detach, _itself)


def _itself(x: Tensor) -> Tensor:
    return x
