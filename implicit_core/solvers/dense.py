"""The Jacobian of a small system as a matrix, made of one product for each unknown."""

import math
from collections.abc import Callable
from typing import Any

from ..arrays import Index, Mask, Matrices, Operator, Row, State
from ..backend import Known
from ..space import Space, head

MOST_UNKNOWNS = 64
"""The largest state of a sample that is small."""
MOST_NUMBERS = 1 << 24
"""The largest number of entries in the matrices of all samples."""


def is_small(space: Space) -> bool:
    """Whether matrices of this size are made without being asked for."""
    return space.dimension <= MOST_UNKNOWNS and space.samples * space.dimension**2 <= MOST_NUMBERS


def transposed_matrix(space: Space, operator: Operator) -> Matrices:
    """The transpose of an operator's matrix, (N, n, n), by n products."""
    n = space.dimension
    rows = _parts(space, space.eye(n)[None, :, :])

    def column(carry: tuple[Index, Matrices]) -> tuple[Index, Matrices]:
        i, matrix = carry
        unit = State(tuple(space.take(a, i, 1)[:, 0, :] + zero for a, zero in zip(rows, space.zeros(), strict=True)))
        return i + 1, space.set_matrix_row(matrix, i, joined(space, operator(unit)))

    matrix: Matrices = space.backend.repeat(column, (0, space.matrices(n, n)), n)[1]
    return matrix


def safely(space: Space, function: Callable[..., Any], matrices: Matrices, *others: Matrices) -> Matrices:
    """A function of matrices, NaN for those that are singular, where a library raises an error if one of them is."""
    try:
        made: Matrices = function(matrices, *others)
    except Exception as error:
        if not type(error).__name__.endswith("LinAlgError"):  # as every library that raises one calls it
            raise
        xp: Any = space.xp
        singular = (xp.linalg.slogdet(matrices)[0] == 0)[:, None, None]
        found = function(xp.where(singular, space.eye(matrices.shape[-1])[None, :, :], matrices), *others)
        made = xp.where(singular, xp.full_like(found, math.nan), found)
    return made


def renewed(space: Space, make: Callable[[], Matrices], before: Matrices, where: Mask) -> Matrices:
    """The inverses that are made in the samples of ``where``, else ``before``; they are not made if there are none."""

    def renew(carry: tuple[Matrices, Mask], masks: tuple[Known, ...]) -> tuple[Matrices, Mask]:
        inverses = make()
        if masks[0] is not True:
            inverses = space.xp.where(carry[1][:, :, None], inverses, carry[0])
        return inverses, carry[1]

    inverses: Matrices = space.backend.while_loop(lambda carry: (carry[1],), renew, (before, where), 1)[0]
    return inverses


def multiply(space: Space, matrix: Matrices, x: State) -> State:
    """The state x, as a row, times a matrix."""
    return split(space, space.matmul(joined(space, x), matrix))


def joined(space: Space, x: State) -> Matrices:
    """A state as one row, (N, 1, n)."""
    flat = x[0] if len(x) == 1 else space.xp.concat(list(x), axis=1)
    row: Matrices = flat[:, None, :]
    return row


def split(space: Space, row: Matrices) -> State:
    """The inverse of :func:`joined`."""
    return space.state(_parts(space, row))


def _parts(space: Space, row: Any) -> Row:
    """A row (..., n) as a row of each leaf."""
    parts, start = [], 0
    for _, d in space.flat_shapes:
        parts.append(row if d == row.shape[2] else head(row[:, :, start:], 2, d))
        start += d
    return Row(tuple(parts))
