"""Curvature of a model with a layer, by curvlinops. The Hessian of a phantom gradient need not be symmetric."""

from typing import Any

import pytest
import torch
from packages.models import EXACT, PHANTOM, Model, inputs, name, plain
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn

import implicit_core as ic

curvlinops = pytest.importorskip("curvlinops", reason="curvlinops is not installed")
from curvlinops.examples import TensorLinearOperator  # noqa: E402  # after the skip

LOSS = nn.MSELoss()
ITSELF = [EXACT, ic.BPTT(6), ic.Unroll(300, 1.0)]
"""Estimators that give the gradient of the value they return."""

OPERATORS = [*ITSELF, ic.Unroll(3, 0.5), *PHANTOM]


def operator(kind: str, model: Model, parameters: Any = None, **options: Any) -> Any:
    """An operator for the mean square over two batches."""
    x, y = inputs(6)
    parameters = list(model.parameters()) if parameters is None else parameters
    data = list(zip(x.split(4), y.split(4), strict=True))
    arguments = (model, parameters, data) if "Jacobian" in kind else (model, LOSS, parameters, data)
    return getattr(curvlinops, kind)(*arguments, **options)


def matrix(linear: Any) -> Tensor:
    """All entries of an operator."""
    return linear @ torch.eye(linear.shape[1], dtype=torch.float64)


def flat(tensors: Any) -> Tensor:
    """One vector."""
    return torch.cat([t.flatten() for t in tensors])


def hessian_by_finite_differences(model: Model) -> Tensor:
    """The derivative of the layer's own gradient."""
    (x, y), step, columns = inputs(6), 1e-5, []
    for p in model.parameters():
        for i in range(p.numel()):
            ends = []
            for change in (step, -2 * step):
                with torch.no_grad():
                    p.view(-1)[i] += change
                ends.append(flat(torch.autograd.grad(LOSS(model(x), y), list(model.parameters()))))
            with torch.no_grad():
                p.view(-1)[i] += step
            columns.append((ends[0] - ends[1]) / (2 * step))
    return torch.stack(columns, dim=1)


def hessian_of_the_graph(model: Model) -> Tensor:
    """The derivative of the gradient of a plain loop."""
    (x, y), parameters = inputs(6), list(model.parameters())
    gradient = flat(torch.autograd.grad(LOSS(plain(model, x), y), parameters, create_graph=True))
    rows = [torch.autograd.grad(g, parameters, retain_graph=True, materialize_grads=True) for g in gradient]
    return torch.stack([flat(row) for row in rows])


def jacobian(model: Model) -> Tensor:
    """The derivatives of all outputs, sample by sample, by a plain loop."""
    outputs = plain(model, inputs(6)[0]).flatten()
    return torch.stack([flat(torch.autograd.grad(o, list(model.parameters()), retain_graph=True)) for o in outputs])


@pytest.mark.parametrize("gradient", ITSELF, ids=name)
def test_the_hessian_is_symmetric_and_that_of_finite_differences(gradient: ic.Estimator) -> None:
    model = Model(gradient)
    found = matrix(operator("HessianLinearOperator", model))
    torch.testing.assert_close(found, found.T, atol=1e-12, rtol=0)
    torch.testing.assert_close(found, hessian_by_finite_differences(model), atol=2e-6, rtol=1e-6)


def test_few_unrolled_steps_have_the_symmetric_hessian_of_their_graph() -> None:
    model = Model(ic.Unroll(3, 0.5))
    found = matrix(operator("HessianLinearOperator", model))
    torch.testing.assert_close(found, found.T, atol=1e-12, rtol=0)
    torch.testing.assert_close(found, hessian_of_the_graph(model), atol=1e-10, rtol=0)
    # Their gradient is not that of one function of the parameters: it changes with the start of the steps, too.
    assert (found - hessian_by_finite_differences(model)).abs().max() > 0.1


@pytest.mark.parametrize("gradient", PHANTOM, ids=name)
def test_the_hessian_of_a_series_is_not_symmetric(gradient: ic.Estimator) -> None:
    found = matrix(operator("HessianLinearOperator", Model(gradient)))
    assert (found - found.T).abs().max() > 0.03


@pytest.mark.parametrize("gradient", OPERATORS, ids=name)
def test_first_derivatives_are_those_of_the_estimator(gradient: ic.Estimator) -> None:
    (x, y), j = inputs(6), jacobian(Model(gradient))
    torch.testing.assert_close(matrix(operator("JacobianLinearOperator", Model(gradient))), j, atol=1e-10, rtol=0)
    found = matrix(operator("GGNLinearOperator", Model(gradient)))
    torch.testing.assert_close(found, 2 * j.T @ j / y.numel(), atol=1e-10, rtol=0)
    errors = 2 * (plain(Model(gradient), x) - y)
    each = torch.einsum("no,nop->np", errors, j.unflatten(0, y.shape))  # gradients of the sum of squares of a sample
    found = matrix(operator("EFLinearOperator", Model(gradient)))
    torch.testing.assert_close(found, each.T @ each / y.numel(), atol=1e-9, rtol=0)


def definite(gradient: ic.Estimator) -> Tensor:
    """The Hessian plus a multiple of the identity that makes its symmetric part positive definite."""
    found = matrix(operator("HessianLinearOperator", Model(gradient)))
    lowest = torch.linalg.eigvalsh((found + found.T) / 2)[0]
    return found + (0.01 - lowest) * torch.eye(len(found), dtype=torch.float64)


def residual_of_conjugate_gradients(a: Tensor) -> float:
    """After five times as many steps as there are unknowns, relative to the right-hand side."""
    b = torch.linspace(-1, 1, len(a), dtype=torch.float64)
    options = {"tolerance": 1e-10, "eps": 1e-30, "stop_updating_after": 1e-14, "max_tridiag_iter": 0}
    x = curvlinops.CGInverseLinearOperator(TensorLinearOperator(a), max_iter=5 * len(a), **options) @ b
    return ((a @ x - b).norm() / b.norm()).item()


def error_of_lanczos(a: Tensor) -> float:
    """Of the largest eigenvalue."""
    linear = TensorLinearOperator(a).to_scipy()
    (found,) = eigsh(linear, k=1, which="LA", return_eigenvectors=False, v0=torch.ones(len(a)).double().numpy())
    return abs(found - torch.linalg.eigvals(a).real.max().item())


@pytest.mark.parametrize("gradient", [EXACT, ic.Unroll(3, 0.5)], ids=name)
def test_conjugate_gradients_and_lanczos_with_a_symmetric_hessian(gradient: ic.Estimator) -> None:
    a = definite(gradient)
    assert residual_of_conjugate_gradients(a) < 1e-9
    assert error_of_lanczos(a) < 1e-9


@pytest.mark.filterwarnings("ignore:CG terminated")
def test_conjugate_gradients_and_lanczos_are_wrong_with_the_hessian_of_a_series() -> None:
    a = definite(ic.OneStep())
    assert residual_of_conjugate_gradients(a) > 1e-3
    assert error_of_lanczos(a) > 0.1


def test_kfac_outside_of_the_layer_and_its_error_within() -> None:
    """It has a hook at the output of each linear layer, which needs a graph at every call: a solve has none."""
    model, (x, y) = Model(), inputs(6)
    found = matrix(operator("KFACLinearOperator", model, [model.head.weight], fisher_type="type-2"))
    h = model.layer(model.encoder(x))  # the Gauss-Newton matrix of the last layer has this factor
    torch.testing.assert_close(found, torch.kron(torch.eye(2).double(), 2 * h.T @ h / y.numel()), atol=1e-12, rtol=0)
    with pytest.raises(RuntimeError, match="cannot register a hook on a tensor that doesn't require gradient"):
        matrix(operator("KFACLinearOperator", model, fisher_type="type-2"))
