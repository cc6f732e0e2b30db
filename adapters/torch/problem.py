"""A :class:`Problem` whose derivatives autograd computes."""

from collections.abc import Hashable, Sequence
from functools import partial
from typing import Generic

import torch
from torch import Tensor

from implicit_core import checks
from implicit_core.arrays import H, PyTree, Z
from implicit_core.backends.torch import BACKEND, drop_casts_without_graph
from implicit_core.problem import Linearization, Map, Problem, zero_tangent

from .autograd import gradient_edges, pushforward, vector_jacobian
from .closure import hoist
from .graph_inputs import graph_inputs
from .identity import IdentitySet
from .jacobian import GraphJacobian
from .random_state import RandomState
from .tensors import Tensors, as_leaf, dense, has_storage, is_differentiable, tensors, views


class AutogradProblem(Problem[H, Z]):
    """A :class:`Problem` whose derivatives autograd computes, also with respect to all tensors that f closes over."""

    def left_out(self, h: H, z: Z) -> tuple[str, ...]:
        """The shapes of closed-over tensors that require a gradient."""
        return tuple("x".join(map(str, x.shape)) or "a scalar" for x in closed_over(self.f, h, z))


def closed_over(f: Map[H, Z], h: H, z: Z) -> list[Tensor]:
    """The tensors besides h and z that the value of F depends on and that require a gradient."""
    leaves, structure = BACKEND.flatten(h)
    h_in = [as_leaf(x) for x in leaves]
    replayed = RandomState(leaves, f, z).replay(f)
    with torch.inference_mode(False), torch.enable_grad():
        drop_casts_without_graph()
        evaluation = hoist(replayed, BACKEND.unflatten(structure, views(h_in)), z, has_storage)
    in_z = tensors(z)
    inputs = graph_inputs(evaluation, BACKEND.flatten(evaluation.value)[0], h_in, in_z)
    known = IdentitySet(in_z)
    return [x for x in inputs.tensors if x not in known] if inputs else []


def problem(f: Map[H, Z], *, batch_ndim: int = 0, scale: PyTree = None) -> Problem[H, Z]:
    """A :class:`Problem` whose derivatives autograd computes.

    Parameters
    ----------
    f
        ``f(h, z)`` on tensors, differentiable. Integer tensors and other leaves of z have no gradient.
    batch_ndim
        How many first axes of every leaf of h index independent samples.
    scale
        The units of the unknown, as for :class:`implicit_core.Problem`.

    Returns
    -------
    Problem
        With derivatives in both modes, from the graph of one evaluation of F. Where f calls an ``autograd.Function``,
        and with a tangent of z, a pushforward evaluates F in forward mode. ``fixed_point`` treats this problem as it
        treats f itself.

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
    checks.function("f", f)
    f = BACKEND.protected(f)
    return AutogradProblem(f, linearize=partial(_linearize, f, batch_ndim), batch_ndim=batch_ndim, scale=scale)


def plain_function(f: Map[H, Z]) -> Map[H, Z]:
    """``f``, which must not be a :class:`Problem`, as that has a ``batch_ndim`` and derivatives of its own."""
    checks.function("f", f)
    if isinstance(f, Problem):
        raise TypeError(f"f must be a plain function f(h, z), got {f!r}: pass its f, and its batch_ndim as an argument")
    return f


def _linearize(f: Map[H, Z], batch_ndim: int, h: H, z: Z) -> Linearization[H, Z]:
    """F and its derivatives at (h, z), from the graph of one evaluation."""
    call = _OnLeaves(f, h, z)
    n = len(call.h)
    random = RandomState(call.h, f, z)
    with torch.inference_mode(False), torch.enable_grad():
        h_in, z_in = tuple(as_leaf(x) for x in call.h), tuple(as_leaf(x) for x in call.z)
        outputs = call(views(h_in), views(z_in))
    value = [out.detach() for out in outputs]
    edges = gradient_edges(outputs)
    jacobian = GraphJacobian(h_in, value, edges, batch_ndim)

    def pull(v: H, inputs: Tensors) -> list[Tensor]:
        return vector_jacobian(edges, inputs, BACKEND.flatten(v)[0])

    def vjp(v: H) -> tuple[H, Z]:
        cotangents = pull(v, h_in + z_in)
        return call.as_h(cotangents[:n]), call.as_z(cotangents[n:])

    def push(tangents: Sequence[Tensor]) -> H:
        # torch.func and not forward_ad: an autograd.Function disables forward_ad within its forward, where a solve may
        # be running. Forward mode refuses expanded tensors, so all are made dense.
        at, fixed = [dense(x) for x in (*call.h, *call.z)][: len(tangents)], call.z[len(tangents) - n :]
        again = random.replay(lambda *at: call(at[:n], (*at[n:], *fixed)))
        tangent = pushforward(again, tuple(at), tuple(map(dense, tangents)))
        # Forward mode promotes the tangent of a tensor without axes.
        return call.as_value([t.to(x.dtype) for t, x in zip(tangent, value, strict=True)])

    def jvp_h(dh: H) -> H:
        tangents = BACKEND.flatten(dh)[0]
        return call.as_value(jacobian.product(tangents, lambda: BACKEND.flatten(push(tangents))[0]))

    return Linearization(
        call.as_value(value),
        vjp_h=lambda v: call.as_h(pull(v, h_in)),
        vjp_z=lambda v: call.as_z(pull(v, z_in)),
        vjp=vjp,
        jvp_h=jvp_h,
        jvp=lambda dh, dz: push([*BACKEND.flatten(dh)[0], *call.z_tangents(dz)]),
        matrix_h=jacobian.matrix,
    )


class _OnLeaves(Generic[H, Z]):
    """F as a function of the leaves of h, and of the differentiable leaves of z.

    Attributes
    ----------
    h, z
        These leaves.
    """

    def __init__(self, f: Map[H, Z], h: H, z: Z) -> None:
        self._f = f
        self.h, self._h_structure = BACKEND.flatten(h)
        self._z_leaves, self._z_structure = BACKEND.flatten(z, none_is_leaf=True)
        self._differentiable = [i for i, leaf in enumerate(self._z_leaves) if is_differentiable(leaf)]
        self.z: list[Tensor] = [self._z_leaves[i] for i in self._differentiable]
        self._value_structure: Hashable = None

    def __call__(self, h: Sequence[Tensor], z: Sequence[Tensor]) -> Tensors:
        z_leaves = list(self._z_leaves)
        for i, leaf in zip(self._differentiable, z, strict=True):
            z_leaves[i] = leaf
        value = self._f(self.as_h(h), BACKEND.unflatten(self._z_structure, z_leaves))
        leaves, self._value_structure = BACKEND.flatten(value)
        return tuple(leaves)

    def as_h(self, leaves: Sequence[Tensor]) -> H:
        """Leaves of h, or their cotangents, as a pytree."""
        h: H = BACKEND.unflatten(self._h_structure, list(leaves))
        return h

    def as_z(self, cotangents: Sequence[Tensor]) -> Z:
        """Cotangents of the differentiable leaves of z as a pytree, in which the other leaves are None."""
        by_leaf = dict(zip(self._differentiable, cotangents, strict=True))
        z: Z = BACKEND.unflatten(self._z_structure, [by_leaf.get(i) for i in range(len(self._z_leaves))])
        return z

    def as_value(self, leaves: Sequence[Tensor]) -> H:
        """Leaves of F(h, z), or their tangents, in the structure that f returned."""
        value: H = BACKEND.unflatten(self._value_structure, list(leaves))
        return value

    def z_tangents(self, dz: Z) -> list[Tensor]:
        """The tangents of the differentiable leaves of z; zero for a leaf without a tangent."""
        leaves = BACKEND.flatten(dz, none_is_leaf=True)[0]
        return [
            zero_tangent(BACKEND, x) if leaves[i] is None else leaves[i]
            for i, x in zip(self._differentiable, self.z, strict=True)
        ]
