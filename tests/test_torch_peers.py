"""The phantom and the exact gradients against TorchDEQ's and TorchOpt's, from the same fixed point in one process."""

from collections.abc import Sequence

import pytest
import torch
import torchdeq
import torchopt
from cells import CELLS, Cell, explicit
from torch import Tensor, nn

import implicit_core as ic

SETTINGS = [(1, 1.0), (2, 0.5), (5, 0.5), (7, 0.3), (9, 0.9)]

pytestmark = pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)


def loss(h: Tensor) -> Tensor:
    return (h**3 + torch.linspace(-1.0, 1.0, h.numel(), dtype=h.dtype).view_as(h) * h).sum()


def converged(cell: Cell) -> tuple[nn.Module, Tensor, Tensor]:
    """The module, its fixed point to rounding error, and x."""
    module, h, x = cell.build()
    with torch.no_grad():
        for _ in range(200):
            h = module(h, x)
        assert torch.linalg.vector_norm(module(h, x) - h) < 1e-13
    return module, h, x


def ours(module: nn.Module, h: Tensor, x: Tensor, gradient: ic.Estimator) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The value, and the gradients of x and of all parameters, starting from h."""
    solution = ic.fixed_point(module, h, x, gradient=gradient, batch_ndim=1)
    assert solution.stats.evaluations == 1
    return solution.value, torch.autograd.grad(loss(solution.value), (x, *module.parameters()))


def equal(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=0)


@pytest.mark.parametrize(("k", "lam"), SETTINGS)
def test_unroll_equals_the_unrolled_gradient_of_torchdeq(cell: Cell, k: int, lam: float) -> None:
    module, h, x = converged(cell)
    deq = torchdeq.get_deq(f_max_iter=1, grad=k, tau=lam)
    theirs = deq(lambda h: module(h, x), h)[0][-1]
    value, gradients = ours(module, h, x, ic.Unroll(k, lam))
    equal([value], [theirs])
    equal(gradients, torch.autograd.grad(loss(theirs), (x, *module.parameters())))


@pytest.mark.filterwarnings("ignore:.*functorch.vjp. is deprecated:FutureWarning")  # TorchOpt calls it
@pytest.mark.parametrize(("k", "lam"), SETTINGS)
def test_neumann_equals_the_damped_series_of_torchopt(cell: Cell, k: int, lam: float) -> None:
    module, h, x = converged(cell)
    names, f = [name for name, _ in module.named_parameters()], explicit(module)

    def residual(h: Tensor, x: Tensor, parameters: tuple[Tensor, ...]) -> Tensor:
        return h - f(h, (x, dict(zip(names, parameters, strict=True))))

    series = torchopt.linear_solve.solve_inv(ns=True, maxiter=k - 1, alpha=lam)

    @torchopt.diff.implicit.custom_root(residual, argnums=(1, 2), solve=series)
    def root(h: Tensor, x: Tensor, parameters: tuple[Tensor, ...]) -> Tensor:
        return h

    theirs = root(h, x, tuple(module.parameters()))
    value, gradients = ours(module, h, x, ic.Neumann(k, lam))
    equal([value], [theirs])
    equal(gradients, torch.autograd.grad(loss(theirs), (x, *module.parameters())))


def test_implicit_equals_the_exact_gradient_of_torchdeq(cell: Cell) -> None:
    module, h, x = converged(cell)
    deq = torchdeq.get_deq(f_max_iter=1, ift=True, b_max_iter=200, b_tol=1e-13)
    theirs = deq(lambda h: module(h, x), h)[0][-1]
    value, gradients = ours(module, h, x, ic.Implicit(ic.GMRES(rtol=1e-13)))
    equal([value], [theirs])
    equal(gradients, torch.autograd.grad(loss(theirs), (x, *module.parameters())))
