"""PyTorch: F's derivatives from autograd, and the core's estimators inside it."""

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
from implicit_core.problem import Linearization, Map, Problem
from implicit_core.solution import Solution
from implicit_core.solve import as_problem
from implicit_core.solvers import Anderson

PyTree = Any

NO_SECOND_DERIVATIVE = (
    "a derivative of this gradient is not available (create_graph=True): neither for an estimator at the fixed point "
    "nor through a Problem's own callbacks; Unroll and BPTT on a plain function have derivatives of every order"
)
NO_TRANSFORM = (
    "this estimator is differentiated by loss.backward() or torch.autograd.grad; forward mode and the transforms of "
    "torch.func differentiate Unroll(k, lam), without recompute, and BPTT(k), of a plain function"
)


class AutogradProblem(Problem):
    """A :class:`Problem` whose derivatives autograd gives, with respect to all that f closes over, too."""


def problem(f: Map, *, batch_ndim: int = 0) -> Problem:
    """A :class:`Problem` whose callbacks come from autograd.

    Parameters
    ----------
    f
        ``f(h, z)`` on tensors, differentiable. Integer tensors and other leaves of z have no gradient.
    batch_ndim
        How many first axes of every leaf of h index independent samples.

    Returns
    -------
    Problem
        With both modes: a pullback walks the graph of one evaluation of F; a pushforward evaluates F in forward mode.
        In ``fixed_point`` it counts as f itself.

    Examples
    --------
    >>> import torch
    >>> import implicit_core as ic
    >>> from implicit_core.adapters import torch as ict
    >>> problem = ict.problem(lambda h, z: torch.tanh(0.5 * h + z))
    >>> z = torch.tensor([0.3, -0.1])
    >>> solution = ic.solve(problem, torch.zeros(2), z)
    >>> value, pullback = ic.Neumann(k=5, lam=0.5).vjp(problem, solution.value, z)
    >>> pullback(torch.ones(2)).shape
    torch.Size([2])
    """

    def linearize(h: PyTree, z: PyTree) -> Linearization:
        h_leaves, h_structure = BACKEND.flatten(h)
        z_leaves, z_structure = BACKEND.flatten_with_none(z)
        moving = [i for i, leaf in enumerate(z_leaves) if _moves(leaf)]

        def call(h_in: tuple[Tensor, ...], z_in: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            leaves = list(z_leaves)
            for i, leaf in zip(moving, z_in, strict=True):
                leaves[i] = leaf
            value = f(BACKEND.unflatten(h_structure, list(h_in)), BACKEND.unflatten(z_structure, leaves))
            structures.append(BACKEND.flatten(value)[1])
            return tuple(BACKEND.flatten(value)[0])

        structures: list[Any] = []
        with torch.inference_mode(False), torch.enable_grad():
            h_in = tuple(_leaf(leaf) for leaf in h_leaves)
            z_in = tuple(_leaf(z_leaves[i]) for i in moving)
            outputs = call(h_in, z_in)

        def pull(v: PyTree, inputs: tuple[Tensor, ...]) -> list[Tensor]:
            return vector_jacobian(outputs, inputs, BACKEND.flatten(v)[0])

        def as_z(grads: list[Tensor]) -> PyTree:
            by_leaf = dict(zip(moving, grads, strict=True))
            return BACKEND.unflatten(z_structure, [by_leaf.get(i) for i in range(len(z_leaves))])

        def vjp(v: PyTree) -> tuple[PyTree, PyTree]:
            grads = pull(v, h_in + z_in)
            return BACKEND.unflatten(h_structure, grads[: len(h_in)]), as_z(grads[len(h_in) :])

        def jvp(dh: PyTree, dz: PyTree) -> PyTree:
            dz_leaves = BACKEND.flatten_with_none(dz)[0]
            with forward_ad.dual_level():
                h_dual = map(forward_ad.make_dual, h_leaves, BACKEND.flatten(dh)[0])
                z_dual = (forward_ad.make_dual(z_leaves[i], _or_zeros(dz_leaves[i], z_leaves[i])) for i in moving)
                duals = [forward_ad.unpack_dual(out) for out in call(tuple(h_dual), tuple(z_dual))]
            return BACKEND.unflatten(structures[0], [_or_zeros(dual.tangent, dual.primal) for dual in duals])

        return Linearization(
            BACKEND.unflatten(structures[0], [leaf.detach() for leaf in outputs]),
            vjp_h=lambda v: BACKEND.unflatten(h_structure, pull(v, h_in)),
            vjp_z=lambda v: as_z(pull(v, z_in)),
            vjp=vjp,
            jvp=jvp,
        )

    return AutogradProblem(f, linearize=linearize, batch_ndim=batch_ndim)


def vector_jacobian(outputs: tuple[Tensor, ...], inputs: tuple[Tensor, ...], v: list[Tensor]) -> list[Tensor]:
    """``v`` pulled back along the graph from ``outputs`` to ``inputs``, which is kept."""
    pairs = [(out, cotangent) for out, cotangent in zip(outputs, v, strict=True) if out.requires_grad]
    if not pairs or not inputs:
        return [torch.zeros_like(leaf) for leaf in inputs]
    return list(
        torch.autograd.grad(
            [out for out, _ in pairs],
            inputs,
            [cotangent for _, cotangent in pairs],
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
    )


def _moves(leaf: Any) -> bool:
    """Whether a leaf of z has derivatives."""
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def _leaf(x: Tensor) -> Tensor:
    """``x`` as the start of a graph; a tensor of inference mode can't be one itself."""
    return (x.clone() if x.is_inference() else x.detach()).requires_grad_()


def _or_zeros(tangent: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if tangent is None else tangent


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
        h_in = tuple(_leaf(leaf) for leaf in h_leaves)
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
    moving = [i for i, leaf in enumerate(leaves) if _moves(leaf)]
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
