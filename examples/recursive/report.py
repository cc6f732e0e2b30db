"""The output of the program in the terminal, and its numbers for TensorBoard."""

import numpy as np
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .evaluation import BELIEF, Halted
from .settings import Settings

WIDTH = 70
"""Of the tables."""


def progress(console: Console) -> Progress:
    """A bar over the training steps, with the means since the last line and the time left."""
    return Progress(
        TextColumn("step {task.completed:>4}"),
        BarColumn(bar_width=8),
        TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(compact=True),
        console=console,
    )


def status(means: dict[str, float]) -> str:
    """Loss, accuracies and residual of training steps."""
    return (
        f"loss {means['loss']:.3f}  cells {means['cells']:5.1%}  exact {means['exact']:5.1%}"
        f"  residual {means['residual']:.0e}"
    )


def line(step: int, means: dict[str, float], tested: dict[str, float]) -> str:
    """A part of the run in a line of at most 80 characters."""
    return f"step {step:>4}  {status(means)}  tested {tested['exact']:5.1%}"


def scalars(means: dict[str, float], tested: dict[str, float]) -> dict[str, float]:
    """The same numbers by name, for TensorBoard."""
    parts = {"train": means, "test": tested}
    return {f"{name}/{part}": value for part, numbers in parts.items() for name, value in numbers.items()}


def by_depth(settings: Settings, found: dict[int, dict[str, float]], count: int, seconds: float) -> Table:
    """Accuracy against recursions."""
    caption = f"{count:,} new puzzles; trained for {seconds:.0f} s"
    table = Table(title=f"6 x 6 Sudoku, {settings}", caption=caption, box=box.SIMPLE_HEAD, width=WIDTH)
    for name in ("recursions", "exact match", "cells", "residual"):
        table.add_column(name, justify="right")
    trained = settings.recursions * settings.supervisions
    for depth, shares in found.items():
        mark = " (trained)" if depth == trained else ""
        numbers = f"{shares['exact']:.1%}", f"{shares['cells']:.2%}", f"{shares['residual']:.1e}"
        table.add_row(f"{depth}{mark}", *numbers)
    return table


def halting(halted: Halted, most: int) -> Table:
    """What the model's own belief does."""
    stopped = halted.halted
    title = f"Halted where the model believes its answer, at a probability of {BELIEF:g}"
    table = Table(title=title, box=box.SIMPLE, show_header=False, width=WIDTH)
    table.add_column()
    table.add_column(justify="right")

    def share(part: np.ndarray, whole: np.ndarray) -> str:
        percent = f" ({part.sum() / whole.sum():.1%})" if whole.any() else ""
        return f"{part.sum():,} of {whole.sum():,}{percent}"

    right, every = halted.right, np.ones_like(stopped)
    mean = halted.evaluated.mean()
    for name, value in (
        ("puzzles that halted", share(stopped, every)),
        ("of these, right", share(right & stopped, stopped)),
        ("of the others, right", share(right & ~stopped, ~stopped)),
        ("exact match of all", f"{right.mean():.1%}"),
        ("recursions computed for a puzzle", f"{mean:.1f} of {most}"),
        ("saved", f"{1 - mean / most:.1%}"),
    ):
        table.add_row(name, value)
    return table
