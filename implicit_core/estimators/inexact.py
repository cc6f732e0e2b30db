"""Samples whose gradient did not reach the requested accuracy, or has an invalid cotangent."""

import math

from ..arrays import Array, Numbers, State
from ..solution import SolveError, Status, describe, find_failures
from ..space import Space
from ..warnings_ import warn


class InexactGradientWarning(RuntimeWarning):
    """A gradient did not reach the requested accuracy in the samples that the warning names."""


def report(space: Space, what: str, advice: str, status: Numbers, residual: Numbers, *, throw: bool = False) -> None:
    """Name the samples whose linear solve failed, as soon as their statuses can be read.

    A right-hand side that is not finite (``NONFINITE``) is not a failure, see :func:`nan_where_invalid`.

    Parameters
    ----------
    space
        The space of the samples.
    what
        What failed, a sentence without its end.
    advice
        What to do about it.
    status, residual
        (N, 1).
    throw
        Raise :class:`~implicit_core.SolveError` instead of warning.
    """

    def warn_or_raise(status: Array, residual: Array) -> None:
        failures = find_failures(status, residual)
        if not failures:
            return
        message = f"{what}: {describe(failures, math.prod(status.shape))}. {advice}"
        if throw:
            raise SolveError(message, failures)
        warn(message, InexactGradientWarning)

    status = space.select(status == Status.NONFINITE.value, Status.CONVERGED.value, status)
    found = space.per_sample(status), space.per_sample(residual)
    backend = space.backend
    if backend.readable(status):
        warn_or_raise(*found)
    elif backend.tracing is not None:
        backend.tracing.callback(warn_or_raise, *found)


def nan_where_invalid(space: Space, status: Numbers, x: State) -> State:
    """``x``, NaN in the samples whose right-hand side was not finite.

    Such a system has no solution, so it has not failed. NaN propagates as through any other operation: a gradient
    scaler, which overflows on purpose, finds it and skips the step.
    """
    # Decision 30.
    invalid = status == Status.NONFINITE.value
    return State(tuple(space.filled(a, invalid, math.nan) for a in x))
