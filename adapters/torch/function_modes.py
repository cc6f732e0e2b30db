"""``TorchFunctionMode`` subclasses that see, and replace, the tensors that enter PyTorch's functions."""

import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .identity import IdentitySet, WeakIdentitySet
from .tensors import nested_tensors
from .unchanged import Unchanged

HOOK = (
    "f registers a hook on a tensor. A derivative of this gradient (create_graph=True), or one by torch.func, would "
    "call it with each product with the Jacobian: use Unroll(k, lam) or BPTT(k), or register no hook"
)


class Quiet:
    """A context in which hooks on tensors are not called."""

    def __init__(self) -> None:
        self._on = False

    def __enter__(self) -> None:
        self._on = True

    def __exit__(self, *error: object) -> None:
        self._on = False

    def gated(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """``args`` of a function of PyTorch. A hook that it registers is not called while quiet."""
        if func is not Tensor.register_hook:
            return args
        hook = args[1] if len(args) > 1 else kwargs.pop("hook")
        return args[0], lambda cotangent: None if self._on else hook(cotangent)


class ObserveInputs(TorchFunctionMode):
    """Collects the tensors that enter PyTorch's functions and did not come out of one.

    Parameters
    ----------
    known
        Tensors that are not to be collected.
    quiet
        Hooks that are registered on tensors are gated by it, if there is one.

    Attributes
    ----------
    inputs
        The collected tensors, in the order in which they were met.
    unchanged
        The collected tensors, as they were then. What compiled code reads is not among them.
    keeps_gradients
        Whether ``retain_grad`` was called, which adds up the cotangents of every backward pass.
    """

    def __init__(self, known: Sequence[Tensor], quiet: Quiet | None = None) -> None:
        super().__init__()
        self._quiet = quiet
        self.inputs: IdentitySet[Tensor] = IdentitySet()
        self.keeps_gradients = False
        self.unchanged = Unchanged()
        self._produced = WeakIdentitySet(known)

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.collect(nested_tensors((args, tuple(kwargs.values()))))
        if self._quiet is not None:
            args = self._quiet.gated(func, args, kwargs)
        self.keeps_gradients |= func is Tensor.retain_grad
        result = func(*args, **kwargs)
        for x in nested_tensors(result):
            self._produced.add(x)
        return result

    def collect(self, arguments: Iterable[Tensor]) -> None:
        """Add the tensors that did not come out of a function of PyTorch."""
        for x in arguments:
            if x not in self._produced and x not in self.inputs:
                self.inputs.add(x)
                if not torch.compiler.is_dynamo_compiling():
                    self.unchanged.add(x)

    def produced_leaves(self) -> list[Tensor]:
        """Tensors that came out of one of PyTorch's functions as leaves of autograd's graph."""
        return [x for x in self._produced if x.requires_grad and x.is_leaf]


class ReplaceInputs(TorchFunctionMode):
    """Calls PyTorch's functions with other tensors, those that ``replace`` returns."""

    def __init__(self, replace: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._replace = replace

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.register_hook:
            raise NotImplementedError(HOOK)
        kwargs = kwargs or {}
        return func(
            *(self._replaced(a) for a in args),
            **{name: self._replaced(a) for name, a in kwargs.items()},
        )

    def _replaced(self, a: Any) -> Any:
        if isinstance(a, Tensor):
            return self._replace(a)
        if next(nested_tensors(a), None) is None:
            return a
        if isinstance(a, dict):
            return {name: self._replaced(b) for name, b in a.items()}
        parts = [self._replaced(b) for b in a]
        return type(a)(*parts) if hasattr(a, "_fields") else type(a)(parts)


def replacing(replace: Callable[[Tensor], Tensor]) -> ReplaceInputs:
    """A :class:`ReplaceInputs` that compiled functions may run within.

    Dynamo would take code that it compiled under another mode for the code of this one, so it does not look inside.
    """
    return (_uncompiled() if "torch._dynamo" in sys.modules else ReplaceInputs)(replace)


@functools.cache
def _uncompiled() -> type[ReplaceInputs]:
    hidden = {"__torch_function__": torch.compiler.disable(ReplaceInputs.__torch_function__)}
    return type("UncompiledReplaceInputs", (ReplaceInputs,), hidden)
