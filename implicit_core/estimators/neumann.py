"""The Neumann phantom gradient (Eq. 18)."""

from dataclasses import dataclass

from .. import checks
from ..arrays import Operator, State
from ..space import Space
from .base import AtFixedPoint, Factor, geometric_bound


@dataclass(frozen=True)
class Neumann(AtFixedPoint):
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
        λ in (0, 1]: a large one is more accurate, a small one better conditioned.

    Raises
    ------
    TypeError, ValueError
        If k < 1 or λ is not in (0, 1].

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
    lam: float = 0.5

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", checks.integer("k", self.k, 1))
        object.__setattr__(self, "lam", checks.real("lam", self.lam, 0.0, 1.0, low_open=True))

    def inverse(self, space: Space, jacobian: Operator, v: State) -> State:
        """λ (I + B + ... + B^{k-1}) v with B = λ J + (1 - λ) I (Eq. 18), by Horner's rule: w ← v + B w."""
        lam, axpy = self.lam, space.axpy
        w = space.backend.repeat(lambda w: axpy(lam, jacobian(w), axpy(1 - lam, w, v)), v, self.k - 1)
        return space.scale(lam, w)

    def error_bound(self, contraction: Factor) -> Factor:
        """qᵏ / (1 - L_h) with q = 1 - λ (1 - L_h) (Theorem 2)."""
        return geometric_bound(self.k, self.lam, contraction)
