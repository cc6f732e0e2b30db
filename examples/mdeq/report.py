"""The output of the program in the terminal, and its numbers for TensorBoard."""

from collections.abc import Mapping

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .settings import Settings
from .source import size_of
from .training import Training


def progress(console: Console) -> Progress:
    """A bar over the training steps, with the means of the epoch so far and the time left."""
    return Progress(
        TextColumn("step {task.completed:>5}"),
        BarColumn(bar_width=12),
        TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(compact=True),
        console=console,
    )


def status(means: Mapping[str, float]) -> str:
    """Loss, accuracy and relative residual of training steps."""
    return f"loss {means['loss']:.3f}  accuracy {means['accuracy']:5.1%}  residual {means['residual']:.0e}"


def line(epoch: int, found: Mapping[str, float]) -> str:
    """An epoch in a line of at most 80 characters."""
    means = {name.removeprefix("train/"): value for name, value in found.items() if name.startswith("train/")}
    return f"epoch {epoch:>3}  {status(means)}  tested {found['test/accuracy']:5.1%}"


def summary(settings: Settings, training: Training) -> Table:
    """The last and the best epoch."""
    seconds = sum(found["seconds"] for found in training.epochs)
    images, tested = size_of(training.source.train), size_of(training.source.test)
    caption = f"{images:,} images to train on, {tested:,} to test; trained for {seconds:.0f} s"
    table = Table(title=str(settings), caption=caption, box=box.SIMPLE_HEAD, width=78)
    for name in ("", "epoch", "test accuracy", "test loss", "train accuracy", "residual"):
        table.add_column(name, justify="right")
    best = max(range(len(training.epochs)), key=lambda i: (training.epochs[i]["test/accuracy"], i))
    for name, index in (("last", len(training.epochs) - 1), ("best", best)):
        found = training.epochs[index]
        table.add_row(
            name,
            str(index + 1),
            f"{found['test/accuracy']:.1%}",
            f"{found['test/loss']:.3f}",
            f"{found['train/accuracy']:.1%}",
            f"{found['test/residual']:.0e}",
        )
    return table
