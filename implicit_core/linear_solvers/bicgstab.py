"""Stabilized biconjugate gradients."""

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
    rho: Numbers
    growth: Numbers
    active: Mask
    products: int


@dataclass(frozen=True, kw_only=True, repr=False)
class BiCGSTAB(PreconditionedSolver):
    """BiCGSTAB, for any A, in the memory of a few states; two products with A in each step.

    Where a coefficient of the recurrence vanishes, the search direction restarts from the residual.

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
    H. A. van der Vorst, Bi-CGSTAB: a fast and smoothly converging variant of Bi-CG for the solution of nonsymmetric
    linear systems, SIAM J. Sci. Stat. Comput. 13 (1992).

    Examples
    --------
    >>> import numpy as np
    >>> import implicit_core as ic
    >>> a = np.array([[2.0, 1.0], [0.0, 4.0]])
    >>> ic.solve_linear(lambda x: a @ x, np.array([1.0, 2.0]), solver=ic.BiCGSTAB(rtol=1e-9)).value.round(6)
    array([0.25, 0.5 ])
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
        """See :class:`LinearSolver`. M⁻¹ stands to the right of A."""
        xp, shadow = space.xp, r

        def preconditioned(v: State) -> State:
            return v if precondition is None else precondition(v)

        def body(c: _Carry, _: tuple[Known, ...]) -> _Carry:
            p_hat = preconditioned(c.p)
            v = operator(p_hat)
            along = space.dot(shadow, v)
            alpha = ratio(c.rho, along, space)
            s = space.axpy(-alpha, v, c.r)
            s_hat = preconditioned(s)
            t = operator(s_hat)
            omega = ratio(space.dot(t, s), space.dot(t, t), space)
            x = space.axpy(omega, s_hat, space.axpy(alpha, p_hat, c.x))
            r = space.axpy(-omega, t, s)
            rho = space.dot(shadow, r)
            beta = ratio(rho, c.rho, space) * ratio(alpha, omega, space)
            p = space.axpy(beta, space.axpy(-omega, v, c.p), r)
            norm = space.norm(r)
            seen = space.norm(t) / positive(space.norm(s_hat), space)
            ok = c.active & (along != 0) & xp.isfinite(norm)
            growth = space.select(ok, xp.maximum(c.growth, seen), c.growth)
            return _Carry(
                space.where(ok, x, c.x),
                c.best and c.best.updated(self, space, x, norm, growth, ok),
                space.where(ok, r, c.r),
                space.where(ok, p, c.p),
                space.select(ok, rho, c.rho),
                growth,
                ok & (norm > target),
                c.products + 2,
            )

        best = Best.of(self, space, norm)
        carry = _Carry(space.zeros(), best, r, r, space.dot(r, r), space.full(0.0), active, 0)
        steps = self.max_steps // 2 if self.keeps_best else (self.max_steps + 1) // 2
        carry = space.backend.while_loop(lambda c: (c.active,), body, carry, steps, self.check_every)
        return carry.best.x if carry.best else carry.x, carry.products, carry.growth
