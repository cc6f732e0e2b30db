"""An F that writes to the state of a Flax module: an error that says so, and the forms that work."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax_layers import SOLVER

import implicit_core as ic

pytestmark = pytest.mark.promotes("flax")

X = jnp.linspace(-1.0, 1.0, 12).reshape(4, 3)
LONG = ic.Neumann(60, 1.0)
WRITES = r"f must not write to the state of a module"


class Norm(nn.Module):
    """A cell of linen, with batch statistics."""

    @nn.compact
    def __call__(self, h: Any, x: Any) -> Any:
        norm = nn.BatchNorm(momentum=0.9, use_running_average=False, param_dtype=jnp.float64, dtype=jnp.float64)
        return 0.2 * jnp.tanh(norm(nn.Dense(3, param_dtype=jnp.float64)(h))) + x


class Bound(nn.Module):
    """A module whose layer writes its statistics within F."""

    def setup(self) -> None:
        self.cell = Norm()

    def __call__(self, x: Any) -> Any:
        if self.is_initializing():
            return self.cell(x, x)
        return ic.fixed_point(self.cell, jnp.zeros_like(x), x, solver=SOLVER, gradient=LONG).value


def transforms() -> dict[str, Callable[[Callable[[Any], Any]], Any]]:
    return {
        "eager": lambda f: f(X),
        "jit": lambda f: jax.jit(f)(X),
        "grad": lambda f: jax.grad(lambda x: jnp.sum(f(x)))(X),
        "vmap": lambda f: jax.vmap(f)(X[None]),
    }


@pytest.mark.parametrize("transform", transforms())
def test_statistics_of_linen_are_an_error_at_the_first_call(transform: str) -> None:
    model = Bound()
    variables = model.init(jax.random.key(0), X)
    for _ in range(2):
        with pytest.raises(ValueError, match=WRITES):
            transforms()[transform](lambda x: model.apply(variables, x, mutable=["batch_stats"])[0])


@pytest.mark.parametrize("transform", transforms())
def test_what_f_keeps_is_an_error(transform: str) -> None:
    kept = []

    def f(h: Any, x: Any) -> Any:
        kept.append(jax.jit(jnp.sum)(jnp.tanh(h)))
        return 0.5 * h + x

    with pytest.raises(ValueError, match=WRITES):
        transforms()[transform](lambda x: ic.fixed_point(f, jnp.zeros_like(x), x).value)


def test_an_f_of_the_same_operations_that_keeps_nothing_hides_no_write() -> None:
    kept: list[Any] = []

    def make(keeps: bool) -> Callable[[Any, Any], Any]:
        def f(h: Any, x: Any) -> Any:
            if keeps:
                kept.append(h)
            return in_a_cycle(h, x)

        return f

    for _ in range(2):
        ic.fixed_point(make(False), jnp.zeros_like(X), X, solver=SOLVER, gradient=LONG)
        with pytest.raises(ValueError, match=WRITES):
            ic.fixed_point(make(True), jnp.zeros_like(X), X, solver=SOLVER, gradient=LONG)
        kept.clear()


def plain(h: Any, x: Any) -> Any:
    return jnp.tanh(0.5 * h + x)


def of_a_closure(h: Any, x: Any) -> Any:
    @jax.custom_jvp
    def half(x: Any) -> Any:
        return jnp.tanh(0.5 * h + x)

    half.defjvp(lambda x, dx: (half(*x), (1 - half(*x) ** 2) * dx[0]))
    return half(x)


def in_a_cycle(h: Any, x: Any) -> Any:
    cycle = [h]
    cycle.append(cycle)
    return plain(h, x)


def nested(h: Any, x: Any) -> Any:
    inner = ic.fixed_point(lambda a, z: jnp.tanh(0.1 * a + z), h, h, solver=SOLVER, gradient=LONG).value
    return 0.3 * inner + x


@pytest.mark.parametrize("f", [of_a_closure, in_a_cycle, nested])
def test_what_does_not_outlive_f_is_no_error(f: Any) -> None:
    h = jnp.zeros_like(X)
    for _ in range(300):
        h = jax.lax.stop_gradient(f(h, X)) if f is not nested else 0.3 * _inner(h) + X
    for _ in range(2):
        value = ic.fixed_point(f, jnp.zeros_like(X), X, solver=SOLVER, gradient=LONG).value
        np.testing.assert_allclose(value, h, atol=1e-10)


def _inner(h: Any) -> Any:
    a = h
    for _ in range(30):
        a = jnp.tanh(0.1 * a + h)
    return a


def modules() -> dict[str, tuple[nnx.Module, Callable[[Any, Any], Any]]]:
    dense, norm, drop = nnx.Linear(3, 3, rngs=nnx.Rngs(0)), nnx.BatchNorm(3, rngs=nnx.Rngs(0)), nnx.Dropout(0.1)
    streams = nnx.Rngs(0)
    compiled, again = nnx.jit(lambda dense, h: dense(h)), nnx.remat(lambda dense, h: dense(h))
    return {
        "BatchNorm": (norm, lambda h, x: 0.2 * norm(h) + x),
        "Dropout": (drop, lambda h, x: 0.2 * drop(h, rngs=streams) + x),
        "jit": (dense, lambda h, x: 0.2 * jnp.tanh(compiled(dense, h)) + x),
        "remat": (dense, lambda h, x: 0.2 * jnp.tanh(again(dense, h)) + x),
    }


@pytest.mark.parametrize("name", modules())
def test_writes_of_nnx_raise_with_a_note_of_what_to_do(name: str) -> None:
    _, f = modules()[name]
    with pytest.raises(Exception, match="from a different trace level") as info:
        ic.fixed_point(f, jnp.zeros((4, 3), jnp.float32), X.astype(jnp.float32))
    assert any("nnx.split(module) before the solve and nnx.merge(...) in f" in note for note in info.value.__notes__)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_a_copy_within_f_and_its_state_by_has_aux(compiled: bool) -> None:
    norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0), momentum=0.9)
    definition, state = nnx.split(norm)

    def cell(h: Any, z: Any) -> Any:
        module = nnx.merge(definition, z[0])
        value = 0.2 * jnp.tanh(module(h)) + z[1]
        return value, nnx.state(module, nnx.BatchStat)

    def run(state: Any, x: Any) -> Any:
        solution = ic.fixed_point(
            cell, jnp.zeros_like(x), (state, x), solver=ic.Anderson(rtol=1e-6), gradient=LONG, has_aux=True
        )
        return solution.value, solution.aux

    x = X.astype(jnp.float32)
    value, statistics = (jax.jit(run) if compiled else run)(state, x)
    h = jnp.zeros_like(X)
    for _ in range(100):
        h = 0.2 * jnp.tanh((h - h.mean(0)) / jnp.sqrt(h.var(0) + 1e-5)) + X
    np.testing.assert_allclose(value, h, atol=1e-5)
    nnx.update(norm, statistics)
    np.testing.assert_allclose(norm.mean[...], 0.1 * h.mean(0), atol=1e-6)
    np.testing.assert_allclose(norm.var[...], 0.9 + 0.1 * h.var(0), atol=1e-6)


@pytest.mark.slow
def test_linen_with_mutable_collections_of_its_own() -> None:
    model = Norm()
    variables = model.init(jax.random.key(0), X, X)

    def cell(h: Any, z: Any) -> Any:
        return model.apply(z[0], h, z[1], mutable=["batch_stats"])

    def run(variables: Any, x: Any) -> Any:
        return ic.fixed_point(cell, jnp.zeros_like(x), (variables, x), solver=SOLVER, gradient=LONG, has_aux=True)

    solution = jax.jit(run)(variables, X)
    h = jnp.zeros_like(X)
    for _ in range(100):
        h = model.apply(variables, h, X, mutable=["batch_stats"])[0]
    np.testing.assert_allclose(solution.value, h, atol=1e-9)
    hidden = h @ variables["params"]["Dense_0"]["kernel"] + variables["params"]["Dense_0"]["bias"]
    mean = solution.aux["batch_stats"]["BatchNorm_0"]["mean"]
    np.testing.assert_allclose(mean, 0.1 * hidden.mean(0), atol=1e-6)
