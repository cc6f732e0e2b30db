"""The output of the demo in the terminal."""

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .result import Result, difference, failures, groups

LEGEND = """\
acc     test accuracy after training; one image is 0.3 %
loss    mean training loss in the last epoch
ms      median time of a training step
F       evaluations of F a step: in the solve + for the layer's value
VJPs    pullbacks through F a step: of h, of z, or of both at once
cosine  between the estimated and the exact gradient of W, U and b,
        on one fixed batch; mean over the ends of the epochs"""
COUNTED = """\
jax     F and VJPs are counted in a second, untimed run of each gradient"""
DIFFERENCE = """\
diff    largest difference between a parameter and its value in
        numpy after training; all start equal and see equal batches"""


def progress(console: Console) -> Progress:
    """A bar for each model, with its current loss."""
    return Progress(
        TextColumn("{task.description:<21}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeElapsedColumn(),
        console=console,
    )


def table(results: list[Result]) -> Table:
    """A row for each estimator in each framework."""
    several = len({result.framework for result in results}) > 1
    title = "Deep equilibrium classifier of digits"
    rows = Table(title=title, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    rows.add_column("gradient", overflow="fold")
    rows.add_column("with", overflow="fold")
    for name in ("acc", "loss", "ms", "F", "VJPs", "cosine", *["diff"] * several):
        rows.add_column(name, justify="right", overflow="fold")
    for name, group in groups(results).items():
        for result in group:
            rows.add_row(
                name if result is group[0] else "",
                result.framework,
                f"{result.accuracy:.1%}",
                f"{result.loss:.4f}",
                f"{result.step_ms:#.3g}",
                f"{result.solve_evaluations:.1f}+{result.value_evaluations:.0f}",
                f"{result.vjps:.1f}",
                f"{result.cosine:.4f}",
                *([f"{difference(group[0], result):.0e}" if result is not group[0] else ""] * several),
            )
    return rows


def remarks(results: list[Result]) -> list[str]:
    """Remarks on convergence, on the accuracies, and on agreement between the frameworks."""
    solves = sum(result.counts.solves for result in results)
    unconverged = [
        f"{result.name}, {result.framework}: "
        f"{result.counts.unconverged:,} of {result.counts.solves:,} solves did not converge."
        for result in results
        if result.counts.unconverged
    ]
    return (unconverged or [f"All {solves:,} solves converged, one for each image in each batch."]) + failures(results)


def show(console: Console, results: list[Result]) -> None:
    """Print the table, its legend and the remarks."""
    console.print(table(results))
    console.print()
    console.print(LEGEND, style="dim", highlight=False)
    frameworks = {result.framework for result in results}
    if "jax" in frameworks:
        console.print(COUNTED, style="dim", highlight=False)
    if len(frameworks) > 1:
        console.print(DIFFERENCE, style="dim", highlight=False)
    for remark in remarks(results):
        console.print(remark, highlight=False)
