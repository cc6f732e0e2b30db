"""A run from beginning to end, which Ctrl-C stops between two steps."""

from pathlib import Path

from rich.console import Console
from threadpoolctl import threadpool_limits

from .. import program
from . import checkpoint, data, report
from .settings import Settings
from .training import Totals, Training, evaluate


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
    program.refuse_to_replace(checkpoint_path, resume)
    console = Console() if console is None else console
    # Threads slow down convolutions this small, and fixing their number fixes the order of every sum.
    with threadpool_limits(1):
        train, test = data.load()
        training = Training(settings, train)
        if checkpoint_path is not None and resume:
            checkpoint.restore(training, checkpoint_path)
        with program.Stop() as stop, program.tensorboard(tensorboard, len(training.epochs)) as log:
            if checkpoint_path is not None:
                checkpoint.save(training, checkpoint_path)
            fit(training, checkpoint_path, log, stop, console)
        tested = evaluate(training.best_model(), test)
    console.print(report.table(training, tested))
    for remark in report.remarks(training, tested):
        console.print(remark, highlight=False)
    return training, tested


def fit(training: Training, path: Path | None, log: program.Log, stop: program.Stop, console: Console) -> None:
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
                log(number, report.scalars(epoch))
            if path is not None:
                checkpoint.save(training, path)
            if stop.asked:
                raise KeyboardInterrupt
