"""Time of a training step of recursive models in PyTorch, compared with the same loops by hand.

Both loops evaluate the same net as often, and lead to the same parameters. Their steps alternate in one process.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import implicit_core as ic
from implicit_core.adapters import torch as ict

from .report import Table, environment, output, positive, progress, quartiles

HEAD = ("loop", "F", "by hand", "library", "ratio", "quartiles", "extra")
LEGEND = """\
F        evaluations of the net, n without a graph + k with one
by hand  ms of a training step: forward and backward pass and AdamW; median
library  likewise
ratio    library / by hand, in pairs of steps; median, and quartiles
extra    ms that the library takes more, in pairs of steps; median"""

State = tuple[Tensor, Tensor]
Run = Callable[[Any, Any, Tensor], Any]
"""(net, start, x) -> state."""


class Net(nn.Module):
    """A layer with one hidden layer at each position, a residual connection and a normalization."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, h: Tensor, injected: Tensor) -> Tensor:
        """F(h, injected), (batch, tokens, width)."""
        u = h + injected
        u = u + self.second(nn.functional.silu(self.first(u)))
        return nn.functional.rms_norm(u, u.shape[-1:])


class Recursion(nn.Module):
    """One recursion of TRM: the latent z is refined, then the answer y."""

    def __init__(self, net: nn.Module, steps: int) -> None:
        super().__init__()
        self.net, self.steps = net, steps

    def forward(self, state: State, x: Tensor) -> State:
        """The next state, two tensors (batch, tokens, width)."""
        y, z = state
        for _ in range(self.steps):
            z = self.net(z, x + y)
        return self.net(y, z), z


@dataclass(frozen=True)
class Loop:
    """A loop in both forms, and its evaluations without and with a graph; a start is one tensor, or two."""

    by_hand: Run
    library: Run
    free: int
    graded: int
    pair: bool = True


@dataclass
class Row:
    """Seconds of each training step, in pairs."""

    name: str
    free: int
    graded: int
    by_hand: list[float] = field(default_factory=list)
    library: list[float] = field(default_factory=list)


def by_hand(cell: Run, n: int, k: int) -> Run:
    """The function (net, start, x) that makes n steps of ``cell(net, h, x)`` without a graph and k with one."""

    def run(net: Any, h: Any, x: Tensor) -> Any:
        for free, steps in ((True, n), (False, k)):
            with torch.no_grad() if free else nullcontext():
                for _ in range(steps):
                    h = cell(net, h, x)
        return h

    return run


def recur(cell: Callable[[Any, Any], Any], h: Any, x: Tensor, n: Any, k: Any) -> Any:
    """The same by the library."""
    return ic.fixed_point(cell, h, x, solver=ic.steps(n), gradient=ic.Unroll(k, 1.0), batch_ndim=1).value


def loops(options: argparse.Namespace) -> dict[str, Loop]:
    """The rows of the table, by name."""
    steps, cycles = options.steps, options.cycles
    generator = torch.Generator().manual_seed(options.seed)
    n, k = (torch.randint(low, high, (options.batch,), generator=generator) for low, high in ((0, 9), (1, 5)))
    layers: dict[nn.Module, ict.ImplicitLayer[Tensor, State]] = {}

    def module(net: nn.Module, state: State, x: Tensor) -> State:
        if net not in layers:
            layers[net] = ict.ImplicitLayer(
                Recursion(net, steps), solver=ic.steps(cycles - 1), gradient=ic.Unroll(1, 1.0)
            )
        return layers[net](x, h0=state)

    def hrm_by_hand(net: nn.Module, state: State, x: Tensor) -> State:
        y, z = state
        with torch.no_grad():
            for i in range(cycles * steps - 1):
                z = net(z, x + y)
                if (i + 1) % steps == 0:
                    y = net(y, z)
        z = net(z, x + y)
        return net(y, z), z

    def hrm(net: nn.Module, state: State, x: Tensor) -> State:
        def cycle(state: State, x: Tensor) -> State:
            y, z = state
            z = recur(net, z, x + y, steps - 1, 1)
            return net(y, z), z

        return recur(cycle, state, x, cycles - 1, 1)

    def masked_by_hand(net: nn.Module, h: Tensor, x: Tensor) -> Tensor:
        for free, of_samples in ((True, n), (False, k)):
            with torch.no_grad() if free else nullcontext():
                for i in range(int(of_samples.max())):
                    h = torch.where((i < of_samples).view(-1, *[1] * (h.ndim - 1)), net(h, x), h)
        return h

    evaluations = steps + 1
    recursions = by_hand(lambda net, state, x: Recursion.forward(_Plain(net, steps), state, x), cycles - 1, 1)
    trm = (cycles - 1) * evaluations, evaluations
    return {
        "TRM": Loop(recursions, lambda net, h, x: recur(Recursion(net, steps), h, x, cycles - 1, 1), *trm),
        "TRM, ImplicitLayer": Loop(recursions, module, *trm),
        "HRM, nested layers": Loop(hrm_by_hand, hrm, cycles * evaluations - 2, 2),
        "8 + 4": Loop(
            by_hand(lambda net, h, x: net(h, x), 8, 4), lambda net, h, x: recur(net, h, x, 8, 4), 8, 4, pair=False
        ),
        "of each sequence": Loop(
            masked_by_hand, lambda net, h, x: recur(net, h, x, n, k), int(n.max()), int(k.max()), pair=False
        ),
        "by hand, twice": Loop(recursions, recursions, *trm),
    }


@dataclass(frozen=True)
class _Plain:
    """What a recursion reads of its module."""

    net: nn.Module
    steps: int


class Training:
    """A model with one of the forms of a loop, and its training step."""

    def __init__(self, options: argparse.Namespace, run: Run, *, pair: bool) -> None:
        torch.manual_seed(options.seed)
        width = options.width
        self.net, self.head, self.run, self.pair = Net(width), nn.Linear(width, 10), run, pair
        self.parameters = [*self.net.parameters(), *self.head.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters)
        self.x, start = torch.randn(2, options.batch, options.tokens, width)
        self.start = (start, torch.zeros_like(start)) if pair else start
        self.target = torch.randint(10, (options.batch * options.tokens,))

    def step(self) -> float:
        """One training step; the seconds that it took."""
        begin = time.perf_counter()
        self.optimizer.zero_grad()
        state = self.run(self.net, self.start, self.x)
        logits = self.head(state[0] if self.pair else state).flatten(0, 1)
        nn.functional.cross_entropy(logits, self.target).backward()
        self.optimizer.step()
        return time.perf_counter() - begin


def measure(options: argparse.Namespace, console: Console) -> Iterator[Row]:
    """All rows. Each pair begins with the other loop than the one before."""
    chosen = loops(options)
    with progress(console, len(chosen) * options.pairs) as announce:
        for name, loop in chosen.items():
            row = Row(name, loop.free, loop.graded)
            ours, theirs = (Training(options, run, pair=loop.pair) for run in (loop.library, loop.by_hand))
            for training in (ours, theirs) * 3:
                training.step()
            for i in range(options.pairs):
                announce(name)
                for training in (ours, theirs) if i % 2 else (theirs, ours):
                    (row.library if training is ours else row.by_hand).append(training.step())
            assert all(torch.equal(a, b) for a, b in zip(ours.parameters, theirs.parameters, strict=True)), name
            yield row


def cells(row: Row) -> tuple[str, ...]:
    """A row as text."""
    low, ratio, high = quartiles([a / b for a, b in zip(row.library, row.by_hand, strict=True)])
    extra = quartiles([a - b for a, b in zip(row.library, row.by_hand, strict=True)])[1]
    return (
        row.name,
        f"{row.free}+{row.graded}",
        f"{1e3 * quartiles(row.by_hand)[1]:.2f}",
        f"{1e3 * quartiles(row.library)[1]:.2f}",
        f"{ratio:.3f}",
        f"{low:.3f}-{high:.3f}",
        f"{1e3 * extra:.2f}",
    )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = argparse.ArgumentParser(
        prog="python -m benchmarks recursive",
        description=__doc__.splitlines()[0] if __doc__ else None,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = options.add_argument
    add("--batch", type=positive, default=64, help="samples")
    add("--tokens", type=positive, default=36, help="positions of a sample, such as the cells of a puzzle")
    add("--width", type=positive, default=256, help="numbers of a position, in each of the two parts of a state")
    add("--steps", type=positive, default=6, help="steps of the latent in a recursion")
    add("--cycles", type=positive, default=3, help="recursions, of which the last one has a graph")
    add("--pairs", type=positive, default=20, help="timed pairs of steps")
    add("--threads", type=positive, default=1, help="threads of torch")
    add("--seed", type=int, default=0, help="seed of weights and inputs")
    add("--output", type=output, action="append", default=[], help="save as .json or .md; may be repeated")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code.

    Parameters
    ----------
    arguments
        The command line's if None.
    """
    options = parser().parse_args(sys.argv[1:] if arguments is None else arguments)
    torch.set_num_threads(options.threads)
    console = Console(width=80)
    rows = list(measure(options, console))
    settings = {name: value for name, value in vars(options).items() if name != "output"}
    found = {"settings": settings} | environment("torch")
    title = [
        f"batch {options.batch}, tokens {options.tokens}, width {options.width}, float32; {options.pairs} pairs",
        f"{found['machine']['cpu']}, threads: {options.threads}",
        f"implicit_core {found['versions']['implicit-core']}, torch {found['versions']['torch']}",
    ]
    table = Table(HEAD, [cells(row) for row in rows], title, LEGEND)
    table.present(console, found | {"rows": [asdict(row) for row in rows]}, options.output)
    return 0
