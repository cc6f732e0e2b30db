"""The implicit layer: a solve, and the gradient estimator that differentiates it."""

from collections.abc import Callable
from typing import Any

from . import checks
from .backend import PyTree
from .estimators import Estimator, Unroll
from .problem import Map, Problem
from .registry import find_adapter, find_backend, load_adapter
from .solution import Solution
from .solve import as_problem, solve
from .solvers import Anderson, FixedPointIteration, Solver


def fixed_point(
    f: Problem | Map,
    h0: PyTree,
    z: PyTree,
    *,
    solver: Solver | Callable[[Problem, PyTree, PyTree], PyTree] = Anderson(),
    gradient: Estimator = Unroll(k=5, lam=0.5),
    batch_ndim: int | None = None,
    throw: bool = False,
    trace: bool = False,
    has_aux: bool = False,
) -> Solution:
    """The fixed point h = F(h, z) as a layer: solved by ``solver``, differentiated by ``gradient``.

    Arrays of a framework with autodiff go to its adapter, and the result is differentiable in z. Elsewhere the value
    is the same, and the estimator's own ``vjp`` and ``jvp`` give the derivatives.

    Parameters
    ----------
    f
        F itself, ``f(h, z)``, or a :class:`Problem`.
    h0
        Where to start: an array or a pytree of real floating arrays, (batch..., state...). Its gradient is zero.
    z
        Inputs and parameters, any pytree.
    solver
        A :class:`Solver`, or any callable ``(problem, h0, z) -> h``.
    gradient
        An :class:`Estimator`.
    batch_ndim
        How many first axes of every leaf of h0 index independent samples; for a plain F only (default 0).
    throw
        Raise where a sample did not converge.
    trace
        Record every residual in ``stats.trace``.
    has_aux
        f returns a pair ``(h, aux)``. It is evaluated once more at the value, and ``aux`` from there is in the result,
        as a function of the value and of z.

    Returns
    -------
    Solution
        The estimator's value, and the solve's status and stats. For :class:`Unroll` the value is h_k, and the stats
        speak of the solver's point h_0.

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
    checks.instance("gradient", gradient, Estimator, "Unroll(k=5, lam=0.5)")
    # NumPy's h0 will do where z is of a framework with autodiff, if that takes it.
    adapter = load_adapter(find_backend(h0).name) or find_adapter(z)
    layer: Callable[..., Solution] = undifferentiated if adapter is None else adapter.fixed_point
    options = {"solver": solver, "gradient": gradient, "batch_ndim": batch_ndim, "throw": throw, "trace": trace}
    return with_aux(layer, f, h0, z, options) if has_aux else layer(f, h0, z, **options)


def with_aux(
    layer: Callable[..., Solution], f: Problem | Map, h0: PyTree, z: PyTree, options: dict[str, Any]
) -> Solution:
    """``layer`` for an f that returns a pair (h, aux)."""
    if isinstance(f, Problem):
        raise TypeError("has_aux=True is for a plain f, which returns (h, aux); got a Problem, whose f returns h")

    def both(h: PyTree, z: PyTree) -> tuple[PyTree, PyTree]:
        pair = f(h, z)
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise TypeError(f"with has_aux=True f must return a pair (h, aux), got {type(pair).__name__}")
        return pair

    solution = layer(lambda h, z: both(h, z)[0], h0, z, **options)
    with find_backend(h0).beside(h0):
        return solution._replace(aux=both(solution.value, z)[1])


def undifferentiated(
    f: Problem | Map, h0: PyTree, z: PyTree, *, gradient: Estimator, batch_ndim: int | None, **options: Any
) -> Solution:
    """The layer's value, without a binding to any autodiff."""
    problem = as_problem(f, batch_ndim)
    solution = solver_point(problem, h0, z, gradient=gradient, **options)
    return solution._replace(value=gradient.value(problem, solution.value, z))


def solver_point(
    problem: Problem, h0: PyTree, z: PyTree, *, gradient: Estimator, solver: Any, throw: bool, trace: bool
) -> Solution:
    """The point at which ``gradient`` sets in: the solver's, or h0 itself, judged by one evaluation of F."""
    if throw:
        refuse_throw(gradient)
    if gradient.starts_from_h0:
        solver = FixedPointIteration(max_steps=1)
    return solve(problem, h0, z, solver=solver, throw=throw, trace=trace)


def refuse_throw(gradient: Estimator) -> None:
    """``throw=True`` is for estimators that follow a solve."""
    if gradient.starts_from_h0:
        raise ValueError(f"throw=True with {gradient!r}: it makes no solve that could fail")
