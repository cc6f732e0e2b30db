"""The array libraries of the tests. A missing library is an error, not a skip, since all are imported here."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import array_api_compat.numpy
import array_api_compat.torch
import array_api_strict
import gpus
import jax
import numpy as np
import optree
import pytest
import torch

# Before JAX makes its first array. Eager computations use the first device, tests of sharding all four.
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_num_cpu_devices", 4)
# Most of a test's time is XLA compiling a program that runs once: these settings make that three times as fast.
# JAX_DISABLE_MOST_OPTIMIZATIONS=0 runs the tests on optimized programs.
if "JAX_DISABLE_MOST_OPTIMIZATIONS" not in os.environ:
    jax.config.update("jax_disable_most_optimizations", True)
QUICK_TO_COMPILE = "--xla_cpu_parallel_codegen_split_count=1"
if jax.__version_info__ < (0, 11):  # XLA ends the process on a flag that it does not know
    QUICK_TO_COMPILE += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{QUICK_TO_COMPILE} {os.environ.get('XLA_FLAGS', '')}"


STRICT = {"JAX_NUMPY_RANK_PROMOTION": "raise", "JAX_NUMPY_DTYPE_PROMOTION": "strict"}
"""JAX refuses what it would promote: the library promotes nothing, and neither do the tests' own functions."""
PROMOTING = {
    "complex numbers": "real and complex arrays are multiplied",
    "flax": "normalizations broadcast their statistics, which are float32",
    "optax": "Adam raises a float to the power of an int32 count",
}
"""Packages, and arithmetic of the user's own, for which JAX has to promote, and why."""


@contextmanager
def promoting(package: str) -> Iterator[None]:
    """JAX promotes, as it does by default, for one of these; so it does in processes that are started here."""
    assert package in PROMOTING
    with pytest.MonkeyPatch.context() as patch:
        for name in STRICT:
            patch.delenv(name, raising=False)
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            yield


@dataclass(frozen=True)
class Library:
    name: str
    xp: ModuleType
    from_numpy: Callable[[np.ndarray], Any]
    to_numpy: Callable[[Any], np.ndarray]

    def array(self, tree: Any) -> Any:
        """A pytree of NumPy arrays, as this library's; other leaves stay."""
        return optree.tree_map(lambda x: self.from_numpy(x) if isinstance(x, (np.ndarray, np.generic)) else x, tree)

    def numpy(self, tree: Any) -> Any:
        return optree.tree_map(lambda x: self.to_numpy(x) if hasattr(x, "dtype") else x, tree)

    def sealed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function`` with read-only results, if the library supports that."""
        if self.name != "numpy-readonly":
            return function
        return lambda *args: optree.tree_map(read_only, function(*args))


def read_only(x: Any) -> Any:
    if not isinstance(x, np.ndarray):
        return x
    x = x.view()
    x.flags.writeable = False
    return x


def strict_to_numpy(x: Any) -> np.ndarray:
    """A copy, since NumPy exports no read-only array before version 2.1."""
    return np.asarray(np.from_dlpack(array_api_strict.asarray(x, copy=True)))


LIBRARIES = [
    Library("numpy", array_api_compat.numpy, np.asarray, np.asarray),
    Library("numpy-readonly", array_api_compat.numpy, lambda x: read_only(np.array(x)), np.asarray),
    Library("array_api_strict", array_api_strict, array_api_strict.asarray, strict_to_numpy),
    Library("torch", array_api_compat.torch, lambda x: torch.asarray(np.array(x)), lambda x: x.detach().numpy()),
    Library("jax", jax.numpy, lambda x: jax.device_put(np.array(x)), np.asarray),  # nothing is compiled for it
]
if not gpus.WITHOUT_CUPY:
    import array_api_compat.cupy
    import cupy

    CUPY = Library("cupy", array_api_compat.cupy, cupy.asarray, cupy.asnumpy)
NUMPY, TORCH, JAX = (next(x for x in LIBRARIES if x.name == name) for name in ("numpy", "torch", "jax"))


def flat(tree: Any) -> np.ndarray:
    """All leaves of a NumPy pytree in one vector, in order."""
    leaves = [np.ravel(np.asarray(leaf)) for leaf in optree.tree_leaves(tree)]
    return np.concatenate(leaves) if leaves else np.zeros(0)


def unflat(vector: np.ndarray, like: Any) -> Any:
    """The inverse of ``flat``."""
    leaves, structure = optree.tree_flatten(like)
    sizes = np.cumsum([np.size(leaf) for leaf in leaves])
    parts = np.split(np.asarray(vector), sizes[:-1])
    return optree.tree_unflatten(structure, [p.reshape(np.shape(x)) for p, x in zip(parts, leaves, strict=True)])


def dispatched(limit: float) -> float:
    """A limit of operations that PyTorch dispatches: before 2.13 it dispatches up to 20 % more for the same code."""
    return limit if torch.__version__ >= (2, 13) else 1.2 * limit
