"""A batch without samples has an empty solution, and gradients of zero, as a layer of ``torch.nn`` has."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.experimental import checkify
from libraries import Library
from tape import Tape
from torch import Tensor, nn

import implicit_core as ic
from implicit_core.adapters import torch as ict

SHAPES = [((0, 3), 1), ((2, 0, 3), 2), ((0,), 1), ((0, 2, 3), 1)]
"""Shapes of a state without samples, and how many axes index samples."""
NUMBERLESS = [((4, 0), 1), ((0,), 0), ((2, 0), 0)]
"""Shapes of samples without numbers."""
ALL = SHAPES + NUMBERLESS


def step(problem: Any, h: Any, z: Any) -> Any:
    return problem(h, z)


SOLVERS = [
    ic.FixedPointIteration(),
    ic.FixedPointIteration(freeze=False, check_every=3),
    ic.Anderson(),
    ic.Anderson(rtol=0.0, atol=0.0, max_steps=3),
    ic.Broyden(),
    ic.NewtonKrylov(),
    ic.Compacting(ic.Anderson()),
    step,
]
LINEAR_SOLVERS = [ic.GMRES(), ic.BiCGSTAB(), ic.CG(), ic.Richardson()]
ESTIMATORS = [
    ic.OneStep(),
    ic.Neumann(3, 0.5),
    ic.Neumann(3, 0.5, on_growth="nan"),
    ic.NeumannSeries(),
    ic.Unroll(3, 0.5),
    ic.Unroll(3, 0.5, on_growth="nan"),
    ic.Unroll(3, 0.5, recompute=True),
    ic.BPTT(3),
    *map(ic.Implicit, LINEAR_SOLVERS),
]


def problem(library: Library, batch_ndim: int, scale: Any = None) -> ic.Problem:
    """F = tanh(h/2 + z)."""
    tanh = library.xp.tanh

    def slope(h: Any, z: Any) -> Any:
        value = tanh(0.5 * h + z)
        return 1 - value * value

    def vjp(h: Any, z: Any, v: Any) -> Any:
        return 0.5 * slope(h, z) * v, slope(h, z) * v

    def jvp(h: Any, z: Any, dh: Any, dz: Any) -> Any:
        return slope(h, z) * (0.5 * dh + dz)

    f = library.sealed(lambda h, z: tanh(0.5 * h + z))
    return ic.Problem(f, vjp=library.sealed(vjp), jvp=library.sealed(jvp), batch_ndim=batch_ndim, scale=scale)


def zeros(library: Library, shape: tuple[int, ...]) -> Any:
    return library.array(np.zeros(shape))


def named(solver: Any) -> str:
    return "step" if solver is step else repr(solver)


@pytest.mark.parametrize("solver", SOLVERS, ids=named)
@pytest.mark.parametrize(("shape", "batch_ndim"), ALL)
def test_an_empty_batch_has_an_empty_solution(
    library: Library, shape: tuple[int, ...], batch_ndim: int, solver: Any
) -> None:
    if isinstance(solver, ic.Compacting) and not batch_ndim:
        solver = solver.solver
    given = problem(library, batch_ndim, scale=2.0)
    trace = solver is not step
    solution = ic.solve(given, zeros(library, shape), zeros(library, shape), solver=solver, throw=True, trace=trace)
    batch = shape[:batch_ndim]
    assert solution.value.shape == shape
    assert solution.status.shape == solution.stats.steps.shape == solution.stats.residual.shape == batch
    assert not trace or solution.stats.trace.shape[1:] == batch
    if 0 in batch:
        # At h0, which is all there is to do. Two measure what a callable does, which evaluates F once itself.
        assert solution.stats.evaluations == (3 if solver is step else 1)
        assert "an empty batch" in repr(solution)
    assert bool(library.xp.all(solution.converged))
    assert solution.raise_for_status() is solution


@pytest.mark.parametrize("gradient", ESTIMATORS, ids=repr)
@pytest.mark.parametrize(("shape", "batch_ndim"), ALL)
def test_products_of_estimators(
    library: Library, shape: tuple[int, ...], batch_ndim: int, gradient: ic.Estimator
) -> None:
    given, x = problem(library, batch_ndim), zeros(library, shape)
    value, pullback = gradient.vjp(given, x, x)
    assert value.shape == pullback(x).shape == shape
    value, tangent = gradient.jvp(given, x, x, x)
    assert value.shape == tangent.shape == shape
    if library.name != "jax":  # whose layer takes z alone: see below
        assert ic.fixed_point(given, x, x, gradient=gradient, throw=True).value.shape == shape


@pytest.mark.parametrize("solver", LINEAR_SOLVERS, ids=repr)
@pytest.mark.parametrize(("shape", "batch_ndim"), ALL)
def test_linear_systems(library: Library, shape: tuple[int, ...], batch_ndim: int, solver: ic.LinearSolver) -> None:
    b = zeros(library, shape)
    solution = ic.solve_linear(lambda v: 2 * v, b, solver=solver, batch_ndim=batch_ndim, throw=True)
    assert solution.value.shape == shape
    assert solution.status.shape == shape[:batch_ndim]


@pytest.mark.parametrize("name", ["spectral_radius", "contraction", "certify", "check"])
def test_what_measures_samples_says_that_there_are_none(library: Library, name: str) -> None:
    given, x = problem(library, 1), zeros(library, (0, 3))
    measures: Any = {
        "spectral_radius": ic.theory.spectral_radius,
        "contraction": ic.theory.contraction,
        "certify": lambda p, h, z: ic.theory.certify(p, h, z, ic.Neumann(3, 0.5)),
        "check": ic.check,
    }
    with pytest.raises(ValueError, match=r"h0? holds an empty batch, of batch shape \(0,\): there is no sample"):
        measures[name](given, x, x)


def test_a_pytree(library: Library) -> None:
    h0 = {"a": zeros(library, (0, 3)), "b": (zeros(library, (0,)), zeros(library, (0, 2, 2)))}
    solution = ic.solve(lambda h, z: {"a": h["a"], "b": h["b"]}, h0, None, batch_ndim=1)
    assert solution.value["b"][1].shape == (0, 2, 2)
    with pytest.raises(ValueError, match="axes of all leaves"):
        ic.solve(lambda h, z: h, {"a": zeros(library, (0, 3)), "b": zeros(library, (1, 3))}, None, batch_ndim=1)


# Layers.


@pytest.mark.parametrize("gradient", ESTIMATORS, ids=repr)
@pytest.mark.parametrize("solver", SOLVERS, ids=named)
def test_a_layer_of_torch(solver: Any, gradient: ic.Estimator) -> None:
    linear = nn.Linear(3, 3)
    x = torch.ones(0, 3, requires_grad=True)
    layer = ict.ImplicitLayer(
        lambda h, x: torch.tanh(0.3 * linear(h) + x), solver=solver, gradient=gradient, throw=True
    )
    h = layer(x)
    assert h.shape == (0, 3)
    assert layer.status is not None
    assert layer.status.shape == (0,)
    h.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == (0, 3)
    for parameter in linear.parameters():
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))
    with torch.no_grad():
        assert layer(x).shape == (0, 3)


@pytest.mark.parametrize("gradient", ESTIMATORS, ids=repr)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_layer_of_torch_in_transforms(gradient: ic.Estimator) -> None:
    if getattr(gradient, "recompute", False):
        return  # no transform takes it

    def value(x: Tensor) -> Tensor:
        start = torch.zeros_like(x)
        return ic.fixed_point(lambda h, x: torch.tanh(0.3 * h + x), start, x, gradient=gradient, batch_ndim=1).value

    x = torch.ones(0, 3)
    assert torch.func.grad(lambda x: value(x).sum())(x).shape == (0, 3)
    assert torch.func.jvp(value, (x,), (x,))[1].shape == (0, 3)
    assert torch.vmap(value)(torch.ones(2, 0, 3)).shape == (2, 0, 3)
    z = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(value(z).sum(), z, create_graph=True)
    assert first.shape == (0, 3)


def test_losses_on_states_and_penalties_of_torch() -> None:
    linear, x = nn.Linear(3, 3), torch.ones(0, 3)

    def f(h: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(0.3 * linear(h) + x)

    trajectory = ict.fixed_point_correction(f, torch.zeros(0, 3), x, at=(1, 2), batch_ndim=1, throw=True)
    assert trajectory.states == {}, "no step is taken"
    trajectory.loss(lambda h: h.square().sum()).backward()
    assert torch.equal(linear.weight.grad, torch.zeros(3, 3))
    penalty = ict.jacobian_penalty(f, trajectory.solution.value.detach(), x, batch_ndim=1)
    assert penalty.shape == (0,)
    penalty.sum().backward()


class OnTape(ict.CUDAGraphs):
    def _recorder(self, device: torch.device) -> Any:
        return Tape


def test_a_recorded_solve() -> None:
    graphs = OnTape()
    for _ in range(2):
        x = torch.ones(0, 3)
        solution = ic.solve(lambda h, z: torch.tanh(0.5 * h + z), x, x, solver=graphs, batch_ndim=1)
        assert graphs.reason is None
        assert solution.value.shape == (0, 3)


@pytest.mark.parametrize("gradient", ESTIMATORS, ids=repr)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_layer_of_jax(compiled: bool, gradient: ic.Estimator) -> None:
    transform: Any = jax.jit if compiled else lambda f: f

    def layer(z: Any) -> ic.Solution:
        def f(h: Any, z: Any) -> Any:
            return jnp.tanh(z["slope"] * h + z["x"])

        return ic.fixed_point(f, jnp.zeros((0, 3)), z, gradient=gradient, batch_ndim=1)

    z = {"slope": jnp.asarray(0.3), "x": jnp.ones((0, 3))}
    solution = transform(layer)(z)
    assert solution.value.shape == (0, 3)
    assert solution.status.shape == (0,)
    assert int(solution.stats.evaluations) == (0 if gradient.starts_from_h0 else 1)
    gradients = transform(jax.grad(lambda z: layer(z).value.sum()))(z)
    assert float(gradients["slope"]) == 0.0
    assert gradients["x"].shape == (0, 3)


@pytest.mark.parametrize("solver", SOLVERS, ids=named)
def test_solvers_of_jax_compiled(solver: Any) -> None:
    def solved(x: Any, throw: bool = False) -> ic.Solution:
        f: Any = lambda h, x: jnp.tanh(0.3 * h + x)  # noqa: E731
        return ic.fixed_point(f, jnp.zeros_like(x), x, solver=solver, batch_ndim=1, throw=throw)

    error, solution = jax.jit(checkify.checkify(lambda x: solved(x, True)))(jnp.ones((0, 3)))
    error.throw()
    assert solution.value.shape == (0, 3)
    assert jax.vmap(solved)(jnp.ones((0, 2, 3))).value.shape == (0, 2, 3)
