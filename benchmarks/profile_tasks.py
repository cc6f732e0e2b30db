"""The four sets of problems of the performance profiles, in one form."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np

from implicit_core.arrays import Array

from .root_problems import SCALES, SQUARE, TOLERANCE, TWENTY_THREE, RootProblem
from .stiff import steps

SETS = {
    "roots": "23 problems from their start x 1, 10, 100",
    "systems": "20 systems (Moré et al.) from their start x 1, 10, 100",
    "pde": "20 implicit Euler steps, from 100 to 1,000,000 unknowns",
    "cells": "40 equilibrium cells at four stages of training",
}
LARGEST, LENGTH, SAMPLES = "largest", "length", "samples"
"""How a residual is measured: its largest entry, its norm, or the norm of each sample relative to F."""


@dataclass(frozen=True)
class Task:
    """One problem.

    Attributes
    ----------
    set, name
        Where it belongs.
    family
        Tasks with the same name here differ in their numbers alone, so that one compiled program solves them.
    function
        ``(xp, x, z)``: g(x, z) of a root, or F(x, z) of a fixed point, with the operations of ``xp``.
    start, z
        Where a solve begins, float64; and what the function depends on, a dictionary of arrays.
    measure
        How the residual is measured: LARGEST, LENGTH or SAMPLES, which makes the function F and axis 0 the batch.
    allowed
        The largest residual of a solution, measured so.
    within
        A norm of the residual of all unknowns that is certainly small enough, for solvers that stop by that.
    """

    set: str
    name: str
    family: str
    function: Callable[[Any, Array, Any], Array]
    start: np.ndarray
    z: dict[str, np.ndarray]
    measure: str
    allowed: float
    within: float

    @property
    def is_root(self) -> bool:
        """Whether the function is g, and not F."""
        return self.measure != SAMPLES

    @property
    def limit(self) -> int:
        """The evaluations and products after which a solve has failed."""
        return 2000 if self.start.size < 50_000 else 500

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """``z``, and the allowed residual: what a compiled program of the family is called with."""
        return {"z": self.z, "allowed": np.asarray(self.allowed)}

    def residual(self, xp: Any, x: Array, arguments: Any) -> Array:
        """g(x), or x - F(x)."""
        value = self.function(xp, x, arguments["z"])
        return value if self.is_root else x - value

    def excess(self, xp: Any, x: Array, residual: Array, arguments: Any, *, batched: bool = True) -> Array:
        """The residual over the allowed one: a solution has at most 1. Without ``batched``, x is one sample."""
        if self.measure == LARGEST:
            return xp.max(xp.abs(residual)) / arguments["allowed"]
        if self.measure == LENGTH:
            return xp.sqrt(xp.sum(residual * residual)) / arguments["allowed"]
        value, axes = x - residual, tuple(range(1 if batched else 0, x.ndim))
        squared = xp.sum(residual * residual, axis=axes) / xp.sum(value * value, axis=axes)
        return xp.sqrt(xp.max(squared)) / arguments["allowed"]

    def solved(self, x: Any) -> float:
        """The excess at a point, computed in NumPy and float64; infinite where it is not finite."""
        x = np.asarray(x, np.float64).reshape(self.start.shape)
        with np.errstate(all="ignore"):
            excess = float(self.excess(np, x, self.residual(np, x, self.arguments), self.arguments))
        return excess if math.isfinite(excess) else math.inf


def _without_z(function: Callable[[Any, Array], Array], xp: Any, x: Array, _: Any) -> Array:
    return function(xp, x)


def _of_roots(name: str, problems: tuple[RootProblem, ...]) -> list[Task]:
    return [
        Task(
            name,
            problem.scaled(factor).name,
            f"{name} {problem.name}",
            partial(_without_z, problem.function),
            factor * problem.start,
            {},
            LARGEST,
            TOLERANCE,
            TOLERANCE,
        )
        for problem in problems
        for factor in SCALES
    ]


def _of_steps(most: int) -> list[Task]:
    tasks = []
    for step in steps(most):
        allowed = 1e-6 * float(np.linalg.norm(step.residual(np, step.old, step.z)))
        names = ("pde", step.name, step.equation)
        tasks.append(Task(*names, step.residual, step.old, step.z, LENGTH, allowed, allowed))
    return tasks


def _of_cells() -> list[Task]:
    from .trained_cells import RTOL, load

    return [
        Task("cells", cell.name, cell.family, cell.function, cell.start, cell.z, SAMPLES, RTOL, RTOL * cell.least_norm)
        for cell in load()
    ]


def tasks(name: str, *, most: int) -> list[Task]:
    """The problems of a set, with at most so many unknowns."""
    found = {
        "roots": lambda: _of_roots("roots", TWENTY_THREE),
        "systems": lambda: _of_roots("systems", SQUARE),
        "pde": lambda: _of_steps(most),
        "cells": _of_cells,
    }[name]()
    return [task for task in found if task.start.size <= most]
