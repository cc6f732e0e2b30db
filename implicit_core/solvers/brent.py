"""Brent's method."""

from dataclasses import dataclass

from ..arrays import Numbers
from ..linear_solvers.base import ratio
from ..space import Space
from .bracketing import Bracketing, Memory, spacing


@dataclass(frozen=True, repr=False)
class Brent(Bracketing):
    """Brent's method for one unknown a sample, whose root lies between ``lower`` and ``upper``.

    It interpolates g through the last two or three points, and bisects where that is no good. Signs of g differ at the
    ends of the bracket at all times. Any width of the bracket is reached at most ten evaluations later than by
    bisection; where Brent's own rules would let it lag more, it bisects. For scalar equations that are independent,
    pass ``batch_ndim=x0.ndim``, so that each number is a sample with its own bracket, steps and status.

    The first three evaluations are at x0, ``lower`` and ``upper``. x0 is a guess: it sets what ``rtol`` refers to, is a
    root at one evaluation if it is one, and the first point within the bracket if it lies there.

    A sample ends with the status

    - ``CONVERGED`` where ``|g|`` is within the tolerance. Or there is no float between two points where g has different
      signs, and ``|g|`` has fallen with the bracket: the root is as accurate as the dtype allows, and
      ``stats.tolerance`` is its ``|g|``, if that is above the tolerance. In half precision, whose brackets hold too few
      floats, a small jump may pass for a root.
    - ``UNBRACKETED`` if g has the same sign at ``lower`` and ``upper``. The best of the three points is returned.
    - ``STAGNATED`` if no float is left in the bracket, and ``|g|`` has not fallen with it: g jumps there, or has a
      pole. Near zero floats do not run out, and the steps do.
    - ``NONFINITE`` if g is NaN somewhere, or infinite at x0. Elsewhere an infinite g has a sign as other numbers.

    Parameters
    ----------
    lower, upper
        The ends of the brackets, in any order: finite numbers, or arrays that broadcast to x0. Like all settings they
        have no derivatives; a root has none in them.
    rtol, atol, max_steps, check_every, patience, freeze, stop, check
        As for :class:`Solver`. With ``rtol=0`` and no ``atol`` every sample goes on until there is no float left.

    Raises
    ------
    TypeError, ValueError
        If a setting is of a wrong kind or out of range, or x0 has more than one unknown a sample.

    References
    ----------
    R. P. Brent, Algorithms for Minimization without Derivatives (1973), chapter 4, procedure ``zero``.

    Examples
    --------
    >>> import numpy as np
    >>> import implicit_core as ic
    >>> z = np.array([2.0, 9.0, -1.0])
    >>> solution = ic.root(lambda x, z: x**2 - z, np.ones(3), z, solver=ic.Brent(0.0, z + 5), batch_ndim=1)
    >>> solution.value[:2].round(4), ic.Status(int(solution.status[2])).name
    (array([1.4142, 3.    ]), 'UNBRACKETED')
    """

    def proposed(self, space: Space, memory: Memory) -> Numbers:
        xp, select, m = space.xp, space.select, memory
        half = m.middle - m.b
        # Through a, b and c; the secant where a is c.
        s, r, t = ratio(m.at_b, m.at_a, space), ratio(m.at_b, m.at_c, space), ratio(m.at_a, m.at_c, space)
        secant = m.a == m.c
        p = select(secant, 2 * half * s, s * (2 * half * t * (t - r) - (m.b - m.a) * (r - 1)))
        q = select(secant, 1 - s, (t - 1) * (r - 1) * (s - 1))
        p, q = xp.abs(p), select(p > 0, -q, q)
        least = spacing(space, xp.abs(m.b))
        # Not close to c, and less than half of the move before the last one. An infinite g is no number to divide by.
        short = 2 * p < xp.minimum(3 * half * q - xp.abs(least * q), xp.abs(m.before * q))
        falls = (xp.abs(m.at_a) > xp.abs(m.at_b)) & (xp.maximum(xp.abs(m.at_a), xp.abs(m.at_c)) < float("inf"))
        return select(short & falls & (xp.abs(m.before) >= least), ratio(p, q, space), half)
