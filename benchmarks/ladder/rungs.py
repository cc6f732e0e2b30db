"""The rungs of the ladder: which recursions are made, and which of them the gradient passes through."""

from dataclasses import dataclass
from typing import Any

import implicit_core as ic
from implicit_core.examples.recursive.model import LastStepRecursion, Recursion, forced

THRESHOLD = 0.02
"""Relative residual at which ``switching`` switches."""


@dataclass(frozen=True)
class Rung:
    """A way to train.

    Attributes
    ----------
    solver, gradient
        Of the layer. With T recursions in all, an estimator that makes k of them itself has a solver of T - k.
    recursion
        The class of the cell.
    above
        The solver and the gradient where the residual of the last step is above :data:`THRESHOLD`, if others.
    """

    solver: ic.FixedPointIteration
    gradient: ic.Estimator
    recursion: type[Recursion] = Recursion
    above: tuple[ic.FixedPointIteration, ic.Estimator] | None = None

    def options(self, residual: float) -> dict[str, Any]:
        """The solver and the gradient of a step, after a step with this median relative residual."""
        far = self.above is not None and not residual <= THRESHOLD
        solver, gradient = self.above if far and self.above else (self.solver, self.gradient)
        return {"solver": solver, "gradient": gradient}


def neumann(k: int, lam: float) -> ic.Neumann:
    """Neumann(k, lam) without a test of its terms: tests are made at checkpoints alone."""
    return ic.Neumann(k, lam, on_growth="ignore")


def unroll(k: int, lam: float) -> ic.Unroll:
    """Unroll(k, lam), likewise."""
    return ic.Unroll(k, lam, on_growth="ignore")


def rungs(recursions: int) -> dict[str, Rung]:
    """All rungs, for T ``recursions`` a step, at least 3.

    The value of each is the state after T recursions, except ``unroll-5-0.5``: T - 2 and then five steps of half the
    length, which move as far as T + 1/2 recursions and cost T + 3. ``one-step``, ``neumann``, ``exact`` and
    ``switching`` evaluate the recursion once more, at the last state, for its graph.
    """
    t = recursions
    products = max(20, 2 * t)
    linearized = ic.GMRES(rtol=1e-2, max_steps=products, restart=products)
    return {
        "hrm": Rung(forced(t - 1), ic.Unroll(1, 1.0), LastStepRecursion),
        "one-step": Rung(forced(t), ic.OneStep()),
        "trm": Rung(forced(t - 1), ic.Unroll(1, 1.0)),
        "neumann-3-1": Rung(forced(t), neumann(3, 1.0)),
        "neumann-5-0.5": Rung(forced(t), neumann(5, 0.5)),
        "exact": Rung(forced(t), ic.Implicit(linearized, on_failure="ignore")),
        "switching": Rung(forced(t), neumann(3, 1.0), above=(forced(t - 2), unroll(2, 1.0))),
        "unroll-2-1": Rung(forced(t - 2), unroll(2, 1.0)),
        "unroll-5-0.5": Rung(forced(t - 2), unroll(5, 0.5)),
        "full": Rung(forced(t), ic.BPTT(t, on_growth="ignore")),
    }
