"""Cost as a function of the batch, the width, k and the solver's memory."""

from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console

import implicit_core as ic

from . import report
from .equations import random_layer
from .gradients import build, ours
from .timing import interleaved

FORCED = 20
SOLVERS = {"fixed point": ic.FixedPointIteration, "Anderson": ic.Anderson, "Broyden": ic.Broyden}
HEAD = ("method", "variable", "from", "to", "slope", "ms at the end")
LEGEND = """\
slope    slope of log time against log variable, fitted over the upper half; 1 is
         linear. For a matrix product such as F: 1 in the batch, 2 in the width"""

Curve = tuple[list[int], dict[str, list[float]]]


def solves(batch: int, width: int, seed: int, **memory: int) -> dict[str, Callable[[], Any]]:
    """A run for each solver, and one with the same number of bare evaluations of F."""
    equation = random_layer(np.random.default_rng(seed), batch, width)
    f, h0, z = equation.torch()
    runs: dict[str, Callable[[], Any]] = {"F alone": equation.bare(FORCED)}
    for name, make in SOLVERS.items():
        if memory and name == "fixed point":
            continue
        solver = make(rtol=0.0, atol=0.0, max_steps=FORCED, **memory)
        runs[name] = partial(ic.solve, f, h0, z, solver=solver, batch_ndim=1)
    return runs


def pullbacks(k: int, batch: int, width: int, seed: int) -> dict[str, Callable[[], Any]]:
    """A forward and backward pass after the solve for each phantom gradient."""
    setting = build(batch, width, seed)
    runs = {}
    for name, gradient in (("Neumann", ic.Neumann(k, 0.5)), ("Unroll", ic.Unroll(k, 0.5))):
        way = ours(setting, gradient)
        runs[name] = lambda way=way: torch.autograd.grad(way(setting.f), setting.z, setting.v)
    return runs


def curve(
    values: list[int], runs: Callable[[int], dict[str, Callable[[], Any]]], repetitions: int, announce: Any
) -> Curve:
    """Median times for all values of a variable."""
    times: dict[str, list[float]] = {}
    for value in values:
        for name, taken in interleaved(runs(value), repetitions, announce).items():
            times.setdefault(name, []).append(median(taken))
    return values, times


def slope(values: Sequence[int], times: Sequence[float]) -> float:
    """Slope of log time against log value, fitted over the upper half."""
    half = len(values) // 2
    return float(np.polyfit(np.log(values[half:]), np.log(times[half:]), 1)[0])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    options = report.parser("scaling", __doc__).parse_args(arguments)
    torch.set_num_threads(options.threads)
    quick, seed = options.quick, options.seed
    repetitions = options.repetitions or (3 if quick else 7)
    width, batch = (64, 16) if quick else (512, 64)
    variables = {
        "batch": ([8, 16, 32] if quick else [8, 32, 128, 512], lambda n: solves(n, width, seed)),
        "width": ([32, 64, 128] if quick else [64, 256, 1024, 2048], lambda n: solves(batch, n, seed)),
        "memory": ([2, 4, 8] if quick else [2, 5, 10, 20], lambda n: solves(batch, width, seed, memory=n)),
        "k": ([1, 2, 4] if quick else [1, 2, 5, 10, 20], lambda n: pullbacks(n, batch, width, seed)),
    }
    total = sum(len(values) * 4 * repetitions for values, _ in variables.values())
    console = Console(width=80)
    with report.progress(console, total) as announce:
        curves = {
            name: curve(values, runs, repetitions, lambda _, name=name: announce(f"as a function of {name}"))
            for name, (values, runs) in variables.items()
        }
    body = [
        (what, name, str(values[0]), str(values[-1]), f"{slope(values, times):.2f}", f"{1e3 * times[-1]:.1f}")
        for name, (values, found) in curves.items()
        for what, times in found.items()
    ]
    title = f"{FORCED} steps of tanh(W h + x): width {width} and batch {batch} unless varied"
    record = {"curves": {name: {"values": v, "times": t} for name, (v, t) in curves.items()}}
    record |= report.facts(options, "torch")
    report.publish(console, options.output, "scaling", [report.Table(HEAD, body, [title], LEGEND)], record, picture)
    return 0


def picture(record: dict[str, Any]) -> Any:
    """A panel for each variable."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(9, 6.4))
    for axis, (name, found) in zip(axes.flat, record["curves"].items(), strict=True):
        for what, times in found["times"].items():
            label = f"{what} ({slope(found['values'], times):.2f})"
            style = "k--" if what == "F alone" else "o-"
            axis.loglog(found["values"], [1e3 * t for t in times], style, label=label)
        axis.set(xlabel=name, ylabel="ms")
        axis.legend(fontsize=8)
    figure.suptitle("time, and slopes in the upper half")
    figure.tight_layout()
    return figure
