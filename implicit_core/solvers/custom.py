"""Any root finder as a solver."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from .. import checks, progress, settings
from ..arrays import H, PyTree, Real, Z
from ..iteration import Iteration
from ..problem import Problem
from ..records import Record
from ..registry import find_backend
from ..root_problem import RootProblem
from ..solution import DIVERGED, STAGNATED, Solution, Stats, Status
from ..space import Space
from .here import Here


@dataclass(frozen=True, repr=False)
class CallableSolver(Record):
    """A callable ``(problem, h0, z) -> h`` as a solver. Two evaluations of F measure its start and its result.

    ``solve`` wraps a bare callable in this with the default tolerances. Samples within them, whose residual also fell,
    are CONVERGED. If only the tolerance is met, the state ran away, and they are DIVERGED. The others are STAGNATED or
    NONFINITE: only the callable knows why it stopped.

    Parameters
    ----------
    function
        Gets the :class:`Problem`, itself callable as F(h, z), or g(x, z) for a root, ``h0`` and ``z``; returns h shaped
        as h0. Its ``linearize`` has the derivatives of the arrays' framework, if the problem has none of its own.
    rtol, atol
        As for :class:`Solver`.

    Examples
    --------
    >>> import numpy as np
    >>> import implicit_core as ic
    >>> def bisection(problem, h0, z):
    ...     low, high = h0 - 2.0, h0 + 2.0
    ...     for _ in range(60):
    ...         middle = (low + high) / 2
    ...         below = problem(middle, z) > middle
    ...         low, high = np.where(below, middle, low), np.where(below, high, middle)
    ...     return middle
    >>> solution = ic.solve(lambda h, z: np.cos(h) + z, np.array(0.0), np.array(0.0), solver=bisection)
    >>> round(float(solution.value), 6), int(solution.stats.evaluations)
    (0.739085, 62)
    """

    function: Callable[[Problem[Any, Any], Any, Any], Any]
    rtol: Real = 1e-5
    atol: Real | None = None

    runs_user_code: ClassVar[bool] = True
    """It may do anything, so that an adapter can neither add a batch axis nor assume that it is not differentiated."""

    def __post_init__(self) -> None:
        checks.function("function", self.function)
        self.measuring()

    def measuring(self) -> Here:
        """The solver that evaluates F once, at its start, and returns that."""
        return Here(rtol=self.rtol, atol=self.atol)

    def solve(self, problem: Problem[H, Z], h0: H, z: Z, *, trace: bool = False) -> Solution[H]:
        """Call the function, and measure what it returned. There is no trace."""
        checks.instance("problem", problem, Problem, "Problem(f), or call implicit_core.solve(f, h0, z)")
        start_name = problem.names.start
        backend = find_backend(h0, start_name)
        checks.state(backend, start_name, h0, problem.batch_ndim)
        calls = 0

        def counted(h: H, z: Z) -> H:
            nonlocal calls
            # How often a traced call is carried out is not known.
            calls += all(map(backend.readable, backend.flatten(h)[0]))
            return problem.f(h, z)

        # Copies: h0, and what the function returns, may be in memory that F writes its results to.
        def copied(tree: PyTree) -> PyTree:
            return backend.map(lambda x: backend.xp.asarray(backend.stop_gradient(x), copy=True), tree)

        kept = copied(h0)
        with backend.solving():
            given = problem.replace_f(counted).with_derivatives(h0)
            h = self.function(given, backend.map(backend.stop_gradient, h0), z)
        h = checks.like(backend, "the result of the solver", h, h0, start_name)
        n = problem.batch_ndim
        h = copied(backend.map(lambda x, like: backend.in_axis_order(x, backend.axis_order(like, n), n), h, h0))
        at_start = Iteration(problem, kept, z, self.measuring())
        start = at_start.run()
        is_root = isinstance(problem, RootProblem)
        origin = at_start.tells() if is_root and not at_start.forced else None
        solution = Iteration(problem, h, z, self.measuring(), origin=origin).run()
        xp, status, stats = backend.xp, solution.status, solution.stats
        endings = [(status == Status.MAX_STEPS.value, STAGNATED)]
        if not is_root:  # whose tolerance does not grow with the state
            with backend.solving():
                ran_away = self._ran_away(problem.space(kept), start.stats, stats, solution.value)
            endings.append(((status == Status.CONVERGED.value) & ran_away, DIVERGED))
        for mask, code in endings:
            status = xp.where(mask, xp.full_like(status, code.value), status)
        return Solution(solution.value, status, stats._replace(steps=stats.steps + calls + 1, evaluations=2 + calls))

    def _ran_away(self, space: Space, start: Stats, end: Stats, h: PyTree) -> Any:
        """Where the residual has not fallen, or may not have, as rounding hides it (Decision 69)."""
        rtol = progress.reachable(space, settings.bound(self, space, constant=True).rtol)
        cap = progress.largest_converged(space, start.residual, start.tolerance, rtol)
        hidden = progress.is_hidden(space, space.xp.reshape(cap, (-1, 1)), space.norm(space.pack(h)))
        return (end.residual > cap) | space.per_sample(hidden)
