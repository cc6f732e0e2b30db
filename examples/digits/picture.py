"""Curves of the training, as a picture."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .model import Array
from .result import Result, groups

# Colours of Okabe and Ito, distinct with any colour vision. Dashes keep curves that coincide visible.
STYLES: tuple[dict[str, Any], ...] = (
    {"color": "#000000", "linestyle": "-", "linewidth": 2.5},
    {"color": "#E69F00", "linestyle": "-", "linewidth": 2.0},
    {"color": "#0072B2", "linestyle": "--", "linewidth": 2.0},
    {"color": "#CC79A7", "linestyle": "-.", "linewidth": 2.0},
)
MARKS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("circles", {"marker": "o", "markersize": 4, "markerfacecolor": "none", "linestyle": "-", "linewidth": 0.5}),
    ("crosses", {"marker": "x", "markersize": 4, "linestyle": "-", "linewidth": 0.5}),
    ("squares", {"marker": "s", "markersize": 6, "markerfacecolor": "none", "linestyle": "-", "linewidth": 0.5}),
)
"""How the second framework and those after it are drawn over the lines of the first."""
FORMATS = (".pdf", ".png", ".svg")


def picture_path(output: str | Path | None, framework: str) -> Path:
    """The file to save to; its folder is made.

    Parameters
    ----------
    output
        A file, or a folder to put ``digits-<framework>.png`` in; ``outputs`` if None.
    framework
        Part of the file's name.

    Raises
    ------
    ValueError
        If the file would have another format than PDF, PNG or SVG.
    """
    path = Path("outputs" if output is None else output)
    if path.is_dir() or not path.suffix:
        path = path / f"digits-{framework}.png"
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"output must be a folder, or a file ending in one of {', '.join(FORMATS)}; got {str(path)!r}")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def save(path: Path, results: list[Result]) -> None:
    """Draw loss, accuracy and cosine of all estimators: one framework as lines, others as marks on them."""
    frameworks = list(dict.fromkeys(result.framework for result in results))
    *before, last = frameworks
    named = f"{', '.join(before)} and {last}" if before else last
    figure = Figure(figsize=(13, 4.6), dpi=150, layout="constrained")
    figure.suptitle(f"Deep equilibrium classifier of handwritten digits, four gradient estimators ({named})")
    loss, accuracy, angle = figure.subplots(1, 3)
    epoch = len(results[0].losses) // len(results[0].accuracies)
    steps = np.arange(epoch, len(results[0].losses) + 1, epoch)

    draw(loss, results, lambda r: smooth(r.losses, epoch), epoch)
    loss.set(title=f"Training loss, mean of the last {epoch} steps", xlabel="step", ylabel="cross-entropy")
    loss.set_yscale("log")
    draw(accuracy, results, lambda r: (1e-3 * r.step_ms * steps, 100 * r.accuracies))
    accuracy.set_xscale("log")
    accuracy.set(title="Test accuracy", xlabel="training time [s], steps × median step", ylabel="correct [%]")
    draw(angle, results, lambda r: (steps, r.cosines))
    angle.set(title="Gradient of W, U, b against the exact one", xlabel="step", ylabel="cosine")
    figure.legend(*loss.get_legend_handles_labels(), loc="outside lower center", ncols=len(STYLES) + 3)
    figure.savefig(path)


def draw(axes: Axes, results: list[Result], curve: Callable[[Result], tuple[Array, Array]], every: int = 1) -> None:
    """A curve for each estimator, with a mark at every so many points of the other frameworks'."""
    for (name, group), style in zip(groups(results).items(), STYLES, strict=True):
        first, *others = group
        axes.plot(*curve(first), label=name, **style)
        for other, (_, mark) in zip(others, MARKS, strict=False):
            axes.plot(*curve(other), color=style["color"], **mark, markevery=every)
    first, *others = next(iter(groups(results).values()))
    if others:
        axes.plot([], [], label=f"lines: {first.framework}", color="#666666")
    for other, (name, mark) in zip(others, MARKS, strict=False):
        axes.plot([], [], label=f"{name}: {other.framework}", color="#666666", **mark)
    axes.grid(alpha=0.3)


def smooth(losses: Array, window: int) -> tuple[Array, Array]:
    """Moving average, and the step at which each window ends."""
    return np.arange(window, len(losses) + 1), np.convolve(losses, np.full(window, 1 / window), mode="valid")
