"""The Jacobian of Newton's method as a matrix, and steps with a regularized one where a line search fails.

A regularized step has a shift s = λ ‖r‖, which vanishes with the residual r, so that close to a root it is Newton's.

- With a dense A it is the step of Levenberg and Marquardt: the d of least ‖A d - r‖² + s² ‖d‖². It is kept where ‖r‖²
  falls by a small part of what A predicts. That part also says whether λ grows or falls.
- With a sparse A it is a step of pseudo-transient continuation: (A + s I) d = r, implicit Euler for x' = r(x), of a
  length 1 / s that grows as the residual falls. It is kept where the residual is finite, even if it rises. Where A has
  a negative trace, the equation is x' = -r(x).
"""

import math
from typing import Any, NamedTuple

from ..arrays import Mask, Matrices, Numbers, Operator, State
from ..backend import Known
from ..linear_operators import is_sparse
from ..linear_solvers.base import ratio
from ..space import Space
from . import dense
from .jacobian import (
    Matrix,
    MatrixOperator,
    SparseFactors,
    factors_of_sparse,
    identity_like,
    inverse_transposed,
    transposed_of,
    without_nan,
)

FIRST_OF_DENSE, FIRST_OF_SPARSE = 0.3, 0.03
"""The first shift, as a fraction of the root mean square of the singular values of A."""
LEAST_GAIN, POOR, GOOD = 1e-4, 0.25, 0.75
"""A fall of ‖r‖², in units of what A predicts: above the first a step is kept, below the second λ is doubled, above the
third it is halved."""
BACK = 10.0
"""What λ is multiplied by where a step of pseudo-transient continuation led to a residual that is not finite."""
HALF, WAIT = 0.5, 24
"""Where a residual is not halved within so many regularized steps, a whole Newton step is taken."""


class DenseJacobian(NamedTuple):
    """A dense A for each sample.

    Attributes
    ----------
    transposed, inverse
        Aᵀ, and A⁻ᵀ at the last point where it was asked for, by least squares if A is singular, (N, n, n).
    """

    transposed: Matrices
    inverse: Matrices

    def renewed(self, space: Space, operator: Operator, where: Mask) -> "DenseJacobian":
        """The matrix of an operator, in the samples of ``where``."""
        made = dense.renewed(space, lambda: transposed_of(space, operator, where), self.transposed, where)
        return self._replace(transposed=made)

    def factorized(self, space: Space, where: Mask) -> "DenseJacobian":
        """The same with its inverse, in the samples of ``where``."""
        made = dense.renewed(space, lambda: inverse_transposed(space, self.transposed), self.inverse, where)
        return self._replace(inverse=made)

    def solve(self, space: Space, x: State) -> State:
        """A⁻¹ x, with the inverse as it is."""
        return dense.multiply(space, self.inverse, x)

    def regularized(self, space: Space, r: State, shift: Numbers) -> tuple[State, Numbers]:
        """The step d, and ‖A d - r‖ = s ‖u‖: by s u + A d = r and Aᵀ u = s d, which do not square A's condition."""
        xp: Any = space.xp
        n, transposed = space.dimension, without_nan(space, self.transposed)
        diagonal = shift[:, :, None] * space.eye(n)[None, :, :]
        upper = xp.concat([diagonal, xp.matrix_transpose(transposed)], axis=2)
        lower = xp.concat([transposed, -diagonal], axis=2)
        row = dense.joined(space, r)
        right = xp.matrix_transpose(xp.concat([row, xp.zeros_like(row)], axis=2))
        solution = xp.matrix_transpose(dense.safely(space, xp.linalg.solve, xp.concat([upper, lower], axis=1), right))
        left: Numbers = shift * xp.linalg.vector_norm(solution[:, 0, :n], axis=1, keepdims=True)
        return dense.split(space, solution[:, :, n:]), left

    def judged(self, space: Space, gain: Numbers) -> tuple[Mask, Numbers]:
        """Where a step is kept, and what λ is multiplied by."""
        one = space.full(1.0)
        return gain > LEAST_GAIN, space.select(gain < POOR, 2 * one, space.select(gain > GOOD, 0.5 * one, one))

    def size(self, space: Space) -> Numbers:
        """The root mean square of the singular values, (N, 1)."""
        norm: Numbers = space.xp.linalg.vector_norm(without_nan(space, self.transposed), axis=(1, 2))[:, None]
        return norm / math.sqrt(max(space.dimension, 1))

    def first_shift(self, space: Space) -> Numbers:
        """The shift of the first regularized step, (N, 1)."""
        return FIRST_OF_DENSE * self.size(space)

    def is_finite(self, space: Space) -> Mask:
        """Whether all numbers of A are, (N, 1)."""
        finite: Mask = space.xp.all(space.xp.isfinite(self.transposed), axis=(1, 2))[:, None]
        return finite


class SparseJacobian(NamedTuple):
    """A sparse A of the only sample, with the methods of :class:`DenseJacobian`.

    Attributes
    ----------
    matrix, factors
        A, and the factorization of A at the last point where it was asked for; None before, and of zero.
    """

    matrix: Matrix
    factors: SparseFactors | None = None

    def renewed(self, space: Space, operator: Operator, where: Mask) -> "SparseJacobian":
        assert isinstance(operator, MatrixOperator)
        return self._replace(matrix=operator.matrix) if bool(where) else self

    def factorized(self, space: Space, where: Mask) -> "SparseJacobian":
        if not bool(where):
            return self
        is_zero = not bool(space.xp.any(without_nan(space, self.matrix.data)))
        return self._replace(factors=None if is_zero else factors_of_sparse(space, self.matrix))

    def solve(self, space: Space, x: State) -> State:
        return space.zeros() if self.factors is None else self.factors.solve(space, x)

    def regularized(self, space: Space, r: State, shift: Numbers) -> tuple[State, Numbers]:
        s = float(shift[0, 0])
        signed = s if without_nan(space, self.matrix.diagonal()).sum() >= 0 else -s
        factors = factors_of_sparse(space, (self.matrix + signed * identity_like(self.matrix)).tocsc())
        return factors.solve(space, r), space.full(0.0)

    def judged(self, space: Space, gain: Numbers) -> tuple[Mask, Numbers]:
        finite = gain > -float("inf")
        return finite, space.select(finite, space.full(1.0), space.full(BACK))

    def size(self, space: Space) -> Numbers:
        data = without_nan(space, self.matrix.data)
        return space.full(float((data * data).sum()) ** 0.5 / math.sqrt(max(space.dimension, 1)))

    def first_shift(self, space: Space) -> Numbers:
        return FIRST_OF_SPARSE * self.size(space)

    def is_finite(self, space: Space) -> Mask:
        finite = bool(space.xp.all(space.xp.isfinite(self.matrix.data)))
        return space.all_samples() if finite else ~space.all_samples()


Jacobian = DenseJacobian | SparseJacobian


def first_jacobian(space: Space, operator: Operator | None) -> Jacobian:
    """The matrix of an operator that is given as a sparse one; else the identity."""
    if isinstance(operator, MatrixOperator) and is_sparse(operator.matrix):
        return SparseJacobian(operator.matrix)
    # The identity, and not zero, in samples that are finished before the first step.
    identity = space.matrices(space.dimension, space.dimension) + space.eye(space.dimension)[None, :, :]
    return DenseJacobian(identity, identity)


class Regularization(NamedTuple):
    """What the regularized steps of a sample depend on.

    Attributes
    ----------
    on
        Where steps are regularized, (N, 1).
    factor
        λ, (N, 1).
    predicted
        ‖A d - r‖, (N, 1).
    mark, waited
        The last residual that was at most half of the one before in this place, and the evaluations since, (N, 1).
    """

    on: Mask
    factor: Numbers
    predicted: Numbers
    mark: Numbers
    waited: Numbers


def off(space: Space) -> Regularization:
    """No regularization."""
    nothing = space.full(0.0)
    return Regularization(~space.all_samples(), nothing, nothing, nothing, nothing)


def gain(space: Space, memory: Regularization, before: Numbers, norm: Numbers) -> Numbers:
    """The fall of ‖r‖² in units of the predicted one; -∞ where the residual is not finite."""
    finite = norm < float("inf")
    fallen = 1 - ratio(space.select(finite, norm, before), before, space) ** 2
    fallen = ratio(fallen, 1 - ratio(memory.predicted, before, space) ** 2, space)
    return space.select(finite, fallen, space.full(-float("inf")))


def carried_on(
    space: Space, memory: Regularization, jacobian: Jacobian, norm: Numbers, kept: Mask, failed: Mask, change: Numbers
) -> Regularization:
    """The regularization of the next step.

    Parameters
    ----------
    space, memory
        The space of states, and the regularization of the last step.
    jacobian, norm
        A and ‖r‖ at the point that the next step starts from.
    kept, failed
        Where the last step was kept, and where a line search failed.
    change
        What λ is multiplied by.
    """
    begun = failed | (kept & (norm <= HALF * memory.mark))
    waited = space.select(begun, space.full(0.0), memory.waited + 1)
    factor = space.xp.maximum(memory.factor * change, ratio(space.eps * jacobian.size(space), norm, space))
    first = ratio(jacobian.first_shift(space), norm, space)
    return memory._replace(
        on=failed | (memory.on & (waited < WAIT)),
        factor=space.select(failed, first, space.select(memory.on, factor, memory.factor)),
        mark=space.select(begun, norm, memory.mark),
        waited=waited,
    )


def directed(
    space: Space, memory: Regularization, jacobian: Jacobian, r: State, direction: State, where: Mask
) -> tuple[State, Regularization]:
    """The regularized step from a point with the residual r, in the samples of ``where``, else ``direction``."""
    where = where & memory.on
    # Other samples are solved as well: with a shift that is not small beside their A.
    size = jacobian.size(space)
    shift = space.select(where, memory.factor * space.norm(r), space.select(size > 0, size, space.full(1.0)))

    def made(carry: tuple[State, Numbers, Mask], _: tuple[Known, ...]) -> tuple[State, Numbers, Mask]:
        step, predicted = jacobian.regularized(space, r, shift)
        return space.where(carry[2], step, carry[0]), space.select(carry[2], predicted, carry[1]), carry[2]

    start = (direction, memory.predicted, where)
    direction, predicted, _ = space.backend.while_loop(lambda carry: (carry[2],), made, start, 1)
    return direction, memory._replace(predicted=predicted)
