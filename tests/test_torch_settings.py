"""PyTorch: settings that are tensors, against the same settings as numbers, and their derivatives against formulas."""

import dataclasses
import pickle
from typing import Any

import numpy as np
import pytest
import torch

import implicit_core as ic
from implicit_core.adapters import torch as ict

W = 0.6 * torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
X = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def f(h: Any, z: Any) -> Any:
    w, x = z
    return torch.tanh(h @ w.T + x)


def layer(w: Any = W, **options: Any) -> ic.Solution:
    return ic.fixed_point(f, torch.zeros_like(X), (w, X), batch_ndim=1, **options)


def as_tensors(record: Any, names: Any, dtype: Any = torch.float64) -> Any:
    tensors = {name: torch.as_tensor(getattr(record, name)) for name in names}
    tensors = {name: x.to(dtype) if x.is_floating_point() else x for name, x in tensors.items()}
    return dataclasses.replace(record, **tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("solver", "names"),
    [
        (ic.FixedPointIteration(rtol=2.0**-20, damping=0.75), ("rtol", "damping")),
        (
            ic.Anderson(rtol=2.0**-20, damping=0.75, regularization=2.0**-20),
            ("rtol", "damping", "regularization", "max_steps"),
        ),
        (ic.Broyden(rtol=2.0**-20, atol=2.0**-15, max_steps=4), ("rtol", "atol", "max_steps")),
        (ic.NewtonKrylov(rtol=2.0**-20), ("rtol",)),
        (ic.Compacting(ic.Anderson(rtol=2.0**-20), (False, True)), ()),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_solve_with_tensors_is_one_with_numbers(solver: Any, names: Any, dtype: torch.dtype) -> None:
    """Tensors of another dtype than the state's, too, for numbers that both can hold."""
    if isinstance(solver, ic.Compacting):
        tensors: Any = dataclasses.replace(solver, solver=as_tensors(solver.solver, ["rtol"], dtype))
    else:
        tensors = as_tensors(solver, names, dtype)
    for gradient in (ic.Neumann(3), ic.BPTT(3)):
        ours, theirs = (layer(solver=one, gradient=gradient) for one in (tensors, solver))
        assert ours.value.dtype == torch.float64
        torch.testing.assert_close(ours.value, theirs.value, rtol=1e-12, atol=1e-12)
        for name in ("steps", "residual", "tolerance"):
            a, b = (getattr(x.stats, name) for x in (ours, theirs))
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-15)
        assert torch.equal(ours.status, theirs.status)


@pytest.mark.parametrize(
    "make",
    [
        lambda lam: ic.Neumann(4, lam),
        lambda lam: ic.Unroll(4, lam),
        lambda lam: ic.Unroll(4, lam, recompute=True),
        lambda lam: ic.NeumannSeries(lam, lam * 1e-3),
        lambda lam: ic.Implicit(ic.GMRES(rtol=lam * 1e-3)),
    ],
)
def test_a_gradient_with_tensors_is_one_with_numbers(make: Any) -> None:
    found = []
    for lam in (torch.tensor(0.7, dtype=torch.float64), 0.7):
        w = W.clone().requires_grad_()
        value = layer(w, gradient=make(lam)).value
        found.append((value.detach(), *torch.autograd.grad((value**2).sum(), w)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)


def test_records_with_tensors() -> None:
    record = ic.Neumann(lam=torch.tensor(0.5))
    assert repr(record) == "Neumann(k=5, lam=float32[])"
    assert record == ic.Neumann(lam=torch.tensor(0.5)) != ic.Neumann(lam=torch.tensor(0.25))
    assert record != ic.Neumann(lam=0.5)
    assert pickle.loads(pickle.dumps(record)) == record
    with pytest.raises(TypeError, match="Neumann holds an array in lam, so it has no hash"):
        hash(record)
    with pytest.raises(ValueError, match=r"lam must lie in \(0, 1\]"):
        ic.Neumann(lam=torch.tensor(1.5))
    with pytest.raises(ValueError, match="lam of Unroll must be one number, or one for each sample"):
        layer(gradient=ic.Unroll(lam=torch.full((7,), 0.5)))
    with pytest.raises(TypeError, match="rtol of Anderson is an array of torch, and the state one of numpy"):
        ic.solve(lambda h, z: 0.5 * h, np.ones(2), None, solver=ic.Anderson(rtol=torch.tensor(0.5)))


# For h = a h + z all is known: B = λ a + 1 - λ.

A = 0.4


def scalar_layer(z: Any, gradient: Any) -> Any:
    solver = ic.FixedPointIteration(rtol=1e-3)
    return ic.fixed_point(lambda h, z: A * h + z, torch.zeros_like(z), z, solver=solver, gradient=gradient).value


def series(lam: Any) -> Any:
    return lam * sum((lam * A + 1 - lam) ** t for t in range(3))


def numbers(*values: float) -> list[torch.Tensor]:
    return [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in values]


def of_value(z: float, lam: float) -> float:
    """The derivative of h_k = h* + Bᵏ (h_0 - h*) in λ."""
    start = float(ic.solve(lambda h, z: A * h + z, np.zeros(()), z, solver=ic.FixedPointIteration(rtol=1e-3)).value)
    return 3 * (lam * A + 1 - lam) ** 2 * (A - 1) * (start - z / (1 - A))


@pytest.mark.parametrize("recompute", [False, True])
def test_the_value_of_unroll_has_a_derivative_in_lam(recompute: bool) -> None:
    z, lam = numbers(1.3, 0.7)
    found = torch.autograd.grad(scalar_layer(z, ic.Unroll(3, lam, recompute=recompute)), (z, lam))
    assert abs(of_value(1.3, 0.7)) > 1e-6
    np.testing.assert_allclose([float(x) for x in found], [float(series(0.7)), of_value(1.3, 0.7)], rtol=1e-8)


def test_the_value_of_neumann_has_none_and_its_gradient_has_one() -> None:
    for lam_ in (0.3, 0.9):
        z, lam = numbers(1.0, lam_)
        value = scalar_layer(z, ic.Neumann(3, lam))
        assert torch.autograd.grad(value, lam, allow_unused=True, retain_graph=True) == (None,)
        (slope,) = torch.autograd.grad(value, z, create_graph=True)
        np.testing.assert_allclose(float(slope.detach()), float(series(lam_)), rtol=1e-12)
        (of_slope,) = torch.autograd.grad(slope, lam)
        (expected,) = torch.autograd.grad(series(lam), lam)
        torch.testing.assert_close(of_slope, expected, rtol=1e-10, atol=0)


def test_transforms_of_torch_func() -> None:
    """The steps of Unroll are plain operations; what is computed outside of transforms refuses a wrapped setting."""
    z, lams = torch.tensor(1.3, dtype=torch.float64), torch.tensor([0.3, 0.7], dtype=torch.float64)
    mapped = torch.func.vmap(lambda lam: scalar_layer(z, ic.Unroll(3, lam)))(lams)
    torch.testing.assert_close(mapped, torch.stack([scalar_layer(z, ic.Unroll(3, float(lam))) for lam in lams]))
    slope = torch.func.grad(lambda lam: scalar_layer(z, ic.Unroll(3, lam)))(lams[1])
    np.testing.assert_allclose(float(slope), of_value(1.3, 0.7), rtol=1e-8)
    lam = lams[0]
    constant = torch.func.grad(lambda z: scalar_layer(z, ic.Neumann(3, lam)))(z)
    np.testing.assert_allclose(float(constant), float(series(0.3)), rtol=1e-12)
    for transform in (lambda call: torch.func.vmap(call)(lams), lambda call: torch.func.grad(call)(lams[0])):
        with pytest.raises(NotImplementedError, match="lam of Neumann is a tensor that was made within"):
            transform(lambda lam: scalar_layer(z, ic.Neumann(3, lam)))
        with pytest.raises(NotImplementedError, match="rtol of Anderson is a tensor that was made"):
            transform(lambda r: ic.fixed_point(lambda h, z: A * h + z, z, z, solver=ic.Anderson(rtol=r)).value)


def test_tools_that_read_a_setting_once() -> None:
    with pytest.warns(ict.GraphFallbackWarning, match="rtol of its solver is a tensor, whose number"):
        layer(solver=ict.CUDAGraphs(ic.Anderson(rtol=torch.tensor(1e-3))))
    w = W.float().requires_grad_()
    gradient = ic.Implicit(ic.GMRES(rtol=torch.tensor(1e-7)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = ic.fixed_point(
            f, torch.zeros(4, 3), (w, X.float()), solver=ic.Anderson(rtol=0.05), gradient=gradient, batch_ndim=1
        ).value
    assert torch.isfinite(torch.autograd.grad(value.sum(), w)[0]).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gradient", [ic.Unroll, ic.Neumann])
def test_settings_leave_the_dtype_of_the_state(gradient: Any, dtype: torch.dtype) -> None:
    w, x, lam = W.to(dtype), X.to(dtype), torch.tensor(0.3)
    values = []
    for one in (lam, 0.3):
        w = W.to(dtype).requires_grad_()
        value = ic.fixed_point(
            f, torch.zeros_like(x), (w, x), solver=ic.Anderson(rtol=0.05), gradient=gradient(3, one), batch_ndim=1
        ).value
        assert value.dtype == dtype
        assert torch.autograd.grad(value.float().sum(), w)[0].dtype == dtype
        values.append(value)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(*values, rtol=4 * eps, atol=4 * eps)
