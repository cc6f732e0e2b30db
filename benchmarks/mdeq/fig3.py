"""Fig. 3: accuracy along training, (a) for several k and λ and (b) for the two forms of the phantom gradient."""

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console

from .. import report
from . import command
from .tables import Result, about, accuracies, compared, median

PANELS = {
    "(a) k, at λ = .5": ("upg-1-0.5", "upg-2-0.5", "upg-5-0.5", "upg-9-0.5"),
    "(a) λ, at k = 5": ("upg-5-0.25", "upg-5-0.5", "upg-5-0.75", "upg-5-1"),
    "(b) the two forms": ("upg-5-0.5", "npg-5-0.5", "upg-9-0.5", "npg-9-0.5", "upg-5-1", "npg-5-1", "npg-1-1"),
}
ROWS = tuple(dict.fromkeys(row for rows in PANELS.values() for row in rows))
KINDS = tuple(dict.fromkeys(row.partition("-")[2] for row in ROWS))
"""k and λ, each of which has a color."""
DESCRIPTION = "Figure 3: accuracy along training for several k and λ, and for both forms of the phantom gradient."
LEGEND = """\
last      accuracy after the last epoch, percent: mean and standard deviation
best      accuracy of each run's best epoch, which is chosen on the test, and in
          brackets the best of all
- 5       difference of last from UPG(5, 0.5), between runs of equal seeds: mean
          and standard error
residual  mean relative residual in the last test, median over runs
Curves are means over runs, without those that diverged; bands in (a) are the
standard deviation over runs.
UPG(k, λ), NPG(k, λ); NPG(1, 1) is the one-step gradient, OneStep()."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    return command.run("fig3", DESCRIPTION, {row: ("ablation", row) for row in ROWS}, publish, arguments)


def publish(console: Console, options: argparse.Namespace, found: dict[str, list[Result]]) -> int:
    """Print the table and save it with the curves."""
    head = ["gradient", "n", "last", "best", "- 5", "residual"]
    rows = []
    first = found.get("upg-5-0.5", [])
    for row, results in found.items():
        residual = median([epoch["test/residual"] for result in results for epoch in result["epochs"][-1:]])
        rows.append([label(row), *compared(results, first), f"{residual:.0e}"])
    table = report.Table(head, rows, about(next(iter(found.values()))), LEGEND)
    command.save(console, options, "fig3", [table], found, picture)
    return 0


def picture(record: dict[str, Any]) -> Any:
    """Accuracy against epochs; bands are the runs' standard deviation, where they do not hide each other."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(PANELS), figsize=(12, 4), sharey=True)
    for axis, (title, rows) in zip(axes, PANELS.items(), strict=True):
        for row in rows:
            curves = [accuracies(result) for result in record["runs"].get(row, ()) if result["diverged"] is None]
            if not curves:
                continue
            mean, deviation = np.mean(curves, axis=0), np.std(curves, axis=0, ddof=len(curves) > 1)
            epochs = np.arange(1, len(mean) + 1)
            form, color = row.partition("-")[0], f"C{KINDS.index(row.partition('-')[2])}"
            axis.plot(epochs, mean, color=color, ls="--" if form == "npg" else "-", label=label(row))
            if len(rows) < 5:
                axis.fill_between(epochs, mean - deviation, mean + deviation, color=color, alpha=0.12, lw=0)
        axis.set(title=title, xlabel="epoch")
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8, frameon=False, loc="lower right")
    axes[0].set_ylabel("accuracy in the test, percent")
    figure.suptitle(next(iter(record["runs"].values()))[0]["data"])
    figure.tight_layout()
    return figure


def label(row: str) -> str:
    """A row as people write it."""
    form, k, lam = row.split("-")
    return f"{form.upper()}({k}, {lam.removeprefix('0')})"
