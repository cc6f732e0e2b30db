"""The least-squares minimal residual method."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from ..arrays import Mask, Numbers, Operator, State
from ..backend import Known
from ..space import Space
from .base import FLOOR, Cycle, LinearSolver, largest_relative, ratio

NO_TRANSPOSE = (
    "LSMR needs products with Aᵀ: pass solve_linear(A, b, transposed=...), or A as a matrix, whose transpose is known. "
    "Implicit and NewtonKrylov, which have products with A alone, take GMRES"
)
NO_PRECONDITIONER = "LSMR takes no preconditioner: scale the unknowns, solve_linear(..., scale=...)"


@dataclass(frozen=True)
class Transposable:
    """Products with A, and with Aᵀ."""

    product: Operator
    transposed: Operator

    def __call__(self, x: State) -> State:
        return self.product(x)


class _Carry(NamedTuple):
    """One step of Golub and Kahan's bidiagonalization, and of the two QR factorizations.

    Attributes
    ----------
    x
        The solution.
    u, v, h, h_bar
        The last two vectors of unit length, and the search directions.
    alpha, alpha_bar, rho, rho_bar, c_bar, s_bar, zeta_bar
        As in the paper; |ζ̄| is ‖Aᵀr‖.
    rest
        The least residual ‖r‖ over the Krylov space, which that of x is close to.
    growth
        The largest ‖A v‖.
    """

    x: State
    u: State
    v: State
    h: State
    h_bar: State
    alpha: Numbers
    alpha_bar: Numbers
    rho: Numbers
    rho_bar: Numbers
    c_bar: Numbers
    s_bar: Numbers
    zeta_bar: Numbers
    rest: Numbers
    growth: Numbers
    active: Mask
    products: int


@dataclass(frozen=True, kw_only=True, repr=False)
class LSMR(LinearSolver):
    """LSMR, for any A, singular or not: the least squares of b - A x, and of all such x the shortest one.

    It takes products with Aᵀ as well, two products a step, and holds a few states. As it does not see A itself but
    AᵀA, it needs more steps than GMRES where A is regular and well conditioned.

    A sample is CONVERGED where the residual r = b - A x is within the tolerance, as for :class:`LinearSolver`, or where
    x is a solution in the sense of least squares: ‖Aᵀr‖ ≤ rtol ‖A‖ ‖r‖, or at the level of rounding errors. Both are
    computed from x. ``stats.residual`` is ‖r‖ and tells which. Singular values below rtol ‖A‖ count as zero. With x0
    the solution is the one closest to x0, unless the residual of x0 is not below ‖b‖: then x0 is not used.

    Parameters
    ----------
    rtol, atol, max_steps, check_every, check
        As for :class:`LinearSolver`; products with Aᵀ count too.

    Raises
    ------
    TypeError, ValueError
        If a setting has a wrong type or is out of range.

    References
    ----------
    D. C.-L. Fong and M. Saunders, LSMR: an iterative algorithm for sparse least-squares problems, SIAM J. Sci. Comput.
    33 (2011).

    Examples
    --------
    >>> import numpy as np
    >>> import implicit_core as ic
    >>> a = np.array([[1.0, 1.0], [1.0, 1.0]])  # singular
    >>> ic.solve_linear(a, np.array([3.0, 1.0]), solver=ic.LSMR()).value.round(6)
    array([1., 1.])
    """

    uses_transpose: ClassVar[bool] = True

    def cycle(self, space: Space, operator: Operator, r: State, norm: Numbers, target: Numbers, active: Mask) -> Cycle:
        """See :class:`LinearSolver`."""
        if not isinstance(operator, Transposable):
            raise TypeError(NO_TRANSPOSE)
        xp = space.xp

        def unit(x: State) -> tuple[State, Numbers]:
            length = space.norm(x)
            return space.scale(ratio(one, length, space), x), length

        def body(c: _Carry, _: tuple[Known, ...]) -> _Carry:
            u, beta = unit(space.axpy(-c.alpha, c.u, product(c.v)))
            v, alpha = unit(space.axpy(-beta, c.v, transposed(u)))
            rho, zero = xp.hypot(c.alpha_bar, beta), xp.zeros_like(beta)
            cosine, sine = ratio(c.alpha_bar, rho, space), ratio(beta, rho, space)
            theta = sine * alpha
            rho_bar = xp.hypot(c.c_bar * rho, theta)
            c_bar, s_bar = ratio(c.c_bar * rho, rho_bar, space), ratio(theta, rho_bar, space)
            ok = c.active & (rho > 0) & (rho_bar > 0) & xp.isfinite(rho_bar)
            back = ratio(c.s_bar * rho * rho, c.rho * c.rho_bar, space)
            h_bar = space.axpy(-back, c.h_bar, c.h)
            step = ratio(c_bar * c.zeta_bar, rho * rho_bar, space)
            x = space.where(ok, space.axpy(step, h_bar, c.x), c.x)
            zeta_bar, rest = -s_bar * c.zeta_bar, sine * c.rest
            growth = space.select(ok, xp.maximum(c.growth, xp.hypot(c.alpha, beta)), c.growth)
            going_on = ok & (rest > target) & (xp.abs(zeta_bar) > self.rtol / 2 * growth * rest) & (alpha > zero)
            return _Carry(
                x=x,
                u=u,
                v=v,
                h=space.axpy(-ratio(theta, rho, space), c.h, v),
                h_bar=h_bar,
                alpha=alpha,
                alpha_bar=cosine * alpha,
                rho=rho,
                rho_bar=rho_bar,
                c_bar=c_bar,
                s_bar=s_bar,
                zeta_bar=zeta_bar,
                rest=rest,
                growth=growth,
                active=going_on,
                products=c.products + 2,
            )

        one, nothing, zeros = space.full(1.0), space.full(0.0), space.zeros()
        u, beta = unit(r)
        # Products of four numbers as large as A: these are of A in units of its own size, if that is far from one.
        along = operator.transposed(u)
        units = space.magnitude(along)
        units = space.select(space.out_of_range(units * units), units, one)

        def product(x: State) -> State:
            return space.divide(operator(x), units)

        def transposed(x: State) -> State:
            return space.divide(operator.transposed(x), units)

        v, alpha = unit(space.divide(along, units))
        carry = _Carry(
            x=zeros,
            u=u,
            v=v,
            h=v,
            h_bar=zeros,
            alpha=alpha,
            alpha_bar=alpha,
            rho=one,
            rho_bar=one,
            c_bar=one,
            s_bar=nothing,
            zeta_bar=alpha * beta,
            rest=beta,
            growth=alpha,
            active=active & (alpha > 0),
            products=1,
        )
        steps = (self.max_steps + 1) // 2
        carry = space.backend.while_loop(lambda c: (c.active,), body, carry, steps, self.check_every)
        # Aᵀr of x, and of zero, where x may be nothing but the rounding errors of Aᵀr.
        at_zero = self._is_least(space, norm * alpha, norm, zeros, norm, carry.growth)
        x = space.where(at_zero, zeros, carry.x)
        rest = space.sub(r, product(x))
        least = self._is_least(space, space.norm(transposed(rest)), space.norm(rest), x, norm, carry.growth)
        return space.divide(x, units), carry.products + 2, units * carry.growth, least

    def _is_least(
        self, space: Space, gradient: Numbers, rest: Numbers, x: State, size: Numbers, growth: Numbers
    ) -> Mask:
        """Where ‖Aᵀr‖ vanishes, as far as the tolerance or rounding errors of r go; ``rest`` is ‖r‖."""
        xp, eps = space.xp, space.coarsest_eps
        rounding = FLOOR * eps * (growth * space.norm(x) + size)
        allowed = xp.maximum(self.rtol * rest, xp.minimum(rounding, largest_relative(eps) * rest))
        least: Mask = gradient <= growth * allowed
        return least

    def preconditioned_cycle(self, *_: object) -> Cycle:
        """LSMR would need products with M⁻ᵀ, too."""
        raise TypeError(NO_PRECONDITIONER)
