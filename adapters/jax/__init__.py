"""JAX: F's derivatives from its transformations, and the core's estimators inside them."""

from implicit_core.fixed_point import fixed_point
from implicit_core.root import root

from .layer import layer as layer  # Decision 12
from .layer import solve_compiled as solve_compiled
from .problem import problem

__all__ = ["fixed_point", "problem", "root"]
