"""An estimator of somebody else's."""

from dataclasses import dataclass

from implicit_core.arrays import Operator, State
from implicit_core.estimators import AtFixedPoint
from implicit_core.space import Space


@dataclass(frozen=True)
class TailedSeries(AtFixedPoint):
    """D = I + J + J² / (1 - c), the series whose last term stands for all that follow it."""

    c: float = 0.5

    def inverse(self, space: Space, jacobian: Operator, v: State) -> State:
        first = space.copy(jacobian(v))
        second = jacobian(first)
        return space.axpy(1 / (1 - self.c), second, space.add(first, v))
