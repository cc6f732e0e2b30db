"""NumPy."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import array_api_compat.numpy as xp
import numpy as np

from implicit_core.arrays import State
from implicit_core.backend import Backend
from implicit_core.space import Space


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

    def same_dtype(self, a: Any, b: Any) -> bool:
        """Byte order is not a difference: NumPy's arithmetic returns the native one."""
        return bool(a == b or (isinstance(b, np.dtype) and not b.isnative and a == b.newbyteorder("=")))

    def solving(self) -> AbstractContextManager[Any]:
        """No floating-point warnings: the status of a sample says what they would say."""
        return np.errstate(all="ignore")

    def count(self, masks: Sequence[Any]) -> list[int]:
        return [int(np.count_nonzero(mask)) for mask in masks]


BACKEND = NumPyBackend("numpy", xp, (np.ndarray, np.generic), space=NumPySpace)
