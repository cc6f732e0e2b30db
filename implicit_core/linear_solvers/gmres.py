"""Restarted GMRES."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from .. import checks
from ..backend import Array
from ..space import History, Operator, Space, State
from .base import Cycle, LinearSolver, ratio


class _Carry(NamedTuple):
    v: State
    basis: History
    triangle: Array
    rotations: Array
    used: Array
    active: Array
    index: Any


@dataclass(frozen=True, kw_only=True)
class GMRES(LinearSolver):
    """GMRES, for any regular A: the least residual over the Krylov space, restarted.

    Each sample has its own Krylov space and stops by itself. The basis is orthogonalized by classical Gram-Schmidt
    twice, which is as good as modified Gram-Schmidt and made of matrix products; the rotations that reduce the
    Hessenberg matrix are kept multiplied out, so that a step costs the same number of operations at any index.

    Parameters
    ----------
    restart
        Dimension of the Krylov space; restart + 1 states are held.
    rtol, atol, max_steps, check_every
        As for :class:`LinearSolver`.

    Raises
    ------
    TypeError, ValueError
        If a setting is of a wrong kind or out of range.

    References
    ----------
    Y. Saad and M. H. Schultz, GMRES: a generalized minimal residual algorithm for solving nonsymmetric linear systems,
    SIAM J. Sci. Stat. Comput. 7 (1986).

    Examples
    --------
    >>> import numpy as np
    >>> import implicit_core as ic
    >>> a = np.array([[2.0, 1.0], [0.0, 4.0]])
    >>> ic.solve_linear(lambda x: a @ x, np.array([1.0, 2.0]), solver=ic.GMRES(rtol=1e-9)).value.round(6)
    array([0.25, 0.5 ])
    """

    restart: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "restart", checks.integer("restart", self.restart, 1))

    def cycle(self, space: Space, operator: Operator, r: State, norm: Array, target: Array, active: Array) -> Cycle:
        xp, backend = space.xp, space.backend
        steps = min(self.restart, self.max_steps)
        size = steps + 1
        identity = space.eye(size)
        indices = xp.arange(size, device=space.device)
        tiny = float(backend.finfo(space.dtype).smallest_normal)

        def body(c: _Carry) -> _Carry:
            j = c.index
            row = space.row(operator(c.v))
            first = space.products(row, c.basis)
            row = space.combine_onto(row, -first, c.basis)
            second = space.products(row, c.basis)
            w = space.state(space.combine_onto(row, -second, c.basis))
            height = space.norm(w)

            # Column j of the Hessenberg matrix, under the rotations so far; a new rotation clears its last entry.
            column = (first + second)[:, 0, :] + height * identity[j + 1, :]
            column = backend.products(column[:, None, :], c.rotations)[:, 0, :]
            diagonal = xp.hypot(column[:, j][:, None], height)
            ok = c.active & (diagonal > tiny) & xp.isfinite(diagonal)
            cosine, sine = ratio(xp, column[:, j][:, None], diagonal), ratio(xp, height, diagonal)
            upper, lower = c.rotations[:, j, :], c.rotations[:, j + 1, :]
            new_upper = xp.where(ok, cosine * upper + sine * lower, upper)
            new_lower = xp.where(ok, cosine * lower - sine * upper, lower)
            rotations = backend.set_row(backend.set_row(c.rotations, j, new_upper), j + 1, new_lower)

            above = xp.astype(indices < j, space.dtype)
            new = xp.where(ok, column * above + diagonal * identity[j, :], identity[j, :])
            triangle = backend.set_row(c.triangle, j, new)
            used = c.used + xp.astype(ok, space.dtype) * identity[j, :]

            v = space.scale(ratio(xp, xp.ones_like(height), height), w)
            basis = space.set_row(c.basis, j + 1, v)
            estimate = norm * xp.abs(new_lower[:, 0][:, None])
            return _Carry(v, basis, triangle, rotations, used, ok & (estimate > target), j + 1)

        v = space.scale(ratio(xp, xp.ones_like(norm), norm), r)
        carry = _Carry(
            v,
            space.set_row(space.history(size), 0, v),
            space.matrices(size, size) + identity,
            space.matrices(size, size) + identity,
            space.matrices(1, size)[:, 0, :],
            active,
            0,
        )
        carry = backend.while_loop(lambda c: xp.any(c.active), body, carry, steps, self.check_every)
        rhs = norm * carry.rotations[:, :, 0] * carry.used
        weights = backend.solve_rows(carry.triangle, rhs[:, None, :])
        return space.state(space.combine(weights, carry.basis)), carry.index
