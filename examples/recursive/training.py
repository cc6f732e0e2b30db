"""Deep supervision in PyTorch, with all of its state in one place."""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import IO, Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import implicit_core as ic

from .batches import SOLVED, Places, Schedule, Totals
from .evaluation import Functions
from .loops import Loop
from .model import Prediction, RecursiveModel
from .settings import Settings
from .sudoku import Puzzles


class Examples(NamedTuple):
    """Inputs and targets, integers (n, cells); the targets begin at 0."""

    inputs: Tensor
    targets: Tensor


def loss_of(prediction: Prediction, targets: Tensor) -> Tensor:
    """Cross entropy of all cells, and of the belief that all of them are right."""
    cells = cross_entropy(prediction.logits.flatten(0, 1), targets.flatten())
    right = (prediction.logits.argmax(dim=-1) == targets).all(dim=1)
    return cells + SOLVED * binary_cross_entropy_with_logits(prediction.solved, right.to(cells.dtype))


def residual_of(model: Any) -> float:
    """The median relative residual of the last call of a model's layer."""
    return float(model.layer.stats.relative.median())


class Training:
    """A run, step by step.

    Parameters
    ----------
    make
        Makes the model: ``model.start(inputs)`` and ``model(inputs, state, solver=, gradient=)``, a
        :class:`.model.Prediction`. Its random numbers are those of ``seed``.
    settings
        Sizes, and what determines the optimizer.
    loop
        The recursions, and their derivative.
    seed
        Of the initial parameters and of the order of the examples.
    train
        The examples.

    Attributes
    ----------
    model, average
        The model, and its averaged weights.
    state
        What the model left of each place of the batch.
    done
        Steps made.
    diverged
        Whether the last loss was not finite, or a residual was NaN. It is NaN if the recursion is; the state then stays
        as it was, so that the loss may well be finite. Such a step changes no parameter.
    residual
        Median relative residual of the last step.
    totals
        Of the steps since it was last replaced.
    wall, processor
        Seconds of training alone, on the clock and of the processor.
    """

    def __init__(self, make: Callable[[], Any], settings: Schedule, loop: Loop, seed: int, train: Examples) -> None:
        self.settings, self.loop, self.train = settings, loop, train
        self.generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = make()
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(settings.average))
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), settings.rate, betas=(0.9, 0.95), weight_decay=settings.decay
        )
        self.scheduler = LambdaLR(self.optimizer, self._rate)
        self.places = Places(settings, len(train.inputs), lambda n: torch.randperm(n, generator=self.generator).numpy())
        self.state = self.model.start(train.inputs[: settings.batch])
        self.done, self.diverged, self.residual = 0, False, float("inf")
        self.totals = Totals()
        self.wall = self.processor = 0.0

    @classmethod
    def of_puzzles(cls, settings: Settings, puzzles: Puzzles) -> Self:
        """A run of the example."""
        loop = settings.loop()
        train = Examples(torch.as_tensor(puzzles.clues), torch.as_tensor(puzzles.solutions) - 1)

        def make() -> RecursiveModel:
            return RecursiveModel(
                settings.width, settings.latent_steps, loop.solver, loop.gradient, last_step=loop.last_step
            )

        return cls(make, settings, loop, settings.seed, train)

    def _rate(self, step: int) -> float:
        """The factor of the learning rate: up from zero, then down to a twentieth on a cosine."""
        part = torch.tensor(step / self.settings.steps * torch.pi)
        return min(1.0, (step + 1) / self.settings.warm_up) * max(0.05, float(1 + part.cos()) / 2)

    def step(self) -> None:
        """One step of supervision: recursions, loss, backward pass and a step of the optimizer."""
        wall, processor = time.perf_counter(), time.process_time()
        fresh = torch.as_tensor(self.places.fill(self.done))
        inputs, targets = (x[torch.as_tensor(self.places.rows)] for x in self.train)
        state = ic.reset(self.state, self.model.start(inputs), where=fresh)
        prediction = self.model(inputs, state, **self.loop.options(self.residual))
        loss = loss_of(prediction, targets)
        self.residual = residual_of(self.model)
        self.diverged = not bool(loss.isfinite()) or math.isnan(self.residual)
        if not self.diverged:
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            self.average.update_parameters(self.model)
        self.state = prediction.state
        right = prediction.logits.argmax(dim=-1) == targets
        shares = float(right.float().mean()), float(right.all(dim=1).float().mean())
        self.totals.add(float(loss.detach()), *shares, self.residual)
        self.done += 1
        self.wall += time.perf_counter() - wall
        self.processor += time.process_time() - processor

    def averaged(self) -> Functions:
        """The functions of the model with the averaged weights."""
        model: Any = copy.deepcopy(self.average.module).requires_grad_(False)
        return Functions(model.start, model.embed, model.recursion, model.read)

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on: tensors and plain Python."""
        parts = {name: getattr(self, name).state_dict() for name in PARTS}
        numbers = {name: getattr(self, name) for name in NUMBERS}
        places = {name: torch.as_tensor(getattr(self.places, name)) for name in PLACES}
        totals, generator = asdict(self.totals), self.generator.get_state()
        return {**parts, **numbers, "places": places, "totals": totals, "generator": generator}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state, of a run with the same settings."""
        for name in PARTS:
            getattr(self, name).load_state_dict(state[name])
        for name in NUMBERS:
            setattr(self, name, state[name])
        for name in PLACES:
            setattr(self.places, name, state["places"][name].numpy())
        self.places.used = int(self.places.used)
        self.totals = Totals(**state["totals"])
        self.generator.set_state(state["generator"])

    def save(self, file: IO[bytes]) -> None:
        """Write the state into a file."""
        torch.save(self.state_dict(), file)

    def load(self, file: IO[bytes]) -> None:
        """Go on from the state in a file."""
        self.load_state_dict(torch.load(file, weights_only=True))


PARTS = "model", "average", "optimizer", "scheduler"
NUMBERS = "state", "done", "diverged", "residual", "wall", "processor"
PLACES = "order", "used", "rows"
