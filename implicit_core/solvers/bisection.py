"""Bisection."""

from dataclasses import dataclass

from ..space import Space
from .bracketing import Bracketing, Memory


@dataclass(frozen=True, repr=False)
class Bisection(Bracketing):
    """Bisection: each evaluation halves the bracket. For one unknown a sample; all samples have brackets of their own.

    Sure, and slow: :class:`Brent` has the same guarantee, and needs far fewer evaluations where g is smooth. See there
    for what becomes of samples whose bracket holds no root.

    Parameters
    ----------
    lower, upper
        The ends of the brackets, as for :class:`Brent`.
    rtol, atol, max_steps, check_every, patience, freeze, stop, check
        As for :class:`Brent`.

    Raises
    ------
    TypeError, ValueError
        If a setting is of a wrong kind or out of range, or x0 has more than one unknown a sample.

    Examples
    --------
    >>> import numpy as np
    >>> import implicit_core as ic
    >>> z = np.array([2.0, 9.0])
    >>> solution = ic.root(lambda x, z: x**2 - z, z, z, solver=ic.Bisection(0.0, 10.0), batch_ndim=1)
    >>> solution.value.round(4)
    array([1.4142, 3.    ])
    """

    def proposed(self, space: Space, memory: Memory) -> None:
        return None
