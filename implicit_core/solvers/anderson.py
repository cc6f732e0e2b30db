"""Anderson acceleration."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from .. import checks
from ..backend import Array
from ..space import History, Space, State
from ..system import System
from .base import Point, Solver


class Memory(NamedTuple):
    """The last m evaluations: the damped steps they propose, and their residuals; and two constants."""

    proposals: History
    residuals: History
    filled: Any
    ridge: Array


@dataclass(frozen=True, kw_only=True)
class Anderson(Solver):
    """Anderson acceleration: the affine combination of the last points whose residuals best cancel.

    Parameters
    ----------
    memory
        m, how many points are combined; 2m states are held.
    damping
        β in (0, 1]: each point h proposes β F(h) + (1 - β) h.
    regularization
        Ridge added to the residuals' Gram matrix, relative to its largest entry.
    rtol, atol, max_steps, check_every
        As for :class:`Solver`.

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
    damping: float = 1.0
    regularization: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "memory", checks.integer("memory", self.memory, 1))
        object.__setattr__(self, "damping", checks.real("damping", self.damping, 0.0, 1.0, low_open=True))
        object.__setattr__(self, "regularization", checks.real("regularization", self.regularization, 0.0))

    def init(self, system: System, x: State) -> Memory:
        space, m = system.space, self.memory
        slots = space.xp.arange(m, device=space.device)
        filled = space.xp.astype(slots[None, :] <= slots[:, None], space.dtype)
        # Never under rounding error: the Gram matrix of equal residuals must come out regular.
        ridge = max(self.regularization, 4 * m * space.eps) * space.eye(m)
        rows = space.xp.broadcast_to(filled[:, None, None, :], (m, space.samples, 1, m))
        return Memory(space.history(m), space.history(m), space.backend.table(rows), ridge)

    def step(self, system: System, memory: Memory, point: Point) -> tuple[State, Memory]:
        space, slot = system.space, point.index % self.memory
        proposal = point.f if self.damping == 1.0 else space.axpy(self.damping, point.residual, point.x)
        proposals = space.set_row(memory.proposals, slot, proposal)
        residuals = space.set_row(memory.residuals, slot, point.residual)
        filled = memory.filled[space.backend.minimum(point.index, self.memory - 1)]
        weights = mixing_weights(space, space.gram(residuals), filled, memory.ridge)
        x = space.state(space.combine(weights, proposals))
        return x, Memory(proposals, residuals, memory.filled, memory.ridge)


def mixing_weights(space: Space, gram: Array, filled: Array, ridge: Array) -> Array:
    """Weights, summing to one, that minimize the norm of the combined residual.

    ``gram`` is (N, m, m); ``filled``, (N, 1, m), is one at the slots in use and zero elsewhere; ``ridge``, (m, m), is
    relative to the largest entry of ``gram``, which shrinks with the square of the residual: an absolute ridge would
    soon outweigh it and turn the method into plain averaging.
    """
    xp = space.xp
    tiny = float(space.backend.finfo(space.dtype).smallest_normal) / space.eps
    scale = xp.clip(xp.max(gram, axis=(-2, -1), keepdims=True), min=tiny)
    weights = space.backend.solve_rows(space.backend.axpy(scale, ridge, gram), filled)
    return weights / xp.sum(weights, axis=-1, keepdims=True)
