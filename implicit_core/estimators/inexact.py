"""Samples whose gradient did not reach the requested accuracy, or has an invalid cotangent."""

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

from ..arrays import Array, Mask, Numbers, State
from ..solution import SolveError, Status, describe, find_failures
from ..space import Space
from ..warnings_ import warn


class InexactGradientWarning(RuntimeWarning):
    """A gradient did not reach the requested accuracy in the samples that the warning names."""


OnFailure = Literal["raise", "warn", "nan", "ignore"]
"""What to do with the samples whose linear solve failed."""


def check_on_failure(value: object) -> None:
    """``value`` is one of the four."""
    if value not in get_args(OnFailure):
        raise ValueError(f"on_failure must be 'raise', 'warn', 'nan' or 'ignore', got {value!r}")


def reported(space: Space, w: State, relative: Numbers, report: Callable[[Any], None] | None) -> State:
    """``w``, after ``report`` was called with the relative residual of each sample, an array of the batch's shape.

    In a program that is traced it is called when the program runs, and not at all if that cannot call back.
    """
    if report is None:
        return w
    backend, numbers = space.backend, space.per_sample(relative)
    if backend.readable(numbers):
        report(numbers)
    elif backend.tracing is not None:
        return State(backend.tracing.told(tuple(w), tuple(w), report, numbers))
    return w


def settled(
    space: Space, w: State, status: Numbers, residual: Numbers, on_failure: OnFailure, what: str, advice: str
) -> State:
    """``w``, after what ``on_failure`` asks for in the samples whose linear solve failed.

    Where statuses cannot be read nothing can be raised, so ``"raise"`` is ``"nan"``. ``"warn"`` warns when the program
    runs, if it can call back; a program that is exported cannot, and there it is ``"nan"`` as well.

    Parameters
    ----------
    space
        The space of w.
    w
        The solution, or the last iterate.
    status, residual
        (N, 1).
    on_failure
        The setting.
    what
        What failed, a sentence without its end.
    advice
        What to do about it.
    """
    backend = space.backend

    def nan_where(mask: Mask) -> State:
        return State(tuple(space.filled(a, mask, math.nan) for a in w))

    # Such a system has no solution, so it has not failed. NaN propagates as through any other operation: a gradient
    # scaler, which overflows on purpose, finds it and skips the step. Decision 30.
    invalid = status == Status.NONFINITE.value
    w = nan_where(invalid)
    if on_failure == "ignore":
        return w
    failed = ~invalid & (status != Status.CONVERGED.value)
    readable = backend.readable(status)
    if on_failure == "nan" or (on_failure == "raise" and not readable):
        return nan_where(failed)

    def warn_or_raise(status: Array, residual: Array) -> None:
        failures = find_failures(status, residual)
        if not failures:
            return
        message = f"{what}: {describe(failures, math.prod(status.shape))}. {advice}"
        if on_failure == "raise":
            raise SolveError(message, failures)
        warn(message, InexactGradientWarning)

    status = space.select(invalid, Status.CONVERGED.value, status)
    found = space.per_sample(status), space.per_sample(residual)
    if readable:
        warn_or_raise(*found)
    elif backend.tracing is not None:
        return State(backend.tracing.told(tuple(w), tuple(nan_where(failed)), warn_or_raise, *found))
    return w
