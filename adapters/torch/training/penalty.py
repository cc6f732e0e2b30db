"""Jacobian regularization: a loss that keeps F contractive."""

from collections.abc import Callable

import torch
from torch import Tensor

from implicit_core import checks
from implicit_core.arrays import H, State, Z
from implicit_core.backends.torch import BACKEND
from implicit_core.problem import Map
from implicit_core.space import Space

from ..autograd import gradient_edges, vector_jacobian
from ..problem import plain_function, problem
from ..tensors import as_leaf, views


def jacobian_penalty(
    f: Map[H, Z],
    h: H,
    z: Z,
    *,
    batch_ndim: int = 1,
    samples: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Estimate ‖∂F/∂h‖²_F at h, sample by sample, as a loss.

    .. math::
        \|J\|_F^2 = \operatorname{tr}(J J^T) = \mathbb{E}_v \|J^T v\|_2^2, \quad \mathbb{E}\, v v^T = I

    Hutchinson's unbiased estimator with random signs v. It is exact where the rows of J are orthogonal, and its
    variance is never larger than with normal v. It is not divided by the dimension: Bai et al. add
    ``weight * jacobian_penalty(...).mean() / d`` to the loss, where d is the number of elements in one sample's state.

    The result is differentiable in h, z and all tensors that f closes over, as far as they require gradients. If h
    carries a graph, the gradient also moves the fixed point. Bai et al. take h as a constant, which is ``h.detach()``.
    Costs one evaluation of F and ``samples`` h-VJPs, and their graph.

    Parameters
    ----------
    f
        F itself, ``f(h, z)``, twice differentiable by autograd. If it draws random numbers or updates buffers, pass the
        function that the solve evaluated, see :func:`constant_within_solve`.
    h
        Where to linearize, usually a fixed point: a tensor or a pytree of tensors, (batch..., state...).
    z
        Inputs and parameters.
    batch_ndim
        How many first axes of every leaf of h index independent samples.
    samples
        Number of probes v, at least 1.
    generator
        Draws the probes, on its own device; PyTorch's default generator if None.

    Returns
    -------
    Tensor
        Of the batch's shape, float32 or wider.

    Raises
    ------
    TypeError, ValueError
        If an argument, or the result of f, has a wrong type, structure, shape, dtype or device.

    References
    ----------
    S. Bai, V. Koltun and J. Z. Kolter, Stabilizing equilibrium models by Jacobian regularization, ICML 2021.

    Examples
    --------
    >>> import torch
    >>> from implicit_core.adapters import torch as ict
    >>> slope = torch.tensor([0.5, 0.1], requires_grad=True)
    >>> penalty = ict.jacobian_penalty(lambda h, z: slope * h + z, torch.zeros(3, 2), torch.ones(3, 2))
    >>> penalty.detach()  # 0.5² + 0.1²
    tensor([0.2600, 0.2600, 0.2600])
    >>> penalty.mean().backward()
    >>> slope.grad
    tensor([1.0000, 0.2000])
    """
    f = BACKEND.protected(plain_function(f))
    samples = checks.integer("samples", samples, 1)
    space = BACKEND.space(h, checks.integer("batch_ndim", batch_ndim, 0), "h")
    if torch.is_grad_enabled():
        pull = _differentiable_vjp(f, h, z)
    else:
        pull = problem(f, batch_ndim=batch_ndim).linearize(h, z).vjp_h
    total = space.full(0.0)
    for _ in range(samples):
        product = space.pack(pull(space.unpack(_signs(space, generator))))
        total = total + space.dot(product, product)
    penalty: Tensor = space.per_sample(total / samples)
    return penalty


def _differentiable_vjp(f: Map[H, Z], h: H, z: Z) -> Callable[[H], H]:
    """``v -> (∂F/∂h)ᵀ v``, differentiable in h, z and all tensors that f closes over."""
    leaves, structure = BACKEND.flatten(h)
    # A view: if z depends on h too, the derivative is still the partial one.
    inputs = [leaf.view_as(leaf) if leaf.requires_grad else as_leaf(leaf) for leaf in leaves]
    value = f(BACKEND.unflatten(structure, views(inputs)), z)
    checks.like(BACKEND, "the result of f", value, h, "h")
    edges = gradient_edges(BACKEND.flatten(value)[0])

    def pull(v: H) -> H:
        cotangents = vector_jacobian(edges, inputs, BACKEND.flatten(v)[0], create_graph=True)
        product: H = BACKEND.unflatten(structure, cotangents)
        return product

    return pull


def _signs(space: Space, generator: torch.Generator | None) -> State:
    device = space.device if generator is None else generator.device
    return State(
        tuple(
            2.0 * torch.randint(2, shape, generator=generator, dtype=space.dtype, device=device).to(space.device) - 1.0
            for shape in space.flat_shapes
        )
    )
