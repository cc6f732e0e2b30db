"""What the programs that train share: a stop at Ctrl-C, checkpoint files, TensorBoard's log, errors as sentences."""

import argparse
import io
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any, Protocol, Self, TypeAlias, TypeVar

from implicit_core import SolveError

S = TypeVar("S", bound="Trained")
T = TypeVar("T")
Log: TypeAlias = Callable[[int, Mapping[str, float]], None]
"""Writes scalars by name: ``log(step, scalars)``."""


class Trained(Protocol):
    """Settings of a training."""

    @property
    def gradient(self) -> str:
        """The name of the gradient."""
        ...


class Savable(Protocol):
    """A training whose state is a part of a file."""

    def save(self, file: IO[bytes]) -> None:
        """Write the state."""

    def load(self, file: IO[bytes]) -> None:
        """Go on from the state."""


class TrainingError(Exception):
    """Why training can't go on, in a sentence."""


class DivergedError(TrainingError):
    """The loss or a residual is not finite."""


def exit_code(
    run: Callable[[], object], modules: Collection[str], extras: str, stopped: Callable[[], str | None]
) -> int:
    """Run a program.

    Parameters
    ----------
    run
        The program, which imports what it needs.
    modules, extras
        Modules that may be missing, and the extras that they are part of.
    stopped
        What to say after Ctrl-C; None for nothing, where another process says it.

    Returns
    -------
    int
        0, or 1 if the run can't go on, 2 if a module is missing, 130 after Ctrl-C.
    """
    try:
        run()
    except (TrainingError, SolveError) as error:
        print(f"The training stopped: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in modules:
            raise
        how = f'in a checkout: pip install -e ".[{extras}]"'
        print(f"The example needs {module}, which is not installed; {how}.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if (words := stopped()) is not None:
            print(f"\nStopped. {words}", file=sys.stderr)
        return 130
    return 0


def add_numbers(parser: argparse.ArgumentParser, settings: type, *rows: tuple[str, str, str]) -> None:
    """Add the options of numbers.

    Parameters
    ----------
    parser
        The command line.
    settings
        The class of the settings, which has the defaults.
    rows
        Name, placeholder and description of each number.
    """
    for name, metavar, about in rows:
        default = getattr(settings, name)
        about = f"{about} (default: {default})"
        parser.add_argument(flag(name), type=type(default), default=argparse.SUPPRESS, metavar=metavar, help=about)


def settings_of(
    parser: argparse.ArgumentParser, options: argparse.Namespace, defaults: S, phantom: Collection[str]
) -> S:
    """The settings of a training that are given on the command line. What does not go together ends the program.

    Parameters
    ----------
    parser, options
        The command line, and what it says.
    defaults
        The settings where nothing is given, a dataclass.
    phantom
        The gradients that have k and lam.
    """
    instance: Any = defaults
    names = [field.name for field in fields(instance)]
    given = {name: getattr(options, name) for name in names if name in options}
    try:
        made: S = replace(instance, **given)
    except ValueError as error:
        parser.error(str(error))
    if made.gradient not in phantom and given.keys() & {"k", "lam"}:
        parser.error(f"--k and --lam belong to --gradient {' and '.join(phantom)}, not to {made.gradient}")
    if options.resume and options.checkpoint is None:
        parser.error("--resume needs --checkpoint FILE, the file to go on from")
    return made


def at_least(minimum: int) -> Callable[[str], int]:
    """The type of an option that is an integer, for argparse."""

    def integer(text: str) -> int:
        number = int(text)
        if number < minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}, got {text}")
        return number

    return integer


def flag(name: str) -> str:
    """How the command line spells the name of a setting."""
    return "--" + name.replace("_", "-")


def how_to_go_on(program: str, flags: Mapping[str, str], files: Mapping[str, Path | None]) -> str:
    """What to say after Ctrl-C: the command that goes on, if there is a checkpoint.

    Parameters
    ----------
    program, flags
        How the program is called, and its settings.
    files
        Its files and folders by their names; that of the checkpoint is ``checkpoint``.
    """
    path = files["checkpoint"]
    if path is None:
        return "Nothing is kept; --checkpoint FILE would have saved the run."
    if not path.exists():
        return f"Nothing was done yet, and there is no {path}."
    given = dict(flags) | {flag(name): str(file) for name, file in files.items() if file is not None}
    words = [word for pair in given.items() for word in pair]
    return f"The run is in {path}; go on with\n  {program} {shlex.join([*words, '--resume'])}"


class Stop:
    """Ctrl-C asks for a stop after the current step, so that none is done by half; a second one is obeyed at once.

    So does SIGTERM, by which clusters and ``torchrun`` end a program.
    """

    asked = False
    signals = signal.SIGINT, signal.SIGTERM

    def __enter__(self) -> Self:
        self.asked = False
        self._before = {number: signal.signal(number, self._ask) for number in self.signals}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        self.asked = True
        for number in self.signals:
            signal.signal(number, signal.default_int_handler)


def refuse_to_replace(path: Path | None, resume: bool) -> None:
    """Raise :class:`TrainingError` if a new run would replace a checkpoint."""
    if path is not None and path.exists() and not resume:
        raise TrainingError(f"{path} exists: add --resume to go on from it, or name another file.")


def write(path: Path, content: Callable[[IO[bytes]], object]) -> None:
    """Write a file; whatever happens meanwhile, it is the old one or the new one, and whole.

    Raises
    ------
    TrainingError
        If it can't be written.
    """
    buffer = io.BytesIO()  # PyTorch hides why a file can't be written: that the disk is full, for instance
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        content(buffer)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise TrainingError(f"{path} can't be written: {error.strerror}.") from error


def read(path: Path, load: Callable[[IO[bytes]], T]) -> T:
    """What ``load`` makes of a checkpoint.

    Raises
    ------
    TrainingError
        If the file can't be read, or ``load`` finds something else in it.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TrainingError(f"{path} can't be read: {error.strerror}.") from error
    try:
        return load(io.BytesIO(content))
    except TrainingError:
        raise
    except Exception as error:  # of any type, which depends on the bytes
        raise TrainingError(f"{path} is not a checkpoint of this program, or is damaged.") from error


def save(settings: Any, training: Savable, path: Path) -> None:
    """Write a checkpoint: a line with the settings, a dataclass, then what the training writes."""

    def content(file: IO[bytes]) -> None:
        file.write(json.dumps(asdict(settings)).encode() + b"\n")
        training.save(file)

    write(path, content)


def restore(settings: Any, training: Savable, path: Path) -> None:
    """Go on from a checkpoint.

    Raises
    ------
    TrainingError
        If the file has no state, or a state of other settings.
    """

    def load(file: IO[bytes]) -> None:
        stored = type(settings)(**json.loads(file.readline()))
        require_same(path, stored.flags(), settings.flags())
        training.load(io.BytesIO(file.read()))

    read(path, load)


def require_same(path: Path, stored: Mapping[str, str], ours: Mapping[str, str]) -> None:
    """Raise :class:`TrainingError` if a checkpoint was made with other flags."""
    differing = [f"{flag} {value}" for flag, value in stored.items() if value != ours.get(flag)]
    if differing:
        raise TrainingError(f"{path} was made with {' '.join(differing)}: resume with the same settings.")


@contextmanager
def tensorboard(folder: Path | None, done: int) -> Iterator[Log]:
    """A log in the folder, if there is one.

    What an interrupted run wrote beyond the step ``done`` is discarded.
    """
    if folder is None:
        yield lambda _step, _scalars: None
        return
    from torch.utils.tensorboard.writer import SummaryWriter

    try:
        writer: Any = SummaryWriter(str(folder), purge_step=done + 1)
    except OSError as error:
        raise TrainingError(f"TensorBoard's files can't be written: {error}.") from error

    def log(step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    try:
        yield log
    finally:
        writer.close()
