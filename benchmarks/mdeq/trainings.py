"""Trainings and their files: a result for each that is finished, and a checkpoint while it goes on."""

import hashlib
import time
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import implicit_core as ic
from implicit_core.examples.mdeq.data.cifar10 import FOLDER
from implicit_core.examples.mdeq.settings import Settings
from implicit_core.examples.mdeq.source import Source, size_of
from implicit_core.examples.mdeq.training import Training
from implicit_core.examples.program import DivergedError, TrainingError

from .. import report, runs
from ..runs import interrupted, say
from .cosines import compare
from .experiments import settings_of

MARKS = 20
"""Moments of a run with the exact gradient at which the others are compared with it."""


MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
"""Of the official files of CIFAR-10."""


class OutOfTimeError(Exception):
    """The time is over; a checkpoint has what was done."""


@dataclass(frozen=True)
class Run(runs.Run):
    """A training.

    Attributes
    ----------
    family, row, scale, data, seed
        What is trained, see :mod:`.experiments`.
    results, scratch
        Folders of its result and of its checkpoint.
    data_dir
        The folder of the images.
    device
        Where to train.
    until
        When to stop, in seconds of :func:`time.time`.
    epochs
        Passes over the images, if not those of the scale.
    """

    family: str
    row: str
    scale: str
    data: str
    seed: int
    results: Path
    scratch: Path
    data_dir: Path | None = None
    device: str = "cpu"
    until: float = float("inf")
    epochs: int | None = None

    def __str__(self) -> str:
        return f"{self.data}-{self.family}-{self.row}-{self.seed}"

    @property
    def settings(self) -> Settings:
        """What determines it."""
        settings = settings_of(self.family, self.row, self.scale, self.data, self.seed)
        return settings if self.epochs is None else replace(settings, epochs=self.epochs)

    @property
    def result(self) -> Path:
        """The file of its result."""
        return self.results / f"{self}.json"

    @property
    def unfinished(self) -> Path:
        """The file of its checkpoint."""
        epochs = "" if self.epochs is None else f"{self.epochs}-epochs-"
        return self.scratch / f"{self.scale}-{epochs}{self}.pt"

    @property
    def measured(self) -> bool:
        """Whether gradients are compared along the run."""
        return self.family == "ablation" and self.row == "implicit"


def execute(run: Run) -> None:
    """Make a run, or the rest of it, and write its result.

    Raises
    ------
    OutOfTimeError, KeyboardInterrupt
        If the time is over before, or after Ctrl-C; the checkpoint has what was done.
    """
    if interrupted():
        raise KeyboardInterrupt
    if time.time() > run.until:
        raise OutOfTimeError
    torch.set_num_threads(1)
    settings = run.settings
    training = begin(run)
    compared: list[dict[str, Any]] = []

    def load(state: dict[str, Any]) -> None:
        training.restore(state["training"])
        compared.extend(state["compared"])

    run.restore(load, training.device)
    marks = {round(training.all_steps * i / MARKS) for i in range(MARKS + 1)} if run.measured else set()
    diverged = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ic.ConvergenceWarning)  # so many steps are what the model is made of
        while training.done < training.all_steps:
            if interrupted() or time.time() > run.until:
                run.save({"compared": compared, "training": training.state()})
                raise KeyboardInterrupt if interrupted() else OutOfTimeError
            if training.done in marks and (not compared or compared[-1]["step"] < training.done):
                compared.append({"step": training.done, **compare(training)})
            try:
                training.step()
                if epoch_ends := training.at_end_of_epoch:
                    training.end_epoch()
            except DivergedError:
                diverged = training.done
                break
            if epoch_ends:
                run.save({"compared": compared, "training": training.state()})
                say(_line(run, training))
        if run.measured and diverged is None:
            compared.append({"step": training.done, **compare(training)})
    record = {
        **{name: getattr(run, name) for name in ("family", "row", "scale", "data", "seed", "device")},
        "settings": asdict(settings),
        "images": about(training.source, run),
        **report.environment("torch", "numpy", device=run.device),
        "parameters": sum(p.numel() for p in training.model.parameters()),
        "pretraining_steps": training.pretraining_steps,
        "steps": training.all_steps,
        "diverged": diverged,
        "epochs": training.epochs,
        "compared": compared,
    }
    run.finish(record)


def begin(run: Run) -> Training:
    """A training at its start."""
    source = Source.of(run.settings, run.data_dir)
    if run.family == "torchdeq":
        try:
            from .torchdeq import Training as TorchDEQTraining
        except ModuleNotFoundError as error:
            raise TrainingError(f"{run.row} of TorchDEQ needs {error.name}; --rows chooses others.") from error
        return TorchDEQTraining(run.settings, source, run.device)
    return Training(run.settings, source, run.device)


def about(source: Source, run: Run) -> dict[str, Any]:
    """How many images there are, their size, and whether the files are the official ones, where that can be told."""
    return {
        "train": size_of(source.train),
        "test": size_of(source.test),
        "pixels": source.side,
        "source": origin(run.data, run.data_dir),
    }


def origin(name: str, folder: Path | None) -> str:
    """What is known of the files: those of CIFAR-10 may be a copy that was compressed with losses."""
    if name != "cifar10" or folder is None:
        return ""
    place = folder / FOLDER if (folder / FOLDER).exists() else folder
    found = {file: place / file for file in MD5}
    if not all(path.exists() for path in found.values()):
        return "unknown files"  # an archive
    official = all(hashlib.md5(path.read_bytes()).hexdigest() == MD5[file] for file, path in found.items())
    return "the official files" if official else "not the official files"


def _line(run: Run, training: Training) -> str:
    found = training.epochs[-1]
    seconds = sum(epoch["processor_seconds"] for epoch in training.epochs)
    return (
        f"{run}: epoch {len(training.epochs)} of {run.settings.epochs}, loss {found['train/loss']:.3f}, "
        f"tested {found['test/accuracy']:.1%}, residual {found['train/residual']:.0e}, {seconds:.0f} s"
    )
