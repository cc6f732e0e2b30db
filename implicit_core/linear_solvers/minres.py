"""The minimal residual method."""

from dataclasses import dataclass
from typing import NamedTuple

from ..arrays import Mask, Numbers, Operator, State
from ..backend import Known
from ..space import Space
from .base import Best, Cycle, PreconditionedSolver, positive, ratio


class _Carry(NamedTuple):
    """One step of Lanczos' method, and of the rotations that reduce its tridiagonal matrix.

    Attributes
    ----------
    x, best, r
        The solution; the best one, where it is asked for; and the residual of x, None where the norm of it, ``rest``,
        is known without it.
    u_before, u, v
        The last two vectors that are M-orthogonal to all before, and M⁻¹ u. Not normalized.
    w_before, w
        The last two search directions.
    per_beta_before, beta, per_beta
        The lengths √⟨u, v⟩, and one over them.
    diagonal, above, cosine, sine
        What the last rotation left of the next column, and this rotation.
    rest
        The residual in the norm of M⁻¹.
    """

    x: State
    best: Best | None
    r: State | None
    u_before: State
    u: State
    v: State
    w_before: State
    w: State
    per_beta_before: Numbers
    beta: Numbers
    per_beta: Numbers
    diagonal: Numbers
    above: Numbers
    cosine: Numbers
    sine: Numbers
    rest: Numbers
    growth: Numbers
    active: Mask
    products: int


@dataclass(frozen=True, kw_only=True, repr=False)
class MINRES(PreconditionedSolver):
    """MINRES, for a symmetric A that may be indefinite: the least residual over the Krylov space, in a few states.

    A preconditioner has to be symmetric positive definite. It then minimizes the norm of the residual that belongs to
    M⁻¹; the stop test is on ‖b - A x‖₂ all the same.

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
    C. C. Paige and M. A. Saunders, Solution of sparse indefinite systems of linear equations, SIAM J. Numer. Anal. 12
    (1975).

    Examples
    --------
    >>> import numpy as np
    >>> import implicit_core as ic
    >>> a = np.array([[2.0, 1.0], [1.0, -3.0]])
    >>> ic.solve_linear(a, np.array([4.0, -5.0]), solver=ic.MINRES()).value.round(6)
    array([1., 2.])
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

        def measured(u: State) -> tuple[State, Numbers]:
            """M⁻¹ u and ⟨u, M⁻¹ u⟩."""
            v = u if precondition is None else precondition(u)
            return v, space.dot(u, v)

        def body(c: _Carry, _: tuple[Known, ...]) -> _Carry:
            v = space.scale(c.per_beta, c.v)
            image = operator(v)
            u = space.axpy(-c.beta * c.per_beta_before, c.u_before, image)
            alpha = space.dot(v, u)
            u = space.axpy(-alpha * c.per_beta, c.u, u)
            next_v, squared = measured(u)
            beta = xp.sqrt(xp.maximum(squared, xp.zeros_like(squared)))

            # The rotations before, and a new one that clears β.
            left = c.sine * c.diagonal - c.cosine * alpha
            middle = c.cosine * c.diagonal + c.sine * alpha
            length = xp.hypot(left, beta)
            ok = c.active & (length > 0) & xp.isfinite(length) & (squared >= 0)
            per_length, per_beta = ratio(one, length, space), ratio(one, beta, space)
            cosine, sine = left * per_length, beta * per_length
            w = space.axpy(-c.above, c.w_before, space.axpy(-middle, c.w, v))
            w = space.scale(per_length, w)
            x = space.where(ok, space.axpy(cosine * c.rest, w, c.x), c.x)
            rest, r = sine * c.rest, c.r
            if r is not None:
                r = space.axpy(-cosine * rest * per_beta, u, space.scale(sine * sine, r))
            error = rest if r is None else space.norm(r)
            # Not from α and β, which say how long A v is only if A is symmetric.
            seen = space.norm(image)
            if precondition is not None:  # without, v has the length 1
                seen = seen / positive(space.norm(v), space)
            growth = space.select(ok, xp.maximum(c.growth, seen), c.growth)
            going_on = ok & (error > target) & (beta > 0)
            return _Carry(
                x=x,
                best=c.best and c.best.updated(self, space, x, error, growth, ok),
                r=r,
                u_before=c.u,
                u=u,
                v=next_v,
                w_before=c.w,
                w=w,
                per_beta_before=c.per_beta,
                beta=beta,
                per_beta=per_beta,
                diagonal=-c.cosine * beta,
                above=c.sine * beta,
                cosine=cosine,
                sine=sine,
                rest=rest,
                growth=growth,
                active=going_on,
                products=c.products + 1,
            )

        one, nothing, zeros = space.full(1.0), space.full(0.0), space.zeros()
        v, squared = measured(r)
        beta = xp.sqrt(xp.maximum(squared, nothing))
        carry = _Carry(
            x=zeros,
            best=Best.of(self, space, norm),
            r=None if precondition is None else r,
            u_before=zeros,
            u=r,
            v=v,
            w_before=zeros,
            w=zeros,
            per_beta_before=nothing,
            beta=beta,
            per_beta=ratio(one, beta, space),
            diagonal=nothing,
            above=nothing,
            cosine=-one,
            sine=nothing,
            rest=beta,
            growth=nothing,
            active=active & (squared > 0),
            products=0,
        )
        carry = space.backend.while_loop(lambda c: (c.active,), body, carry, self.max_steps, self.check_every)
        return carry.best.x if carry.best else carry.x, carry.products, carry.growth
