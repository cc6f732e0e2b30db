"""Newton's method with a Krylov solver for its linear systems."""

from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple

from .. import checks
from ..arrays import Numbers, Operator, State
from ..carry import Point
from ..linear_solvers import GMRES, LinearSolver
from ..system import System
from .base import Solver

SUFFICIENT = 1e-4
"""Least relative decrease of the residual, times the fraction of the Newton step, for which the step is kept."""
SHORTEST = 1e-3
"""A fraction of the Newton step that is no longer halved."""


class Memory(NamedTuple):
    """Where the current line search starts, its residual norm and direction, and the fraction of it to be tried."""

    x: State
    norm: Numbers
    direction: State
    fraction: Numbers


@dataclass(frozen=True, kw_only=True, repr=False)
class NewtonKrylov(Solver):
    """Inexact Newton: (I - ∂F/∂h) d = F(h) - h by a matrix-free Krylov solve, h ← h + t d.

    t is halved, per sample, until the residual is finite and falls enough (Armijo's rule on its norm); each trial is
    one step, and one evaluation of F. Needs the JVP of F, which PyTorch and JAX make for a plain f.

    Parameters
    ----------
    linear_solver
        A :class:`LinearSolver`; its tolerance is the forcing term of the inexact Newton method.
    rtol, atol, max_steps, check_every, patience, freeze, check
        As for :class:`Solver`.

    Raises
    ------
    TypeError, ValueError
        If a setting is of a wrong kind or out of range.

    References
    ----------
    D. A. Knoll and D. E. Keyes, Jacobian-free Newton-Krylov methods, J. Comput. Phys. 193 (2004).

    Examples
    --------
    >>> import numpy as np
    >>> import implicit_core as ic
    >>> problem = ic.Problem(lambda h, z: np.exp(-z * h), jvp=lambda h, z, dh, dz: -np.exp(-z * h) * (z * dh + h * dz))
    >>> solution = ic.solve(problem, np.array(1.0), np.array(1.0), solver=ic.NewtonKrylov(rtol=1e-12))
    >>> round(float(solution.value), 9), int(solution.stats.evaluations) < 8
    (0.56714329, True)
    """

    linear_solver: LinearSolver = field(default=GMRES(rtol=1e-3, max_steps=60))

    copies_results: ClassVar[bool] = False
    uses_jacobian: ClassVar[bool] = True
    undoes_steps: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.instance("linear_solver", self.linear_solver, LinearSolver, "GMRES()")

    def init(self, system: System, x: State) -> Memory:
        space = system.space
        largest = float(space.backend.finfo(space.dtype).max)  # any residual is enough
        return Memory(x, space.full(largest), space.zeros(), space.full(1.0))

    def observe(self, system: System, memory: Memory, point: Point, operator: Operator | None) -> Memory:
        assert operator is not None  # uses_jacobian
        space, where = system.space, system.space.xp.where
        enough = point.norm <= (1 - SUFFICIENT * memory.fraction) * memory.norm
        accept = point.active & (enough | (memory.fraction < SHORTEST))

        rhs = space.where(accept, point.residual, space.zeros())
        check = self.check and self.freeze and self.linear_solver.check
        linear_solver = replace(self.linear_solver, check=check)
        newton = linear_solver.run(space, operator, rhs).x
        fraction = where(accept, space.full(1.0), memory.fraction / 2)
        x = space.where(accept, point.x, memory.x)
        direction = space.where(accept, newton, memory.direction)
        norm = where(accept, point.norm, memory.norm)
        return Memory(x, norm, direction, fraction)

    def step(self, system: System, memory: Memory, point: Point) -> tuple[State, Memory]:
        return system.space.axpy(memory.fraction, memory.direction, memory.x), memory
