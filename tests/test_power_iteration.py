"""``theory.spectral_radius`` and ``theory.contraction``: power iteration against dense linear algebra."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from libraries import JAX, NUMPY, TORCH, Library
from problems import layer

import implicit_core as ic
from implicit_core.theory import certify, contraction, spectral_radius

F64 = torch.float64
MONITORS = [spectral_radius, contraction]


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def linear(m: np.ndarray, library: Library = NUMPY) -> ic.Problem:
    """h = M h + z for each sample, (batch, d), with M (d, d) or (batch, d, d)."""
    m = np.broadcast_to(m, (3, *m.shape[-2:]))
    forth, back = library.array(np.array(m)), library.array(np.array(np.swapaxes(m, 1, 2)))

    def times(a: Any, x: Any) -> Any:
        return library.sealed(lambda: (a @ x[:, :, None])[:, :, 0])()

    return ic.Problem(
        lambda h, z: times(forth, h) + z,
        vjp=lambda h, z, v: (times(back, v), v),
        jvp=lambda h, z, dh, dz: times(forth, dh) + dz,
        batch_ndim=1,
    )


@pytest.mark.parametrize(
    "eigenvalues",
    [
        pytest.param([[0.9, 0.0], [0.0, 0.3]], id="real"),
        pytest.param([[-0.9, 0.0], [0.0, 0.9]], id="two signs"),
        pytest.param([[0.9 * math.cos(1), -0.9 * math.sin(1)], [0.9 * math.sin(1), 0.9 * math.cos(1)]], id="pair"),
    ],
)
def test_the_spectral_radius_of_matrices_that_are_not_normal(eigenvalues: list[list[float]], library: Library) -> None:
    """One step's growth is off by far more: the eigenvectors are not orthogonal."""
    block = np.block([[np.asarray(eigenvalues), np.zeros((2, 2))], [np.zeros((2, 2)), 0.5 * np.eye(2)]])
    basis = normal(3, 4, 4, seed=5) + np.eye(4)
    m = basis @ block @ np.linalg.inv(basis)
    h, z = (library.array(normal(3, 4, seed=s)) for s in (1, 2))
    found = spectral_radius(linear(m, library), h, z, steps=200)
    np.testing.assert_allclose(library.numpy(found), 0.9, rtol=1e-2)
    assert np.all(np.linalg.norm(m, 2, axis=(1, 2)) > 1.0)


def test_the_spectral_radius_has_no_bias_from_early_steps() -> None:
    m, zero = np.asarray([[0.9, 100.0], [0.0, 0.1]]), np.zeros((3, 2))
    np.testing.assert_allclose(spectral_radius(linear(m), zero, zero, steps=40), 0.9, rtol=1e-10)


def test_the_contraction_is_the_largest_singular_value_from_below(library: Library) -> None:
    case = layer(batch=4, width=5)
    h, z = library.array(normal(4, 5, seed=2)), library.array(case.z)
    slope = 1 - np.tanh(normal(4, 5, seed=2) @ case.z["w"].T + case.z["x"]) ** 2
    expected = np.linalg.norm(slope[:, :, None] * case.z["w"], 2, axis=(1, 2))
    estimates = [library.numpy(contraction(case.problem(library), h, z, steps=steps)) for steps in (1, 2, 3, 10, 400)]
    for earlier, later in itertools.pairwise(estimates):
        assert np.all(later >= earlier * (1 - 1e-12))
    assert np.all(estimates[0] < 0.95 * expected)
    assert np.all(estimates[-1] <= expected * (1 + 1e-12))
    np.testing.assert_allclose(estimates[-1], expected, rtol=1e-8)


def test_certificates_agree() -> None:
    case = layer(batch=2, width=6)
    h = ic.solve(case.problem(), case.h0, case.z).value
    certificate = certify(case.problem(), h, case.z, ic.OneStep())
    norm, radius = (monitor(case.problem(), h, case.z, steps=2000) for monitor in (contraction, spectral_radius))
    np.testing.assert_allclose(norm, certificate.contraction.value, rtol=1e-8)
    np.testing.assert_allclose(radius, certificate.spectral_radius, rtol=1e-2)


@pytest.mark.parametrize("monitor", MONITORS)
def test_samples_keep_to_themselves_and_zero_jacobians_give_zero(monitor: Any, library: Library) -> None:
    slope = library.array(np.asarray([[0.5], [np.nan], [0.0]]))
    problem = ic.Problem(
        lambda h, z: slope * h + z,
        vjp=lambda h, z, v: (slope * v, v),
        jvp=lambda h, z, dh, dz: slope * dh + dz,
        batch_ndim=1,
    )
    zero = library.array(np.zeros((3, 2)))
    found = library.numpy(monitor(problem, zero, zero))
    np.testing.assert_allclose(found[[0, 2]], [0.5, 0.0])
    assert np.isnan(found[1])


def test_starts_are_the_same_in_every_framework_and_change_with_the_seed(library: Library) -> None:
    m, zero = normal(3, 9, 9), np.zeros((3, 9))
    for monitor in MONITORS:
        ours = monitor(linear(m, library), library.array(zero), library.array(zero), steps=3)
        theirs = monitor(linear(m), zero, zero, steps=3)
        np.testing.assert_allclose(library.numpy(ours), theirs, rtol=1e-12)
        assert np.all(np.abs(monitor(linear(m), zero, zero, steps=3, seed=1) - theirs) > 1e-6)


def test_a_plain_function_is_differentiated_by_its_framework() -> None:
    """States may be pytrees, and one system without batch axes. The default is ``fixed_point``'s, batch_ndim=0."""
    m = normal(6, 6, seed=7) / 60 + np.linspace(0.5, 1.0, 6) / 6  # with a gap: few steps are enough
    norm, radius = np.linalg.norm(m, 2), np.abs(np.linalg.eigvals(m)).max()
    for library in (TORCH, JAX):
        w, xp = library.array(m), library.xp

        def f(h: Any, z: Any, w: Any = w, xp: Any = xp) -> Any:
            flat = xp.concat([h["a"], xp.reshape(h["b"][0], (h["a"].shape[0], 4))], axis=1) @ w.T + z
            return {"a": flat[:, :2], "b": (xp.reshape(flat[:, 2:], (-1, 2, 2)),)}

        for batch in (3, 1):
            h = library.array({"a": np.zeros((batch, 2)), "b": (np.zeros((batch, 2, 2)),)})
            z, options = library.array(normal(batch, 6)), {"batch_ndim": 1} if batch == 3 else {}
            shape = (3,) if batch == 3 else ()
            ours = library.numpy(contraction(f, h, z, steps=20, **options))
            np.testing.assert_allclose(ours, np.full(shape, norm), rtol=1e-8)
            ours = library.numpy(spectral_radius(f, h, z, steps=40, **options))
            np.testing.assert_allclose(ours, np.full(shape, radius), rtol=5e-3)


@pytest.mark.parametrize("monitor", MONITORS)
def test_jax_compiles_them_and_takes_no_gradient(monitor: Any) -> None:
    w, x = jnp.asarray(0.3 * normal(5, 5)), jnp.asarray(normal(2, 5))

    def found(x: jax.Array) -> jax.Array:
        return monitor(lambda h, z: jnp.tanh(h @ w.T + z), jnp.zeros((2, 5)), x, batch_ndim=1)

    np.testing.assert_allclose(jax.jit(found)(x), found(x), rtol=1e-10)
    np.testing.assert_array_equal(jax.grad(lambda x: jnp.sum(found(x)))(x), 0.0)


def tanh_cell() -> tuple[Callable[..., Any], torch.Tensor, torch.Tensor]:
    w = torch.tensor(0.3 * normal(5, 5, seed=1), requires_grad=True)
    h, x = (torch.tensor(normal(4, 5, seed=s), requires_grad=True) for s in (2, 3))
    return lambda h, z: torch.tanh(h @ w.T + z), h, x


@pytest.mark.parametrize("monitor", MONITORS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_torch_monitors_work_without_grad(monitor: Any, mode: Callable[..., Any]) -> None:
    f, h, x = tanh_cell()
    outside = monitor(f, h, x, batch_ndim=1)
    assert not outside.requires_grad
    with mode():
        inside = monitor(f, h * 1, x * 1, batch_ndim=1)
    assert not inside.requires_grad
    torch.testing.assert_close(inside, outside, rtol=1e-12, atol=0)
    with mode():  # an input that the derivative holds, and a state that is one row at all samples
        held = monitor(
            lambda h, z: h * z[0] + z[1], torch.ones(3).expand(2, 3), [torch.full((2, 3), 0.5), 1.0], batch_ndim=1
        )
    torch.testing.assert_close(held, torch.full((2,), 0.5))


@pytest.mark.parametrize("monitor", MONITORS)
def test_a_module_may_be_monitored(monitor: Any) -> None:
    class Cell(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(3, 3)

        def forward(self, h: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
            return 0.5 * h + 0 * self.inner(h) + z

    cell, h = Cell(), torch.ones(2, 3)
    torch.testing.assert_close(monitor(cell, h, h, batch_ndim=1), torch.full((2,), 0.5))
    assert all(p.grad is None for p in cell.parameters())


@pytest.mark.parametrize("monitor", MONITORS)
def test_half_precision_is_measured_in_single(monitor: Any) -> None:
    half = monitor(lambda h, z: 0.5 * h + z, torch.zeros(2, 8).half(), torch.ones(2, 8).half(), batch_ndim=1)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, torch.full((2,), 0.5), rtol=2e-3, atol=0)


def test_costs_of_the_monitors() -> None:
    case = layer(batch=2, width=3)
    for monitor, counts in (
        (spectral_radius, {"f": 1, "vjp_h": 8}),  # one of them for the independence of samples,
        (contraction, {"f": 1, "vjp_h": 8, "jvp_h": 6}),
    ):
        problem = case.linearized()
        monitor(problem, case.h0, case.z, steps=7)
        assert case.counts == counts


def test_the_monitors_refuse_wrong_arguments() -> None:
    h = np.zeros((2, 3))
    problem = linear(np.eye(3))
    for monitor in MONITORS:
        with pytest.raises(TypeError, match="f must be callable"):
            monitor(None, h, h)
        with pytest.raises(TypeError, match="batch_ndim belongs to the problem"):
            monitor(problem, h, h, batch_ndim=1)
        with pytest.raises(NotImplementedError, match="needs the VJP of F"):
            monitor(lambda h, z: h, h, h)
        with pytest.raises(ValueError, match="steps must be at least 1"):
            monitor(problem, h, h, steps=0)
        with pytest.raises(TypeError, match="real floating-point"):
            monitor(problem, h.astype(int), h)
        with pytest.raises(ValueError, match="the result of f must have the shape of h"):
            monitor(lambda h, z: h[:, :2], torch.zeros(2, 3), None)
    with pytest.raises(NotImplementedError, match="needs the JVP of F"):
        contraction(ic.Problem(lambda h, z: h, vjp=lambda h, z, v: (v, v)), h, h)


@pytest.mark.parametrize("steps", [2, 4, 20, 21, 50, 51])
@pytest.mark.parametrize("unit", [1.0, 1e2, 1e8])
def test_a_pair_of_opposite_eigenvalues_in_any_units(unit: float, steps: int) -> None:
    """It grows by turns, by 1.5 times and over ``unit``."""
    j = np.array([[0.0, 1.5 * unit], [1.5 / unit, 0.0]])
    problem = ic.Problem(lambda h, z: j @ h + z, vjp=lambda h, z, v: (j.T @ v, v))
    np.testing.assert_allclose(spectral_radius(problem, np.zeros(2), np.zeros(2), steps=steps), 1.5, rtol=1e-9)
