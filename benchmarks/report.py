"""Shared by the benchmarks: command lines, progress bars, facts about the machine, and tables."""

import argparse
import csv
import json
import platform
import sys
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

from implicit_core.examples.program import at_least

ROOT = Path(__file__).parents[1]
WIDEST = 200
"""Columns of the widest table that is printed."""
COMMAND = (sys.executable, "-m", "benchmarks")
"""Command that runs a part of a benchmark in its own process, from :data:`ROOT`."""


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
    wrap
        Whether a column head is broken into one word per line.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: Sequence[str]
    legend: str
    wrap: bool = False

    def show(self, console: Console) -> None:
        """Print it; a table that is wider than the console is not cut off, since a half of a number is a wrong one."""
        table = rich.table.Table(box=None, padding=(0, 1, 0, 0))
        for i, name in enumerate(self.head):
            table.add_column(
                name.replace(" ", "\n") if self.wrap else name, justify="right" if i else "left", no_wrap=True
            )
        for row in self.rows:
            table.add_row(*row)
        for line in self.title:
            console.print(line, highlight=False)
        width, console.width = console.width, max(console.width, WIDEST)
        console.print(table)
        console.width = width
        if self.legend:
            console.print(self.legend, style="dim", highlight=False)

    def present(self, console: Console, record: dict[str, Any], paths: Sequence[Path]) -> None:
        """Print it, and write it or its record to files."""
        self.show(console)
        for path in paths:
            self.save(path, record)

    def markdown(self) -> str:
        """The table as Markdown."""
        lines = [
            *(f"{line}  " for line in self.title),
            "",
            f"| {' | '.join(self.head)} |",
            "|---" + "|--:" * (len(self.head) - 1) + "|",
        ]
        lines += [f"| {' | '.join(row)} |" for row in self.rows]
        legend = ["```", self.legend, "```", ""] if self.legend else []
        return "\n".join([*lines, "", *legend])

    def save(self, path: Path, record: dict[str, Any]) -> None:
        """Write the table (suffix ``.md``) or ``record`` as JSON (any other suffix)."""
        path.parent.mkdir(parents=True, exist_ok=True)
        text = self.markdown() if path.suffix == ".md" else json.dumps(record, indent=1) + "\n"
        path.write_text(text)


def parser(name: str, description: str | None, *, timed: bool = True) -> argparse.ArgumentParser:
    """A command line with the common options; a ``timed`` benchmark also has repetitions and threads."""
    options = argparse.ArgumentParser(prog=f"python -m benchmarks {name}", description=description)
    add = options.add_argument
    add("--quick", action="store_true", help="small sizes and few repetitions: under a minute")
    if timed:
        add("--repetitions", type=positive, help="timed runs of each row (default: depends on the benchmark)")
        add("--threads", type=positive, default=2, help="threads of PyTorch (default: 2)")
    add("--seed", type=int, default=0, help="seed of weights and inputs (default: 0)")
    add("--output", type=Path, help="folder for the tables (.md), the numbers (.json) and a picture (.png)")
    return options


def facts(options: argparse.Namespace, *packages: str) -> dict[str, Any]:
    """The settings, the versions and the machine behind the numbers."""
    settings = {name: value for name, value in vars(options).items() if name != "output"}
    return {"settings": settings} | environment(*packages)


def publish(
    console: Console,
    folder: Path | None,
    name: str,
    tables: Sequence[Table],
    record: dict[str, Any],
    picture: Callable[[dict[str, Any]], Any],
) -> None:
    """Print the tables; if a folder is given, save the tables, their numbers and a picture."""
    for table in tables:
        table.show(console)
        console.print()
    versions = ", ".join(f"{package} {number}" for package, number in record["versions"].items())
    machine = ", ".join(record["machine"][part] for part in ("gpu", "cpu") if part in record["machine"])
    console.print(f"{machine}; {versions}", highlight=False)
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(
        "\n".join([*(table.markdown() for table in tables), f"{machine}; {versions}.\n"])
    )
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    import matplotlib as mpl

    mpl.use("agg")
    picture(record).savefig(folder / f"{name}.png", dpi=150)
    console.print(f"Saved in {folder}.", highlight=False)


def save_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows with the same keys as CSV: the keys are the header, numbers have eight digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: f"{x:.8g}" if isinstance(x, float) else x for name, x in row.items()})


def verdict(console: Console, broken: Sequence[str]) -> int:
    """Print the statements of the paper that the numbers contradict; returns the exit code."""
    for sentence in broken:
        console.print(f"Does not hold: {sentence}.", style="red", highlight=False)
    if not broken:
        console.print("The paper's statements hold.", highlight=False)
    return 1 if broken else 0


@contextmanager
def progress(console: Console, total: int | None) -> Iterator[Callable[[str], None]]:
    """A progress bar; calls of the yielded function name the next run and advance the bar."""
    columns = TextColumn("{task.description:<24}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda name: bar.update(task, description=name, advance=1)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The three quartiles; a single value is all three."""
    low, middle, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3
    return low, middle, high


def environment(*packages: str, device: str = "cpu") -> dict[str, Any]:
    """Versions of Python and of packages, and the machine, with the GPU if the device is one of PyTorch's."""
    versions = {"python": platform.python_version()}
    for package in ("implicit-core", *packages):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "-"
    return {
        "versions": versions,
        "machine": {"cpu": cpu(), **gpu(device), "system": f"{platform.system()} {platform.machine()}"},
    }


def gpu(device: str) -> dict[str, str]:
    """The name of a GPU, by PyTorch's name for it; nothing for another device."""
    if not device.startswith("cuda"):
        return {}
    import torch

    return {"gpu": torch.cuda.get_device_name(device)}


def cpu() -> str:
    """The name of the processor, if the system reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


positive = at_least(1)
"""The type of an option that is a positive integer, for argparse."""


def output(text: str) -> Path:
    """A path with the suffix .json or .md, for argparse."""
    path = Path(text)
    if path.suffix not in (".json", ".md"):
        raise argparse.ArgumentTypeError(f"must end in .json or .md, got {text}")
    return path
