"""Units in which the rows of a Jacobian are as long as its columns, for what does not depend on units."""

import math
import random

from ..arrays import Array, State
from ..space import Space, signs
from .operators import Pair

ROUNDS = 8
"""Each halves, at least, by how many powers of two a unit is wrong."""
SPREAD = 7.0
"""In powers of two. Units that differ less are left alone: random signs make estimates of that spread."""


def balance(pair: Pair, space: Space, *, rounds: int, seed: int) -> State:
    r"""Units d, as a state: the elements J_ij d_j / d_i of the Jacobian J of h / d have rows as long as columns.

    Eigenvalues, and the solution of a linear system, do not depend on units, but Krylov spaces and tolerances do: in
    units of 1e4 for one number and 1e-4 for another, rounding errors of the large ones hide the small ones. With z of
    random signs, :math:`|(J z)_i|` estimates the length of a row, and :math:`|(J^T z)_i|` that of a column. Each round
    multiplies d_i by the fourth root of their ratio; the square root would turn the two numbers of ``[[0, a], [b, 0]]``
    into each other for ever.

    It costs 2 products for each of ``rounds``, at most 8 of them. Units are 1 in a sample in which they would differ by
    less than a factor of 2⁷.

    Parameters
    ----------
    pair
        ∂F/∂h in the units of ``space``, from cotangents, and its transpose.
    space
        The space of h, sample by sample.
    rounds, seed
        The most rounds, and the seed of the random signs.

    References
    ----------
    T.-Y. Chen and J. W. Demmel, Balancing sparse matrices for computing eigenvalues, Linear Algebra Appl. 309 (2000).
    """
    # Decision 86.
    xp, draw = space.xp, random.Random(seed)
    limit = min(math.log2(float(space.backend.finfo(dtype).max)) for dtype in space.dtypes) / 4
    exponents = space.zeros()
    for _ in range(min(rounds, ROUNDS)):
        z = signs(space, draw)
        d = State(tuple(2.0**e for e in exponents))
        rows = [a / unit for a, unit in zip(pair.transposed(_times(z, d)), d, strict=True)]
        columns = [a * unit for a, unit in zip(pair.product(_over(z, d)), d, strict=True)]
        exponents = State(
            tuple(
                _limited(space, e + _quarter(space, r, c), limit)
                for e, r, c in zip(exponents, rows, columns, strict=True)
            )
        )
    high, low = (
        xp.max(xp.concat([sign * e for e in exponents if e.shape[-1]], axis=1), axis=1, keepdims=True)
        for sign in (1, -1)
    )
    needed = high + low > SPREAD
    return State(tuple(2.0 ** xp.where(needed, xp.round(e), xp.zeros_like(e)) for e in exponents))


def _quarter(space: Space, row: Array, column: Array) -> Array:
    """A quarter of the binary logarithm of the ratio of a row's length to a column's; 0 where one is not known."""
    xp = space.xp
    row, column = xp.abs(row), xp.abs(column)
    known = (row > 0) & (column > 0) & xp.isfinite(row) & xp.isfinite(column)
    one = xp.ones_like(row)
    return (xp.log2(xp.where(known, row, one)) - xp.log2(xp.where(known, column, one))) / 4


def _limited(space: Space, exponents: Array, limit: float) -> Array:
    xp = space.xp
    low, high = (xp.full_like(exponents, number) for number in (-limit, limit))
    return xp.minimum(xp.maximum(exponents, low), high)


def _times(x: State, units: State) -> State:
    return State(tuple(a * unit for a, unit in zip(x, units, strict=True)))


def _over(x: State, units: State) -> State:
    return State(tuple(a / unit for a, unit in zip(x, units, strict=True)))
