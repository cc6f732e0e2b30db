"""The one-step, or Jacobian-free, gradient."""

from dataclasses import dataclass

from ..arrays import Operator, State
from ..space import Space
from .base import AtFixedPoint, Factor, geometric_bound


@dataclass(frozen=True)
class OneStep(AtFixedPoint):
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

    def inverse(self, space: Space, jacobian: Operator, v: State) -> State:
        """``v``: D is the identity."""
        return v

    def error_bound(self, contraction: Factor) -> Factor:
        """L_h / (1 - L_h) (Theorem 2)."""
        return geometric_bound(1, 1.0, contraction)
