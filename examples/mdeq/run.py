"""A run from beginning to end, which Ctrl-C stops between two steps; alone, or as a process of ``torchrun``."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from threadpoolctl import threadpool_limits

import implicit_core as ic

from .. import program
from ..program import TrainingError
from . import report
from .settings import Settings
from .source import Source
from .training import Training


def run(
    settings: Settings,
    *,
    data_dir: Path | None = None,
    device: str = "auto",
    threads: int = 1,
    workers: int = 4,
    checkpoint: Path | None = None,
    resume: bool = False,
    tensorboard: Path | None = None,
    console: Console | None = None,
) -> Training:
    """Train and test; call it in the main thread.

    Parameters
    ----------
    settings
        All settings that determine the result.
    data_dir
        The folder of the images.
    device
        Where to train, as PyTorch names it; ``"auto"`` for a GPU if there is one. Each process of ``torchrun`` takes a
        GPU of its own.
    threads
        Of the CPU. Their number decides the order of sums, and so the last digits.
    workers
        Processes that read files, where the images do not fit in memory.
    checkpoint
        Where to save the state: after every epoch, and when interrupted.
    resume
        Go on from that checkpoint.
    tensorboard
        A folder for TensorBoard's files.
    console
        Where to print; standard output if None.

    Raises
    ------
    KeyboardInterrupt
        At Ctrl-C, once the current step is done and in the checkpoint.
    TrainingError
        If the run can't go on.
    """
    with processes(device) as (place, first):
        console = console or Console(quiet=not first)
        checkpoint_of_all = checkpoint
        checkpoint, tensorboard = (path if first else None for path in (checkpoint, tensorboard))
        program.refuse_to_replace(checkpoint, resume)
        with threadpool_limits(threads), warnings.catch_warnings():
            # So many steps are what the model is made of, whether or not they converge; the residual is reported.
            warnings.simplefilter("ignore", ic.ConvergenceWarning)
            torch.set_num_threads(threads)
            training = Training(settings, Source.of(settings, data_dir, workers), place)
            if resume and checkpoint_of_all is not None:
                program.restore(settings, training, checkpoint_of_all)
            with program.Stop() as stop, program.tensorboard(tensorboard, training.done) as log:
                fit(settings, training, checkpoint, log, stop, console)
        console.print(report.summary(settings, training))
    return training


def fit(
    settings: Settings,
    training: Training,
    checkpoint: Path | None,
    log: program.Log,
    stop: program.Stop,
    console: Console,
) -> None:
    """Train to the last step."""
    if checkpoint is not None:
        program.save(settings, training, checkpoint)
    with report.progress(console) as bars:
        task = bars.add_task("", total=training.all_steps, completed=training.done, status="")
        while training.done < training.all_steps:
            training.step()
            bars.update(task, completed=training.done, status=report.status(training.totals.means()))
            ended = training.at_end_of_epoch
            if ended:
                training.end_epoch()
                found = training.epochs[-1]
                console.print(report.line(len(training.epochs), found), highlight=False)
                log(training.done, found)
            stopped = of_any_process(stop.asked, training.device)
            if stopped:
                training.gather()
            if checkpoint is not None and (ended or stopped):
                program.save(settings, training, checkpoint)
            if stopped:
                raise KeyboardInterrupt


def place_of(device: str) -> torch.device:
    """The device of this name.

    Raises
    ------
    TrainingError
        If there is none.
    """
    try:
        place = torch.device(device)
        torch.empty(0, device=place).cpu()  # which fails for "meta", a device without numbers
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise TrainingError(f"There is no device {device!r} for PyTorch here: {reason}") from error
    return place


def of_any_process(asked: bool, device: torch.device) -> bool:
    """Whether any process was asked to stop, so that none waits for another one."""
    if not dist.is_initialized():
        return asked
    flag = torch.tensor(float(asked), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


@contextmanager
def processes(device: str) -> Iterator[tuple[torch.device, bool]]:
    """The device of this process, and whether it is the first. With ``torchrun`` the processes meet here."""
    cuda = torch.cuda.is_available()
    if device == "auto":
        device = "cuda" if cuda else "cpu"
    place = place_of(device)
    if "LOCAL_RANK" not in os.environ:
        yield place, True
        return
    if place.type == "cuda":
        place = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    try:
        yield place, dist.get_rank() == 0
    finally:
        dist.destroy_process_group()
