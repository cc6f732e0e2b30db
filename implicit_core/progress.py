"""When a sample may count as converged, and when it never will: what the loop knows beside its tolerance.

A tolerance that is relative to ‖F(h)‖ is met by any residual once the state is large enough. So a converged sample's
residual also fell, to a fraction of the first one (Decision 69). A sample that makes no progress is ended early, at one
of a few checkpoints (Decision 70).
"""

from typing import Any, NamedTuple

from . import settings
from .arrays import Index, Mask, Numbers, Real
from .backend import Known
from .space import Space

NEAR = 10.0
"""A start within this many tolerances is near its fixed point, and needs the tolerance alone."""
NEAR_LIMIT = 2.0
"""In units of the tolerance at the start: the largest residual that may count as converged then."""
FALLEN = 0.1, 0.5
"""The least and the largest fraction of the first residual that a converged one may be; between, ten times rtol."""
GROWTH = 1e8
"""A sample has diverged once its residual is this much larger than the first one and the first F(h) together."""
ROUNDING = 8
"""The least relative tolerance, in units of the machine precision of the coarsest leaf."""
RESOLVED = 4
"""The rounding of F(h) that a residual is not told from, in units of ε ‖F(h)‖."""
HALF = 0.5
"""A residual that did not fall to this fraction since the last checkpoint may be a rounding error; ``patience`` waits
for one that did."""
FIRST_CHECK, FIRST_FAR, FIRST_FLAT, FIRST_ANY = 4, 32, 64, 256
"""The evaluations of the first checkpoint, where a sample that diverged is ended; and of the first that end a state
that ran away, a residual that neither falls nor grows, and any that does not fall."""
FALL = 0.99
"""A residual has fallen between two checkpoints if it is below this fraction, or falls steadily."""
FLAT = 0.9
"""A residual falls between two checkpoints if it ends below this fraction, and is flat if it neither falls nor rises so
much."""
FAST = 0.1
"""A sample whose residual is below this fraction of the one at the last checkpoint goes on, however many evaluations
there were."""


class Start(NamedTuple):
    """What the first evaluation says.

    Attributes
    ----------
    cap
        The largest residual that may count as converged, (N, 1).
    norm, f_norm
        The first residual and the first F(h), (N, 1).
    scale
        A size of states that is never large, whatever the start: atol / rtol, a number or (N, 1).
    """

    cap: Numbers
    norm: Numbers
    f_norm: Numbers
    scale: Any

    def limit(self) -> Numbers:
        """The residual beyond which a sample has diverged."""
        limit: Numbers = GROWTH * (self.norm + self.f_norm + self.scale)
        return limit


class Progress(NamedTuple):
    """What the loop carries.

    Attributes
    ----------
    cap
        As in :class:`Start`.
    atol
        The solver's, (N, 1). In samples that were ended early it is the largest number, and so is the cap: no residual
        exceeds their threshold.
    least
        The least residual so far; None where the loop keeps it beside the best point.
    marked_least, marked
        The least and the last residual at the last checkpoint.
    floor
        A residual that rounding errors of F explain; None where the solver has no Jacobian.
    halved, halved_at
        The last residual that was at most half of the one before in this place, and the evaluations until then; None
        without ``patience``.
    failures
        After how many steps in a row F was not finite; None for a solver that does not undo steps.
    """

    cap: Numbers
    atol: Numbers
    least: Numbers | None
    marked_least: Numbers
    marked: Numbers
    floor: Numbers | None = None
    halved: Numbers | None = None
    halved_at: Numbers | None = None
    failures: Numbers | None = None


def reachable(space: Space, rtol: Real) -> Real:
    """A relative tolerance, not below rounding, where it would only be met by chance; zero stays zero (Decision 71)."""
    raised = settings.at_least(space, rtol, ROUNDING * space.coarsest_eps)
    return settings.zero_where_zero(space, rtol, raised)


def largest_converged(space: Space, first: Any, tolerance: Any, rtol: Real) -> Any:
    """The largest residual that may count as converged.

    Parameters
    ----------
    space
        The space of the samples.
    first, tolerance
        The first residual of each sample, and the tolerance there.
    rtol
        The relative tolerance.
    """
    low, high = FALLEN
    # Near a fixed point the tolerance is all that is asked for, but as it was there: a state that runs away raises it.
    return space.xp.maximum(settings.within(space, NEAR * rtol, low, high) * first, NEAR_LIMIT * tolerance)


def is_hidden(space: Space, cap: Numbers, f_norm: Numbers) -> Mask:
    """Where the rounding of F(h) hides any residual that may count as converged.

    Where a state of 1e16 moves by 1, F(h) - h is zero: the residual has not fallen.
    """
    hidden: Mask = RESOLVED * space.coarsest_eps * f_norm > cap
    return hidden


def relative(space: Space, norm: Numbers, f_norm: Numbers) -> Numbers:
    """A residual as a fraction of ‖F(h)‖; zero where both are."""
    tiny = float(space.backend.finfo(space.dtype).smallest_normal)
    return norm / (f_norm + tiny)


def is_checkpoint(evaluations: Index) -> Known:
    """Whether a sample's progress is looked at after so many evaluations: 4, 8, 16, ..."""
    power: Known = (evaluations & (evaluations - 1)) == 0
    at: Known = power & (evaluations >= FIRST_CHECK)
    return at


def both(mask: Mask, known: Known) -> Mask:
    """``mask & known``, which not every program can record if ``known`` is True or False."""
    if known is True:
        return mask
    result: Any = mask & known if known is not False else mask != mask
    return result  # type: ignore[no-any-return]  # booleans are a mask


def both_known(a: Known, b: Known) -> Known:
    """``a & b``, where each may be known."""
    if isinstance(a, bool):
        return b if a else False
    return both(a, b)


def halved(progress: Progress, space: Space, evaluations: Index, norm: Numbers) -> Progress:
    """The progress after an evaluation of a solver with ``patience``."""
    assert progress.halved is not None
    assert progress.halved_at is not None
    fell = norm <= HALF * progress.halved
    now = space.full(0, space.xp.int32) + evaluations
    return progress._replace(
        halved=space.select(fell, norm, progress.halved), halved_at=space.select(fell, now, progress.halved_at)
    )


def without_progress(
    progress: Progress,
    limit: Numbers | float,
    evaluations: Index,
    norm: Numbers,
    least: Numbers,
    tolerance: Numbers,
    accepted: Known,
) -> Mask:
    """The samples that end at a checkpoint.

    The residual went beyond the limit. Or the second half of all evaluations brought no smaller one, and either there
    were many evaluations and it is not falling fast, or it is not falling, and the tolerance was met by the growth of
    the state alone or the residual is as large as it was half of the way. Where the solver is on its way back, as
    ``accepted`` denies, a residual that does not fall says nothing.
    """
    # Tiny falls of an erratic residual are none; a steady one, at its least now, may be slow.
    stuck = (least >= progress.marked_least) | ((least > FALL * progress.marked_least) & (FALL * norm > least))
    ran_away = both(norm <= tolerance, evaluations >= FIRST_FAR)
    flat = both(FLAT * norm < progress.marked, evaluations >= FIRST_FLAT)
    # What rose by a transient and falls again may be above its least for long.
    still = (ran_away | flat) & (norm > FLAT * progress.marked)
    late = both(norm > FAST * progress.marked, evaluations >= FIRST_ANY)
    ended: Mask = (norm > limit) | both(stuck & (still | late), accepted)
    return ended
