"""What ``torch.compile`` leaves out of its graphs."""

import inspect
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from implicit_core.registry import COMPILERS, Compiler

C = TypeVar("C", bound=type)

REASON = (
    "an implicit layer solves until a tolerance is met, which no graph can hold: compile without fullgraph=True, so "
    "that the layer runs between two graphs, or compile its cell; export it with strict=False"
)
OPTIONS: dict[str, Any] = {"reason": REASON} if "reason" in inspect.signature(torch.compiler.disable).parameters else {}
METHODS = {"forward", "backward", "jvp", "vmap"}
_waiting: list[type] = []
disable: Any = torch.compiler.disable  # its type is not known to hold for all versions


def leave_out(function: Callable[..., Any]) -> Any:
    """``function``, which runs between two graphs. The compiler's error shows the line below."""
    return disable(function, **OPTIONS)  # use no fullgraph=True; export with strict=False


def never_compiled(owner: C) -> C:
    """A class whose methods are not compiled either, once a layer runs and there is a compiler.

    Autograd calls them by itself, for instance within a training step that is compiled. Until then nothing is done: to
    disable a function imports the compiler, which takes a second.
    """
    _waiting.append(owner)
    return owner


def leave_methods_out() -> None:
    """Leave out the methods of these classes, if there is a compiler."""
    while _waiting and "torch._dynamo" in sys.modules:
        owner = _waiting.pop()
        for name in METHODS & vars(owner).keys():
            method = vars(owner)[name]
            if isinstance(method, staticmethod):
                setattr(owner, name, staticmethod(leave_out(method.__func__)))
            else:
                setattr(owner, name, leave_out(method))


COMPILERS.append(Compiler(torch.compiler.is_dynamo_compiling, leave_out))
