"""Computations on the values of tensors, within which no transform and no autodiff is active."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from implicit_core.arrays import PyTree

from .compilation import never_compiled
from .tensors import OnLeaves, Tensors


@dataclass(frozen=True)
class BatchedF:
    """F on leaves, and how many first axes of every leaf of h index independent samples; and the units of h."""

    f: OnLeaves
    batch_ndim: int
    scale: PyTree = None


Run = Callable[[BatchedF, Sequence[Tensor]], Tensors]


def on_values(
    run: Run, batched: BatchedF, states: int, tensors: Sequence[Tensor], axes: Sequence[int] | None = None
) -> Tensors:
    """``run(batched, tensors)`` on the values of ``tensors``: without derivatives, and outside of all transforms.

    So ``run`` may read numbers, as loops do. An axis of ``vmap`` becomes one of the batch (Decision 38).

    Parameters
    ----------
    run
        A function from tensors to tensors. Under ``vmap`` it gets an F whose batch has one more axis, the first.
    batched
        F.
    states
        How many of the tensors, the first, are shaped as leaves of h. The others are externals.
    tensors
        The arguments of ``run``.
    axes
        The first axis of the batch in each result; 0 if None.
    """
    values = [x.detach() for x in tensors]
    return tuple(_OnValues.apply(run, batched, states, axes, *values))  # type: ignore[no-untyped-call]  # torch's


@never_compiled
class _OnValues(torch.autograd.Function):
    @staticmethod
    def forward(run: Run, batched: BatchedF, states: int, axes: Sequence[int] | None, *tensors: Tensor) -> Tensors:
        return tuple(run(batched, tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def vmap(
        info: Any,
        dims: tuple[int | None, ...],
        run: Run,
        batched: BatchedF,
        states: int,
        axes: Sequence[int] | None,
        *tensors: Tensor,
    ) -> tuple[Tensors, tuple[int, ...]]:
        dims = dims[4:]
        h = [
            x.movedim(dim, 0) if dim is not None else x.expand(info.batch_size, *x.shape).contiguous()
            for x, dim in zip(tensors[:states], dims[:states], strict=True)
        ]

        def f(h: Sequence[Tensor], externals: Sequence[Tensor]) -> Tensors:
            mapped = torch.vmap(batched.f, in_dims=((0,) * len(h), dims[states:]), randomness=info.randomness)
            return tuple(mapped(tuple(h), tuple(externals)))

        one_more = replace(batched, f=f, batch_ndim=batched.batch_ndim + 1)
        results = on_values(run, one_more, states, (*h, *tensors[states:]), axes)
        return results, (0,) * len(results) if axes is None else tuple(axes)
