"""Gradient estimators, one a file: Eq. (17) in ``unroll``, Eq. (18) in ``neumann``, Eq. (4) in ``implicit``."""

from .base import Estimator, Pullback
from .bptt import BPTT
from .implicit import Implicit, InexactGradientWarning
from .neumann import Neumann, neumann_series
from .one_step import OneStep
from .unroll import Unroll

UPG = Unroll
NPG = Neumann

__all__ = [
    "BPTT",
    "NPG",
    "UPG",
    "Estimator",
    "Implicit",
    "InexactGradientWarning",
    "Neumann",
    "OneStep",
    "Pullback",
    "Unroll",
    "neumann_series",
]
