"""Gradient estimators, one a file: Eq. (17) in ``unroll``, Eq. (18) in ``neumann``, Eq. (4) in ``implicit``."""

from .base import AtFixedPoint, Derivative, Estimator
from .bptt import BPTT
from .growth import GrowingGradientWarning
from .implicit import Implicit
from .inexact import InexactGradientWarning
from .neumann import Neumann
from .neumann_series import NeumannSeries
from .one_step import OneStep
from .unroll import Unroll

UPG = Unroll
NPG = Neumann

__all__ = [
    "BPTT",
    "NPG",
    "UPG",
    "AtFixedPoint",
    "Derivative",
    "Estimator",
    "GrowingGradientWarning",
    "Implicit",
    "InexactGradientWarning",
    "Neumann",
    "NeumannSeries",
    "OneStep",
    "Unroll",
]
