"""The Neumann series of Eq. (15), summed in every sample until it is as accurate as was asked."""

from collections.abc import Callable
from typing import NamedTuple

from ..backend import Array, PyTree
from ..linear_solvers.base import ratio
from ..registry import find_backend
from ..solution import Status
from ..space import Space, State
from .inexact import report

MARGIN = 2.0
"""By how much what is left out is taken for larger than the last terms say: slow components show late."""
RECORDED = (
    "Neumann(k='auto') stops by what it finds, which it can't look at while a CUDA graph is captured: take a fixed k"
)


class _Carry(NamedTuple):
    total: State
    term: State
    size: Array
    growth: Array
    rest: Array
    active: Array


def summed(
    jacobian: Callable[[PyTree], PyTree],
    v: PyTree,
    batch_ndim: int,
    *,
    lam: float,
    rtol: float,
    max_terms: int,
    norm: float | None = None,
) -> PyTree:
    """λ (v + B v + B² v + ...), with as many terms in each sample as it needs.

    With t the last term and q a bound of ‖B‖, what is left out is at most ‖t‖ q / (1 - q). A sample ends once that is
    at most ``rtol`` of its sum. Without ``norm`` the growth of t over the term before stands for q, from the second
    product on, so that no accident of one step ends a series; the estimate is taken twice. k terms take k - 1 products.

    Warns
    -----
    InexactGradientWarning
        If a sample did not get there with ``max_terms`` terms. What was reached is used.
    """
    space = Space(find_backend(v, "v"), v, batch_ndim, "v")
    xp, backend = space.xp, space.backend
    b = space.pack(v)
    if backend.recorded(b[0]):
        raise NotImplementedError(RECORDED)
    space.spread_as(b)
    scale = space.magnitude(b)
    b = space.divide(b, scale)
    size = space.norm(b)
    finite = xp.isfinite(size)
    zero = xp.zeros_like(size)
    infinite = zero + float("inf")

    def body(c: _Carry) -> _Carry:
        product = space.pack(jacobian(space.unpack(c.term)))
        term = space.axpy(1 - lam, c.term, space.scale(lam, product))
        length = space.norm(term)
        growth = ratio(xp, length, c.size)
        total = space.where(c.active, space.add(c.total, term), c.total)
        rest = xp.where(c.active, ratio(xp, left_out(length, growth, c.growth), space.norm(total)), c.rest)
        active = c.active & xp.isfinite(length) & (rest > rtol)
        return _Carry(total, term, length, growth, rest, active)

    def left_out(length: Array, growth: Array, before: Array) -> Array:
        if norm is not None:
            return norm / (1 - norm) * length
        known = (growth < 1) & xp.isfinite(before)
        estimate = MARGIN * length * xp.where(known, growth / xp.where(known, 1 - growth, zero + 1), zero)
        return xp.where(known | (length == 0), estimate, infinite)

    carry = _Carry(b, b, size, infinite, infinite, finite & (size > 0))
    with backend.solving():
        carry = backend.while_loop(lambda c: xp.any(c.active), body, carry, max_terms - 1)
    # A sample without a cotangent has none to miss. One that is not finite goes on as NaN, to whoever looks for it.
    total = space.where(finite, carry.total, space.scale(float("nan"), b))
    done = (carry.rest <= rtol) | ~finite | (size == 0)
    status = xp.where(done, space.full(Status.CONVERGED, xp.int32), space.full(Status.MAX_STEPS, xp.int32))
    report(
        space,
        f"the Neumann series did not come to rtol={rtol:g} of its sum",
        f"Raise max_terms, which is {max_terms}, or try another lam: no sum unless the spectral radius of B is below 1",
        status,
        carry.rest,
    )
    return space.unpack(space.scale(lam * scale, total))
