"""A solver of Optimistix finds the fixed point of a layer; phantom gradients differentiate it."""

from typing import Any

import optimistix as optx

import implicit_core as ic
from implicit_core.arrays import PyTree


def solver(
    method: optx.AbstractFixedPointSolver[Any, Any, Any] | optx.AbstractRootFinder[Any, Any, Any, Any],
    max_steps: int = 100,
    rtol: float = 1e-4,
) -> ic.CallableSolver:
    """A method of Optimistix as a ``solver`` of :func:`implicit_core.fixed_point`.

    Optimistix solves the whole batch, samples of ``jax.vmap`` included, as one system with one stop test, and a method
    that uses a Jacobian builds one for all samples together. One evaluation of F measures its result, converged or not,
    for each sample: CONVERGED within ``rtol``, else STAGNATED or NONFINITE. The estimator differentiates the solution;
    the method's own ``adjoint`` is never used.

    Parameters
    ----------
    method
        Its tolerances should be stricter than ``rtol``.
    max_steps
        The method returns its current point after this number of steps.
    rtol
        Bound on ‖F(h) - h‖₂ / ‖F(h)‖₂ for a sample to have converged.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> import optimistix as optx
    >>> import implicit_core as ic
    >>> newton = solver(optx.Newton(rtol=1e-5, atol=1e-5))
    >>> solution = ic.fixed_point(lambda h, z: jnp.cos(h) + z, jnp.ones(1), jnp.zeros(1), solver=newton)
    >>> solution.value.round(4), solution.status == ic.CONVERGED
    (Array([0.7391], dtype=float32), Array(True, dtype=bool))
    """

    def run(problem: ic.Problem[Any, Any], h0: PyTree, z: PyTree) -> PyTree:
        return optx.fixed_point(problem, method, h0, z, max_steps=max_steps, throw=False).value

    return ic.CallableSolver(run, rtol=rtol)
