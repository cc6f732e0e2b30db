"""Fixed-point solvers, one a file; :func:`implicit_core.solve` runs them."""

from ..carry import Point
from .anderson import Anderson
from .base import FixedPointSolver, Solver
from .bisection import Bisection
from .brent import Brent
from .broyden import Broyden
from .compacting import Compacting
from .custom import CallableSolver
from .fixed_point_iteration import FixedPointIteration, steps
from .newton import Newton
from .newton_krylov import NewtonKrylov
from .polyalgorithm import Polyalgorithm

__all__ = [
    "Anderson",
    "Bisection",
    "Brent",
    "Broyden",
    "CallableSolver",
    "Compacting",
    "FixedPointIteration",
    "FixedPointSolver",
    "Newton",
    "NewtonKrylov",
    "Point",
    "Polyalgorithm",
    "Solver",
    "steps",
]
