"""Implicit time steps of Schnakenberg's reaction-diffusion system, in JAX."""

import jax
import jax.numpy as jnp

import implicit_core as ic

RATE, SUPPLY, RATIO = 2000.0, 0.9, 20.0  # γ, b, and the ratio d of the diffusion constants


def reaction(w: jax.Array, feed: jax.Array) -> jax.Array:
    """What reactions add to the activator u = w[0] and to the substrate v = w[1], (2, n, n)."""
    u, v = w
    return RATE * jnp.stack([feed - u + u**2 * v, SUPPLY - u**2 * v])


def diffused(w: jax.Array, dt: jax.Array) -> jax.Array:
    """(I - dt D ∇²)⁻¹ w, by FFT: one implicit step of diffusion with five points on a periodic unit square."""
    n = w.shape[-1]
    waves = 4 * n**2 * jnp.sin(jnp.pi / n * jnp.arange(n, dtype=w.dtype)) ** 2
    eigenvalues = waves[:, None] + waves[None, : n // 2 + 1]
    factors = jnp.stack([1 + dt * eigenvalues, 1 + dt * RATIO * eigenvalues])
    return jnp.fft.irfft2(jnp.fft.rfft2(w) / factors, s=(n, n))


def implicit_euler(w: jax.Array, z: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
    """g, whose root is the state one step of length dt after the state ``before``."""
    before, feed, dt = z
    return w - diffused(before + dt * reaction(w, feed), dt)


def simulate(start: jax.Array, feed: jax.Array, dts: jax.Array, rtol: float = 1e-6) -> tuple[jax.Array, jax.Array]:
    """The state after steps of lengths ``dts``, and the status of each; with derivatives to the same tolerance."""
    solver, gradient = ic.NewtonKrylov(rtol=rtol), ic.Implicit(ic.GMRES(rtol=rtol))

    def step(w: jax.Array, dt: jax.Array) -> tuple[jax.Array, jax.Array]:
        solution = ic.root(implicit_euler, w, (w, feed, dt), solver=solver, gradient=gradient)
        return solution.value, solution.status

    return jax.lax.scan(step, start, dts)
