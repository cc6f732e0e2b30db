"""Derivatives of one framework for arrays of another one, which share memory through DLPack (Decision 56)."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, TypeVar

from .arrays import H, PyTree, Z
from .backend import Backend
from .problem import Linearization, Problem
from .registry import find_backend, load_backend
from .space import compact

R = TypeVar("R")


def borrow_derivatives(problem: Problem[Any, Any], framework: str) -> Problem[Any, Any]:
    """A problem on arrays of any library, whose F and derivatives are functions on arrays of ``framework``.

    Parameters
    ----------
    problem
        A problem on arrays of ``framework``.
    framework
        The name of its root module, e.g. ``"torch"``.

    Returns
    -------
    Problem
        Its arguments and results are arrays of the library that ``h`` belongs to. They share memory with the arrays of
        ``framework``, except that read-only arrays are copied. Where both have streams, ``framework`` works on the
        stream that is current for the library, or waits for it.

    Raises
    ------
    ValueError
        If ``framework`` has no backend.
    TypeError, BufferError
        At a call, if ``framework`` does not have an array's device or dtype.

    Examples
    --------
    >>> import numpy as np
    >>> import torch
    >>> import implicit_core as ic
    >>> from implicit_core.adapters import torch as ict
    >>> from implicit_core.dlpack import borrow_derivatives
    >>> problem = borrow_derivatives(ict.problem(lambda h, z: torch.cos(h) + z), "torch")
    >>> solution = ic.solve(problem, np.zeros(1), np.zeros(1))
    >>> solution.value.round(3)
    array([0.739])
    """
    theirs = load_backend(framework)

    def f(h: H, z: Z) -> H:
        result: H = _Exchange(find_backend(h, "h"), theirs).wrap(problem.f, h)(h, z)
        return result

    def linearize(h: H, z: Z) -> Linearization[H, Z]:
        exchange = _Exchange(find_backend(h, "h"), theirs)
        with exchange.on_device_of(h):
            at = problem.linearize(exchange.to_framework(h), exchange.to_framework(z))
            value = exchange.from_framework(at.value)
        # `at` checks what the framework's derivatives return.
        derivatives = at.raw.wrap(lambda name, _: exchange.wrap(getattr(at, name), h))
        return replace(derivatives, value=value)

    return problem.with_function(f, linearize)


class _Exchange:
    """The exchange of arrays between the user's library and the framework that makes the derivatives.

    Parameters
    ----------
    ours, theirs
        The backends of the library and of the framework.
    """

    def __init__(self, ours: Backend, theirs: Backend) -> None:
        self._ours, self._theirs = ours, theirs

    @contextmanager
    def on_device_of(self, h: object) -> Iterator[None]:
        """Within this context both work on the device of ``h``, in the order of one stream."""
        with self._ours.on_device_of(h), self._on_stream_of(h), self._theirs.solving():
            yield

    def wrap(self, function: Callable[..., R], h: object) -> Callable[..., R]:
        """A function on arrays of the framework, as a function on arrays of the library, on the device of ``h``."""

        def call(*arguments: object) -> R:
            with self.on_device_of(h):
                result: R = self.from_framework(function(*map(self.to_framework, arguments)))
                return result

        return call

    def to_framework(self, tree: PyTree) -> PyTree:
        """The library's arrays, as arrays of the framework."""
        return tree if self._ours is self._theirs else self._ours.map(self._export, tree)

    def from_framework(self, tree: PyTree) -> PyTree:
        """The framework's arrays, as arrays of the library."""
        return tree if self._ours is self._theirs else self._theirs.map(self._import, tree)

    def _on_stream_of(self, h: object) -> AbstractContextManager[Any]:
        if self._ours.streams is None or self._theirs.streams is None:
            return nullcontext()
        stream = self._ours.streams.current(h)
        return nullcontext() if stream is None else self._theirs.streams.use(stream)

    def _export(self, x: object) -> Any:
        if not self._ours.is_array(x):
            return x
        if not hasattr(x, "__dlpack__"):  # NumPy's scalars
            x = self._ours.xp.asarray(x)
        try:
            return self._theirs.from_dlpack(x if _is_contiguous(x) else compact(self._ours.xp, x))
        except BufferError:  # read-only memory
            return self._theirs.from_dlpack(compact(self._ours.xp, x))

    def _import(self, x: object) -> Any:
        if not self._theirs.is_array(x):
            return x
        x = self._theirs.stop_gradient(x)
        return self._ours.from_dlpack(x if _is_contiguous(x) else compact(self._theirs.xp, x))


def _is_contiguous(x: Any) -> bool:
    """Whether an array is known to lie in C order without gaps.

    JAX aborts the process on an array with negative or zero strides, and PyTorch and CuPy do not take all of them.
    """
    if hasattr(x, "is_contiguous"):  # PyTorch
        return bool(x.is_contiguous())
    flags = getattr(x, "flags", None)  # NumPy, CuPy
    return bool(getattr(flags, "c_contiguous", True))
