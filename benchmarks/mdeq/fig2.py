"""Fig. 2: cosine of phantom gradients with the exact one, along a training with the exact one."""

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console

from .. import report
from . import command
from .cosines import PRODUCTS
from .tables import Result, about, median, numbers

DESCRIPTION = "Figure 2: cosine of phantom gradients with the exact one, along a training with the exact one."
LEGEND = f"""\
cos    cosine with the exact gradient of a batch: median over batches and seeds
low    the least of them
len    norm of the gradient over the norm of the exact one: median
res    relative residual of the solve, median
adj    relative residual of the exact gradient's linear solve, median: GMRES to
       1e-4, or {PRODUCTS} products
worst  the largest of them over samples, batches and seeds: where it is not
       small, some cosines are not those with the exact gradient
UPG and NPG have k = 5 and λ = 0.5. Gradients are taken with respect to the
parameters of the cell and the encoder. implicit makes 24 products, and trains
the model after the pretraining."""
SHORT = {"upg-5-0.5": "UPG", "npg-5-0.5": "NPG"}
TITLES = {
    "upg-5-0.5": "UPG(5, .5)",
    "npg-5-0.5": "NPG(5, .5)",
    "one-step": "one-step",
    "implicit": "implicit, 24 products",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    return command.run("fig2", DESCRIPTION, {"implicit": ("ablation", "implicit")}, publish, arguments)


def publish(console: Console, options: argparse.Namespace, found: dict[str, list[Result]]) -> int:
    """Print the table and save it with a picture."""
    results = [result for result in found["implicit"] if result["diverged"] is None]
    if not results:
        console.print("all runs diverged", highlight=False)
        return 1
    names = list(results[0]["compared"][0]["gradients"])
    head = ["step", *(f"{SHORT[name]} {what}" for name in names[:2] for what in ("cos", "low", "len"))]
    head += [*(f"{name} cos" for name in names[2:]), "res", "adj", "worst"]
    rows = []
    for i, moment in enumerate(results[0]["compared"]):
        cells = [f"{moment['step']}"]
        for name in names:
            cosine = of_all(results, i, name, "cosine")
            more = [f"{np.min(cosine):.2f}", f"{np.median(of_all(results, i, name, 'length')):.2f}"]
            cells += [f"{np.median(cosine):.3f}", *(more if name in names[:2] else [])]
        solves = [
            median([x for result in results for x in result["compared"][i][name]])
            for name in ("residual", "adjoint_residual")
        ]
        worst = [x for result in results for x in result["compared"][i]["largest_adjoint_residual"]]
        solves.append(float(np.max(numbers(worst))))
        rows.append([*cells, *(f"{residual:.0e}" for residual in solves)])
    table = report.Table(head, rows, about(results), LEGEND, wrap=True)
    command.save(console, options, "fig2", [table], {"implicit": results}, picture)
    return 0


def of_all(results: Sequence[Result], i: int, name: str, what: str) -> list[float]:
    """A measure of a gradient at a moment, of all batches and seeds; NaN where it has none."""
    return numbers([x for result in results for x in result["compared"][i]["gradients"][name][what]])


def picture(record: dict[str, Any]) -> Any:
    """As in the paper: training steps upwards, cosines to the right, a point for each batch, a color for each seed."""
    import matplotlib.pyplot as plt

    results = record["runs"]["implicit"]
    names = list(results[0]["compared"][0]["gradients"])
    figure, axes = plt.subplots(1, len(names), figsize=(12, 4.2), sharey=True)
    for axis, name in zip(axes, names, strict=True):
        steps = [moment["step"] for moment in results[0]["compared"]]
        for result in results:
            cosines = [of_all([result], i, name, "cosine") for i in range(len(steps))]
            places = [[step] * len(batches) for step, batches in zip(steps, cosines, strict=True)]
            label = f"seed {result['seed']}"
            axis.plot(np.ravel(cosines), np.ravel(places), ".", color=f"C{result['seed']}", alpha=0.5, label=label)
        medians = [np.nanmedian(of_all(results, i, name, "cosine")) for i in range(len(steps))]
        axis.plot(medians, steps, color="0.25", label="median")
        axis.axhline(results[0]["pretraining_steps"], color="k", lw=0.8, ls=":")
        axis.axvline(0.0, color="k", lw=0.8)
        axis.set(
            title=TITLES[name], xlabel="cosine with the exact gradient", xlim=(-1.02, 1.02), xticks=(-0.5, 0, 0.5, 1)
        )
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("training step")
    axes[0].legend(fontsize=8, loc="upper left")
    axes[0].annotate("end of pretraining", (-1.0, results[0]["pretraining_steps"]), fontsize=8, va="bottom")
    figure.suptitle(results[0]["data"])
    figure.tight_layout()
    return figure
