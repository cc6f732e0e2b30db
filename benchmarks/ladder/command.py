"""``python -m benchmarks ladder``."""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from implicit_core.examples.program import TrainingError

from .. import report
from ..runs import make_all, say
from .runs import Run, execute
from .tasks import TASKS

HERE = Path(__file__).parent
SCRATCH = report.ROOT / "outputs" / "ladder"

EPILOG = """A run that has a result is left out, and a run that was stopped goes on from its last checkpoint. All runs
of a task take an hour or more; --report shows those that are finished."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = argparse.ArgumentParser(
        prog="python -m benchmarks ladder",
        description="Train recursive models with every gradient, from one step to all recursions.",
        epilog=EPILOG,
    )
    add = options.add_argument
    add("--task", choices=TASKS, default="sudoku", help="what is learned (default: sudoku)")
    add("--estimators", nargs="+", metavar="NAME", help="only these")
    add("--seeds", type=report.positive, help="seeds of each estimator (default: as many as the task has for it)")
    add("--workers", type=report.positive, default=1, help="runs at a time, each in a process (default: 1)")
    add("--restart", action="store_true", help="remove the results and checkpoints of these runs, and begin anew")
    add("--quick", action="store_true", help="tiny runs that show whether everything works: about a minute")
    add("--report", action="store_true", help="make the table, the picture and the summary of what is finished")
    add("--results", type=Path, help="folder of the results (default: benchmarks/ladder/results)")
    add("--scratch", type=Path, default=SCRATCH, help="folder of data and checkpoints (default: outputs/ladder)")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    command = parser()
    options = command.parse_args(arguments)
    task = TASKS[options.task]
    results = options.results or (options.scratch / "quick" if options.quick else HERE / "results")
    names = options.estimators or [*task.main, *task.rest]
    for name in names:
        if name not in task.main + task.rest:
            command.error(f"no estimator is named {name}; there are: {', '.join(task.main + task.rest)}")
    make = partial(Run, task.name, quick=options.quick, results=results, scratch=options.scratch)
    main_seeds, rest_seeds = (1, 1) if options.quick else (task.main_seeds, task.rest_seeds)
    seeds = dict.fromkeys(task.main, options.seeds or main_seeds)
    seeds |= dict.fromkeys(task.rest, options.seeds or rest_seeds)
    runs = [
        make(rung=name, seed=seed)
        for part in (task.main, task.rest)
        for seed in range(max(seeds.values()))
        for name in part
        if name in names and seed < seeds[name]
    ]
    console = Console(width=80)
    try:
        if not options.report:
            make_all(runs, partial(execute, say=say), workers=options.workers, restart=options.restart)
    except TrainingError as error:
        console.print(f"python -m benchmarks ladder: {error}", style="red", highlight=False)
        return 2
    except KeyboardInterrupt:
        console.print("Stopped; the same command goes on.", highlight=False)
        return 130
    from .tables import publish

    return publish(console, task, results, options.quick)
