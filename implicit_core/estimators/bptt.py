"""Backpropagation through plain fixed-point iteration (Eq. 11), the baseline."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

from ..arrays import Count, H, Z
from ..problem import Problem
from .base import Estimator
from .growth import OnGrowth, Terms
from .unroll import Unroll


@dataclass(frozen=True, repr=False)
class BPTT(Terms, Estimator):
    """The derivative of k undamped steps (Eq. 10 and 11), the baseline that implicit differentiation replaces.

    In :func:`fixed_point` it replaces the solve: the k steps start at ``h0``, which gets no gradient. All k
    linearizations are held.

    Parameters
    ----------
    k
        Steps, at least 1: a number, or an array of integers that broadcasts to the batch, one for each sample.
    most
        The largest k, where k is an array that a framework traces. Samples with a larger one, or with none, become NaN.
    on_growth
        As for :class:`Unroll`. A cotangent that grows says that the k steps have not forgotten their start, so that
        their derivative does not approximate the derivative of a fixed point.

    Raises
    ------
    TypeError, ValueError
        If k < 1, or on_growth is none of the three.

    References
    ----------
    Z. Geng et al., On training implicit models, NeurIPS 2021: Eq. 10 and 11.

    Examples
    --------
    >>> import numpy as np
    >>> import implicit_core as ic
    >>> problem = ic.Problem(lambda h, z: 0.5 * h + z, vjp=lambda h, z, v: (0.5 * v, v))
    >>> value, pullback = ic.BPTT(k=2).vjp(problem, np.array([0.0]), np.array([1.0]))
    >>> value, pullback(np.array([1.0]))
    (array([1.5]), array([1.5]))
    """

    k: Count = 30
    most: int | None = field(default=None, kw_only=True, repr=False)
    on_growth: OnGrowth = field(default="warn", repr=False)
    lam = 1.0  # no setting, so no field: the steps are undamped

    starts_from_h0: ClassVar[bool] = True

    def value(self, problem: Problem[H, Z], h: H, z: Z) -> H:
        return self.unrolled.value(problem, h, z)

    def vjp(self, problem: Problem[H, Z], h: H, z: Z) -> tuple[H, Callable[[H], Z]]:
        return self.unrolled.vjp_with(self.growth, problem, h, z)

    def jvp(self, problem: Problem[H, Z], h: H, z: Z, dz: Z) -> tuple[H, H]:
        return self.unrolled.jvp(problem, h, z, dz)

    @property
    def unrolled(self) -> Unroll:
        """The same steps, from a point that is given."""
        return Unroll(self.k, 1.0, most=self.most)
