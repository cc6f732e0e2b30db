"""The model of ``model.py`` in JAX, as Equinox modules with the same names."""

from typing import Any, NamedTuple, TypeAlias, cast

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.nn import silu

import implicit_core as ic

from .sudoku import CELLS, DIGITS

State: TypeAlias = tuple[jax.Array, jax.Array]
"""The answer y and the latent z, each (n, 36, width)."""


def linear(layer: eqx.nn.Linear, x: jax.Array) -> jax.Array:
    """A linear layer over the last axis, whatever the axes before it."""
    return x @ layer.weight.T


def rms_norm(x: jax.Array) -> jax.Array:
    """X divided by its root mean square over the last axis."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + jnp.finfo(x.dtype).eps)


class SwiGLU(eqx.Module):
    """A gated layer over the last axis, by N. Shazeer, *GLU variants improve transformer* (2020)."""

    inner: eqx.nn.Linear
    outer: eqx.nn.Linear

    def __init__(self, width: int, expansion: int, key: jax.Array) -> None:
        keys = jax.random.split(key)
        self.inner = eqx.nn.Linear(width, 2 * expansion * width, use_bias=False, key=keys[0])
        self.outer = eqx.nn.Linear(expansion * width, width, use_bias=False, key=keys[1])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Of the shape of x."""
        gate, value = jnp.split(linear(self.inner, x), 2, axis=-1)
        return linear(self.outer, silu(gate) * value)


class Block(eqx.Module):
    """Mixes the cells, then the channels, of x (n, 36, width). Each sum is normalized, so that no state grows."""

    cells: SwiGLU
    channels: SwiGLU

    def __init__(self, width: int, expansion: int, key: jax.Array) -> None:
        keys = jax.random.split(key)
        self.cells, self.channels = SwiGLU(CELLS, expansion, keys[0]), SwiGLU(width, expansion, keys[1])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Of the shape of x."""
        x = rms_norm(x + self.cells(x.mT).mT)
        return rms_norm(x + self.channels(x))


class Recursion(eqx.Module):
    """F((y, z), x), one recursion: ``steps`` times z ← net(x + y + z), then y ← net(y + z)."""

    net: list[Block]
    steps: int = eqx.field(static=True)
    last_step: bool = eqx.field(static=True)

    def __call__(self, h: State, x: jax.Array) -> State:
        """The next state (y, z), for the embedded puzzle x (n, 36, width)."""
        y, z = h
        z = self.latent(z, x + y)
        return self.apply(y + z), z

    def latent(self, z: jax.Array, given: jax.Array) -> jax.Array:
        """The new z (n, 36, width); with ``last_step`` the gradient passes through the last step of it alone."""

        def step(z: jax.Array, given: jax.Array) -> jax.Array:
            return self.apply(given + z)

        if self.last_step:
            solver, gradient = ic.steps(self.steps - 1), ic.Unroll(1, 1.0)
            return ic.fixed_point(step, z, given, solver=solver, gradient=gradient, batch_ndim=1).value
        # Compiled once, and not as often as it is made.
        updated: jax.Array = jax.lax.fori_loop(0, self.steps, lambda _, z: step(z, given), z)
        return updated

    def apply(self, x: jax.Array) -> jax.Array:
        """The network: of the shape of x."""
        for block in self.net:
            x = block(x)
        return x


class Prediction(NamedTuple):
    """What the model says of n puzzles.

    Attributes
    ----------
    logits
        Of the digits 1 to 6 in each cell: (n, 36, 6).
    solved
        The logit of its belief that all of them are right: (n,).
    state
        Where the next call starts, without a gradient.
    relative
        The relative residuals of the recursions: (n,).
    """

    logits: jax.Array
    solved: jax.Array
    state: State
    relative: jax.Array


class RecursiveModel(eqx.Module):
    """Improves the answers to puzzles by some recursions, each time it is called; see :class:`.model.RecursiveModel`.

    Parameters
    ----------
    width
        Channels of a cell.
    steps
        Updates of the latent in a recursion.
    last_step
        Whether the gradient of a recursion passes through the last update of its latent alone.
    key
        Of the initial parameters.
    """

    digits: eqx.nn.Embedding
    positions: eqx.nn.Embedding
    recursion: Recursion
    head: eqx.nn.Linear
    halt: eqx.nn.Linear

    def __init__(self, width: int, steps: int, *, expansion: int = 2, last_step: bool = False, key: jax.Array) -> None:
        keys = jax.random.split(key, 6)
        self.digits = eqx.nn.Embedding(DIGITS + 1, width, key=keys[0])
        self.positions = eqx.nn.Embedding(CELLS, width, key=keys[1])
        net = [Block(width, expansion, key) for key in keys[2:4]]
        self.recursion = Recursion(net, steps, last_step)
        self.head = eqx.nn.Linear(width, DIGITS, use_bias=False, key=keys[4])
        self.halt = eqx.nn.Linear(width, 1, key=keys[5])

    def start(self, clues: Any) -> State:
        """The state of puzzles before the first call: zeros."""
        weight = self.digits.weight
        y = jnp.zeros((*clues.shape, weight.shape[1]), weight.dtype)
        return y, y

    def __call__(
        self, clues: jax.Array, state: State, *, solver: ic.FixedPointIteration, gradient: ic.Estimator
    ) -> Prediction:
        """The prediction for clues (n, 36) after more recursions, those of ``solver`` and ``gradient``."""
        solution = ic.fixed_point(
            self.recursion, state, self.embed(clues), solver=solver, gradient=gradient, batch_ndim=1
        )
        assert solution.stats.relative is not None
        return Prediction(*self.read(solution.value[0]), jax.lax.stop_gradient(solution.value), solution.stats.relative)

    def embed(self, clues: Any) -> jax.Array:
        """The puzzle as the recursions see it: (n, 36, width)."""
        return self.digits.weight[jnp.asarray(clues)] + self.positions.weight[None]

    def read(self, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The logits (n, 36, 6) of an answer, and of the belief that it is right: (n,)."""
        bias = cast("jax.Array", self.halt.bias)
        return linear(self.head, y), linear(self.halt, y.mean(axis=1))[:, 0] + bias
