"""Where rounding errors of F, or of a root's g, are all that is left of a residual (Decisions 90 and 121).

A solver with products with the Jacobian can tell: such a residual is no larger than some ε |A| |x|.
"""

import random
from collections.abc import Callable
from typing import Any

from .arrays import Index, Mask, Numbers, Operator, State
from .backend import Known
from .carry import Best, Point, least_residual
from .progress import FAST, HALF, Progress, both, both_known, is_checkpoint
from .space import Space, signs

SIGNS, EXPLAINED, LARGEST_ROUNDING = 6, 4.0, 1e-3
"""How many products estimate the rounding errors of F, in which units they explain a residual, and the largest one, as
a fraction of ‖F(h)‖."""
FIRST_STEPS, LEFT = (2, 4), -1.0
"""The evaluations after which a start may turn out to be the root, and a floor that says that it was left."""
FIRST_ROUNDING, EVERY = 16, 8
"""The evaluations of the first look whether a residual is a rounding error, and between two looks of a solver with
``patience``; others look at checkpoints."""


def judged(
    space: Space,
    made: Progress,
    best: Best | None,
    point: Point,
    operator: Operator,
    tolerance: Callable[[Numbers], Numbers],
    *,
    of_root: bool,
    often: bool,
) -> tuple[Progress, Point]:
    """The same, where rounding errors explain the residual of a sample that does not fall: it is no longer active.

    ``operator`` is ``v -> (I - ∂F/∂h) v`` at the point, and ``tolerance`` a function of ‖F(x)‖. ``often`` asks for more
    looks than at the checkpoints.
    """
    norm, floor = point.norm, made.floor
    assert floor is not None
    evaluations = point.index + 1
    due = looks_at_rounding(evaluations, often=often)
    at_start: Known = is_early(evaluations) if of_root and best is not None else False
    if due is False and at_start is False:
        return made, point
    small = norm <= made.cap
    if not of_root:  # whose f_norm is the first residual, and may be small itself
        small = small & (norm <= LARGEST_ROUNDING * point.f_norm)
    least = least_residual(space, made, best, point)
    stalled = both((least > HALF * made.marked_least) & small, due)
    if at_start is not False:
        # A start at the root: the residual does not fall, and no state has run away.
        assert best is not None
        near = space.norm(space.sub(point.x, best.x)) <= space.coarsest_eps**0.5 * space.norm(best.x)
        floor = space.select(both(~near, at_start), space.full(LEFT), floor)
        stalled = stalled | both((floor >= 0) & (norm >= FAST * best.norm), at_start)
        made = made._replace(floor=floor)
    stalled = stalled & point.active
    some = space.xp.any(stalled)
    when: Known = bool(some) if space.backend.readable(norm) else some
    if when is False:
        return made, point
    rounding = stalled & is_rounding(space, point, operator, tolerance(point.f_norm), when, of_root=of_root)
    return made._replace(floor=space.select(rounding, norm, floor)), point._replace(active=point.active & ~rounding)


def is_early(evaluations: Index) -> Known:
    """Whether a step changes nothing because the start is the root."""
    early: Known = (evaluations >= FIRST_STEPS[0]) & (evaluations <= FIRST_STEPS[1])
    return early


def looks_at_rounding(evaluations: Index, *, often: bool) -> Known:
    """Whether it is asked after so many evaluations if a residual is a rounding error."""
    now: Known = evaluations % EVERY == 0 if often else is_checkpoint(evaluations)
    return both_known(now, evaluations >= FIRST_ROUNDING)


def is_rounding(
    space: Space, point: Point, operator: Operator, tolerance: Numbers, when: Known, *, of_root: bool
) -> Mask:
    """Where rounding errors of F explain F(x) - x, in all components but some that are within the tolerance.

    See Decision 90. They are some ε |A| |x| with A = I - ∂F/∂h, the operator, which products of A with x under random
    signs estimate, from below. In F(x) - x itself x and F(x) are rounded, besides; the residual of a root is g alone.
    Unless ``when`` holds, there are no products, and the result means nothing.
    """
    xp, rows, x = space.xp, signs(space, random.Random(0), SIGNS), point.x
    sizes = [0.0 if of_root else xp.abs(a) + xp.abs(b) for a, b in zip(x, point.f, strict=True)]

    def product(carry: tuple[Index, State]) -> tuple[Index, State]:
        i, largest = carry
        flipped = State(tuple(space.take(s, i, 0) * a for s, a in zip(rows, x, strict=True)))
        products = zip(largest, operator(flipped), strict=True)
        return i + 1, State(tuple(xp.maximum(a, xp.abs(b)) for a, b in products))

    start = space.shard(State(tuple(xp.zeros_like(a) for a in x)))
    count: Any = SIGNS if isinstance(when, bool) else xp.where(when, SIGNS, 0)
    largest = space.backend.repeat(product, (0, start), count)[1]
    beyond = State(
        tuple(
            xp.where(_explains(xp, a + b, r, EXPLAINED * float(space.backend.finfo(dtype).eps)), xp.zeros_like(r), r)
            for r, a, b, dtype in zip(point.residual, largest, sizes, space.dtypes, strict=True)
        )
    )
    explained: Mask = space.norm(beyond) <= tolerance
    return explained


def _explains(xp: Any, size: Any, r: Any, eps: float) -> Any:
    """Whether a rounding error of numbers of this size may be r; never of products that are not finite."""
    return (xp.abs(r) <= eps * size) & (size < float("inf"))
