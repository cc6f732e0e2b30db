"""The results of the GPU benchmark: what was measured, saved after each row, and continued by a later run."""

import json
import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from . import gpu_tests
from .gpu_ready import FRAMEWORKS
from .gpu_rows import Omission, Row
from .gpu_tests import Tests
from .report import Table, cpu

TARGET = 3.0
"""Required speed-up of the smallest layer with CUDA graphs."""
LEGEND = """\
fwd, bwd, step  milliseconds of forward pass, backward pass and both: medians
/ F             forward pass, divided by the time of as many bare F
MB              peak memory of a step, without the memory of the problem
tanh            F(h, x) = tanh(h Wᵀ + x), batch x width
conv            convolution, normalization, ReLU, convolution;
                batch x channels x size
float32 without TF32; 20 steps in each solve; Neumann(5, 0.5) unless another
gradient is named."""
CLOCKS = {
    "torch": "CUDA events",
    "jax": "the host's clock; fwd and step are compiled separately",
    "cupy": "CUDA events",
}
HEAD = ("case", "method", "fwd", "bwd", "step", "/ F", "MB")


@dataclass
class Record:
    """The results of all frameworks.

    Attributes
    ----------
    key
        The card, the versions, the settings and the code: results under another key are not continued.
    tests_code
        The code that the tests depend on: their outcomes under another one are not continued.
    rows
        The rows of each framework.
    crashed
        Rows of each framework in which its process ended. They are not tried again.
    finished
        The parts of which nothing is left to measure, each with what it left out.
    tests
        The outcomes of the tests.
    omissions, failures
        What this run left out, and what went wrong in it.
    """

    key: dict[str, Any]
    tests_code: str = ""
    rows: dict[str, list[Row]] = field(default_factory=dict)
    crashed: dict[str, list[str]] = field(default_factory=dict)
    finished: dict[str, list[Omission]] = field(default_factory=dict)
    tests: Tests = field(default_factory=Tests)
    omissions: list[Omission] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def done(self, framework: str) -> list[str]:
        """The rows of a framework that need not be measured."""
        return [f"{row.case}, {row.method}" for row in self.rows.get(framework, ())] + self.crashed.get(framework, [])

    def take(self, framework: str, event: dict[str, Any]) -> None:
        """Record an event of a framework's process."""
        match event:
            case {"row": row}:
                self.rows.setdefault(framework, []).append(Row(**row))
            case {"omission": what}:
                omission = Omission(**what)
                self.omissions.append(omission)
                if omission.why.startswith("failed"):
                    self.failures.append(f"{FRAMEWORKS[framework]}, {omission.what}: {omission.why}")

    def all_failures(self) -> list[str]:
        """The failures of this run, the tests that failed, and the rows that crashed."""
        crashed = [
            f"{FRAMEWORKS[name]}, {row}: the process ended" for name, rows in self.crashed.items() for row in rows
        ]
        return [*self.failures, *crashed, *self.tests.failures()]

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
        return {
            "key": self.key,
            "processor": cpu(),
            "rows": {name: [asdict(row) for row in rows] for name, rows in self.rows.items()},
            "crashed": self.crashed,
            "finished": {name: [asdict(omission) for omission in found] for name, found in self.finished.items()},
            "tests": {"code": self.tests_code, **gpu_tests.as_json(self.tests)},
            "speed-up by CUDA graphs": self.speedups(),
            "left out": [asdict(omission) for omission in self.omissions],
            "failures": self.all_failures(),
        }


def paths(folder: Path, card: str) -> tuple[Path, Path]:
    """The files of a card's results: numbers and tables."""
    name = re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")
    return folder / f"gpu-{name}.json", folder / f"gpu-{name}.md"


def load(folder: Path | None, key: dict[str, Any], tests_code: str, *, restart: bool) -> Record:
    """The record that a run continues: an earlier one with the same key, or a new one.

    A record under another key is kept beside the new one, as ``gpu-<card>.old.json``.
    """
    new = Record(key, tests_code)
    if folder is None or not (path := paths(folder, key["card"])[0]).exists():
        return new
    found = json.loads(path.read_text())
    if restart or found["key"] != key:
        path.replace(path.with_suffix(".old.json"))
        return new
    new.rows = {name: [Row(**row) for row in rows] for name, rows in found["rows"].items()}
    new.crashed = found["crashed"]
    new.finished = {name: [Omission(**each) for each in omissions] for name, omissions in found["finished"].items()}
    if found["tests"]["code"] == tests_code:
        new.tests = gpu_tests.from_json(found["tests"])
    return new


def save(record: Record, folder: Path | None) -> None:
    """Write the numbers. The old file is there until the new one is complete."""
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    path, _ = paths(folder, record.key["card"])
    new = path.with_suffix(".new")
    new.write_text(json.dumps(record.as_dict(), indent=1) + "\n")
    new.replace(path)


def save_tables(record: Record, folder: Path) -> None:
    """Write the tables."""
    _, path = paths(folder, record.key["card"])
    versions = ", ".join(f"{package} {version}" for package, version in record.key["versions"].items())
    pages = [f"# {record.key['card']}", versions, *(table.markdown() for table in tables(record))]
    path.write_text("\n\n".join([*pages, "\n".join(f"- {line.strip()}" for line in summary(record))]) + "\n")


def tables(record: Record) -> list[Table]:
    """One table for each framework."""
    found = []
    for framework, rows in record.rows.items():
        card = record.key["card"]
        clock = "the host's clock" if card == "cpu" else CLOCKS[framework]
        title = [f"{FRAMEWORKS[framework]} on {card}", f"Times by {clock}."]
        cells, before = [], None
        order = list(dict.fromkeys(row.case for row in rows))
        for row in sorted(rows, key=lambda row: order.index(row.case)):
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
    for name, each in record.tests.by_framework().items():
        skipped = sum(each.skipped.values())
        lines.append(f"Tests of {name}: {each.passed} passed, {each.failed} failed, {skipped} skipped.")
        lines += [f"  skipped {count}: {reason}" for reason, count in each.skipped.items()]
    if record.tests.left > 0:
        lines.append(f"{record.tests.left} tests did not fit into the time: the next run goes on with them.")
    for name, ratio in record.speedups().items():
        verdict = "at least" if ratio >= TARGET else "less than"
        lines.append(f"With CUDA graphs {name} of the 32 x 128 layer is {ratio:.1f} times as fast, {verdict} {TARGET}.")
    reasons = Counter(omission.why for omission in record.omissions if not omission.why.startswith("failed"))
    for why in reasons:
        names = [omission.what for omission in record.omissions if omission.why == why]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        lines.append(f"Left out: {'; '.join(names[:3])}{more}: {why}.")
    lines += [f"FAILED: {failure}" for failure in record.all_failures()]
    return lines
