"""The examples of roots: known solutions, and gradients against central differences and against single precision."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import implicit_core as ic
from implicit_core.examples.roots import (
    exchange,
    flame,
    ieee14,
    power_flow,
    reaction_diffusion,
    sparse_reaction_diffusion,
)
from implicit_core.examples.roots.differences import central_difference


@pytest.fixture(autouse=True)
def double_precision() -> Iterator[None]:
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):  # complex by real, in FFTs
        yield


def relative(found: object, expected: object) -> float:
    difference = np.asarray(found, np.float64) - np.asarray(expected)
    return float(np.linalg.norm(difference) / np.linalg.norm(np.asarray(expected)))


def test_power_flow() -> None:
    levels = torch.tensor([[[0.5]], [[1.0]], [[3.0]]], dtype=torch.float64)

    def losses(loads: torch.Tensor, rtol: float = 1e-12) -> torch.Tensor:
        solution = power_flow.solve(loads, rtol)
        assert bool(solution.converged.all())
        return power_flow.losses(solution.value).sum()

    def gradient(loads: torch.Tensor, rtol: float = 1e-12) -> torch.Tensor:
        return torch.func.grad(lambda loads: losses(loads, rtol))(loads)

    loads = levels * power_flow.LOADS
    published = power_flow.solve(loads).value
    np.testing.assert_allclose(published.magnitude[1], ieee14.MAGNITUDES, atol=1.5e-3)
    np.testing.assert_allclose(torch.rad2deg(published.angle[1]), ieee14.ANGLES, atol=0.03)
    found = gradient(loads)
    slope = central_difference(losses, loads, found, 1e-1)
    assert relative((found**2).sum(), slope) < 1e-7
    assert relative(gradient(loads.float(), 1e-5), found) < 1e-4


def test_reaction_diffusion() -> None:
    n, steps, dt, probe = 16, 4, 5e-4, (3, 4)
    noise = 0.05 * jax.random.normal(jax.random.key(0), (n, n))
    start = jnp.stack([1 + noise, jnp.full((n, n), 0.9)])

    @jax.jit
    def evaluate(feed: jax.Array) -> tuple[tuple[jax.Array, tuple[jax.Array, jax.Array]], jax.Array]:
        def objective(feed: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            rtol = 1e-12 if feed.dtype == jnp.float64 else 1e-5
            dts = jnp.full(steps, dt, feed.dtype)
            states, statuses = reaction_diffusion.simulate(start.astype(feed.dtype), feed, dts, rtol)
            return states[0][probe], (states, statuses)

        return jax.value_and_grad(objective, has_aux=True)(feed)

    feed = jnp.full((n, n), 0.1)
    (_, (last, statuses)), found = evaluate(feed)
    assert np.all(statuses == ic.CONVERGED)
    direction = found / jnp.linalg.norm(found)
    slope = central_difference(lambda feed: evaluate(feed)[0][0], feed, direction, 1e-4)
    assert relative(jnp.sum(found * direction), slope) < 1e-7
    assert relative(evaluate(feed.astype(jnp.float32))[1], found) < 1e-4

    problem = sparse_reaction_diffusion.implicit_euler(n, dt)
    states = sparse_reaction_diffusion.simulate(problem, np.asarray(start), np.asarray(feed), steps)
    of_the_probe = np.zeros((2, n, n))
    of_the_probe[0][probe] = 1.0
    assert relative(states[-1], last) < 1e-9
    assert relative(sparse_reaction_diffusion.gradient(problem, states, np.asarray(feed), of_the_probe), found) < 1e-8


def test_flame() -> None:
    phi = torch.tensor([[0.4], [1.0], [1.9]], dtype=torch.float64)

    def objective(z: dict[str, torch.Tensor], rtol: float = 1e-12) -> torch.Tensor:
        solution = flame.solve(z, rtol)
        assert bool(solution.converged.all())
        return (solution.value["T"] / 1000).sum() + solution.value["log_n"][:, flame.SPECIES.index("NO")].sum()

    def gradient(z: dict[str, torch.Tensor], rtol: float = 1e-12) -> torch.Tensor:
        found = torch.func.grad(lambda z: objective(z, rtol))(z)
        return torch.cat([found["phi"], found["p"]])

    z = {"phi": phi, "p": torch.ones_like(phi)}
    assert abs(flame.solve(z).value["T"][1] - 2385) < 10  # the usual figure
    found = gradient(z)
    d_phi, d_p = (found / found.norm()).split(3)

    def moved(t: torch.Tensor) -> torch.Tensor:
        return objective({"phi": z["phi"] + t * d_phi, "p": z["p"] + t * d_p})

    slope = central_difference(moved, torch.zeros(1, dtype=torch.float64), 1.0, 1e-4)
    assert relative(found.norm(), slope) < 1e-7
    assert relative(gradient({name: part.float() for name, part in z.items()}, 2e-6), found) < 1e-4


def test_exchange() -> None:
    rng = np.random.default_rng(0)
    tastes = exchange.Consumers(rng.dirichlet(np.ones(3), size=4), np.array([[0.3], [0.6], [0.9], [2.0]]))
    endowments = rng.uniform(0.2, 2.0, size=(5, 4, 3))

    def utility(endowments: exchange.Array) -> exchange.Array:
        solution = exchange.equilibrium(tastes, endowments, 1e-12)
        assert np.all(solution.status == ic.CONVERGED)
        return exchange.log_utility(tastes, solution.value, endowments)[:, 1]

    def gradient(endowments: exchange.Array) -> exchange.Array:
        q = exchange.equilibrium(tastes, endowments, 1e-6 if endowments.dtype == np.float32 else 1e-12).value
        return np.add(*exchange.utility_gradient(tastes, q, endowments, consumer=1))

    q = exchange.equilibrium(tastes, endowments).value
    demand = exchange.market(tastes, q, endowments).demand
    np.testing.assert_allclose(np.sum(demand, axis=1), np.sum(endowments, axis=1), rtol=1e-5)
    found, direction = gradient(endowments), rng.normal(size=endowments.shape)
    slope = central_difference(utility, endowments, direction, 1e-3)
    assert relative(np.sum(found * direction, axis=(1, 2)), slope) < 1e-7
    assert relative(gradient(endowments.astype(np.float32)), found) < 1e-4
