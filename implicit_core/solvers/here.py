"""A solver that measures a point and stays there."""

from dataclasses import dataclass
from typing import ClassVar

from ..arrays import Count, State
from ..carry import Point
from ..system import System
from .base import Solver


@dataclass(frozen=True, kw_only=True, repr=False)
class Here(Solver):
    """The solver whose result is its start, where F is evaluated once, for a status and a residual."""

    max_steps: Count = 1

    keeps_best: ClassVar[bool] = False
    copies_results: ClassVar[bool] = False

    def init(self, system: System, x: State) -> None:
        return None

    def step(self, system: System, memory: None, point: Point) -> tuple[State, None]:
        return point.x, None
