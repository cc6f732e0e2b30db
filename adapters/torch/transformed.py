"""The layer within a transform of ``torch.func``."""

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from implicit_core import checks
from implicit_core.arrays import H, PyTree, Z
from implicit_core.backends.torch import BACKEND
from implicit_core.estimators import AtFixedPoint, Unroll
from implicit_core.layer import LayerOptions, solver_point
from implicit_core.problem import Problem
from implicit_core.solution import Solution, Stats

from .autograd import has_tangents
from .closure import hoist, with_explicit_inputs
from .function import UNKNOWN_INPUTS, Rule, attach
from .identity import IdentityMap
from .problem import problem
from .random_state import RandomState
from .tensors import OnLeaves, Tensors, is_alive
from .values import BatchedF, on_values

RECOMPUTE = (
    "Unroll(recompute=True) uses torch.utils.checkpoint, which the transforms of torch.func do not support: use "
    "recompute=False with them"
)


def transformed(given: Problem[H, Z], h0: H, z: Z, options: LayerOptions) -> Solution[H]:
    """The solution, computed on values; its value is differentiable if the estimator is an :class:`AtFixedPoint`."""
    gradient = options.gradient
    if isinstance(gradient, Unroll) and gradient.recompute:
        raise NotImplementedError(RECOMPUTE)
    checks.state(BACKEND, "h0", h0, given.batch_ndim)
    leaves, structure = BACKEND.flatten(h0)
    with torch.no_grad():
        # Twice: a tensor that f makes at its first call and keeps, as a dropout mask, is closed over at the second.
        given.f(BACKEND.map(torch.clone, h0), z)
        random = RandomState(leaves)
        value, externals, _ = hoist(given.f, BACKEND.map(torch.clone, h0), z, is_alive)
    checks.like(BACKEND, "the result of f", value, h0, "h0")
    f = with_explicit_inputs(given.f, structure, z, externals, externals)
    if isinstance(gradient, AtFixedPoint):
        _check_inputs_known(f, leaves, externals)
    n = len(leaves)
    evaluations: list[int] = []

    def run(batched: BatchedF, values: Sequence[Tensor]) -> Tensors:
        by_external = IdentityMap(zip(externals, values[n:], strict=True))
        solution = solver_point(
            _on_trees(batched, structure, values[n:]),
            BACKEND.unflatten(structure, list(values[:n])),
            BACKEND.map(lambda x: by_external.get(x, x), z),
            options,
        )
        stats = solution.stats
        evaluations.append(stats.evaluations)
        trace = () if stats.trace is None else (stats.trace,)
        return *BACKEND.flatten(solution.value)[0], solution.status, stats.steps, stats.residual, *trace

    axes = (0,) * (n + 3) + (1,) * options.trace
    try:
        results = on_values(run, BatchedF(f, given.batch_ndim), n, (*leaves, *externals), axes)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        _check_inputs_known(f, leaves, externals)  # an unknown input is a tensor of the transform, which `run` met
        raise
    h, (status, steps, residual, *trace) = results[:n], results[n:]
    if isinstance(gradient, AtFixedPoint):
        h = attach(Rule(random.replay(f), gradient, structure, n, given.batch_ndim), h, (), externals)
    stats = Stats(steps, evaluations[0], residual, trace[0] if trace else None)
    point: H = BACKEND.unflatten(structure, list(h))
    return Solution(point, status, stats)


def _check_inputs_known(f: OnLeaves, h: Sequence[Tensor], externals: Sequence[Tensor]) -> None:
    """Check that F has no derivative other than in h and the externals."""
    with torch.enable_grad():
        values = f([x.detach() for x in h], [x.detach() for x in externals])
    if has_tangents(values) or any(x.requires_grad for x in values):
        raise NotImplementedError(UNKNOWN_INPUTS)


def _on_trees(batched: BatchedF, structure: Hashable, externals: Sequence[Tensor]) -> Problem[PyTree, PyTree]:
    """The problem of F with these externals."""
    return problem(
        lambda h, _: BACKEND.unflatten(structure, list(batched.f(BACKEND.flatten(h)[0], externals))),
        batch_ndim=batched.batch_ndim,
    )
