"""An evaluation of F that leaves no trace in the modules it refers to, nor in the random state."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import disable_saved_tensors_hooks, saved_tensors_hooks

from implicit_core.arrays import PyTree
from implicit_core.backends.torch import BACKEND

from .referenced_modules import modules_of
from .tensors import is_expanded


@contextmanager
def undisturbed(f: Callable[..., Any], h: PyTree) -> Iterator[list[str]]:
    """Restore parameters, buffers and the random state at the end, whatever F does to them.

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
    saved = [
        (name, tensor, tensor.detach().clone())
        for module in modules_of(f)
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]
        # Expanded weights cannot be copied, and are only read. Hooks load an offloaded tensor for each call.
        if not (is_expanded(tensor) or tensor.is_meta)
    ]
    devices = {x.device.index for x in BACKEND.flatten(h)[0] if isinstance(x, Tensor) and x.is_cuda}
    changed: list[str] = []
    with torch.random.fork_rng(devices=list(devices)):
        try:
            with _unsaved():
                yield changed
        finally:
            with torch.no_grad():
                for name, tensor, before in saved:
                    if not bool(((tensor == before) | (before != before)).all()):
                        changed.append(name)
                        tensor.copy_(before)


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
