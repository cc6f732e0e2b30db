"""PyTorch: F's derivatives from autograd, and the core's estimators inside it."""

from .constant import VariationalDropout, constant_within_solve
from .correction import Trajectory, fixed_point_correction
from .graphs import CUDAGraphs, GraphFallbackWarning
from .layer import fixed_point
from .module import ImplicitLayer
from .monitors import contraction, spectral_radius
from .penalty import jacobian_penalty
from .problem import problem

__all__ = [
    "CUDAGraphs",
    "GraphFallbackWarning",
    "ImplicitLayer",
    "Trajectory",
    "VariationalDropout",
    "constant_within_solve",
    "contraction",
    "fixed_point",
    "fixed_point_correction",
    "jacobian_penalty",
    "problem",
    "spectral_radius",
]
