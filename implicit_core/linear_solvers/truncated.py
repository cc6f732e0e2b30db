"""A linear system solved as far as a number of products goes, for a gradient that is truncated on purpose."""

import math
from typing import Any, NamedTuple

from .. import settings
from ..arrays import Mask, Numbers, Operator, State
from ..backend import Known
from ..space import Space
from .base import RECORDED, LinearSolver, measured_growth, out_of_range, relative, start


class Truncated(NamedTuple):
    """The iterate with the least residual.

    Attributes
    ----------
    x
        The iterate, NaN in samples in which it, b, or every product that was measured, is not finite.
    relative
        ‖b - A x‖₂ / ‖b‖₂ for each sample, (N, 1): zero where b is zero, and NaN where x is.
    products
        Products with A, each for the whole batch.
    """

    x: State
    relative: Numbers
    products: int


class _Carry(NamedTuple):
    """The iterate that the next cycle starts from, its residual, and the best one of those that were measured."""

    x: State
    r: State
    norm: Numbers
    best: State
    least: Numbers
    growth: Numbers
    active: Mask
    products: int


def truncated(
    solver: LinearSolver,
    space: Space,
    operator: Operator,
    b: State,
    *,
    x0: State | None = None,
    precondition: Operator | None = None,
) -> Truncated:
    """The iterate with the least residual of A x = b that ``solver.max_steps`` products lead to.

    Within a cycle a method compares its iterates by its own recurrence. Each cycle leaves one product for the residual
    b - A x of the best one, so the residual of the result is always measured. Where a cycle that starts at zero does
    not reduce the residual of a sample, x = b is measured there, or M⁻¹ b: zero would be a gradient that does not
    train.

    Whether A couples samples is not examined, which would need products. Residuals are those of the coupled system.

    Parameters
    ----------
    solver
        The linear solver. ``max_steps`` counts all products.
    space, operator, b, precondition
        As for :meth:`LinearSolver.run`.
    x0
        Likewise. It is not used if there is one product alone.
    """
    backend = space.backend
    if backend.capturing(b[0]):
        raise NotImplementedError(RECORDED)
    solver = settings.bound(solver, space, constant=True)
    most = solver.max_steps
    b, scale, size, target = solver.in_range(space, settings.with_settings(space, solver, b), solver.rtol)
    first = b
    if precondition is not None:
        first = precondition(b)
        first = space.where(space.largest(first) < math.inf, first, b)
    to_measure = int(solver.loops) + 1  # products of the shortest cycle, and one for its residual

    def begin(c: _Carry, _: tuple[Known, ...]) -> _Carry:
        assert x0 is not None
        x, r, norm = start(space, operator, b, size, space.divide(x0, scale))
        usable = norm < size
        room = c.products + 1 + to_measure <= most
        return c._replace(
            x=x,
            r=r,
            norm=norm,
            best=x,  # zero where it is not usable, until a product was measured
            least=space.select(usable, norm, c.least),
            active=c.active & (~usable | ((norm > target) & room)),
            products=c.products + 1,
        )

    def body(c: _Carry, _: tuple[Known, ...]) -> _Carry:
        known: list[Any]
        limited = solver.within(most - c.products - 1)
        if precondition is None:
            d, used, *known = limited.cycle(space, operator, c.r, c.norm, target / 2, c.active)
        else:
            d, used, *known = limited.preconditioned_cycle(
                space, operator, precondition, c.r, c.norm, target / 2, c.active
            )
        x = space.where(c.active & (space.largest(d) < math.inf), space.add(c.x, d), c.x)
        nothing = space.largest(x) == 0
        x = space.where(nothing, first, x)
        r = space.sub(b, operator(x))
        norm, products = space.norm(r), c.products + used + 1
        growth = c.growth
        if solver.measures(c.products):
            seen = known[0] if known else measured_growth(space, space.sub(x, c.x), space.sub(c.r, r), x)
            growth = space.select(c.active & (seen > growth) & (seen < math.inf), seen, growth)
        falls = norm < c.norm if solver.monotone else norm < math.inf
        accept = c.active & (falls | (nothing & (norm < math.inf)))
        # A large x has a large rounding error in its residual, which may be the smaller one by accident.
        bound = solver.bound_of_residual(space, norm, growth, space.norm(x))
        better = c.active & (bound < solver.bound_of_residual(space, c.least, growth, space.norm(c.best)))
        going_on = norm > solver.goal(space, x, growth, size, target)
        return _Carry(
            x=space.where(accept, x, c.x),
            r=space.where(accept, r, c.r),
            norm=space.select(accept, norm, c.norm),
            best=space.where(better, x, c.best),
            least=space.select(better, norm, c.least),
            growth=growth,
            active=accept & going_on & (products + to_measure <= most),
            products=products,
        )

    active = (size > 0) & (size < math.inf)
    least = space.select(active, space.full(math.inf), size)
    carry = _Carry(space.zeros(), b, size, first, least, space.full(0.0), active, 0)
    if x0 is not None:
        carry = backend.while_loop(lambda c: (c.active,), begin, carry, settings.within(space, most - 1, 0, 1))
    check_every = 1 if solver.loops else solver.check_every
    carry = backend.while_loop(lambda c: (c.active,), body, carry, most - carry.products, check_every)
    x = space.scale(scale, carry.best)
    invalid = ~(carry.least < math.inf) | out_of_range(space, x)  # where no product was finite, least is infinite
    x = State(tuple(space.filled(a, invalid, math.nan) for a in x))
    return Truncated(x, space.blanked(relative(space, carry.least, size), invalid), carry.products)
