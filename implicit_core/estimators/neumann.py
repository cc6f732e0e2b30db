"""The Neumann phantom gradient (Eq. 18)."""

from dataclasses import dataclass, field
from typing import Any

from ..arrays import Count, Operator, Real, State
from ..records import is_array
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
        Terms of the series, at least 1: a number, or an array of integers that broadcasts to the batch, one for each
        sample.
    lam
        λ in (0, 1], likewise: a large one is more accurate, a small one better conditioned. The value has a derivative
        of zero in an array λ, the gradient has that of its terms.
    most
        The largest k, where k is an array that a framework traces. Samples with a larger one, or with none, become NaN.
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

    k: Count = 5
    lam: Real = 0.5
    most: int | None = field(default=None, kw_only=True, repr=False)
    on_growth: OnGrowth = field(default="warn", repr=False)

    def inverse(self, space: Space, jacobian: Operator, v: State) -> State:
        """λ (I + B + ... + B^{k-1}) v with B = λ J + (1 - λ) I (Eq. 18)."""
        if not self.growth.active:
            return space.scale(self.lam, self.series(space, jacobian, v, v, with_last=False)[0])
        total, last = self.series(space, jacobian, v, v)
        return space.scale(self.lam, self.growth.checked(space, v, last, total))

    def series(
        self, space: Space, jacobian: Operator, start: State, v: State, *, with_last: bool = True
    ) -> tuple[State, State]:
        """(I + B + ... + B^{k-1}) v by Horner's rule, w ← v + B w, and the last term, or v.

        ``start`` is v, the sum of one term.
        """
        lam, axpy, repeat, products = self.lam, space.axpy, space.backend.repeat, self.largest - 1

        def longer(w: State) -> State:
            return axpy(lam, jacobian(w), axpy(1 - lam, w, v))

        if isinstance(self.k, int):
            if not with_last:
                return repeat(longer, start, products), v
            before = repeat(longer, start, products - 1)
            total = repeat(longer, before, 1)
            return total, space.sub(total, before)  # they differ by the last term, B^{k-1} v
        left = space.xp.astype(self.k, space.xp.int32) - 1
        valid = self.valid(space)  # a factor, and no choice: JAX transposes the sum
        if is_array(valid):
            start, v = space.scale(valid, start), space.scale(valid, v)

        def longer_where_left(carry: tuple[State, State, Any]) -> tuple[State, State, Any]:
            w, last, left = carry
            longer_w = longer(w)
            w_new = space.where(left > 0, longer_w, w)
            last = space.where(left > 0, space.sub(longer_w, w), last) if with_last else last
            return w_new, last, left - 1

        total, last, _ = repeat(longer_where_left, (start, start, left), products)
        return total, last

    def error_bound(self, contraction: Factor) -> Factor:
        """qᵏ / (1 - L_h) with q = 1 - λ (1 - L_h) (Theorem 2)."""
        return geometric_bound(self.k, self.lam, contraction)
