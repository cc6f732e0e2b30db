"""Derivatives of PyTorch's and JAX's autodiff, for CuPy arrays."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

from implicit_core.lending import lend
from implicit_core.problem import Problem
from implicit_core.registry import load_adapter

PyTree = Any


def from_torch(f: Callable[[PyTree, PyTree], PyTree], *, batch_ndim: int = 0) -> Problem:
    """A :class:`Problem` on CuPy arrays whose F is a PyTorch function or module, and whose derivatives are autograd's.

    Nothing is copied: the tensors that f gets are in the memory of the arrays, and its results in that of tensors.
    PyTorch works on the stream that is current for CuPy.

    Parameters
    ----------
    f
        ``f(h, z)`` on tensors, a function or a module. Arrays of z arrive as tensors, other leaves as they are.
    batch_ndim
        How many first axes of every leaf of h index independent samples.

    Notes
    -----
    Gradients are those with respect to z. What f closes over, a module's parameters among it, is constant; to train
    them have them in z, with ``torch.func.functional_call``.

    Raises
    ------
    ImportError
        If PyTorch is not installed.

    Examples
    --------
    >>> import cupy
    >>> import torch
    >>> import implicit_core as ic
    >>> from implicit_core.adapters import cupy as icc
    >>> problem = icc.from_torch(lambda h, z: torch.tanh(h @ z["w"].T + z["x"]), batch_ndim=1)
    >>> z = {"x": cupy.ones((4, 8)), "w": 0.5 * cupy.eye(8)}
    >>> solution = ic.solve(problem, cupy.zeros((4, 8)), z)
    >>> value, pullback = ic.Neumann(k=5, lam=0.5).vjp(problem, solution.value, z)
    >>> pullback(2 * value)["w"].shape
    (8, 8)
    """
    return lend(_adapter("torch").problem(f, batch_ndim=batch_ndim), "torch")


def from_jax(f: Callable[[PyTree, PyTree], PyTree], *, batch_ndim: int = 0) -> Problem:
    """A :class:`Problem` on CuPy arrays whose F is a JAX function, compiled with its derivatives.

    Nothing is copied: the arrays that f gets are in the memory of CuPy's, and the other way round. Each waits for the
    other where it must, on the device.

    Parameters
    ----------
    f
        ``f(h, z)`` in functions that JAX can compile and differentiate. Other leaves of z than arrays are constants of
        the compiled program; they must be hashable.
    batch_ndim
        How many first axes of every leaf of h index independent samples.

    Notes
    -----
    Gradients are those with respect to z; what f closes over is constant. Arrays of float64 need
    ``jax.config.update("jax_enable_x64", True)``.

    Raises
    ------
    ImportError
        If JAX is not installed.

    Examples
    --------
    >>> import cupy
    >>> import jax.numpy as jnp
    >>> import implicit_core as ic
    >>> from implicit_core.adapters import cupy as icc
    >>> problem = icc.from_jax(lambda h, z: jnp.tanh(h @ z["w"].T + z["x"]), batch_ndim=1)
    >>> z = {"x": cupy.ones((4, 8), cupy.float32), "w": 0.5 * cupy.eye(8, dtype=cupy.float32)}
    >>> solution = ic.solve(problem, cupy.zeros((4, 8), cupy.float32), z)
    >>> value, pullback = ic.Neumann(k=5, lam=0.5).vjp(problem, solution.value, z)
    >>> pullback(2 * value)["w"].shape
    (8, 8)
    """
    return lend(_adapter("jax").problem(f, batch_ndim=batch_ndim, jit=True), "jax")


def _adapter(framework: str) -> ModuleType:
    adapter = load_adapter(framework)
    assert adapter is not None
    return adapter
