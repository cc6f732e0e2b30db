"""Anderson acceleration."""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from .. import checks, settings
from ..arrays import Array, History, Index, Matrices, Real, State
from ..carry import Point
from ..space import Space, total
from ..system import System
from .base import Solver


class Memory(NamedTuple):
    """The last m evaluations: damped steps, residuals, and the residuals' inner products; and constants."""

    proposals: History
    residuals: History
    products: tuple[Matrices, ...]
    filled: Any
    scaling: Array
    floor: Array


@dataclass(frozen=True, kw_only=True, repr=False)
class Anderson(Solver):
    """Anderson acceleration: the affine combination of the last points whose residuals best cancel.

    Parameters
    ----------
    memory
        m, how many points are combined; 2m states are held.
    damping
        β in (0, 1]: each point h proposes β F(h) + (1 - β) h.
    regularization
        Ridge on the residuals' Gram matrix, relative to its diagonal: each weight is damped by its own residual, so
        old, large ones cost most. Never under rounding error.
    rtol, atol, max_steps, check_every, freeze, check
        As for :class:`Solver`.

    Raises
    ------
    TypeError, ValueError
        If a setting is of a wrong kind or out of range.

    References
    ----------
    D. G. Anderson, Iterative procedures for nonlinear integral equations, J. ACM 12 (1965).
    H. F. Walker and P. Ni, Anderson acceleration for fixed-point iterations, SIAM J. Numer. Anal. 49 (2011).

    Examples
    --------
    >>> import numpy as np
    >>> import implicit_core as ic
    >>> solution = ic.solve(lambda h, z: np.cos(h) + z, np.array(1.0), np.array(0.0), solver=ic.Anderson(rtol=1e-9))
    >>> round(float(solution.value), 6), int(solution.stats.evaluations) < 10
    (0.739085, True)
    """

    memory: int = 5
    damping: Real = 1.0
    regularization: Real = 1e-10

    copies_results: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "memory", checks.integer("memory", self.memory, 1))
        object.__setattr__(self, "damping", checks.real("damping", self.damping, 0.0, 1.0, low_open=True))
        object.__setattr__(self, "regularization", checks.real("regularization", self.regularization, 0.0))

    def init(self, system: System, x: State) -> Memory:
        space, m = system.space, self.memory
        filled = space.xp.tril(space.xp.ones((m, m), dtype=space.dtype, device=space.device))
        rows = space.xp.broadcast_to(filled[:, None, None, :], (m, space.samples, 1, m))
        products = tuple(space.matrices(m, m) for _ in x)
        return Memory(
            space.history(m), space.history(m), products, space.table(rows), *ridge(space, m, self.regularization)
        )

    def step(self, system: System, memory: Memory, point: Point) -> tuple[State, Memory]:
        space, slot = system.space, point.index % self.memory
        proposal = point.f if settings.is_one(self.damping) else space.axpy(self.damping, point.residual, point.x)
        proposals = space.set_row(memory.proposals, slot, proposal)
        residuals = space.set_row(memory.residuals, slot, point.residual)
        filled = memory.filled[_at_most(space, point.index, self.memory - 1)]
        products = space.gram(memory.products, residuals, slot)
        weights = mixing_weights(space, total(products), filled, (memory.scaling, memory.floor))
        x = space.state(space.combine(weights, proposals))
        return x, memory._replace(proposals=proposals, residuals=residuals, products=products)


def _at_most(space: Space, index: Index, limit: int) -> Index:
    """The smaller of the loop's counter, which may be an array, and a constant."""
    # Not `clip`, which reads the numbers of an array of PyTorch in older versions of array-api-compat.
    return min(index, limit) if isinstance(index, int) else space.xp.where(index < limit, index, limit)


def ridge(space: Space, m: int, regularization: Real) -> tuple[Array, Array]:
    """The (1, m, m) constants that regularize Gram matrices G: ``G * scaling + floor`` is regular, whatever G.

    An absolute ridge would soon outweigh residuals that shrink, and turn the method into plain averaging. This one is
    relative to G's diagonal (Decision 17). It is at least rounding error, for residuals that are all equal. The floor
    is for residuals that are all zero.
    """
    identity = space.eye(m)[None, :, :]
    tiny = float(space.backend.finfo(space.dtype).smallest_normal) / space.eps
    return 1 + settings.at_least(space, regularization, 4 * m * space.eps) * identity, tiny * identity


def mixing_weights(space: Space, gram: Matrices, filled: Matrices, ridge: tuple[Array, Array]) -> Matrices:
    """Weights, summing to one, that minimize the norm of the combined residual.

    ``gram`` is (N, m, m); ``filled``, (N, 1, m), is one at the slots in use and zero elsewhere.
    """
    scaling, floor = ridge
    weights = space.solve_rows(space.multiply_add(gram, scaling, floor), filled)
    total: Matrices = space.xp.sum(weights, axis=-1, keepdims=True)
    return weights / total
