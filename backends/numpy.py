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

    def solving(self) -> AbstractContextManager[Any]:
        """No floating-point warnings: the status of a sample says what they would say."""
        return np.errstate(all="ignore")

    def count(self, masks: Sequence[Any]) -> list[int]:
        return [int(np.count_nonzero(mask)) for mask in masks]


BACKEND = NumPyBackend("numpy", xp, (np.ndarray, np.generic), space=NumPySpace)
