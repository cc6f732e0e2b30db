"""The table and the picture."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from .data import SIDE, Floats
from .search import Hypergradient, Trace

FORMATS = (".pdf", ".png", ".svg")
LEGEND = """\
F         evaluations of F: in the solve + for the estimator's value
VJPs      products with the transposed Jacobians of F
cosine    of the hypergradient and the exact one, at the start
error     its relative error there
valid.    validation loss of the exact solution, after the search
test      its test loss"""

# Colours of Okabe and Ito, distinct with any colour vision.
COLOURS = ("#E69F00", "#56B4E9", "#0072B2", "#009E73", "#CC79A7", "#000000", "#999999", "#D55E00", "#F0E442")


@dataclass(frozen=True)
class Row:
    """The results of one estimator.

    Attributes
    ----------
    name
        The estimator.
    start
        Its hypergradient at the start of the search; None for the grid.
    trace
        The search.
    validation, test
        Losses at the end of the search.
    """

    name: str
    start: Hypergradient | None
    trace: Trace
    validation: float
    test: float


def table(rows: list[Row], framework: str) -> Table:
    """A line for each estimator, of at most 80 characters."""
    columns = Table(title=f"A penalty for each pixel, {framework}", box=box.SIMPLE_HEAD, pad_edge=False)
    columns.add_column("gradient", no_wrap=True)
    for name in ("F", "VJPs", "cosine", "error", "valid.", "test"):
        columns.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        start = row.start
        numbers = (
            ("", "", "", "")
            if start is None
            else (f"{start.solve}+{start.value}", f"{start.products}", f"{start.cosine:.5f}", f"{start.error:.1e}")
        )
        columns.add_row(row.name, *numbers, f"{row.validation:.4f}", f"{row.test:.4f}")
    return columns


def save(path: Path, rows: list[Row], shown: str = "Implicit(CG)") -> None:
    """The searches, and the penalties that one of them found."""
    figure = Figure(figsize=(10, 4), dpi=150, layout="constrained")
    losses, pixels = figure.subplots(1, 2, width_ratios=(1.5, 1))
    draw_searches(losses, rows)
    (row,) = (row for row in rows if row.name == shown)
    draw_penalties(pixels, row.trace.theta)
    figure.savefig(path)


def draw_searches(axes: Axes, rows: list[Row]) -> None:
    """The validation loss at each step, as the estimator's own value gives it."""
    searches = [row for row in rows if row.start is not None]
    for row, colour in zip(searches, COLOURS, strict=False):
        style = "--" if row.name.startswith(("Implicit(CG)", "Unroll")) else "-"  # both lie on another curve
        axes.plot(np.arange(len(row.trace.losses)), row.trace.losses, style, color=colour, label=row.name)
    for row in rows:
        if row.start is None:
            axes.axhline(row.validation, color="#666666", linestyle=":", label=row.name)
    axes.set(xlabel="step of the search", ylabel="validation loss")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    axes.grid(alpha=0.3)


def draw_penalties(axes: Axes, theta: Floats) -> None:
    """The penalty of each pixel, on a logarithmic scale."""
    image = axes.imshow(theta[: SIDE * SIDE].reshape(SIDE, SIDE) / np.log(10), cmap="viridis")
    axes.figure.colorbar(image, ax=axes, label="log₁₀ of the penalty")
    axes.set(title="Penalties of the pixels", xticks=[], yticks=[])


def picture_path(output: str) -> Path:
    """The file to save to.

    Raises
    ------
    ValueError
        If it would have another format than PDF, PNG or SVG, or its folder is missing.
    """
    path = Path(output)
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"the picture must be a file ending in one of {', '.join(FORMATS)}; got {output!r}")
    if not path.parent.is_dir():
        raise ValueError(f"there is no folder {str(path.parent)!r} to save the picture in")
    return path
