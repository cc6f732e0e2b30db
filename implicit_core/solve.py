"""The fixed point of every sample, by any solver."""

import inspect
from collections.abc import Callable

from . import checks
from .arrays import H, PyTree, Z
from .problem import Map, Names, Problem, as_problem
from .registry import find_backend, load_adapter, not_compiled
from .solution import Solution
from .solvers import Anderson, CallableSolver, FixedPointSolver, Solver
from .start import with_start


@not_compiled
def solve(
    problem: Problem[H, Z] | Map[H, Z],
    h0: H,
    z: Z,
    *,
    solver: FixedPointSolver | Callable[[Problem[H, Z], H, Z], H] = Anderson(),
    batch_ndim: int | None = None,
    scale: PyTree = None,
    throw: bool = False,
    trace: bool = False,
) -> Solution[H]:
    """Find the fixed point h = F(h, z) of every sample.

    The result is a constant: :func:`fixed_point` is the differentiable layer.

    Parameters
    ----------
    problem
        A :class:`Problem`, or F itself, ``f(h, z)``.
    h0
        Where to start: an array or a pytree of real floating arrays, (batch..., state...). Python numbers and NumPy
        arrays become arrays of the framework of z, or else of F's result.
    z
        Inputs and parameters, handed to F as they are.
    solver
        A :class:`Solver`, or any callable ``(problem, h0, z) -> h``, see :class:`CallableSolver`.
    batch_ndim
        How many first axes of every leaf of h0 index independent samples; for a plain F only (default 0).
    scale
        The units of the unknown, see :class:`Problem`; for a plain F only.
    throw
        Raise where a sample did not converge.
    trace
        Record every residual in ``stats.trace``.

    Returns
    -------
    Solution
        The point at which each sample's residual ‖F(h) - h‖₂ was measured and met atol + rtol ‖F(h)‖₂. If no point
        did, the best one seen, or the last one of a solver that keeps no best, with a status that says so. n steps
        evaluate F n times. With both tolerances zero the number of steps is forced, see :class:`Solver`.

    Raises
    ------
    SolveError
        With ``throw``, if a sample did not converge.
    CoupledSamplesError
        If F couples what batch_ndim takes for samples, where a solve can see it for nothing; see ``check`` of
        :class:`Solver`.
    TypeError, ValueError
        If an argument, or what F returns, has a wrong type, structure, shape, dtype or device.

    Examples
    --------
    >>> import numpy as np
    >>> import implicit_core as ic
    >>> solution = ic.solve(lambda h, z: np.tanh(0.5 * h + z), np.zeros((2, 3)), np.eye(2, 3), batch_ndim=1)
    >>> solution.status == ic.CONVERGED
    array([ True,  True])
    """
    problem = as_problem(problem, batch_ndim, scale)
    solver = as_solver(solver, names=problem.names)
    checks.instance("throw", throw, bool, "True")
    checks.instance("trace", trace, bool, "True")

    def run(h0: H) -> Solution[H]:
        return solve_from_arrays(problem, h0, z, solver=solver, throw=throw, trace=trace)

    return with_start(run, problem, h0, z)


def solve_from_arrays(
    problem: Problem[H, Z], h0: H, z: Z, *, solver: FixedPointSolver, throw: bool = False, trace: bool = False
) -> Solution[H]:
    """:func:`solve` where h0 holds arrays of the framework that F computes in; for layers, which see to that."""
    checks.no_masks("z", z)
    backend = find_backend(h0, problem.names.start)
    compiler = load_adapter(backend.name) if backend.compiles else None
    with backend.on_device_of(h0), backend.solving():
        solution = None if compiler is None else compiler.solve_compiled(problem, h0, z, solver, trace=trace)
        if solution is None:
            solution = solve_as_it_is(problem, h0, z, solver, trace=trace)
        return solution.raise_for_status() if throw else solution


def solve_as_it_is(
    problem: Problem[H, Z], h0: H, z: Z, solver: FixedPointSolver, *, trace: bool = False
) -> Solution[H]:
    """:func:`solve` by the solver's own code, whether operations are carried out or traced."""
    solution = solver.solve(problem, h0, z, trace=trace)
    return solution if type(solver).solve is Solver.solve else _checked(solver, solution, h0, problem.names.start)


def as_solver(solver: object, name: str = "solver", names: Names = Problem.names) -> FixedPointSolver:
    """A solver as it is; a callable ``(problem, h0, z) -> h`` as a :class:`CallableSolver`."""
    if not isinstance(solver, type):
        if isinstance(solver, FixedPointSolver) and not (callable(solver) and _is_unrelated(solver.solve)):
            return solver
        if callable(solver):
            return CallableSolver(solver)
    checks.instance(name, solver, Solver, f"Anderson(), or a callable (problem, {names.start}, z) -> {names.unknown}")
    raise AssertionError("the check raises")


def _checked(solver: object, solution: object, h0: H, start: str) -> Solution[H]:
    """What a solver of somebody else's returned: a solution, with a value like h0."""
    name = f"{type(solver).__name__}.solve"
    if not isinstance(solution, Solution):
        raise TypeError(f"{name} must return a Solution, got {solution!r} of type {type(solution).__name__}")
    value = checks.like(find_backend(h0), f"the value of {name}", solution.value, h0, start)
    return solution if value is solution.value else solution._replace(value=value)


def _is_unrelated(solve: Callable[..., object]) -> bool:
    """Whether a callable's own method ``solve`` is not a solver's."""
    parameters = inspect.signature(solve).parameters.values()
    return not any(p.name == "trace" or p.kind is p.VAR_KEYWORD for p in parameters)
