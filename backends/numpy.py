"""NumPy."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import array_api_compat.numpy as xp
import numpy as np

from implicit_core.backend import Array, Backend


class NumPyBackend(Backend):
    """NumPy arrays, and the scalars NumPy returns in their place."""

    def solving(self) -> AbstractContextManager[Any]:
        """No floating-point warnings: what they would say of a sample, its status says."""
        return np.errstate(all="ignore")

    def copy(self, x: Array) -> Array:
        return np.array(x, order="C")

    def count(self, masks: Sequence[Array]) -> list[int]:
        return [int(np.count_nonzero(mask)) for mask in masks]


BACKEND = NumPyBackend("numpy", xp, (np.ndarray, np.generic))
