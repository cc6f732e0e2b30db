"""The exact hypergradient by dense linear algebra in NumPy, without the library and without autodiff."""

import numpy as np

from .data import Data, Floats, Samples
from .model import Regression


def softmax(logits: Floats) -> Floats:
    """Along the last axis."""
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities: Floats = weights / weights.sum(axis=1, keepdims=True)
    return probabilities


def loss(w: Floats, samples: Samples) -> float:
    """Mean cross-entropy."""
    return float(-np.mean(np.log(softmax(samples.x @ w)[samples.y == 1])))


def hessian(problem: Regression, w: Floats, theta: Floats) -> Floats:
    """Hessian of the inner objective at w, a matrix over the flattened w (features · classes)."""
    x, p = problem.x, softmax(problem.x @ w)
    features, classes = w.shape
    # The block of classes a and b is xᵀ diag(p_a δ_ab - p_a p_b) x / n.
    blocks = np.empty((features, classes, features, classes))
    for a in range(classes):
        for b in range(classes):
            weights = p[:, a] * ((a == b) - p[:, b]) / len(x)
            blocks[:, a, :, b] = (x.T * weights) @ x + (a == b) * np.diag(np.exp(theta))
    return blocks.reshape(w.size, w.size)


def solve(problem: Regression, theta: Floats, w: Floats | None = None) -> Floats:
    """The minimizer, by Newton's method."""
    x, y = problem.x, problem.y
    w = np.zeros((x.shape[1], y.shape[1])) if w is None else w
    for _ in range(50):
        gradient = x.T @ (softmax(x @ w) - y) / len(x) + np.exp(theta)[:, None] * w
        if np.linalg.norm(gradient) < 1e-13:
            return w
        change = np.linalg.solve(hessian(problem, w, theta), gradient.ravel()).reshape(w.shape)
        w = w - change
        if np.linalg.norm(change) < 1e-12 * np.linalg.norm(w):
            return w
    raise RuntimeError(f"Newton's method did not converge: ‖gradient‖ = {np.linalg.norm(gradient):.1e}")


def hypergradient(data: Data, theta: Floats, w: Floats) -> Floats:
    """dV/dθ of the validation loss V at the minimizer w: the j-th number is -e^θ_j ⟨w_j, (H⁻¹ ∂V/∂w)_j⟩."""
    x, y = data.validation
    outer = x.T @ (softmax(x @ w) - y) / len(x)
    adjoint = np.linalg.solve(hessian(data.training, w, theta), outer.ravel()).reshape(w.shape)
    gradient: Floats = -np.exp(theta) * np.sum(w * adjoint, axis=1)
    return gradient


def central_difference(data: Data, theta: Floats, feature: int, w: Floats, distance: float = 1e-4) -> float:
    """dV/dθ_j by solving the inner problem twice more, at θ_j ± distance."""
    values = []
    for sign in (1, -1):
        shifted = theta.copy()
        shifted[feature] += sign * distance
        values.append(loss(solve(data.training, shifted, w), data.validation))
    return (values[0] - values[1]) / (2 * distance)
