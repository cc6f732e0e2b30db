"""PyTorch: F's derivatives from autograd, and the core's estimators inside it."""

from .layer import fixed_point
from .module import ImplicitLayer
from .problem import problem

__all__ = ["ImplicitLayer", "fixed_point", "problem"]
