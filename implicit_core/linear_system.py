"""The linear solvers on the user's own operators and pytrees."""

from collections.abc import Callable
from functools import partial
from typing import Any

from . import checks
from .arrays import H, PyTree, State
from .linear_solvers import GMRES, LinearSolver
from .registry import find_backend
from .solution import Solution, Stats


def solve_linear(
    operator: Callable[[H], H],
    b: H,
    *,
    solver: LinearSolver = GMRES(),
    batch_ndim: int = 0,
    scale: PyTree = None,
    throw: bool = False,
) -> Solution[H]:
    """Solve A x = b for every sample, with A given by its products.

    Parameters
    ----------
    operator
        ``operator(v)`` is A v, shaped as b. It is linear, and acts on each sample independently.
    b
        Right-hand side, an array or a pytree of arrays, (batch..., state...).
    solver
        A :class:`LinearSolver`.
    batch_ndim
        How many first axes of every leaf of b index independent samples.
    scale
        The units of b and x, see :class:`Problem`.
    throw
        Raise if a sample did not converge.

    Returns
    -------
    Solution
        x, a status for each sample, and stats: ``residual`` is ‖b - A x‖₂, computed from x, and ``evaluations`` counts
        the products with A.

    Raises
    ------
    SolveError
        With ``throw``, if a sample did not converge.
    CoupledSamplesError
        If A couples what batch_ndim takes for samples, where that can be seen for nothing; see ``check`` of
        :class:`LinearSolver`.
    TypeError, ValueError
        If an argument, or a result of ``operator``, has a wrong type, structure, shape, dtype or device.

    Examples
    --------
    >>> import numpy as np
    >>> import implicit_core as ic
    >>> a = np.array([[2.0, 1.0], [0.0, 4.0]])
    >>> ic.solve_linear(lambda v: a @ v, np.array([3.0, 4.0])).value.round(6)
    array([1., 1.])
    """
    checks.function("operator", operator)
    checks.instance("solver", solver, LinearSolver, "GMRES()")
    checks.instance("throw", throw, bool, "True")
    backend = find_backend(b, "b")
    space = backend.space(b, checks.integer("batch_ndim", batch_ndim, 0), "b", checks.scale(scale))

    act = backend.guarded(operator, "operator", "v")
    if backend.sees_writes:  # Decision 91: an operator that writes to its argument is handed copies
        act = partial(_applied, backend.protected(lambda v, _: operator(v)))

    def on_states(x: State) -> State:
        product = checks.numbers_as_arrays(backend, act(space.unpack(x)), b)
        checks.like(backend, "the result of operator", product, b, "b")
        return space.pack(product)

    with backend.on_device_of(b):
        with backend.solving():
            result = solver.run(space, on_states, space.pack(b))
        stats = Stats(space.per_sample(result.steps), result.products, space.per_sample(result.residual))
        solution = Solution(space.unpack(result.x), space.per_sample(result.status), stats)
        return solution.raise_for_status() if throw else solution


def _applied(function: Callable[[Any, Any], Any], v: Any) -> Any:
    return function(v, None)
