"""The GPU benchmark in PyTorch, compared with TorchDEQ."""

import importlib.util
from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

import implicit_core as ic
from implicit_core.adapters import torch as ict

from .gpu_rows import FORCED, GRADIENTS, STEPS, Measured, Omission, Row, Settings, Task, carry_out, layer, solvers
from .torch_step import Block, torchdeqs

Forward = Callable[[], Tensor]

NAMES = {"graphs": "CUDA graphs", "step": "captured training steps"}
CAPTURED = "Anderson, step captured"
"""The training step with Anderson and Neumann(5), captured as one CUDA graph."""


def missing(device: str) -> str | None:
    """Why PyTorch cannot be measured on a device; None if it can."""
    return None if device == "cpu" or torch.cuda.is_available() else "PyTorch found no CUDA device"


def run(settings: Settings, announce: Callable[[str], None]) -> Measured:
    """Rows of all cases."""
    if settings.part != "table" and settings.device == "cpu":
        yield Omission(NAMES[settings.part], "they need a CUDA device")
        return
    torch.backends.cudnn.allow_tf32 = False  # as products of matrices
    tasks: list[Task] = []
    for batch, width in settings.sizes:
        case, given = f"tanh {batch} x {width}", layer(batch, width)
        w, x = (torch.asarray(given[name], device=settings.device).requires_grad_() for name in ("w", "x"))
        # Bound here, since the next iteration rebinds w.
        f = partial(_tanh, w)
        tasks += _tasks(settings, case, f, x, (w, x))
    batch, channels, size = settings.block
    torch.manual_seed(0)
    block = Block(channels).to(settings.device)
    x = torch.randn(batch, channels, size, size, device=settings.device).requires_grad_()
    case = f"conv {batch}x{channels}x{size}²"
    tasks += _tasks(settings, case, block, x, (x, *block.parameters()))
    yield from carry_out(tasks, settings, announce)
    if settings.part == "table" and not importlib.util.find_spec("torchdeq"):
        yield Omission("TorchDEQ", "it is not installed (pip install torchdeq)")


def _tanh(w: Tensor, h: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(h @ w.T + x)


def _tasks(settings: Settings, case: str, f: Any, x: Tensor, leaves: tuple[Tensor, ...]) -> list[Task]:
    plain = _ours(f, x, solvers()["Anderson"], GRADIENTS["Neumann(5)"])
    if settings.part == "step":
        return [(case, CAPTURED, partial(_captured, settings, case, plain, leaves))]
    found = _graphs(f, x) if settings.part == "graphs" else _table(f, x)
    return [
        (case, name, partial(_measure, settings, case, name, forward, f, x, leaves)) for name, forward in found.items()
    ]


def _graphs(f: Any, x: Tensor) -> dict[str, Forward]:
    """Solves with CUDA graphs."""
    found = {"graphs": solvers()["Anderson"], "graphs, check_every=5": solvers(check_every=5)["Anderson"]}
    gradient = GRADIENTS["Neumann(5)"]
    return {f"Anderson, {name}": _ours(f, x, ict.CUDAGraphs(solver), gradient) for name, solver in found.items()}


def _table(f: Any, x: Tensor) -> dict[str, Any]:
    """Solvers, gradients, and TorchDEQ."""
    found: dict[str, Any] = {
        f"{name}, Neumann(5)": _ours(f, x, solver, GRADIENTS["Neumann(5)"]) for name, solver in solvers().items()
    }
    anderson = solvers()["Anderson"]
    for name, gradient in GRADIENTS.items():
        found[f"Anderson, {name}"] = _ours(f, x, anderson, gradient)
    found["Anderson, check_every=5"] = _ours(f, x, solvers(check_every=5)["Anderson"], GRADIENTS["Neumann(5)"])
    if importlib.util.find_spec("torchdeq"):
        for name, options in (("IFT", {"ift": True}), ("UPG(5)", {"grad": 5, "tau": 0.5})):
            found[f"TorchDEQ Anderson, {name}"] = partial(torchdeqs("anderson", STEPS, **options), f, x)
    return found


def _ours(f: Any, x: Tensor, solver: Any, gradient: ic.Estimator) -> Forward:
    def forward() -> Tensor:
        return ic.fixed_point(f, torch.zeros_like(x), x, solver=solver, gradient=gradient, batch_ndim=1).value

    forward.solver = solver  # type: ignore[attr-defined]
    return forward


def _measure(
    settings: Settings, case: str, name: str, forward: Forward, f: Any, x: Tensor, leaves: tuple[Tensor, ...]
) -> Row:
    row = Row(case, name)

    def step() -> tuple[Any, Any, Any]:
        for leaf in leaves:
            leaf.grad = None
        start = _now(settings.device)
        value = forward()
        middle = _now(settings.device)
        value.square().mean().backward()
        return start, middle, _now(settings.device)

    for _ in range(3):
        step()
    reason = getattr(getattr(forward, "solver", None), "reason", None)
    if reason is not None:
        raise RuntimeError(f"no CUDA graphs: {reason}")
    if settings.device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        row.memory = torch.cuda.max_memory_allocated() - before
    marks = [step() for _ in range(settings.repetitions)]
    row.forward = [_between(settings.device, start, middle) for start, middle, _ in marks]
    row.backward = [_between(settings.device, middle, end) for _, middle, end in marks]
    row.step = [_between(settings.device, start, end) for start, _, end in marks]
    row.bare = _bare(settings, f, x)
    evaluations = STEPS + (5 if "Unroll" in name or "UPG" in name else 1)
    row.evaluations = evaluations + ("graphs" in name)
    return row


def _captured(settings: Settings, case: str, forward: Forward, leaves: tuple[Tensor, ...]) -> Row:
    def step() -> None:
        forward().square().mean().backward()

    def clear_gradients() -> None:
        for leaf in leaves:
            leaf.grad = None

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            clear_gradients()
            step()
    torch.cuda.current_stream().wait_stream(side)
    clear_gradients()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    row = Row(case, CAPTURED)
    for _ in range(3):
        graph.replay()
    for _ in range(settings.repetitions):
        start = _now(settings.device)
        graph.replay()
        row.step.append(_between(settings.device, start, _now(settings.device)))
    return row


def _bare(settings: Settings, f: Any, x: Tensor) -> float:
    with torch.no_grad():
        h = torch.zeros_like(x)
        for _ in range(3):
            h = f(h, x)
        start = _now(settings.device)
        for _ in range(FORCED["max_steps"]):
            h = f(h, x)
        return _between(settings.device, start, _now(settings.device)) / STEPS


def _now(device: str) -> Any:
    if device == "cpu":
        return perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(device: str, start: Any, end: Any) -> float:
    """Milliseconds."""
    if device == "cpu":
        return 1e3 * float(end - start)
    end.synchronize()
    return float(start.elapsed_time(end))
