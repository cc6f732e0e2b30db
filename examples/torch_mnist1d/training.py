"""Training, step by step, with all of its state in one place."""

from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import OneCycleLR

import implicit_core as ic
from implicit_core.adapters import torch as ict

from ..program import DivergedError, TrainingError
from .data import Samples
from .model import Classifier
from .settings import Settings

HELD_OUT, TEST_BATCH, WARM_UP, WEIGHT_DECAY = 0.1, 500, 0.2, 0.05


@dataclass
class Totals:
    """Sums over samples: loss, right answers, steps of the solver, and solves that converged."""

    samples: int = 0
    loss: float = 0.0
    correct: int = 0
    steps: int = 0
    converged: int = 0

    def add(self, layer: ict.ImplicitLayer, logits: Tensor, labels: Tensor, loss: float) -> None:
        """Count a batch, which is the last that the layer has seen."""
        assert layer.status is not None
        assert layer.stats is not None
        self.samples += len(labels)
        self.loss += loss * len(labels)
        self.correct += int((logits.argmax(dim=1) == labels).sum())
        self.steps += int(layer.stats.steps.sum())
        self.converged += int(layer.status.eq(ic.CONVERGED).sum())

    def means(self) -> dict[str, float]:
        """Loss, accuracy, solver steps and the share of solves that converged."""
        sums = {"loss": self.loss, "accuracy": self.correct, "solver_steps": self.steps, "converged": self.converged}
        return {name: value / self.samples for name, value in sums.items()}


class Epoch(NamedTuple):
    """What an epoch gave on the samples trained on, while they were, and on those held out; its training time."""

    train: Totals
    validation: Totals
    seconds: float


class Training:
    """A training run.

    Parameters
    ----------
    settings
        What determines it.
    samples
        The training set; a tenth of it is held out.

    Attributes
    ----------
    epochs
        Those done.
    best
        The best of them on the samples held out, the later of equals: ``epoch``, ``correct``, and the ``model``'s
        parameters.

    Raises
    ------
    TrainingError
        If there are fewer samples than one batch takes.
    """

    def __init__(self, settings: Settings, samples: Samples) -> None:
        self.settings = settings
        self.generator = torch.Generator().manual_seed(settings.seed)
        shuffled = torch.randperm(len(samples.labels), generator=self.generator)
        held_out, rest = shuffled.tensor_split([round(HELD_OUT * len(shuffled))])
        self.samples, self.validation = (Samples(*(x[part] for x in samples)) for part in (rest, held_out))
        self.steps = len(rest) // settings.batch_size
        if not self.steps:
            raise TrainingError(f"A batch of {settings.batch_size} is more than the {len(rest)} samples to train on.")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.model = Classifier(settings.channels, settings.estimator())
        self.optimizer = torch.optim.AdamW(self.model.parameters(), weight_decay=WEIGHT_DECAY)
        self.scheduler = OneCycleLR(self.optimizer, settings.lr, settings.epochs * self.steps, pct_start=WARM_UP)
        self.epochs: list[Epoch] = []
        self.best: dict[str, Any] = {"epoch": 0, "correct": -1, "model": {}}
        self._begin_epoch()

    def _begin_epoch(self) -> None:
        self.order = torch.randperm(len(self.samples.labels), generator=self.generator)
        self.position, self.totals, self.seconds = 0, Totals(), 0.0

    def step(self) -> None:
        """Train on the next batch of the epoch."""
        start = perf_counter()
        first = self.position * self.settings.batch_size
        batch = self.order[first : first + self.settings.batch_size]
        signals, labels = (x[batch] for x in self.samples)
        logits = self.model.train()(signals)
        loss = cross_entropy(logits, labels)
        stats: Any = self.model.layer.stats
        # A cell that is NaN leaves the state at its start, so that the loss may well be finite.
        if not loss.isfinite() or stats.relative.isnan().any():
            epoch = len(self.epochs) + 1
            raise DivergedError(f"The loss or a residual is not finite in epoch {epoch}; try a smaller --lr.")
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.totals.add(self.model.layer, logits, labels, loss.item())
        self.position += 1
        self.seconds += perf_counter() - start

    def end_epoch(self) -> None:
        """Measure on the samples held out, keep the parameters if they are the best, and shuffle again."""
        validation = evaluate(self.model, self.validation)
        self.epochs.append(Epoch(self.totals, validation, self.seconds))
        if validation.correct >= self.best["correct"]:
            parameters = {name: value.clone() for name, value in self.model.state_dict().items()}
            self.best = {"epoch": len(self.epochs), "correct": validation.correct, "model": parameters}
        self._begin_epoch()

    def best_model(self) -> Classifier:
        """A model with the best parameters."""
        model = Classifier(self.settings.channels, self.settings.estimator())
        model.load_state_dict(self.best["model"])
        return model

    def state(self) -> dict[str, Any]:
        """All that the next step depends on: tensors and plain Python."""
        return {
            "settings": asdict(self.settings),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "generator": self.generator.get_state(),
            "order": self.order,
            "position": self.position,
            "totals": asdict(self.totals),
            "seconds": self.seconds,
            "epochs": [(asdict(epoch.train), asdict(epoch.validation), epoch.seconds) for epoch in self.epochs],
            "best": self.best,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state, of a run with the same settings."""
        for part in ("model", "optimizer", "scheduler"):
            getattr(self, part).load_state_dict(state[part])
        self.generator.set_state(state["generator"])
        self.order, self.position, self.seconds = state["order"], state["position"], state["seconds"]
        self.totals = Totals(**state["totals"])
        self.epochs = [Epoch(Totals(**train), Totals(**held), seconds) for train, held, seconds in state["epochs"]]
        self.best = state["best"]


@torch.no_grad()
def evaluate(model: Classifier, samples: Samples) -> Totals:
    """The totals of a model over samples."""
    totals = Totals()
    model.eval()
    for signals, labels in zip(*(x.split(TEST_BATCH) for x in samples), strict=True):
        logits = model(signals)
        totals.add(model.layer, logits, labels, cross_entropy(logits, labels).item())
    return totals
