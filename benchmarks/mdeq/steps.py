"""Seconds and bytes of a training step of a multiscale model, beside TorchDEQ at equal numbers of evaluations."""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import implicit_core as ic
from implicit_core.examples.mdeq.model import MDEQ
from implicit_core.examples.mdeq.run import place_of
from implicit_core.examples.mdeq.settings import PRESETS, Settings
from implicit_core.examples.program import TrainingError, at_least

from .. import report
from ..counting import Costs, costs, counting
from ..memory import MB
from ..timing import interleaved

K, LAM = 5, 0.5
REPETITIONS = 15
LIMIT = 900.0
"""Seconds after which there are fewer repetitions."""
IMAGES = {"digits": (1, 8, 10), "fashion-mnist": (1, 32, 10), "cifar10": (3, 32, 10), "imagenet": (3, 224, 1000)}
"""Channels and side of an image, and classes."""
EXACT, THEIR_EXACT = "exact", "TorchDEQ exact"
LEGEND = """\
recomputed  UPG, with each graph made again in the backward pass
F, VJP      evaluations of the cell in the forward + in the backward pass, and
            pullbacks through it
ms          time of forward pass, loss and backward pass, median: processor
            time, or on a GPU wall time
/ exact     ms divided by the ms of our exact gradient in the same round: median
            and quartiles
/ TorchDEQ  ms divided by the ms of TorchDEQ's exact gradient in the same round:
            median and quartiles
held        MB kept for the backward pass
peak        largest number of MB alive at once
peak /      peak divided by the peak of TorchDEQ's exact gradient"""


@dataclass
class Row:
    """Measurements of one gradient: seconds of each repetition, and counts and bytes of a step."""

    name: str
    costs: Costs
    times: list[float]


@dataclass
class Steps:
    """The rows, and lines that say what was measured."""

    rows: list[Row]
    about: list[str]

    @classmethod
    def of(cls, record: dict[str, Any]) -> "Steps":
        """Those of a record as JSON has it."""
        rows = [Row(row["name"], Costs(*row["costs"]), row["times"]) for row in record["rows"]]
        return cls(rows, record["about"])


def measure(settings: Settings, device: str, console: Console, repetitions: int) -> Steps:
    """Measure the steps of a model; images and labels are random, and the layers are in float32.

    Parameters
    ----------
    settings
        Those of a run. Sizes, numbers of steps and products, and dropout are taken from them.
    device
        Where to train, as PyTorch names it.
    console
        Where the progress is shown.
    repetitions
        Timed steps of each row.
    """
    place = torch.device(device)
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        channels, _, classes = IMAGES[settings.data]
        side = side_of(settings)
        model = MDEQ(settings.sizes(channels, classes), ic.steps(1), ic.OneStep()).to(place)
        images = torch.randn(settings.batch, channels, side, side).to(place)
        labels = torch.randint(classes, (settings.batch,)).to(place)
    model.layer.check = False  # it is made once in a training, but each time that bytes are counted
    forwards = ours(model, images, settings)

    def loss(logits: Tensor) -> Tensor:
        return cross_entropy(logits, labels)

    def step(forward: Callable[[], Tensor]) -> None:
        model.zero_grad()
        loss(forward()).backward()

    def count(forward: Callable[[], Tensor]) -> Costs:
        step(forward)  # what is made at the first call is not a part of a step
        model.zero_grad()
        with counting(model.layer.cell) as counted:
            return costs(counted, forward, loss)

    found = {name: count(forward) for name, forward in forwards.items()}
    forwards |= theirs(model, images, found[EXACT])
    found |= {name: count(forward) for name, forward in forwards.items() if name not in found}
    with report.progress(console, len(forwards) * repetitions) as announce:
        runs = {name: partial(step, forward) for name, forward in forwards.items()}
        times = interleaved(runs, repetitions, announce, LIMIT, clock(place))
    about = [
        f"A training step of the {settings.model} model: batches of {settings.batch} images of {side} x {side} pixels",
        f"{settings.solver_steps} steps of Broyden's method, {settings.products} products; 1 thread, "
        f"{len(times[EXACT])} repetitions",
    ]
    return Steps([Row(name, found[name], times[name]) for name in forwards], about)


def side_of(settings: Settings) -> int:
    """Height and width of the images."""
    side = IMAGES[settings.data][1]
    return min(settings.pixels or side, side)


def ours(model: MDEQ, images: Tensor, settings: Settings) -> dict[str, Callable[[], Tensor]]:
    """The forward passes of this library, which make a fixed number of steps in a solve."""
    solver = ic.Broyden(rtol=0.0, atol=0.0, max_steps=settings.solver_steps)
    exact = replace(settings, gradient="implicit").estimator()
    gradients = {
        EXACT: exact,
        f"UPG({K}, {LAM})": ic.Unroll(K, LAM, on_growth="ignore"),
        "recomputed": ic.Unroll(K, LAM, recompute=True, on_growth="ignore"),
        f"NPG({K}, {LAM})": ic.Neumann(K, LAM, on_growth="ignore"),
    }
    return {name: partial(model, images, solver=solver, gradient=gradient) for name, gradient in gradients.items()}


def theirs(model: MDEQ, images: Tensor, exact: Costs) -> dict[str, Callable[[], Tensor]]:
    """The same model with TorchDEQ's layer, Broyden's method in both passes; nothing if it is not installed.

    Its numbers of steps are such that it makes as many evaluations and pullbacks as ``exact``. In each pass one of them
    looks at the start of the solve, and one is the graph. Weights and masks are constant within a solve, as in ours.
    """
    try:
        import torchdeq

        from .torchdeq import through
    except ModuleNotFoundError:
        return {}
    forced = {"f_max_iter": exact.forward - 2, "f_tol": 0.0, "b_max_iter": exact.vjps - 2, "b_tol": 0.0}

    def forward(deq: nn.Module) -> Tensor:
        return through(deq, model, images)[0]

    gradients: dict[str, dict[str, Any]] = {THEIR_EXACT: {"ift": True}, "TorchDEQ UPG": {"grad": K, "tau": LAM}}
    solvers = {"f_solver": "broyden", "b_solver": "broyden"}
    return {
        name: partial(forward, torchdeq.get_deq(**solvers, **forced, **gradient))
        for name, gradient in gradients.items()
    }


def clock(device: torch.device) -> Callable[[], float]:
    """Processor time, which other processes hardly disturb; with a GPU wall time, once it is done."""
    if device.type != "cuda":
        return time.process_time

    def now() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


def table(measured: Steps) -> report.Table:
    """The rows as text."""
    rows = {row.name: row for row in measured.rows}
    head = ["gradient", "F", "VJP", "ms", "/ exact", "/ TorchDEQ", "held", "peak", "peak /"]
    body, other = [], rows.get(THEIR_EXACT)
    for row in measured.rows:
        of = row.costs
        body.append([
            row.name,
            f"{of.forward}+{of.backward}",
            f"{of.vjps}",
            f"{1e3 * report.quartiles(row.times)[1]:.0f}",
            beside(row, rows[EXACT]),
            "-" if other is None else beside(row, other),
            f"{of.held / MB:.1f}",
            f"{of.peak / MB:.1f}",
            "-" if other is None else f"{of.peak / other.costs.peak:.2f}",
        ])  # fmt: skip
    return report.Table(head, body, measured.about, LEGEND, wrap=True)


def beside(row: Row, other: Row) -> str:
    """The quotients of two rows' times of the same rounds: median and quartiles."""
    low, middle, high = report.quartiles([a / b for a, b in zip(row.times, other.times, strict=True)])
    return f"{middle:.2f}" if row is other else f"{middle:.2f} ({low:.2f}-{high:.2f})"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = argparse.ArgumentParser(
        prog="python -m benchmarks multiscale", description=__doc__, epilog="What is not given is that of the model."
    )
    add = options.add_argument
    add("--model", choices=tuple(PRESETS), default="small", help="size of the model (default: small)")
    add("--data", choices=tuple(IMAGES), default="cifar10", help="channels, size and classes (default: cifar10)")
    add("--pixels", type=at_least(0), metavar="N", help="height and width, if smaller; 0: those of the data")
    add("--batch", type=at_least(2), metavar="N", help="images")
    add("--dropout", type=float, default=0.0, metavar="P", help="probability of a channel (default: 0)")
    about = f"of a step (default: {REPETITIONS})"
    add("--repetitions", type=report.positive, default=REPETITIONS, metavar="N", help=about)
    add("--device", default="cpu", help="as PyTorch names it (default: cpu)")
    add("--output", type=report.output, action="append", default=[], help="save as .json or .md; may be repeated")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code: 0, or 2 if there is no such device.

    Parameters
    ----------
    arguments
        The command line's if None.
    """
    command = parser()
    options = command.parse_args(sys.argv[1:] if arguments is None else arguments)
    if options.data == "imagenet" and options.pixels is None:
        options.pixels = 0  # the small models reduce other images
    given = {name: getattr(options, name) for name in ("data", "pixels", "batch", "dropout")}
    console = Console(width=80)
    try:
        place_of(options.device)
        preset = replace(PRESETS[options.model], train=0, test=0)  # images are random
        settings = replace(preset, **{name: x for name, x in given.items() if x is not None})
    except (TrainingError, ValueError) as error:
        command.error(str(error))
    least, side = settings.sizes(1, 1).least_side, side_of(settings)
    if side % least:
        command.error(f"the {settings.model} model needs sides that are multiples of {least}, got {side} pixels")
    measured = measure(settings, options.device, console, options.repetitions)
    record = report.environment("torch", "torchdeq", device=options.device) | asdict(measured)
    table(measured).present(console, record, options.output)
    return 0
