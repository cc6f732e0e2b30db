"""Softmax regression with a penalty for each feature, on arrays of any library."""

from dataclasses import dataclass
from typing import Any

from array_api_compat import array_namespace

Array = Any


def cross_entropy(w: Array, x: Array, y: Array) -> Array:
    """Mean over the samples: w (features, classes), x (n, features), y (n, classes) one-hot."""
    xp = array_namespace(w)
    logits = x @ w
    top = xp.max(logits, axis=1, keepdims=True)
    normalizer = top[:, 0] + xp.log(xp.sum(xp.exp(logits - top), axis=1))
    return xp.mean(normalizer - xp.sum(y * logits, axis=1))


def probabilities(w: Array, x: Array) -> Array:
    """The softmax of x w, (n, classes)."""
    xp = array_namespace(w)
    logits = x @ w
    weights = xp.exp(logits - xp.max(logits, axis=1, keepdims=True))
    return weights / xp.sum(weights, axis=1, keepdims=True)


@dataclass(frozen=True)
class Regression:
    r"""The inner problem, of which the weights w (features, classes) are the solution.

    .. math::
        \min_w L(w, θ) = \frac1n \sum_i \ell(x_i^T w, y_i) + \frac12 \sum_j e^{θ_j} \|w_j\|_2^2

    θ (features,) is the logarithm of each feature's penalty.

    Parameters
    ----------
    x, y
        Training samples (n, features) and one-hot labels (n, classes).
    curvature
        A bound on the largest eigenvalue of the Hessian of the first term.
    """

    x: Array
    y: Array
    curvature: float

    def gradient(self, w: Array, theta: Array) -> Array:
        """∂L/∂w."""
        xp = array_namespace(w)
        errors = probabilities(w, self.x) - self.y
        return self.x.T @ errors / self.x.shape[0] + xp.exp(theta)[:, None] * w

    def step_size(self, theta: Array) -> Array:
        """One over a bound on the largest eigenvalue of the Hessian of L."""
        xp = array_namespace(theta)
        return 1 / (self.curvature + xp.max(xp.exp(theta)))

    def step(self, w: Array, theta: Array) -> Array:
        """F(w, θ) = w - η ∂L/∂w, a contraction: its Jacobian I - η ∂²L/∂w² has eigenvalues in [0, 1 - η min e^θ].

        η depends on θ too. At the fixed point that adds nothing to ∂F/∂θ, as ∂L/∂w is zero there.
        """
        return w - self.step_size(theta) * self.gradient(w, theta)

    def hessian_product(self, w: Array, theta: Array, v: Array) -> Array:
        """(∂²L/∂w²) v, shaped as w; η times it is (I - ∂F/∂w) v."""
        xp = array_namespace(w)
        p, u = probabilities(w, self.x), self.x @ v
        centered = p * (u - xp.sum(p * u, axis=1, keepdims=True))
        return self.x.T @ centered / self.x.shape[0] + xp.exp(theta)[:, None] * v
