"""The layer within a transform of ``torch.func``."""

from collections.abc import Hashable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from implicit_core import checks
from implicit_core.arrays import H, PyTree, Z
from implicit_core.backends.torch import BACKEND
from implicit_core.estimators import BPTT, AtFixedPoint, Unroll
from implicit_core.layer import LayerOptions, check_for_throw, solver_point
from implicit_core.problem import Problem
from implicit_core.root_problem import RootProblem
from implicit_core.settings import arrays_in
from implicit_core.solution import Solution, Stats
from implicit_core.solvers.bracketing import Bracketing

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
THROW = (
    "throw=True with an estimator that starts from h0 reads the status of its value, which torch.vmap may not allow: "
    "call raise_for_status outside of the transforms of torch.func"
)
SETTINGS = (
    "{name} of {kind} is a tensor that was made within a transform of torch.func, or is mapped or differentiated by "
    "one, which only the lam of Unroll can be: write a number, or call the layer once for each"
)


def transformed(given: Problem[H, Z], h0: H, z: Z, options: LayerOptions) -> tuple[Solution[H], Problem[H, Z]]:
    """The solution, computed on values; its value is differentiable if the estimator is an :class:`AtFixedPoint`.

    Also returns the problem that estimators differentiate: for a root, F(x) = x - α g(x).
    """
    gradient = options.gradient
    _check_settings(options)
    if isinstance(gradient, Unroll) and gradient.recompute:
        raise NotImplementedError(RECOMPUTE)
    if options.throw and gradient.starts_from_h0:
        raise NotImplementedError(THROW)
    checks.state(BACKEND, given.names.start, h0, given.batch_ndim)
    if isinstance(options.solver, Bracketing):  # whose brackets do not have the axis that is mapped
        options.solver.ends(given.space(h0, given.names.start))
    leaves, structure = BACKEND.flatten(h0)
    with BACKEND.solving():
        # Twice: a tensor that f makes at its first call and keeps, as a dropout mask, is closed over at the second.
        given.f(BACKEND.map(torch.clone, h0), z)
        random = RandomState(leaves, given.f, z)
        value, externals = hoist(given.f, BACKEND.map(torch.clone, h0), z, is_alive)[:2]
    checks.like(BACKEND, f"the result of {given.names.function}", value, h0, given.names.start)
    f = with_explicit_inputs(given.f, structure, z, externals, externals)
    if isinstance(gradient, AtFixedPoint):
        _check_inputs_known(f, leaves, externals)
    n = len(leaves)
    evaluations, tells = list[int](), list[bool]()
    is_root = isinstance(given, RootProblem)

    def run(batched: BatchedF, values: Sequence[Tensor]) -> Tensors:
        by_external = IdentityMap(zip(externals, values[n:], strict=True))
        problem, z_in = _on_trees(batched, structure, values[n:]), BACKEND.map(lambda x: by_external.get(x, x), z)
        factors: Sequence[Tensor] = ()
        if isinstance(given, RootProblem):
            problem = root = given.about(problem)
        start = BACKEND.unflatten(structure, list(values[:n]))
        solution = solver_point(problem, start, z_in, options, measured=options.throw)
        if is_root:
            factors = BACKEND.flatten(root.factors(solution.value, z_in, relaxed=gradient.relaxes))[0]
        if options.throw:  # of the solver's point, since a status can be read here and not within a vmap
            check_for_throw(solution, options.solver)
        stats = solution.stats
        evaluations.append(stats.evaluations)
        told = [x for x in (stats.relative, stats.tolerance) if x is not None]
        tells.append(len(told) == 2)  # somebody else's solver may not
        told = told if tells[0] else 2 * [stats.residual]
        trace = () if stats.trace is None else (stats.trace,)
        leaves = BACKEND.flatten(solution.value)[0]
        return *leaves, *factors, solution.status, stats.steps, stats.residual, *told, *trace

    axes = (0,) * (n + n * is_root + 5) + (1,) * options.trace
    try:
        results = on_values(run, BatchedF(f, given.batch_ndim, given.scale), n, (*leaves, *externals), axes)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        _check_inputs_known(f, leaves, externals)  # an unknown input is a tensor of the transform, which `run` met
        raise
    h, factors, told = results[:n], results[n : n + n * is_root], results[n + n * is_root :]
    status, steps, residual, relative, tolerance, *trace = told
    if isinstance(gradient, AtFixedPoint):
        rule = Rule(_relaxed(random.replay(f), len(factors)), gradient, structure, n, given.batch_ndim)
        h = attach(replace(rule, scale=given.scale), h, (), (*externals, *factors))
    stats = Stats(steps, evaluations[0], residual, trace[0] if trace else None)
    if tells[0]:
        stats = stats._replace(relative=relative, tolerance=tolerance)
    point: H = BACKEND.unflatten(structure, list(h))
    form = given.with_factors(BACKEND.unflatten(structure, list(factors))) if isinstance(given, RootProblem) else given
    return Solution(point, status, stats), form


def _relaxed(f: OnLeaves, n: int) -> OnLeaves:
    """F of a root on leaves, h - factors g, where the last n externals are the factors; F itself if there are none."""
    if not n:
        return f

    def relaxed(h: Sequence[Tensor], externals: Sequence[Tensor]) -> Tensors:
        g = f(h, externals[:-n])
        return tuple(x - factor * y for x, factor, y in zip(h, externals[-n:], g, strict=True))

    return relaxed


def _check_settings(options: LayerOptions) -> None:
    """Check that no transform has wrapped a setting that is used outside of all transforms, on values."""
    for record in (options.solver, options.gradient):
        for name, array in arrays_in(record):
            if BACKEND.is_array(array) and BACKEND.is_wrapped(array) and not isinstance(record, (Unroll, BPTT)):
                raise NotImplementedError(SETTINGS.format(name=name, kind=type(record).__name__))


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
        scale=batched.scale,
    )
