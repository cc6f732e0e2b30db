"""Newton's method with the Jacobian as a matrix, for small systems."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from ..arrays import Mask, Numbers, Operator, State
from ..carry import GOING_ON, Point
from ..linear_solvers.base import ratio
from ..solution import Status
from ..space import Space
from ..system import System
from .base import Solver
from .regularized import Jacobian, Regularization, carried_on, directed, first_jacobian, gain, off

SUFFICIENT = 0.25
"""A fraction t of a step is kept if the next correction is below 1 - t / 4 of this one."""
SHORTER, SHORTEST = 0.1, 0.5
"""The least and the largest share that is left of a fraction that was too long."""
LONGER = 4.0
"""How much longer than the last one a fraction may be."""
LEAST = 1e-3
"""The fraction below which damping has failed, and steps are regularized."""


class Memory(NamedTuple):
    """The current step.

    Attributes
    ----------
    x, residual
        Where it starts, and the residual there.
    direction, length
        The whole step, and its norm, (N, 1).
    fraction
        How much of it is tried, (N, 1).
    forced
        Where the next point is kept whatever it is, (N, 1).
    jacobian
        The Jacobian at x; None before the first one if it may be sparse.
    regularization
        Of the steps from points where no fraction was short enough.
    status
        A status in samples where no step leads anywhere, else ``GOING_ON``, (N, 1).
    """

    x: State
    residual: State
    direction: State
    length: Numbers
    fraction: Numbers
    forced: Mask
    jacobian: Jacobian | None
    regularization: Regularization
    status: Numbers


@dataclass(frozen=True, kw_only=True, repr=False)
class Newton(Solver):
    """Newton's method with the Jacobian as a matrix.

    The matrix is the ``jacobian`` of the :class:`Problem`, dense or sparse, for systems of every size. Without one it
    is made of n products for each step, and has (N, n, n) numbers, for small n.

    A step is damped, per sample, until the next correction with the same Jacobian is shorter than this one. Unlike a
    test of the residual, this does not depend on the units of the equations, nor on how they are combined. A singular
    Jacobian is inverted by least squares, if it is dense; to a sparse one √ε of its largest entry times I is added.

    Where no fraction of 1/1000 or more is short enough, the sample goes on with a regularized Jacobian A, and a shift s
    in proportion to its residual r = F(h) - h:

    - of a dense A, by Levenberg-Marquardt steps, the d of least ‖A d - r‖² + s² ‖d‖², as long as ‖r‖ falls;
    - of a sparse A, by pseudo-transient continuation, (A ± s I) d = r: implicit Euler steps of ± x' = r(x), whose
      length 1/s grows as ‖r‖ falls, and along which ‖r‖ may rise.

    Where 24 such steps do not halve ‖r‖, it is near a local minimum: the whole Newton step is taken, and damping begins
    anew. A sample ends as STAGNATED where the step is zero, and as NONFINITE where it is so because numbers of A are
    not finite. Needs a Jacobian, or the JVP of F, which PyTorch and JAX make for a plain f.

    Parameters
    ----------
    rtol, atol, max_steps, check_every, patience, freeze, stop, check
        As for :class:`Solver`.

    Raises
    ------
    TypeError, ValueError
        If a setting is of a wrong kind or out of range.

    References
    ----------
    P. Deuflhard, Newton Methods for Nonlinear Problems (2011), section 3.3: the natural monotonicity test, and the
    choice of the fraction in algorithm NLEQ-ERR.
    J.-Y. Fan and Y.-X. Yuan, On the quadratic convergence of the Levenberg-Marquardt method without nonsingularity
    assumption, Computing 74 (2005): a squared shift in proportion to ‖r‖².
    C. T. Kelley and D. E. Keyes, Convergence analysis of pseudo-transient continuation, SIAM J. Numer. Anal. 35 (1998):
    switched evolution relaxation.

    Examples
    --------
    >>> import numpy as np
    >>> import implicit_core as ic
    >>> problem = ic.RootProblem(lambda x, z: x**3 - z, jvp=lambda x, z, dx, dz: 3 * x**2 * dx - dz)
    >>> solution = ic.solve(problem, np.array([0.1]), np.array([8.0]), solver=ic.Newton(rtol=1e-9))
    >>> solution.value.round(6)
    array([2.])
    """

    copies_results: ClassVar[bool] = False
    uses_jacobian: ClassVar[bool] = True
    undoes_steps: ClassVar[bool] = True

    def init(self, system: System, x: State) -> Memory:
        space = system.space
        nothing, everywhere = space.full(0.0), space.all_samples()
        may_be_sparse = system.problem.jacobian is not None and space.backend.name == "numpy" and not space.batch_shape
        jacobian = None if may_be_sparse else first_jacobian(space, None)
        going_on = space.full(GOING_ON, space.xp.int32)
        return Memory(
            x, space.zeros(), space.zeros(), nothing, nothing + 1.0, everywhere, jacobian, off(space), going_on
        )

    def observe(self, system: System, memory: Memory, point: Point, operator: Operator | None) -> Memory:
        assert operator is not None  # uses_jacobian
        space, before, t = system.space, memory.regularization, memory.fraction
        if memory.jacobian is None and not bool(point.active):  # no matrix is needed, and whether it is sparse unknown
            return memory
        one, jacobian = space.full(1.0), memory.jacobian or first_jacobian(space, operator)
        finite = point.norm < float("inf")
        residual = space.where(finite, point.residual, space.zeros())
        correction = jacobian.solve(space, residual)
        falls, change = jacobian.judged(space, gain(space, before, space.norm(memory.residual), point.norm))
        good = (before.on & falls) | (~before.on & (space.norm(correction) <= (1 - SUFFICIENT * t) * memory.length))
        kept = point.active & finite & (memory.forced | good)
        shorter = self._shorter(space, memory, correction, finite)
        failed = point.active & ~(kept | before.on) & (shorter < LEAST)

        jacobian = jacobian.renewed(space, operator, kept)
        residual, x = space.where(kept, residual, memory.residual), space.where(kept, point.x, memory.x)
        regularization = carried_on(space, before, jacobian, space.norm(residual), kept, failed, change)
        given_up = point.active & before.on & ~regularization.on
        whole = (kept & ~regularization.on) | given_up
        jacobian = jacobian.factorized(space, whole)
        direction = space.where(whole, jacobian.solve(space, residual), memory.direction)
        length = space.norm(direction)
        nowhere = whole & (space.largest(direction) == 0) & (space.largest(residual) > 0)
        status = space.select(
            jacobian.is_finite(space), Status.STAGNATED.value, space.full(Status.NONFINITE, space.xp.int32)
        )
        direction, regularization = directed(space, regularization, jacobian, residual, direction, point.active)
        fraction = space.select(kept, space.xp.minimum(LONGER * t, one), shorter)
        fraction = space.select(regularization.on | given_up, one, fraction)
        return Memory(
            x,
            residual,
            direction,
            length,
            fraction,
            given_up,
            jacobian,
            regularization,
            space.select(nowhere, status, memory.status),
        )

    def ended(self, memory: Memory) -> Numbers:
        return memory.status

    def _shorter(self, space: Space, memory: Memory, correction: State, finite: Mask) -> Numbers:
        """A fraction that promises a shorter correction."""
        t = memory.fraction
        bend = space.norm(space.axpy(t - 1, memory.direction, correction))
        promised = ratio(0.5 * memory.length * t * t, bend, space)
        lowest, highest = SHORTER * t, SHORTEST * t
        return space.select(finite, space.xp.clip(promised, lowest, highest), lowest)

    def step(self, system: System, memory: Memory, point: Point) -> tuple[State, Memory]:
        return system.space.axpy(memory.fraction, memory.direction, memory.x), memory
