"""Roots as a layer: a solve, and the gradient estimator that differentiates it."""

from collections.abc import Callable
from typing import Any

from .arrays import H, PyTree, Z
from .estimators import Estimator, Implicit
from .fixed_point import layered
from .layer import LayerOptions, gradient_or_default
from .linear_solvers import GMRES
from .problem import Map, Problem, as_problem
from .registry import not_compiled
from .root_problem import RootProblem
from .solution import Solution
from .solve import as_solver
from .solvers import FixedPointSolver, Polyalgorithm

EXACT_GRADIENT = Implicit(GMRES(restart=60, max_steps=600))
"""The default estimator. Roots are stiffer than fixed points: of the adjoint systems of 22 implicit Euler steps, 21
converge with these settings, and 18 with the default ones of GMRES."""


@not_compiled
def root(
    g: Problem[H, Z] | Map[H, Z] | Callable[[H, Z], tuple[H, Any]],
    x0: H,
    z: Z,
    *,
    solver: FixedPointSolver | Callable[[Problem[H, Z], H, Z], H] = Polyalgorithm(),
    gradient: Estimator | None = None,
    batch_ndim: int | None = None,
    scale: PyTree = None,
    g_scale: PyTree = None,
    throw: bool = False,
    trace: bool = False,
    has_aux: bool = False,
) -> Solution[H]:
    """The root of g(x, z) = 0 as a layer: found by ``solver``, differentiated by ``gradient``.

    The same statuses, solvers and estimators as for :func:`fixed_point`, in every framework. The residual is
    -g(x) / ``g_scale``; g and -g have the same roots, and are solved alike.

    Parameters
    ----------
    g
        g itself, ``g(x, z)``, which returns the structure, shapes and dtypes of x, or a :class:`Problem` whose f and
        derivatives belong to g.
    x0
        Where to start: an array or a pytree of real floating arrays, (batch..., state...). Its gradient is zero.
    z
        Inputs and parameters, any pytree.
    solver
        A :class:`Solver`, or any callable ``(problem, x0, z) -> x``, where ``problem(x, z)`` is g. A sample is
        CONVERGED where ‖g(x)‖₂ ≤ atol + rtol ‖g(x0)‖₂. Here atol is zero unless given; give it where x0 may be close to
        the root, as in a warm start.
    gradient
        An :class:`Estimator`, of F(x) = x - α g(x), whose fixed point is the root; see :class:`RootProblem` for α. The
        default is exact. It holds at most 61 states, and makes at most 600 products with the transposed Jacobian. A
        forced number of plain steps, as of :func:`steps`, has no default.
    batch_ndim
        How many first axes of every leaf of x0 index independent samples; for a plain g only (default 0).
    scale, g_scale
        The units of x and of g, see :class:`Problem` and :class:`RootProblem`.
    throw
        Raise where a sample did not converge.
    trace
        Record every residual in ``stats.trace``.
    has_aux
        g returns a pair ``(value, aux)``, as for :func:`fixed_point`.

    Returns
    -------
    Solution
        The root, differentiable in z, with a status and a residual ‖g(x)‖₂ for each sample.

    Raises
    ------
    SolveError
        With ``throw``, if a sample did not converge.
    TypeError, ValueError
        If an argument, or what g returns, has a wrong type, structure, shape, dtype or device.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> import implicit_core as ic
    >>> def root(z):
    ...     return ic.root(lambda x, z: x**3 + x - z, jnp.array(1.5), z).value
    >>> x, dx = jax.value_and_grad(root)(2.0)  # dx = 1 / (3 x² + 1)
    >>> round(float(x), 4), round(float(dx), 4)
    (1.0, 0.25)
    """

    def problem(g: Any) -> RootProblem[H, Z]:
        if isinstance(g, RootProblem) and g_scale is None:
            as_problem(g, batch_ndim, scale)  # which refuses units beside those of the problem
            return g
        if isinstance(g, Problem):
            return RootProblem.of(as_problem(g, batch_ndim, scale), g_scale)
        return RootProblem(g, batch_ndim=0 if batch_ndim is None else batch_ndim, scale=scale, g_scale=g_scale)

    names = RootProblem.names
    solver = as_solver(solver, names=names)
    options = LayerOptions(solver, gradient_or_default(gradient, EXACT_GRADIENT, solver), throw, trace)
    return layered(g, problem, x0, z, options, names, has_aux=has_aux)
