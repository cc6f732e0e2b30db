"""How contractive F is at a point, by power iteration: numbers to log beside a training loss."""

from typing import Any

import torch
from torch import Tensor

from implicit_core import checks
from implicit_core.backend import PyTree
from implicit_core.backends.torch import BACKEND
from implicit_core.problem import BoundLinearization, Map, Problem
from implicit_core.space import Space, State

from .problem import problem


def spectral_radius(
    f: Map,
    h: PyTree,
    z: PyTree,
    *,
    batch_ndim: int = 1,
    steps: int = 50,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Estimate the spectral radius of ∂F/∂h at h, sample by sample: below 1, fixed-point iteration converges near h.

    .. math::
        \rho(J) = \max_i |\lambda_i(J)| = \lim_{t \to \infty} \|J^t v\|^{1/t}

    Power iteration on the transpose, which has the same eigenvalues. A single step's growth oscillates where the
    largest eigenvalues are a complex pair, so the estimate is the geometric mean of the growth over the last half of
    the steps. It is an estimate and no bound: a gap between the largest moduli narrower than 1/steps is not resolved,
    and the oscillation of a pair fades as 1/steps. Costs one evaluation of F and ``steps`` h-VJPs.

    Parameters
    ----------
    f
        F itself, ``f(h, z)``, differentiable by autograd. It must give the same value at every call: put the cell in
        eval mode, or pass :func:`constant_within_solve` of it.
    h
        Where to linearize, usually a fixed point: a tensor or a pytree of tensors, (batch..., state...).
    z
        Inputs and parameters.
    batch_ndim
        How many first axes of every leaf of h index independent samples.
    steps
        Power iterations, at least 1.
    generator
        Draws the start; PyTorch's own if None. Its numbers are drawn on its device.

    Returns
    -------
    Tensor
        Of the batch's shape, float32 or wider, without a graph.

    Raises
    ------
    TypeError, ValueError
        If an argument, or what f returns, has a wrong type, structure, shape, dtype or device.

    References
    ----------
    S. Bai, V. Koltun and J. Z. Kolter, Stabilizing equilibrium models by Jacobian regularization, ICML 2021.

    Examples
    --------
    >>> import torch
    >>> from implicit_core.adapters import torch as ict
    >>> turn = torch.tensor([[0.0, -0.8], [0.8, 0.0]])  # eigenvalues ± 0.8i
    >>> ict.spectral_radius(lambda h, z: h @ turn.T + z, torch.zeros(2, 2), torch.ones(2, 2))
    tensor([0.8000, 0.8000])
    """
    steps = checks.integer("steps", steps, 1)
    with torch.inference_mode(False), torch.no_grad():
        space, at = _linearize(f, h, z, batch_ndim)
        v, _ = _normalize(space, _normal(space, generator))
        kept = (steps + 1) // 2
        growth = space.full(0.0)
        for step in range(steps):
            v, norm = _normalize(space, space.pack(at.vjp_h(space.unpack(v))))
            if step >= steps - kept:
                growth = growth + torch.log(norm)
        return _per_sample(space, torch.exp(growth / kept))


def contraction(
    f: Map,
    h: PyTree,
    z: PyTree,
    *,
    batch_ndim: int = 1,
    steps: int = 20,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Estimate ‖∂F/∂h‖₂ at h, sample by sample: the local Lipschitz constant L_h of Theorem 2.

    Power iteration on J Jᵀ. Every step's value :math:`\|J^T u\|` with :math:`\|u\| = 1` is a lower bound, and does not
    fall from step to step: the estimate converges from below. Costs one evaluation of F, ``steps`` h-VJPs and
    ``steps`` - 1 pushforwards, each an evaluation of F in forward mode.

    Parameters
    ----------
    f
        F itself, ``f(h, z)``, differentiable by autograd in both modes. It must give the same value at every call: put
        the cell in eval mode, or pass :func:`constant_within_solve` of it.
    h
        Where to linearize, usually a fixed point: a tensor or a pytree of tensors, (batch..., state...).
    z
        Inputs and parameters.
    batch_ndim
        How many first axes of every leaf of h index independent samples.
    steps
        Power iterations, at least 1.
    generator
        Draws the start; PyTorch's own if None. Its numbers are drawn on its device.

    Returns
    -------
    Tensor
        Of the batch's shape, float32 or wider, without a graph.

    Raises
    ------
    TypeError, ValueError
        If an argument, or what f returns, has a wrong type, structure, shape, dtype or device.

    Examples
    --------
    >>> import torch
    >>> from implicit_core.adapters import torch as ict
    >>> shear = torch.tensor([[0.0, 1.5], [0.0, 0.0]])  # no contraction, and yet of spectral radius 0
    >>> ict.contraction(lambda h, z: h @ shear.T + z, torch.zeros(2, 2), torch.ones(2, 2))
    tensor([1.5000, 1.5000])
    """
    steps = checks.integer("steps", steps, 1)
    with torch.inference_mode(False), torch.no_grad():
        space, at = _linearize(f, h, z, batch_ndim)
        u, _ = _normalize(space, _normal(space, generator))
        v, norm = _normalize(space, space.pack(at.vjp_h(space.unpack(u))))
        for _ in range(steps - 1):
            u, _ = _normalize(space, space.pack(at.jvp_h(space.unpack(v))))
            v, norm = _normalize(space, space.pack(at.vjp_h(space.unpack(u))))
        return _per_sample(space, norm)


def plain_function(f: Map) -> Map:
    """``f``, which must not be a :class:`Problem`: that has a ``batch_ndim`` and derivatives of its own."""
    checks.function("f", f)
    if isinstance(f, Problem):
        raise TypeError(f"f must be a plain function f(h, z), got {f!r}: pass its f, and its batch_ndim beside it")
    return f


def _linearize(f: Map, h: PyTree, z: PyTree, batch_ndim: int) -> tuple[Space, BoundLinearization]:
    """F's derivatives in h alone, whatever mode the tensors were made in."""

    def usable(x: Any) -> Any:
        return x.clone() if isinstance(x, Tensor) and x.is_inference() else x

    f, z = plain_function(f), BACKEND.map(usable, z)
    space = Space(BACKEND, h, checks.integer("batch_ndim", batch_ndim, 0), "h")
    return space, problem(lambda h, _: f(h, z), batch_ndim=batch_ndim).linearize(BACKEND.map(torch.clone, h), None)


def _normal(space: Space, generator: torch.Generator | None) -> State:
    device = space.device if generator is None else generator.device
    return tuple(
        torch.randn(shape, generator=generator, dtype=space.dtype, device=device).to(space.device)
        for shape in space.flat_shapes
    )


def _normalize(space: Space, v: State) -> tuple[State, Tensor]:
    """``v`` at unit length, where it has one, and its length."""
    norm = space.norm(v)
    return space.divide(v, torch.where(norm > 0, norm, 1.0)), norm


def _per_sample(space: Space, numbers: Tensor) -> Tensor:
    result: Tensor = space.per_sample(numbers)
    return result
