"""What becomes of samples whose gradient did not reach the accuracy that was asked for."""

import math
import warnings

from ..backend import Array
from ..solution import Failure, SolveError, describe, find_failures
from ..space import Space


class InexactGradientWarning(RuntimeWarning):
    """A gradient did not reach the accuracy that was asked for, in the samples it names."""


def report(space: Space, what: str, advice: str, status: Array, residual: Array, *, throw: bool = False) -> None:
    """Name the samples that failed, as soon as their statuses can be read.

    Parameters
    ----------
    space
        That of the samples.
    what
        What failed, a sentence without its end.
    advice
        What to do about it.
    status, residual
        (N, 1).
    throw
        Raise :class:`~implicit_core.SolveError` instead of warning.
    """

    def tell(status: Array, residual: Array) -> None:
        failures: tuple[Failure, ...] = find_failures(status, residual)
        if not failures:
            return
        message = f"{what}: {describe(failures, math.prod(status.shape))}. {advice}"
        if throw:
            raise SolveError(message, failures)
        warnings.warn(message, InexactGradientWarning, stacklevel=5)

    outcome = space.per_sample(status), space.per_sample(residual)
    if space.backend.readable(status):
        tell(*outcome)
    else:
        space.backend.call_later(tell, *outcome)
