"""Training with deep supervision, with all of its state in one place."""

import time
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from implicit_core.examples.recursive.model import Prediction

from .rungs import Rung
from .tasks import Examples, Model, Settings, Task

SOLVED = 0.1
"""Weight of the loss of the model's belief that it is right."""


def loss_of(prediction: Prediction, targets: Tensor) -> Tensor:
    """Cross entropy of all cells, and of the belief that all of them are right."""
    cells = cross_entropy(prediction.logits.flatten(0, 1), targets.flatten())
    right = (prediction.logits.argmax(dim=-1) == targets).all(dim=1)
    return cells + SOLVED * binary_cross_entropy_with_logits(prediction.solved, right.to(cells.dtype))


class Training:
    """A run.

    The batch has ``batch`` places. An example stays in its place for ``supervisions`` steps, with the state that the
    model left there, and the places are filled in turn: so every batch holds examples of all ages.

    Parameters
    ----------
    task, settings
        What is learned.
    rung
        The gradient.
    seed
        Of the initial parameters and of the order of the examples.
    train
        The examples.

    Attributes
    ----------
    model, average
        The model, and its averaged weights.
    done
        Steps made.
    diverged
        Whether a loss was not finite, which ends the run.
    residual
        Median relative residual of the last step.
    losses
        Sum and number of the losses since they were last read.
    wall, processor
        Seconds of training alone, on the clock and of the processor.
    """

    def __init__(self, task: Task, settings: Settings, rung: Rung, seed: int, train: Examples) -> None:
        self.settings, self.rung, self.train = settings, rung, train
        self.generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model: Model = task.model(settings, rung)
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(settings.average))
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), settings.rate, betas=(0.9, 0.95), weight_decay=settings.decay
        )
        self.scheduler = LambdaLR(self.optimizer, self._rate)
        self.order = torch.randperm(len(train.inputs), generator=self.generator)
        self.used = self.done = 0
        self.examples = torch.zeros(settings.batch, dtype=torch.long)
        self.state = self.model.start(train.inputs[self.examples])
        self.diverged, self.residual = False, float("inf")
        self.losses = [0.0, 0]
        self.wall = self.processor = 0.0

    def _rate(self, step: int) -> float:
        """The factor of the learning rate: up from zero, then down to a twentieth on a cosine."""
        part = torch.tensor(step / self.settings.steps * torch.pi)
        return min(1.0, (step + 1) / self.settings.warm_up) * max(0.05, float(1 + part.cos()) / 2)

    def _refill(self) -> None:
        """Put new examples where the old ones have had all their steps; into all places at first."""
        places = torch.arange(self.settings.batch)
        due = (places + self.done) % self.settings.supervisions == 0 if self.done else places >= 0
        count = int(due.sum())
        if self.used + count > len(self.order):
            self.order, self.used = torch.randperm(len(self.order), generator=self.generator), 0
        self.examples[due] = self.order[self.used : self.used + count]
        self.used += count
        fresh = self.model.start(self.train.inputs[self.examples])
        self.state = tuple(
            torch.where(due.view(-1, *[1] * (h.ndim - 1)), h0, h) for h0, h in zip(fresh, self.state, strict=True)
        )

    def step(self) -> None:
        """One step of supervision: recursions, loss, backward pass and a step of the optimizer."""
        wall, processor = time.perf_counter(), time.process_time()
        self._refill()
        inputs, targets = (x[self.examples] for x in self.train)
        prediction = self.model(inputs, self.state, **self.rung.options(self.residual))
        loss = loss_of(prediction, targets)
        self.diverged = not bool(loss.isfinite())
        if not self.diverged:
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            self.average.update_parameters(self.model)
        self.state = prediction.state
        self.residual = residual_of(self.model)
        self.losses = [self.losses[0] + float(loss.detach()), self.losses[1] + 1]
        self.done += 1
        self.wall += time.perf_counter() - wall
        self.processor += time.process_time() - processor

    def mean_loss(self) -> float:
        """The mean of the losses since the last call."""
        total, count = self.losses
        self.losses = [0.0, 0]
        return total / count

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on: tensors and plain Python."""
        parts = {name: getattr(self, name).state_dict() for name in PARTS}
        numbers = {name: getattr(self, name) for name in NUMBERS}
        return {**parts, **numbers, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state, of a run with the same settings."""
        for name in PARTS:
            getattr(self, name).load_state_dict(state[name])
        for name in NUMBERS:
            setattr(self, name, state[name])
        self.generator.set_state(state["generator"])


PARTS = "model", "average", "optimizer", "scheduler"
NUMBERS = (
    "order", "used", "done", "examples", "state", "diverged", "residual", "losses", "wall", "processor",
)  # fmt: skip


def residual_of(model: Model) -> float:
    """The median relative residual of the last call of a model's layer."""
    return float(model.layer.stats.relative.median())
