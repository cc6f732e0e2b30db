"""Newton's method with the Jacobian as a matrix, for small systems."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from ..arrays import Mask, Matrices, Numbers, Operator, State
from ..carry import Point
from ..linear_operators import is_sparse
from ..linear_solvers.base import ratio
from ..space import Space
from ..system import System
from . import dense
from .base import Solver
from .jacobian import MatrixOperator, SparseFactors, factors_of_sparse, inverse_of

SUFFICIENT = 0.25
"""A fraction t of a step is kept if the next correction is below 1 - t / 4 of this one."""
SHORTER, SHORTEST = 0.1, 0.5
"""The least and the largest share that is left of a fraction that was too long."""
LONGER = 4.0
"""How much longer than the last one a fraction may be."""
LEAST = 1e-3
"""The fraction below which damping has failed, and the whole step is taken."""


class Memory(NamedTuple):
    """The current Newton step.

    Attributes
    ----------
    x
        Where it starts.
    direction, length
        The whole step, and its norm, (N, 1).
    fraction
        How much of it is tried, (N, 1).
    forced
        Where the next point is kept whatever it is, (N, 1).
    inverse
        The inverse of the Jacobian at x, (N, n, n), or the factorization of a sparse one; None at the start of it.
    """

    x: State
    direction: State
    length: Numbers
    fraction: Numbers
    forced: Mask
    inverse: Matrices | SparseFactors | None


@dataclass(frozen=True, kw_only=True, repr=False)
class Newton(Solver):
    """Newton's method with the Jacobian as a matrix.

    The matrix is the ``jacobian`` of the :class:`Problem`, dense or sparse, for systems of every size. Without one it
    is made of n products for each step, and has (N, n, n) numbers, for small n.

    A step is damped, per sample, until the next correction with the same Jacobian is shorter than this one. Unlike a
    test of the residual, this does not depend on the units of the equations, nor on how they are combined. Where no
    fraction of the step is short enough, the whole step is taken. A singular Jacobian is inverted by least squares.
    Needs a Jacobian, or the JVP of F, which PyTorch and JAX make for a plain f.

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
        space, n = system.space, system.space.dimension
        nothing, everywhere = space.full(0.0), space.all_samples()
        may_be_sparse = system.problem.jacobian is not None and space.backend.name == "numpy" and not space.batch_shape
        inverse = None if may_be_sparse else space.matrices(n, n)
        return Memory(x, space.zeros(), nothing, nothing + 1.0, everywhere, inverse)

    def observe(self, system: System, memory: Memory, point: Point, operator: Operator | None) -> Memory:
        assert operator is not None  # uses_jacobian
        space, t = system.space, memory.fraction
        finite = point.norm < float("inf")
        residual = space.where(finite, point.residual, space.zeros())
        correction = _applied(space, memory.inverse, residual)
        kept = finite & (memory.forced | (space.norm(correction) <= (1 - SUFFICIENT * t) * memory.length))
        kept = kept & point.active

        inverse = _renewed(space, operator, memory.inverse, kept)
        direction = space.where(kept, _applied(space, inverse, residual), memory.direction)
        shorter = self._shorter(space, memory, correction, finite)
        failed = ~kept & (shorter < LEAST)
        longer = space.xp.minimum(LONGER * t, space.full(1.0))
        fraction = space.select(kept, longer, space.select(failed, space.full(1.0), shorter))
        x = space.where(kept, point.x, memory.x)
        return Memory(x, direction, space.norm(direction), fraction, failed, inverse)

    def _shorter(self, space: Space, memory: Memory, correction: State, finite: Mask) -> Numbers:
        """A fraction that promises a shorter correction."""
        t = memory.fraction
        bend = space.norm(space.axpy(t - 1, memory.direction, correction))
        promised = ratio(0.5 * memory.length * t * t, bend, space)
        lowest, highest = SHORTER * t, SHORTEST * t
        return space.select(finite, space.xp.clip(promised, lowest, highest), lowest)

    def step(self, system: System, memory: Memory, point: Point) -> tuple[State, Memory]:
        return system.space.axpy(memory.fraction, memory.direction, memory.x), memory


def _renewed(
    space: Space, operator: Operator, before: Matrices | SparseFactors | None, where: Mask
) -> Matrices | SparseFactors | None:
    """The inverse of an operator in the samples of ``where``, else ``before``."""
    if before is None or isinstance(before, SparseFactors):
        assert isinstance(operator, MatrixOperator)
        if not bool(space.xp.any(where)):
            return before
        if is_sparse(operator.matrix):
            return factors_of_sparse(space, operator.matrix)
        before = space.matrices(space.dimension, space.dimension)
    return dense.renewed(space, lambda: inverse_of(space, operator), before, where)


def _applied(space: Space, inverse: Matrices | SparseFactors | None, x: State) -> State:
    """A⁻¹ x; zero before there is an inverse."""
    if inverse is None:
        return space.zeros()
    return inverse.solve(space, x) if isinstance(inverse, SparseFactors) else dense.multiply(space, inverse, x)
