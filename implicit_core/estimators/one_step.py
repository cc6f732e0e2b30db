"""The one-step, or Jacobian-free, gradient."""

from dataclasses import dataclass

from ..backend import PyTree
from ..problem import Problem
from .base import Estimator, Pullback
from .neumann import Neumann

_FIRST_TERM = Neumann(k=1, lam=1.0)


@dataclass(frozen=True)
class OneStep(Estimator):
    """The Jacobian-free gradient: A = ∂F/∂z at the solver's point, which is ``Neumann(1, 1)``.

    One z-VJP, and no VJP in h.

    References
    ----------
    S. Wu Fung et al., JFB: Jacobian-free backpropagation for implicit networks, AAAI 2022 (the paper's [5]).

    Examples
    --------
    >>> import numpy as np
    >>> import implicit_core as ic
    >>> problem = ic.Problem(lambda h, z: 0.5 * h + z, vjp=lambda h, z, v: (0.5 * v, v))
    >>> value, pullback = ic.OneStep().vjp(problem, np.array([2.0]), np.array([1.0]))
    >>> pullback(np.array([1.0]))
    array([1.])
    """

    def value(self, problem: Problem, h: PyTree, z: PyTree) -> PyTree:
        return h

    def vjp(self, problem: Problem, h: PyTree, z: PyTree) -> tuple[PyTree, Pullback]:
        return _FIRST_TERM.vjp(problem, h, z)

    def jvp(self, problem: Problem, h: PyTree, z: PyTree, dz: PyTree) -> tuple[PyTree, PyTree]:
        return _FIRST_TERM.jvp(problem, h, z, dz)
