"""A run from beginning to end, which Ctrl-C stops between two steps."""

from pathlib import Path
from typing import IO, NamedTuple, Protocol

from rich.console import Console
from threadpoolctl import threadpool_limits

from .. import program
from ..program import TrainingError
from . import evaluation, report, sudoku
from .batches import Totals
from .settings import Settings
from .sudoku import Puzzles

MARKS, WATCHED = 10, 100
"""Tests in the course of a training, and their number of puzzles."""

PUZZLES = 1
"""Seed of the puzzles. The threshold :data:`.evaluation.BELIEF` was tuned on the puzzles of seed 0."""


class Training(Protocol):
    """What the trainings of both frameworks have."""

    done: int
    diverged: bool
    totals: Totals
    wall: float

    def step(self) -> None:
        """Make a training step."""

    def averaged(self) -> evaluation.Functions:
        """The functions of the model with the averaged weights."""

    def save(self, file: IO[bytes]) -> None:
        """Write the state into a file."""

    def load(self, file: IO[bytes]) -> None:
        """Go on from the state in a file."""


class Result(NamedTuple):
    """A finished run: shares by recursions, and what halting does."""

    training: Training
    by_depth: dict[int, dict[str, float]]
    halted: evaluation.Halted


def begin(settings: Settings, puzzles: Puzzles) -> Training:
    """A training in the framework of the settings."""
    if settings.framework == "jax":
        from . import training_jax

        return training_jax.Training(settings, puzzles)
    from . import training

    return training.Training.of_puzzles(settings, puzzles)


def run(
    settings: Settings,
    *,
    checkpoint: Path | None = None,
    resume: bool = False,
    tensorboard: Path | None = None,
    picture: Path | None = None,
    console: Console | None = None,
) -> Result:
    """Train and test; call it in the main thread.

    Parameters
    ----------
    settings
        All settings that determine the result.
    checkpoint
        Where to save the state: at first, ten times, and when interrupted.
    resume
        Go on from that checkpoint.
    tensorboard
        A folder for TensorBoard's files.
    picture
        A file for a picture of a puzzle that is solved.
    console
        Where to print; standard output if None.

    Raises
    ------
    KeyboardInterrupt
        At Ctrl-C, once the current step is done and in the checkpoint.
    TrainingError
        If the run can't go on.
    """
    program.refuse_to_replace(checkpoint, resume)
    if picture is not None:
        from .picture import draw  # what is missing is told before the training
    console = Console() if console is None else console
    # Fixing the number of threads fixes the order of every sum.
    with threadpool_limits(1):
        with console.status("Making puzzles"):
            train, test = sudoku.train_and_test(PUZZLES, settings.train, settings.test, settings.clues)
        training = begin(settings, train)
        if checkpoint is not None and resume:
            program.restore(settings, training, checkpoint)
        with program.Stop() as stop, program.tensorboard(tensorboard, training.done) as log:
            if checkpoint is not None:
                program.save(settings, training, checkpoint)
            fit(settings, training, test, checkpoint, log, stop, console)
        with console.status("Testing"):
            found = examine(settings, training, test)
            if picture is not None:
                draw(picture, training.averaged(), test, settings.recursions * settings.supervisions)
    console.print(report.by_depth(settings, found.by_depth, len(test.clues), training.wall))
    console.print(report.halting(found.halted, settings.recursions * settings.supervisions))
    return found


def fit(
    settings: Settings,
    training: Training,
    test: Puzzles,
    checkpoint: Path | None,
    log: program.Log,
    stop: program.Stop,
    console: Console,
) -> None:
    """Train to the last step."""
    marks = {round(settings.steps * (i + 1) / MARKS) for i in range(MARKS)}
    watched = Puzzles(*(part[:WATCHED] for part in test))
    with report.progress(console) as bars:
        task = bars.add_task("", total=settings.steps, completed=training.done, status="")
        while training.done < settings.steps:
            training.step()
            if training.diverged:
                raise TrainingError(
                    f"The loss or the residual is not finite in step {training.done}; try a smaller --rate."
                )
            means = training.totals.means()
            bars.update(task, completed=training.done, status=report.status(means))
            if training.done in marks:
                depth = settings.recursions * settings.supervisions
                *_, answers = evaluation.by_depth(training.averaged(), watched.clues, depth)
                tested = evaluation.shares(answers, watched)
                console.print(report.line(training.done, means, tested), highlight=False)
                log(training.done, report.scalars(means, tested))
                training.totals = Totals()
            if checkpoint is not None and (training.done in marks or stop.asked):
                program.save(settings, training, checkpoint)
            if stop.asked:
                raise KeyboardInterrupt


def examine(settings: Settings, training: Training, test: Puzzles) -> Result:
    """All tests of a trained model."""
    model, trained = training.averaged(), settings.recursions * settings.supervisions
    # From the recursions of one training step to twice those that a puzzle was trained for.
    depths = {max(1, round(trained * part)) for part in (1 / settings.supervisions, 0.25, 0.5, 1, 2)}
    found = {
        depth: evaluation.shares(answers, test)
        for depth, answers in enumerate(evaluation.by_depth(model, test.clues, max(depths)), 1)
        if depth in depths
    }
    return Result(training, found, evaluation.until_halted(model, test, trained))
