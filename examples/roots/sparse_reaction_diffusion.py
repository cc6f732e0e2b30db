"""The time steps of ``reaction_diffusion`` in NumPy, with a sparse Jacobian by hand."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

import implicit_core as ic

from .reaction_diffusion import RATE, RATIO, SUPPLY

Array = NDArray[np.float64]
Inputs = tuple[Array, Array]
"""The state before the step, (2, n, n), and the feed, (n, n)."""


def diffusion(n: int) -> Any:
    """D ∇² with five points on a periodic unit square, a sparse (2n², 2n²) matrix."""
    ring = sp.diags_array([1.0, 1.0, -2.0, 1.0, 1.0], offsets=[1 - n, -1, 0, 1, n - 1], shape=(n, n))
    square = n**2 * sp.kronsum(ring, ring)
    return sp.block_diag([square, RATIO * square], format="csr")


def implicit_euler(n: int, dt: float) -> ic.RootProblem[Array, Inputs]:
    """A step of length dt on n² points: g, its Jacobian in the state, and its products with those in the inputs."""
    operator = diffusion(n)

    def g(w: Array, z: Inputs) -> Array:
        (u, v), (before, feed) = w, z
        reaction = RATE * np.stack([feed - u + u**2 * v, SUPPLY - u**2 * v])
        value: Array = w - before - dt * ((operator @ w.ravel()).reshape(w.shape) + reaction)
        return value

    def jacobian(w: Array, _: Inputs) -> Any:
        u, v = w.reshape(2, -1)
        blocks = [[2 * u * v - 1, u**2], [-2 * u * v, -(u**2)]]
        reaction = sp.block_array([[sp.diags_array(RATE * part) for part in row] for row in blocks])
        return sp.eye_array(w.size) - dt * (operator + reaction)

    def vjp(w: Array, z: Inputs, y: Array) -> tuple[Array, Inputs]:
        y_w: Array = (jacobian(w, z).T @ y.ravel()).reshape(w.shape)
        return y_w, (-y, -dt * RATE * y[0])

    return ic.RootProblem(g, jacobian=jacobian, vjp=vjp)


def simulate(problem: ic.RootProblem[Array, Inputs], start: Array, feed: Array, steps: int) -> list[Array]:
    """The state at the start and after each step."""
    states = [start]
    for _ in range(steps):
        solution = ic.solve(problem, states[-1], (states[-1], feed), solver=ic.Newton(rtol=1e-10))
        assert solution.converged
        states.append(solution.value)
    return states


def gradient(problem: ic.RootProblem[Array, Inputs], states: Sequence[Array], feed: Array, w_bar: Array) -> Array:
    """The gradient in the feed of what has the gradient ``w_bar`` in the last state: the steps in reverse."""
    total = np.zeros_like(feed)
    for before, after in zip(states[-2::-1], states[:0:-1], strict=True):
        _, pullback = ic.Implicit(ic.GMRES(rtol=1e-10)).vjp(problem, after, (before, feed))
        w_bar, feed_bar = pullback(w_bar)
        total += feed_bar
    return total
