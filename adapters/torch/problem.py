"""A :class:`Problem` whose derivatives autograd gives."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import GradientEdge, get_gradient_edge

from implicit_core.backends.torch import BACKEND
from implicit_core.problem import Linearization, Map, Problem

PyTree = Any


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
        moving = [i for i, leaf in enumerate(z_leaves) if moves(leaf)]

        def call(h_in: tuple[Tensor, ...], z_in: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            leaves = list(z_leaves)
            for i, leaf in zip(moving, z_in, strict=True):
                leaves[i] = leaf
            value = f(BACKEND.unflatten(h_structure, list(h_in)), BACKEND.unflatten(z_structure, leaves))
            structures.append(BACKEND.flatten(value)[1])
            return tuple(BACKEND.flatten(value)[0])

        structures: list[Any] = []
        with torch.inference_mode(False), torch.enable_grad():
            h_in = tuple(as_leaf(x) for x in h_leaves)
            z_in = tuple(as_leaf(z_leaves[i]) for i in moving)
            outputs = call(h_in, z_in)
        value = [out.detach() for out in outputs]
        ends = edges(outputs)

        def pull(v: PyTree, inputs: tuple[Tensor, ...]) -> list[Tensor]:
            return vector_jacobian(ends, inputs, BACKEND.flatten(v)[0])

        def as_z(grads: list[Tensor]) -> PyTree:
            by_leaf = dict(zip(moving, grads, strict=True))
            return BACKEND.unflatten(z_structure, [by_leaf.get(i) for i in range(len(z_leaves))])

        def vjp(v: PyTree) -> tuple[PyTree, PyTree]:
            grads = pull(v, h_in + z_in)
            return BACKEND.unflatten(h_structure, grads[: len(h_in)]), as_z(grads[len(h_in) :])

        def jvp(dh: PyTree, dz: PyTree) -> PyTree:
            dz_leaves = BACKEND.flatten_with_none(dz)[0]
            tangents = (*BACKEND.flatten(dh)[0], *(_or_zeros(dz_leaves[i], z_leaves[i]) for i in moving))
            # Not forward_ad: an autograd.Function switches that off within its forward, where a solve may be running.
            # And contiguous: forward mode refuses expanded tensors.
            at = [x.contiguous() for x in (*h_leaves, *(z_leaves[i] for i in moving))]
            n = len(h_leaves)
            tangent = torch.func.jvp(
                lambda *at: call(at[:n], at[n:]), tuple(at), tuple(t.contiguous() for t in tangents)
            )[1]
            return BACKEND.unflatten(structures[0], list(tangent))

        return Linearization(
            BACKEND.unflatten(structures[0], value),
            vjp_h=lambda v: BACKEND.unflatten(h_structure, pull(v, h_in)),
            vjp_z=lambda v: as_z(pull(v, z_in)),
            vjp=vjp,
            jvp=jvp,
        )

    return AutogradProblem(f, linearize=linearize, batch_ndim=batch_ndim)


def edges(outputs: Sequence[Tensor]) -> list[GradientEdge | None]:
    """Where the graphs of ``outputs`` end, without the outputs; None for one without a graph."""
    return [get_gradient_edge(out) if out.requires_grad else None for out in outputs]


def vector_jacobian(
    outputs: Sequence[GradientEdge | None],
    inputs: Sequence[Tensor],
    v: Sequence[Tensor],
    *,
    create_graph: bool = False,
) -> list[Tensor]:
    """``v`` pulled back along the graph from ``outputs`` to ``inputs``, which is kept."""
    pairs = [(edge, cotangent) for edge, cotangent in zip(outputs, v, strict=True) if edge is not None]
    if not pairs or not inputs:
        return [torch.zeros_like(leaf) for leaf in inputs]
    return list(
        torch.autograd.grad(
            [edge for edge, _ in pairs],
            inputs,
            [cotangent for _, cotangent in pairs],
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
            materialize_grads=True,
        )
    )


def has_tangents(tree: PyTree) -> bool:
    """Whether forward mode has a tangent for a tensor of ``tree``."""
    leaves = [leaf for leaf in BACKEND.flatten(tree)[0] if isinstance(leaf, Tensor)]
    try:
        return any(forward_ad.unpack_dual(leaf).tangent is not None for leaf in leaves)
    except RuntimeError:  # not to be had within vmap
        return False


def moves(x: Any) -> bool:
    """Whether a leaf of z has derivatives."""
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())


def as_leaf(x: Tensor) -> Tensor:
    """``x`` as the start of a graph; a tensor of inference mode can't be one itself."""
    return (x.clone() if x.is_inference() else x.detach()).requires_grad_()


def _or_zeros(tangent: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if tangent is None else tangent
