"""Fixed-point equations for comparing solvers, each with F in PyTorch and in JAX."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from implicit_core.arrays import Array

Weights = dict[str, Any]


@dataclass(frozen=True)
class Operations:
    """The functions of a framework from which F is built; features are the last axis, channels the second."""

    tanh: Callable[[Array], Array]
    relu: Callable[[Array], Array]
    softmax: Callable[[Array], Array]
    layer_norm: Callable[[Array], Array]
    group_norm: Callable[[Array], Array]
    conv: Callable[[Array, Array], Array]
    swap: Callable[[Array], Array]


GROUPS = 4


def torch_operations() -> Operations:
    """The functions of PyTorch."""
    import torch
    from torch.nn import functional

    return Operations(
        tanh=torch.tanh,
        relu=torch.relu,
        softmax=lambda x: torch.softmax(x, -1),
        layer_norm=lambda x: functional.layer_norm(x, x.shape[-1:]),
        group_norm=lambda x: functional.group_norm(x, GROUPS),
        conv=lambda x, w: functional.conv2d(x, w, padding=1),
        swap=lambda x: x.mT,
    )


def jax_operations() -> Operations:
    """The functions of JAX."""
    import jax
    import jax.numpy as jnp

    def group_norm(x: Array) -> Array:
        grouped = x.reshape(x.shape[0], GROUPS, -1)
        return jax.nn.standardize(grouped, axis=-1).reshape(x.shape)

    return Operations(
        tanh=jnp.tanh,
        relu=jax.nn.relu,
        softmax=jax.nn.softmax,
        layer_norm=jax.nn.standardize,
        group_norm=group_norm,
        conv=lambda x, w: jax.lax.conv_general_dilated(x, w, (1, 1), "SAME"),
        swap=lambda x: jnp.swapaxes(x, -1, -2),
    )


@dataclass(frozen=True)
class Equation:
    """h = F(h, z) for a batch, from h = 0.

    Attributes
    ----------
    name
        Name in the tables.
    function
        ``(operations, h, z) -> F(h, z)``.
    shape
        Shape of h; the first axis is the batch.
    z
        Inputs and weights: NumPy arrays, converted to float32.
    """

    name: str
    function: Callable[[Operations, Array, Weights], Array]
    shape: tuple[int, ...]
    z: Weights

    def __post_init__(self) -> None:
        z = {name: np.ascontiguousarray(value, np.float32) for name, value in self.z.items()}
        object.__setattr__(self, "z", z)

    def bare(self, evaluations: int) -> Callable[[], Array]:
        """A function that evaluates F in PyTorch ``evaluations`` times and does nothing else."""
        import torch

        f, h0, z = self.torch()

        def run() -> Array:
            h = h0
            with torch.no_grad():
                for _ in range(evaluations):
                    h = f(h, z)
            return h

        return run

    def torch(self) -> tuple[Callable[[Array, Weights], Array], Array, Weights]:
        """F, the initial state and z in PyTorch."""
        import torch

        operations = torch_operations()
        z = {name: torch.from_numpy(value) for name, value in self.z.items()}
        return lambda h, z: self.function(operations, h, z), torch.zeros(self.shape), z

    def jax(self) -> tuple[Callable[[Array, Weights], Array], Array, Weights]:
        """F, the initial state and z in JAX."""
        import jax.numpy as jnp

        operations = jax_operations()
        z = {name: jnp.asarray(value) for name, value in self.z.items()}
        return lambda h, z: self.function(operations, h, z), jnp.zeros(self.shape, jnp.float32), z


def _layer(ops: Operations, h: Array, z: Weights) -> Array:
    return ops.tanh(h @ z["w"].T + z["x"])


def _scaled_layer(ops: Operations, h: Array, z: Weights) -> Array:
    return ops.tanh(z["scale"] * (h @ z["w"].T) + z["x"])


def _convolution(ops: Operations, h: Array, z: Weights) -> Array:
    return ops.conv(ops.relu(ops.group_norm(ops.conv(h, z["first"]) + z["x"])), z["second"])


def _attention(ops: Operations, h: Array, z: Weights) -> Array:
    x = ops.layer_norm(h + z["x"])
    scores = (x @ z["query"]) @ ops.swap(x @ z["key"]) / x.shape[-1] ** 0.5
    mixed = ops.softmax(scores) @ (x @ z["value"]) + z["x"]
    return mixed + ops.relu(mixed @ z["up"]) @ z["down"]


def _heat(_: Operations, h: Array, z: Weights) -> Array:
    return z["x"] + h @ z["laplacian"] - 0.1 * h * h * h


def _symmetric(rng: np.random.Generator, width: int, radius: float) -> np.ndarray:
    q, _ = np.linalg.qr(rng.normal(size=(width, width)))
    return (q * np.linspace(-radius, radius, width)) @ q.T


def random_layer(rng: np.random.Generator, batch: int, width: int) -> Equation:
    """tanh(W h + x), W with independent normal entries and spectral radius 0.9."""
    z = {"w": 0.9 * rng.normal(size=(width, width)) / width**0.5, "x": rng.normal(size=(batch, width))}
    return Equation(f"random {batch}x{width}", _layer, (batch, width), z)


def symmetric_layer(rng: np.random.Generator, batch: int, width: int) -> Equation:
    """tanh(W h + x), W symmetric with eigenvalues evenly spaced in ±0.95."""
    z = {"w": _symmetric(rng, width, 0.95), "x": 0.3 * rng.normal(size=(batch, width))}
    return Equation(f"symmetric {batch}x{width}", _layer, (batch, width), z)


def convolution(rng: np.random.Generator, batch: int, channels: int, size: int) -> Equation:
    """Convolution, group normalization, ReLU and convolution, as in a multiscale DEQ."""
    shape = (batch, channels, size, size)
    fan_in = 9 * channels
    z = {
        "first": rng.normal(size=(channels, channels, 3, 3)) / fan_in**0.5,
        "second": 0.4 * rng.normal(size=(channels, channels, 3, 3)) / fan_in**0.5,
        "x": 0.3 * rng.normal(size=shape),
    }
    return Equation("convolution", _convolution, shape, z)


def attention(rng: np.random.Generator, batch: int, tokens: int, width: int) -> Equation:
    """Self-attention and a feed-forward part, as in a DEQ transformer."""
    z = {name: rng.normal(size=(width, width)) / width**0.5 for name in ("query", "key")}
    z["value"] = 0.7 * rng.normal(size=(width, width)) / width**0.5
    z["up"] = rng.normal(size=(width, 2 * width)) / width**0.5
    z["down"] = 0.3 * rng.normal(size=(2 * width, width)) / width**0.5
    z["x"] = rng.normal(size=(batch, tokens, width))
    return Equation("attention", _attention, (batch, tokens, width), z)


def heat(rng: np.random.Generator, batch: int, points: int, stiffness: float) -> Equation:
    """An implicit Euler step of u_t = u_xx - u³ with 4 dt/dx² = ``stiffness``: plain iteration diverges above 1."""
    second = -2 * np.eye(points) + np.eye(points, k=1) + np.eye(points, k=-1)
    grid = np.linspace(0, 1, points + 2)[1:-1]
    modes = np.sin(np.pi * np.arange(1, 9)[:, None] * grid)
    z = {"laplacian": 0.25 * stiffness * second, "x": 0.5 * rng.normal(size=(batch, 8)) @ modes}
    return Equation("stiff heat", _heat, (batch, points), z)


def many_speeds(rng: np.random.Generator, batch: int, width: int) -> Equation:
    """A layer whose samples contract at different rates, from 0.05 to 0.95."""
    z = {
        "w": _symmetric(rng, width, 1.0),
        "x": 0.3 * rng.normal(size=(batch, width)),
        "scale": np.linspace(0.05, 0.95, batch)[:, None],
    }
    return Equation("many speeds", _scaled_layer, (batch, width), z)


SIZES = [(32, 128), (128, 512), (256, 1024)]
QUICK = [(32, 128)]


def equations(seed: int, *, quick: bool = False) -> list[Equation]:
    """All equations; with ``quick``, at small sizes."""
    rng = np.random.default_rng(seed)
    return [
        *(make(rng, *size) for make in (random_layer, symmetric_layer) for size in (QUICK if quick else SIZES)),
        convolution(rng, *((4, 8, 8) if quick else (16, 32, 16))),
        attention(rng, *((4, 8, 16) if quick else (16, 32, 128))),
        heat(rng, 16 if quick else 64, 100, 4.0),
        many_speeds(rng, 32 if quick else 64, 64 if quick else 256),
    ]
