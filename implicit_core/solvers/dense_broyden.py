"""Broyden's method for a root in few unknowns, whose inverse Jacobian is a matrix."""

from typing import NamedTuple

from ..arrays import Mask, Matrices, Numbers, Operator, State
from ..carry import Point
from ..linear_solvers.base import ratio
from ..space import Space
from . import dense
from .jacobian import inverse_transposed, transposed_of
from .relaxation import any_residual, fall, first_relaxation, next_relaxation

GROWTH = 4.0
"""A step is undone if the residual after it is more than this much larger than before."""
SLOW = 0.9
"""A Jacobian is made anew where a step left more than this share of the residual."""
SHORTER, SHORTEST = 0.1, 0.5
"""The least and the largest share that is left of a step that was undone."""
LEAST = 0.1
"""The least share of a step without a Jacobian that is tried, and the least determinant of an update."""


class Memory(NamedTuple):
    """The current step.

    Attributes
    ----------
    x, residual, norm
        Where it starts, and the residual there.
    direction, fraction
        The whole step, and how much of it is tried, (N, 1).
    inverse
        The inverse Jacobian, transposed, (N, n, n).
    relaxation
        The number that it started from, where it did not start from a Jacobian, (N, 1).
    fresh
        Where it is as it started, (N, 1).
    returning
        Where the next point is x again, to make a Jacobian there, (N, 1).
    """

    x: State
    residual: State
    norm: Numbers
    direction: State
    fraction: Numbers
    inverse: Matrices
    relaxation: Numbers
    fresh: Mask
    returning: Mask


def init(space: Space, x: State) -> Memory:
    """The memory before the start is evaluated."""
    n, zeros, everywhere = space.dimension, space.zeros(), space.all_samples()
    one = space.full(1.0)
    return Memory(x, zeros, any_residual(space), zeros, one, space.matrices(n, n), one, everywhere, everywhere)


def observe(space: Space, memory: Memory, point: Point, operator: Operator | None) -> Memory:
    """The memory after a point was evaluated: it is kept, or the step is undone and shortened, or begun anew."""
    finite = point.norm < float("inf")
    kept = finite & (memory.returning | (point.norm <= GROWTH * memory.norm)) & point.active
    step = space.scale(memory.fraction, memory.direction)
    change = fall(space, memory.residual, point)
    inverse = _updated(space, memory.inverse, step, change, kept & ~memory.returning)
    share = ratio(memory.norm * memory.norm, memory.norm * memory.norm + point.norm * point.norm, space)
    share = space.select(finite, space.xp.clip(share, SHORTER, SHORTEST), space.full(SHORTER))
    shorter = memory.fraction * share
    relaxation, begun = memory.relaxation, kept
    if operator is None:
        anew = ~kept & (shorter < LEAST)
        relaxation = space.select(anew, next_relaxation(space, relaxation, step, change, point.norm), relaxation)
        first = memory.returning
        relaxation = space.select(first, first_relaxation(space, point), relaxation)
        anew = anew | first
        identity = relaxation[:, :, None] * space.eye(space.dimension)[None, :, :]
        inverse = space.xp.where(anew[:, :, None], identity, inverse)
        begun, fresh, returning = kept | anew, anew, ~space.all_samples()
    else:
        slow = ~memory.fresh & (point.norm > SLOW * memory.norm)
        fresh = kept & (memory.returning | slow | (memory.fraction < 1))
        returning = ~kept & ~memory.fresh
        inverse = dense.renewed(
            space, lambda: inverse_transposed(space, transposed_of(space, operator, fresh)), inverse, fresh
        )
        fresh = fresh | (memory.fresh & ~kept)
    residual = space.where(kept, point.residual, memory.residual)
    direction = space.where(begun, dense.multiply(space, inverse, residual), memory.direction)
    fraction = space.select(begun, space.full(1.0), space.select(returning, space.full(0.0), shorter))
    return Memory(
        space.where(kept, point.x, memory.x),
        residual,
        space.select(kept, point.norm, memory.norm),
        direction,
        fraction,
        inverse,
        relaxation,
        fresh,
        returning,
    )


def _updated(space: Space, inverse: Matrices, step: State, change: State, where: Mask) -> Matrices:
    """The inverse of the Jacobian that maps a step to the change of the residual, and is else as it was.

    Where that would be nearly singular, only a part of the change is used (J. J. Moré and J. A. Trangenstein, On the
    global convergence of Broyden's method, Math. Comp. 30 (1976)).
    """
    xp, one = space.xp, space.full(1.0)
    mapped = dense.multiply(space, inverse, change)
    squared = space.dot(step, step)
    share = ratio(space.dot(step, mapped), squared, space)
    sign = space.select(share < 0, -one, one)
    part = space.select(xp.abs(share) < LEAST, ratio(one - LEAST * sign, one - share, space), one)
    mapped = space.axpy(part, mapped, space.scale(one - part, step))
    determinant = space.dot(step, mapped)
    usable = where & (determinant != 0) & (xp.abs(determinant) < float("inf"))
    error = space.divide(space.sub(step, mapped), space.select(usable, determinant, one))
    # H + (s - H y) (sᵀ H) / (sᵀ H y), transposed.
    mapped_step = space.matmul(dense.joined(space, step), xp.matrix_transpose(inverse))
    update = xp.matrix_transpose(mapped_step) * dense.joined(space, error)
    updated: Matrices = xp.where(usable[:, :, None], inverse + update, inverse)
    return updated


def step(space: Space, memory: Memory) -> tuple[State, Memory]:
    """The next point."""
    return space.axpy(memory.fraction, memory.direction, memory.x), memory
