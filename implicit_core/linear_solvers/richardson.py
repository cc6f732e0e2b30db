"""Richardson iteration."""

from dataclasses import dataclass
from typing import ClassVar

from .. import checks
from ..arrays import Mask, Numbers, Operator, Real, State
from ..space import Space
from .base import Cycle, LinearSolver


@dataclass(frozen=True, kw_only=True, repr=False)
class Richardson(LinearSolver):
    """x ← x + ω (b - A x).

    For A = I - Jᵀ this is the fixed-point iteration of the adjoint, and, stopped after k steps, the Neumann series of
    Eq. (15) with λ = ω. It converges where I - ω A is a contraction.

    Parameters
    ----------
    relaxation
        ω in (0, 2).
    rtol, atol, max_steps, check_every, check
        As for :class:`LinearSolver`.

    Raises
    ------
    TypeError, ValueError
        If a setting has a wrong type or is out of range.

    References
    ----------
    L. F. Richardson, The approximate arithmetical solution by finite differences of physical problems involving
    differential equations, with an application to the stresses in a masonry dam, Phil. Trans. R. Soc. A 210 (1911).

    Examples
    --------
    >>> import numpy as np
    >>> import implicit_core as ic
    >>> a = np.array([[1.0, 0.5], [0.0, 0.5]])
    >>> ic.solve_linear(lambda x: a @ x, np.array([1.0, 2.0]), solver=ic.Richardson(rtol=1e-9)).value.round(6)
    array([-1.,  4.])
    """

    relaxation: Real = 1.0

    monotone: ClassVar[bool] = False
    loops: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "relaxation", checks.real("relaxation", self.relaxation, 0.0, 2.0, low_open=True))

    def cycle(self, space: Space, operator: Operator, r: State, norm: Numbers, target: Numbers, active: Mask) -> Cycle:
        return space.scale(self.relaxation, r), 0
