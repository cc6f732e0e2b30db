"""The derivative of a fixed point, of every order and in both modes, as one ``torch.autograd.Function``.

Functions here take the leaves of h and the externals, all other tensors that F depends on. They close over no tensor,
so ``torch.func`` can transform them, and an axis of ``vmap`` can become one of the batch.
"""

import sys
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.profiler import record_function

from implicit_core.arrays import PyTree, State
from implicit_core.backends.torch import BACKEND
from implicit_core.estimators import AtFixedPoint, Derivative
from implicit_core.solution import SolveError

from .autograd import pushforward, transforming
from .compilation import never_compiled
from .precision import full_precision
from .tensors import OnLeaves, Tensors, has_storage, is_differentiable
from .unchanged import ChangedTensorError
from .values import BatchedF, on_values

T = TypeVar("T")

Product = Callable[..., Sequence[Tensor]]
"""A linear map of the leaves of h: each leaf is one argument."""

ProductOfF = Callable[[OnLeaves, Sequence[Tensor], Sequence[Tensor]], Product]
"""From F, h and the externals to a product with ∂F/∂h, or with its transpose."""

UNKNOWN_INPUTS = (
    "a derivative of this gradient (create_graph=True), or one by torch.func, needs all tensors that F depends on, but "
    "some cannot be found: compiled or scripted code holds them, f hands them to torch.vmap itself, or they are the "
    "output of an autograd.Function, such as another implicit layer. Pass them in z"
)
REEVALUATION_FAILED = (
    "a derivative of this gradient (create_graph=True) evaluates F and the estimator again within torch.func, where "
    "one of them failed. Unroll(k, lam) and BPTT(k) have every derivative that F has. PyTorch says: "
)
BATCHED = (
    "{} stops on a test of its numbers, which PyTorch hides under is_grads_batched=True and vectorize=True: use "
    "torch.func.jacrev, torch.func.hessian, torch.vmap(lambda v: torch.autograd.grad(h, x, v)[0])(cotangents), or "
    "the estimators Unroll(k, lam) and Neumann(k, lam)"
)
COMPILED_AUTOGRAD = (
    "If PyTorch's compiled autograd is on, it has freed the graph that an estimator at the fixed point needs for its "
    "products: switch it off, torch._dynamo.config.compiled_autograd = False, or use Unroll(k, lam)"
)
SELECTIVE = (
    "An estimator at the fixed point goes backwards through the checkpoint several times: use Unroll(k, lam) or "
    "BPTT(k), or a checkpoint that is not selective"
)
FORWARD_TWICE = (
    "PyTorch's forward mode does not nest through an autograd.Function. Instead of jacfwd(jacfwd(f)) use "
    "torch.func.hessian(f), which is jacfwd(jacrev(f)), or the estimator Unroll(k, lam)"
)
PLAIN_FORWARD = (
    "torch.autograd.forward_ad does not work through an estimator at the fixed point: use torch.func.jvp or "
    "torch.func.jacfwd, or the estimator Unroll(k, lam)"
)
TELLING = (NotImplementedError, ChangedTensorError, SolveError, torch.OutOfMemoryError)
"""Errors of a second evaluation of F that speak for themselves."""


@dataclass
class Rule:
    """The differentiation rule of a fixed point h = F(h, externals).

    Parameters
    ----------
    f
        F on leaves: ``f(h, externals)``.
    gradient
        The estimator.
    structure
        The pytree structure of h.
    leaves
        How many leaves h has.
    batch_ndim
        How many first axes of every leaf of h index independent samples.
    vjp_h
        ``v -> (∂F/∂h)ᵀ v`` along the graph of one F, leaf by leaf; None if there is no such graph.
    complete
        Whether the externals are known to be all tensors other than h that F depends on.
    forward_calls
        How often the tangent rule was called.
    scale
        The units of h.
    """

    f: OnLeaves
    gradient: AtFixedPoint
    structure: Hashable
    leaves: int
    batch_ndim: int
    vjp_h: Product | None = None
    complete: bool = True
    forward_calls: int = 0
    scale: PyTree = None

    def split(self, arguments: Sequence[T]) -> tuple[Sequence[T], Sequence[T], Sequence[T]]:
        """The arguments of :func:`attach`: h, outputs and externals."""
        n = self.leaves
        first_external = n if self.vjp_h is None else 2 * n
        return arguments[:n], arguments[n:first_external], arguments[first_external:]

    def inverse(self, jacobian: Product, v: Sequence[Tensor], batch_ndim: int, *, dual: bool) -> Tensors:
        """The estimator's D v, on leaves; ``dual`` if v is a cotangent."""
        tree = BACKEND.unflatten(self.structure, list(v))
        space = BACKEND.space(tree, batch_ndim, "v", self.scale)
        space = space.dual if dual else space.every_leaf

        def on_states(w: State) -> State:
            products = jacobian(*BACKEND.flatten(space.unpack(w))[0])
            return space.pack(BACKEND.unflatten(self.structure, list(products)))

        w = self.gradient.apply(space, on_states, space.pack(tree), transposed=dual)
        return tuple(BACKEND.flatten(space.unpack(w))[0])


def attach(rule: Rule, h: Sequence[Tensor], outputs: Sequence[Tensor], externals: Sequence[Tensor]) -> Tensors:
    """``h`` as a differentiable function of the externals.

    Parameters
    ----------
    rule
        The differentiation rule.
    h
        The leaves of the fixed point.
    outputs
        The leaves of F at h with their graph, if the rule has ``vjp_h``; otherwise empty.
    externals
        All other tensors that F depends on.
    """
    return tuple(_FixedPoint.apply(rule, *h, *outputs, *externals))  # type: ignore[no-untyped-call]  # torch's


@never_compiled
class _FixedPoint(torch.autograd.Function):
    """Known values with the derivatives of the root of h = F(h, externals).

    A first derivative goes through ``outputs``: their cotangent is w = D v, which autograd pulls back along the graph
    of one F. A derivative that is itself to be differentiated computes w, and the cotangents of the externals, as
    functions of the externals and of h, the output of this function (Decision 36).
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(rule: Rule, *tensors: Tensor) -> Tensors:
        return tuple(x.clone() for x in rule.split(tensors)[0])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        ctx.rule = inputs[0]
        ctx.set_materialize_grads(False)  # zeros for a buffer would ask for derivatives that it does not have
        ctx.orders = [BACKEND.axis_order(x, ctx.rule.batch_ndim) for x in output]
        saved = (*output, *ctx.rule.split(inputs[1:])[2])
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        rule = ctx.rule
        needed = rule.split(ctx.needs_input_grad[1:])
        h, outputs, externals = (_nothing(len(part)) for part in needed)
        first = next((v for v in cotangents if v is not None), None)
        if first is None:
            return None, *h, *outputs, *externals
        if not (has_storage(first) or transforming() or rule.gradient.derivative is Derivative.OF_OPERATIONS):
            raise NotImplementedError(BATCHED.format(type(rule.gradient).__name__))
        # Whether this derivative is itself to be differentiated, or transformed.
        differentiable = rule.vjp_h is None or torch.is_grad_enabled() or transforming()
        saved = ctx.saved_tensors if differentiable or any(v is None for v in cotangents) else ()
        v = tuple(torch.zeros_like(saved[i]) if v is None else v for i, v in enumerate(cotangents))
        # F's own operations see cotangents in the memory format of h, whatever the loss sends.
        v = tuple(BACKEND.in_axis_order(x, order, rule.batch_ndim) for x, order in zip(v, ctx.orders, strict=True))
        with full_precision(first), record_function("implicit_core.backward"):
            if differentiable:
                externals = _cotangents(rule, saved, v, needed[2])
            else:
                outputs = list(_along_graph(rule, v))
        return None, *h, *outputs, *externals

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensors:
        rule = ctx.rule
        rule.forward_calls += 1  # PyTorch would silently lose the outer tangent (Decision 39)
        if rule.forward_calls > 1:
            raise NotImplementedError(FORWARD_TWICE)
        if rule.vjp_h is not None:
            raise NotImplementedError(PLAIN_FORWARD)
        d_h, _, d_externals = rule.split(tangents[1:])
        h, externals = ctx.saved_tensors[: len(d_h)], ctx.saved_tensors[len(d_h) :]
        chosen = [i for i, d in enumerate(d_externals) if d is not None]
        with full_precision(h[0]):
            primals, d = tuple(externals[i] for i in chosen), tuple(d_externals[i] for i in chosen)
            df = pushforward(_function_of(rule, h, externals, chosen), primals, d)
            return _solve(rule, _pushforward, h, externals, df)


def _along_graph(rule: Rule, v: Sequence[Tensor]) -> Tensors:
    """D v by products along the graph of one F."""
    assert rule.vjp_h is not None
    try:
        return rule.inverse(rule.vjp_h, v, rule.batch_ndim, dual=True)
    except RuntimeError as error:
        if "torch._dynamo" in sys.modules and "second time" in str(error):
            raise RuntimeError(f"{error} {COMPILED_AUTOGRAD}") from error
        if "selective activation checkpoint" in str(error):
            raise RuntimeError(f"{error} {SELECTIVE}") from error
        raise


def _nothing(n: int) -> list[Tensor | None]:
    """No cotangents."""
    return [None] * n


def _cotangents(
    rule: Rule, saved: Sequence[Tensor], v: Sequence[Tensor], needed: Sequence[bool]
) -> list[Tensor | None]:
    """The cotangents of the externals, as differentiable functions of h, the externals and v."""
    if not rule.complete:
        raise NotImplementedError(UNKNOWN_INPUTS)
    h, externals = saved[: len(v)], saved[len(v) :]
    chosen = [i for i, x in enumerate(externals) if needed[i] and is_differentiable(x)]
    try:
        w = _solve(rule, _pullback, h, externals, v)
        pull = torch.func.vjp(_function_of(rule, h, externals, chosen), *(externals[i] for i in chosen))[1]
        by_index = dict(zip(chosen, pull(w), strict=True))
    except (RuntimeError, TypeError) as error:
        if rule.vjp_h is None or isinstance(error, TELLING):
            raise
        raise NotImplementedError(REEVALUATION_FAILED + str(error)) from error
    return [by_index.get(i) for i in range(len(externals))]


def _function_of(
    rule: Rule, h: Sequence[Tensor], externals: Sequence[Tensor], chosen: Sequence[int]
) -> Callable[..., Tensors]:
    """F at h as a function of the ``chosen`` externals, each of which is one argument."""

    def call(*arguments: Tensor) -> Tensors:
        by_index = dict(zip(chosen, arguments, strict=True))
        return rule.f(h, [by_index.get(i, x) for i, x in enumerate(externals)])

    return call


def _pullback(f: OnLeaves, h: Sequence[Tensor], externals: Sequence[Tensor]) -> Product:
    """``w -> (∂F/∂h)ᵀ w``."""
    pull = torch.func.vjp(lambda *h: f(h, externals), *h)[1]
    return lambda *w: pull(w)


def _pushforward(f: OnLeaves, h: Sequence[Tensor], externals: Sequence[Tensor]) -> Product:
    """``w -> (∂F/∂h) w``."""
    return lambda *w: pushforward(lambda *h: f(h, externals), tuple(h), w)


def _solve(
    rule: Rule, product: ProductOfF, h: Sequence[Tensor], externals: Sequence[Tensor], v: Sequence[Tensor]
) -> Tensors:
    """D v, or Dᵀ v, as a differentiable function of all tensors."""
    if rule.gradient.derivative is not Derivative.OF_SOLUTION:
        return rule.inverse(product(rule.f, h, externals), v, rule.batch_ndim, dual=product is _pullback)
    # The w with w = J w + v is itself a fixed point, of a function of v, h and the externals: the same rule again
    # (Decision 26).
    n = len(h)

    def g(w: Sequence[Tensor], at: Sequence[Tensor]) -> Tensors:
        jw = product(rule.f, at[n : 2 * n], at[2 * n :])(*w)
        return tuple(a + b for a, b in zip(jw, at[:n], strict=True))

    def run(batched: BatchedF, tensors: Sequence[Tensor]) -> Tensors:
        jacobian = product(batched.f, tensors[n : 2 * n], tensors[2 * n :])
        return rule.inverse(jacobian, tensors[:n], batched.batch_ndim, dual=product is _pullback)

    tensors = (*v, *h, *externals)
    w = on_values(run, BatchedF(rule.f, rule.batch_ndim), 2 * n, tensors)
    return attach(replace(rule, f=g, vjp_h=None, forward_calls=0), w, (), tensors)
