"""What the benchmarks share: progress, the machine in words, and a table on the screen and in files."""

import argparse
import json
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import quantiles
from typing import Any

import rich.table
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


@dataclass(frozen=True)
class Table:
    """A table of at most 80 columns; the first column names the rows.

    Parameters
    ----------
    head, rows
        The cells, as text.
    title
        Lines above it.
    legend
        Text below it.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: Sequence[str]
    legend: str

    def show(self, console: Console) -> None:
        """Print it."""
        table = rich.table.Table(box=None, padding=(0, 1, 0, 0))
        for i, name in enumerate(self.head):
            table.add_column(name, justify="right" if i else "left", no_wrap=True)
        for row in self.rows:
            table.add_row(*row)
        for line in self.title:
            console.print(line, highlight=False)
        console.print(table)
        console.print(self.legend, style="dim", highlight=False)

    def present(self, console: Console, record: dict[str, Any], paths: Sequence[Path]) -> None:
        """Print it, and write it or its record to files."""
        self.show(console)
        for path in paths:
            self.save(path, record)

    def markdown(self) -> str:
        """It as a page."""
        lines = [
            *(f"{line}  " for line in self.title),
            "",
            f"| {' | '.join(self.head)} |",
            "|---" + "|--:" * (len(self.head) - 1) + "|",
        ]
        lines += [f"| {' | '.join(row)} |" for row in self.rows]
        return "\n".join([*lines, "", "```", self.legend, "```", ""])

    def save(self, path: Path, record: dict[str, Any]) -> None:
        """Write it as a page, or ``record`` as JSON, as the suffix says."""
        path.parent.mkdir(parents=True, exist_ok=True)
        text = self.markdown() if path.suffix == ".md" else json.dumps(record, indent=1) + "\n"
        path.write_text(text)


@contextmanager
def progress(console: Console, total: int | None) -> Iterator[Callable[[str], None]]:
    """A bar; the function it gives names what is done next."""
    columns = TextColumn("{task.description:<24}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda name: bar.update(task, description=name, advance=1)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The three quartiles; of one value, that value."""
    low, middle, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3
    return low, middle, high


def environment(*packages: str) -> dict[str, Any]:
    """Versions and the machine, without which no number means anything."""
    versions = {"python": platform.python_version()}
    for package in ("implicit-core", *packages):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "-"
    return {
        "versions": versions,
        "machine": {"cpu": cpu(), "system": f"{platform.system()} {platform.machine()}"},
    }


def cpu() -> str:
    """The processor's name, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def positive(text: str) -> int:
    """A whole number from 1 on, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


def output(text: str) -> Path:
    """A path whose suffix names a format, for argparse."""
    path = Path(text)
    if path.suffix not in (".json", ".md"):
        raise argparse.ArgumentTypeError(f"must end in .json or .md, got {text}")
    return path
