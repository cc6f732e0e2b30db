"""Runs and their files: a result for each finished run, and a checkpoint while it goes on."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from implicit_core.examples.program import write

from .. import report, runs
from .measures import checkpoint
from .rungs import rungs
from .tasks import TASKS, Data, Examples, Settings
from .training import Training


@dataclass(frozen=True)
class Run(runs.Run):
    """One run.

    Attributes
    ----------
    task, rung
        Their names.
    seed
        Its seed.
    quick
        Whether its settings are those of a test.
    results, scratch
        Folders of its result, and of its checkpoint and the data.
    """

    task: str
    rung: str
    seed: int
    quick: bool
    results: Path
    scratch: Path

    def __str__(self) -> str:
        return f"{self.task}-{self.rung}-{self.seed}"

    @property
    def settings(self) -> Settings:
        """The settings of its task."""
        task = TASKS[self.task]
        return task.quick if self.quick else task.settings

    @property
    def result(self) -> Path:
        """The file of its result."""
        return self.results / f"{self}.json"

    @property
    def unfinished(self) -> Path:
        """The file of its checkpoint."""
        return self.scratch / f"{self}.pt"


def data_of(run: Run) -> Data:
    """The data of a run's task, made once for equal settings."""
    settings = run.settings
    file = run.scratch / f"{run.task}-data{'-quick' * run.quick}.npz"
    key = json.dumps(asdict(settings), sort_keys=True)
    if file.exists():
        arrays = dict(np.load(file))
        if str(arrays.pop("key")) == key:
            sets = {
                name.removesuffix(" inputs"): Examples(
                    torch.as_tensor(inputs), torch.as_tensor(arrays[name.replace(" inputs", " targets")])
                )
                for name, inputs in arrays.items()
                if name.endswith(" inputs")
            }
            return Data(sets.pop("train"), sets)
    data = TASKS[run.task].data(settings)
    sets = {"train": data.train, **data.tests}
    named = {f"{name} {part}": x.numpy() for name, s in sets.items() for part, x in s._asdict().items()}
    write(file, lambda to: np.savez_compressed(to, key=key, **named))
    return data


def execute(run: Run, say: Callable[[str], None], *, until: int | None = None) -> None:
    """Make a run, or the rest of it, and write its result.

    Parameters
    ----------
    run
        The run.
    say
        Called with a line at each checkpoint.
    until
        Stop after the checkpoint at this step, as if the process had ended.
    """
    torch.set_num_threads(1)
    task, settings, data = TASKS[run.task], run.settings, data_of(run)
    training = Training(task, settings, rungs(settings.recursions)[run.rung], run.seed, data.train)
    made: list[dict[str, Any]] = []

    def load(state: dict[str, Any]) -> None:
        training.load_state_dict(state["training"])
        made.extend(state["made"])

    run.restore(load)
    begun, first = time.perf_counter(), training.done
    for mark in settings.marks():
        while training.done < mark and not training.diverged:
            training.step()
            if runs.interrupted():
                raise KeyboardInterrupt
        if training.diverged:
            say(f"{run}: diverged in step {training.done}")
            break
        if made and made[-1]["step"] >= mark:
            continue
        made.append(checkpoint(task, settings, run.rung, training, data))
        run.save({"made": made, "training": training.state_dict()})
        left = (time.perf_counter() - begun) / (mark - first) * (settings.steps - mark)
        say(f"{_line(run, settings, made[-1])}, {left:.0f} s left")
        if mark == until:
            return
    diverged = training.done if training.diverged else None
    record = {
        "task": run.task,
        "rung": run.rung,
        "seed": run.seed,
        "settings": asdict(settings),
        **report.environment("torch", "numpy"),
        "diverged": diverged,
        "checkpoints": made,
    }
    run.finish(record)


def _line(run: Run, settings: Settings, found: dict[str, Any]) -> str:
    exact = ", ".join(f"{name} {100 * test['exact']:.1f} %" for name, test in found["tests"].items())
    cosine = found["gradients"][run.rung]["cosine"]
    return (
        f"{run}: step {found['step']} of {settings.steps}, loss {found['loss']:.3f}, exact on {exact}, "
        f"cosine {cosine:.3f}, {found['seconds']:.0f} s of training"
    )
