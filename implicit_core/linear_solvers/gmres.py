"""Restarted GMRES."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from .. import checks, settings
from ..arrays import Array, History, Index, Mask, Matrices, Numbers, Operator, State
from ..backend import Known
from ..records import is_array
from ..space import Space
from .arnoldi import ArnoldiStep, arnoldi_step, unit
from .base import Cycle, PreconditionedSolver, positive, ratio

RESTART = 20
"""Dimension of the Krylov space, where none is given."""


@dataclass(frozen=True, kw_only=True, repr=False)
class GMRES(PreconditionedSolver):
    """GMRES, for any regular A: the least residual over the Krylov space, restarted.

    Each sample has its own Krylov space and its own stop test.

    Parameters
    ----------
    restart
        Dimension of the Krylov space, at most that of a sample's state; restart + 1 states are held. None for 20, and
        for no restart within the ``products`` of :class:`Implicit`.
    rtol, atol, max_steps, check_every, check
        As for :class:`LinearSolver`.

    Raises
    ------
    TypeError, ValueError
        If a setting has a wrong type or is out of range.

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

    restart: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.restart is not None:
            object.__setattr__(self, "restart", checks.integer("restart", self.restart, 1))

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
        """See :class:`LinearSolver`. M⁻¹ stands to the right of A, so that the least residual is one of A."""
        # Decision 75.
        steps = max(min(self.restart or RESTART, space.dimension), 1)
        most: Index = steps  # no more than the basis has room for
        if is_array(self.max_steps):
            most = settings.within(space, self.max_steps, 0, steps)
        else:
            most = min(steps, self.max_steps)
            steps = max(most, 1)
        hessenberg = _Hessenberg(space, steps + 1)
        # On a device an eager loop would wait for a second number in every step.
        streams = space.backend.streams
        selective = self.check_every == 1 and (streams is None or streams.current(r) is None)

        def body(c: _Carry, _: tuple[Known, ...]) -> _Carry:
            j, growth = c.steps, c.growth
            u = c.v if precondition is None else precondition(c.v)
            rows = space.rows_in_use(c.basis, j + 1)
            step = arnoldi_step(space, operator(u), c.v, rows, c.active, selective=selective)
            column = hessenberg.column(step, j)
            qr, decrease, ok = hessenberg.append(c.qr, column, step.height, j, c.active)
            if growth is not None:
                length = space.xp.linalg.vector_norm(column, axis=-1, keepdims=True)
                seen = space.xp.hypot(length, step.height) / positive(space.norm(u), space)
                growth = space.select(ok, space.xp.maximum(growth, seen), growth)
            v = unit(space, step.rest, step.height)
            basis = space.set_row(c.basis, j + 1, v)
            return _Carry(v, basis, qr, ok & (norm * decrease > target), j + 1, growth)

        v = unit(space, r, norm)
        basis = space.set_row(space.history(steps + 1), 0, v)
        carry = _Carry(v, basis, hessenberg.empty(), active, 0, None if precondition is None else space.full(0.0))
        carry = space.backend.while_loop(lambda c: (c.active,), body, carry, most, self.check_every)
        weights = hessenberg.best(carry.qr, norm, self) if self.keeps_best else hessenberg.least_squares(carry.qr, norm)
        y = space.state(space.combine(weights, carry.basis))
        if precondition is None or carry.growth is None:
            return y, carry.steps, hessenberg.growth(carry.qr)
        return precondition(y), carry.steps, carry.growth


class _QR(NamedTuple):
    """The QR factorization of a Hessenberg matrix, for each sample.

    Attributes
    ----------
    rotations
        The Givens rotations that reduce the matrix to a triangle, multiplied out, so that a step costs the same number
        of operations at every index: (N, m, m).
    triangle
        The triangle, transposed: row j is its column j. (N, m, m).
    used
        1 for each column that was appended, else 0: (N, m).
    """

    rotations: Matrices
    triangle: Matrices
    used: Array


class _Carry(NamedTuple):
    v: State
    basis: History
    qr: _QR
    active: Mask
    steps: int
    growth: Numbers | None
    """The largest ‖A u‖ / ‖u‖ among the u = M⁻¹ v; None without a preconditioner, where the Hessenberg matrix tells."""


class _Hessenberg:
    """The least-squares problem of GMRES, whose Hessenberg matrix has up to ``size`` - 1 columns."""

    def __init__(self, space: Space, size: int) -> None:
        self.space, self.size = space, size
        self.identity = space.eye(size)
        self.indices = space.xp.arange(size, device=space.device)[None, :]
        self.tiny = float(space.backend.finfo(space.dtype).smallest_normal)

    def empty(self) -> _QR:
        """The factorization before the first column."""
        space, size = self.space, self.size
        identity = self.identity[None, :, :]
        rotations, triangle = (space.matrices(size, size) + identity for _ in range(2))  # two, since rows are replaced
        return _QR(rotations, triangle, space.matrices(1, size)[:, 0, :])

    def column(self, step: ArnoldiStep, j: Index) -> Array:
        """Column j down to its diagonal, with zeros to the size of the matrix."""
        column, missing = step.column, self.size - step.column.shape[1]
        if missing:
            column = self.space.xp.concat([column, self.space.matrices(1, missing)[:, 0, :]], axis=1)
        return self.space.multiply_add(step.along, self.space.take(self.identity, j, 0), column)

    def append(self, qr: _QR, column: Array, height: Numbers, j: int, active: Mask) -> tuple[_QR, Numbers, Mask]:
        """Append column j of the Hessenberg matrix, in the active samples in which the matrix stays regular.

        Parameters
        ----------
        qr
            The factorization of the columns before.
        column, height
            The column down to its diagonal, (N, m), and the entry below the diagonal.
        j
            Its index.
        active
            The samples to append it in.

        Returns
        -------
        qr, decrease, appended
            The factorization; the least residual as a fraction of the residual at the start; and the samples in which
            the column was appended.
        """
        space, xp = self.space, self.space.xp
        here, below = space.take(self.identity, j, 0), space.take(self.identity, j + 1, 0)
        column = space.multiply_add(height, below, column)[:, None, :]
        column = space.matmul(column, xp.matrix_transpose(qr.rotations))[:, 0, :]

        # A new rotation clears the entry below the diagonal.
        above: Numbers = space.take(column, j, 1)
        diagonal: Numbers = xp.hypot(above, height)
        ok = active & (diagonal > self.tiny) & xp.isfinite(diagonal)
        cosine, sine = ratio(above, diagonal, space), ratio(height, diagonal, space)
        upper, lower = qr.rotations[:, j, :], qr.rotations[:, j + 1, :]
        new_upper = xp.where(ok, cosine * upper + sine * lower, upper)
        new_lower = xp.where(ok, cosine * lower - sine * upper, lower)
        rotations = space.set_matrix_row(space.set_matrix_row(qr.rotations, j, new_upper), j + 1, new_lower)

        before = xp.astype(self.indices < j, space.dtype)
        new = xp.where(ok, column * before + diagonal * here, here)
        triangle = space.set_matrix_row(qr.triangle, j, new)
        used = qr.used + xp.astype(ok, space.dtype) * here
        return _QR(rotations, triangle, used), xp.abs(new_lower[:, :1]), ok

    def least_squares(self, qr: _QR, norm: Numbers) -> Matrices:
        """Weights of the basis vectors, (N, 1, m), for a right-hand side along the first one, of length ``norm``."""
        rhs = norm * qr.rotations[:, :, 0] * qr.used
        return self.space.solve_rows(qr.triangle, rhs[:, None, :])

    def best(self, qr: _QR, norm: Numbers, solver: GMRES) -> Matrices:
        """The weights of the step with the least residual, rounding errors included; zero if none reduces it."""
        space, xp = self.space, self.space.xp
        # Step k solves for the first k + 1 numbers of the first residual, rotated, where there are so many columns.
        part = qr.used[:, None, :] * xp.astype(self.indices <= self.indices.T, space.dtype)[None, :, :]
        g = xp.matrix_transpose(qr.rotations[:, :, :1])
        solved, left = (xp.sum(g * g * of, axis=-1) for of in (part, 1 - part))
        steps = space.solve_rows(qr.triangle, norm[:, :, None] * g * part)
        lengths = xp.linalg.vector_norm(steps, axis=-1)
        bound = solver.bound_of_residual(space, norm * xp.sqrt(left), self.growth(qr), lengths)
        reduces = (solved > 2 * space.coarsest_eps) & (bound < norm)  # by more than a rounding error, and not NaN
        bound = xp.where(reduces, bound, xp.full_like(bound, math.inf))
        chosen = reduces & (self.indices == xp.argmin(bound, axis=-1, keepdims=True))
        weights: Matrices = xp.sum(xp.where(chosen[:, :, None], steps, xp.zeros_like(steps)), axis=1, keepdims=True)
        return weights

    def growth(self, qr: _QR) -> Numbers:
        """The largest ‖A v‖ of the basis vectors v: the longest column of the Hessenberg matrix."""
        # Rotations do not change the length of a column.
        lengths = qr.used * self.space.xp.linalg.vector_norm(qr.triangle, axis=-1)
        growth: Numbers = self.space.largest_of(lengths)
        return growth
