"""The command lines of the tables and figures that come from trainings."""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from rich.console import Console

from implicit_core.examples.mdeq.run import place_of
from implicit_core.examples.program import TrainingError

from .. import report
from ..runs import make_all
from .experiments import DATA, SCALES
from .tables import read, require_same_images
from .trainings import OutOfTimeError, Run, begin, execute

HERE = Path(__file__).parent
SCRATCH = report.ROOT / "outputs" / "mdeq"
Publish: TypeAlias = Callable[[Console, argparse.Namespace, dict[str, list[dict[str, Any]]]], int]
"""Shows the finished runs, which are given by their rows; returns the exit code."""

EPILOG = """A run that has a result is left out, and a run that was stopped goes on from its last checkpoint. --report
shows what is finished. small: 16 x 16 pixels, 3000 images, about four minutes a run on one core; digits take seconds.
paper: the published settings on all images, for a GPU."""


def parser(name: str, description: str) -> argparse.ArgumentParser:
    """The command line."""
    options = argparse.ArgumentParser(prog=f"python -m benchmarks {name}", description=description, epilog=EPILOG)
    add = options.add_argument
    add("--data", choices=tuple(DATA), default="digits", help="what to train on (default: digits)")
    add("--data-dir", type=Path, metavar="DIR", help="folder of the images; digits need none")
    add("--scale", choices=SCALES, default="small", help="size of models and trainings (default: small)")
    add("--seeds", type=report.positive, default=3, metavar="N", help="seeds of each row (default: 3)")
    add("--epochs", type=report.positive, metavar="N", help="passes over the images (default: those of the scale)")
    add("--rows", nargs="+", metavar="ROW", help="train only these; all finished rows are shown")
    add("--device", default="cpu", help="where to train, as PyTorch names it (default: cpu)")
    add("--workers", type=report.positive, default=1, metavar="N", help="runs at a time, each a process (default: 1)")
    add("--minutes", type=positive_number, metavar="M", help="stop after so long; the same command goes on")
    add("--resume", action="store_true", help="go on; so does every command, unless --restart is given")
    add("--restart", action="store_true", help="remove the results and checkpoints of these runs, and begin anew")
    add("--report", action="store_true", help="only show what is finished")
    add("--results", type=Path, metavar="DIR", help="folder of the results (default: one in benchmarks/mdeq/results)")
    add("--scratch", type=Path, default=SCRATCH, metavar="DIR", help="folder of checkpoints (default: outputs/mdeq)")
    return options


def positive_number(text: str) -> float:
    """A positive number, for argparse."""
    number = float(text)
    if not number > 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return number


def run(
    name: str, description: str, rows: Mapping[str, tuple[str, str]], publish: Publish, arguments: Sequence[str] | None
) -> int:
    """Make the runs of a table or a figure, and show them.

    Parameters
    ----------
    name, description
        Of the command.
    rows
        The family and the row of its runs, by the name of a row.
    publish
        Shows them.
    arguments
        The command line's if None.

    Returns
    -------
    int
        The exit code: 0, 1 if there is nothing to show, 2 if the runs can't be made, 130 after Ctrl-C.
    """
    command = parser(name, description)
    options = command.parse_args(arguments)
    for row in options.rows or ():
        if row not in rows:
            command.error(f"no row is named {row}; there are: {', '.join(rows)}")
    folder = options.scale if options.epochs is None else f"{options.scale}-{options.epochs}-epochs"
    if options.report and options.restart:
        command.error("--restart removes results, and --report shows them: choose one")
    options.results = options.results or HERE / "results" / folder
    console = Console(width=80)
    make = partial(
        Run, scale=options.scale, data=options.data, results=options.results, scratch=options.scratch,
        data_dir=options.data_dir, device=options.device, epochs=options.epochs,
        until=time.time() + 60 * options.minutes if options.minutes else float("inf"),
    )  # fmt: skip
    seeds = range(options.seeds)
    runs = {name: [make(family=family, row=row, seed=seed) for seed in seeds] for name, (family, row) in rows.items()}
    chosen = [runs[row][seed] for seed in seeds for row in dict.fromkeys(options.rows or rows)]
    try:
        if not options.report:
            place_of(options.device)
            _make(chosen, options, console)
        found = {row: [read(run.result) for run in made if run.finished()] for row, made in runs.items()}
        require_same_images([result for results in found.values() for result in results])
        found = {row: results for row, results in found.items() if results}
        if not found:
            console.print(f"no run of {name} is finished in {options.results}", highlight=False)
            return 1
        return publish(console, options, found)
    except TrainingError as error:
        console.print(f"python -m benchmarks {name}: {error}", style="red", highlight=False)
        return 2
    except KeyboardInterrupt:
        console.print(f"Stopped; {_goes_on(options)}.", highlight=False)
        return 130


def _goes_on(options: argparse.Namespace) -> str:
    """How to go on after a stop."""
    return f"the same command {'without --restart ' * options.restart}goes on"


def _make(runs: Sequence[Run], options: argparse.Namespace, console: Console) -> None:
    """Make the runs, as far as the time goes."""
    if options.restart:
        for run in {run.family: run for run in runs}.values():
            begin(run)  # which says what is missing before anything is removed
    try:
        make_all(runs, execute, workers=options.workers, restart=options.restart)
    except OutOfTimeError:
        console.print(f"{options.minutes:g} minutes are over; {_goes_on(options)}.", highlight=False)
        options.report = True  # there is no time to measure anything, either


def save(
    console: Console,
    options: argparse.Namespace,
    name: str,
    tables: Sequence[report.Table],
    found: dict[str, list[dict[str, Any]]],
    picture: Callable[[dict[str, Any]], Any],
) -> None:
    """Print tables, and save them as Markdown with a picture, all numbers as JSON, and the epochs as CSV."""
    first = next(iter(found.values()))[0]
    record = {"versions": first["versions"], "machine": first["machine"], "runs": found}
    file = f"{name}-{options.data}"
    report.publish(console, options.results / "tables", file, tables, record, picture)
    epochs = [
        {"row": row, "seed": result["seed"], "epoch": i, **epoch}
        for row, results in found.items()
        for result in results
        for i, epoch in enumerate(result["epochs"], 1)
    ]
    if epochs:
        report.save_csv(options.results / "tables" / f"{file}.csv", epochs)
