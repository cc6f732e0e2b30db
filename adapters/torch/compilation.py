"""What ``torch.compile`` leaves out of its graphs."""

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

C = TypeVar("C", bound=type)
P = ParamSpec("P")
R = TypeVar("R")

REASON = (
    "an implicit layer solves until a tolerance is met, which no graph can hold: compile without fullgraph=True, so "
    "that the layer runs between two graphs, or compile its cell; export it with strict=False"
)
OPTIONS: dict[str, Any] = {"reason": REASON} if "reason" in inspect.signature(torch.compiler.disable).parameters else {}
METHODS = {"forward", "backward", "jvp", "vmap"}
_waiting: list[type] = []


def not_compiled(function: Callable[P, R]) -> Callable[P, R]:
    """``function``, which runs as it is between two graphs where ``torch.compile`` meets it (Decision 42)."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_dynamo_compiling():
            # The compiler's error shows the next line, and the reason only once `_leave_out` was called.
            between = torch.compiler.disable(call, **OPTIONS)  # use no fullgraph=True; export with strict=False
            return between(*args, **kwargs)  # type: ignore[no-any-return]  # the type is that of call
        if _waiting and "torch._dynamo" in sys.modules:
            _leave_out()
        return function(*args, **kwargs)

    return call


def never_compiled(owner: C) -> C:
    """A class whose methods are not compiled either, once a layer runs and there is a compiler.

    Autograd calls them by itself, for instance within a training step that is compiled. Until then nothing is done: to
    disable a function imports the compiler, which takes a second.
    """
    _waiting.append(owner)
    return owner


def _leave_out() -> None:
    while _waiting:
        owner = _waiting.pop()
        for name in METHODS & vars(owner).keys():
            method = vars(owner)[name]
            if isinstance(method, staticmethod):
                setattr(owner, name, staticmethod(torch.compiler.disable(method.__func__, **OPTIONS)))
            else:
                setattr(owner, name, torch.compiler.disable(method, **OPTIONS))
