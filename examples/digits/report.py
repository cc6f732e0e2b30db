"""What the demo says in the terminal."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .result import TARGET, Result

LEGEND = """\
acc     test accuracy after training; one image is 0.3 %
ms      median time of a training step
F       evaluations of F a step: in the solve + for the layer's value
VJPs    pullbacks through F a step: of h, of z, or of both at once
cosine  between the estimated and the exact gradient of W, U and b,
        on one fixed batch; mean over the ends of the epochs"""


def progress(console: Console) -> Progress:
    """A bar for each estimator, with its current loss."""
    return Progress(
        TextColumn("{task.description:<15}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeElapsedColumn(),
        console=console,
    )


def table(results: list[Result], framework: str) -> Table:
    """The estimators side by side."""
    rows = Table(title=f"Deep equilibrium classifier of digits, {framework}")
    rows.add_column("gradient", overflow="fold")
    for name in ("acc", "ms", "F", "VJPs", "cosine"):
        rows.add_column(name, justify="right", overflow="fold")
    for result in results:
        rows.add_row(
            result.name,
            f"{result.accuracy:.1%}",
            f"{result.step_ms:.2f}",
            f"{result.solve_evaluations:.1f} + {result.value_evaluations:.0f}",
            f"{result.vjps:.1f}",
            f"{result.cosine:.4f}",
        )
    return rows


def remarks(results: list[Result]) -> list[str]:
    """What must not be overlooked: solves that did not converge, and accuracies below the target."""
    solves = sum(result.counts.solves for result in results)
    unconverged = [
        f"{result.name}: {result.counts.unconverged:,} of {result.counts.solves:,} solves did not converge."
        for result in results
        if result.counts.unconverged
    ]
    missed = [
        f"{result.name}: test accuracy {result.accuracy:.1%} is not above {TARGET:.0%}."
        for result in results
        if not result.passed
    ]
    return (unconverged or [f"All {solves:,} solves converged, one for each image in each batch."]) + missed


def show(console: Console, results: list[Result], framework: str) -> None:
    """Print the table, its legend and the remarks."""
    console.print(table(results, framework))
    console.print(LEGEND, style="dim", highlight=False)
    for remark in remarks(results):
        console.print(remark, highlight=False)
