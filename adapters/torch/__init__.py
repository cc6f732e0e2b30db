"""PyTorch: F's derivatives from autograd, and the core's estimators inside it."""

from implicit_core.fixed_point import fixed_point
from implicit_core.root import root

from .graphs import CUDAGraphs, GraphFallbackWarning
from .layer import layer as layer  # `fixed_point` calls it for tensors (Decision 12)
from .module import ImplicitLayer
from .problem import problem
from .root_module import RootLayer
from .training import (
    Trajectory,
    VariationalDropout,
    constant_in_checkpoint,
    constant_within_solve,
    fixed_point_correction,
    jacobian_penalty,
    replace_dropout,
)
from .undisturbed import undisturbed as undisturbed  # `implicit_core.check` calls it

__all__ = [
    "CUDAGraphs",
    "GraphFallbackWarning",
    "ImplicitLayer",
    "RootLayer",
    "Trajectory",
    "VariationalDropout",
    "constant_in_checkpoint",
    "constant_within_solve",
    "fixed_point",
    "fixed_point_correction",
    "jacobian_penalty",
    "problem",
    "replace_dropout",
    "root",
]
