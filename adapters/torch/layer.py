"""The differentiable layer on tensors."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import get_gradient_edge
from torch.utils.checkpoint import checkpoint

from implicit_core import checks
from implicit_core.backends.torch import BACKEND
from implicit_core.estimators import AtFixedPoint, Estimator, Unroll
from implicit_core.fixed_point import solver_point
from implicit_core.problem import Map, Problem
from implicit_core.solution import Solution
from implicit_core.solve import as_problem
from implicit_core.solvers import Anderson

from .problem import AutogradProblem, as_leaf, moves, problem, vector_jacobian

PyTree = Any

NO_SECOND_DERIVATIVE = (
    "a derivative of this gradient is not available (create_graph=True): neither for an estimator at the fixed point "
    "nor through a Problem's own callbacks; Unroll and BPTT on a plain function have derivatives of every order"
)
NO_TRANSFORM = (
    "this estimator is differentiated by loss.backward() or torch.autograd.grad; forward mode and the transforms of "
    "torch.func differentiate Unroll(k, lam), without recompute, and BPTT(k), of a plain function"
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
) -> Solution:
    """The layer on tensors; parameters and result as for :func:`implicit_core.fixed_point`.

    For a plain f, or ``problem(f)``, the output carries the graph of the k damped steps (:class:`Unroll`,
    :class:`BPTT`), or of one F at the solver's point, whose incoming cotangent the estimator replaces: z and all that f
    closes over get gradients, once, or any number of times through the k steps. A :class:`Problem` with callbacks of
    its own is differentiated with these, in z alone.

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
    checks.instance("gradient", gradient, Estimator, "Unroll(k=5, lam=0.5)")
    options = {"gradient": gradient, "solver": solver, "throw": throw, "trace": trace}
    given = as_problem(f, batch_ndim)
    if isinstance(f, Problem) and not isinstance(f, AutogradProblem):
        return _through_callbacks(given, h0, z, gradient, options)
    plain = problem(given.f, batch_ndim=given.batch_ndim)
    solution = solver_point(plain, h0, z, **options)
    if isinstance(gradient, AtFixedPoint) and (torch.is_grad_enabled() or _has_tangents(z)):
        value = _through_one_step(plain, solution.value, z, gradient)
    elif isinstance(gradient, Unroll) and gradient.recompute:
        recomputed = plain.replace_f(lambda h, z: checkpoint(plain.f, h, z, use_reentrant=False))
        value = gradient.value(recomputed, solution.value, z)
    else:
        value = gradient.value(plain, solution.value, z)
        if getattr(gradient, "lam", 1.0) == 1.0:  # then it may be what f returned: z itself, say, or a buffer of f's
            value = BACKEND.map(torch.clone, value)
    return solution._replace(value=value)


def _has_tangents(z: PyTree) -> bool:
    leaves = BACKEND.flatten(z)[0]
    return any(isinstance(leaf, Tensor) and forward_ad.unpack_dual(leaf).tangent is not None for leaf in leaves)


def _through_one_step(problem: Problem, h: PyTree, z: PyTree, gradient: AtFixedPoint) -> PyTree:
    h_leaves, structure = BACKEND.flatten(h)
    try:
        h_in = tuple(as_leaf(x) for x in h_leaves)
    except RuntimeError as error:  # within a transform of torch.func
        raise NotImplementedError(NO_TRANSFORM) from error
    with torch.enable_grad():
        value = problem.f(BACKEND.unflatten(structure, list(h_in)), z)
    checks.like(BACKEND, "the result of f", value, h, "h0")
    outputs = tuple(BACKEND.flatten(value)[0])
    if _has_tangents(value):
        raise NotImplementedError(NO_TRANSFORM)
    if not _reaches_beyond(outputs, h_in):
        return h

    def replace(cotangents: list[Tensor]) -> list[Tensor]:
        def vjp_h(v: PyTree) -> PyTree:
            return BACKEND.unflatten(structure, vector_jacobian(outputs, h_in, BACKEND.flatten(v)[0]))

        w = gradient.inverse(vjp_h, BACKEND.unflatten(structure, cotangents), problem.batch_ndim)
        return list(BACKEND.flatten(w)[0])

    return BACKEND.unflatten(structure, _with_pullback(replace, h_leaves, outputs))


def _reaches_beyond(outputs: Sequence[Tensor], h_in: Sequence[Tensor]) -> bool:
    """Whether the graph of ``outputs`` begins anywhere but at ``h_in``: whether there is anything to differentiate."""
    own = {get_gradient_edge(leaf).node for leaf in h_in}
    pending = [out.grad_fn for out in outputs if out.grad_fn is not None]
    seen = set(pending)
    while pending:
        node = pending.pop()
        following = [parent for parent, _ in node.next_functions if parent is not None]
        if not following and node not in own:
            return True
        for parent in following:
            if parent not in seen:
                seen.add(parent)
                pending.append(parent)
    return any(out.grad_fn is None and out.requires_grad and get_gradient_edge(out).node not in own for out in outputs)


def _through_callbacks(
    problem: Problem, h0: PyTree, z: PyTree, gradient: Estimator, options: dict[str, Any]
) -> Solution:
    leaves, structure = BACKEND.flatten_with_none(z)
    moving = [i for i, leaf in enumerate(leaves) if moves(leaf)]
    detached = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    z_in = BACKEND.unflatten(structure, detached)
    if _has_tangents(z):
        raise NotImplementedError(NO_TRANSFORM)
    solution = solver_point(problem, h0, z_in, **options)
    if not torch.is_grad_enabled():
        return solution._replace(value=gradient.value(problem, solution.value, z_in))

    def closed(h: PyTree, z: PyTree) -> PyTree:
        value = problem.f(h, z)
        if _has_tangents(value):
            raise NotImplementedError(NO_TRANSFORM)
        if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in BACKEND.flatten(value)[0]):
            raise ValueError(
                "F closes over tensors that require a gradient, but a Problem's callbacks give gradients to z alone: "
                "put these tensors in z, or pass the plain function f"
            )
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
            raise NotImplementedError(NO_SECOND_DERIVATIVE)
        return None, None, *ctx.pullback(list(cotangents))
