"""Derivatives made by PyTorch or JAX, for CuPy arrays."""

from types import ModuleType
from typing import Any

from implicit_core.arrays import H, Z
from implicit_core.dlpack import borrow_derivatives
from implicit_core.problem import Map, Problem
from implicit_core.registry import load_adapter


def from_torch(f: Map[H, Z], *, batch_ndim: int = 0, scale: Any = None) -> Problem[Any, Any]:
    """A :class:`Problem` on CuPy arrays, whose F is a PyTorch function or module with derivatives from autograd.

    Nothing is copied: the tensors that f gets share the memory of the CuPy arrays, and so do its results. PyTorch works
    on the stream that is current for CuPy.

    Parameters
    ----------
    f
        ``f(h, z)`` on tensors, a function or a module. Arrays of z arrive as tensors, other leaves as they are.
    batch_ndim
        How many first axes of every leaf of h index independent samples.
    scale
        The units of the unknown, as for :class:`implicit_core.Problem`.

    Notes
    -----
    Gradients are with respect to z. What f closes over, such as the parameters of a module, is constant. To train a
    module, put its parameters in z and call it with ``torch.func.functional_call``.

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
    return borrow_derivatives(_adapter("torch").problem(f, batch_ndim=batch_ndim, scale=scale), "torch")


def from_jax(f: Map[H, Z], *, batch_ndim: int = 0, scale: Any = None) -> Problem[Any, Any]:
    """A :class:`Problem` on CuPy arrays, whose F is a JAX function, compiled with its derivatives.

    Nothing is copied: the JAX arrays that f gets share the memory of the CuPy arrays, and so do its results. CuPy and
    JAX wait for each other where they must, on the device.

    Parameters
    ----------
    f
        ``f(h, z)`` in functions that JAX can compile and differentiate. Leaves of z that are not arrays are constants
        of the compiled program; they must be hashable.
    batch_ndim
        How many first axes of every leaf of h index independent samples.
    scale
        The units of the unknown, as for :class:`implicit_core.Problem`.

    Notes
    -----
    Gradients are with respect to z; what f closes over is constant. Arrays of float64 need
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
    make = _adapter("jax").problem
    from implicit_core.adapters.jax.problem import compiled_once  # JAX is there

    return borrow_derivatives(make(compiled_once(f), batch_ndim=batch_ndim, scale=scale), "jax")


def _adapter(framework: str) -> ModuleType:
    adapter = load_adapter(framework)
    assert adapter is not None
    return adapter
