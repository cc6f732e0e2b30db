"""When a step is undone, and how long a plain step x + β r is for a root, whose residual has units of its own."""

from ..arrays import Numbers, State
from ..carry import Point
from ..linear_solvers.base import ratio
from ..space import Space

SHARE = 0.5
"""The first step, as a share of ‖x‖ or of 1, whichever is larger."""
ROUNDING = 64.0
"""In units of ε ‖F(x)‖: residuals below this may grow by any factor."""
SHORTER = 0.1
"""β becomes this much shorter where F was not finite after a step."""


def largest_after(space: Space, point: Point, growth: float) -> Numbers:
    """The residual above which the step from a point is undone: ``growth`` times as large as there, and no rounding."""
    return space.multiply_add(ROUNDING * space.coarsest_eps, point.f_norm, growth * point.norm)


def any_residual(space: Space) -> Numbers:
    """A limit that no finite residual exceeds, unless its square is out of range."""
    return space.full(float(space.backend.finfo(space.dtype).max) / 4)


def fall(space: Space, residual: State, point: Point) -> State:
    """By how much the residual fell to a point; zero where it is not finite there."""
    return space.sub(residual, space.where(point.norm < float("inf"), point.residual, residual))


def first_relaxation(space: Space, point: Point) -> Numbers:
    """β at the start, with which the step is half as long as x, or as 1."""
    one: Numbers = space.full(1.0)
    length = SHARE * space.xp.maximum(space.norm(point.x), one)
    return space.select(point.norm > 0, length / space.select(point.norm > 0, point.norm, one), one)


def next_relaxation(space: Space, before: Numbers, step: State, change: State, norm: Numbers) -> Numbers:
    """β after a step that was undone.

    It is the secant's, ⟨s, y⟩ / ⟨y, y⟩ (J. Barzilai and J. M. Borwein, Two-point step size gradient methods, IMA J.
    Numer. Anal. 8 (1988)), which also finds its sign.

    Parameters
    ----------
    space
        The space of x.
    before
        β of the step, (N, 1).
    step, change
        s, and y, by how much the residual fell.
    norm
        The residual norm after it, (N, 1).
    """
    secant = ratio(space.dot(step, change), space.dot(change, change), space)
    usable = (secant != 0) & (space.xp.abs(secant) < float("inf")) & (secant != before)
    finite = norm < float("inf")
    return space.select(finite, space.select(usable, secant, -before), SHORTER * before)
