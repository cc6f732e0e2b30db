"""An F that writes to the state of a module, which would hold traced arrays afterwards (Decision 106)."""

import gc
import weakref
from collections.abc import Callable
from types import FunctionType
from typing import Any, Generic

import jax

from implicit_core.arrays import H
from implicit_core.backends.jax_internals import Tracer

from .closure import Hoisted, hoist
from .leaves import Arrays

WRITES_STATE = (
    "f must not write to the state of a module, such as batch statistics or the count of a random stream, nor keep h "
    "in a list or a log: a solve evaluates f many times, on traced arrays. Let f write to a copy of its own, and "
    "return the state of it with has_aux=True: nnx.split(module) before the solve and nnx.merge(...) in f, or "
    "module.apply(..., mutable=...) of linen in f. The module may be incomplete now; make it anew"
)

_HARMLESS: weakref.WeakSet[FunctionType] = weakref.WeakSet()
"""Functions of the user's whose programs refer to their own tracers, as those with a ``custom_jvp`` of a closure do."""


def hoist_without_writes(f: Callable[[H, Arrays], H], h: H, arrays: Arrays, of: object) -> Hoisted[H]:
    """:func:`hoist` of F, which may leave nothing behind that was traced.

    Parameters
    ----------
    f, h, arrays
        As for :func:`hoist`.
    of
        The user's function that ``f`` calls.

    Raises
    ------
    ValueError
        If what F computed from h is still there after F was traced: F has written it somewhere.
    """
    traced = _Traced(f)
    hoisted = hoist(traced.call, h, arrays)
    if traced.is_gone() or (isinstance(of, FunctionType) and of in _HARMLESS):
        return hoisted
    # Alive in the program itself, in a cycle, or in something that F wrote to: only the last outlives the program.
    del hoisted
    for generation in (1, 2):  # what is old takes long to look through
        if not traced.is_gone():
            gc.collect(generation)
    if not traced.is_gone():
        raise ValueError(WRITES_STATE)
    if isinstance(of, FunctionType):
        _HARMLESS.add(of)
    return hoist(f, h, arrays)


class _Traced(Generic[H]):
    """F, and whether what it has computed from h is still there: a tracer refers to those that it was computed from."""

    def __init__(self, f: Callable[[H, Arrays], H]) -> None:
        self._f = f
        self._tracers: list[weakref.ref[Any]] = []

    def call(self, h: H, arrays: Arrays) -> H:
        self._tracers = [weakref.ref(leaf) for leaf in jax.tree.leaves(h) if isinstance(leaf, Tracer)]
        try:
            return self._f(h, arrays)
        except Exception as error:
            if type(error).__name__ == "TraceContextError":  # Flax NNX, which is not imported here
                error.add_note(WRITES_STATE)
            raise

    def is_gone(self) -> bool:
        return all(tracer() is None for tracer in self._tracers)
