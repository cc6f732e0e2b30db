"""Shared by the parts of the GPU benchmark: problems, rows, and omissions with their reasons."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import median
from time import monotonic
from typing import Any

import numpy as np

import implicit_core as ic

LAM, K = 0.5, 5
STEPS = 20
"""Evaluations of F in every solve: the tolerance is zero, so that all solves do the same work."""
CONTRACTION = 0.9
SIZES = ((32, 128), (256, 1024), (1024, 1024), (256, 4096))
BLOCK = (64, 64, 32)
"""Batch, channels, and height and width of the convolution block."""
FORCED: dict[str, Any] = {"rtol": 0.0, "atol": 0.0, "max_steps": STEPS}
GRADIENTS: dict[str, ic.Estimator] = {
    "Neumann(5)": ic.Neumann(K, LAM),
    "Unroll(5)": ic.Unroll(K, LAM),
    "OneStep": ic.OneStep(),
    "Implicit(GMRES)": ic.Implicit(ic.GMRES(rtol=1e-4), on_failure="nan"),
}


@dataclass
class Row:
    """Measurements of one method on one layer; times in milliseconds, memory in bytes.

    Attributes
    ----------
    case, method
        The layer, and the solver with its gradient.
    evaluations
        Evaluations of F in the forward pass; None if they are not counted.
    forward, backward, step
        One time for each repetition.
    bare
        Time of one evaluation of F, without derivatives.
    memory
        Peak memory of a step, without the memory of the problem.
    """

    case: str
    method: str
    evaluations: int | None = None
    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)
    bare: float | None = None
    memory: int | None = None

    def ratio(self) -> float | None:
        """Time of the forward pass, divided by the time of as many bare evaluations of F."""
        if not (self.forward and self.bare and self.evaluations):
            return None
        return median(self.forward) / (self.evaluations * self.bare)


@dataclass(frozen=True)
class Omission:
    """Something that was not measured, and the reason."""

    what: str
    why: str


@dataclass(frozen=True)
class Settings:
    """The settings of all parts.

    Attributes
    ----------
    device
        ``"cuda"``, or ``"cpu"`` for a dry run.
    repetitions
        Number of timed runs of each row.
    sizes
        Batch and width of the tanh layers.
    block
        Batch, channels and size of the convolution block.
    until
        Time after which no further row is started, on the clock :func:`time.monotonic`.
    part
        Which rows: the ``"table"``, those with CUDA ``"graphs"``, or the captured training ``"step"``.
    done
        Rows, as case and method, that need not be measured.
    """

    device: str
    repetitions: int
    sizes: tuple[tuple[int, int], ...]
    block: tuple[int, int, int]
    until: float
    part: str = "table"
    done: frozenset[str] = frozenset()


PARTS = {"torch": ("table", "graphs", "step"), "jax": ("table",), "cupy": ("table",)}
"""The parts of each framework."""
Measured = Iterator[Row | Omission]
Task = tuple[str, str, Callable[[], Row]]
"""A case, a method, and the function that measures it."""


def carry_out(tasks: list[Task], settings: Settings, announce: Callable[[str], None]) -> Measured:
    """Measure rows until the time is up; a row that fails does not stop the others."""
    for case, method, measure in tasks:
        if f"{case}, {method}" in settings.done:
            continue
        if monotonic() > settings.until:
            yield Omission(f"{case}, {method}", "the time was up")
            continue
        announce(f"{case}, {method}")
        try:
            yield measure()
        except Exception as error:  # reported and counted as a failure
            yield Omission(f"{case}, {method}", f"failed: {type(error).__name__}: {error}")


def layer(batch: int, width: int) -> dict[str, np.ndarray]:
    """W, with ‖W‖₂ = 0.9, and x of the layer tanh(h Wᵀ + x), float32."""
    rng = np.random.default_rng(0)
    # A product of two reflections, scaled: orthogonal, and cheaper than a QR decomposition.
    u, v = (a / np.linalg.norm(a) for a in rng.standard_normal((2, width)))
    w = np.eye(width) - 2 * np.outer(u, u)
    w = CONTRACTION * (w - 2 * np.outer(w @ v, v))
    return {"w": w.astype(np.float32), "x": rng.standard_normal((batch, width)).astype(np.float32)}


def solvers(**more: Any) -> dict[str, ic.Solver]:
    """The solvers, all with the same number of steps."""
    return {
        "plain": ic.FixedPointIteration(**FORCED, **more),
        "Anderson": ic.Anderson(**FORCED, **more),
        "Broyden": ic.Broyden(**FORCED, **more),
    }
