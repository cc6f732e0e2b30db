"""The unrolled phantom gradient (Eq. 17)."""

from dataclasses import dataclass
from typing import Any

from .. import checks
from ..backend import Backend, PyTree
from ..problem import BoundLinearization, Problem
from .base import Estimator, Pullback, bind, check_cotangent, check_tangent, geometric_bound


@dataclass(frozen=True)
class Unroll(Estimator):
    r"""The unrolling-based phantom gradient A^unr_{k,λ}, Eq. (17).

    .. math::
        A_{k,λ} = λ \sum_{t=0}^{k-1} \frac{∂F}{∂z}\Big|_{h_t} \prod_{s=t+1}^{k-1}
        \left(λ \frac{∂F}{∂h}\Big|_{h_s} + (1-λ) I\right)

    The derivative of k damped steps (Eq. 13) from the solver's point h_0, which is taken as a constant; the value is
    h_k. An inaccurate solve then behaves as backpropagation through time on k steps. A value costs k evaluations of F,
    a pullback k - 1 h-VJPs and k z-VJPs.

    Parameters
    ----------
    k
        Steps, at least 1.
    lam
        λ in (0, 1].
    recompute
        Hold the k states only, and linearize F anew in the pullback: k more evaluations, one linearization at a time.

    Raises
    ------
    TypeError, ValueError
        If k < 1 or λ is not in (0, 1].

    References
    ----------
    Z. Geng et al., On training implicit models, NeurIPS 2021: Eq. 13, 14 and 17, Theorem 2.

    Examples
    --------
    >>> import numpy as np
    >>> import implicit_core as ic
    >>> problem = ic.Problem(lambda h, z: 0.5 * h + z, vjp=lambda h, z, v: (0.5 * v, v))
    >>> value, pullback = ic.Unroll(k=2, lam=1.0).vjp(problem, np.array([0.0]), np.array([1.0]))
    >>> value, pullback(np.array([1.0]))
    (array([1.5]), array([1.5]))
    """

    k: int = 5
    lam: float = 0.5
    recompute: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", checks.integer("k", self.k, 1))
        object.__setattr__(self, "lam", checks.real("lam", self.lam, 0.0, 1.0, low_open=True))
        checks.instance("recompute", self.recompute, bool, "True")

    def value(self, problem: Problem, h: PyTree, z: PyTree) -> PyTree:
        backend = bind(problem, h)
        with backend.beside(h):
            return backend.repeat(lambda h: _step(backend, self.lam, problem.f(h, z), h), h, self.k)

    def vjp(self, problem: Problem, h: PyTree, z: PyTree) -> tuple[PyTree, Pullback]:
        return unrolled_vjp(problem, h, z, self.k, self.lam, recompute=self.recompute)

    def jvp(self, problem: Problem, h: PyTree, z: PyTree, dz: PyTree) -> tuple[PyTree, PyTree]:
        return unrolled_jvp(problem, h, z, dz, self.k, self.lam)

    def error_bound(self, contraction: Any) -> Any:
        """qᵏ / (1 - L_h) with q = 1 - λ (1 - L_h), from a fixed point on (Theorem 2)."""
        return geometric_bound(self.k, self.lam, contraction)


def unrolled_vjp(
    problem: Problem, h: PyTree, z: PyTree, k: int, lam: float, *, recompute: bool
) -> tuple[PyTree, Pullback]:
    """h_k of Eq. (13) and the pullback of Eq. (17): backwards, z̄ += λ (∂F/∂z)ᵀ g and g ← B_tᵀ g."""
    backend = bind(problem, h)
    h_0 = h
    steps: list[Any] = []
    with backend.beside(h):
        for _ in range(k):
            at = problem.linearize(h, z).require("vjp_h", "vjp_z")
            steps.append(h if recompute else at)
            h = _step(backend, lam, at.value, h)

    def linearization(t: int) -> BoundLinearization:
        return problem.linearize(steps[t], z) if recompute else steps[t]

    def pullback(h_bar: PyTree) -> PyTree:
        check_cotangent(backend, h_bar, h_0)
        g, z_bar = h_bar, None
        with backend.beside(h_0):
            for t in reversed(range(1, k)):
                g_h, g_z = linearization(t).vjp(backend.map(lambda g: lam * g, g))
                z_bar = _add(backend, z_bar, g_z)
                g = backend.map(lambda g_h, g: backend.axpy(1 - lam, g, g_h), g_h, g)
            return _add(backend, z_bar, linearization(0).vjp_z(backend.map(lambda g: lam * g, g)))

    return h, pullback


def unrolled_jvp(problem: Problem, h: PyTree, z: PyTree, dz: PyTree, k: int, lam: float) -> tuple[PyTree, PyTree]:
    """h_k of Eq. (13) and its tangent: forwards, t ← B_t t + λ (∂F/∂z) dz, from t = 0."""
    backend = bind(problem, h)
    check_tangent(backend, dz, z)
    tangent = None
    with backend.beside(h):
        for _ in range(k):
            at = problem.linearize(h, z).require("jvp_h", "jvp_z")
            df = at.jvp_z(dz) if tangent is None else at.jvp(tangent, dz)
            tangent = backend.map(lambda a: lam * a, df) if tangent is None else _step(backend, lam, df, tangent)
            h = _step(backend, lam, at.value, h)
    return h, tangent


def _step(backend: Backend, lam: float, f: PyTree, h: PyTree) -> PyTree:
    """λ f + (1 - λ) h (Eq. 13)."""
    if lam == 1.0:
        return backend.map(backend.fresh, f)
    return backend.map(lambda f, h: backend.axpy(lam, f, (1 - lam) * h), f, h)


def _add(backend: Backend, total: PyTree, term: PyTree) -> PyTree:
    """The sum of two cotangents of z, in which None stands for no gradient."""
    terms, structure = backend.flatten_with_none(term)
    if total is None:
        return backend.unflatten(structure, [backend.fresh(a) if backend.is_array(a) else a for a in terms])
    totals, _ = backend.flatten_with_none(total)
    sums = [a if b is None else b if a is None else a + b for a, b in zip(totals, terms, strict=True)]
    return backend.unflatten(structure, sums)
