"""The derivative of a function along a direction, by differences: what the examples compare gradients with."""

from collections.abc import Callable
from typing import Any


def central_difference(f: Callable[[Any], Any], x: Any, direction: Any, step: float) -> Any:
    """The slope of f at x along ``direction``, by the central difference of five points, with an error of O(step⁴)."""

    def difference(h: float) -> Any:
        return f(x + h * direction) - f(x - h * direction)

    return (8 * difference(step) - difference(2 * step)) / (12 * step)
