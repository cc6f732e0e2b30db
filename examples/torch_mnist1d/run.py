"""A run from beginning to end, which Ctrl-C stops between two steps."""

import signal
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from rich.console import Console
from threadpoolctl import threadpool_limits

from implicit_core import SolveError

from . import checkpoint, data, report
from .settings import Settings
from .training import Totals, Training, TrainingError, evaluate

ERRORS = (TrainingError, SolveError)
"""Errors that stop a run, each with a message for the user."""


class Stop:
    """Ctrl-C asks for a stop after the current step, so that none is done by half; a second one is obeyed at once."""

    asked = False

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)


def run(
    settings: Settings,
    *,
    checkpoint_path: Path | None = None,
    resume: bool = False,
    tensorboard: Path | None = None,
    console: Console | None = None,
) -> tuple[Training, Totals]:
    """Train, and test the best parameters; call it in the main thread.

    Parameters
    ----------
    settings
        All settings that determine the result.
    checkpoint_path
        Where to save the state, before the first epoch, after each, and when interrupted.
    resume
        Go on from that checkpoint.
    tensorboard
        A folder for TensorBoard's files.
    console
        Where to print; standard output if None.

    Returns
    -------
    Training, Totals
        The finished run, and the totals over the test set.

    Raises
    ------
    KeyboardInterrupt
        At Ctrl-C, once the current step is done and in the checkpoint.
    TrainingError
        If the run can't go on.
    """
    if checkpoint_path is not None and checkpoint_path.exists() and not resume:
        raise TrainingError(f"{checkpoint_path} exists: add --resume to go on from it, or name another file.")
    console = Console() if console is None else console
    # Threads slow down convolutions this small, and fixing their number fixes the order of every sum.
    with threadpool_limits(1):
        train, test = data.load()
        training = Training(settings, train)
        if checkpoint_path is not None and resume:
            checkpoint.restore(training, checkpoint_path)
        with Stop() as stop, report.log(tensorboard, len(training.epochs)) as log:
            if checkpoint_path is not None:
                checkpoint.save(training, checkpoint_path)
            fit(training, checkpoint_path, log, stop, console)
        tested = evaluate(training.best_model(), test)
    console.print(report.table(training, tested))
    for remark in report.remarks(training, tested):
        console.print(remark, highlight=False)
    return training, tested


def fit(training: Training, path: Path | None, log: report.Log | None, stop: Stop, console: Console) -> None:
    """Train to the last epoch."""
    total = training.settings.epochs * training.steps
    with report.progress(console) as bars:
        done = len(training.epochs) * training.steps + training.position
        task = bars.add_task("", total=total, completed=done, epoch=len(training.epochs), status="")
        while len(training.epochs) < training.settings.epochs:
            while training.position < training.steps:
                training.step()
                bars.update(task, advance=1, epoch=len(training.epochs) + 1, status=report.status(training.totals))
                if stop.asked:
                    break
            else:
                training.end_epoch()
                number, epoch = len(training.epochs), training.epochs[-1]
                console.print(report.line(number, epoch), highlight=False)
                if log is not None:
                    log.add(number, epoch)
            if path is not None:
                checkpoint.save(training, path)
            if stop.asked:
                raise KeyboardInterrupt
