"""A plugin of pytest that reports each test as a line of JSON, leaves out those that need not run, and stops in time.

Its settings are in the file that ``GPU_TESTS`` names: ``out`` and ``last``, lists of tests to leave out and to run
last; ``first``, the parts of names of tests in the order in which they are run; and ``seconds``.
"""

import json
import os
import sys
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

BEGIN = monotonic()
OUT = os.fdopen(os.dup(1), "w")  # before pytest takes the standard output
SETTINGS: dict[str, Any] = json.loads(Path(os.environ["GPU_TESTS"]).read_text())

FOUND: dict[str, str] = {}
"""The outcomes of the phases of the test that is running, with reasons."""


def emit(**event: Any) -> None:
    """Report an event."""
    print(f"\n{json.dumps(event)}", file=OUT, flush=True)  # on a line of its own: pytest writes letters


def value(name: str) -> tuple[bool, int]:
    """The place of a test in the order of their values."""
    first = SETTINGS["first"]
    place = next((i for i, part in enumerate(first) if part in name), len(first))
    return name in SETTINGS["last"], place


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what need not run, and sort by value."""
    left = [item for item in items if item.nodeid not in SETTINGS["out"]]
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in SETTINGS["out"]])
    items[:] = sorted(left, key=lambda item: value(item.nodeid))
    # This hook may be called before the tests without the mark are taken out.
    emit(collected=sum(item.get_closest_marker("gpu") is not None for item in items))


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """A module that cannot be imported, or that skips itself."""
    if report.failed:
        emit(test=report.nodeid, outcome="not collected", why=last_line(report.longreprtext))
    elif report.skipped:
        emit(test=report.nodeid, outcome="skipped", why=reason(report.longrepr))


def pytest_runtest_logstart(nodeid: str) -> None:
    """A test begins."""
    FOUND.clear()
    emit(begin=nodeid)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A phase of a test has ended."""
    if report.failed:
        FOUND.setdefault("failed", last_line(report.longreprtext))
    elif report.skipped and not hasattr(report, "wasxfail"):
        FOUND.setdefault("skipped", reason(report.longrepr))


def pytest_runtest_logfinish(nodeid: str) -> None:
    """Report the test. Stop if the time is up, or if an error left the device unusable for this process."""
    outcome = next((outcome for outcome in ("failed", "skipped") if outcome in FOUND), "passed")
    emit(test=nodeid, outcome=outcome, why=FOUND.get(outcome, ""))
    if monotonic() - BEGIN > SETTINGS["seconds"]:
        emit(stopped="the time was up")
        pytest.exit("the time was up", returncode=0)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            emit(stopped=f"the device was lost: {error}".splitlines()[0])
            pytest.exit("the device was lost", returncode=0)


def last_line(text: str) -> str:
    """The error, which pytest marks with an E."""
    errors = [line[2:].strip() for line in text.splitlines() if line.startswith("E ")]
    found = errors or text.strip().splitlines()[-1:] or ["no message"]
    return found[0][:200]


def reason(longrepr: Any) -> str:
    """The reason of a skip, in a tuple of file, line and text."""
    return str(longrepr[2] if isinstance(longrepr, tuple) else longrepr).removeprefix("Skipped: ")
