"""Gradients beside the exact one, at a moment of a training, which is left as it is."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import implicit_core as ic
from implicit_core.examples.mdeq.model import MDEQ
from implicit_core.examples.mdeq.source import size_of
from implicit_core.examples.mdeq.training import COMPARED, Training, number

BATCHES = 4
"""Batches of the test set."""
PRODUCTS = 500
"""Of the reference, at most. Behind a solve that did not converge the systems are close to singular: on CIFAR-10, 120
products left gradients that had nothing to do with the exact one."""


def exact(report: Callable[[Tensor], None] | None = None) -> ic.Estimator:
    """The reference: the exact gradient to a relative residual of 1e-4, or as close as the products lead."""
    return ic.Implicit(ic.GMRES(rtol=1e-4, restart=PRODUCTS), products=PRODUCTS, report=report)


def estimators(training: Training) -> Mapping[str, ic.Estimator]:
    """What is compared."""
    return {
        "upg-5-0.5": ic.Unroll(5, 0.5, on_growth="ignore"),
        "npg-5-0.5": ic.Neumann(5, 0.5, on_growth="ignore"),
        "one-step": ic.OneStep(),
        "implicit": training.settings.estimator(),
    }


def compare(training: Training) -> dict[str, Any]:
    """Cosine with the exact gradient, and length beside it, for each batch.

    The gradients are those of the cell's and the encoder's parameters, which pass through the implicit layer. All are
    taken at the same dropout masks, and so at the same point of the solver, in training mode.

    One sample whose system the products do not solve may decide the reference of its batch. So the largest relative
    residual of the reference tells whether it is the exact gradient, and the median does not.
    """
    size = training.settings.batch
    rows = torch.arange(min(BATCHES * size, size_of(training.source.test))).split(size)
    found: dict[str, Any] = {name: {"cosine": [], "length": []} for name in estimators(training)}
    residuals, adjoint_residuals = [], []
    for index, (images, labels) in enumerate(training.source.batches(training.source.test, rows)):
        images = training.source.normalized(images.to(training.device))
        given = images, labels.to(training.device), number(training.settings.seed, COMPARED, training.done, index)
        reference, residual = gradient(training.model, exact(adjoint_residuals.append), *given)
        residuals.append(residual)
        for name, estimator in estimators(training).items():
            vector, _ = gradient(training.model, estimator, *given)
            norms = vector.norm(), reference.norm()
            found[name]["cosine"].append(float(vector @ reference / (norms[0] * norms[1])))
            found[name]["length"].append(float(norms[0] / norms[1]))
    return {
        "gradients": found,
        "residual": residuals,
        "adjoint_residual": [float(relative.median()) for relative in adjoint_residuals],
        "largest_adjoint_residual": [float(relative.max()) for relative in adjoint_residuals],
    }


def gradient(model: MDEQ, estimator: ic.Estimator, images: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, float]:
    """The gradient of all parameters that the implicit layer has a part in, (n,), and the median relative residual."""
    model = copy.deepcopy(model).train()  # batch norms count their calls
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        loss = cross_entropy(model(images, gradient=estimator), labels)
    leaves = [*model.encoder.parameters(), *model.layer.parameters()]
    parts = torch.autograd.grad(loss, leaves)
    assert model.layer.stats is not None
    return torch.cat([x.flatten().double() for x in parts]), float(model.layer.stats.relative.median())
