"""The implicit layer: a solve, and the gradient estimator that differentiates it."""

from collections.abc import Callable
from typing import Any

from . import checks
from .arrays import H, PyTree, Z
from .estimators import Estimator, Unroll
from .layer import Layer, LayerOptions, gradient_or_default, undifferentiated
from .problem import Map, Names, Problem, as_problem
from .registry import find_adapter, find_backend, not_compiled
from .solution import Solution
from .solve import as_solver
from .solvers import Anderson, FixedPointSolver
from .start import with_start

DEFAULT_GRADIENT = Unroll(k=5, lam=0.5)


@not_compiled
def fixed_point(
    f: Problem[H, Z] | Map[H, Z] | Callable[[H, Z], tuple[H, Any]],
    h0: H,
    z: Z,
    *,
    solver: FixedPointSolver | Callable[[Problem[H, Z], H, Z], H] = Anderson(),
    gradient: Estimator | None = None,
    batch_ndim: int | None = None,
    scale: PyTree = None,
    throw: bool = False,
    trace: bool = False,
    has_aux: bool = False,
) -> Solution[H]:
    """The fixed point h = F(h, z) as a layer: solved by ``solver``, differentiated by ``gradient``.

    Arrays of a framework with autodiff go to its adapter, and the result is differentiable in z. Elsewhere the value
    is the same, and the estimator's own ``vjp`` and ``jvp`` give the derivatives.

    Parameters
    ----------
    f
        F itself, ``f(h, z)``, or a :class:`Problem`.
    h0
        Where to start: an array or a pytree of real floating arrays, (batch..., state...). Its gradient is zero. Python
        numbers and NumPy arrays become arrays of the framework of z, or else of F's result.
    z
        Inputs and parameters, any pytree.
    solver
        A :class:`Solver`, or any callable ``(problem, h0, z) -> h``.
    gradient
        An :class:`Estimator`; ``Unroll(k=5, lam=0.5)`` if None. There is no default behind a forced number of plain
        steps, as of :func:`steps`.
    batch_ndim
        How many first axes of every leaf of h0 index independent samples; for a plain F only (default 0).
    scale
        The units of the unknown, see :class:`Problem`; for a plain F only.
    throw
        Raise where a sample did not converge; after a forced number of steps, where one is not finite.
    trace
        Record every residual in ``stats.trace``.
    has_aux
        f returns a pair ``(h, aux)``. It is evaluated once more at the value, and ``aux`` from there is in the result,
        as a function of the value and of z.

    Returns
    -------
    Solution
        The estimator's value, and a status and stats that speak of it. For :class:`Unroll` and :class:`BPTT` the value
        is h_k, where F is not evaluated: the residual is that of h_{k-1}. Such a sample is CONVERGED if this one is
        within the tolerance, and stays so if it grows as much again as it did over the k steps.

    Raises
    ------
    SolveError
        With ``throw``, if a sample did not converge.
    TypeError, ValueError
        If an argument, or what F returns, has a wrong type, structure, shape, dtype or device.

    Examples
    --------
    >>> import numpy as np
    >>> import implicit_core as ic
    >>> solution = ic.fixed_point(lambda h, z: np.tanh(0.5 * h + z), np.zeros(3), np.ones(3))
    >>> bool(solution.status == ic.CONVERGED)
    True
    """
    solver = as_solver(solver)
    options = LayerOptions(solver, gradient_or_default(gradient, DEFAULT_GRADIENT, solver), throw, trace)
    return layered(f, lambda f: as_problem(f, batch_ndim, scale), h0, z, options, Problem.names, has_aux=has_aux)


def layered(
    f: Any,
    problem: Callable[[Any], Problem[H, Z]],
    h0: H,
    z: Z,
    options: LayerOptions,
    names: Names,
    *,
    has_aux: bool,
) -> Solution[H]:
    """The layer of ``problem(f)``, with the auxiliary result of f if it has one."""
    checks.instance("gradient", options.gradient, Estimator, "Unroll(k=5, lam=0.5)")
    checks.instance("throw", options.throw, bool, "True")
    checks.instance("trace", options.trace, bool, "True")
    checks.instance("has_aux", has_aux, bool, "True")
    checks.supported(names.start, h0)  # before an adapter makes it an array of its framework
    checks.no_masks("z", z)
    if not has_aux:
        return _by_layer(problem(f), h0, z, options)
    if isinstance(f, Problem):
        function, unknown, *_ = names
        raise TypeError(
            f"has_aux=True is for a plain {function}, which returns ({unknown}, aux); got a Problem, whose f returns "
            f"{unknown} alone"
        )

    def both(h: H, z: Z) -> tuple[H, PyTree]:
        return checks.with_aux(f(h, z), *names[:2])

    solution = _by_layer(problem(lambda h, z: both(h, z)[0]), h0, z, options)
    # Decision 15.
    backend = find_backend(solution.value)
    with backend.on_device_of(solution.value):
        return solution._replace(aux=backend.protected(both)(solution.value, z)[1])


def _by_layer(problem: Problem[H, Z], h0: H, z: Z, options: LayerOptions) -> Solution[H]:
    """The solution by the layer of the framework that F computes in."""
    # A number, or an array of NumPy, may be the start where z is of a framework with autodiff. Decision 105.
    adapter = find_adapter(h0) or find_adapter(z)
    if adapter is not None:
        layer: Layer = adapter.layer
        return layer(problem, h0, z, options)

    def run(h0: H) -> Solution[H]:
        found = find_adapter(h0)
        layer: Layer = undifferentiated if found is None else found.layer
        return layer(problem, h0, z, options)

    return with_start(run, problem, h0, z)
