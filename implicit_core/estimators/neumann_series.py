"""The Neumann series of Eq. (15), with as many terms in every sample as an accuracy requires (Decision 28)."""

import math
from dataclasses import dataclass, field
from typing import ClassVar

from .. import checks, settings
from ..arrays import Count, Numbers, Operator, Real, State
from ..linear_solvers import Richardson
from ..linear_solvers.base import ratio
from ..records import in_words, shown
from ..space import Space
from .base import AtFixedPoint, Derivative, geometric_count
from .inexact import OnFailure, check_on_failure, settled

MARGIN = 2.0
"""Safety factor on the estimated remainder: slowly decaying components appear late."""


@dataclass(frozen=True, repr=False)
class NeumannSeries(AtFixedPoint):
    r"""The Neumann series to an accuracy: each sample takes the terms of Eq. (18) that it needs.

    .. math::
        A = λ \frac{∂F}{∂z}\Big|_{h^*} (I + B + B² + …), \quad B = λ \frac{∂F}{∂h}\Big|_{h^*} + (1-λ) I

    A pullback costs one h-VJP less than the slowest sample has terms, and one z-VJP. After each term the estimator
    reads from the device whether a sample needs more. Second derivatives approximate the exact ones to the same
    accuracy.

    Parameters
    ----------
    lam
        λ in (0, 1].
    rtol
        The remainder of the series relative to its sum, for each sample. Without ``contraction`` it is estimated from
        the last two terms, as for a geometric series. The estimate misses a component that is small in the cotangent
        and decays much more slowly than all others.
    max_terms
        The most terms.
    contraction
        A bound of L_h, below 1, such as ``certify(...).to_dict()["contraction_high"]``. The remainder is then bounded
        instead of estimated.
    on_failure
        What to do with samples that would need more terms: ``"warn"`` with an :class:`InexactGradientWarning` and use
        the sum so far, or as for :class:`Implicit`.
    check
        As for :class:`LinearSolver`: whether a pullback raises where F couples samples.

    Raises
    ------
    TypeError, ValueError
        If a setting has a wrong type or is out of range.

    References
    ----------
    Z. Geng et al., On training implicit models, NeurIPS 2021: Eq. 15 and 18, Theorem 2.

    Examples
    --------
    >>> import numpy as np
    >>> import implicit_core as ic
    >>> problem = ic.Problem(lambda h, z: 0.5 * h + z, vjp=lambda h, z, v: (0.5 * v, v))
    >>> value, pullback = ic.NeumannSeries(lam=1.0, rtol=1e-3).vjp(problem, np.array([2.0]), np.array([1.0]))
    >>> pullback(np.array([1.0]))  # the exact gradient is 2
    array([1.99902344])
    """

    lam: Real = 0.5
    rtol: Real = 1e-3
    max_terms: Count = 200
    contraction: Real | None = None
    on_failure: OnFailure = field(default="warn", repr=False)
    check: bool = field(default=True, repr=False)

    derivative: ClassVar[Derivative] = Derivative.OF_SOLUTION

    def __post_init__(self) -> None:
        set_field = object.__setattr__
        set_field(self, "lam", checks.real("lam", self.lam, 0.0, 1.0, low_open=True))
        set_field(self, "rtol", checks.real("rtol", self.rtol, 0.0, low_open=True))
        set_field(self, "max_terms", checks.count("max_terms", self.max_terms, 1))
        if self.contraction is not None:
            set_field(self, "contraction", checks.real("contraction", self.contraction, 0.0, 1.0, high_open=True))
        check_on_failure(self.on_failure)
        checks.instance("check", self.check, bool, "False")

    def inverse(self, space: Space, jacobian: Operator, v: State) -> State:
        """λ (v + B v + B² v + ...) with B = λ J + (1 - λ) I (Eq. 15), until the remainder is small.

        Richardson iteration for (I - J) w = v, w ← w + λ r: after k steps w is the sum of k terms, and its residual r
        is Bᵏ v. So the next term λ r needs no product: k terms take k - 1.
        """
        # Decision 28.
        solver = _UntilRemainder(
            series=self, relaxation=self.lam, rtol=0.0, max_steps=self.max_terms - 1, check=self.check
        )
        with space.backend.solving():
            result = solver.run(space, lambda w: space.sub(w, jacobian(w)), v)
            # The sum approximates the inverse for every λ: how far it is from it has no derivative.
            lam = settings.bound(self, space, constant=True).lam
            return settled(
                space,
                space.axpy(lam, result.r, result.x),
                result.status,
                result.residual,
                self.on_failure,
                f"the Neumann series did not reach rtol={shown(self.rtol)}",
                "The residual is the norm of the next term. If it exceeds the norm of the cotangent, the series has no "
                "sum: use Implicit(), which needs no contraction, or a smaller lam, which helps where the eigenvalues "
                f"of ∂F/∂h have real parts below 1. Otherwise raise max_terms, which is {in_words(self.max_terms)}",
            )

    def inverse_error(self, contraction: float, eps: float = 0.0, rounding: float = 0.0) -> float:
        """With a bound of L_h, ``rtol`` relative to the sum, or qᵏ if max_terms is reached before; and rounding.

        Where the series' own ``contraction`` is smaller than the one given, it stops too early by q / (1 - q) of the
        one over that of the other, and the bound says so.
        """
        if self.contraction is None:
            return math.nan
        # Decision 85. Rounding errors of a product with the residual r_t are multiplied by the inverse. Their sum is at
        # most that of ‖r_t‖ over all terms; those of the sum itself are relative to it.
        condition, terms = (1 + contraction) / (1 - contraction), geometric_count(self.max_terms, self.lam, contraction)
        rounded = rounding * condition * (condition + 2 * terms)
        used, true = (self.lam * (1 - c) for c in (self.contraction, max(contraction, self.contraction)))
        q = 1 - true
        if used == 1:  # it takes ∂F/∂h for zero, and one term for the sum
            return q + rounded
        rest = self.rtol * (q / true) / ((1 - used) / used)
        accuracy = rest / (1 - rest) if rest < 1 else math.inf
        # No sum of k terms, however few, is further away than the last of one term.
        return min(max(accuracy, q**self.max_terms), q) + rounded


@dataclass(frozen=True, kw_only=True)
class _UntilRemainder(Richardson):
    """Richardson iteration that stops on the remainder of the series instead of on the residual."""

    series: NeumannSeries

    undoes: ClassVar[bool] = False  # as elsewhere NaN propagates, so that a gradient scaler can find it
    recomputes: ClassVar[bool] = False  # b - A w has the rounding errors of the sum, r - A d only of a term

    def __post_init__(self) -> None:
        """The series has checked the settings. With one term, max_steps is 0."""

    def error(self, space: Space, x: State, r: State, norm: Numbers, before: Numbers, products: int) -> Numbers:
        """The remainder of the sum x + λ r, relative to it.

        With t = λ r the last term and q ≥ ‖B‖, the remainder B t + B² t + ... is at most ‖t‖ q / (1 - q). Without a
        bound q, the growth of the terms stands for it: only from the second product on, so that one unusual step does
        not end a series, and with a margin.
        """
        # Decision 29.
        lam, contraction = self.series.lam, self.series.contraction
        if contraction is not None:
            q = 1 - lam * (1 - contraction)
            rest = lam * q / (1 - q) * norm
        else:
            growth = ratio(norm, before, space)
            known = (growth < 1) & ((norm == 0) | (products > 1))
            growth = space.select(known, growth, space.xp.ones_like(growth))  # a remainder beyond all goals
            rest = MARGIN * lam * norm * growth / space.xp.maximum(1 - growth, space.xp.full_like(growth, space.eps**2))
        size = space.norm(space.axpy(lam, r, x))
        # Beside a sum that overflows any remainder would be small: infinity times zero is NaN, which reaches no goal.
        return ratio(rest, size + 0 * size, space)

    def goal(self, space: Space, x: State, growth: Numbers, size: Numbers, target: Numbers) -> Real:
        return self.series.rtol
