"""The derivative of a fixed point, of any order and in both modes, as one ``torch.autograd.Function``.

Functions here take the leaves of the state h and ``externals``: all other tensors that F is a function of. Nothing is
closed over, so that ``torch.func`` can transform it, and ``vmap`` can turn its axis into one of the batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from implicit_core.backends.torch import BACKEND
from implicit_core.solution import SolveError

from .closure import OnLeaves, Tensors
from .precision import full_precision
from .problem import moves

PyTree = Any

HIDDEN = (
    "a derivative of this gradient (create_graph=True), or one by torch.func, needs every tensor that F is a function "
    "of. Some can't be seen: compiled or scripted code holds them, f hands them to torch.vmap itself, or they came out "
    "of an autograd.Function, as those of another implicit layer do. Pass them in z"
)
AGAIN = (
    "a derivative of this gradient (create_graph=True) evaluates F again within torch.func, which F doesn't allow; "
    "Unroll(k, lam) and BPTT(k) have every derivative that F has. PyTorch says: "
)
FORWARD_TWICE = (
    "PyTorch's forward mode does not nest through an autograd.Function: in the place of jacfwd(jacfwd(f)), take "
    "torch.func.hessian(f), which is jacfwd(jacrev(f)), or the estimator Unroll(k, lam)"
)
PLAIN_FORWARD = (
    "torch.autograd.forward_ad can't pass an estimator at the fixed point: take torch.func.jvp or torch.func.jacfwd, "
    "or the estimator Unroll(k, lam)"
)


@dataclass
class Rule:
    """What a fixed point is a fixed point of, and how it is differentiated.

    Parameters
    ----------
    f
        F on leaves: ``f(h, externals)``.
    gradient
        The estimator, an :class:`AtFixedPoint`.
    structure
        That of the state.
    batch_ndim
        Its batch axes.
    vjp_h
        ``v -> (∂F/∂h)ᵀ v`` where the graph of one F is at hand, leaf by leaf.
    hidden
        Whether F is a function of more than h and the externals.
    """

    f: OnLeaves
    gradient: Any
    structure: Any
    batch_ndim: int
    vjp_h: Callable[..., list[Tensor]] | None = None
    hidden: bool = False
    forward_modes: int = 0

    def split(self, tensors: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
        """The arguments of :func:`attach`: h, outputs and externals."""
        states: int = self.structure.num_leaves
        inputs = states if self.vjp_h is None else 2 * states
        return tensors[:states], tensors[states:inputs], tensors[inputs:]

    def inverse(self, jacobian: Callable[..., Sequence[Tensor]], v: Sequence[Tensor]) -> Tensors:
        """The estimator's D v, on leaves."""

        def on_trees(w: PyTree) -> PyTree:
            return BACKEND.unflatten(self.structure, list(jacobian(*BACKEND.flatten(w)[0])))

        w = self.gradient.inverse(on_trees, BACKEND.unflatten(self.structure, list(v)), self.batch_ndim)
        return tuple(BACKEND.flatten(w)[0])


def attach(rule: Rule, h: Sequence[Tensor], outputs: Sequence[Tensor], externals: Sequence[Tensor]) -> Tensors:
    """``h`` as the differentiable fixed point it is.

    Parameters
    ----------
    rule
        How to differentiate.
    h
        Leaves of the fixed point.
    outputs
        F at h, with its graph, if the rule has ``vjp_h``.
    externals
        All other tensors that F is a function of.
    """
    return tuple(_FixedPoint.apply(rule, *h, *outputs, *externals))  # type: ignore[no-untyped-call]  # torch's


class _FixedPoint(torch.autograd.Function):
    """Known values, with the derivatives of the root of h = F(h, externals).

    A first derivative leaves through ``outputs``: their cotangent becomes w, and autograd takes it through the graph of
    the one F. Where that derivative is itself to be differentiated, w and the cotangents of the externals are functions
    of h, which is this function's own output, and of the externals.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(rule: Rule, *tensors: Tensor) -> Tensors:
        return tuple(x.clone() for x in rule.split(tensors)[0])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        ctx.rule = inputs[0]
        ctx.set_materialize_grads(False)  # zeros for a buffer would ask for derivatives that it does not have
        saved = (*output, *ctx.rule.split(inputs[1:])[2])
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        rule = ctx.rule
        wanted = rule.split(ctx.needs_input_grad[1:])
        h, outputs, externals = ([None] * len(part) for part in wanted)
        given = next((v for v in cotangents if v is not None), None)
        if given is None:
            return None, *h, *outputs, *externals
        # Whether the derivative is itself to be differentiated, or transformed.
        again = rule.vjp_h is None or torch.is_grad_enabled() or transforming()
        saved = ctx.saved_tensors if again or any(v is None for v in cotangents) else ()
        v = tuple(torch.zeros_like(saved[i]) if v is None else v for i, v in enumerate(cotangents))
        with full_precision(given):
            if again:
                externals = _cotangents(rule, saved, v, wanted[2])
            else:
                outputs = list(rule.inverse(rule.vjp_h, v))
        return None, *h, *outputs, *externals

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensors:
        rule = ctx.rule
        rule.forward_modes += 1
        if rule.forward_modes > 1:
            raise NotImplementedError(FORWARD_TWICE)
        if rule.vjp_h is not None:
            raise NotImplementedError(PLAIN_FORWARD)
        d_h, _, d_externals = rule.split(tangents[1:])
        h, externals = ctx.saved_tensors[: len(d_h)], ctx.saved_tensors[len(d_h) :]
        moving = [i for i, d in enumerate(d_externals) if d is not None]
        with full_precision(h[0]):
            primals, d = tuple(externals[i] for i in moving), tuple(d_externals[i] for i in moving)
            df = torch.func.jvp(_of_externals(rule, h, externals, moving), primals, d)[1]
            return _solve(rule, _forward, h, externals, df)


def _cotangents(rule: Rule, saved: Sequence[Tensor], v: Sequence[Tensor], wanted: Sequence[bool]) -> list[Any]:
    """The cotangents of the externals, as differentiable functions of h, the externals and v."""
    if rule.hidden:
        raise NotImplementedError(HIDDEN)
    h, externals = saved[: len(v)], saved[len(v) :]
    moving = [i for i, x in enumerate(externals) if wanted[i] and moves(x)]
    try:
        w = _solve(rule, _transposed, h, externals, v)
        pull = torch.func.vjp(_of_externals(rule, h, externals, moving), *(externals[i] for i in moving))[1]
        by_index = dict(zip(moving, pull(w), strict=True))
    except (RuntimeError, TypeError) as error:
        if rule.vjp_h is None or isinstance(error, (NotImplementedError, SolveError)):
            raise
        raise NotImplementedError(AGAIN + str(error)) from error
    return [by_index.get(i) for i in range(len(externals))]


def _of_externals(rule: Rule, h: Sequence[Tensor], externals: Sequence[Tensor], moving: list[int]) -> Any:
    """F at h, as a function of some of the externals."""

    def call(*moved: Tensor) -> Tensors:
        by_index = dict(zip(moving, moved, strict=True))
        return rule.f(h, [by_index.get(i, x) for i, x in enumerate(externals)])

    return call


def _transposed(f: OnLeaves, h: Sequence[Tensor], externals: Sequence[Tensor]) -> Any:
    """``w -> (∂F/∂h)ᵀ w``."""
    pull = torch.func.vjp(lambda *h: f(h, externals), *h)[1]
    return lambda *w: pull(w)


def _forward(f: OnLeaves, h: Sequence[Tensor], externals: Sequence[Tensor]) -> Any:
    """``w -> (∂F/∂h) w``."""
    return lambda *w: torch.func.jvp(lambda *h: f(h, externals), tuple(h), w)[1]


def _solve(rule: Rule, product: Any, h: Sequence[Tensor], externals: Sequence[Tensor], v: Sequence[Tensor]) -> Tensors:
    """D v, or Dᵀ v, as a differentiable function of all tensors."""
    if not rule.gradient.exact:
        return rule.inverse(product(rule.f, h, externals), v)
    # The w with w = J w + v is a fixed point itself, of a function of v, h and the externals: the same rule again.
    n = len(h)

    def g(w: Sequence[Tensor], at: Sequence[Tensor]) -> Tensors:
        jw = product(rule.f, at[n : 2 * n], at[2 * n :])(*w)
        return tuple(a + b for a, b in zip(jw, at[:n], strict=True))

    def run(batched: Rule, tensors: Sequence[Tensor]) -> Tensors:
        return batched.inverse(product(batched.f, tensors[n : 2 * n], tensors[2 * n :]), tensors[:n])

    w = on_values(run, rule, 2 * n, (*v, *h, *externals))
    return attach(replace(rule, f=g, vjp_h=None, forward_modes=0), w, (), (*v, *h, *externals))


def on_values(run: Any, rule: Rule, states: int, tensors: Sequence[Tensor], axes: Any = None) -> Tensors:
    """``run(rule, tensors)`` on the values alone: no derivative, no transform, so that loops may look at them.

    Parameters
    ----------
    run
        From tensors to tensors. Under ``vmap`` its rule's batch has one more axis, the first.
    rule
        For ``f`` and ``batch_ndim``.
    states
        How many of the tensors are leaves shaped as h; the others are externals.
    tensors
        What it is a function of.
    axes
        The batch's first axis in each result; 0 if None.
    """
    values = [x.detach() for x in tensors]
    return tuple(_OnValues.apply(run, rule, states, axes, *values))  # type: ignore[no-untyped-call]  # torch's


class _OnValues(torch.autograd.Function):
    @staticmethod
    def forward(run: Any, rule: Rule, states: int, axes: Any, *tensors: Tensor) -> Tensors:
        return tuple(run(rule, tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def vmap(info: Any, dims: Any, run: Any, rule: Rule, states: int, axes: Any, *tensors: Tensor) -> Any:
        dims = dims[4:]
        moved = [
            x.movedim(dim, 0) if dim is not None else x.expand(info.batch_size, *x.shape).contiguous()
            for x, dim in zip(tensors[:states], dims[:states], strict=True)
        ]

        def f(h: Sequence[Tensor], externals: Sequence[Tensor]) -> Tensors:
            batched = torch.vmap(rule.f, in_dims=((0,) * len(h), tuple(dims[states:])), randomness=info.randomness)
            return tuple(batched(tuple(h), tuple(externals)))

        batched = replace(rule, f=f, batch_ndim=rule.batch_ndim + 1)
        results = on_values(run, batched, states, (*moved, *tensors[states:]), axes)
        return results, tuple(axes) if axes is not None else (0,) * len(results)


def transforming() -> bool:
    """Whether a transform of ``torch.func`` is at work, within which tensors can't be made to require a gradient."""
    try:
        torch.empty(0).requires_grad_()
    except RuntimeError:
        return True
    return False
