"""The differences between the frameworks: how arrays are made, and how a function is differentiated."""

from collections.abc import Callable
from typing import Any, NamedTuple

import implicit_core as ic

from .data import Data, Floats, Samples
from .model import Regression, cross_entropy


class Evaluation(NamedTuple):
    """The validation loss, its gradient in θ, the weights of the inner solution, and evaluations of F in the solve."""

    loss: float
    gradient: Floats
    weights: Floats
    evaluations: int


Function = Callable[[Any, Any], tuple[Any, ic.Solution[Any]]]
Evaluate = Callable[[Floats, Floats], Evaluation]


def validation_loss(data: Data, solver: Any, gradient: ic.Estimator) -> Function:
    """``(theta, w0) -> (V, solution)``: solve the inner problem from w0, and evaluate the loss V at its solution."""

    def function(theta: Any, w0: Any) -> tuple[Any, ic.Solution[Any]]:
        solution = ic.fixed_point(data.training.step, w0, theta, solver=solver, gradient=gradient, batch_ndim=0)
        return cross_entropy(solution.value, *data.validation), solution

    return function


def with_torch(data: Data, solver: Any, gradient: ic.Estimator) -> Evaluate:
    """``(theta, w0) -> Evaluation`` by PyTorch's autograd."""
    import torch

    function = validation_loss(_converted(data, torch.asarray), solver, gradient)

    def evaluate(theta: Floats, w0: Floats) -> Evaluation:
        hyperparameters = torch.tensor(theta, requires_grad=True)
        loss, solution = function(hyperparameters, torch.asarray(w0))
        (found,) = torch.autograd.grad(loss, hyperparameters)
        return Evaluation(loss.item(), found.numpy(), solution.value.detach().numpy(), int(solution.stats.evaluations))

    return evaluate


def with_jax(data: Data, solver: Any, gradient: ic.Estimator) -> Evaluate:
    """``(theta, w0) -> Evaluation`` by ``jax.grad``, compiled, in float64."""
    import jax
    import numpy as np

    with jax.enable_x64(True):
        function = validation_loss(_converted(data, jax.numpy.asarray), solver, gradient)
        compiled = jax.jit(jax.value_and_grad(function, has_aux=True))

    def evaluate(theta: Floats, w0: Floats) -> Evaluation:
        with jax.enable_x64(True):
            (loss, solution), found = compiled(theta, w0)
        return Evaluation(float(loss), np.asarray(found), np.asarray(solution.value), int(solution.stats.evaluations))

    return evaluate


FRAMEWORKS: dict[str, Callable[[Data, Any, ic.Estimator], Evaluate]] = {"torch": with_torch, "jax": with_jax}


def _converted(data: Data, array: Callable[[Floats], Any]) -> Data:
    training, validation, test = data
    return Data(
        Regression(array(training.x), array(training.y), training.curvature),
        Samples(*map(array, validation)),
        Samples(*map(array, test)),
    )
