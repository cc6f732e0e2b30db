"""A solve without steps."""

from typing import TYPE_CHECKING, Any

from . import settings
from .arrays import H
from .problem import Problem
from .registry import find_backend
from .root_problem import RootProblem
from .solution import Solution, Stats, Status

if TYPE_CHECKING:
    from .solvers.base import Solver


def unsolved(problem: Problem[H, Any], h0: H, solver: "Solver", *, trace: bool) -> Solution[H]:
    """The start as the result, where F is not evaluated, so that its residual is not known.

    ``stats.tolerance`` is the absolute tolerance alone, since ‖F(h0)‖ is not known either.
    """
    name = problem.names.start
    backend = find_backend(h0, name)
    with backend.on_device_of(h0), backend.solving():
        space = problem.space(h0, name)
        h = space.unpack(space.copy(space.pack(backend.map(backend.stop_gradient, h0))))
        solver = settings.bound(solver, space, constant=True)
        atol = solver.absolute_tolerance_of(root=isinstance(problem, RootProblem))
        status, steps = (space.full(number, space.xp.int32) for number in (Status.MAX_STEPS.value, 0))
        # The largest number, and not infinity, of which frameworks can be asked to raise an error.
        unknown = space.full(float(backend.finfo(space.dtype).max))
        tolerance = space.full(0.0) + settings.absolute(space, atol)
        stats = Stats(
            space.per_sample(steps),
            0,
            space.per_sample(unknown),
            space.xp.reshape(space.matrices(0, 1), (0, *space.batch_shape)) if trace else None,
            space.per_sample(unknown),
            space.per_sample(tolerance),
        )
        return Solution(h, space.per_sample(status), stats)
