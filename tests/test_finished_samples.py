"""What solves and linear solves see for nothing: the residual of a finished sample does not move, or samples couple."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from libraries import LIBRARIES, TORCH, Library
from torch import nn

import implicit_core as ic
import implicit_core.adapters.torch as ict
from implicit_core.coupling import halves, unchecked

BATCH, WIDTH = 6, 5
OPTIONS = {"rtol": 1e-8, "max_steps": 300}
SOLVERS = [
    ic.FixedPointIteration(**OPTIONS),
    ic.Anderson(**OPTIONS),
    ic.Broyden(**OPTIONS),
    ic.FixedPointIteration(check_every=3, **OPTIONS),
]
LINEAR = [
    ic.GMRES(restart=2, **OPTIONS),
    ic.GMRES(restart=30, **OPTIONS),
    ic.CG(**OPTIONS),
    ic.BiCGSTAB(**OPTIONS),
    ic.Richardson(relaxation=0.5, **OPTIONS),
    ic.Richardson(relaxation=0.5, check_every=3, **OPTIONS),
]
# Eager JAX compiles each operation.
QUICK = [x for x in LIBRARIES if x.name != "jax"]


class Mixed:
    """h -> rates h + mixing h + z: samples converge one after the other, and are mixed unless ``size`` is 0."""

    def __init__(self, library: Library, size: float, dtype: Any = np.float64, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        rates, mixing = np.linspace(0.0, 0.8, BATCH)[:, None], size * rng.uniform(size=(BATCH, BATCH)) / BATCH
        mixing = (mixing + mixing.T) / 2  # for CG
        weight = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0]
        self.weight = library.array((weight * np.linspace(0.2, 1.0, WIDTH) @ weight.T).astype(dtype))
        self.rates, self.mixing = (library.array(a.astype(dtype)) for a in (rates, mixing))
        self.z = library.array(rng.normal(size=(BATCH, WIDTH)).astype(dtype))
        self.h0 = library.array(np.zeros((BATCH, WIDTH), dtype))

    def jacobian(self, v: Any) -> Any:
        return self.rates * (v @ self.weight) + self.mixing @ v

    def problem(self, batch_ndim: int = 1) -> ic.Problem:
        return ic.Problem(
            lambda h, z: self.jacobian(h) + z,
            vjp=lambda h, z, v: (self.jacobian(v), v),
            jvp=lambda h, z, dh, dz: self.jacobian(dh) + dz,
            batch_ndim=batch_ndim,
        )


def assert_true(library: Library, solution: ic.Solution, residual: Any, size: Any) -> None:
    """Samples that are called converged are: of a coupled system, too."""
    norm, of_all = (np.linalg.norm(library.numpy(x), axis=-1) for x in (residual, size))
    converged = library.numpy(solution.converged)
    assert np.all(norm[converged] <= 1.01 * OPTIONS["rtol"] * (of_all[converged] + 1e-3))


@pytest.mark.parametrize("size", [0.3, 1e-3])
@pytest.mark.parametrize("solver", [*SOLVERS, ic.NewtonKrylov(**OPTIONS)], ids=repr)
def test_a_solve_refuses_coupled_samples_or_is_right(solver: ic.Solver, size: float, library: Library) -> None:
    case = Mixed(library, size)
    assert bool(ic.solve(case.problem(0), case.h0, case.z, solver=solver).converged)
    try:
        solution = ic.solve(case.problem(), case.h0, case.z, solver=solver)
    except ic.CoupledSamplesError:
        pass
    else:  # all samples were active to the end
        assert isinstance(solver, (ic.Broyden, ic.Anderson, ic.NewtonKrylov))
        f = case.jacobian(solution.value) + case.z
        assert_true(library, solution, f - solution.value, f)


@pytest.mark.parametrize("solver", [*SOLVERS, ic.NewtonKrylov(**OPTIONS)], ids=repr)
def test_without_the_check_or_in_one_system_a_solve_goes_on(solver: ic.Solver) -> None:
    case = Mixed(TORCH, 0.3)
    settings = {name: getattr(solver, name) for name in ("rtol", "max_steps", "check_every")}
    for off in ({"check": False}, {"freeze": False}):
        ic.solve(case.problem(), case.h0, case.z, solver=type(solver)(**settings, **off))


@pytest.mark.parametrize("size", [0.3, 1e-3])
@pytest.mark.parametrize("library", QUICK, ids=[x.name for x in QUICK])
@pytest.mark.parametrize("solver", LINEAR, ids=repr)
def test_a_linear_solve_refuses_coupled_samples_or_is_right(
    solver: ic.LinearSolver, size: float, library: Library
) -> None:
    case = Mixed(library, size)

    def operator(v: Any) -> Any:
        return v - case.jacobian(v)

    assert bool(ic.solve_linear(operator, case.z, solver=solver, batch_ndim=0).converged)
    settings = {name: getattr(solver, name) for name in ("rtol", "max_steps", "check_every")}
    ic.solve_linear(operator, case.z, solver=type(solver)(**settings, check=False), batch_ndim=1)
    try:
        solution = ic.solve_linear(operator, case.z, solver=solver, batch_ndim=1)
    except ic.CoupledSamplesError:
        pass
    else:  # all samples were active in every cycle
        assert isinstance(solver, (ic.CG, ic.BiCGSTAB)) or solver == LINEAR[1]
        assert_true(library, solution, case.z - operator(solution.value), case.z)


def test_one_sample_that_depends_on_one_other_is_found() -> None:
    """Both of them in the same half, which a product with one half does not show."""
    same = halves(BATCH)
    slow, fast = [i for i in range(BATCH) if same[i] == same[0]][:2]
    a = np.eye(BATCH) * np.where(np.arange(BATCH) == slow, 0.1, 1.0)[:, None]
    a[fast, slow] = 0.5
    with pytest.raises(ic.CoupledSamplesError):
        ic.solve_linear(lambda v: a @ v, np.ones((BATCH, 1)), solver=ic.Richardson(rtol=1e-3), batch_ndim=1)


def test_the_last_step_is_looked_at() -> None:
    """After it there is no other, and the first sample is no longer the answer that its status says."""
    a = np.array([[1.0, 0.5], [0.0, 0.1]])
    b = np.array([[1.0], [1.0]])
    with pytest.raises(ic.CoupledSamplesError):
        ic.solve_linear(lambda v: a @ v, b * [[1.0], [1e-7]], solver=ic.Richardson(max_steps=2), batch_ndim=1)


def coupled_system(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A matrix of samples that couple, by 1 to 1e-8, also in units of their own, and a right-hand side (N, D)."""
    rng = np.random.default_rng(seed)
    n, d = int(rng.integers(2, 6)), int(rng.integers(1, 6))
    a = rng.integers(2) * np.eye(n * d) - rng.normal(size=(n * d, n * d)) * 10 ** rng.uniform(-2, 0.5)
    a = a + a.T if seed % 5 == 0 else a
    own = np.kron(np.eye(n), np.ones((d, d)))
    a = a * (own + (1 - own) * 10 ** rng.uniform(-8, 0))
    units = np.repeat(10 ** rng.uniform(-3, 3, size=n), d) if seed % 4 == 0 else np.ones(n * d)
    b = rng.normal(size=(n, d)) * 10 ** rng.uniform(-3, 3, size=(n, 1))
    dtype = [np.float64, np.float32][seed % 2]
    return (units[:, None] * a / units).astype(dtype), b.astype(dtype)


@pytest.mark.parametrize(
    "solver",
    [
        ic.GMRES(rtol=1e-8, max_steps=300),
        ic.GMRES(restart=2, rtol=1e-5, max_steps=100),
        ic.CG(rtol=1e-8),
        ic.BiCGSTAB(rtol=1e-6),
        ic.Richardson(relaxation=0.5),
    ],
    ids=repr,
)
def test_what_a_linear_solve_of_coupled_samples_tells_is_true(solver: ic.LinearSolver) -> None:
    refused = 0
    for seed in range(600):
        a, b = coupled_system(seed)
        try:
            with np.errstate(all="ignore"):
                solution = ic.solve_linear(
                    lambda v, a=a, b=b: (a @ v.reshape(-1)).reshape(b.shape), b, solver=solver, batch_ndim=1
                )
        except ic.CoupledSamplesError:
            refused += 1
            continue
        a, b, x = (y.astype(np.float64) for y in (a, b, solution.value))
        residual = np.linalg.norm(b - (a @ x.reshape(-1)).reshape(b.shape), axis=1)
        rows = np.linalg.norm(a.reshape(*b.shape, -1), ord=2, axis=(1, 2))
        size = np.linalg.norm(b, axis=1)
        rounding = 16 * np.finfo(solution.value.dtype).eps * (rows * np.linalg.norm(x) + size)
        converged = np.asarray(solution.converged)
        assert np.all(residual[converged] <= 1.01 * np.maximum(solver.rtol * size, rounding)[converged])
    assert refused > 150


ESTIMATORS = [
    ic.Implicit(ic.GMRES(restart=2), on_failure="warn"),
    ic.NeumannSeries(rtol=1e-6),
    ic.NeumannSeries(rtol=1e-6, contraction=0.9),
]


@pytest.mark.parametrize("library", QUICK, ids=[x.name for x in QUICK])
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_an_exact_gradient_refuses_coupled_samples(estimator: ic.Estimator, library: Library) -> None:
    case = Mixed(library, 0.3)
    h = ic.solve(case.problem(0), case.h0, case.z).value
    pullback = estimator.vjp(case.problem(), h, case.z)[1]
    with pytest.raises(ic.CoupledSamplesError, match="batch_ndim=0"):
        pullback(case.z)
    estimator.vjp(case.problem(0), h, case.z)[1](case.z)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("seed", range(10))
def test_independent_samples_are_never_accused(seed: int, dtype: Any) -> None:
    for library in QUICK:
        case = Mixed(library, 0.0, dtype, seed)
        options = {"rtol": 1e-5, "max_steps": 300}
        for solver in SOLVERS:
            assert library.numpy(
                ic.solve(case.problem(), case.h0, case.z, solver=type(solver)(**options)).converged
            ).all()
        for linear in (
            ic.GMRES(restart=2, **options),
            ic.CG(**options),
            ic.BiCGSTAB(**options),
            ic.Richardson(**options),
        ):
            found = ic.solve_linear(lambda v, case=case: v - case.jacobian(v), case.z, solver=linear, batch_ndim=1)
            assert library.numpy(found.converged).all()
        for estimator in ESTIMATORS:
            estimator.vjp(case.problem(), case.z, case.z)[1](case.z)


def test_a_random_map_is_told_apart() -> None:
    case, rng = Mixed(TORCH, 0.0), np.random.default_rng(0)

    def noisy(h: Any, z: Any) -> Any:
        return case.jacobian(h) + z + 1e-3 * torch.asarray(rng.normal(size=(BATCH, WIDTH)))

    with pytest.warns(ic.ChangingFunctionWarning, match="it is random"):
        ic.solve(noisy, case.h0, case.z, solver=ic.FixedPointIteration(rtol=1e-2), batch_ndim=1)

    def noisy_product(v: Any) -> Any:
        return v - case.jacobian(v) * (1 + 1e-3 * torch.asarray(rng.normal(size=(BATCH, 1))))

    ic.solve_linear(noisy_product, case.z, solver=ic.Richardson(rtol=1e-2), batch_ndim=1)  # no word of coupling


class Cell(nn.Module):
    """The same map as a module."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.case = Mixed(TORCH, size)
        self.weight = nn.Parameter(self.case.weight)

    def forward(self, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return self.case.rates * (h @ self.weight) + self.case.mixing @ h + x


@pytest.mark.parametrize("gradient", ESTIMATORS, ids=repr)
def test_a_layer_that_is_told_not_to_look_does_not(gradient: ic.Estimator) -> None:
    cell = Cell(0.3)
    settings = {"solver": ic.NewtonKrylov(**OPTIONS), "gradient": gradient}
    x = cell.case.z
    with pytest.raises(ic.CoupledSamplesError):
        ict.ImplicitLayer(cell, **settings)(x, cell.case.h0)
    layer = ict.ImplicitLayer(cell, check=False, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ic.ConvergenceWarning)
        warnings.simplefilter("ignore", ic.InexactGradientWarning)
        layer(x, cell.case.h0).sum().backward()
    assert torch.all(torch.isfinite(cell.weight.grad))


@pytest.mark.parametrize("gradient", [ic.Implicit(), ic.Implicit(ic.BiCGSTAB())], ids=repr)
def test_a_compiled_gradient_of_coupled_samples_is_nan(gradient: ic.Estimator) -> None:
    """Nothing can be raised there. Independent samples keep theirs."""
    rng = np.random.default_rng(0)
    weight, x = jnp.asarray(rng.normal(size=(WIDTH, WIDTH)) / WIDTH), jnp.asarray(rng.normal(size=(BATCH, WIDTH)))

    def loss(weight: Any, ring: Any, batch_ndim: int) -> Any:
        solution = ic.fixed_point(
            lambda h, x: jnp.tanh(0.9 * ring @ h @ weight + x),
            jnp.zeros_like(x),
            x,
            solver=ic.FixedPointIteration(rtol=1e-12, max_steps=500),
            gradient=gradient,
            batch_ndim=batch_ndim,
        )
        return (solution.value**2).sum()

    compiled = jax.jit(jax.grad(loss), static_argnums=2)
    ring, alone = jnp.roll(jnp.eye(BATCH), 1, axis=0), jnp.eye(BATCH)
    assert jnp.all(jnp.isnan(compiled(weight, ring, 1)))
    assert jnp.all(jnp.isfinite(compiled(weight, ring, 0)))
    np.testing.assert_allclose(compiled(weight, alone, 1), compiled(weight, alone, 0), rtol=1e-4, atol=1e-6)


def test_nested_settings_are_switched_off() -> None:
    assert unchecked(ic.Compacting(ic.Anderson())).solver.check is False
    newton = unchecked(ic.NewtonKrylov(linear_solver=ic.CG()))
    assert newton.check is newton.linear_solver.check is False
    assert unchecked(ic.Implicit(ic.CG())).linear_solver.check is False
    assert unchecked(ic.Unroll()) == ic.Unroll()
    assert unchecked(np.cos) is np.cos
