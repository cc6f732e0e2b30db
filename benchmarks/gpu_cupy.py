"""The GPU benchmark in CuPy: fused kernels, plain expressions, and derivatives from PyTorch and JAX."""

from collections.abc import Callable
from functools import partial
from typing import Any

import cupy

import implicit_core as ic
from implicit_core.adapters import cupy as icc

from .gpu_rows import FORCED, GRADIENTS, STEPS, Measured, Omission, Row, Settings, Task, carry_out, layer, solvers


def missing(device: str) -> str | None:
    """Why CuPy cannot be measured on a device; None if it can."""
    if device == "cpu":
        return "CuPy has no arrays on the CPU"
    try:
        return None if cupy.cuda.is_available() else "CuPy found no CUDA device"
    except cupy.cuda.runtime.CUDARuntimeError as error:  # older versions raise if there is no driver
        return f"CuPy found no CUDA device: {error}"


def run(settings: Settings, announce: Callable[[str], None]) -> Measured:
    """Rows of all cases."""
    tasks: list[Task] = []
    for batch, width in settings.sizes:
        given = layer(batch, width)
        z, h0 = {name: cupy.asarray(a) for name, a in given.items()}, cupy.zeros((batch, width), cupy.float32)
        case = f"tanh {batch} x {width}"
        fused = _fused()
        found: dict[str, Any] = {f"{name}, Neumann(5)": (fused, solver) for name, solver in solvers().items()}
        found["Anderson, check_every=5"] = fused, solvers(check_every=5)["Anderson"]
        makers = {"not fused": _plain, "from_torch": _from_torch, "from_jax": _from_jax}
        found |= {f"Anderson, {name}": (make, solvers()["Anderson"]) for name, make in makers.items()}
        tasks += [
            (case, name, partial(_measure, settings, case, name, problem, h0, z, solver, GRADIENTS["Neumann(5)"]))
            for name, (problem, solver) in found.items()
        ]
        tasks += [
            (
                case,
                f"Anderson, {name}",
                partial(_measure, settings, case, f"Anderson, {name}", fused, h0, z, solvers()["Anderson"], gradient),
            )
            for name, gradient in GRADIENTS.items()
            if name != "Neumann(5)"
        ]
    yield from carry_out(tasks, settings, announce)
    yield Omission("convolutions in CuPy", "CuPy has no convolutions; PyTorch's are measured in PyTorch")


def _problem(value: Any, slope: Any) -> ic.Problem:
    """The tanh layer, from ``value(a, x)`` and its pullback ``slope(v, y, a, x)``, with a = h Wᵀ and y the value."""

    def f(h: Any, z: Any) -> Any:
        return value(h @ z["w"].T, z["x"])

    def linearize(h: Any, z: Any) -> ic.Linearization:
        a = h @ z["w"].T
        y = value(a, z["x"])

        def vjp(v: Any) -> Any:
            g = slope(v, y, a, z["x"])
            return g @ z["w"], {"w": g.T @ h, "x": g}

        return ic.Linearization(y, vjp=vjp, vjp_h=lambda v: slope(v, y, a, z["x"]) @ z["w"])

    return icc.problem(f, linearize=linearize, batch_ndim=1)


def _fused() -> ic.Problem:
    phi = icc.Pointwise("a, x", "tanh(a + x)", slopes="1 - y * y")
    return _problem(phi, lambda v, y, a, x: phi.vjp(v, y, a, x)[0])


def _plain() -> ic.Problem:
    return _problem(lambda a, x: cupy.tanh(a + x), lambda v, y, *_: v * (1 - y**2))


def _from_torch() -> ic.Problem:
    import torch

    return icc.from_torch(lambda h, z: torch.tanh(h @ z["w"].T + z["x"]), batch_ndim=1)


def _from_jax() -> ic.Problem:
    import jax.numpy as jnp

    return icc.from_jax(lambda h, z: jnp.tanh(h @ z["w"].T + z["x"]), batch_ndim=1)


class _Peak(cupy.cuda.MemoryHook):  # type: ignore[misc]  # CuPy's classes have no types
    """Peak memory of arrays in bytes."""

    name = "peak"

    def __init__(self) -> None:
        self.held = self.most = 0

    def malloc_postprocess(self, **facts: Any) -> None:
        """Called when a block is allocated."""
        self.held += facts["mem_size"]
        self.most = max(self.most, self.held)

    def free_postprocess(self, **facts: Any) -> None:
        """Called when a block is freed."""
        self.held -= facts["mem_size"]


def _measure(
    settings: Settings, case: str, name: str, problem: Any, h0: Any, z: Any, solver: ic.Solver, gradient: ic.Estimator
) -> Row:
    problem = problem if isinstance(problem, ic.Problem) else problem()

    def step() -> tuple[Any, Any, Any]:
        start = _now()
        root = ic.solve(problem, h0, z, solver=solver).value
        value, pullback = gradient.vjp(problem, root, z)
        middle = _now()
        pullback(2 / value.size * value)
        return start, middle, _now()

    for _ in range(3):
        step()
    row = Row(case, name, STEPS + (5 if "Unroll" in name else 1))
    with _Peak() as peak:
        step()
    row.memory = peak.most
    marks = [step() for _ in range(settings.repetitions)]
    row.forward = [_between(start, middle) for start, middle, _ in marks]
    row.backward = [_between(middle, end) for _, middle, end in marks]
    row.step = [_between(start, end) for start, _, end in marks]
    start, h = _now(), h0
    for _ in range(FORCED["max_steps"]):
        h = problem.f(h, z)
    row.bare = _between(start, _now()) / STEPS
    return row


def _now() -> Any:
    event = cupy.cuda.Event()
    event.record()
    return event


def _between(start: Any, end: Any) -> float:
    """Milliseconds."""
    end.synchronize()
    return float(cupy.cuda.get_elapsed_time(start, end))
