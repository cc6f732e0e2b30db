"""JAX: F's derivatives from its transformations, and the core's estimators inside them."""

from .layer import fixed_point
from .problem import problem

__all__ = ["fixed_point", "problem"]
