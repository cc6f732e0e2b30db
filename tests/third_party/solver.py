"""A solver of somebody else's."""

from dataclasses import dataclass

import implicit_core as ic
from implicit_core.arrays import State
from implicit_core.solvers import Point
from implicit_core.system import System


@dataclass(frozen=True, kw_only=True)
class HeavyBall(ic.Solver):
    """h ← F(h) + β (h - h_before)."""

    momentum: float = 0.2

    def init(self, system: System, x: State) -> State:
        return x

    def step(self, system: System, memory: State, point: Point) -> tuple[State, State]:
        space = system.space
        return space.axpy(self.momentum, space.sub(point.x, memory), point.f), point.x
