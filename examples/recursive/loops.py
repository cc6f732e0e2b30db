"""The recursions of a training step, and which of them the gradient passes through."""

from dataclasses import dataclass
from typing import Any

import implicit_core as ic

PHANTOM = ("unroll", "neumann")
"""Gradients with settings k and lam."""
GRADIENTS = ("trm", "hrm", *PHANTOM, "full", "one-step", "implicit", "switching")
THRESHOLD = 0.02
"""Relative residual at which ``switching`` switches."""


@dataclass(frozen=True)
class Loop:
    """A way to train.

    Attributes
    ----------
    solver, gradient
        Of the layer. With T recursions in all, an estimator that makes k of them itself has a solver of T - k.
    last_step
        Whether the gradient of a recursion passes through the last update of its latent alone.
    above
        The solver and the gradient where the residual of the last step is above :data:`THRESHOLD`, if others.
    """

    solver: ic.FixedPointIteration
    gradient: ic.Estimator
    last_step: bool = False
    above: tuple[ic.FixedPointIteration, ic.Estimator] | None = None

    def options(self, residual: float) -> dict[str, Any]:
        """The solver and the gradient of a step, after a step with this median relative residual."""
        far = self.above is not None and not residual <= THRESHOLD
        solver, gradient = self.above if far and self.above else (self.solver, self.gradient)
        return {"solver": solver, "gradient": gradient}


def loop(gradient: str, recursions: int, k: int = 2, lam: float = 1.0) -> Loop:
    """The loop of a gradient.

    Parameters
    ----------
    gradient
        One of :data:`GRADIENTS`.

        ``trm``: through the last recursion, as in tiny recursive models. ``hrm``: through its last update of the latent
        and that of the answer, as in the hierarchical reasoning models of G. Wang et al. (2025). ``unroll``: through
        the last k recursions, damped by ``lam``. ``full``: through all of them. ``neumann``: k terms of the Neumann
        series at the last state. ``one-step``: one of them. ``implicit``: the gradient of a fixed point, by GMRES.
        ``switching``: ``neumann`` of three terms where the state moves little, else ``unroll`` of two recursions.
    recursions
        T, at least 1. The state of all but a damped ``unroll`` is the one after T recursions. ``one-step``,
        ``neumann``, ``implicit`` and ``switching`` evaluate the recursion once more, at that state.
    k, lam
        Those of ``unroll`` and ``neumann``. k damped steps move as far as k · lam recursions.

    Raises
    ------
    ValueError
        If there is no such gradient, or it makes more recursions than there are.

    Examples
    --------
    >>> from implicit_core.examples.recursive.loops import loop
    >>> made = loop("unroll", recursions=5, k=2)
    >>> made.solver.max_steps, made.gradient.k
    (3, 2)
    """
    t = recursions

    def unroll(k: int, lam: float) -> tuple[ic.FixedPointIteration, ic.Unroll]:
        if (moved := int(k * lam)) > t:
            raise ValueError(f"recursions must be at least k * lam, {moved}, for this gradient, got {t}")
        return ic.steps(t - moved), ic.Unroll(k, lam, on_growth="ignore")

    # A test of the terms of an estimate, as growth is, costs products in every step.
    match gradient:
        case "trm":
            return Loop(*unroll(1, 1.0))
        case "hrm":
            return Loop(*unroll(1, 1.0), last_step=True)
        case "unroll":
            return Loop(*unroll(k, lam))
        case "full":
            return Loop(ic.steps(t), ic.BPTT(t, on_growth="ignore"))
        case "neumann":
            return Loop(ic.steps(t), ic.Neumann(k, lam, on_growth="ignore"))
        case "one-step":
            return Loop(ic.steps(t), ic.OneStep())
        case "implicit":
            products = max(20, 2 * t)
            return Loop(ic.steps(t), ic.Implicit(ic.GMRES(rtol=1e-2, restart=products), products=products + 1))
        case "switching":
            return Loop(ic.steps(t), ic.Neumann(3, 1.0, on_growth="ignore"), above=unroll(2, 1.0))
    raise ValueError(f"gradient must be one of {', '.join(GRADIENTS)}, got {gradient!r}")
