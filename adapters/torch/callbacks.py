"""The layer of a :class:`Problem` with derivatives of the user's own."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from implicit_core.backends.torch import BACKEND
from implicit_core.estimators import Estimator
from implicit_core.fixed_point import solver_point
from implicit_core.problem import Problem
from implicit_core.solution import Solution

from .function import transforming
from .precision import full_precision
from .problem import has_tangents, moves

PyTree = Any

ONCE = (
    "a Problem's own callbacks are differentiated by loss.backward() or torch.autograd.grad, once, without "
    "create_graph, torch.func and forward mode: pass the plain function f, whose derivatives autograd knows"
)
CLOSED = (
    "F closes over tensors that require a gradient, but a Problem's callbacks, and an estimator that is neither Unroll "
    "nor BPTT nor an AtFixedPoint, give gradients to z alone: put these tensors in z, or pass the plain function f and "
    "one of these estimators"
)


def through_callbacks(
    problem: Problem, h0: PyTree, z: PyTree, gradient: Estimator, options: dict[str, Any]
) -> Solution:
    """The layer, differentiated once, in z alone, by the callbacks."""
    if transforming() or has_tangents(z):
        raise NotImplementedError(ONCE)
    leaves, structure = BACKEND.flatten_with_none(z)
    moving = [i for i, leaf in enumerate(leaves) if moves(leaf)]
    detached = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    z_in = BACKEND.unflatten(structure, detached)
    solution = solver_point(problem, h0, z_in, **options)
    if not torch.is_grad_enabled():
        return solution._replace(value=gradient.value(problem, solution.value, z_in))

    def closed(h: PyTree, z: PyTree) -> PyTree:
        value = problem.f(h, z)
        if has_tangents(value):
            raise NotImplementedError(ONCE)
        if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in BACKEND.flatten(value)[0]):
            raise ValueError(CLOSED)
        return value

    value, pull = gradient.vjp(problem.replace_f(closed), solution.value, z_in)
    outputs, h_structure = BACKEND.flatten(value)

    def pullback(cotangents: list[Tensor]) -> list[Tensor | None]:
        grads = BACKEND.flatten_with_none(pull(BACKEND.unflatten(h_structure, cotangents)))[0]
        return [grads[i] for i in moving]

    bound = _with_pullback(pullback, outputs, [leaves[i] for i in moving])
    return solution._replace(value=BACKEND.unflatten(h_structure, bound))


def _with_pullback(
    pullback: Callable[[list[Tensor]], Sequence[Tensor | None]], values: Sequence[Tensor], inputs: Sequence[Tensor]
) -> list[Tensor]:
    """``values``, as functions of ``inputs`` whose cotangents are ``pullback`` of their own."""
    return list(_Pullback.apply(pullback, tuple(values), *inputs))  # type: ignore[no-untyped-call]  # torch's


class _Pullback(torch.autograd.Function):
    """Known values whose gradient with respect to the inputs is a given function of the cotangents."""

    @staticmethod
    def forward(pullback: Callable[..., Any], values: tuple[Tensor, ...], *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(value.clone() for value in values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.pullback = inputs[0]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        # Not `once_differentiable`: its error is skipped by torch.autograd.grad, which then returns a wrong result.
        if torch.is_grad_enabled():
            raise NotImplementedError(ONCE)
        with full_precision(cotangents[0]):
            return None, None, *ctx.pullback(list(cotangents))
