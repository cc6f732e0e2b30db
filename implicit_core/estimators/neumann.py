"""The Neumann phantom gradient (Eq. 18)."""

from dataclasses import dataclass, field

from ..arrays import Operator, Real, State
from ..space import Space
from .base import AtFixedPoint, Factor, geometric_bound
from .growth import OnGrowth, Terms


@dataclass(frozen=True, repr=False)
class Neumann(Terms, AtFixedPoint):
    r"""The Neumann-series phantom gradient A^neu_{k,λ}, Eq. (18).

    .. math::
        A_{k,λ} = λ \frac{∂F}{∂z}\Big|_{h^*} (I + B + B² + … + B^{k-1}), \quad B = λ \frac{∂F}{∂h}\Big|_{h^*} + (1-λ) I

    F is linearized once, at the solver's point, which is also the value. A pullback costs k - 1 h-VJPs and one z-VJP.
    Second derivatives differentiate the k terms. By Theorem 2 A converges to the exact gradient; its error is at most
    ‖∂F/∂z‖ q^k / (1 - L_h), q = 1 - λ (1 - L_h). :class:`NeumannSeries` takes as many terms as an accuracy requires.

    Parameters
    ----------
    k
        Terms of the series, at least 1.
    lam
        λ in (0, 1]: a large one is more accurate, a small one better conditioned. The value has a derivative of zero
        in an array λ, the gradient has that of its terms.
    on_growth
        What to do with samples whose terms grow, so that A is no estimate: ``"warn"`` with a
        :class:`GrowingGradientWarning`, make their part of the gradient ``"nan"``, or ``"ignore"`` it. The last term is
        compared with the first. Code that a framework traces cannot warn: there ``"warn"`` does nothing, and ``"nan"``
        works everywhere.

    Raises
    ------
    TypeError, ValueError
        If k < 1, λ is not in (0, 1], or on_growth is none of the three.

    References
    ----------
    Z. Geng et al., On training implicit models, NeurIPS 2021: Eq. 15 and 18, Theorem 2.

    Examples
    --------
    >>> import numpy as np
    >>> import implicit_core as ic
    >>> problem = ic.Problem(lambda h, z: 0.5 * h + z, vjp=lambda h, z, v: (0.5 * v, v))
    >>> value, pullback = ic.Neumann(k=3, lam=1.0).vjp(problem, np.array([2.0]), np.array([1.0]))
    >>> pullback(np.array([1.0]))  # 1 + 1/2 + 1/4
    array([1.75])
    """

    k: int = 5
    lam: Real = 0.5
    on_growth: OnGrowth = field(default="warn", repr=False)

    def inverse(self, space: Space, jacobian: Operator, v: State) -> State:
        """λ (I + B + ... + B^{k-1}) v with B = λ J + (1 - λ) I (Eq. 18)."""
        if not self.growth.active:
            return space.scale(self.lam, self.sum_of_terms(space, jacobian, v, v, self.k - 1))
        before = self.sum_of_terms(space, jacobian, v, v, self.k - 2)
        w = self.sum_of_terms(space, jacobian, before, v, 1)
        # The last two sums differ by the last term, B^{k-1} v.
        return space.scale(self.lam, self.growth.checked(space, v, space.sub(w, before), w))

    def sum_of_terms(self, space: Space, jacobian: Operator, w: State, v: State, products: int) -> State:
        """``products`` steps of Horner's rule from w on: w ← v + B w."""
        lam, axpy = self.lam, space.axpy
        return space.backend.repeat(lambda w: axpy(lam, jacobian(w), axpy(1 - lam, w, v)), w, products)

    def error_bound(self, contraction: Factor) -> Factor:
        """qᵏ / (1 - L_h) with q = 1 - λ (1 - L_h) (Theorem 2)."""
        return geometric_bound(self.k, self.lam, contraction)
