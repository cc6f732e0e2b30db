"""The linear solvers on the user's own operators and pytrees."""

from collections.abc import Callable
from functools import partial
from typing import Any

from . import checks
from .arrays import H, Operator, PyTree, State
from .linear_operators import LinearMap, as_function, transpose_of
from .linear_solvers import GMRES, LinearSolver
from .linear_solvers.lsmr import Transposable
from .registry import find_backend
from .solution import Solution, Stats
from .space import Space


def solve_linear(
    operator: Callable[[H], H] | LinearMap,
    b: H,
    *,
    solver: LinearSolver = GMRES(),
    x0: H | None = None,
    preconditioner: Callable[[H], H] | LinearMap | None = None,
    transposed: Callable[[H], H] | LinearMap | None = None,
    batch_ndim: int = 0,
    scale: PyTree = None,
    throw: bool = False,
) -> Solution[H]:
    """Solve A x = b for every sample by products with A.

    Parameters
    ----------
    operator
        A: a function ``operator(v)``, linear, which returns A v, shaped as b, and acts on each sample independently. Or
        a matrix, where b is one array with n numbers in each sample: an array (n, n) or (batch..., n, n), and with
        NumPy also a sparse array of SciPy, or a ``LinearOperator``.
    b
        Right-hand side, an array or a pytree of arrays, (batch..., state...).
    solver
        A :class:`LinearSolver`.
    x0
        Where to start, shaped as b, for one product more; zero where None, or where its residual is not below ‖b‖.
    preconditioner
        M⁻¹, an approximate inverse of A, as a function or a matrix in the same forms. It saves products with A. What
        stops the solve, the residual b - A x, and so the accuracy, is the same with and without it. M⁻¹ stands to the
        right of A; :class:`CG` needs a symmetric positive definite one. It is a fixed linear map.
    transposed
        Aᵀ in the same forms, for :class:`LSMR`. None where A is a matrix, whose transpose is known.
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
        the products with A, and with Aᵀ.

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
    >>> diagonal = np.diag(a)  # with a matrix, and a preconditioner
    >>> ic.solve_linear(a, np.array([3.0, 4.0]), preconditioner=lambda v: v / diagonal).value.round(6)
    array([1., 1.])
    """
    checks.instance("solver", solver, LinearSolver, "GMRES()")
    checks.instance("throw", throw, bool, "True")
    backend = find_backend(b, "b")
    space = backend.space(b, checks.integer("batch_ndim", batch_ndim, 0), "b", checks.scale(scale, all_parts=True))
    if x0 is not None:
        x0 = checks.like(backend, "x0", x0, b, "b")

    def on_states(name: str, given: LinearMap, space: Space) -> Operator:
        function = as_function(name, given, backend, b, batch_ndim)
        act = backend.guarded(function, name, "v")
        if backend.sees_writes:  # Decision 91: an operator that writes to its argument is handed copies
            act = partial(_applied, backend.protected(lambda v, _: function(v)))

        def product(x: State) -> State:
            product = checks.numbers_as_arrays(backend, act(space.unpack(x)), b)
            checks.like(backend, f"the result of {name}", product, b, "b")
            return space.copy(space.pack(product))  # a function may return the same array at every call

        return product

    apply: Operator = on_states("operator", operator, space)
    precondition = None if preconditioner is None else on_states("preconditioner", preconditioner, space)
    if transposed is None and solver.uses_transpose:
        transposed = transpose_of(operator, backend)
    if transposed is not None:
        apply = Transposable(apply, on_states("transposed", transposed, space.dual))
    with backend.on_device_of(b):
        with backend.solving():
            start = None if x0 is None else space.pack(x0)
            result = solver.run(space, apply, space.pack(b), x0=start, precondition=precondition)
        stats = Stats(space.per_sample(result.steps), result.products, space.per_sample(result.residual))
        solution = Solution(space.unpack(result.x), space.per_sample(result.status), stats)
        return solution.raise_for_status() if throw else solution


def _applied(function: Callable[[Any, Any], Any], v: Any) -> Any:
    return function(v, None)
