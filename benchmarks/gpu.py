"""Everything that needs a GPU, in one call: the tests marked gpu, then times and memory in PyTorch, JAX and CuPy.

Writes gpu-<card>.json and gpu-<card>.md, and lists what was left out and why. README.md explains the tables.
"""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from time import monotonic
from typing import Any

from rich.console import Console

from . import gpu_rows, gpu_tests, report
from .gpu_rows import Omission, Row, Settings
from .gpu_tests import Outcome
from .report import Table, environment, positive, progress

FRAMEWORKS = {"torch": "PyTorch", "jax": "JAX", "cupy": "CuPy"}
RESULTS = Path(__file__).parent / "results"
TARGET = 3.0
"""Required speed-up of the smallest layer with CUDA graphs."""
RESERVE = 20.0
"""Seconds reserved for starting processes and writing results."""
GRACE = 60.0
"""Seconds after the deadline of a part when its process is killed."""
LEGEND = """\
fwd, bwd, step  milliseconds of forward pass, backward pass and both: medians
/ F             forward pass, divided by the time of as many bare evaluations of F
MB              peak memory of a step, without the memory of the problem
tanh            F(h, x) = tanh(h Wᵀ + x), batch x width
conv            convolution, normalization, ReLU, convolution;
                batch x channels x size
20 steps in each solve; Neumann(5, 0.5) unless another gradient is named."""
CLOCKS = {
    "torch": "CUDA events",
    "jax": "the host's clock; fwd and step are compiled separately",
    "cupy": "CUDA events",
}
HEAD = ("case", "method", "fwd", "bwd", "step", "/ F", "MB")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = argparse.ArgumentParser(
        prog="python -m benchmarks gpu",
        description=__doc__.splitlines()[0] if __doc__ else None,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = options.add_argument
    add("--quick", action="store_true", help="small problems and few repetitions")
    add("--repetitions", type=positive, default=20, help="timed runs of each row")
    add("--budget", type=positive, default=480, help="seconds after which no further row is started")
    add("--tests", action=argparse.BooleanOptionalAction, default=True, help="run the tests marked gpu first")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run, without a GPU")
    add(
        "--output",
        type=Path,
        default=None,
        metavar="DIR",
        help=f"results folder, or {RESULTS.name}/ next to this script",
    )
    add("--only", choices=FRAMEWORKS, help=argparse.SUPPRESS)  # used for the process of one framework
    add("--seconds", type=float, help=argparse.SUPPRESS)
    return options


def settings(options: argparse.Namespace, seconds: float) -> Settings:
    """The settings of all parts."""
    sizes, block = gpu_rows.SIZES, gpu_rows.BLOCK
    if options.quick:
        sizes, block = ((4, 8),) if options.device == "cpu" else sizes[:2], (2, 4, 6)
    repetitions = min(options.repetitions, 2) if options.quick else options.repetitions
    return Settings(options.device, repetitions, sizes, block, monotonic() + seconds)


def part(options: argparse.Namespace) -> int:
    """Measure one framework in this process; prints a line of JSON for each event."""
    module = importlib.import_module(f".gpu_{options.only}", __package__)

    def emit(kind: str, what: Any) -> None:
        print(json.dumps({kind: what}), flush=True)

    if reason := module.missing(options.device):
        emit("omission", asdict(Omission(FRAMEWORKS[options.only], reason)))
        return 0
    emit("versions", module.versions())
    emit("card", "cpu" if options.device == "cpu" else module.card())
    for found in module.run(settings(options, options.seconds), lambda name: emit("begin", name)):
        emit("row" if isinstance(found, Row) else "omission", asdict(found))
    return 0


class Record:
    """The results of all frameworks."""

    def __init__(self) -> None:
        self.cards: list[str] = []
        self.versions: dict[str, str] = {}
        self.rows: dict[str, list[Row]] = {}
        self.omissions: list[Omission] = []
        self.tests: dict[str, Outcome] = {}
        self.failures: list[str] = []

    def take(self, framework: str, line: dict[str, Any]) -> str | None:
        """Record one event of a part; returns the name of the row if the event is its start."""
        ((kind, what),) = line.items()
        if kind == "row":
            self.rows.setdefault(framework, []).append(Row(**what))
        elif kind == "omission":
            omission = Omission(**what)
            self.omissions.append(omission)
            if omission.why.startswith("failed"):
                self.failures.append(f"{FRAMEWORKS[framework]}, {omission.what}: {omission.why}")
        elif kind == "versions":
            self.versions |= what
        elif kind == "card":
            self.cards.append(what)
        return what if kind == "begin" else None

    def add_tests(self, found: dict[str, Outcome], wrong: str | None) -> None:
        """Record the outcomes of the tests."""
        self.tests = found
        self.failures += [wrong] if wrong else []
        self.failures += [f"{name}: {each.failed} tests failed" for name, each in found.items() if each.failed]
        for name in FRAMEWORKS.values():
            if wrong is None and not (name in found and found[name].passed + found[name].failed):
                self.omissions.append(Omission(f"tests of {name}", "no test was run"))

    def speedups(self) -> dict[str, float]:
        """Speed-up of the smallest layer with CUDA graphs: of its solve and of its training step."""
        rows = {row.method: row for row in self.rows.get("torch", ()) if row.case == "tanh 32 x 128"}
        pairs = {
            "a solve": ("Anderson, Neumann(5)", "Anderson, graphs", "forward"),
            "a solve with check_every=5": (
                "Anderson, check_every=5",
                "Anderson, graphs, check_every=5",
                "forward",
            ),
            "a captured training step": ("Anderson, Neumann(5)", "Anderson, step captured", "step"),
        }
        return {
            name: median(getattr(rows[plain], times)) / median(getattr(rows[graphs], times))
            for name, (plain, graphs, times) in pairs.items()
            if plain in rows and graphs in rows
        }

    def as_dict(self) -> dict[str, Any]:
        """The record for JSON."""
        found = environment("implicit-core", "torchdeq")
        return {
            "card": self.cards[0] if self.cards else None,
            "versions": found["versions"] | self.versions,
            "machine": found["machine"],
            "tests": {name: asdict(each) for name, each in self.tests.items()},
            "rows": {name: [asdict(row) for row in rows] for name, rows in self.rows.items()},
            "speed-up by CUDA graphs": self.speedups(),
            "left out": [asdict(omission) for omission in self.omissions],
            "failures": self.failures,
        }


def collect(options: argparse.Namespace, console: Console) -> Record:
    """Run the tests, then each framework in its own process."""
    record, begin = Record(), monotonic()

    def left() -> float:
        return float(options.budget) - RESERVE - (monotonic() - begin)

    if options.tests and options.device == "cuda":
        with progress(console, None) as announce:
            announce("tests marked gpu")
            record.add_tests(*gpu_tests.run(max(10.0, 0.5 * left())))
    for i, framework in enumerate(FRAMEWORKS):
        share = max(1.0, left() / (len(FRAMEWORKS) - i))
        measure(options, record, framework, share, console)
    return record


def measure(options: argparse.Namespace, record: Record, framework: str, seconds: float, console: Console) -> None:
    """Measure one framework in a new process, so that a crash does not affect the others."""
    command = [*report.COMMAND, "gpu", "--only", framework, "--seconds", f"{seconds}", "--device", options.device]
    command += ["--repetitions", f"{options.repetitions}", *["--quick"] * options.quick]
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    with (
        progress(console, None) as announce,
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, cwd=report.ROOT
        ) as process,
    ):
        watch = threading.Timer(seconds + GRACE, process.kill)
        watch.start()
        for line in process.stdout or ():
            if line.startswith("{") and (name := record.take(framework, json.loads(line))):
                announce(f"{FRAMEWORKS[framework]}: {name}")
        process.wait()
        watch.cancel()
        errors.seek(0)
        errors_text = errors.read()
    if f"No module named '{framework}'" in errors_text:
        record.omissions.append(Omission(FRAMEWORKS[framework], "it is not installed"))
    elif process.returncode:
        last = errors_text.strip().splitlines()[-1:] or ["no error message"]
        record.failures.append(f"{FRAMEWORKS[framework]} exited with {process.returncode}: {last[0]}")


def tables(record: Record) -> list[Table]:
    """One table for each framework."""
    found = []
    for framework, rows in record.rows.items():
        card = record.cards[0] if record.cards else "?"
        clock = "the host's clock" if card == "cpu" else CLOCKS[framework]
        title = [f"{FRAMEWORKS[framework]} on {card}", f"Times by {clock}."]
        cells, before = [], None
        for row in rows:
            cells.append((row.case if row.case != before else "", *texts(row)))
            before = row.case
        found.append(Table(HEAD, cells, title, LEGEND))
    return found


def texts(row: Row) -> tuple[str, ...]:
    """The cells of a row, without its case."""
    forward, backward, step = (median(times) if times else None for times in (row.forward, row.backward, row.step))
    memory = None if row.memory is None else row.memory / 1e6
    return row.method, *("-" if a is None else f"{a:.3g}" for a in (forward, backward, step, row.ratio(), memory))


def summary(record: Record) -> list[str]:
    """The lines below the tables: tests, speed-ups, omissions and failures."""
    lines = []
    for name, each in record.tests.items():
        skipped = sum(each.skipped.values())
        lines.append(f"Tests of {name}: {each.passed} passed, {each.failed} failed, {skipped} skipped.")
        lines += [f"  skipped {count}: {reason}" for reason, count in each.skipped.items()]
    for name, ratio in record.speedups().items():
        verdict = "at least" if ratio >= TARGET else "less than"
        lines.append(f"With CUDA graphs {name} of the 32 x 128 layer is {ratio:.1f} times as fast, {verdict} {TARGET}.")
    reasons = Counter(omission.why for omission in record.omissions if not omission.why.startswith("failed"))
    for why in reasons:
        names = [omission.what for omission in record.omissions if omission.why == why]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        lines.append(f"Left out: {'; '.join(names[:3])}{more}: {why}.")
    lines += [f"FAILED: {failure}" for failure in record.failures]
    return lines


def save(record: Record, folder: Path) -> list[Path]:
    """Write the record and the tables."""
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", (record.cards[0] if record.cards else "none").lower()).strip("-")
    paths = [folder / f"gpu-{name}.{suffix}" for suffix in ("json", "md")]
    facts = record.as_dict()
    paths[0].write_text(json.dumps(facts, indent=1) + "\n")
    versions = ", ".join(f"{package} {version}" for package, version in facts["versions"].items())
    pages = [f"# {facts['card']}", versions, *(table.markdown() for table in tables(record))]
    paths[1].write_text("\n\n".join([*pages, "\n".join(f"- {line.strip()}" for line in summary(record))]) + "\n")
    return paths


def without_gpu() -> str | None:
    """Why no framework can use a GPU; None if one can."""
    reasons = []
    for framework in FRAMEWORKS:
        try:
            reason = importlib.import_module(f".gpu_{framework}", __package__).missing("cuda")
        except ImportError as error:
            reason = f"{FRAMEWORKS[framework]} is not installed ({error})"
        if reason is None:
            return None
        reasons.append(reason)
    return "; ".join(reasons)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code: 1 if something failed, 2 if there is no GPU.

    Parameters
    ----------
    arguments
        The command line's if None.
    """
    options = parser().parse_args(arguments)
    if options.only:
        return part(options)
    if options.device == "cuda" and (reasons := without_gpu()):
        print(f"No GPU was found: {reasons}. For a dry run on the CPU: --device cpu --output DIR", file=sys.stderr)
        return 2
    console = Console(width=80)
    record = collect(options, console)
    for table in tables(record):
        table.show(console)
        console.print()
    for line in summary(record):
        console.print(line, highlight=False, soft_wrap=True)
    folder = options.output or (RESULTS if options.device == "cuda" else None)
    if folder is None:
        console.print("Dry run: nothing was written. Use --output DIR to write the results.", highlight=False)
    else:
        for path in save(record, folder):
            console.print(f"Written: {path}", soft_wrap=True, highlight=False)
    return 1 if record.failures else 0
