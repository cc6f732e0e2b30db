"""The result of :func:`certify`, in numbers and in words."""

import math
import textwrap
from dataclasses import dataclass
from typing import Any

from ..arrays import Array
from ..estimators import Estimator
from ..registry import find_backend
from .krylov import Bounds

WIDTH = 80


@dataclass(frozen=True)
class Condition:
    """A sufficient condition, left ≤ right.

    Attributes
    ----------
    name
        Its number in the paper.
    left, right
        Both sides, floats.

    Examples
    --------
    >>> from implicit_core.theory import Bounds, Condition
    >>> print(Condition("6", Bounds(0.1, 0.1, 0.12), Bounds(0.2, 0.25, 0.25)))
    0.1 (≤ 0.12) ≤ 0.25 (≥ 0.2)   holds
    """

    name: str
    left: Bounds
    right: Bounds

    @property
    def holds(self) -> bool | None:
        """Whether the condition holds; None if the bounds leave it open."""
        if self.left.high <= self.right.low:
            return True
        return False if self.left.low > self.right.high else None

    def __str__(self) -> str:
        verdict = {True: "holds", False: "fails", None: "open"}[self.holds]
        sign = {True: "≤", False: ">", None: "?"}[self.holds]
        return f"{_upper(self.left)} {sign} {_lower(self.right)}   {verdict}"


@dataclass(frozen=True, eq=False, repr=False)
class Certificate:
    """The paper's conditions on a gradient estimator, checked at one point; see :func:`certify`.

    Numbers of the batch are floats, numbers of its samples are arrays of the batch's shape. In :class:`Bounds` one side
    is certain, the other holds with the requested confidence; where the Krylov space was exhausted they differ by
    rounding alone. A value of NaN with bounds (0, ∞) means that it is not finite or could not be computed.

    Attributes
    ----------
    gradient
        The estimator.
    residual
        ‖F(h) - h‖₂ of each sample at the point; the theorems assume a fixed point.
    contraction
        L_h = ‖∂F/∂h‖₂ of each sample, :class:`Bounds`.
    spectral_radius
        The spectral radius of ∂F/∂h in each sample: an estimate, a rough one for a matrix far from normal.
    error_bound
        Theorem 2's bound of ‖A - ∂h*/∂z‖ / ‖∂F/∂z‖ in each sample, at L_h's upper bound: qᵏ / (1 - L_h) with
        q = 1 - λ (1 - L_h). Infinite where L_h < 1 is not certain; NaN where no bound is known.
    sigma_max, sigma_min
        The extreme singular values of ∂F/∂z, whose cotangents are the batch as one vector: :class:`Bounds` of floats.
    condition_6
        ‖A (I - ∂F/∂h) - ∂F/∂z‖₂ ≤ σ_min² / σ_max (Theorem 1).
    condition_8
        ‖D (I - ∂F/∂h) - I‖₂ ≤ 1 / κ² (Remark 1), on the batch's worst sample; None unless A = (∂F/∂z) D.
    condition_sharp
        ‖A (I - ∂F/∂h) - ∂F/∂z‖₂ ≤ σ_min: what the proof of Theorem 1 needs, κ times less strict than (6).
    condition_on_range
        Where σ_min = 0, (6) with the smallest positive singular value: a guarantee for the cotangents v with
        (I - ∂F/∂h)⁻¹ v in the range of (∂F/∂z)ᵀ. None otherwise, or where that value was not found.
    inner_product, cosine, relative_error
        A v compared with the exact gradient, for the given cotangent v: (7), their cosine, and ‖A v - exact‖ over
        ‖exact‖. None without a cotangent.
    evaluations, products_h, products_z
        Evaluations of F, and products with ∂F/∂h and with ∂F/∂z or their transposes, that the certificate took.
    samples, state_size, parameters
        The number of samples, of numbers in one sample of h, and of numbers in z.
    left_out
        What F closes over and could be differentiated in, in words: constants here, as only z is not. PyTorch tells.

    Examples
    --------
    >>> import numpy as np
    >>> import implicit_core as ic
    >>> from implicit_core.theory import certify
    >>> problem = ic.Problem(
    ...     lambda h, z: 0.5 * h + z, vjp=lambda h, z, v: (0.5 * v, v), jvp=lambda h, z, dh, dz: 0.5 * dh + dz)
    >>> certificate = certify(problem, np.array([2.0]), np.array([1.0]), ic.OneStep())
    >>> certificate.descent, certificate.to_dict()["contraction"]
    (True, 0.5)
    """

    gradient: Estimator
    residual: Array
    contraction: Bounds
    spectral_radius: Array
    error_bound: Array
    sigma_max: Bounds
    sigma_min: Bounds
    condition_6: Condition
    condition_8: Condition | None
    condition_sharp: Condition
    condition_on_range: Condition | None
    inner_product: float | None
    cosine: float | None
    relative_error: float | None
    evaluations: int
    products_h: int
    products_z: int
    samples: int
    state_size: int
    parameters: int
    left_out: tuple[str, ...] = ()

    @property
    def descent(self) -> bool | None:
        """Whether the estimate is certain to be a descent direction, for every loss (Theorem 1).

        True if ‖A (I - ∂F/∂h) - ∂F/∂z‖ ≤ σ_min, which (6) and (8) imply. False if it is larger: since the condition is
        sufficient, the estimate may descend all the same. False also if ∂F/∂z = 0, when there is no gradient. None if
        the bounds leave it open.
        """
        implied = (self.condition_6, self.condition_8)
        if self.sigma_max.high == 0:
            return False
        if any(condition is not None and condition.holds for condition in implied):
            return True
        return self.condition_sharp.holds

    @property
    def condition_number(self) -> Bounds:
        """κ = σ_max / σ_min of ∂F/∂z."""
        ratios = [
            math.inf if bottom == 0 else top / bottom
            for top, bottom in zip(self.sigma_max, reversed(self.sigma_min), strict=True)
        ]
        value = math.inf if self.sigma_min.value == 0 else self.sigma_max.value / self.sigma_min.value
        return Bounds(ratios[0], value, ratios[2])

    def to_dict(self) -> dict[str, float | bool | None]:
        """Scalars for a logger: numbers of the samples are represented by the largest of the batch."""
        found: dict[str, float | bool | None] = {
            "descent": self.descent,
            "residual": largest(self.residual),
            "contraction": largest(self.contraction.value),
            "contraction_low": largest(self.contraction.low),
            "contraction_high": largest(self.contraction.high),
            "spectral_radius": largest(self.spectral_radius),
            "error_bound": largest(self.error_bound),
            "sigma_max": self.sigma_max.value,
            "sigma_max_high": self.sigma_max.high,
            "sigma_min": self.sigma_min.value,
            "sigma_min_low": self.sigma_min.low,
            "condition_number": self.condition_number.value,
        }
        for name in ("condition_6", "condition_8", "condition_sharp", "condition_on_range"):
            condition = getattr(self, name)
            if condition is not None:
                found |= {
                    f"{name}_left": condition.left.value,
                    f"{name}_left_high": condition.left.high,
                    f"{name}_right": condition.right.value,
                    f"{name}_right_low": condition.right.low,
                    f"{name}_holds": condition.holds,
                }
        for name in ("inner_product", "cosine", "relative_error"):
            if getattr(self, name) is not None:
                found[name] = getattr(self, name)
        return found | {name: getattr(self, name) for name in ("evaluations", "products_h", "products_z")}

    def __str__(self) -> str:
        numbers = self.to_dict()
        contraction = Bounds(numbers["contraction"], numbers["contraction"], numbers["contraction_high"])
        worst = " (worst sample)" if self.samples > 1 else ""
        rows = [
            ("h, z", f"{self.samples} x {self.state_size} numbers, {self.parameters} numbers"),
            ("residual ‖F(h) - h‖", f"{numbers['residual']:.3g}{worst}"),
            ("contraction L_h", f"{_upper(contraction)}{worst}"),
            ("spectral radius", f"{numbers['spectral_radius']:.4g}{worst}"),
            ("error bound (Thm 2)", self._bound(numbers["error_bound"])),
            ("σ of ∂F/∂z", f"{_upper(self.sigma_max)} to {_lower(self.sigma_min)}"),
            ("condition (6)", str(self.condition_6)),
        ]
        if self.condition_8 is not None:
            rows.append(("condition (8)", str(self.condition_8)))
        rows.append(("left of (6) ≤ σ_min", str(self.condition_sharp)))
        if self.sigma_min.value == 0 and not self.descent:
            rows.append(("σ_min = 0", self._without_full_rank()))
        if self.condition_on_range is not None:
            rows.append(("(6) on the range", str(self.condition_on_range)))
        if self.cosine is not None:
            found = f"cosine {self.cosine:.6f}, relative error {self.relative_error:.3g}"
            rows.append(("measured", "the exact gradient was not found" if math.isnan(self.cosine) else found))
        rows.append(("descent direction", self._verdict()))
        high: Any = numbers["contraction_high"]
        if high >= 1:
            rows += _lines("L_h may be 1 or more", self._without_contraction(numbers["spectral_radius"]))
        if self.left_out:
            rows += _lines(
                "left out", f"F closes over trained tensors, constants here, of shape {', '.join(self.left_out)}"
            )
        name = textwrap.shorten(str(self.gradient), WIDTH, placeholder=" ...")
        return "\n".join([name, *(f"  {name:<22}{text}" for name, text in rows)])

    __repr__ = __str__

    def _verdict(self) -> str:
        lost = math.isnan(largest(self.contraction.value)) or math.isnan(self.sigma_max.value)
        if self.descent is None and lost:
            return "open: h, or a Jacobian there, is not finite"
        verdicts = {True: "guaranteed (Theorem 1)", False: "not guaranteed", None: "open: the bounds overlap"}
        return verdicts[self.descent]

    def _bound(self, bound: Any) -> str:
        if math.isnan(bound):
            return "none known"
        return "none: L_h < 1 is not certain" if math.isinf(bound) else f"{bound:.3g} ‖∂F/∂z‖"

    def _without_contraction(self, radius: Any) -> str:
        """What still says something where Theorem 2 is silent."""
        if radius < 1:
            found = (
                "Theorem 2 is silent. The spectral radius is below 1: more terms still converge to the exact gradient."
            )
        elif radius >= 1:
            found = "Theorem 2 is silent. The spectral radius is not below 1: with lam=1 more terms do not converge."
        else:
            found = "Theorem 2 is silent."
        return found + (" cotangent= measures the cosine." if self.cosine is None else "")

    def _without_full_rank(self) -> str:
        numbers = self.samples * self.state_size
        if numbers > self.parameters:
            return f"{numbers} numbers in h > {self.parameters} in z: (6), (8) cannot hold"
        if self.sigma_max.high == 0:
            return "∂F/∂z is zero: there is no gradient"
        return "∂F/∂z does not have full rank, up to rounding"


def _lines(name: str, text: str) -> list[tuple[str, str]]:
    """A row of text that is broken where the screen ends."""
    lines = textwrap.wrap(text, WIDTH - 24)
    return list(zip([name, *[""] * (len(lines) - 1)], lines, strict=True))


def largest(numbers: Array) -> float:
    """The largest number of a batch; NaN if it holds one, which XLA's maximum on a CPU may pass over."""
    xp = find_backend(numbers, "numbers").xp
    return math.nan if bool(xp.any(numbers != numbers)) else float(xp.max(numbers))


def _upper(b: Bounds) -> str:
    """A number whose upper bound matters."""
    if math.isnan(b.value):
        return f"at most {b.high:.3g}"
    return f"{b.value:.4g}" if b.high <= b.value * (1 + 1e-4) else f"{b.value:.3g} (≤ {b.high:.3g})"


def _lower(b: Bounds) -> str:
    """A number whose lower bound matters."""
    if math.isnan(b.value):
        return f"at least {b.low:.3g}"
    return f"{b.value:.4g}" if b.low >= b.value * (1 - 1e-4) else f"{b.value:.3g} (≥ {b.low:.3g})"
