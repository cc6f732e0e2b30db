"""Implicit layers h = F(h, z) and their phantom gradients, the same in every array framework.

>>> import numpy as np
>>> import implicit_core as ic
>>> problem = ic.Problem(lambda h, z: np.tanh(0.5 * h + z), vjp=lambda h, z, v: (
...     0.5 * (g := v / np.cosh(0.5 * h + z) ** 2), g))
>>> z = np.array([0.3, -0.1])
>>> solution = ic.solve(problem, np.zeros(2), z)
>>> value, pullback = ic.Neumann(k=5, lam=0.5).vjp(problem, solution.value, z)
>>> pullback(np.ones(2)).shape
(2,)
"""

from .backend import Backend
from .check import Finding, Report, check
from .complex_states import ComplexParts, as_real, to_complex, to_real
from .estimators import (
    BPTT,
    NPG,
    UPG,
    Estimator,
    GrowingGradientWarning,
    Implicit,
    InexactGradientWarning,
    Neumann,
    NeumannSeries,
    OneStep,
    Unroll,
)
from .finished import ChangingFunctionWarning
from .fixed_point import fixed_point
from .linear_solvers import CG, GMRES, LSMR, MINRES, BiCGSTAB, LinearSolver, Richardson
from .linear_system import solve_linear
from .magnitudes import magnitudes
from .preconditioner import Preconditioner
from .problem import Linearization, Problem
from .root import root
from .root_problem import RootProblem
from .samples import reset
from .solution import (
    CONVERGED,
    DIVERGED,
    MAX_STEPS,
    NONFINITE,
    STAGNATED,
    UNBRACKETED,
    ConvergenceWarning,
    CoupledSamplesError,
    Solution,
    SolveError,
    Stats,
    Status,
)
from .solve import solve
from .solvers import (
    Anderson,
    Bisection,
    Brent,
    Broyden,
    CallableSolver,
    Compacting,
    FixedPointIteration,
    Newton,
    NewtonKrylov,
    Polyalgorithm,
    Solver,
    steps,
)
from .stepper import Stepper, StepperState

__version__ = "0.1.0"

__all__ = [
    "BPTT",
    "CG",
    "CONVERGED",
    "DIVERGED",
    "GMRES",
    "LSMR",
    "MAX_STEPS",
    "MINRES",
    "NONFINITE",
    "NPG",
    "STAGNATED",
    "UNBRACKETED",
    "UPG",
    "Anderson",
    "Backend",
    "BiCGSTAB",
    "Bisection",
    "Brent",
    "Broyden",
    "CallableSolver",
    "ChangingFunctionWarning",
    "Compacting",
    "ComplexParts",
    "ConvergenceWarning",
    "CoupledSamplesError",
    "Estimator",
    "Finding",
    "FixedPointIteration",
    "GrowingGradientWarning",
    "Implicit",
    "InexactGradientWarning",
    "LinearSolver",
    "Linearization",
    "Neumann",
    "NeumannSeries",
    "Newton",
    "NewtonKrylov",
    "OneStep",
    "Polyalgorithm",
    "Preconditioner",
    "Problem",
    "Report",
    "Richardson",
    "RootProblem",
    "Solution",
    "SolveError",
    "Solver",
    "Stats",
    "Status",
    "Stepper",
    "StepperState",
    "Unroll",
    "as_real",
    "check",
    "fixed_point",
    "magnitudes",
    "reset",
    "root",
    "solve",
    "solve_linear",
    "steps",
    "to_complex",
    "to_real",
]
