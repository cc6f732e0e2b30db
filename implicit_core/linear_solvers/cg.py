"""Conjugate gradients."""

from dataclasses import dataclass
from typing import NamedTuple

from ..arrays import Mask, Numbers, Operator, State
from ..backend import Known
from ..space import Space
from .base import Best, Cycle, PreconditionedSolver, positive, ratio


class _Carry(NamedTuple):
    x: State
    best: Best | None
    r: State
    p: State
    product: Numbers
    growth: Numbers
    active: Mask
    products: int


@dataclass(frozen=True, kw_only=True, repr=False)
class CG(PreconditionedSolver):
    """Conjugate gradients, for a symmetric positive definite A: a symmetric ∂F/∂h with eigenvalues below one.

    For any other A it may break down or make no progress. It then reports that it did not converge.

    Parameters
    ----------
    rtol, atol, max_steps, check_every, check
        As for :class:`LinearSolver`.

    Raises
    ------
    TypeError, ValueError
        If a setting has a wrong type or is out of range.

    References
    ----------
    M. R. Hestenes and E. Stiefel, Methods of conjugate gradients for solving linear systems, J. Res. NBS 49 (1952).

    Examples
    --------
    >>> import numpy as np
    >>> import implicit_core as ic
    >>> a = np.array([[2.0, 1.0], [1.0, 3.0]])
    >>> ic.solve_linear(lambda x: a @ x, np.array([1.0, 2.0]), solver=ic.CG()).value.round(6)
    array([0.2, 0.6])
    """

    def preconditioned_cycle(
        self,
        space: Space,
        operator: Operator,
        precondition: Operator | None,
        r: State,
        norm: Numbers,
        target: Numbers,
        active: Mask,
    ) -> Cycle:
        """See :class:`LinearSolver`. M⁻¹ has to be symmetric positive definite; the cycle ends where it is not."""
        xp = space.xp

        def preconditioned(r: State) -> tuple[State, Numbers, Numbers]:
            """M⁻¹ r, ⟨r, M⁻¹ r⟩ and ⟨r, r⟩."""
            if precondition is None:
                squared = space.dot(r, r)
                return r, squared, squared
            y = precondition(r)
            return y, space.dot(r, y), space.dot(r, r)

        def body(c: _Carry, _: tuple[Known, ...]) -> _Carry:
            q = operator(c.p)
            curvature = space.dot(c.p, q)
            ok = c.active & (curvature != 0)
            alpha = ratio(c.product, curvature, space)
            x = space.where(ok, space.axpy(alpha, c.p, c.x), c.x)
            r = space.where(ok, space.axpy(-alpha, q, c.r), c.r)
            y, product, squared = preconditioned(r)
            p = space.where(ok, space.axpy(product / positive(c.product, space), c.p, y), c.p)
            seen = space.norm(q) / positive(space.norm(c.p), space)
            growth = space.select(ok, xp.maximum(c.growth, seen), c.growth)
            norm = xp.sqrt(squared)
            best = c.best and c.best.updated(self, space, x, norm, growth, ok)
            active = ok & (norm > target)
            if precondition is not None:
                active = active & (product > 0)
            return _Carry(x, best, r, p, product, growth, active, c.products + 1)

        p, product, _ = preconditioned(r)
        if precondition is not None:
            active = active & (product > 0)
        best = Best.of(self, space, norm)
        carry = _Carry(space.zeros(), best, r, p, product, space.full(0.0), active, 0)
        carry = space.backend.while_loop(lambda c: (c.active,), body, carry, self.max_steps, self.check_every)
        return carry.best.x if carry.best else carry.x, carry.products, carry.growth
