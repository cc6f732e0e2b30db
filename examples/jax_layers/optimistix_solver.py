"""A solver of Optimistix finds the fixed point of a layer; phantom gradients differentiate it."""

from typing import Any

import optimistix as optx

import implicit_core as ic
from implicit_core.backend import PyTree


def solver(
    method: optx.AbstractFixedPointSolver[Any, Any, Any] | optx.AbstractRootFinder[Any, Any, Any, Any],
    max_steps: int = 100,
    rtol: float = 1e-4,
) -> ic.CallableSolver:
    """A method of Optimistix as a ``solver`` of :func:`implicit_core.fixed_point`.

    Optimistix sees the whole batch, samples of ``jax.vmap`` among them, as one system with one stop test, and a method
    with a Jacobian makes that of all samples together. What it returns, converged or not, is judged sample by sample by
    one evaluation of F: CONVERGED within ``rtol``, STAGNATED or NONFINITE beyond. The estimator differentiates it, and
    its own ``adjoint`` is never used.

    Parameters
    ----------
    method
        Its tolerances should be the stricter ones.
    max_steps
        After so many of its steps it gives what it has.
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

    def run(problem: ic.Problem, h0: PyTree, z: PyTree) -> PyTree:
        return optx.fixed_point(problem, method, h0, z, max_steps=max_steps, throw=False).value

    return ic.CallableSolver(run, rtol=rtol)
