"""Richardson iteration."""

from dataclasses import dataclass
from typing import ClassVar

from .. import checks
from ..backend import Array
from ..space import Operator, Space, State
from .base import Cycle, LinearSolver


@dataclass(frozen=True, kw_only=True)
class Richardson(LinearSolver):
    """x ← x + ω (b - A x).

    On A = I - Jᵀ this is the fixed-point iteration for the adjoint, and, stopped after k steps, the Neumann series of
    Eq. (15) with λ = ω. It converges where I - ω A is a contraction.

    Parameters
    ----------
    relaxation
        ω in (0, 2).
    rtol, atol, max_steps, check_every
        As for :class:`LinearSolver`.
    """

    relaxation: float = 1.0

    monotone: ClassVar[bool] = False
    loops: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "relaxation", checks.real("relaxation", self.relaxation, 0.0, 2.0, low_open=True))

    def cycle(self, space: Space, operator: Operator, r: State, norm: Array, target: Array, active: Array) -> Cycle:
        return space.scale(self.relaxation, r), 0
