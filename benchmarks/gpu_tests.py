"""Run the tests that need a GPU and count their outcomes; a skipped test does not count as passed."""

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .report import ROOT

FRAMEWORKS = {"cupy": "CuPy", "jax": "JAX"}


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


def run(seconds: float, arguments: Sequence[str] = ()) -> tuple[dict[str, Outcome], str | None]:
    """The outcomes by framework, and the error of the run as a whole or None.

    Parameters
    ----------
    seconds
        Time limit.
    arguments
        Further arguments of pytest.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", f"--junitxml={report}", *arguments]
        environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, timeout=seconds, capture_output=True, text=True, check=False
            )
        except subprocess.TimeoutExpired:
            return {}, f"the tests did not end within {seconds:.0f} s"
        if not report.exists():
            return {}, f"pytest ended with {done.returncode}: {(done.stdout + done.stderr)[-500:]}"
        found = read(report)
    return found, None if done.returncode in (0, 1) else f"pytest ended with {done.returncode}: {done.stdout[-500:]}"


def read(report: Path) -> dict[str, Outcome]:
    """The outcomes by framework, from a JUnit report."""
    found: dict[str, Outcome] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname')}.{case.get('name')}".lower()
        framework = next((title for word, title in FRAMEWORKS.items() if word in name), "PyTorch")
        outcome = found.setdefault(framework, Outcome())
        skip = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            outcome.failed += 1
        elif skip is not None:
            outcome.skipped[_reason(skip)] += 1
        else:
            outcome.passed += 1
    return found


def _reason(skip: ElementTree.Element) -> str:
    """The reason of a skip. For a skipped module it is in the text, at the end of the repr of a tuple."""
    _, _, of_module = (skip.text or "").partition("Skipped: ")
    return of_module.rstrip("')\n") or (skip.get("message") or "no reason given").strip()
