"""Hypergradients compared with the exact one, their cost, and the search that uses them."""

from dataclasses import dataclass

import numpy as np

import implicit_core as ic

from . import oracle
from .data import Data, Floats
from .frameworks import Evaluate

SOLVER = ic.Anderson(memory=10, rtol=1e-8, max_steps=1000)
START, LOWEST, HIGHEST = (float(np.log(penalty)) for penalty in (0.05, 0.01, 1.0))
"""The logarithms of the penalties: where the search starts, and the box it stays in."""

ESTIMATORS: dict[str, ic.Estimator] = {
    "OneStep": ic.OneStep(),
    "Neumann(5)": ic.Neumann(k=5, lam=1.0),
    "Neumann(20)": ic.Neumann(k=20, lam=1.0),
    "Neumann(80)": ic.Neumann(k=80, lam=1.0),
    "Unroll(20)": ic.Unroll(k=20, lam=1.0),
    "Implicit(GMRES)": ic.Implicit(ic.GMRES(restart=50, rtol=1e-8, max_steps=1000)),
    "Implicit(CG)": ic.Implicit(ic.CG(rtol=1e-8, max_steps=1000)),
    "BPTT(20)": ic.BPTT(k=20),
    "BPTT(100)": ic.BPTT(k=100),
}
"""No damping: the eigenvalues of ∂F/∂h are real and in [0, 1) already."""


@dataclass(frozen=True)
class Hypergradient:
    """One hypergradient, compared with the exact one, and its cost.

    Attributes
    ----------
    gradient
        dV/dθ, (features,).
    cosine, error
        Cosine of the angle to the exact one, and the norm of the difference relative to the norm of the exact one.
    solve, value, products
        Evaluations of F by the solver and for the estimator's value, and products with transposed Jacobians of F.
    """

    gradient: Floats
    cosine: float
    error: float
    solve: int
    value: int
    products: int


@dataclass(frozen=True)
class Trace:
    """A search.

    Attributes
    ----------
    losses
        The validation loss before each step, as the estimator's value gives it.
    theta
        The logarithms of the penalties after the last step.
    """

    losses: Floats
    theta: Floats


def start(data: Data) -> tuple[Floats, Floats]:
    """θ and w to start from: equal penalties, and zeros."""
    features, classes = data.training.x.shape[1], data.training.y.shape[1]
    return np.full(features, START), np.zeros((features, classes))


def compare(data: Data, evaluate: Evaluate, gradient: ic.Estimator, theta: Floats, exact: Floats) -> Hypergradient:
    """The estimator's hypergradient at θ, with an inner problem that is solved from zero."""
    found = evaluate(theta, start(data)[1])
    difference, norm = found.gradient - exact, np.linalg.norm(exact)
    return Hypergradient(
        found.gradient,
        cosine=float(found.gradient @ exact / (np.linalg.norm(found.gradient) * norm)),
        error=float(np.linalg.norm(difference) / norm),
        solve=0 if gradient.starts_from_h0 else found.evaluations,
        value=gradient.k if isinstance(gradient, ic.Unroll | ic.BPTT) else 1,
        products=products(data, gradient, theta, found.weights),
    )


def products(data: Data, gradient: ic.Estimator, theta: Floats, w: Floats) -> int:
    """Products with (∂F/∂h)ᵀ and (∂F/∂z)ᵀ in a pullback, as documented; a linear solver is run to count them."""
    match gradient:
        case ic.Unroll(k=k) | ic.BPTT(k=k):
            return 2 * k - 1
        case ic.Neumann(k=k):
            return k
        case ic.OneStep():
            return 1
        case ic.Implicit(linear_solver=solver):
            x, y = data.validation
            cotangent = x.T @ (oracle.softmax(x @ w) - y) / len(x)
            training, size = data.training, data.training.step_size(theta)
            # I - ∂F/∂h is η times the Hessian: symmetric and positive definite, which is what CG asks for.
            system = ic.solve_linear(
                lambda v: size * training.hessian_product(w, theta, v), cotangent, solver=solver, throw=True
            )
            return int(system.stats.evaluations) + 1
    raise TypeError(f"the number of products of {gradient!r} is not known before it runs")


def search(data: Data, evaluate: Evaluate, gradient: ic.Estimator, steps: int = 40, rate: float = 0.2) -> Trace:
    """Lower the validation loss by steps of Adam on θ, within the box. A solve starts at the solution before."""
    theta, zeros = start(data)
    w, losses = zeros, []
    mean, square = np.zeros_like(theta), np.zeros_like(theta)
    for step in range(1, steps + 1):
        found = evaluate(theta, zeros if gradient.starts_from_h0 else w)
        w = found.weights
        losses.append(found.loss)
        mean = 0.9 * mean + 0.1 * found.gradient
        square = 0.99 * square + 0.01 * found.gradient**2
        change = (mean / (1 - 0.9**step)) / (np.sqrt(square / (1 - 0.99**step)) + 1e-8)
        theta = np.clip(theta - rate * change, LOWEST, HIGHEST)
    return Trace(np.asarray(losses), theta)


def shared_penalty(data: Data, candidates: int = 9) -> Trace:
    """The baseline: one penalty for all features, the best of a grid over the box."""
    ones = np.ones(data.training.x.shape[1])
    thetas = [theta * ones for theta in np.linspace(LOWEST, HIGHEST, candidates)]
    losses = [oracle.loss(oracle.solve(data.training, theta), data.validation) for theta in thetas]
    return Trace(np.asarray(losses), thetas[int(np.argmin(losses))])
