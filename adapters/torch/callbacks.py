"""The layer of a :class:`Problem` with the user's own derivatives."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from implicit_core.arrays import H, Z
from implicit_core.backends.torch import BACKEND
from implicit_core.estimators import AtFixedPoint
from implicit_core.layer import LayerOptions, Watched, solver_point, told
from implicit_core.problem import Problem
from implicit_core.solution import Solution

from .autograd import has_tangents, transforming
from .compilation import never_compiled
from .precision import full_precision
from .tensors import Tensors, is_differentiable, tensors

ONLY_ONCE = (
    "a Problem's own callbacks can be differentiated only once, by loss.backward() or torch.autograd.grad without "
    "create_graph; torch.func and forward mode are not supported. For these, pass the plain function f, which autograd "
    "differentiates"
)
CLOSED_OVER = (
    "F closes over tensors that require a gradient, but a Problem's callbacks, and an estimator that is not Unroll, "
    "BPTT or an AtFixedPoint, give gradients to z alone: put these tensors in z, or pass the plain function f and one "
    "of these estimators"
)


def through_callbacks(problem: Problem[H, Z], h0: H, z: Z, options: LayerOptions) -> Solution[H]:
    """The layer, which the estimator's ``vjp`` differentiates once, with respect to z alone."""
    if transforming() or has_tangents(z):
        raise NotImplementedError(ONLY_ONCE)
    gradient, problem = options.gradient, problem.replace_f(BACKEND.protected(problem.f))
    leaves, structure = BACKEND.flatten(z, none_is_leaf=True)
    detached = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    z_in: Z = BACKEND.unflatten(structure, detached)
    with record_function("implicit_core.solve"):
        solution = solver_point(problem, h0, z_in, options)
    if options.examine is not None:
        options.examine(problem.f, solution.value)
    if not isinstance(gradient, AtFixedPoint):
        problem = problem.fixed_point_form(solution.value, z_in)
    if not torch.is_grad_enabled():
        without_graph = Watched(problem, gradient)
        value = gradient.value(without_graph.problem, solution.value, z_in)
        return without_graph.told(solution._replace(value=value), options)

    def checked(h: H, z: Z) -> H:
        value = problem.f(h, z)
        if has_tangents(value):
            raise NotImplementedError(ONLY_ONCE)
        if any(leaf.requires_grad for leaf in tensors(value)):
            raise ValueError(CLOSED_OVER)
        return value

    watched = Watched(problem.replace_f(checked), gradient)
    value, pull = gradient.vjp(watched.problem, solution.value, z_in)
    # One at the fixed point linearizes F at its value, which is the solver's point.
    norms = () if isinstance(gradient, AtFixedPoint) else watched.norms()
    solution = told(solution, options, problem, norms)
    outputs, h_structure = BACKEND.flatten(value)
    used = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def pullback(cotangents: Sequence[Tensor]) -> list[Tensor | None]:
        z_bar = pull(BACKEND.unflatten(h_structure, list(cotangents)))
        grads = BACKEND.flatten(z_bar, none_is_leaf=True)[0]
        return [grads[i] if is_differentiable(leaves[i]) else None for i in used]

    inputs = [leaves[i] for i in used]
    bound = _Pullback.apply(pullback, tuple(outputs), *inputs)  # type: ignore[no-untyped-call]  # torch's
    differentiable_value: H = BACKEND.unflatten(h_structure, list(bound))
    return solution._replace(value=differentiable_value)


@never_compiled
class _Pullback(torch.autograd.Function):
    """Known values, whose cotangents a given function pulls back to the inputs."""

    @staticmethod
    def forward(
        pullback: Callable[[Sequence[Tensor]], Sequence[Tensor | None]], values: Tensors, *inputs: Tensor
    ) -> Tensors:
        return tuple(value.clone() for value in values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        ctx.pullback = inputs[0]
        ctx.save_for_backward(*inputs[2:])  # for autograd's check that nobody has changed them since

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        # Not `once_differentiable`: torch.autograd.grad skips its error, and then returns a wrong result.
        if torch.is_grad_enabled():
            raise NotImplementedError(ONLY_ONCE)
        ctx.saved_tensors  # noqa: B018  # raises if one was changed
        with full_precision(cotangents[0]), record_function("implicit_core.backward"):
            return None, None, *ctx.pullback(cotangents)
