"""The classifier in PyTorch: a differentiable layer, and ``loss.backward()``."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import implicit_core as ic

from .model import CONTRACTION, LEARNING_RATE, MOMENTUM, SOLVER, Array, Counts, Parameters


def f(h: Tensor, z: dict[str, Tensor]) -> Tensor:
    """The equilibrium map tanh(W h + U x + b) for a batch of states (n, width)."""
    return torch.tanh(h @ z["W"].T + z["x"] @ z["U"].T + z["b"])


class TorchModel:
    """The classifier, trained with one estimator.

    Parameters
    ----------
    parameters
        Initial values; not changed.
    estimator
        How cotangents of the fixed point reach W, U and b.
    """

    def __init__(self, parameters: Parameters, estimator: ic.Estimator) -> None:
        self.counts = Counts()
        self._parameters = {name: torch.tensor(value, requires_grad=True) for name, value in parameters.items()}
        self._optimizer = torch.optim.SGD(list(self._parameters.values()), lr=LEARNING_RATE, momentum=MOMENTUM)
        self._estimator = estimator

    def parameters(self) -> Parameters:
        """See :class:`Model`."""
        return {name: value.detach().numpy() for name, value in self._parameters.items()}

    def train_step(self, images: Array, labels: Array) -> float:
        """See :class:`Model`."""
        logits, solution = self._logits(images, self._counted)
        loss = cross_entropy(logits, torch.from_numpy(labels))
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        with torch.no_grad():
            w = self._parameters["W"]
            w *= (CONTRACTION / torch.linalg.matrix_norm(w, 2)).clamp(max=1.0)
        self.counts.solve_evaluations += solution.stats.evaluations
        self.counts.solved(solution)
        return loss.item()

    def count(self, images: Array, labels: Array) -> None:
        """See :class:`Model`: the step counts itself."""

    def gradient(self, images: Array, labels: Array) -> Parameters:
        """See :class:`Model`."""
        logits, _ = self._logits(images, f)
        loss = cross_entropy(logits, torch.from_numpy(labels))
        gradients = torch.autograd.grad(loss, list(self._parameters.values()))
        return {name: value.numpy() for name, value in zip(self._parameters, gradients, strict=True)}

    def predict(self, images: Array) -> Array:
        """See :class:`Model`."""
        with torch.no_grad():
            logits, solution = self._logits(images, f)
        self.counts.solved(solution)
        return logits.argmax(dim=1).numpy()

    def _logits(
        self, images: Array, equilibrium_map: ic.problem.Map[Tensor, dict[str, Tensor]]
    ) -> tuple[Tensor, ic.Solution[Tensor]]:
        p = self._parameters
        z = {"W": p["W"], "U": p["U"], "b": p["b"], "x": torch.from_numpy(images)}
        h0 = torch.zeros(len(images), len(p["b"]))
        solution = ic.fixed_point(equilibrium_map, h0, z, solver=SOLVER, gradient=self._estimator, batch_ndim=1)
        return solution.value @ p["V"].T + p["c"], solution

    def _counted(self, h: Tensor, z: dict[str, Tensor]) -> Tensor:
        self.counts.evaluations += 1
        value = f(h, z)
        if not value.requires_grad:
            return value
        counted: Tensor = CountVJPs.apply(value, self.counts)  # type: ignore[no-untyped-call]  # torch's
        return counted


class CountVJPs(torch.autograd.Function):
    """The identity, which counts the cotangents that pass it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, counts: Counts) -> Tensor:
        """See the class."""
        ctx.counts = counts
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None]:
        """See the class."""
        ctx.counts.vjps += 1
        return cotangent, None
