"""The differentiable layer on tensors."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from implicit_core import checks
from implicit_core.backends.torch import BACKEND
from implicit_core.estimators import BPTT, AtFixedPoint, Estimator, Unroll
from implicit_core.fixed_point import solver_point, with_aux
from implicit_core.problem import Map, Problem
from implicit_core.solution import Solution, Stats
from implicit_core.solve import as_problem
from implicit_core.solvers import Anderson

from .callbacks import CLOSED, through_callbacks
from .closure import Tensors, has_storage, hoist, is_alive, pure, tensors
from .frontier import frontier
from .function import HIDDEN, PLAIN_FORWARD, Rule, attach, on_values, transforming
from .precision import autocasted, full_precision, within_reach
from .problem import AutogradProblem, as_leaf, edges, has_tangents, problem, vector_jacobian

PyTree = Any
RECOMPUTE = (
    "Unroll(recompute=True) frees a graph by torch.utils.checkpoint, which the transforms of torch.func don't support: "
    "take recompute=False there"
)


def fixed_point(
    f: Problem | Map,
    h0: PyTree,
    z: PyTree,
    *,
    solver: Any = Anderson(),
    gradient: Estimator = Unroll(k=5, lam=0.5),
    batch_ndim: int | None = None,
    throw: bool = False,
    trace: bool = False,
    has_aux: bool = False,
) -> Solution:
    """The layer on tensors; parameters and result as for :func:`implicit_core.fixed_point`.

    For a plain f, or ``problem(f)``, the output carries the graph of the k damped steps (:class:`Unroll`,
    :class:`BPTT`), or of one F at the solver's point, whose incoming cotangent the estimator replaces: z and all that f
    closes over get gradients. Derivatives of every order are there, by ``create_graph`` and by the transforms of
    ``torch.func``, vmap included; for :class:`Neumann` and :class:`Unroll` they are those of the surrogate, with the
    surrogate as the derivative of the fixed point itself. A :class:`Problem` with callbacks of its own is
    differentiated with these: once, in z alone.

    Under autocast F runs as it would by itself, forward and backward; the state keeps its dtype, and solvers and
    estimators compute in it.

    Raises
    ------
    ValueError
        If F of such a Problem closes over tensors that require a gradient, which they would not get. (Where the Problem
        has ``linearize``, its f is not called, and this can't be seen.)
    NotImplementedError
        For a derivative that is not available; there is no silent zero.

    Examples
    --------
    >>> import torch
    >>> from implicit_core.adapters import torch as ict
    >>> z = torch.tensor([0.3, -0.1], requires_grad=True)
    >>> ict.fixed_point(lambda h, z: torch.tanh(0.5 * h + z), torch.zeros(2), z).value.sum().backward()
    >>> z.grad.shape
    torch.Size([2])
    """
    if torch.compiler.is_compiling():  # the solve's loop depends on data: one graph break here instead of many below
        solution: Solution = torch.compiler.disable(fixed_point)(
            f,
            h0,
            z,
            solver=solver,
            gradient=gradient,
            batch_ndim=batch_ndim,
            throw=throw,
            trace=trace,
            has_aux=has_aux,
        )
        return solution
    checks.instance("gradient", gradient, Estimator, "Unroll(k=5, lam=0.5)")
    options = {"gradient": gradient, "solver": solver, "throw": throw, "trace": trace}
    if has_aux:
        return with_aux(fixed_point, f, h0, z, {**options, "batch_ndim": batch_ndim})
    given = as_problem(f, batch_ndim)
    own = isinstance(f, Problem) and not isinstance(f, AutogradProblem)
    plain = given if own else problem(autocasted(given.f, h0), batch_ndim=given.batch_ndim)
    gradient = gradient if own else within_reach(gradient, h0)
    options["gradient"] = gradient
    if own or not (isinstance(gradient, AtFixedPoint) or type(gradient) in (Unroll, BPTT)):
        with full_precision(h0):
            if not own and torch.is_grad_enabled():
                _check_all_in_z(plain, h0, z)
            return through_callbacks(plain, h0, z, gradient, options)
    with full_precision(h0):
        if transforming():
            return _transformed(plain, h0, z, gradient, options)
        solution = solver_point(plain, h0, z, **options)
        if not isinstance(gradient, AtFixedPoint):
            value = _unrolled(plain, solution.value, z, gradient)
        elif torch.is_grad_enabled() or _in_dual_level():
            value = _at_fixed_point(plain, solution.value, z, gradient)
        else:
            value = solution.value
    return solution._replace(value=value)


def _unrolled(problem: Problem, h: PyTree, z: PyTree, gradient: Estimator) -> PyTree:
    """A plain graph of the k steps."""
    if isinstance(gradient, Unroll) and gradient.recompute:
        recomputed = problem.replace_f(lambda h, z: checkpoint(problem.f, h, z, use_reentrant=False))
        return gradient.value(recomputed, h, z)
    value = gradient.value(problem, h, z)
    # Undamped, it may be what f returned: z itself, say, or a buffer of f's.
    if isinstance(gradient, BPTT) or (isinstance(gradient, Unroll) and gradient.lam == 1.0):
        value = BACKEND.map(torch.clone, value)
    return value


def _at_fixed_point(problem: Problem, h: PyTree, z: PyTree, gradient: AtFixedPoint) -> PyTree:
    """The point h, with the graph of one F, whose cotangent the estimator replaces."""
    h_leaves, structure = BACKEND.flatten(h)
    h_in = tuple(as_leaf(x) for x in h_leaves)
    with torch.enable_grad():
        once = hoist(problem.f, BACKEND.unflatten(structure, list(h_in)), z, has_storage)
    checks.like(BACKEND, "the result of f", once.value, h, "h0")
    outputs = tuple(BACKEND.flatten(once.value)[0])
    if has_tangents(once.value):
        raise NotImplementedError(PLAIN_FORWARD)
    beginnings = frontier(once, outputs, h_in, tensors(z))
    if beginnings is None:
        return h
    externals, hidden = beginnings
    f, ends = pure(problem.f, structure, z, once.externals, externals), edges(outputs)

    def vjp_h(*v: Tensor) -> list[Tensor]:
        return vector_jacobian(ends, h_in, v)

    rule = Rule(f, gradient, structure, problem.batch_ndim, vjp_h, hidden)
    return BACKEND.unflatten(structure, list(attach(rule, h_leaves, outputs, externals)))


def _in_dual_level() -> bool:
    """Whether tangents may be about, so that F has to be asked."""
    try:
        forward_ad.make_dual(torch.zeros(()), torch.zeros(()))
    except RuntimeError:
        return False
    return True


def _transformed(problem: Problem, h0: PyTree, z: PyTree, gradient: Estimator, options: dict[str, Any]) -> Solution:
    """The layer within ``torch.func``: a solve on values, then what the estimator makes of its point."""
    if isinstance(gradient, Unroll) and gradient.recompute:
        raise NotImplementedError(RECOMPUTE)
    checks.state(BACKEND, "h0", h0, problem.batch_ndim)
    leaves, structure = BACKEND.flatten(h0)
    with torch.no_grad():
        # Twice: what f makes once and keeps, as a dropout mask, is an external by then.
        problem.f(BACKEND.map(torch.clone, h0), z)
        value, externals, _ = hoist(problem.f, BACKEND.map(torch.clone, h0), z, is_alive)
    checks.like(BACKEND, "the result of f", value, h0, "h0")
    rule = Rule(pure(problem.f, structure, z, externals, externals), gradient, structure, problem.batch_ndim)
    if isinstance(gradient, AtFixedPoint):
        _check_nothing_is_hidden(rule, leaves, externals)
    n = len(leaves)
    evaluations: list[Any] = []

    def run(rule: Rule, values: Sequence[Tensor]) -> Tensors:
        by_id = {id(old): x for old, x in zip(externals, values[n:], strict=True)}
        solution = solver_point(
            _on_trees(rule, values[n:]),
            BACKEND.unflatten(structure, list(values[:n])),
            BACKEND.map(lambda x: by_id.get(id(x), x), z),
            **options,
        )
        stats = solution.stats
        evaluations.append(stats.evaluations)
        trace = () if stats.trace is None else (stats.trace,)
        return *BACKEND.flatten(solution.value)[0], solution.status, stats.steps, stats.residual, *trace

    axes = (0,) * (n + 3) + (1,) * options["trace"]
    try:
        results = on_values(run, rule, n, (*leaves, *externals), axes)
    except RuntimeError:
        _check_nothing_is_hidden(rule, leaves, externals)  # then values of a transform have got into the solve
        raise
    status, steps, residual, *trace = results[n:]
    h = results[:n]
    if isinstance(gradient, AtFixedPoint):
        h = attach(rule, h, (), externals)
    value = BACKEND.unflatten(structure, list(h))
    if not isinstance(gradient, AtFixedPoint):
        value = _unrolled(problem, value, z, gradient)
    return Solution(value, status, Stats(steps, evaluations[0], residual, trace[0] if trace else None))


def _check_all_in_z(problem: Problem, h0: PyTree, z: PyTree) -> None:
    """For an estimator whose own ``vjp`` gives the gradients, which are in z alone."""
    with torch.no_grad():
        seen = hoist(problem.f, BACKEND.map(torch.clone, h0), z, has_storage).externals
    explicit = {id(x) for x in tensors(z)}
    if any(x.requires_grad and id(x) not in explicit for x in seen):
        raise ValueError(CLOSED)


def _check_nothing_is_hidden(rule: Rule, h: Sequence[Tensor], externals: Sequence[Tensor]) -> None:
    """Without derivatives of what F was seen to be a function of, it has none."""
    with torch.enable_grad():
        values = rule.f([x.detach() for x in h], [x.detach() for x in externals])
    if has_tangents(values) or any(x.requires_grad for x in values):
        raise NotImplementedError(HIDDEN)


def _on_trees(rule: Rule, externals: Sequence[Tensor]) -> Problem:
    return problem(
        lambda h, _: BACKEND.unflatten(rule.structure, list(rule.f(BACKEND.flatten(h)[0], externals))),
        batch_ndim=rule.batch_ndim,
    )
