"""The examples in JAX users' own libraries: exact gradients against a long scan, training, statuses."""

import io
from collections.abc import Iterator
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest
from flax import nnx
from rich.console import Console

import implicit_core as ic
from implicit_core.examples.jax_layers import __main__ as command_line
from implicit_core.examples.jax_layers import equinox_layer, nnx_layer, optimistix_solver
from implicit_core.examples.jax_layers.task import spirals

WIDTH = 6
ANDERSON, EXACTLY = ic.Anderson(rtol=1e-12, max_steps=200), ic.Implicit(ic.GMRES(rtol=1e-12))
EXACT = partial(ic.fixed_point, solver=ANDERSON, gradient=EXACTLY)
AS_ROOT = partial(ic.root, solver=ic.Broyden(rtol=1e-13), gradient=EXACTLY)
NEUMANN = ic.Neumann(k=5, lam=0.5)
ITERATION = optx.FixedPointIteration(rtol=1e-10, atol=1e-10)
TIGHT = ic.Anderson(rtol=1e-10, max_steps=200)


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def points() -> jax.Array:
    return spirals(5)[0]


def equinox_model(**options: Any) -> equinox_layer.Classifier:
    return equinox_layer.Classifier(2, WIDTH, 2, jax.random.key(0), **options)


def nnx_model(**options: Any) -> nnx_layer.Classifier:
    model = nnx_layer.Classifier(2, WIDTH, 2, rngs=nnx.Rngs(0), **options)
    nnx.update(model, jax.tree.map(jnp.float64, nnx.state(model, nnx.Param)))
    return model


def long_scan(cell: Any, x: jax.Array) -> jax.Array:
    """500 steps from zero, to be differentiated through all of them."""
    h0 = jnp.zeros((*x.shape[:-1], WIDTH))
    return jax.lax.scan(lambda h, _: (cell(h, x), None), h0, length=500)[0]


def assert_equal_leaves(ours: Any, theirs: Any, count: int) -> None:
    leaves, others = jax.tree.leaves(ours), jax.tree.leaves(theirs)
    assert len(leaves) == len(others) == count
    for a, b in zip(leaves, others, strict=True):
        assert a.dtype == b.dtype == jnp.float64
        assert np.max(np.abs(b)) > 1e-3
        np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-9)


class Residual(eqx.Module):
    """g(h, x) = h - F(h, x), whose root is the fixed point."""

    cell: Any

    def __call__(self, h: jax.Array, x: jax.Array) -> jax.Array:
        return h - self.cell(h, x)


@pytest.mark.parametrize("solve", [EXACT, AS_ROOT], ids=["fixed point", "root"])
def test_equinox_gradients_equal_gradients_of_a_long_scan(solve: Any) -> None:
    """Gradients of the points and of the cell's three arrays, which the layer closes over; one sample at a time."""

    def layer(both: Any) -> jax.Array:
        model, x = both
        layer = model.layer
        if solve is AS_ROOT:
            layer = equinox_layer.Equilibrium(Residual(layer.cell), WIDTH, solve)
        return jnp.sum(jnp.sin(jax.vmap(layer)(x).value))

    def scanned(both: Any) -> jax.Array:
        model, x = both
        return jnp.sum(jnp.sin(jax.vmap(lambda x: long_scan(model.layer.cell, x))(x)))

    both = equinox_model(solve=EXACT), points()
    ours, theirs = (eqx.filter_jit(eqx.filter_grad(function))(both) for function in (layer, scanned))
    assert_equal_leaves((ours[0].layer, ours[1]), (theirs[0].layer, theirs[1]), 4)


def test_nnx_gradients_equal_gradients_of_a_long_scan() -> None:
    def layer(model: nnx_layer.Classifier, x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(model.layer(x).value))

    def scanned(model: nnx_layer.Classifier, x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(long_scan(model.layer.cell, x)))

    model, x = nnx_model(solve=EXACT), points()
    ours, theirs = (nnx.jit(nnx.grad(function, argnums=(0, 1)))(model, x) for function in (layer, scanned))
    assert_equal_leaves((ours[0]["layer"], ours[1]), (theirs[0]["layer"], theirs[1]), 4)


def neumann_gradient(model: equinox_layer.Classifier, x: jax.Array) -> tuple[jax.Array, Any]:
    def total(model: equinox_layer.Classifier) -> tuple[jax.Array, ic.Solution]:
        solution = jax.vmap(model.layer)(x)
        return jnp.sum(jnp.sin(solution.value)), solution

    return eqx.filter_jit(eqx.filter_grad(total, has_aux=True))(model)


def test_a_layer_solved_by_optimistix_has_our_value_and_neumann_gradient() -> None:
    x = points()
    by_optimistix = optimistix_solver.solver(ITERATION, rtol=1e-8)
    solves = (partial(ic.fixed_point, solver=solver, gradient=NEUMANN) for solver in (TIGHT, by_optimistix))
    (ours, solution), (theirs, other) = (neumann_gradient(equinox_model(solve=solve), x) for solve in solves)
    assert np.all(solution.converged)
    assert np.all(other.converged)
    np.testing.assert_allclose(other.value, solution.value, rtol=0, atol=1e-8)
    assert_equal_leaves(theirs.layer, ours.layer, 3)
    exact, _ = neumann_gradient(equinox_model(solve=EXACT), x)
    weights = (gradient.layer.cell.recurrent.weight for gradient in (exact, ours))
    assert np.max(np.abs(np.subtract(*weights))) > 1e-2  # five terms of the series, not the whole of it


def test_a_solve_that_optimistix_does_not_finish_is_reported() -> None:
    """One sample starts at its root, the others don't."""
    solver = optimistix_solver.solver(ITERATION, max_steps=2)
    z = jnp.array([[0.0], [1.0], [2.0]])
    solution = ic.fixed_point(lambda h, z: 0.5 * h + z, jnp.zeros((3, 1)), z, solver=solver, batch_ndim=1)
    assert solution.status.tolist() == [ic.CONVERGED, ic.STAGNATED, ic.STAGNATED]
    with pytest.raises(ic.SolveError, match=r"STAGNATED in 2 of 3 samples \(1, 2\)"):
        solution.raise_for_status()
    beyond = ic.fixed_point(lambda h, z: h**2 + z, jnp.full((3, 1), 1e200), z, solver=solver, batch_ndim=1)
    assert beyond.status.tolist() == [ic.NONFINITE] * 3
    _, jitted = neumann_gradient(equinox_model(solve=partial(ic.fixed_point, solver=solver)), points())
    assert jitted.status.tolist() == [ic.STAGNATED] * 5


@pytest.mark.promotes("optax")
def test_training_lowers_the_loss_tenfold() -> None:
    """For each layer; every solve converges."""
    x, labels = spirals(command_line.SAMPLES)
    for train in command_line.LAYERS.values():
        history = np.array([[float(value) for value in metrics] for metrics in train(x, labels, 100)])
        losses, accuracies, converged = history.T
        assert np.mean(losses[-10:]) < 0.1 * losses[0]
        assert accuracies[0] < 0.8
        assert np.mean(accuracies[-10:]) > 0.97
        assert np.all(converged == 1.0)


@pytest.mark.promotes("optax")
def test_the_program_prints_a_table_of_80_columns() -> None:
    console = Console(file=io.StringIO(), width=80)
    command_line.main(steps=2, console=console)
    lines = console.file.getvalue().splitlines()
    assert all(len(line) <= 80 for line in lines)
    for name in command_line.LAYERS:
        assert sum(line.strip().startswith(name + "  ") and line.rstrip()[-1].isdigit() for line in lines) >= 1
