"""Matrix-free linear solvers for the exact gradient and for Newton's method, one in each file."""

from .base import LinearResult, LinearSolver
from .bicgstab import BiCGSTAB
from .cg import CG
from .gmres import GMRES
from .lsmr import LSMR
from .minres import MINRES
from .richardson import Richardson

__all__ = ["CG", "GMRES", "LSMR", "MINRES", "BiCGSTAB", "LinearResult", "LinearSolver", "Richardson"]
