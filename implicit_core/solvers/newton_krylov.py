"""Newton's method with a Krylov solver for its linear systems."""

from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple

from .. import checks
from ..arrays import Mask, Numbers, Operator, State
from ..carry import GOING_ON, Point
from ..linear_solvers import GMRES, LinearSolver
from ..linear_solvers.base import ratio
from ..solution import Status
from ..space import Space
from ..system import System
from .base import Solver

SUFFICIENT = 1e-4
"""Least relative decrease of the residual, times the fraction of the Newton step, for which the step is kept."""
SHORTEST = 1e-3
"""The fraction of a Newton step below which the line search has failed, and the whole step is taken."""
SHORTER = 0.1, 0.5
"""The least and the largest share that is left of a fraction that was too long."""
WINDOW = 8
"""A residual has to fall below the largest of so many points, so that it may rise for a while."""
FIRST, LARGEST = 0.2, 0.9
"""The first forcing term, and the largest one."""
SHARE, SAFE = 0.5, 0.1
"""γ of Eisenstat and Walker, and the forcing term above which the next one is not much smaller."""
ENOUGH = 0.8
"""No linear system is solved beyond this share of the tolerance of the solve."""


class Memory(NamedTuple):
    """The current Newton step.

    Attributes
    ----------
    x, norm
        Where it starts, and the residual norm there, (N, 1).
    recent
        The residual norms of the last points that were kept, zero where there is none yet, (N, WINDOW).
    direction, forcing
        The whole step, and the relative residual of its linear system, (N, 1).
    fraction
        How much of it is tried, (N, 1).
    forced
        Where the next point is kept whatever it is, (N, 1).
    status
        STAGNATED in samples where the linear solver found no step, else ``GOING_ON``, (N, 1).
    """

    x: State
    norm: Numbers
    recent: Numbers
    direction: State
    forcing: Numbers
    fraction: Numbers
    forced: Mask
    status: Numbers


@dataclass(frozen=True, kw_only=True, repr=False)
class NewtonKrylov(Solver):
    """Inexact Newton: (I - ∂F/∂h) d = F(h) - h by a matrix-free Krylov solve, h ← h + t d.

    The relative residual of a linear system, the forcing term, follows from how fast the residual falls, per sample: a
    rough solution is enough far from the root. t is made shorter, per sample, until the residual is finite and falls
    enough below the largest of the last 8. Each trial is one step, and one evaluation of F. Where no t above 1/1000 is
    enough, the whole step is taken. A sample ends as STAGNATED where the linear solver finds no step, as where
    products are NaN. Needs the JVP of F, which PyTorch and JAX make for a plain f.

    Parameters
    ----------
    linear_solver
        A :class:`LinearSolver`; its rtol is the least forcing term. A step is one cycle of it: instead of a restart of
        GMRES, which begins with the residual of the linear system, comes the next step, with that of F itself.
        Its ``check`` finds no coupled samples within a cycle.
    rtol, atol, max_steps, check_every, patience, freeze, stop, check
        As for :class:`Solver`.

    Raises
    ------
    TypeError, ValueError
        If a setting is of a wrong kind or out of range.

    References
    ----------
    D. A. Knoll and D. E. Keyes, Jacobian-free Newton-Krylov methods, J. Comput. Phys. 193 (2004).
    S. C. Eisenstat and H. F. Walker, Choosing the forcing terms in an inexact Newton method, SIAM J. Sci. Comput. 17
    (1996): choice 2, with its safeguard.
    L. Grippo, F. Lampariello and S. Lucidi, A nonmonotone line search technique for Newton's method, SIAM J. Numer.
    Anal. 23 (1986).

    Examples
    --------
    >>> import numpy as np
    >>> import implicit_core as ic
    >>> problem = ic.Problem(lambda h, z: np.exp(-z * h), jvp=lambda h, z, dh, dz: -np.exp(-z * h) * (z * dh + h * dz))
    >>> solution = ic.solve(problem, np.array(1.0), np.array(1.0), solver=ic.NewtonKrylov(rtol=1e-12))
    >>> round(float(solution.value), 9), int(solution.stats.evaluations) < 8
    (0.56714329, True)
    """

    linear_solver: LinearSolver = field(default=GMRES(rtol=1e-3, restart=60, max_steps=60))

    copies_results: ClassVar[bool] = False
    uses_jacobian: ClassVar[bool] = True
    undoes_steps: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.instance("linear_solver", self.linear_solver, LinearSolver, "GMRES()")

    def init(self, system: System, x: State) -> Memory:
        space = system.space
        nothing, recent = space.full(0.0), space.matrices(1, WINDOW)[:, 0, :]
        going_on = space.full(GOING_ON, space.xp.int32)
        return Memory(x, nothing, recent, space.zeros(), nothing, nothing + 1.0, space.all_samples(), going_on)

    def observe(self, system: System, memory: Memory, point: Point, operator: Operator | None) -> Memory:
        assert operator is not None  # uses_jacobian
        space, xp = system.space, system.space.xp
        largest = space.largest_of(memory.recent)
        enough = memory.forced | (point.norm <= (1 - SUFFICIENT * memory.fraction) * largest)
        kept = point.active & enough & (point.norm < float("inf"))

        rhs = space.where(kept, point.residual, space.zeros())
        forcing = self._forcing(system, memory, point)
        check = self.check and self.freeze and self.linear_solver.check
        linear_solver = replace(self.linear_solver, check=check)
        direction = linear_solver.one_cycle(space, operator, rhs, rtol=forcing)
        nowhere = kept & (space.largest(direction) == 0) & (point.norm > 0)

        shorter = self._shorter(space, memory, point)
        failed = ~memory.forced & (shorter < SHORTEST)
        return Memory(
            space.where(kept, point.x, memory.x),
            space.select(kept, point.norm, memory.norm),
            xp.where(kept, xp.concat([point.norm, memory.recent[:, :-1]], axis=1), memory.recent),
            space.where(kept, direction, memory.direction),
            space.select(kept, forcing, memory.forcing),
            space.select(kept | failed, space.full(1.0), shorter),
            ~kept & (memory.forced | failed),
            space.select(nowhere, Status.STAGNATED.value, memory.status),
        )

    def ended(self, memory: Memory) -> Numbers:
        return memory.status

    def _forcing(self, system: System, memory: Memory, point: Point) -> Numbers:
        """γ (‖r‖ / ‖r before‖)², but not much below the one before, nor below what the tolerance asks for."""
        space, xp = system.space, system.space.xp
        before, largest = SHARE * memory.forcing**2, space.full(LARGEST)
        forcing = SHARE * ratio(point.norm, memory.norm, space) ** 2
        forcing = space.select(before > SAFE, xp.maximum(forcing, before), forcing)
        forcing = space.select(memory.norm > 0, forcing, space.full(FIRST))
        atol = self.absolute_tolerance_of(root=system.is_root)
        enough = ENOUGH * ratio(self.rtol * point.f_norm + atol, point.norm, space)
        least: Numbers = xp.maximum(enough, space.full(0.0) + self.linear_solver.rtol)
        return space.select(forcing > least, xp.minimum(forcing, largest), xp.minimum(least, largest))

    def _shorter(self, space: Space, memory: Memory, point: Point) -> Numbers:
        """A fraction at the minimum of the parabola through ‖r‖² at both ends, with its slope at the start."""
        t, growth = memory.fraction, ratio(point.norm, memory.norm, space)
        slope = 2 * (1 - memory.forcing)
        promised = ratio(0.5 * slope * t * t, growth**2 - 1 + slope * t, space)
        lowest, highest = SHORTER[0] * t, SHORTER[1] * t
        return space.select(point.norm < float("inf"), space.xp.clip(promised, lowest, highest), lowest)

    def step(self, system: System, memory: Memory, point: Point) -> tuple[State, Memory]:
        return system.space.axpy(memory.fraction, memory.direction, memory.x), memory
