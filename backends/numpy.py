"""NumPy."""

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import array_api_compat.numpy as xp
import numpy as np

from implicit_core.arrays import PyTree, State
from implicit_core.backend import Backend, Function, WrittenArgumentError
from implicit_core.space import Space

READ_ONLY = re.compile(r"read.?only|write?able|assignment destination|output array", re.IGNORECASE)
"""What errors of functions that cannot work with a read-only array say, in NumPy and elsewhere."""
WRITE = re.compile("assignment destination|output array")
"""What NumPy's errors about a write to a read-only array say."""


class Guarded:
    """A function of the user's that is handed read-only views of its first arguments (Decision 109).

    A function that needs writable memory, as some compiled ones do, is handed copies.
    """

    def __init__(self, function: Callable[..., Any], name: str, *arguments: str) -> None:
        self._function, self._name, self._arguments = function, name, arguments
        self._handed = read_only

    def __repr__(self) -> str:
        return getattr(self._function, "__qualname__", None) or repr(self._function)

    def __call__(self, *args: Any) -> Any:
        n = len(self._arguments)
        try:
            return owned(self._function(*map(self._handed, args[:n]), *args[n:]))
        except Exception as error:
            if self._handed is copied or isinstance(error, OSError) or not READ_ONLY.search(str(error)):
                raise
            return self._again(error, *args)

    def _again(self, error: Exception, *args: Any) -> Any:
        """The function of copies, which succeeds if it was these arguments that it could not write to."""
        n = len(self._arguments)
        own = [copied(x) for x in args[:n]]
        try:
            value = self._function(*own, *args[n:])
        except Exception:
            raise error from None
        if WRITE.search(str(error)) or not all(map(is_same, own, args)):
            raise WrittenArgumentError(self._name, *self._arguments) from error
        self._handed = copied
        return owned(value)


def owned(tree: PyTree) -> PyTree:
    """A result, without views of what was handed out: the user may write to it."""
    if type(tree) is np.ndarray:
        return tree if tree.flags.writeable else np.array(tree)
    return BACKEND.map(lambda x: np.array(x) if isinstance(x, np.ndarray) and not x.flags.writeable else x, tree)


def read_only(tree: PyTree) -> PyTree:
    """The same arrays, as views that cannot be written to."""
    if isinstance(tree, np.ndarray):
        view = tree.view()
        view.setflags(write=False)
        return view
    return tree if isinstance(tree, np.generic) else BACKEND.map(_read_only_leaf, tree)


def _read_only_leaf(x: Any) -> Any:
    return read_only(x) if isinstance(x, np.ndarray) else x


def copied(tree: PyTree) -> PyTree:
    """The same numbers in arrays of their own."""
    return BACKEND.map(lambda x: np.array(x) if isinstance(x, np.ndarray) else x, tree)


def is_same(a: PyTree, b: PyTree) -> bool:
    """Whether two pytrees hold the same numbers."""
    pairs = zip(BACKEND.flatten(a)[0], BACKEND.flatten(b)[0], strict=True)
    return all(np.array_equal(x, y, equal_nan=True) for x, y in pairs if isinstance(x, np.ndarray))


class NumPySpace(Space):
    """Faster copies."""

    def copy(self, x: State) -> State:
        return State(tuple(np.array(a, order="C") for a in x))


class NumPyBackend(Backend):
    """NumPy arrays, and the scalars that NumPy returns instead of arrays without axes."""

    def unsupported(self, x: Any, name: str) -> str | None:
        """Decision 79."""
        kind = type(x)
        if isinstance(x, np.ma.MaskedArray):
            return (
                f"a masked array, whose mask a solve would lose: write {name}.filled(...) with a number to compute with"
            )
        if isinstance(x, np.ndarray) and not (kind is np.ndarray or issubclass(kind, np.memmap)):
            return (
                f"a {kind.__module__}.{kind.__qualname__}, which computes in another way than numpy.ndarray: "
                f"write np.asarray({name})"
            )
        if x.dtype.type is np.longdouble:
            return f"of dtype {x.dtype}, which NumPy's linear algebra does not support: write {name}.astype(float)"
        if not x.dtype.isnative:
            return (
                f"of dtype {x.dtype.str}, which is not in this machine's byte order: "
                f'write {name}.astype({name}.dtype.newbyteorder("="))'
            )
        return None

    def complex(self, real: Any, imag: Any) -> Any:
        made = np.empty(real.shape, np.result_type(real.dtype, np.complex64))
        made.real, made.imag = real, imag
        return made

    def same_dtype(self, a: Any, b: Any) -> bool:
        """Byte order is not a difference: NumPy's arithmetic returns the native one."""
        return bool(a == b or (isinstance(b, np.dtype) and not b.isnative and a == b.newbyteorder("=")))

    def guarded(self, function: Function, name: str, *arguments: str) -> Function:
        guarded: Any = Guarded(function, name, *arguments)
        return guarded  # type: ignore[no-any-return]  # it is called as the function is

    def solving(self) -> AbstractContextManager[Any]:
        """No floating-point warnings: the status of a sample says what they would say."""
        return np.errstate(all="ignore")

    def count(self, masks: Sequence[Any]) -> list[int]:
        return [int(np.count_nonzero(mask)) for mask in masks]


BACKEND = NumPyBackend("numpy", xp, (np.ndarray, np.generic), space=NumPySpace)
