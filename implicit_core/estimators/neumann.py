"""The Neumann phantom gradient (Eq. 18)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

from .. import checks
from ..backend import PyTree
from ..registry import find_backend
from .base import AtFixedPoint, geometric_bound
from .series import summed

OPTIONS = ("rtol", "max_terms", "contraction")
"""Of ``k="auto"`` alone."""


@dataclass(frozen=True, repr=False)
class Neumann(AtFixedPoint):
    r"""The Neumann-series phantom gradient A^neu_{k,λ}, Eq. (18).

    .. math::
        A_{k,λ} = λ \frac{∂F}{∂z}\Big|_{h^*} (I + B + B² + … + B^{k-1}), \quad B = λ \frac{∂F}{∂h}\Big|_{h^*} + (1-λ) I

    F is linearized once, at the solver's point, which is also the value. A pullback costs k - 1 h-VJPs and one z-VJP.
    Its own derivatives are those of the k terms. By Theorem 2 it converges to the exact gradient; its error is at most
    ‖∂F/∂z‖ q^k / (1 - L_h), q = 1 - λ (1 - L_h).

    Parameters
    ----------
    k
        Terms of the series, at least 1; or ``"auto"``: in each sample as many as ``rtol`` asks for. A pullback then
        costs one h-VJP less than the sample with the most terms has, and one z-VJP; after each it is looked whether
        all have enough. Further derivatives are those of the exact gradient, to the same accuracy.
    lam
        λ in (0, 1]: a large one is more accurate, a small one better conditioned.
    rtol
        With ``k="auto"``: what is left out of the series, relative to its sum, sample by sample. Default 1e-3. Without
        ``contraction`` it is estimated from the last two terms, as of a geometric series: a component that hardly
        shows in v, and decays much slower than all the rest, is missed.
    contraction
        With ``k="auto"``: a bound of L_h, below 1, such as ``certify(...).to_dict()["contraction_high"]``. What is left
        out is then bounded, and not estimated.
    max_terms
        With ``k="auto"``: no sample takes more, default 200. Where one needed more, an
        :class:`InexactGradientWarning` names it.

    Raises
    ------
    TypeError, ValueError
        If k < 1, λ is not in (0, 1], or what goes with ``k="auto"`` is given beside a number of terms.

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
    >>> value, pullback = ic.Neumann(k="auto", lam=1.0, rtol=1e-3).vjp(problem, np.array([2.0]), np.array([1.0]))
    >>> pullback(np.array([1.0]))  # of which 2 is all
    array([1.99902344])
    """

    k: int | Literal["auto"] = 5
    lam: float = 0.5
    rtol: float | None = None
    max_terms: int | None = None
    contraction: float | None = None

    def __post_init__(self) -> None:
        automatic = isinstance(self.k, str) and self.k == "auto"
        given = {name: getattr(self, name) for name in OPTIONS if getattr(self, name) is not None}
        set_field = object.__setattr__
        if isinstance(self.k, str) and not automatic:
            raise ValueError(f"k must be a number of terms, or 'auto'; got {self.k!r}")
        if given and not automatic:
            raise ValueError(f"{' and '.join(given)} can only be given with k='auto'; got k={self.k!r}")
        set_field(self, "lam", checks.real("lam", self.lam, 0.0, 1.0, low_open=True))
        if automatic:
            set_field(self, "rtol", checks.real("rtol", given.get("rtol", 1e-3), 0.0, low_open=True))
            set_field(self, "max_terms", checks.integer("max_terms", given.get("max_terms", 200), 1))
            if self.contraction is not None:
                set_field(self, "contraction", checks.real("contraction", self.contraction, 0.0, 1.0, high_open=True))
        else:
            set_field(self, "k", checks.integer("k", self.k, 1))

    def __repr__(self) -> str:
        if self.k == "auto":
            bound = "" if self.contraction is None else f", contraction={self.contraction!r}"
            return f"Neumann(k='auto', lam={self.lam!r}, rtol={self.rtol!r}, max_terms={self.max_terms!r}{bound})"
        return f"Neumann(k={self.k!r}, lam={self.lam!r})"

    @property
    def exact(self) -> bool:
        """Whether it is the solution, to a tolerance: with k = "auto"."""
        return self.k == "auto"

    def inverse(self, jacobian: Callable[[PyTree], PyTree], v: PyTree, batch_ndim: int) -> PyTree:
        """λ (I + B + ... + B^{k-1}) v with B = λ J + (1 - λ) I (Eq. 18), by Horner's rule: w ← v + B w."""
        if self.k == "auto":
            return self._to_accuracy(jacobian, v, batch_ndim)
        backend, lam = find_backend(v, "v"), self.lam
        axpy = backend.axpy

        def term(w: PyTree) -> PyTree:
            return backend.map(lambda v, w, jw: axpy(lam, jw, axpy(1 - lam, w, v)), v, w, jacobian(w))

        w = backend.repeat(term, v, self.k - 1)
        return backend.map(lambda w: lam * w, w)

    def error_bound(self, contraction: Any) -> Any:
        """qᵏ / (1 - L_h) with q = 1 - λ (1 - L_h) (Theorem 2); NaN with k = "auto"."""
        if self.k == "auto":
            return contraction * float("nan")
        return geometric_bound(self.k, self.lam, contraction)

    def inverse_error(self, contraction: Any) -> Any:
        """With k = "auto" and a bound of L_h, ``rtol`` relative to the sum; where that is cut off at max_terms, qᵏ."""
        if self.contraction is None or self.rtol is None or self.max_terms is None:
            return contraction * float("nan")
        q = 1 - self.lam * (1 - self.contraction)
        accuracy = self.rtol / (1 - self.rtol) if self.rtol < 1 else float("inf")
        return max(accuracy, q**self.max_terms) + 0 * contraction

    def _to_accuracy(self, jacobian: Callable[[PyTree], PyTree], v: PyTree, batch_ndim: int) -> PyTree:
        rtol, max_terms = cast("float", self.rtol), cast("int", self.max_terms)
        q = None if self.contraction is None else 1 - self.lam * (1 - self.contraction)
        return summed(jacobian, v, batch_ndim, lam=self.lam, rtol=rtol, max_terms=max_terms, norm=q)
