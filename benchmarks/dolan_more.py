"""Performance profiles: E. D. Dolan and J. J. Moré, Benchmarking optimization software, Math. Program. 91 (2002)."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Numbers = NDArray[np.float64]


def ratios(costs: ArrayLike) -> Numbers:
    """The cost of each solver on each problem, over the least cost of any solver on that problem.

    Parameters
    ----------
    costs
        (problems, solvers), positive; infinite where a solver failed.

    Returns
    -------
    Numbers
        (problems, solvers). Infinite where a solver failed, also on a problem that none solved.

    Examples
    --------
    >>> ratios([[2.0, 4.0, np.inf], [np.inf, np.inf, np.inf]])
    array([[ 1.,  2., inf],
           [inf, inf, inf]])
    """
    costs = np.asarray(costs, np.float64)
    if costs.ndim != 2 or not np.all(costs > 0):
        raise ValueError(f"costs must be positive numbers (problems, solvers), got shape {costs.shape}")
    least = np.min(costs, axis=1, keepdims=True, initial=np.inf)
    solved = np.isfinite(costs)
    return np.divide(costs, least, out=np.full_like(costs, np.inf), where=solved)


def profile(ratios: ArrayLike, tau: ArrayLike) -> Numbers:
    """ρ(τ): the share of all problems that a solver solves at no more than τ times the least cost.

    Parameters
    ----------
    ratios
        (problems, solvers), see :func:`ratios`. Problems that no solver solved count, too.
    tau
        (m,).

    Returns
    -------
    Numbers
        (m, solvers).

    Examples
    --------
    >>> profile([[1.0, 2.0], [np.inf, 1.0]], [1.0, 2.0])
    array([[0.5, 0.5],
           [0.5, 1. ]])
    """
    ratios, tau = np.asarray(ratios, np.float64), np.asarray(tau, np.float64)
    within: Numbers = np.mean(ratios[None, :, :] <= tau[:, None, None], axis=1)
    return within
