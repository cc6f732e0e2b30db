"""Run the tests that need a GPU, most valuable first, as many as fit into a time; a later run goes on from there."""

import json
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

from .gpu_process import Process
from .report import ROOT

FIRST = (
    *("test_torch_graphs_gpu", "test_cupy_gpu", "test_jax_gpu", "test_adapters_torch", "test_torch_graphs"),
    *("test_mdeq_training", "test_estimators", "test_solvers", "test_linear_solvers", "test_theorems"),
)
"""The files with the tests of most value, in order. All others have tests of the core with CuPy's arrays."""
OWN = tuple(f"tests/{name}.py" for name in FIRST[:6])
"""Files with tests that are only for GPUs: collected before all others, which takes long."""
MARKED = re.compile(r"library: Library|gpus\.|mark\.gpu")
"""What files with tests for GPUs contain: the mark, or the fixture whose libraries include CuPy."""
DRY = ("tests/test_jax_gpu.py", "tests/test_torch_graphs_gpu.py")
WORDS = {"cupy": "CuPy", "jax": "JAX"}


@dataclass
class Outcome:
    """Outcomes of the tests of one framework.

    Attributes
    ----------
    passed, failed
        Number of tests.
    skipped
        Number of tests for each reason.
    """

    passed: int = 0
    failed: int = 0
    skipped: Counter[str] = field(default_factory=Counter)


@dataclass
class Tests:
    """The tests that were run.

    Attributes
    ----------
    outcomes
        For each test: passed, failed, skipped, crashed or not collected, and the reason.
    left
        How many did not fit into the time, as far as they were collected.
    wrong
        What went wrong with the run as a whole.
    """

    outcomes: dict[str, tuple[str, str]] = field(default_factory=dict)
    left: int = 0
    wrong: list[str] = field(default_factory=list)

    def named(self, *outcomes: str) -> list[str]:
        """The tests with one of these outcomes."""
        return [name for name, (outcome, _) in self.outcomes.items() if outcome in outcomes]

    def by_framework(self) -> dict[str, Outcome]:
        """The outcomes, counted for each framework."""
        found: dict[str, Outcome] = {}
        for name, (outcome, why) in self.outcomes.items():
            if outcome == "not collected":
                continue
            framework = next((title for word, title in WORDS.items() if word in name.lower()), "PyTorch")
            counts = found.setdefault(framework, Outcome())
            if outcome == "passed":
                counts.passed += 1
            elif outcome == "skipped":
                counts.skipped[why] += 1
            else:
                counts.failed += 1
        return found

    def failures(self) -> list[str]:
        """The tests that failed, and what else went wrong."""
        failed = [f"{name}: {self.outcomes[name][1]}" for name in self.named("failed", "crashed", "not collected")]
        return [*failed, *self.wrong]


def run(tests: Tests, seconds: float, tell: Callable[[str], None], save: Callable[[], None], *, dry: bool) -> None:
    """Run the tests that have not passed, until the time is up.

    Parameters
    ----------
    tests
        The outcomes so far, which this extends.
    seconds
        Time limit.
    tell, save
        Called with the name of a test that begins, and after each outcome.
    dry
        Only a few files, to try everything on a machine without a GPU.
    """
    until, tests.left, tests.wrong = monotonic() + seconds, 0, []
    tests.outcomes = {name: found for name, found in tests.outcomes.items() if found[0] != "not collected"}
    out, last = {*tests.named("passed", "crashed")}, tests.named("failed")
    for files in (DRY,) if dry else (OWN, others()):
        while (left := until - monotonic()) > 0:
            settings = {"out": [*out], "last": last, "first": FIRST, "seconds": left}
            process = _once(tests, files, settings, tell, save)
            out |= process.ran  # whatever came of them: once in each run
            if process.wrong:
                tests.wrong.append(process.wrong)
                return
            if process.done:
                break
        if tests.left:
            return


@dataclass
class _Once:
    """How one process of pytest ended: the tests it ran, whether nothing is left to run, and what went wrong."""

    ran: set[str]
    done: bool
    wrong: str | None = None


def _once(
    tests: Tests,
    files: Sequence[str],
    settings: dict[str, Any],
    tell: Callable[[str], None],
    save: Callable[[], None],
) -> _Once:
    begun: str | None = None
    stopped: str | None = None
    ran: set[str] = set()
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(settings, file)
        file.flush()
        process = Process(_command(files), settings["seconds"], {"GPU_TESTS": file.name})
        tell("collecting tests")
        tests.left = 0
        for event in process.events():
            match event:
                case {"collected": count}:
                    tests.left = count
                case {"begin": name}:
                    begun = name
                    ran.add(name)
                    tell(name)
                case {"test": name, "outcome": outcome, "why": why}:
                    tests.outcomes[name] = outcome, why
                    if name == begun:
                        begun, tests.left = None, tests.left - 1
                    save()
                case {"stopped": why}:
                    stopped = why
    ended = process.ended()
    if begun is not None:
        how = "it did not end in time" if ended.late else f"the process ended with {ended.code}"
        tests.outcomes[begun], tests.left = ("crashed", how), tests.left - 1
        save()
        return _Once(ran, done=ended.late)
    if ended.code in (0, 1, 5):  # passed, failed, or no tests
        return _Once(ran, done=stopped in (None, "the time was up"))
    return _Once(ran, done=True, wrong=f"pytest ended with {ended.code}: {ended.text[-300:]}")


def _command(files: Sequence[str]) -> list[str]:
    options = ("-q", "-n", "0", "-m", "gpu", "-p", "benchmarks.gpu_plugin", "-p", "no:cacheprovider")
    return [sys.executable, "-m", "pytest", *options, "--continue-on-collection-errors", *files]


def others() -> list[str]:
    """The files with tests for GPUs besides :data:`OWN`. No other file is imported: it may need more packages."""
    files = sorted(Path(ROOT, "tests").glob("test_*.py"))
    names = {path.relative_to(ROOT).as_posix(): path for path in files}
    return [name for name, path in names.items() if name not in OWN and MARKED.search(path.read_text())]


def as_json(tests: Tests) -> dict[str, Any]:
    """The outcomes for JSON."""
    return {"outcomes": {name: list(found) for name, found in tests.outcomes.items()}, "left": tests.left}


def from_json(found: dict[str, Any]) -> Tests:
    """The inverse of :func:`as_json`."""
    return Tests({name: (outcome, why) for name, (outcome, why) in found["outcomes"].items()}, found["left"])
