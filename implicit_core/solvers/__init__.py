"""Fixed-point solvers, one a file; :func:`implicit_core.solve` runs them."""

from .anderson import Anderson
from .base import Point, Solver
from .broyden import Broyden
from .custom import CallableSolver
from .driven import DrivenSolver
from .fixed_point_iteration import FixedPointIteration
from .newton_krylov import NewtonKrylov

__all__ = [
    "Anderson",
    "Broyden",
    "CallableSolver",
    "DrivenSolver",
    "FixedPointIteration",
    "NewtonKrylov",
    "Point",
    "Solver",
]
