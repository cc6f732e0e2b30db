"""The loops of ``recursive_models.py`` by hand, as its tests compare them: ``constant`` cuts a state from the graph."""

from collections.abc import Callable, Sequence
from typing import Any

Cell = Callable[[Any, Any], Any]
Constant = Callable[[Any], Any]


def recur(constant: Constant, cell: Cell, h: Any, x: Any, n: int, k: int) -> Any:
    for i in range(n + k):
        h = cell(constant(h) if i <= n else h, x)
    return h


def parcae(constant: Constant, where: Any, cell: Cell, h: Any, x: Any, n: Any, k: Any, most: tuple[int, int]) -> Any:
    """With masks; n and k are (batch, 1), and no larger than ``most``."""
    for steps, last in zip((n, k), most, strict=True):
        h = constant(h)
        for i in range(last):
            h = where(i < steps, cell(h, x), h)
    return h


def hrm(constant: Constant, low: Cell, high: Cell, state: Any, x: Any, cycles: int = 2, steps: int = 3) -> Any:
    z_high, z_low = state
    for i in range(cycles * steps):
        z_high, z_low = constant((z_high, z_low))
        z_low = low(z_low, z_high + x)
        if (i + 1) % steps == 0:
            z_high = high(z_high, z_low)
    return z_high, z_low


def trm(constant: Constant, net: Cell, state: Any, x: Any, cycles: int = 3, steps: int = 3) -> Any:
    for _ in range(cycles):
        y, z = constant(state)
        for _ in range(steps):
            z = net(z, x + y)
        state = net(y, z), z
    return state


def hrm_text(
    constant: Constant, low: Cell, high: Cell, x: Any, z_low: Any, graded: int, cycles: int = 2, steps: int = 3
) -> Any:
    of_high = min(cycles, graded - 1)
    first_high, first_low = cycles - of_high, cycles * steps - (graded - of_high)
    z_high = x
    for i in range(cycles * steps):
        z_low = low(z_low, z_high)
        z_low = z_low if i >= first_low else constant(z_low)
        if (i + 1) % steps == 0:
            z_high = high(z_high, z_low)
            z_high = z_high if i // steps >= first_high else constant(z_high)
    return z_high


def step_by_step(solve: Callable[[Cell, Any, Any], Any], cell: Cell, h: Any, xs: Sequence[Any]) -> list[Any]:
    states = []
    for x in xs:
        h = solve(cell, h, (h, x))
        states.append(h)
    return states
