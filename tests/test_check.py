"""ic.check, and the refusal of an F that couples what batch_ndim takes for samples."""

import copy
import itertools
import pickle
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

import implicit_core as ic
from implicit_core.adapters import torch as ict
from implicit_core.theory import contraction, spectral_radius

N, D = 6, 4
JAX = pytest.param("jax", 0, marks=pytest.mark.slow)  # compiles many programs


def coupled_cells(xp, rng, array):
    """Maps of (N, D) whose rows depend on each other, in the operations that torch and jax.numpy share."""
    dense, weight = array(rng.normal(size=(N, N)) / N), array(rng.normal(size=(D, D)) / D)
    ring = array(np.roll(np.eye(N), 1, axis=0))
    pair = np.eye(N)
    pair[rng.integers(N - 1), N - 1] = 0.5  # one sample depends on one other
    pair = array(pair)
    one = array(np.ones((N, 1)))

    def norm(h, z):
        centred = h - xp.mean(h, 0, keepdims=True)
        return xp.tanh(0.3 * centred / xp.sqrt(xp.mean(centred**2, 0, keepdims=True) + 1e-5) + z)

    def attention(h, z):
        scores = xp.exp(h @ weight @ h.T)
        return xp.tanh(0.3 * (scores / (scores @ one)) @ h + z)

    return [
        lambda h, z: xp.tanh(0.3 * dense @ h + z),
        lambda h, z: xp.tanh(0.3 * ring @ (h @ weight) + z),
        lambda h, z: xp.tanh(0.3 * pair @ h + z),
        norm,
        attention,
        lambda h, z: xp.tanh(0.5 * h + 1e-3 * dense @ h + z),
        lambda h, z: xp.tanh(0.5 * h + 1e-7 * xp.mean(h, 0, keepdims=True) + z),  # above √ε, see is_rounding
    ]


def independent_cells(xp, rng, array):
    weight, weights = array(rng.normal(size=(D, D)) / D), array(rng.normal(size=(N, D, D)) / D)

    def layer_norm(h, z):
        centred = h - xp.mean(h, -1)[:, None]
        return xp.tanh(0.3 * centred / xp.sqrt(xp.mean(centred**2, -1)[:, None] + 1e-5) + z)

    def group_norm(h, z):
        return layer_norm(h.reshape(2 * N, D // 2), 0.0).reshape(N, D) + z

    def attention(h, z):
        tokens = h.reshape(N, 2, D // 2)
        scores = xp.exp(tokens @ xp.swapaxes(tokens, 1, 2))
        return xp.tanh(0.3 * (scores / xp.sum(scores, -1)[..., None] @ tokens).reshape(N, D) + z)

    def softmax(h, z):
        e = xp.exp(h)
        return 0.3 * e / xp.sum(e, -1)[:, None] + z

    def convolution(h, z):
        return xp.tanh(0.2 * (xp.roll(h, 1, 1) + 0.5 * h) + z)

    return [
        lambda h, z: xp.tanh(0.5 * h + z),
        lambda h, z: xp.tanh(0.5 * h @ weight + z),
        lambda h, z: xp.tanh(0.5 * (h[:, None, :] @ weights)[:, 0, :] + z),
        layer_norm,
        group_norm,
        attention,
        softmax,
        convolution,
    ]


FRAMEWORKS = {"torch": (torch, torch.asarray), "jax": (jnp, jnp.asarray)}


def numpy_problem(f):
    """A NumPy problem with the VJP and JVP of a torch function."""

    def vjp(h, z, v):
        return tuple(np.asarray(x) for x in torch.func.vjp(f, torch.tensor(h), torch.tensor(z))[1](torch.tensor(v)))

    def jvp(h, z, dh, dz):
        at, along = (torch.tensor(h), torch.tensor(z)), (torch.tensor(dh), torch.tensor(dz))
        return np.asarray(torch.func.jvp(f, at, along)[1])

    return ic.Problem(lambda h, z: np.asarray(f(torch.tensor(h), torch.tensor(z))), vjp=vjp, jvp=jvp, batch_ndim=1)


def reports(framework, cells, seed):
    rng = np.random.default_rng(seed)
    xp, array = FRAMEWORKS["torch" if framework == "numpy" else framework]
    z = rng.normal(size=(N, D))
    for f in cells(xp, rng, array):
        if framework == "numpy":
            yield ic.check(numpy_problem(f), np.zeros((N, D)), z)
        else:
            yield ic.check(f, array(np.zeros((N, D))), array(z), batch_ndim=1)


@pytest.mark.parametrize(("framework", "seed"), [*itertools.product(["numpy", "torch"], range(5)), JAX])
def test_coupled_samples_are_found(framework, seed):
    for i, report in enumerate(reports(framework, coupled_cells, seed)):
        assert "coupled" in report.kinds(), (i, report)
        assert report.contraction is None


@pytest.mark.parametrize(("framework", "seed"), [*itertools.product(["numpy", "torch"], range(14)), JAX])
def test_independent_samples_are_never_accused(framework, seed):
    for i, report in enumerate(reports(framework, independent_cells, seed)):
        assert report.ok, (i, report)
        assert report.coupling == 0.0


def test_nan_of_zero_times_infinity_does_not_accuse():
    problem = ic.Problem(lambda h, z: 0.5 * h, vjp=lambda h, z, v: (v * np.inf, v), batch_ndim=1)
    with np.errstate(invalid="ignore"):
        report = ic.check(problem, np.zeros((4, 2)), np.zeros((4, 2)))
    assert "coupled" not in report.kinds()
    assert "derivatives" in report.kinds()


def test_negative_zero_does_not_accuse():
    problem = ic.Problem(lambda h, z: -0.5 * h + z, vjp=lambda h, z, v: (-0.5 * v, v), batch_ndim=1)
    assert ic.check(problem, np.zeros((4, 2)), np.ones((4, 2))).ok


def test_wrong_derivatives_are_found():
    a = np.array([[0.3, 0.2], [0.0, 0.1]])
    h, z = np.zeros((3, 2)), np.ones((3, 2))

    def findings(vjp, jvp):
        return ic.check(ic.Problem(lambda h, z: h @ a + z, vjp=vjp, jvp=jvp, batch_ndim=1), h, z)

    right_vjp, right_jvp = (lambda h, z, v: (v @ a.T, v)), (lambda h, z, dh, dz: dh @ a + dz)
    right = findings(right_vjp, right_jvp)
    assert right.ok
    assert right.adjoint_error < 1e-14
    assert right.difference_error < 1e-9
    # ‖A‖₂ by dense linear algebra, and its largest eigenvalue.
    assert right.contraction == pytest.approx(np.linalg.norm(a, 2), rel=1e-6)
    assert right.spectral_radius == pytest.approx(0.3, rel=0.05)
    transposed = findings(lambda h, z, v: (v @ a, v), right_jvp)
    assert "not adjoint" in repr(transposed)
    in_z = findings(lambda h, z, v: (v @ a.T, 1.01 * v), right_jvp)
    assert in_z.kinds() == {"derivatives"}
    assert "respect to z" in in_z.findings[0].text
    both = findings(lambda h, z, v: (1.1 * v @ a.T, v), lambda h, z, dh, dz: 1.1 * dh @ a + dz)  # adjoint, and wrong
    assert both.kinds() == {"derivatives"}
    assert both.adjoint_error < 1e-14


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_right_derivatives_pass_in_every_precision(dtype):
    z = torch.linspace(-1, 1, 12, dtype=dtype).reshape(3, 4)
    solver = ic.Anderson(rtol=float(torch.finfo(dtype).eps))
    assert ic.check(
        lambda h, z: torch.tanh(0.5 * h + z), torch.zeros(3, 4, dtype=dtype), z, batch_ndim=1, solver=solver
    )
    report = ic.check(lambda h, z: torch.tanh(0.5 * h + z), torch.zeros(3, 4, dtype=dtype), z, batch_ndim=1)
    assert report.ok, report


def test_functions_that_are_none():
    h, z = torch.zeros(4, 3), torch.ones(4, 3)
    state = torch.random.get_rng_state()
    random = ic.check(lambda h, z: nn.functional.dropout(0.5 * h + z, 0.5), h, z, batch_ndim=1)
    assert random.kinds() == {"random"}
    assert torch.equal(torch.random.get_rng_state(), state)
    assert ic.check(lambda h, z: 0.5 * h.mul_(0.5).add_(1) + z, h, z).kinds() >= {"writes"}
    assert torch.equal(h, torch.zeros(4, 3))
    written = ic.check(lambda h, z: 0.5 * torch.cos_(h) + z, h, z, batch_ndim=1)  # works, as evaluations have copies
    assert (written.kinds(), written.notes) == ({"writes"}, ()), written
    written = ic.check(lambda h, z: 0.5 * torch.tanh(h) + z.mul_(0.5), h, z, batch_ndim=1)
    assert "derivatives" in written.notes[0]
    assert ic.check(lambda h, z: (0.5 * h + z)[:2], h, z).kinds() == {"structure"}
    assert ic.check(lambda h, z: (0.5 * h + z).double(), h, z).kinds() == {"structure"}
    assert ic.check(lambda h, z: -2.0 * h + z, h, z).kinds() == {"contraction"}


class Cell(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.inner, self.norm = nn.Linear(D, D), norm
        nn.init.orthogonal_(self.inner.weight, 0.3)

    def forward(self, h, x):
        return torch.tanh(0.3 * self.norm(self.inner(h)) + x)


def test_a_module_keeps_its_state():
    cell = Cell(nn.BatchNorm1d(D))
    before = copy.deepcopy(cell.state_dict())
    x = torch.randn(8, D)
    report = ic.check(cell, torch.zeros(8, D), x, batch_ndim=1)
    assert report.kinds() == {"state", "coupled"}
    assert all(torch.equal(a, b) for a, b in zip(before.values(), cell.state_dict().values(), strict=True))
    assert all(p.grad is None for p in cell.parameters())
    assert max(map(len, repr(report).splitlines())) <= 80
    assert "batch_ndim=0" in repr(report)
    assert ic.check(cell.eval(), torch.zeros(8, D), x, batch_ndim=1).ok


@pytest.mark.filterwarnings("ignore:the cell has BatchNorm1d")
def test_layer_refuses_coupled_samples():
    layer = ict.ImplicitLayer(Cell(nn.BatchNorm1d(D)))
    x = torch.randn(8, D)
    with pytest.raises(ValueError, match="batch_ndim=0"):
        layer(x)
    layer.eval()(x)
    with pytest.raises(ValueError, match="batch_ndim=0"):  # the mode is part of what is remembered
        layer.train()(x)
    ict.ImplicitLayer(layer.cell, batch_ndim=0)(x)
    ict.ImplicitLayer(layer.cell, check=False)(x)


def test_layer_tests_once_for_each_shape():
    calls = [0]

    def cell(h, x):
        calls[0] += 1
        return torch.tanh(0.5 * h + x)

    layer = ict.ImplicitLayer(cell, solver=ic.FixedPointIteration(max_steps=3), gradient=ic.Unroll(2, 0.5))

    def count(layer, x):
        calls[0] = 0
        layer(x)
        return calls[0]

    x = torch.randn(3, D)
    assert [count(layer, x) for _ in range(3)] == [7, 5, 5]
    assert count(copy.deepcopy(layer), x) == 5
    assert count(layer, torch.randn(4, D)) == 7
    assert count(layer, torch.randn(1, D)) == 5
    with torch.no_grad():
        assert count(layer, torch.randn(5, D)) == 5
    module = ict.ImplicitLayer(Cell(nn.LayerNorm(D)))
    module(x)
    assert pickle.loads(pickle.dumps(module))._checked == module._checked != set()
    assert all(key.startswith("cell.") for key in module.state_dict())


def test_layer_under_a_checkpoint():
    cell = Cell(nn.LayerNorm(D))
    x = torch.randn(3, D, requires_grad=True)
    torch.utils.checkpoint.checkpoint(ict.ImplicitLayer(cell), x, use_reentrant=False).sum().backward()
    got, x.grad = x.grad, None
    ict.ImplicitLayer(cell, check=False)(x).sum().backward()
    assert torch.equal(got, x.grad)


@pytest.mark.parametrize("estimate", [spectral_radius, contraction])
def test_estimates_refuse_coupled_samples(estimate):
    a = np.random.default_rng(0).normal(size=(N, N)) / N

    def f(h, z):
        return jnp.tanh(a @ h + z)

    h = jnp.zeros((N, D))
    with pytest.raises(ValueError, match="batch_ndim=0"):
        estimate(f, h, h, batch_ndim=1)
    assert np.isnan(jax.jit(lambda h: estimate(f, h, h, batch_ndim=1))(h)).all()
    assert np.isfinite(jax.jit(lambda h: estimate(f, h, h))(h))


def test_arguments_of_a_wrong_kind_raise():
    with pytest.raises(TypeError, match="f"):
        ic.check(3, np.zeros(2), np.zeros(2))
    with pytest.raises(TypeError, match="h0"):
        ic.check(lambda h, z: h, 3.0, 1.0)
    with pytest.raises(NotImplementedError, match="jit"):
        jax.jit(lambda h: ic.check(lambda h, z: h, h, h).ok)(jnp.zeros(2))


@pytest.mark.parametrize("where", ["h0", "z"])
def test_a_value_that_is_not_finite_is_no_wrong_derivative(where):
    problem = ic.Problem(lambda h, z: 0.5 * h + z, vjp=lambda h, z, v: (0.5 * v, v), batch_ndim=1)
    start, z = np.zeros((3, 2)), np.ones((3, 2))
    (start if where == "h0" else z)[1, 0] = np.nan
    assert ic.check(problem, start, z).kinds() == {"nonfinite"}


def test_a_layer_tests_a_cell_that_is_defined_near_its_solution_alone():
    def cell(h, x):
        assert h.abs().max() < 1.05
        return torch.tanh(0.5 * h + x)

    def coupled(h, x):
        return cell(h, x) + 0.1 * h.mean(0)

    layer = ict.ImplicitLayer(cell, solver=ic.FixedPointIteration(max_steps=20))
    x = 0.3 * torch.randn(4, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    layer(x.requires_grad_()).sum().backward()
    with pytest.raises(ic.CoupledSamplesError):
        ict.ImplicitLayer(coupled, solver=ic.steps(5), gradient=ic.Unroll())(x)


def test_a_layer_that_was_pickled_without_counts_can_be_called():
    layer = ict.ImplicitLayer(Cell(nn.LayerNorm(D)))
    for name in ("samples", "_unconverged"):
        del vars(layer)[name]
    restored = pickle.loads(pickle.dumps(layer))
    restored(torch.randn(3, D))
    assert (restored.samples, restored.unconverged) == (3, 0)


# Roots.


def uneven(x: Any, z: Any) -> Any:
    """Two equations of two unknowns; the second in units of 1e-6."""
    a, b = x[..., 0], x[..., 1]
    return jnp.stack([a + 0.5 * b**3 - z, 1e-6 * (b + a - 1)], axis=-1)


def test_a_root_is_checked_as_g() -> None:
    """Derivatives of g, independence, and the sizes of its parts, where a fixed point has its contraction."""
    x0, z = jnp.ones((3, 2)), jnp.asarray([1.0, 2.0, 3.0])
    report = ic.check(ic.RootProblem(uneven, batch_ndim=1), x0, z)
    assert report.kinds() == {"units"}
    assert 1e5 < report.unevenness < 1e8
    assert report.point == "solution"
    assert report.coupling == 0.0
    assert report.difference_error < 1e-6
    assert report.contraction is report.spectral_radius is None
    assert "g_scale=" in str(report)
    assert ic.check(ic.RootProblem(uneven, batch_ndim=1, g_scale=jnp.asarray([1.0, 1e-6])), x0, z).ok


def test_what_is_wrong_with_a_root_is_said_in_its_words() -> None:
    x0, z = np.ones((3, 2)), np.asarray([[1.0], [2.0], [3.0]])

    def problem(f: Any, factor: float = 1.0) -> ic.RootProblem[Any, Any]:
        return ic.RootProblem(
            f,
            jvp=lambda x, z, dx, dz: factor * 3 * x**2 * dx - dz,
            vjp=lambda x, z, v: (factor * 3 * x**2 * v, -v.sum(1, keepdims=True)),
            jacobian=lambda x, z: 3 * x[:, :, None] ** 2 * np.eye(2),
            batch_ndim=1,
        )

    assert ic.check(problem(lambda x, z: x**3 - z), x0, z).ok
    wrong = ic.check(problem(lambda x, z: x**3 - z, 1.1), x0, z)
    assert wrong.kinds() == {"derivatives"}
    assert {finding.text.split(" differs")[0] for finding in wrong.findings} == {
        "the JVP with respect to x",
        "the VJP with respect to x",
    }
    assert "an evaluation" not in str(wrong)
    coupled = ic.check(
        ic.RootProblem(lambda x, z: x**3 + x.mean(0, keepdims=True) - z, batch_ndim=1), jnp.ones((3, 2)), jnp.asarray(z)
    )
    assert coupled.findings[0].text.startswith("g couples the samples")
    assert not re.search(r"\bF\b|\bh0?\b", str(coupled))
