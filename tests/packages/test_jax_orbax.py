"""Checkpoints of Orbax: a model with a layer, and a solution."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packages.jax_models import LONG, SOLVER, W, X, close

import implicit_core as ic

ocp = pytest.importorskip("orbax.checkpoint", reason="orbax-checkpoint is not installed")


def saved_and_restored(tree: Any, path: Any) -> Any:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "saved", tree)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path / "saved", jax.tree.map(ocp.utils.to_shape_dtype_struct, tree))


def test_a_model_of_flax_with_a_layer(tmp_path: Any) -> None:
    nnx = pytest.importorskip("flax.nnx", reason="flax is not installed")

    class Model(nnx.Module):
        def __init__(self, seed: int) -> None:
            start = nnx.initializers.orthogonal(0.5)
            options = {"param_dtype": jnp.float64, "rngs": nnx.Rngs(seed)}
            self.hidden, self.inputs = nnx.Linear(3, 3, kernel_init=start, **options), nnx.Linear(3, 3, **options)

        def __call__(self, x: Any) -> Any:
            z = self.inputs(x)
            cell = lambda h, z: jnp.tanh(self.hidden(h) + z)  # noqa: E731
            return ic.fixed_point(cell, jnp.zeros_like(z), z, solver=SOLVER, gradient=LONG, batch_ndim=1).value

    model, other = Model(0), Model(1)
    expected = model(jnp.asarray(X))
    assert not np.allclose(other(jnp.asarray(X)), expected, atol=1e-3)
    nnx.update(other, saved_and_restored(nnx.state(model), tmp_path))
    close(other(jnp.asarray(X)), expected, atol=1e-12)


@pytest.mark.parametrize("trace", [False, True])
def test_a_solution(trace: bool, tmp_path: Any) -> None:
    def f(h: Any, z: Any) -> Any:
        return jnp.tanh(h @ W.T + z)

    solution = ic.solve(f, jnp.zeros_like(X), jnp.asarray(X), batch_ndim=1, trace=trace)
    arrays = jax.tree.map(jnp.asarray, solution)
    restored = saved_and_restored(arrays, tmp_path)
    assert type(restored) is type(solution)
    close(restored, arrays, atol=0)
    again = ic.solve(f, restored.value, jnp.asarray(X), batch_ndim=1)
    assert (np.asarray(again.stats.steps) <= np.asarray(solution.stats.steps)).all()
    assert (np.asarray(again.status) == ic.CONVERGED).all()
