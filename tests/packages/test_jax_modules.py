"""A layer in a module of Haiku, Flax and Equinox: outputs and gradients of parameters are those of a long loop."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from packages.jax_models import CONVERGED, Solve, X, close, layer, loop, name, squares

import implicit_core as ic

Apply = Callable[[Any, Any], Any]
INPUTS = jnp.asarray(X)


def haiku(solve: Solve) -> tuple[Any, Apply]:
    hk = pytest.importorskip("haiku", reason="dm-haiku is not installed")

    def forward(x: Any) -> Any:
        start = hk.initializers.VarianceScaling(0.3)
        hidden, inputs, head = hk.Linear(5, w_init=start), hk.Linear(5), hk.Linear(2)
        z, h0 = inputs(x), jnp.zeros((len(x), 5))
        if hk.running_init():  # a parameter that is made within F would be a traced array
            hidden(h0)
        return head(solve(lambda h: jnp.tanh(hidden(h) + z), h0))

    model = hk.without_apply_rng(hk.transform(forward))
    return model.init(jax.random.key(0), INPUTS), model.apply


def linen(solve: Solve) -> tuple[Any, Apply]:
    nn = pytest.importorskip("flax.linen", reason="flax is not installed")

    class Model(nn.Module):
        def setup(self) -> None:
            options = {"param_dtype": jnp.float64}
            start = nn.initializers.variance_scaling(0.3, "fan_in", "truncated_normal")
            self.hidden = nn.Dense(5, kernel_init=start, **options)
            self.inputs, self.head = nn.Dense(5, **options), nn.Dense(2, **options)

        def __call__(self, x: Any) -> Any:
            z, h0 = self.inputs(x), jnp.zeros((len(x), 5))
            if self.is_initializing():
                self.hidden(h0)
            return self.head(solve(lambda h: jnp.tanh(self.hidden(h) + z), h0))

    model = Model()
    return model.init(jax.random.key(0), INPUTS), model.apply


def nnx(solve: Solve) -> tuple[Any, Apply]:
    nnx = pytest.importorskip("flax.nnx", reason="flax is not installed")

    class Model(nnx.Module):
        def __init__(self, rngs: Any) -> None:
            start = nnx.initializers.variance_scaling(0.3, "fan_in", "truncated_normal")
            options = {"param_dtype": jnp.float64, "rngs": rngs}
            self.hidden = nnx.Linear(5, 5, kernel_init=start, **options)
            self.inputs, self.head = nnx.Linear(3, 5, **options), nnx.Linear(5, 2, **options)

        def __call__(self, x: Any) -> Any:
            z = self.inputs(x)
            return self.head(solve(lambda h: jnp.tanh(self.hidden(h) + z), jnp.zeros((len(x), 5))))

    definition, state = nnx.split(Model(nnx.Rngs(0)))
    return state, lambda state, x: nnx.merge(definition, state)(x)


@functools.cache
def equinox_model() -> Any:
    eqx = pytest.importorskip("equinox", reason="equinox is not installed")

    class Model(eqx.Module):
        hidden: Any
        inputs: Any
        head: Any

        def __call__(self, x: Any, solve: Solve) -> Any:
            z = self.inputs(x)
            return self.head(solve(lambda h: jnp.tanh(0.3 * self.hidden(h) + z), jnp.zeros(5)))

    return Model


def equinox(solve: Solve) -> tuple[Any, Apply]:
    eqx = pytest.importorskip("equinox", reason="equinox is not installed")
    sizes, keys = ((5, 5), (3, 5), (5, 2)), jax.random.split(jax.random.key(0), 3)
    model = equinox_model()(*(eqx.nn.Linear(*size, key=key) for size, key in zip(sizes, keys, strict=True)))
    return model, lambda model, x: jax.vmap(lambda x: model(x, solve))(x)


MODULES = [haiku, linen, nnx, equinox]


@pytest.mark.parametrize("gradient", CONVERGED, ids=name)
@pytest.mark.parametrize("make", MODULES)
def test_gradients_of_parameters_are_those_of_a_long_loop(make: Any, gradient: ic.Estimator) -> None:
    batch_ndim = 0 if make is equinox else 1
    parameters, apply = make(layer(gradient, batch_ndim=batch_ndim))
    _, plain = make(loop)

    def of(apply: Apply) -> Any:
        return jax.jit(jax.value_and_grad(lambda p, x: squares(apply(p, x)), argnums=(0, 1)))(parameters, INPUTS)

    expected = of(plain)
    assert all(jnp.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(expected))
    close(of(apply), expected)


def test_a_cell_of_haiku_that_writes_its_state_is_an_error() -> None:
    hk = pytest.importorskip("haiku", reason="dm-haiku is not installed")

    def forward(x: Any, solve: Solve) -> Any:
        norm = hk.BatchNorm(True, True, 0.9)
        if hk.running_init():
            return norm(x, is_training=True)
        return solve(lambda h: 0.2 * norm(h, is_training=True) + x, jnp.zeros_like(x))

    model = hk.without_apply_rng(hk.transform_with_state(lambda x: forward(x, layer())))
    parameters, state = model.init(jax.random.key(0), INPUTS)
    with pytest.raises(ValueError, match="f must not write to the state of a module"):
        model.apply(parameters, state, INPUTS)
