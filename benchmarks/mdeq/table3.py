"""Tab. 3: accuracy, time of a step and peak memory of the exact gradient and of phantom gradients, for large models."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from .. import report
from ..runs import plain, write_json
from . import command, steps, table1
from .experiments import settings_of
from .tables import Result, about, compared

ROWS = {
    "implicit": ("Implicit", "93.8"),
    "upg-5-0.5": ("UPG(5, .5)", "95.0"),
    "npg-5-0.5": ("NPG(5, .5)", "-"),
    "torchdeq-implicit": ("TorchDEQ, IFT", "-"),
    "torchdeq-upg-5-0.5": ("TorchDEQ, UPG(5, .5)", "-"),
}
"""The rows: what they are, and the paper's accuracy on CIFAR-10, which has no row of NPG."""
FAMILIES = {
    row: ("torchdeq", row.removeprefix("torchdeq-")) if row.startswith("torchdeq") else ("large", row) for row in ROWS
}
DESCRIPTION = "Table 3: accuracy, time of a step and peak memory, of the exact gradient and of phantom gradients."
LEGEND = """\
last, best, - exact    as in Tab. 1
paper                  its accuracy with MDEQ of 10M parameters on CIFAR-10
ImageNet, the table's other task, was not run."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    return command.run("table3", DESCRIPTION, FAMILIES, publish, arguments)


def publish(console: Console, options: argparse.Namespace, found: dict[str, list[Result]]) -> int:
    """Print the tables and save them."""
    exact = found.get("implicit", [])
    rows = []
    for row, results in found.items():
        name, paper = ROWS[row]
        rows.append([name, *compared(results, exact), paper])
    accuracy = report.Table(
        ["gradient", "n", "last", "best", "- exact", "paper"], rows, about(next(iter(found.values()))), LEGEND
    )
    measured = timed(console, options)
    times = [] if measured is None else [steps.table(measured)]
    command.save(console, options, "table3", [accuracy, *times], found, picture)
    return 0


def timed(console: Console, options: argparse.Namespace) -> steps.Steps | None:
    """The times and the memory of steps of the model of the first row; None where a report finds none.

    They are measured once for each device, since other processes disturb them.
    """
    file = options.results / f"{options.data}-steps-{options.device.replace(':', '-')}.json"
    settings = settings_of(*FAMILIES["implicit"], options.scale, options.data, seed=0)
    of = {"settings": plain(settings), "device": options.device}
    found = _measured(file, of)
    if not options.report and (options.restart or found is None):
        found = steps.measure(settings, options.device, console, steps.REPETITIONS)
        record = {**of, **report.environment("torch", "torchdeq", device=options.device), **asdict(found)}
        write_json(file, record)
    return found


def _measured(file: Path, of: dict[str, Any]) -> steps.Steps | None:
    """What a file has, if it was measured with these settings, on this device."""
    found = json.loads(file.read_text()) if file.exists() else {}
    return steps.Steps.of(found) if all(found.get(name) == value for name, value in of.items()) else None


def picture(record: dict[str, Any]) -> Any:
    """As that of Tab. 1."""
    return table1.dots(record["runs"], {row: name for row, (name, _) in ROWS.items()})
