"""Training, step by step, with all of its state in one place; alone, or as one of the processes of ``torchrun``."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from time import perf_counter, process_time
from typing import IO, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import CosineAnnealingLR

import implicit_core as ic

from ..program import DivergedError, TrainingError
from .model import MDEQ
from .settings import LAYERS, Settings
from .sizes import Sizes
from .source import Source, size_of

LEAST_RATE = 1e-6
"""Where the learning rate ends."""
TEST_BATCH = 250
PRETRAINING = {"solver": ic.steps(0), "gradient": ic.BPTT(LAYERS, on_growth="ignore")}
"""The cell, applied to zero so many times, as the layers of a network."""
ORDER, STEP, VIEWS, COMPARED = range(4)
"""What random numbers are for."""


@dataclass
class Totals:
    """Sums over images: of the loss, of right answers, of the relative residuals and of the steps of the solver."""

    images: int = 0
    loss: float = 0.0
    right: int = 0
    residual: float = 0.0
    steps: int = 0

    def add(self, model: MDEQ, logits: Tensor, labels: Tensor, loss: float) -> None:
        """Count a batch, which is the last that the model has seen."""
        stats = model.stats
        self.images += len(labels)
        self.loss += loss * len(labels)
        self.right += int((logits.argmax(dim=1) == labels).sum())
        self.residual += float(stats.relative.double().sum())
        self.steps += int(stats.steps.sum())

    def of_all_processes(self, device: torch.device) -> "Totals":
        """The sums over all processes."""
        if not dist.is_initialized():
            return self
        sums = torch.tensor(list(asdict(self).values()), dtype=torch.float64, device=device)
        dist.all_reduce(sums)
        images, loss, right, residual, steps = sums.tolist()
        return Totals(int(images), loss, int(right), residual, int(steps))

    def require_finite(self, step: int) -> None:
        """Raise :class:`DivergedError` if the loss is not finite, or a residual is NaN.

        It is NaN if the cell is, wherever it is evaluated. The solver then returns its start, so that the loss may well
        be finite.
        """
        if not np.isfinite(self.loss):
            raise DivergedError(f"The loss is {self.loss} at step {step}; try a smaller --rate.")
        if np.isnan(self.residual):
            raise DivergedError(f"A residual is NaN at step {step}; try a smaller --rate.")

    def means(self) -> dict[str, float]:
        """Loss, accuracy, relative residual and solver's steps of an image."""
        sums = {"loss": self.loss, "accuracy": self.right, "residual": self.residual, "solver_steps": self.steps}
        return {name: value / max(self.images, 1) for name, value in sums.items()}


class Training:
    """A run.

    Every random number is one of the seed, of the step and of the process. So a run that was interrupted goes on as if
    it had not been.

    Parameters
    ----------
    settings
        What determines it.
    source
        The images.
    device
        Where to train.

    Attributes
    ----------
    model
        The model.
    done
        Steps made.
    epochs
        What each epoch gave: loss and accuracy in training and in the test, and seconds of training.
    totals
        Of the current epoch.

    Raises
    ------
    TrainingError
        If there are fewer images than one batch takes, their sides do not fit the model, or processes can't share a
        batch.
    """

    def __init__(self, settings: Settings, source: Source, device: torch.device | str = "cpu") -> None:
        self.settings, self.source, self.device = settings, source, torch.device(device)
        if self.device.type == "cuda" and settings.precision == "float32":
            torch.backends.cudnn.allow_tf32 = False  # which PyTorch's convolutions would round to
        self.rank, self.processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.steps = size_of(source.train) // settings.batch
        if not self.steps:
            raise TrainingError(
                f"A batch of {settings.batch} is more than the {size_of(source.train)} images to train on."
            )
        sizes = settings.sizes(source.channels, source.classes)
        if source.side % sizes.least_side:
            raise TrainingError(
                f"The {settings.model} model needs sides that are multiples of {sizes.least_side}, and images of "
                f"{settings.data} have sides of {source.side} pixels."
            )
        share, rest = divmod(settings.batch, self.processes)
        if rest or share < 2:  # for the batch norms
            raise TrainingError(
                f"{self.processes} processes can't share a batch of {settings.batch}: each needs as many images, and "
                "at least 2."
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.model = self.make(sizes).to(self.device)
        self.network: nn.Module = self.model
        if dist.is_initialized():
            self.network = DistributedDataParallel(self.model)
        self.all_steps = settings.epochs * self.steps
        self.optimizer = optimizer(settings, self.model)
        self.scheduler = CosineAnnealingLR(self.optimizer, self.all_steps, eta_min=LEAST_RATE)
        self.done = 0
        self.epochs: list[dict[str, float]] = []
        self._begin_epoch()

    def make(self, sizes: Sizes) -> MDEQ:
        """The model."""
        return MDEQ(sizes, self.settings.solver(), self.settings.estimator())

    @property
    def pretraining_steps(self) -> int:
        """Steps without a solve."""
        return round(self.settings.pretraining * self.all_steps)

    def _begin_epoch(self) -> None:
        self.totals, self.wall, self.processor = Totals(), 0.0, 0.0
        self.batches = self._batches()

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """What is left of an epoch, for this process."""
        epoch, first = divmod(self.done, self.steps)
        order = torch.randperm(size_of(self.source.train), generator=self._random(ORDER, epoch))
        order = order[: self.steps * self.settings.batch].view(self.steps, self.processes, -1)
        return self.source.batches(
            self.source.train, order[first:, self.rank], lambda image: number(self.settings.seed, VIEWS, epoch, image)
        )

    def _random(self, *key: int) -> torch.Generator:
        """Random numbers of their own, for a purpose and a number."""
        return torch.Generator().manual_seed(number(self.settings.seed, *key))

    def _precision(self) -> AbstractContextManager[object]:
        if self.settings.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, getattr(torch, self.settings.precision))

    def step(self) -> None:
        """Train on the next batch of the epoch."""
        wall, processor = perf_counter(), process_time()
        images, labels = next(self.batches)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(number(self.settings.seed, STEP, self.done, self.rank))  # for dropout
            if self.settings.augment:
                images = self.source.augmented(images, torch.default_generator)
            images, labels = self.source.normalized(images.to(self.device)), labels.to(self.device)
            options: dict[str, Any] = PRETRAINING if self.done < self.pretraining_steps else {}
            self.network.train()
            with self._precision():
                logits = self.network(images, **options)
            loss = cross_entropy(logits.float(), labels)
            self.optimizer.zero_grad()
            loss.backward()
        self.done += 1
        self.totals.add(self.model, logits, labels, loss.item())
        self.totals.require_finite(self.done)
        self.optimizer.step()
        self.scheduler.step()
        self.wall += perf_counter() - wall
        self.processor += process_time() - processor

    @property
    def at_end_of_epoch(self) -> bool:
        """Whether the last step was the last of an epoch that is not in :attr:`epochs` yet."""
        return self.done == (len(self.epochs) + 1) * self.steps

    def end_epoch(self) -> None:
        """Test, and note what the epoch gave.

        Raises
        ------
        DivergedError
            If the loss in the test is not finite, or a residual is NaN.
        """
        tested = self.test()
        tested.require_finite(self.done)
        parts = {"train": self.totals.of_all_processes(self.device), "test": tested}
        found = {f"{part}/{name}": value for part, sums in parts.items() for name, value in sums.means().items()}
        self.epochs.append({**found, "seconds": self.wall, "processor_seconds": self.processor})
        self._begin_epoch()

    @torch.no_grad()
    def test(self) -> Totals:
        """The sums over the images of the test, in eval mode."""
        totals = Totals()
        self.model.eval()
        if dist.is_initialized():  # the means of batch norms are those of each process, and the first one's are saved
            for buffer in self.model.buffers():
                dist.broadcast(buffer, 0)
        mine = torch.arange(self.rank, size_of(self.source.test), self.processes)
        batches = mine.split(TEST_BATCH) if len(mine) else ()  # an empty tensor splits into an empty batch
        for images, labels in self.source.batches(self.source.test, batches):
            images, labels = self.source.normalized(images.to(self.device)), labels.to(self.device)
            with self._precision():
                logits = self.model(images)
            totals.add(self.model, logits, labels, cross_entropy(logits.float(), labels).item())
        return totals.of_all_processes(self.device)

    def gather(self) -> None:
        """Give the sums of all processes to the first one, whose state is saved."""
        totals = self.totals.of_all_processes(self.device)
        self.totals = totals if self.rank == 0 else Totals()

    def state(self) -> dict[str, Any]:
        """All that the next step depends on: tensors and plain Python."""
        return {
            "processes": self.processes,
            **{part: getattr(self, part).state_dict() for part in PARTS},
            **{name: getattr(self, name) for name in NUMBERS},
            "totals": asdict(self.totals),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state, of a run with the same settings.

        Raises
        ------
        TrainingError
            If it is one of another number of processes.
        """
        if state["processes"] != self.processes:
            raise TrainingError(
                f"The checkpoint is one of {state['processes']} processes, and {self.processes} would go on. Each "
                "has norms and random numbers of its own: start as many."
            )
        for part in PARTS:
            getattr(self, part).load_state_dict(state[part])
        for name in NUMBERS:
            setattr(self, name, state[name])
        self.totals = Totals(**state["totals"]) if self.rank == 0 else Totals()
        self.batches = self._batches()

    def save(self, file: IO[bytes]) -> None:
        """Write the state into a file."""
        torch.save(self.state(), file)

    def load(self, file: IO[bytes]) -> None:
        """Go on from the state in a file."""
        self.restore(torch.load(file, map_location=self.device, weights_only=True))


PARTS = "model", "optimizer", "scheduler"
NUMBERS = "done", "epochs", "wall", "processor"


def optimizer(settings: Settings, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a run. Adam has no weight decay."""
    if settings.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), settings.rate)
    nesterov = settings.optimizer == "nesterov"
    return torch.optim.SGD(
        model.parameters(), settings.rate, momentum=0.9, weight_decay=settings.decay, nesterov=nesterov
    )


def number(*key: int) -> int:
    """A seed for a key of integers."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
