"""Tab. 1: the parts of a training with the exact gradient, beside phantom gradients."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console

from .. import report
from . import command
from .tables import Result, about, compared, last, seconds

PAPER = {
    "implicit": ("MDEQ + Implicit", "85.0 (85.3)"),
    "implicit-no-pretraining": ("w/o pretraining", "82.3 (84.6)"),
    "implicit-no-dropout": ("w/o dropout", "83.7 (84.0)"),
    "implicit-sgd": ("Adam -> SGD", "84.4 (84.8)"),
    "implicit-sgd-no-pretraining": ("SGD, no pretr.", "81.9 (85.6)"),
    "upg-5-0.5": ("UPG(5, .5)", "85.8 (86.6)"),
    "npg-5-0.5": ("NPG(5, .5)", "85.6 (86.1)"),
    "upg-9-0.5-dropout": ("UPG(9), dropout", "86.1 (87.3)"),
    "implicit-sgd-no-pretraining-no-dropout": ("SGD w/o both", "-"),
    "upg-5-0.5-adam-dropout": ("UPG(5) by Adam", "-"),
}
"""The rows: how the paper names them, and its mean and best accuracy over six runs on CIFAR-10.

The last two, which it lacks, differ from others in the gradient alone: from UPG(5, .5), and from the row without
pretraining.
"""
DESCRIPTION = "Table 1: accuracy with the exact gradient and its parts, and with phantom gradients."
LEGEND = """\
n        runs and, in brackets, those that diverged, which count as 10 %
last     accuracy after the last epoch, percent: mean and standard deviation
best     accuracy of each run's best epoch, which is chosen on the test as in
         the published code: mean, standard deviation and, in brackets, the best
- exact  difference of last from the first row, between runs of equal seeds:
         mean and standard error
s        time of the training steps of a run that did not diverge: of the
         processor, or on a GPU on the clock
paper    its mean and best of six runs of MDEQ-Tiny on all of CIFAR-10
UPG and NPG have λ = 0.5 and train by SGD without dropout, if nothing else is
said. UPG(5) by Adam has the dropout of the exact gradient, and no pretraining."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    return command.run("table1", DESCRIPTION, {row: ("ablation", row) for row in PAPER}, publish, arguments)


def publish(console: Console, options: argparse.Namespace, found: dict[str, list[Result]]) -> int:
    """Print the table and save it."""
    exact = found.get("implicit", [])
    head = ["gradient", "n", "last", "best", "- exact", "s", "paper"]
    rows = []
    for row, results in found.items():
        name, paper = PAPER[row]
        rows.append([name, *compared(results, exact), f"{seconds(results):.0f}", paper])
    table = report.Table(head, rows, about(next(iter(found.values()))), LEGEND)
    command.save(console, options, "table1", [table], found, picture)
    return 0


def picture(record: dict[str, Any]) -> Any:
    """The accuracy of each run."""
    return dots(record["runs"], {row: name for row, (name, _) in PAPER.items()})


def dots(found: Mapping[str, Sequence[Result]], names: Mapping[str, str]) -> Any:
    """The accuracy of each run after its last epoch, in the color of its seed, and the mean of each row."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 1.1 + 0.36 * len(found)))
    seeds: dict[int, Any] = {}
    for place, results in enumerate(found.values()):
        axis.plot([np.mean(last(results))] * 2, [place - 0.3, place + 0.3], color="0.4", lw=2)
        for result in results:
            seed = result["seed"]
            (seeds[seed],) = axis.plot(last([result]), place, "o", color=f"C{seed}", alpha=0.8, label=f"seed {seed}")
    axis.set_yticks(range(len(found)), [names[row] for row in found])
    axis.invert_yaxis()
    axis.set(title=next(iter(found.values()))[0]["data"], xlabel="accuracy after the last epoch, percent; lines: means")
    axis.legend(handles=[seeds[seed] for seed in sorted(seeds)], fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    axis.grid(axis="x", alpha=0.25)
    figure.tight_layout()
    return figure
