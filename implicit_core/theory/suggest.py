"""The number of terms that a requested accuracy takes (Theorem 2)."""

import math

from .. import checks
from ..arrays import H, Z
from ..estimators import Neumann, Unroll
from ..estimators.base import bind
from ..problem import Problem
from .certificate import largest
from .krylov import singular_values
from .operators import Jacobians, check

DAMPINGS = (1.0, 0.9, 0.75, 0.6, 0.5, 0.35, 0.2, 0.1)
"""The λ that are compared if none is given."""


def suggest(
    problem: Problem[H, Z],
    h: H,
    z: Z,
    *,
    error: float,
    lam: float | None = None,
    form: type[Neumann] | type[Unroll] = Neumann,
    steps: int = 40,
    confidence: float = 0.999,
    seed: int = 0,
) -> Neumann | Unroll:
    r"""The phantom gradient with the fewest terms whose certified bound meets an error.

    With B = λ ∂F/∂h + (1 - λ) I the remainder after k terms is

    .. math::
        A_{k,λ} - \frac{∂h^*}{∂z} = -\frac{∂F}{∂z} B^k \left(I - \frac{∂F}{∂h}\right)^{-1}, \quad
        \frac{\|A_{k,λ} - ∂h^*/∂z\|}{\|∂F/∂z\|} ≤ \frac{λ \|B\|^k}{1 - \|B\|}

    since (I - ∂F/∂h)⁻¹ = λ (I - B)⁻¹. As ‖B‖ ≤ 1 - λ (1 - L_h) this is never above Theorem 2's qᵏ / (1 - L_h), and it
    can hold where F itself is not a contraction. ‖B‖ is bounded by Golub-Kahan bidiagonalization, in the batch's worst
    sample: with the given confidence, and to rounding where a sample has no more than ``steps`` numbers. It costs
    2 ``steps`` products with ∂F/∂h for each λ that is tried: 640 with the defaults.

    Parameters
    ----------
    problem
        With a VJP and a JVP.
    h
        A fixed point, the solver's: shaped (batch..., state...).
    z
        Inputs and parameters.
    error
        The bound of ‖A - ∂h*/∂z‖₂ / ‖∂F/∂z‖₂ to meet, positive.
    lam
        λ in (0, 1]; if None, the one of several between 0.1 and 1 that needs the fewest terms, the largest of equals.
    form
        :class:`Neumann`, or :class:`Unroll`, which is the same at a fixed point.
    steps, confidence, seed
        As for :func:`certify`.

    Returns
    -------
    Neumann or Unroll
        ``form(k, lam)``, to be passed as ``gradient``.

    Raises
    ------
    ValueError
        If no λ that was tried makes ‖B‖ < 1 certain, ∂F/∂h is not finite, or an argument is out of range.
    NotImplementedError
        If the problem lacks its VJP or JVP, or within ``jax.jit``.

    Examples
    --------
    >>> import numpy as np
    >>> import implicit_core as ic
    >>> from implicit_core.theory import suggest
    >>> problem = ic.Problem(
    ...     lambda h, z: 0.5 * h + z, vjp=lambda h, z, v: (0.5 * v, v), jvp=lambda h, z, dh, dz: 0.5 * dh + dz)
    >>> suggest(problem, np.array([2.0]), np.array([1.0]), error=0.01)  # 0.5⁸ / (1 - 0.5) = 0.008
    Neumann(k=8, lam=1.0)
    """
    check(problem, h)
    error = checks.real("error", error, 0.0, low_open=True)
    steps, seed = checks.integer("steps", steps, 1), checks.integer("seed", seed, 0)
    confidence = checks.real("confidence", confidence, 0.0, 1.0, low_open=True, high_open=True)
    if form not in (Neumann, Unroll):
        raise TypeError(f"form must be Neumann or Unroll, got {form!r}")
    dampings = DAMPINGS if lam is None else (checks.real("lam", lam, 0.0, 1.0, low_open=True),)
    backend = bind(problem, h).backend
    # Decision 65.
    best, found = None, {}
    of_each = 1 - (1 - confidence) / len(dampings)
    with backend.on_device_of(h), backend.solving():
        j = Jacobians(problem, h, z)
        space = j.samples
        for damping in dampings:
            b = j.damped(damping)
            norm = singular_values(*b, space, space, steps=steps, confidence=of_each, seed=seed).largest
            if math.isnan(largest(norm.value)):
                raise ValueError(
                    "∂F/∂h is not finite at h: check the statuses of the solve before a gradient is computed"
                )
            found[damping] = high = largest(norm.high)
            k = terms(high, damping, error)
            if k is not None and (best is None or k < best[0]):
                best = k, damping
    if best is None:
        raise ValueError(_advice(found, steps))
    return form(*best)


def terms(norm: float, lam: float, error: float) -> int | None:
    """The least k ≥ 1 with λ ‖B‖ᵏ / (1 - ‖B‖) ≤ error; None if no k does."""
    if not norm < 1:
        return None
    if norm == 0 or lam * norm / (1 - norm) <= error:
        return 1
    k = math.ceil((math.log(error) + math.log1p(-norm) - math.log(lam)) / math.log(norm))
    # The quotient of logarithms is rounded, so the bound itself decides.
    while lam * norm**k / (1 - norm) > error:
        k += 1
    while k > 1 and lam * norm ** (k - 1) / (1 - norm) <= error:
        k -= 1
    return k


def _advice(found: dict[float, float], steps: int) -> str:
    tried = ", ".join(f"{norm:.3g} at lam={lam:g}" for lam, norm in found.items())
    return (
        f"no damped step of F is certain to be a contraction at h: the bound of ‖B‖ is {tried}. More than "
        f"steps={steps} give a sharper bound; otherwise regularize the Jacobian, or use Implicit, which needs no "
        "contraction"
    )
