"""The GPU benchmark in JAX. JAX has no device events, so the host's clock is read when the results are ready."""

from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import implicit_core as ic

from .gpu_rows import CONTRACTION, GRADIENTS, STEPS, Measured, Omission, Row, Settings, Task, carry_out, layer, solvers

Loss = Callable[[Any, jax.Array], jax.Array]


def missing(device: str) -> str | None:
    """Why JAX cannot be measured on a device; None if it can."""
    if device == "cpu" or any(found.platform == "gpu" for found in jax.devices()):
        return None
    return "JAX found no GPU"


def run(settings: Settings, announce: Callable[[str], None]) -> Measured:
    """Rows of all cases."""
    jax.config.update("jax_default_matmul_precision", "highest")  # as the other frameworks': no TF32
    where = jax.devices("cpu" if settings.device == "cpu" else "gpu")[0]
    tasks: list[Task] = []
    for batch, width in settings.sizes:
        given = jax.device_put(layer(batch, width), where)
        tasks += _tasks(settings, f"tanh {batch} x {width}", _tanh, given, jnp.zeros_like(given["x"]))
    batch, channels, size = settings.block
    rng = np.random.default_rng(0)
    x = jax.device_put(rng.standard_normal((batch, channels, size, size)).astype(np.float32), where)
    scale = CONTRACTION / (9 * channels) ** 0.5
    kernels = {
        name: jax.device_put((scale * rng.standard_normal((channels, channels, 3, 3))).astype(np.float32), where)
        for name in ("first", "second")
    }
    tasks += _tasks(settings, f"conv {batch}x{channels}x{size}²", _block, {"x": x, **kernels}, jnp.zeros_like(x))
    yield from carry_out(tasks, settings, announce)
    yield Omission("peak memory in JAX", "JAX reports the peak of the whole process, not of a step")


def _tanh(h: jax.Array, z: Any) -> jax.Array:
    return jnp.tanh(h @ z["w"].T + z["x"])


def _block(h: jax.Array, z: Any) -> jax.Array:
    """Convolution, group normalization, ReLU and convolution."""
    convolve = partial(jax.lax.conv, window_strides=(1, 1), padding="SAME")
    y = convolve(h, z["first"]) + z["x"]
    groups = y.reshape(len(y), min(4, y.shape[1]), -1)
    groups = groups - groups.mean(axis=2, keepdims=True)
    groups = groups * jax.lax.rsqrt(jnp.mean(groups**2, axis=2, keepdims=True) + 1e-5)
    return convolve(jax.nn.relu(groups.reshape(y.shape)), z["second"])


def _tasks(settings: Settings, case: str, f: Any, z: Any, h0: jax.Array) -> list[Task]:
    neumann = GRADIENTS["Neumann(5)"]
    found = {f"{name}, Neumann(5)": (solver, neumann) for name, solver in solvers().items()}
    found |= {f"Anderson, {name}": (solvers()["Anderson"], gradient) for name, gradient in GRADIENTS.items()}
    found["Anderson, check_every=5"] = solvers(check_every=5)["Anderson"], neumann
    tasks: list[Task] = [
        (case, name, partial(_measure, settings, case, name, f, z, h0, solver, gradient))
        for name, (solver, gradient) in found.items()
    ]
    return [*tasks, (case, "Anderson, without jit", partial(_eager, settings, case, f, z, h0))]


def _measure(
    settings: Settings, case: str, name: str, f: Any, z: Any, h0: Any, solver: ic.Solver, gradient: ic.Estimator
) -> Row:
    def value(z: Any, h0: jax.Array) -> jax.Array:
        return ic.fixed_point(f, h0, z, solver=solver, gradient=gradient, batch_ndim=1).value

    forward, step = jax.jit(value), jax.jit(jax.value_and_grad(lambda z, h0: jnp.mean(value(z, h0) ** 2)))
    row = Row(case, name, STEPS + (5 if "Unroll" in name else 0))
    row.forward = _times(settings, forward, z, h0)
    row.step = _times(settings, step, z, h0)
    row.bare = _bare(settings, f, z, h0)
    return row


def _eager(settings: Settings, case: str, f: Any, z: Any, h0: Any) -> Row:
    row = Row(case, "Anderson, without jit", STEPS)
    row.forward = _times(
        settings, lambda z, h0: ic.solve(f, h0, z, solver=solvers()["Anderson"], batch_ndim=1).value, z, h0
    )
    row.bare = _bare(settings, f, z, h0)
    return row


def _bare(settings: Settings, f: Any, z: Any, h0: Any) -> float:
    iterated = jax.jit(lambda z, h: jax.lax.fori_loop(0, STEPS, lambda _, h: f(h, z), h))
    times = _times(settings, iterated, z, h0)
    return sorted(times)[len(times) // 2] / STEPS


def _times(settings: Settings, function: Any, *arguments: Any) -> list[float]:
    """Milliseconds of each call."""
    for _ in range(3):
        jax.block_until_ready(function(*arguments))
    found = []
    for _ in range(settings.repetitions):
        begin = perf_counter()
        jax.block_until_ready(function(*arguments))
        found.append(1e3 * (perf_counter() - begin))
    return found
