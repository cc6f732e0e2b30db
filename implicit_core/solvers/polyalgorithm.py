"""Solvers one after the other, for equations of which nothing is known."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

from .. import checks, settings
from ..arrays import Array, H, Mask, PyTree, Real, Z
from ..backend import Known
from ..iteration import Iteration, Origin
from ..problem import Problem
from ..records import Record
from ..registry import find_backend
from ..root_problem import RootProblem
from ..solution import Solution, Status
from . import dense
from .anderson import Anderson
from .base import Solver
from .broyden import Broyden
from .newton import Newton
from .newton_krylov import NewtonKrylov

QUICK, PATIENCE = 10, 20
"""Evaluations of Anderson, and of others, without half of the residual, after which the next solver takes over."""
SMALL: tuple[Solver, ...] = (
    Anderson(max_steps=80, patience=QUICK),
    Broyden(max_steps=100, patience=PATIENCE),
    Newton(max_steps=200),
    Broyden(max_steps=300),
)
WITHOUT_DERIVATIVES: tuple[Solver, ...] = (
    Anderson(max_steps=150, patience=PATIENCE),
    Broyden(max_steps=150, patience=3 * PATIENCE),
    Anderson(max_steps=300),
)
LARGE: tuple[Solver, ...] = (
    Anderson(max_steps=100, patience=QUICK),
    NewtonKrylov(max_steps=200, patience=2 * PATIENCE),
    Anderson(max_steps=300),
)
GIVEN_JACOBIAN: tuple[Solver, ...] = (Newton(max_steps=200), *LARGE)


CONVERGED = Status.CONVERGED.value


class _Carry(NamedTuple):
    solution: Solution[Any]
    failed: Mask
    solver: Array
    traces: tuple[Array, ...]


@dataclass(frozen=True, kw_only=True, repr=False)
class Polyalgorithm(Record):
    """Cheap solvers first, and others where these fail: the default of :func:`implicit_core.root`.

    A sample goes from one solver to the next where the first one stagnates, diverges or runs out of steps. The second
    solver begins at the best point of the first. Later ones begin at h0 again, since a point where others stagnate is a
    poor start. ``stats.solver`` says which solver a sample ended with, and ``stats.evaluations`` is their sum.

    Parameters
    ----------
    solvers
        A tuple of :class:`Solver`, each with its own ``max_steps`` and ``patience``. None chooses by the size of the
        state: Anderson, then Broyden, Newton, and Broyden for longer, with matrices, up to 64 unknowns; else Anderson,
        NewtonKrylov, and Anderson for longer, with Newton before them if the problem has a ``jacobian``. Without
        derivatives, as for a plain g in NumPy, it is Anderson, Broyden, and Anderson for longer, and of others those
        that need a Jacobian are left out.
    rtol, atol
        As for :class:`Solver`, for all of them.

    Raises
    ------
    TypeError, ValueError
        If a setting is of a wrong kind or out of range.

    References
    ----------
    A. Pal et al., NonlinearSolve.jl: high-performance and robust solvers for systems of nonlinear equations in Julia
    (2024), whose default falls back likewise.

    Examples
    --------
    >>> import numpy as np
    >>> import implicit_core as ic
    >>> solution = ic.root(lambda x, z: x**3 - z, np.array([1.0, 1.0]), np.array([8.0, 27.0]))
    >>> solution.value.round(4), int(solution.stats.solver)
    (array([2., 3.]), 0)
    """

    solvers: tuple[Solver, ...] | None = None
    rtol: Real = 1e-6
    atol: Real | None = None

    uses_jacobian: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "rtol", checks.real("rtol", self.rtol, 0.0))
        if self.atol is not None:
            object.__setattr__(self, "atol", checks.real("atol", self.atol, 0.0))
        if settings.is_zero(self.rtol) and settings.is_zero(self.absolute_tolerance):
            raise ValueError("Polyalgorithm needs a tolerance, which says where a solver fails: give rtol or atol")
        if self.solvers is not None:
            checks.instance("solvers", self.solvers, tuple, "(Broyden(), Newton())")
            if not self.solvers:
                raise ValueError("solvers must hold at least one solver, got an empty tuple")
            for solver in self.solvers:
                checks.instance("each of solvers", solver, Solver, "Newton()")

    @property
    def runs_user_code(self) -> bool:
        """See :class:`FixedPointSolver`."""
        return any(solver.runs_user_code for solver in self.solvers or ())

    @property
    def absolute_tolerance(self) -> Real:
        """``atol``, or its default."""
        return 1e-3 * self.rtol if self.atol is None else self.atol

    def solve(self, problem: Problem[H, Z], h0: H, z: Z, *, trace: bool = False) -> Solution[H]:
        """See :class:`FixedPointSolver`."""
        checks.instance("problem", problem, Problem, "Problem(f), or call implicit_core.solve(f, h0, z)")
        problem = problem.with_derivatives(h0)
        first, *others = (replace(s, rtol=self.rtol, atol=self.atol) for s in self._chosen(problem, h0))
        backend = find_backend(h0, problem.names.start)
        with backend.solving():
            iteration = Iteration(problem, h0, z, first, trace=trace)
            found = iteration.run()
            origin = iteration.tells() if isinstance(problem, RootProblem) else None
            empty = [_empty_trace(found, solver) for solver in others] if trace else []
            carry = _Carry(found, _failed(found), backend.xp.zeros_like(found.status), (found.stats.trace, *empty))
            for number, solver in enumerate(others, 1):
                carry = self._carried_on(carry, problem, h0, z, solver, number, origin)
        solution, stats = carry.solution, carry.solution.stats._replace(solver=carry.solver)
        if trace:
            stats = stats._replace(trace=backend.xp.concat(list(carry.traces), axis=0))
        return solution._replace(stats=stats)

    def _chosen(self, problem: Problem[Any, Any], h0: PyTree) -> Sequence[Solver]:
        """The solvers that can solve the problem."""
        if self.solvers is None and not problem.has_jvp:
            return WITHOUT_DERIVATIVES
        large = LARGE if problem.jacobian is None else GIVEN_JACOBIAN
        solvers = self.solvers or (SMALL if dense.is_small(problem.space(h0, problem.names.start)) else large)
        usable = [solver for solver in solvers if problem.has_jvp or not solver.uses_jacobian]
        return usable or solvers

    def _carried_on(
        self,
        carry: _Carry,
        problem: Problem[H, Z],
        h0: H,
        z: Z,
        solver: Solver,
        number: int,
        origin: Origin | None,
    ) -> _Carry:
        """What the next solver makes of the samples that failed, if there are any."""
        backend = find_backend(h0)

        def run(carry: _Carry, _: tuple[Known, ...]) -> _Carry:
            found, stats, failed = carry.solution, carry.solution.stats, carry.solution.status != CONVERGED
            again = failed if number > 1 else failed & ~(stats.residual < float("inf"))
            start = _select(again, backend.map(backend.stop_gradient, h0), found.value)
            tracing = len(carry.traces) > 1
            iteration = Iteration(problem, start, z, solver, trace=tracing, origin=origin)
            iteration.noticed = None  # no mask leaves a loop that is traced
            new = iteration.run()
            better = failed & ((new.status == CONVERGED) | ~(new.stats.residual >= stats.residual))
            of_value = {
                name: _select(better, getattr(new.stats, name), getattr(stats, name))
                for name in ("residual", "relative", "tolerance")
            }
            steps = stats.steps + _select(failed, new.stats.steps, backend.xp.zeros_like(stats.steps))
            stats = stats._replace(steps=steps, evaluations=stats.evaluations + new.stats.evaluations, **of_value)
            status = _select(failed, new.status, found.status)
            solution = Solution(_select(better, new.value, found.value), status, stats)
            last = _select(failed, backend.xp.full_like(carry.solver, number), carry.solver)
            traces = carry.traces
            if tracing:
                traces = (*traces[:number], new.stats.trace, *traces[number + 1 :])
            return _Carry(solution, _failed(solution), last, traces)

        return backend.while_loop(lambda carry: (carry.failed,), run, carry, 1)


def _failed(solution: Solution[Any]) -> Mask:
    """Where a solve did not converge, (N, 1)."""
    backend = find_backend(solution.status, "status")
    failed: Mask = backend.xp.reshape(solution.status != CONVERGED, (-1, 1))
    return failed


def _select(mask: Array, x: PyTree, y: PyTree) -> PyTree:
    """``x`` in the samples of a mask of the batch's shape, else ``y``."""
    backend = find_backend(mask, "mask")

    def select(a: Array, b: Array) -> Array:
        return backend.xp.where(backend.xp.reshape(mask, mask.shape + (1,) * (a.ndim - mask.ndim)), a, b)

    return backend.map(select, x, y)


def _empty_trace(solution: Solution[Any], solver: Solver) -> Array:
    """The trace of a solver that had nothing to do."""
    residual = solution.stats.residual
    xp = find_backend(residual, "residual").xp
    zeros = xp.zeros((solver.max_steps, *residual.shape), dtype=residual.dtype)
    return zeros + float("nan")
