"""What finished samples show: their points are kept, so their residuals are the same, whatever the others do.

Where one changed, F couples samples, or is no function of its arguments.
"""

from .arrays import Mask, Numbers
from .carry import Point
from .solution import CoupledSamplesError
from .system import System
from .warnings_ import warn

MOVED = 64
"""A change of a finished sample's residual that rounding may cause, in units of ε ‖F(x)‖."""
COUPLED = (
    "{symbol} couples what batch_ndim takes for samples: the residual of a finished sample changed while others took "
    "steps. For one coupled system pass batch_ndim=0; to go on with a stop test for each part, give the solver "
    "check=False"
)
CHANGES = (
    "{symbol} gave another value at the same point when it was evaluated again: it is random, or changes what it "
    "depends on, so it has no {solution}. In PyTorch, dropout and batch norm do so in train mode: use "
    "VariationalDropout, and group or layer norm"
)


class ChangingFunctionWarning(RuntimeWarning):
    """F gave two values at one point, so a solve, its statuses and its gradient mean little.

    Examples
    --------
    >>> import warnings
    >>> import implicit_core as ic
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("ignore", ic.ChangingFunctionWarning)  # switches it off
    """


def check(system: System, point: Point, settled: Numbers) -> None:
    """Look whether a residual of a finished sample rose above ``settled``, the one that it had.

    Raises
    ------
    CoupledSamplesError
        If F couples samples. Where it gives two values at one point, there is a warning.
    """
    space = system.space
    if not bool(space.xp.any(moved(system, point, settled))):
        return
    h = space.unpack(space.copy(point.x))
    f, again = (system.evaluate(point.x, h, copies=True).residual for _ in range(2))
    names = system.problem.names
    apart = space.norm(space.sub(f, again)) > MOVED * space.coarsest_eps * _rounded_size(system, point)
    if bool(space.xp.any(apart)):
        changes = CHANGES.format(symbol=names.symbol, solution=names.solution)
        warn(changes, ChangingFunctionWarning, once=True)
    else:
        raise CoupledSamplesError(COUPLED.format(symbol=names.symbol))


def moved(system: System, point: Point, settled: Numbers) -> Mask:
    """The samples whose residual rose above ``settled`` by more than rounding can explain."""
    rounding = MOVED * system.space.coarsest_eps * _rounded_size(system, point)
    rose: Mask = point.norm - settled > rounding
    return rose


def _rounded_size(system: System, point: Point) -> Numbers:
    """The size of numbers whose rounding errors are in a residual."""
    # Of a root the residual at the start may be far smaller.
    return point.f_norm + system.space.norm(point.x) if system.is_root else point.f_norm
