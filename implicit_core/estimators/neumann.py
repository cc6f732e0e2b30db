"""The Neumann phantom gradient (Eq. 18)."""

from collections.abc import Callable
from dataclasses import dataclass

from .. import checks
from ..backend import PyTree
from ..registry import find_backend
from .base import AtFixedPoint


@dataclass(frozen=True)
class Neumann(AtFixedPoint):
    r"""The Neumann-series phantom gradient A^neu_{k,λ}, Eq. (18).

    .. math::
        A_{k,λ} = λ \frac{∂F}{∂z}\Big|_{h^*} (I + B + B² + … + B^{k-1}), \quad B = λ \frac{∂F}{∂h}\Big|_{h^*} + (1-λ) I

    F is linearized once, at the solver's point, which is also the value. A pullback costs k - 1 h-VJPs and one z-VJP.
    By Theorem 2 it converges to the exact gradient; its error is at most ‖∂F/∂z‖ q^k / (1 - L_h), q = 1 - λ (1 - L_h).

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

    def inverse(self, jacobian: Callable[[PyTree], PyTree], v: PyTree, batch_ndim: int) -> PyTree:
        """λ (I + B + ... + B^{k-1}) v with B = λ J + (1 - λ) I (Eq. 18), by Horner's rule: w ← v + B w."""
        backend, lam = find_backend(v, "v"), self.lam
        axpy = backend.axpy

        def term(w: PyTree) -> PyTree:
            return backend.map(lambda v, w, jw: axpy(lam, jw, axpy(1 - lam, w, v)), v, w, jacobian(w))

        w = backend.repeat(term, v, self.k - 1)
        return backend.map(lambda w: lam * w, w)
