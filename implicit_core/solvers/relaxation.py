"""When a step is undone, and how long a plain step x + β r is for a root, whose residual has units of its own."""

from ..arrays import Numbers, State
from ..carry import Point
from ..linear_solvers.base import ratio
from ..space import Space

SHARES = 1e-3, 0.5
"""The least and the largest length of the first step, as a share of ‖x‖ or of 1, whichever is larger."""
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
    """β at the start: 1, as for a g that is well scaled, unless the step is tiny or long beside x."""
    one: Numbers = space.full(1.0)
    size = ratio(space.xp.maximum(space.norm(point.x), one), point.norm, space)
    least, largest = (share * size for share in SHARES)
    return space.select(point.norm > 0, space.xp.minimum(space.xp.maximum(one, least), largest), one)


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
