"""What is measured at a checkpoint: accuracy, and the gradient beside the gradient through all recursions."""

import copy
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import implicit_core as ic
from implicit_core.examples.recursive.training import loss_of, residual_of

from ..counting import counting
from .rungs import Rung, rungs
from .tasks import Examples, Model, Settings, Task
from .training import Training

CHUNK = 250


def checkpoint(task: Task, settings: Settings, name: str, training: Training, data: Any) -> dict[str, Any]:
    """All measurements at this moment of a run; the run is left as it is."""
    probe = Examples(*(x[: settings.batch] for x in next(iter(data.tests.values()))))
    watched = settings.test if training.done == settings.steps else settings.watched
    found = {
        "step": training.done,
        "seconds": training.wall,
        "processor_seconds": training.processor,
        "loss": training.mean_loss(),
        "tests": {key: accuracy(training, Examples(*(x[:watched] for x in test))) for key, test in data.tests.items()},
    }
    state = aged(training, probe)
    table = rungs(settings.recursions)
    reference = gradient_of(task, settings, table["full"], training, probe, state)
    # Along a run with the full gradient all estimates are compared at the same points.
    compared = task.main + task.rest if name == "full" else (name,)
    found["gradients"] = {
        key: compare(gradient_of(task, settings, table[key], training, probe, state), reference) for key in compared
    }
    return found


@torch.no_grad()
def accuracy(training: Training, test: Examples) -> dict[str, Any]:
    """Shares of examples, and of cells, that are right with the averaged weights.

    ``exact`` is after ``supervisions`` steps, ``exact_more`` and ``cells_more`` after ``tested``; ``relative`` is the
    median relative residual then.
    """
    settings = training.settings
    model: Model = training.average.module
    options = training.rung.options(training.residual)
    longer = test.inputs.shape[1] / training.train.inputs.shape[1]
    if longer > 1:  # as many recursions more
        options = {"solver": ic.steps(math.ceil(longer * settings.recursions)), "gradient": ic.OneStep()}
    marks, right = (settings.supervisions, settings.tested), torch.zeros(2, 2, dtype=torch.float64)
    residuals = []
    for inputs, targets in zip(*(x.split(CHUNK) for x in test), strict=True):
        state = model.start(inputs)
        for step in range(1, settings.tested + 1):
            logits, _, state = model(inputs, state, **options)
            for i in (i for i, mark in enumerate(marks) if step == mark):
                hits = logits.argmax(dim=-1) == targets
                right[i] += torch.stack([hits.all(dim=1).sum(), hits.double().mean(dim=1).sum()])
        residuals.append(model.layer.stats.relative)
    (exact, cells), (exact_more, cells_more) = (right / len(test.inputs)).tolist()
    relative = float(torch.cat(residuals).median())
    return {
        "exact": exact, "cells": cells, "exact_more": exact_more, "cells_more": cells_more, "relative": relative,
    }  # fmt: skip


@torch.no_grad()
def aged(training: Training, probe: Examples) -> Any:
    """The state of examples, of which the first has no step of supervision behind it, the second one, and so on."""
    settings = training.settings
    model = copy.deepcopy(training.model)
    age = torch.arange(len(probe.inputs)) % settings.supervisions
    state = model.start(probe.inputs)
    kept = state
    for step in range(1, settings.supervisions):
        state = model(probe.inputs, state, **training.rung.options(training.residual)).state
        due = age == step
        kept = tuple(torch.where(due.view(-1, *[1] * (h.ndim - 1)), new, h) for h, new in zip(kept, state, strict=True))
    return kept


class Gradient(NamedTuple):
    """A gradient and what it costs.

    Attributes
    ----------
    vector
        Of all parameters: float64 (n,).
    loss, relative
        The loss, and the median relative residual.
    evaluations, vjps
        Of the network.
    saved
        Bytes of tensors that are kept for the backward pass, parameters left out.
    grew
        Whether the terms of the estimate grew in an example.
    """

    vector: Tensor
    loss: float
    relative: float
    evaluations: int
    vjps: int
    saved: int
    grew: bool


def gradient_of(
    task: Task, settings: Settings, rung: Rung, training: Training, probe: Examples, state: Any
) -> Gradient:
    """The gradient of a rung at the parameters of a run, for examples in a state."""
    model = task.model(settings, rung).to(state[0].dtype)
    model.load_state_dict(training.model.state_dict())
    options = rung.options(training.residual)
    options["gradient"] = told(options["gradient"])
    with (
        counting(model.layer.cell.net) as counts,
        saved_bytes(model) as saved,
        warnings.catch_warnings(record=True) as warned,
    ):
        warnings.simplefilter("always")
        # A layer looks in its first call whether its cell couples examples, which is not a part of a step.
        model.layer.check = False
        loss = loss_of(model(probe.inputs, state, **options), probe.targets)
        loss.backward()
    grew = any(issubclass(w.category, ic.GrowingGradientWarning) for w in warned)
    vector = torch.cat([
        (torch.zeros_like(p) if p.grad is None else p.grad).flatten().double() for p in model.parameters()
    ])  # fmt: skip
    return Gradient(
        vector, float(loss.detach()), residual_of(model), counts.evaluations, counts.vjps, sum(saved.values()), grew
    )


def told(gradient: ic.Estimator) -> ic.Estimator:
    """An estimator that warns if its terms grow."""
    record: Any = gradient
    warning: ic.Estimator = replace(record, on_growth="warn") if hasattr(record, "on_growth") else gradient
    return warning


def compare(found: Gradient, reference: Gradient) -> dict[str, Any]:
    """Cosine and length of a gradient beside the one through all recursions, and its cost."""
    norm, full = found.vector.norm(), reference.vector.norm()
    record = {name: value for name, value in found._asdict().items() if name != "vector"}
    cosine, length = found.vector @ reference.vector / (norm * full), norm / full
    return {"cosine": float(cosine), "length": float(length), **record}


@contextmanager
def saved_bytes(model: Model) -> Iterator[dict[int, int]]:
    """The storages that autograd keeps, by address, without those of parameters: their bytes."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield found
