"""Tab. 2: what the exact gradient and phantom gradients cost as functions of K and k, counted."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

import implicit_core as ic
from implicit_core.adapters import torch as ict
from implicit_core.examples.mdeq.model import Cell, State
from implicit_core.examples.mdeq.sizes import TINY

from .. import report
from ..counting import Costs, Counted, costs
from ..memory import MB, LiveTensors

LAM = 0.5
RESTART = 5
NUMBERS = (12, 18, 24)
"""Values of K and k: two or more cycles of a restarted GMRES, each of which measures its residual by one product."""
NONE = 0.01
"""The largest slope that counts as none; twice this is the largest deviation from a line that does."""
GROWTH = "", "state", "graph"
"""What may be added to the bytes that are alive with each unit of a number: nothing, a state, the graph of an F."""


@dataclass(frozen=True)
class Gradient:
    """A row.

    Attributes
    ----------
    name, symbol
        Its name, and how the paper calls the number that it is a function of: K, the products of a backward solve, or
        k.
    make
        The estimator for a number.
    paper
        The orders of time, memory and peak memory, as in the paper; "" where it has none.
    held, peak
        What is added to the bytes with each unit of the number, one of :data:`GROWTH`.
    """

    name: str
    symbol: str
    make: Callable[[int], ic.Estimator]
    paper: str
    held: str
    peak: str


@dataclass(frozen=True)
class Line:
    """A number as a linear function of another one.

    Attributes
    ----------
    start, slope
        Its value at 0, and its growth.
    deviation
        The largest distance of the number from the line, relative to its range, or to 1 if that is more.
    """

    start: float
    slope: float
    deviation: float

    @classmethod
    def through(cls, x: Sequence[int], y: Sequence[float]) -> "Line":
        """The line of least squares."""
        slope, start = np.polyfit(x, y, 1)
        if abs(slope) < NONE:
            slope, start = 0.0, np.mean(y)
        distances = np.abs(start + slope * np.array(x) - y)
        return cls(float(start), float(slope), float(distances.max() / max(np.ptp(y), 1.0)))

    def text(self, symbol: str, digits: int) -> str:
        """As a formula."""
        start, slope = (f"{x:.{digits}f}" for x in (self.start, self.slope))
        if not float(slope):
            return start
        times = symbol if float(slope) == 1 and not digits else f"{slope} {symbol}"
        return times if not float(start) else f"{start} + {times}".replace("+ -", "- ")


def gmres(products: int, restart: int) -> ic.Estimator:
    """The exact gradient with a number of products."""
    return ic.Implicit(ic.GMRES(rtol=0.0, restart=restart), products=products)


ROWS = (
    Gradient("Implicit", "K", lambda n: gmres(n, n), "K  1  -", "", "state"),
    Gradient(f"restarted after {RESTART}", "K", lambda n: gmres(n, RESTART), "K  1  -", "", ""),
    Gradient("its pretraining", "k", lambda k: ic.BPTT(k, on_growth="ignore"), "-  -  k", "graph", "graph"),
    Gradient("UPG", "k", lambda k: ic.Unroll(k, LAM, on_growth="ignore"), "k  k  k", "graph", "graph"),
    Gradient("UPG, recomputed", "k", lambda k: ic.Unroll(k, LAM, True, on_growth="ignore"), "", "state", "state"),
    Gradient("NPG", "k", lambda k: ic.Neumann(k, LAM, on_growth="ignore"), "k  1  1", "", ""),
)
HEAD = ("gradient", "F", "VJP", "held", "peak", "paper")
LEGEND = f"""\
F, VJP    evaluations of the cell and pullbacks through it, after the solve
held      bytes kept for the backward pass, divided by those of the graph of one
          evaluation of the cell
peak      bytes alive at once, at most, divided by the same
paper     orders of its time, memory and peak memory
K, k      products of a backward solve; terms and steps, or pretraining's layers
Implicit  GMRES, whose basis has a state for each product; restarted, it has {RESTART}
The paper gives the exact gradient a peak of order k, which is that of its
pretraining: k layers of a network. A slope below {NONE} is left out."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code: 1 if a number contradicts the paper's order."""
    options = report.parser("table2", __doc__, timed=False).parse_args(arguments)
    torch.set_num_threads(1)
    console = Console(width=80)
    batch, side = (2, 8) if options.quick else (8, 16)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        cell = Cell(TINY)
        x = torch.randn(batch, TINY.channels[0], side, side).requires_grad_()
        h = tuple(torch.randn(batch, c, side >> i, side >> i) for i, c in enumerate(TINY.channels))
    unit, state = graph(cell, h, x), sum(leaf.nbytes for leaf in h)
    with report.progress(console, len(ROWS) * len(NUMBERS)) as announce:
        found = {row.name: [count(row, n, cell, h, x, announce) for n in NUMBERS] for row in ROWS}
    about = [
        f"The cell of MDEQ-Tiny: batch {batch}, {side} x {side} pixels, float32; its graph is {unit / MB:.2f} MB, "
        f"a state {state / unit:.3f} of it"
    ]
    lines = {row.name: fits(found[row.name], unit) for row in ROWS}
    record: dict[str, Any] = report.facts(options, "torch") | {"graph": unit, "state": state}
    record["rows"] = {
        row.name: {
            "values": NUMBERS,
            "costs": [costs._asdict() for costs in found[row.name]],
            "lines": {name: asdict(line) for name, line in lines[row.name].items()},
        }
        for row in ROWS
    }
    table = report.Table(HEAD, [cells(row, lines[row.name]) for row in ROWS], about, LEGEND)
    report.publish(console, options.output, "table2", [table, numbers(found, unit)], record, picture)
    return report.verdict(console, contradictions(lines, state / unit))


def loss(h: State) -> Tensor:
    """A smooth loss of a state."""
    return torch.stack([leaf.square().mean() for leaf in h]).sum()


def graph(cell: Cell, h: State, x: Tensor) -> int:
    """The bytes that the graph of one evaluation keeps, without those of the weights."""
    f = ict.constant_within_solve(cell)
    points = tuple(leaf.clone().requires_grad_() for leaf in h)
    with LiveTensors() as live:
        value = f(points, x)  # whose graph is alive while it has a name
        return live.bytes + 0 * len(value)


def count(row: Gradient, n: int, cell: Cell, h: State, x: Tensor, announce: Callable[[str], None]) -> Costs:
    """The costs of a gradient at the point h, which stands for the solver's."""
    announce(row.name)
    counted = Counted(ict.constant_within_solve(cell))  # whose weights are not a cost of the gradient
    options = {"solver": ic.steps(0), "gradient": row.make(n), "batch_ndim": 1}
    return costs(counted, lambda: ic.fixed_point(counted, h, x, **options).value, loss)


def fits(found: Sequence[Costs], unit: int) -> dict[str, Line]:
    """Each cost as a linear function of the number."""
    of = {
        "F": [float(c.forward + c.backward) for c in found],
        "VJP": [float(c.vjps) for c in found],
        "held": [c.held / unit for c in found],
        "peak": [c.peak / unit for c in found],
    }
    return {name: Line.through(NUMBERS, y) for name, y in of.items()}


def cells(row: Gradient, lines: dict[str, Line]) -> list[str]:
    """A row as text."""
    digits = {"F": 0, "VJP": 1 if row.name.startswith("restarted") else 0, "held": 2, "peak": 2}
    return [row.name, *(lines[name].text(row.symbol, n) for name, n in digits.items()), row.paper]


def numbers(found: dict[str, list[Costs]], unit: int) -> report.Table:
    """The counts behind the fits."""
    body = [
        (
            row.name,
            f"{row.symbol} = {n}",
            f"{c.forward}+{c.backward}",
            f"{c.vjps}",
            f"{c.held / unit:.2f}",
            f"{c.peak / unit:.2f}",
        )
        for row in ROWS
        for n, c in zip(NUMBERS, found[row.name], strict=True)
    ]
    return report.Table(("gradient", "of", "F", "VJP", "held", "peak"), body, [], "F  forward + backward pass")


def contradictions(lines: dict[str, dict[str, Line]], state: float) -> list[str]:
    """What the counts do not bear out; ``state`` is the size of a state, in graphs."""
    sizes, broken = {"": 0.0, "state": state, "graph": 1.0}, []
    for row in ROWS:
        of = lines[row.name]
        if of["F"].slope + of["VJP"].slope < 1 - NONE:
            broken.append(f"the time of {row.name} grows with {row.symbol}")
        for what, added in (("held", row.held), ("peak", row.peak)):
            if abs(of[what].slope - sizes[added]) > NONE:
                broken.append(f"{row.name}: each unit of {row.symbol} adds {added or 'nothing'} to what is {what}")
        broken += [f"{what} of {row.name} is linear" for what, line in of.items() if line.deviation > 2 * NONE]
    return broken


def picture(record: dict[str, Any]) -> Any:
    """Peak and held bytes."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True)
    for axis, symbol in zip(axes, ("K", "k"), strict=True):
        for row in (row for row in ROWS if row.symbol == symbol):
            found = record["rows"][row.name]
            for what, style in (("peak", "o-"), ("held", "o--")):
                sizes = [c[what] / record["graph"] for c in found["costs"]]
                axis.plot(found["values"], sizes, style, ms=4, label=f"{row.name}, {what}")
        axis.set(xlabel=symbol)
        axis.legend(fontsize=7)
        axis.grid(alpha=0.25)
    axes[0].set(ylabel="bytes, in graphs of one evaluation")
    figure.tight_layout()
    return figure
