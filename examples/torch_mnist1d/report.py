"""The output of the program, in the terminal and for TensorBoard."""

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .training import Epoch, Totals, Training

PUBLISHED = 0.94


def progress(console: Console) -> Progress:
    """A bar over the steps of all epochs, with the epoch's means so far."""
    return Progress(
        TextColumn("epoch {task.fields[epoch]:>3}"),
        BarColumn(bar_width=16),
        TextColumn("{task.percentage:>3.0f}%  {task.fields[status]}"),
        TimeElapsedColumn(),
        console=console,
    )


def status(totals: Totals) -> str:
    """Loss, accuracy and solver steps so far in this epoch."""
    means = totals.means()
    return f"loss {means['loss']:.4f}  acc {means['accuracy']:5.1%}  steps {means['solver_steps']:4.1f}"


def line(number: int, epoch: Epoch) -> str:
    """An epoch in a line of at most 80 characters."""
    return (
        f"epoch {number:>3}  {status(epoch.train)}  validation {epoch.validation.means()['accuracy']:5.1%}"
        f"  {epoch.seconds:.1f} s"
    )


def table(training: Training, test: Totals) -> Table:
    """The run in numbers."""
    parameters = sum(parameter.numel() for parameter in training.model.parameters())
    epochs = training.epochs
    best = epochs[training.best["epoch"] - 1]
    seconds = sum(epoch.seconds for epoch in epochs)
    rows = Table(title=f"MNIST-1D, {training.settings}", show_header=False)
    rows.add_column(overflow="fold")
    rows.add_column(overflow="fold", justify="right")
    for name, value in (
        ("test accuracy", f"{test.means()['accuracy']:.1%}"),
        ("published, for a convolutional network", f"{PUBLISHED:.1%}"),
        ("validation accuracy", f"{best.validation.means()['accuracy']:.1%}"),
        ("best epoch, by validation accuracy", f"{training.best['epoch']} of {len(epochs)}"),
        ("training loss in it", f"{best.train.means()['loss']:.4f}"),
        ("solver steps a sample, in training", f"{sum(epoch.train.steps for epoch in epochs) / trained(epochs):.1f}"),
        ("solver steps a sample, in the test", f"{test.means()['solver_steps']:.1f}"),
        ("parameters", f"{parameters:,}"),
        ("training time", f"{seconds:.0f} s, {seconds / len(epochs):.1f} s an epoch"),
    ):
        rows.add_row(name, value)
    return rows


def trained(epochs: list[Epoch]) -> int:
    """Samples solved in training."""
    return sum(epoch.train.samples for epoch in epochs)


def remarks(training: Training, test: Totals) -> list[str]:
    """Remarks on the convergence of the solves."""
    solves = {
        "training": (sum(epoch.train.converged for epoch in training.epochs), trained(training.epochs)),
        "the test": (test.converged, test.samples),
    }
    return [
        f"In {name}, {samples - converged:,} of {samples:,} solves did not converge ({1 - converged / samples:.2%})."
        if converged < samples
        else f"In {name}, all {samples:,} solves converged."
        for name, (converged, samples) in solves.items()
    ]


def scalars(epoch: Epoch) -> dict[str, float]:
    """The numbers of an epoch, for TensorBoard."""
    parts = {"train": epoch.train, "validation": epoch.validation}
    return {f"{name}/{part}": value for part, totals in parts.items() for name, value in totals.means().items()}
