"""A small layer in JAX, as a fixed point and as a long loop: what the tests of JAX's transformations share."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import libraries  # noqa: F401  # configures JAX
import numpy as np
from problems import layer

import implicit_core as ic
from implicit_core.adapters import jax as icj

SOLVER = ic.FixedPointIteration(rtol=1e-13, max_steps=300)
EXACT = ic.Implicit(ic.Richardson(rtol=1e-13))  # compiled in a fraction of the time that GMRES takes
CONVERGED = [EXACT, ic.Neumann(300, 1.0), ic.Unroll(300, 1.0), ic.BPTT(300)]
GRADIENTS = [
    ic.Unroll(20, 1.0),
    ic.Unroll(20, 1.0, recompute=True),
    ic.Neumann(40, 1.0),
    ic.NeumannSeries(1.0, 1e-9),
    ic.OneStep(),
    ic.Implicit(),
    ic.Implicit(ic.BiCGSTAB()),
    ic.BPTT(40),
]
"""Every estimator, exact to three digits or more for a map of contraction 0.5, but for one step."""
Layer = Callable[[jax.Array, jax.Array], jax.Array]


def data(batch: int = 2, width: int = 3, **options: Any) -> tuple[jax.Array, jax.Array]:
    case = layer(batch=batch, width=width, **{"contraction": 0.7, **options})
    return jnp.asarray(case.z["w"]), jnp.asarray(case.z["x"])


def cell(h: Any, z: Any) -> Any:
    return jnp.tanh(h @ z["w"].T + z["x"][0])


def iterate(f: Callable[[Any], Any], h: Any, steps: int = 500) -> Any:
    """``steps`` plain steps, which JAX differentiates in every way."""
    return jax.lax.scan(lambda h, _: (f(h), None), h, length=steps)[0]


def loop(w: jax.Array, x: jax.Array) -> jax.Array:
    return iterate(lambda h: jnp.tanh(h @ w.T + x), jnp.zeros_like(x))


def layer_of(estimator: ic.Estimator, closed: bool = False, solver: Any = SOLVER) -> Layer:
    """The fixed point as a function of w and x, in z or closed over."""

    def call(w: jax.Array, x: jax.Array) -> jax.Array:
        options = {"solver": solver, "gradient": estimator, "batch_ndim": x.ndim - 1}
        if closed:
            return icj.fixed_point(lambda h, _: jnp.tanh(h @ w.T + x), jnp.zeros_like(x), None, **options).value
        return icj.fixed_point(cell, jnp.zeros_like(x), {"w": w, "x": (x,)}, **options).value

    return call


def loss(fixed_point: Layer) -> Layer:
    return lambda w, x: jnp.sum(fixed_point(w, x) ** 3)


def assert_close(ours: Any, theirs: Any, atol: float) -> None:
    """Equal pytrees, dtypes and shapes, numbers within ``atol``."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(a, b, atol=atol, rtol=0)
