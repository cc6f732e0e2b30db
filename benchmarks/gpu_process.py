"""A process that reports events as lines of JSON, and that is killed if it takes too long."""

import json
import os
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from .report import ROOT

GRACE = 60.0
"""Seconds after its time is up when a process is killed: a row, or a test, that has begun may end."""


class Ended(NamedTuple):
    """How a process ended: its exit code, the end of what it wrote, and whether it was killed."""

    code: int
    text: str
    late: bool


class Process:
    """A process that prints events.

    Parameters
    ----------
    command
        The command line.
    seconds
        The time it was given; it is killed :data:`GRACE` seconds later.
    environment
        Further variables.
    """

    def __init__(self, command: Sequence[str], seconds: float, environment: dict[str, str] | None = None) -> None:
        self._command, self._seconds = list(command), seconds
        self._environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", **(environment or {})}
        self._ended: Ended | None = None

    def events(self) -> Iterator[dict[str, Any]]:
        """Start the process, and yield its events until it ends."""
        late, texts = threading.Event(), list[str]()
        with (
            tempfile.TemporaryFile("w+") as errors,
            subprocess.Popen(
                self._command, stdout=subprocess.PIPE, stderr=errors, text=True, env=self._environment, cwd=ROOT
            ) as process,
        ):

            def kill() -> None:
                late.set()
                process.kill()

            watch = threading.Timer(self._seconds + GRACE, kill)
            watch.daemon = True
            watch.start()
            try:
                for line in process.stdout or ():
                    if line.startswith("{"):
                        yield json.loads(line)
                    else:
                        texts.append(line)
                process.wait()
            finally:
                watch.cancel()
                process.kill()
            errors.seek(0)
            text = "".join([*texts[-40:], errors.read()]).strip()
        self._ended = Ended(process.returncode, text, late.is_set())

    def ended(self) -> Ended:
        """How it ended, after its last event."""
        assert self._ended is not None
        return self._ended
