"""A layer in JAX, as a fixed point and as a long loop: what the tests of packages for JAX share."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import implicit_core as ic

jax.config.update("jax_enable_x64", True)

Solve = Callable[[Callable[[Any], Any], Any], Any]
"""``solve(cell, h0)``: the point h = cell(h)."""

SOLVER = ic.Anderson(rtol=1e-13, max_steps=200)
EXACT = ic.Implicit(ic.GMRES(rtol=1e-13))
LONG = ic.Neumann(150, 1.0)
CONVERGED = [EXACT, LONG]
"""Estimators whose gradients are those of a long loop, for contractions of 0.8 and less."""

W = 0.7 * np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))[0]
X = np.random.default_rng(1).standard_normal((4, 3))


def name(gradient: ic.Estimator) -> str:
    """A short name for a test."""
    return type(gradient).__name__


def layer(gradient: ic.Estimator = LONG, **options: Any) -> Solve:
    """A solve by the library, whose cell closes over its parameters."""

    def solve(cell: Callable[[Any], Any], h0: Any) -> Any:
        settings = {"solver": SOLVER, "gradient": gradient} | options
        return ic.fixed_point(lambda h, _: cell(h), h0, None, **settings).value

    return solve


def loop(cell: Callable[[Any], Any], h0: Any, steps: int = 150) -> Any:
    """A solve by plain steps, which JAX differentiates."""
    return jax.lax.scan(lambda h, _: (cell(h), None), h0, length=steps)[0]


def close(ours: Any, expected: Any, atol: float = 1e-9) -> None:
    """Fail where the leaves of two pytrees differ."""
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=atol, rtol=atol)


def squares(output: Any) -> Any:
    """A loss whose gradient has no zeros."""
    return jnp.sum((output - 0.5) ** 2)
