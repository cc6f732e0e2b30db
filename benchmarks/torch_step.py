"""Time and memory of one training step of a convolution block in PyTorch on the CPU, compared with TorchDEQ.

Every row solves the same cell from the same start with the same number of steps, then computes the gradient of the
same loss with respect to the input and all parameters. README.md explains the table.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import implicit_core as ic

from .counting import Counted, costs
from .memory import MB
from .report import COMMAND, ROOT, Table, environment, output, positive, progress, quartiles

LAM = 0.5
GAIN = 2.0
"""Gain of the second convolution: 20 steps of plain iteration reach a relative residual of 2e-4."""
SOLVERS = {
    "fixed-point": (ic.FixedPointIteration, "fixed_point_iter"),
    "anderson": (ic.Anderson, "anderson"),
}
LEGEND = """\
F      evaluations of F in the forward pass + in the backward pass
VJP    pullbacks through F
ms     time of a step: median, and quartiles
/ F    ms, divided by the time of as many bare evaluations of F, without a graph
held   MB of tensors that are kept for the backward pass
peak   MB of tensors alive at once, at most
RSS    MB of resident memory that a step needs beyond one bare F"""


class Block(nn.Module):
    """Convolution, group normalization, ReLU and convolution; x is injected before the normalization."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.GroupNorm(min(4, channels), channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.normal_(self.second.weight, std=GAIN / (3 * channels**0.5))

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        """F(h, x); h, x and F(h, x) are (batch, channels, height, width)."""
        return self.second(torch.relu(self.norm(self.first(h) + x)))


Cell = Callable[[Tensor, Tensor], Tensor]
Layer = Callable[[Cell, Tensor], Tensor]


@dataclass
class Row:
    """Measurements of one gradient; times in seconds, memory in bytes."""

    name: str
    forward_evaluations: int
    backward_evaluations: int
    vjps: int
    held: int
    peak: int
    rss: int | None = None
    times: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)


def ours(gradient: ic.Estimator, solver: ic.Solver) -> Layer:
    """A layer of this library."""

    def layer(cell: Cell, x: Tensor) -> Tensor:
        h0 = torch.zeros_like(x)
        return ic.fixed_point(cell, h0, x, solver=solver, gradient=gradient, batch_ndim=1).value

    return layer


def torchdeqs(solver: str, steps: int, **settings: Any) -> Layer:
    """A layer of TorchDEQ. By default each solve makes ``steps`` steps, and the backward solve is plain iteration."""
    import torchdeq

    forced = {"f_max_iter": steps, "f_tol": 0.0, "b_max_iter": steps, "b_tol": 0.0}
    deq = torchdeq.get_deq(f_solver=solver, **(forced | settings))

    def layer(cell: Cell, x: Tensor) -> Tensor:
        return deq(lambda h: cell(h, x), torch.zeros_like(x))[0][-1]

    return layer


def layers(solver: str, steps: int, k: int) -> dict[str, Layer]:
    """The rows of the table, by name."""
    make, theirs = SOLVERS[solver]
    forced = make(rtol=0.0, atol=0.0, max_steps=steps)
    richardson = ic.Richardson(rtol=0.0, max_steps=steps)
    rows = {
        "Implicit(GMRES)": ours(ic.Implicit(ic.GMRES(rtol=1e-4)), forced),
        "Implicit(Richardson)": ours(ic.Implicit(richardson, on_failure="warn"), forced),
        f"Unroll({k})": ours(ic.Unroll(k, LAM), forced),
        f"Unroll({k}, recompute)": ours(ic.Unroll(k, LAM, recompute=True), forced),
        f"Neumann({k})": ours(ic.Neumann(k, LAM), forced),
        "OneStep": ours(ic.OneStep(), forced),
        f"BPTT({steps})": ours(ic.BPTT(steps), forced),
    }
    try:
        rows["TorchDEQ IFT"] = torchdeqs(theirs, steps, ift=True)
        rows["TorchDEQ IFT (hook)"] = torchdeqs(theirs, steps, hook_ift=True)
        rows[f"TorchDEQ UPG({k})"] = torchdeqs(theirs, steps, grad=k, tau=LAM)
    except ModuleNotFoundError:
        pass
    return rows


def loss(h: Tensor) -> Tensor:
    """A smooth loss."""
    return h.square().mean()


def build(options: argparse.Namespace) -> tuple[Block, Tensor]:
    """The cell and an input, the same in every process."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    shape = (options.batch, options.channels, options.size, options.size)
    return Block(options.channels), torch.randn(shape).requires_grad_()


def step(layer: Layer, cell: Block, x: Tensor) -> None:
    """Forward, loss and backward."""
    for leaf in (x, *cell.parameters()):
        leaf.grad = None
    loss(layer(cell, x)).backward()


def bare(cell: Block, x: Tensor, steps: int) -> float:
    """Seconds for one evaluation of F without a graph."""
    h = torch.zeros_like(x)
    begin = time.perf_counter()
    with torch.no_grad():
        for _ in range(steps):
            h = cell(h, x)
    return (time.perf_counter() - begin) / steps


def count(name: str, layer: Layer, cell: Block, x: Tensor) -> Row:
    """A row without times: the evaluations, pullbacks and bytes of one step."""
    counted = Counted(cell)
    return Row(name, *costs(counted, lambda: layer(counted, x), loss))


def grown(options: argparse.Namespace) -> int | None:
    """Largest growth in bytes of this process's resident memory during the first step of ``options.only``."""
    cell, x = build(options)
    layer = layers(options.solver, options.steps, options.k)[options.only]
    bare(cell, x, 1)
    before = high_water()
    step(layer, cell, x)
    after = high_water()
    return None if before is None or after is None else after - before


def high_water() -> int | None:
    """Largest resident memory of this process so far in bytes; None if the system does not report it.

    ``getrusage`` is not used, because a child process starts with the value of its parent.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")]
    return found[0] if found else None


def grown_elsewhere(name: str, arguments: Sequence[str]) -> int | None:
    """``grown`` in a new process."""
    command = [*COMMAND, "step", *arguments, "--only", name]
    # With this setting glibc returns the memory of a tensor at once, and two runs agree to 0.2 %.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
    result: int | None = json.loads(done.stdout)
    return result


def measure(options: argparse.Namespace, arguments: Sequence[str], console: Console) -> list[Row]:
    """All rows; each timed step is divided by bare evaluations of F measured just before it."""
    cell, x = build(options)
    variants = layers(options.solver, options.steps, options.k)
    with progress(console, len(variants) * (options.repetitions + 1 + options.rss)) as announce:
        rows = {}
        for name, layer in variants.items():
            announce(name)
            rows[name] = count(name, layer, cell, x)
            if options.rss:
                announce(name)
                rows[name].rss = grown_elsewhere(name, arguments)
        for _ in range(options.repetitions):
            for name, layer in variants.items():
                announce(name)
                unit = bare(cell, x, options.steps)
                begin = time.perf_counter()
                step(layer, cell, x)
                taken = time.perf_counter() - begin
                evaluations = rows[name].forward_evaluations + rows[name].backward_evaluations
                rows[name].times.append(taken)
                rows[name].ratios.append(taken / (evaluations * unit))
    return list(rows.values())


HEAD = ("gradient", "F", "VJP", "ms", "quartiles", "/ F", "quartiles", "held", "peak", "RSS")


def cells(row: Row) -> tuple[str, ...]:
    """A row as text."""
    low, middle, high = quartiles(row.times)
    digits = 0 if middle >= 0.1 else 1
    ratio_low, ratio, ratio_high = quartiles(row.ratios)
    return (
        row.name,
        f"{row.forward_evaluations}+{row.backward_evaluations}",
        str(row.vjps),
        f"{1e3 * middle:.{digits}f}",
        f"{1e3 * low:.{digits}f}-{1e3 * high:.{digits}f}",
        f"{ratio:.2f}",
        f"{ratio_low:.2f}-{ratio_high:.2f}",
        f"{row.held / MB:.1f}",
        f"{row.peak / MB:.1f}",
        "-" if row.rss is None else f"{row.rss / MB:.0f}",
    )


def facts(options: argparse.Namespace) -> dict[str, Any]:
    """The settings, the versions and the machine behind the numbers."""
    names = ("batch", "channels", "size", "solver", "steps", "k", "repetitions", "threads", "seed")
    return {
        "settings": {name: getattr(options, name) for name in names} | {"lam": LAM, "dtype": "float32"},
    } | environment("torch", "torchdeq")


def title(found: dict[str, Any]) -> list[str]:
    """The facts as lines of text."""
    s, v = found["settings"], found["versions"]
    return [
        f"batch {s['batch']}, {s['channels']} channels, {s['size']} x {s['size']}, float32; lambda = {s['lam']}",
        f"{s['steps']} steps of {s['solver']} in every solve; {s['repetitions']} repetitions",
        f"{found['machine']['cpu']}, threads: {s['threads']}",
        f"implicit_core {v['implicit-core']}, torch {v['torch']}, TorchDEQ {v['torchdeq']}",
    ]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = argparse.ArgumentParser(
        prog="python -m benchmarks step",
        description=__doc__.splitlines()[0] if __doc__ else None,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = options.add_argument
    add("--batch", type=positive, default=32, help="samples")
    add("--channels", type=positive, default=32, help="channels of input and state")
    add("--size", type=positive, default=32, help="height and width")
    add("--solver", choices=SOLVERS, default="fixed-point", help="solver of the forward pass, in both libraries")
    add(
        "--steps",
        type=positive,
        default=20,
        help="steps of every solve except GMRES",
    )
    add("--k", type=positive, default=5, help="terms and steps of the phantom gradients")
    add("--repetitions", type=positive, default=5, help="timed steps of each row")
    add("--threads", type=positive, default=torch.get_num_threads(), help="threads of torch")
    add("--seed", type=int, default=0, help="seed of weights and input")
    add(
        "--rss",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure RSS in a new process for each row",
    )
    add("--output", type=output, action="append", default=[], help="save as .json or .md; may be repeated")
    add("--only", help=argparse.SUPPRESS)  # used for the process of one row
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code.

    Parameters
    ----------
    arguments
        The command line's if None.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(arguments)
    console = Console(width=80)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ic.InexactGradientWarning)  # Richardson makes a fixed number of steps
        if options.only:
            print(json.dumps(grown(options)))
            return 0
        rows = measure(options, arguments, console)
    found = facts(options)
    table = Table(HEAD, [cells(row) for row in rows], title(found), LEGEND)
    table.present(console, found | {"rows": [asdict(row) for row in rows]}, options.output)
    return 0
