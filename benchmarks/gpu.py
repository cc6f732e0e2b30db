"""Everything that needs a GPU, by value: tests, times, CUDA graphs, a step.

The tests marked gpu come first, then times and memory in PyTorch, JAX and CuPy,
then CUDA graphs, and a training step captured as one graph.

Results are saved after each row and each test, in gpu-<card>.json, and as tables
in gpu-<card>.md. A run that is stopped, or that runs out of time, is continued by
the next one with the same card, versions, settings and code. See README.md.
"""

import argparse
import importlib
import json
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from time import monotonic
from typing import Any

from . import gpu_ready
from .gpu_ready import FRAMEWORKS, Ready

RESULTS = Path(__file__).parent / "results"
RESERVE = 20.0
"""Seconds reserved for starting processes and writing results."""
STAGES = (("torch", "table"), ("jax", "table"), ("cupy", "table"), ("torch", "graphs"), ("torch", "step"))
"""What is measured, in order."""
EPILOG = """\
Exit code: 0, 1 if a row or a test failed, 2 if nothing can be run.
Where a command may run for ten minutes, keep the default budget and run the same
command again: it goes on where the first run stopped."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = argparse.ArgumentParser(
        prog="python -m benchmarks gpu",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = options.add_argument
    add("--quick", action="store_true", help="small problems and few repetitions")
    add("--repetitions", type=positive, default=20, help="timed runs of each row (default: 20)")
    add(
        "--budget",
        type=positive,
        default=480,
        help="seconds after which no further row is started (default: 480); what has begun may take a minute more",
    )
    add("--test-budget", type=positive, default=180, help="seconds of these for the tests (default: 180)")
    add("--tests", action=argparse.BooleanOptionalAction, default=True, help="run the tests marked gpu first")
    add("--restart", action="store_true", help="begin anew instead of going on with the results in the folder")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run, without a GPU (default: cuda)")
    add(
        "--output",
        type=Path,
        default=None,
        metavar="DIR",
        help=f"folder of the results (default: {RESULTS.name}/ next to this script; none for a dry run)",
    )
    add("--only", choices=FRAMEWORKS, help=argparse.SUPPRESS)  # used for the process of one framework
    add("--part", default="table", help=argparse.SUPPRESS)
    add("--done", default="[]", help=argparse.SUPPRESS)
    add("--seconds", type=float, help=argparse.SUPPRESS)
    return options


def positive(text: str) -> int:
    """A positive integer, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


def part(options: argparse.Namespace) -> int:
    """Measure a part of one framework in this process; prints a line of JSON for each event."""
    from . import gpu_rows
    from .gpu_rows import Omission, Row, Settings

    module = importlib.import_module(f".gpu_{options.only}", __package__)

    def emit(kind: str, what: Any) -> None:
        print(json.dumps({kind: what}), flush=True)

    if reason := module.missing(options.device):
        emit("omission", asdict(Omission(FRAMEWORKS[options.only], reason)))
        return 0
    sizes, block = gpu_rows.SIZES, gpu_rows.BLOCK
    if options.quick:
        sizes, block = ((4, 8),) if options.device == "cpu" else sizes[:2], (2, 4, 6)
    settings = Settings(
        options.device,
        repetitions(options),
        sizes,
        block,
        monotonic() + options.seconds,
        options.part,
        frozenset(json.loads(options.done)),
    )
    for found in module.run(settings, lambda name: emit("begin", name)):
        emit("row" if isinstance(found, Row) else "omission", asdict(found))
    return 0


def repetitions(options: argparse.Namespace) -> int:
    """Timed runs of each row."""
    given: int = options.repetitions
    return min(given, 2) if options.quick else given


def key(options: argparse.Namespace, ready: Ready) -> dict[str, Any]:
    """What results depend on."""
    return {
        "card": ready.card,
        "versions": gpu_ready.versions()
        | {"python": ".".join(map(str, sys.version_info[:3])), "driver": str(ready.driver)},
        "settings": {"device": options.device, "quick": options.quick, "repetitions": repetitions(options)},
        "code": gpu_ready.code((*gpu_ready.PACKAGE, "benchmarks")),
    }


def collect(options: argparse.Namespace, ready: Ready, record: Any, folder: Path | None, console: Any) -> None:
    """Run the tests, then each part in its own process; results go to ``record`` and to the folder."""
    from . import gpu_tests
    from .gpu_record import save
    from .gpu_rows import Omission

    begin = monotonic()

    def left() -> float:
        return float(options.budget) - RESERVE - (monotonic() - begin)

    def keep() -> None:
        save(record, folder)

    record.omissions += [Omission(FRAMEWORKS[name], reason) for name, reason in ready.missing.items()]
    with telling(console) as tell:
        if options.tests and ready.tests:
            record.omissions.append(Omission("tests marked gpu", ready.tests))
        elif options.tests:
            seconds = max(1.0, min(float(options.test_budget), left()))
            gpu_tests.run(record.tests, seconds, tell, keep, dry=options.device == "cpu")
            counts = record.tests.by_framework()
            for name in FRAMEWORKS.values():
                if name not in counts or not counts[name].passed + counts[name].failed:
                    record.omissions.append(Omission(f"tests of {name}", "no test was run"))
        stages = [stage for stage in STAGES if stage[0] not in ready.missing]
        for i, stage in enumerate(stages):
            measure(options, record, stage, max(0.0, left() / (len(stages) - i)), tell, keep)
        keep()


def measure(
    options: argparse.Namespace,
    record: Any,
    stage: tuple[str, str],
    seconds: float,
    tell: Callable[[str], None],
    keep: Callable[[], None],
) -> None:
    """Measure a part of a framework in a new process, so that a crash does not affect the others."""
    from . import report
    from .gpu_process import Process
    from .gpu_rows import Omission

    framework, part_ = stage
    title = f"{FRAMEWORKS[framework]}, {part_}"
    until = monotonic() + seconds
    if title in record.finished:
        record.omissions += record.finished[title]
        return
    if seconds <= 0.0:
        record.omissions.append(Omission(title, "the time was up"))
        return
    before = len(record.omissions)
    while (rest := until - monotonic()) > 0.0:
        command = [*report.COMMAND, "gpu", "--only", framework, "--part", part_, "--seconds", f"{rest}"]
        command += ["--device", options.device, "--repetitions", f"{options.repetitions}", *["--quick"] * options.quick]
        command += ["--done", json.dumps(record.done(framework))]
        begun: str | None = None
        tell(f"{title}: starting")
        process = Process(command, rest)
        for event in process.events():
            if "begin" in event:
                begun = event["begin"]
                tell(f"{FRAMEWORKS[framework]}: {begun}")
                continue
            begun = None
            record.take(framework, event)
            keep()
        ended = process.ended()
        if ended.code == 0:
            found = record.omissions[before:]
            if not any(each.why.startswith(("the time was up", "failed")) for each in found):
                record.finished[title] = found
            return
        last = "it did not end in time" if ended.late else (ended.text.splitlines()[-1:] or ["no error message"])[0]
        record.failures.append(f"{title}{f', {begun}' if begun else ''}: exited with {ended.code}: {last}")
        if begun is None:
            return
        record.crashed.setdefault(framework, []).append(begun)  # the others are measured in another process
        keep()


@contextmanager
def telling(console: Any) -> Iterator[Callable[[str], None]]:
    """Yield a function that shows what is running: in a bar, or in a line every few seconds where none can be drawn."""
    from .report import progress

    begin, last = monotonic(), float("-inf")

    def line(name: str) -> None:
        nonlocal last
        if monotonic() - last > 5.0:
            last = monotonic()
            console.print(f"{last - begin:5.0f} s  {name}"[:80], highlight=False, markup=False)

    if console.is_terminal:
        with progress(console, None) as announce:
            yield announce
    else:
        yield line


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code: 1 if something failed, 2 if nothing can be run.

    Parameters
    ----------
    arguments
        The command line's if None.
    """
    options = parser().parse_args(arguments)
    if options.only:
        return part(options)
    ready = gpu_ready.ready(options.device)
    if ready.fatal:
        told = [*ready.missing.values(), *([f"Tests: {ready.tests}"] if ready.tests else [])]
        for line in (f"Nothing can be run: {ready.fatal}.", *told, "For a dry run on the CPU: --device cpu"):
            print(textwrap.fill(line, 80, break_long_words=False, break_on_hyphens=False), file=sys.stderr)
        return 2
    # Here, since everything but the check above needs packages.
    from rich.console import Console

    from . import gpu_record

    console = Console(width=80)
    folder = options.output or (RESULTS if options.device == "cuda" else None)
    console.print(f"{ready.card}; budget {options.budget} s", highlight=False)
    for reason in ready.missing.values():
        console.print(f"Left out: {reason}.", highlight=False, markup=False)
    tests = gpu_ready.code((*gpu_ready.PACKAGE, "tests"))
    record = gpu_record.load(folder, key(options, ready), tests, restart=options.restart)
    before = sum(map(len, record.rows.values())), len(record.tests.named("passed"))
    if any(before):
        console.print(f"Going on after {before[0]} rows and {before[1]} passed tests.", highlight=False)
    collect(options, ready, record, folder, console)
    for table in gpu_record.tables(record):
        table.show(console)
        console.print()
    for line in gpu_record.summary(record):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if folder is None:
        console.print("Dry run: nothing was written. Use --output DIR to write the results.", highlight=False)
    else:
        gpu_record.save_tables(record, folder)
        for path in gpu_record.paths(folder, record.key["card"]):
            console.print(f"Written: {path}", soft_wrap=True, highlight=False)
    return 1 if record.all_failures() else 0
