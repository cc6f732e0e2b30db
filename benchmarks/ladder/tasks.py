"""What is learned: data, model and settings."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch

from implicit_core.examples.recursive import sudoku
from implicit_core.examples.recursive.model import RecursiveModel
from implicit_core.examples.recursive.training import Examples

from .rungs import Rung
from .words import WordModel, words

Model: TypeAlias = Any
"""A :class:`RecursiveModel`, or another module with its interface and another state."""


class Data(NamedTuple):
    """Examples to train on, and sets to test on, by name. The first of them is the one that counts."""

    train: Examples
    tests: dict[str, Examples]


@dataclass(frozen=True)
class Settings:
    """What determines a run beside its rung and its seed.

    Attributes
    ----------
    steps
        Of training, with ``batch`` examples each.
    supervisions
        Steps that an example stays in the batch, with its state; ``tested`` are made in a test.
    recursions, latent
        Recursions of a step, and updates of the latent in each, besides one of the answer.
    width, rate, decay, warm_up, average
        Channels; learning rate, weight decay and first steps of AdamW; decay of the averaged weights.
    train, test, clues
        Numbers of examples, and the least number of clues of a puzzle.
    checkpoints, watched
        Measurements, evenly spaced. All but the last are made on this number of test examples.
    """

    steps: int
    batch: int
    supervisions: int
    tested: int
    recursions: int
    latent: int
    width: int
    rate: float
    train: int
    test: int
    clues: int = 0
    decay: float = 0.1
    warm_up: int = 50
    average: float = 0.98
    checkpoints: int = 8
    watched: int = 250

    def marks(self) -> list[int]:
        """The steps at which is measured."""
        return [round(self.steps * (i + 1) / self.checkpoints) for i in range(self.checkpoints)]


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes
    ----------
    name, settings
        Its name and its usual settings.
    quick
        Settings that show in a minute whether everything works.
    main, rest
        Names of the rungs that are run first, with ``main_seeds`` seeds, and of those that follow, with ``rest_seeds``.
    data, model
        Functions of the settings: the data, and the model of a rung.
    """

    name: str
    settings: Settings
    quick: Settings
    data: Callable[[Settings], Data]
    model: Callable[[Settings, Rung], Model]
    main: tuple[str, ...]
    rest: tuple[str, ...]
    main_seeds: int = 5
    rest_seeds: int = 3


def sudoku_data(settings: Settings) -> Data:
    """Puzzles of 6 x 6 cells."""
    sets = sudoku.train_and_test(0, settings.train, settings.test, settings.clues)
    train, test = (Examples(torch.as_tensor(s.clues), torch.as_tensor(s.solutions) - 1) for s in sets)
    return Data(train, {"test": test})


def sudoku_model(settings: Settings, rung: Rung) -> RecursiveModel:
    """The model of a rung."""
    return RecursiveModel(settings.width, settings.latent, rung.solver, rung.gradient, last_step=rung.last_step)


SUDOKU = Task(
    "sudoku",
    Settings(
        steps=900,
        batch=48,
        supervisions=8,
        tested=12,
        recursions=3,
        latent=3,
        width=48,
        rate=3e-3,
        train=10_000,
        test=2000,
        clues=8,
    ),
    Settings(
        steps=16,
        batch=8,
        supervisions=4,
        tested=8,
        recursions=3,
        latent=2,
        width=16,
        rate=3e-3,
        train=16,
        test=20,
        clues=20,
        warm_up=4,
        checkpoints=2,
    ),
    sudoku_data,
    sudoku_model,
    ("hrm", "trm", "neumann-3-1", "unroll-2-1", "full"),
    ("one-step", "neumann-5-0.5", "unroll-5-0.5", "exact", "switching"),
)
LENGTHS = {32: 1.0, 64: 0.4, 128: 0.2}
"""Lengths of the words that are tested, and the share of the test examples of each. The first is that of training."""


def words_data(settings: Settings) -> Data:
    """Words of A5."""
    rng, (length, *_) = np.random.default_rng(0), LENGTHS
    train = Examples(*words(rng, settings.train, length))
    return Data(train, {str(n): Examples(*words(rng, round(part * settings.test), n)) for n, part in LENGTHS.items()})


def words_model(settings: Settings, rung: Rung) -> WordModel:
    """The model of a rung."""
    return WordModel(settings.width, 2 * settings.width, rung.solver, rung.gradient)


WORDS = Task(
    "words",
    Settings(
        steps=2000,
        batch=32,
        supervisions=1,
        tested=1,
        recursions=32,
        latent=0,
        width=64,
        rate=1e-2,
        train=2000 * 32,
        test=1000,
        decay=0.01,
        watched=64,
    ),
    Settings(
        steps=4,
        batch=4,
        supervisions=1,
        tested=1,
        recursions=32,
        latent=0,
        width=8,
        rate=1e-2,
        train=16,
        test=10,
        decay=0.01,
        warm_up=2,
        checkpoints=2,
        watched=5,
    ),
    words_data,
    words_model,
    ("one-step", "neumann-3-1", "neumann-5-0.5", "unroll-2-1", "exact", "full"),
    (),
    main_seeds=3,
)
TASKS = {task.name: task for task in (SUDOKU, WORDS)}
