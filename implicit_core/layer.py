"""What adapters build a layer from: the options of :func:`implicit_core.fixed_point`, and the solver's point.

An adapter is a module with one function, ``layer(problem, h0, z, options) -> Solution``, whose value is differentiable
in its framework.
"""

from dataclasses import dataclass
from typing import Protocol

from .arrays import H, Z
from .estimators import Estimator
from .problem import Problem
from .solution import Solution
from .solve import solve
from .solvers import FixedPointIteration, FixedPointSolver


@dataclass(frozen=True)
class LayerOptions:
    """Options of :func:`implicit_core.fixed_point`, checked.

    Attributes
    ----------
    solver, gradient, throw, trace
        As there.
    """

    solver: FixedPointSolver
    gradient: Estimator
    throw: bool = False
    trace: bool = False


class Layer(Protocol):
    """The function ``layer`` of an adapter."""

    def __call__(self, problem: Problem[H, Z], h0: H, z: Z, options: LayerOptions) -> Solution[H]:
        """The estimator's value, differentiable, and the solve's status and stats.

        A problem without callbacks stands for its plain ``f``, which the framework differentiates.
        """
        ...


def undifferentiated(problem: Problem[H, Z], h0: H, z: Z, options: LayerOptions) -> Solution[H]:
    """The layer of a framework without autodiff."""
    solution = solver_point(problem, h0, z, options)
    return solution._replace(value=options.gradient.value(problem, solution.value, z))


def solver_point(problem: Problem[H, Z], h0: H, z: Z, options: LayerOptions) -> Solution[H]:
    """The point at which the estimator starts: the solver's, or h0 itself with one evaluation of F."""
    solver = FixedPointIteration(max_steps=1) if options.gradient.starts_from_h0 else options.solver
    return solve(problem, h0, z, solver=solver, throw=options.throw, trace=options.trace)
