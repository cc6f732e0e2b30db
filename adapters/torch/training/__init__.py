"""Tools for training equilibrium models."""

from .constant import VariationalDropout, constant_in_checkpoint, constant_within_solve, replace_dropout
from .correction import Trajectory, fixed_point_correction
from .penalty import jacobian_penalty

__all__ = [
    "Trajectory",
    "VariationalDropout",
    "constant_in_checkpoint",
    "constant_within_solve",
    "fixed_point_correction",
    "jacobian_penalty",
    "replace_dropout",
]
