"""CuPy: F and its derivatives as callbacks: fused kernels, or functions of PyTorch or JAX with their autodiff."""

from .autodiff import from_jax, from_torch
from .pointwise import Pointwise
from .problem import problem

__all__ = ["Pointwise", "from_jax", "from_torch", "problem"]
