"""Fixed-point solvers, one a file; :func:`implicit_core.solve` runs them."""

from ..carry import Point
from .anderson import Anderson
from .base import FixedPointSolver, Solver
from .broyden import Broyden
from .compacting import Compacting
from .custom import CallableSolver
from .fixed_point_iteration import FixedPointIteration
from .newton_krylov import NewtonKrylov

__all__ = [
    "Anderson",
    "Broyden",
    "CallableSolver",
    "Compacting",
    "FixedPointIteration",
    "FixedPointSolver",
    "NewtonKrylov",
    "Point",
    "Solver",
]
