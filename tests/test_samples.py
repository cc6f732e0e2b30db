"""Samples set back to a start, and the best of several solves, in every framework."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from libraries import Library

import implicit_core as ic

STATE = np.arange(12.0).reshape(3, 4)
MASK = np.array([False, True, True])


def test_reset_takes_the_start_where_the_mask_holds(library: Library) -> None:
    state = (library.array(STATE), {"z": library.array(STATE.reshape(3, 2, 2))})
    start = (library.array(np.array([7.0, 8.0, 9.0, 10.0])), {"z": library.array(-STATE.reshape(3, 2, 2))})
    answer, latent = ic.reset(state, start, where=library.array(MASK))
    np.testing.assert_array_equal(library.numpy(answer), [[0, 1, 2, 3], [7, 8, 9, 10], [7, 8, 9, 10]])
    expected = np.where(MASK[:, None, None], -1.0, 1.0) * STATE.reshape(3, 2, 2)
    np.testing.assert_array_equal(library.numpy(latent["z"]), expected)
    np.testing.assert_array_equal(library.numpy(state[0]), STATE)  # not written to


def test_reset_of_a_batch_with_two_axes(library: Library) -> None:
    mask = np.array([[True, False], [False, False], [False, True]])
    changed = ic.reset(library.array(STATE.reshape(3, 2, 2)), 0.0, where=library.array(mask))
    np.testing.assert_array_equal(library.numpy(changed), np.where(mask[..., None], 0.0, STATE.reshape(3, 2, 2)))


def test_reset_keeps_dtype_and_derivatives() -> None:
    state, start = torch.ones(3, 2, requires_grad=True), torch.zeros(2, dtype=torch.float64, requires_grad=True)
    changed = ic.reset(state, start, where=MASK)
    assert changed.dtype == torch.float32
    of_state, of_start = torch.autograd.grad(changed.sum(), (state, start))
    assert of_state[:, 0].tolist() == [1.0, 0.0, 0.0]
    assert of_start.tolist() == [2.0, 2.0]
    traced = jax.jit(lambda state, mask: ic.reset(state, 0.0, where=mask))(jnp.ones((3, 2)), jnp.asarray(MASK))
    np.testing.assert_array_equal(traced[:, 0], [1.0, 0.0, 0.0])


@pytest.mark.parametrize(
    ("state", "start", "mask", "error", "words"),
    [
        (STATE, 0.0, [0, 1, 1], TypeError, "where must hold booleans"),
        (STATE, 0.0, [True, False], ValueError, "where must have the shape of the batch"),
        (STATE, np.zeros(3), MASK, ValueError, "start has a leaf of shape"),
        (STATE.astype(int), 0.7, MASK, TypeError, "start has a leaf of dtype float64"),
        ((STATE, STATE), (0.0, 0.0, 0.0), MASK, TypeError, "start must have the structure"),
    ],
)
def test_what_reset_refuses(state: Any, start: Any, mask: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        ic.reset(state, start, where=np.asarray(mask))


STARTS = np.array([[[3.0], [0.1]], [[0.5], [2.0]], [[0.9], [np.nan]]])
"""Three restarts of two samples; h² contracts within one."""


@pytest.mark.parametrize("axis", [0, 1])
def test_the_best_has_the_least_residual(axis: int, library: Library) -> None:
    starts = np.moveaxis(STARTS, 0, axis)
    solver = ic.steps(3)
    solution = ic.solve(lambda h, z: h * h, library.array(starts), None, solver=solver, batch_ndim=2, trace=True)
    best = solution.best(axis)
    np.testing.assert_allclose(library.numpy(best.value)[:, 0], [0.5**8, 0.1**8], rtol=1e-12)
    residual = library.numpy(solution.stats.residual)
    np.testing.assert_array_equal(library.numpy(best.stats.residual), np.nanmin(residual, axis=axis))
    trace = library.numpy(best.stats.trace)
    np.testing.assert_array_equal(trace[-1], library.numpy(best.stats.residual))
    np.testing.assert_allclose(trace[0], [0.25, 0.09], rtol=1e-12)
    assert list(library.numpy(best.status)) == [ic.MAX_STEPS] * 2
    assert int(best.stats.evaluations) == 3


def test_the_best_keeps_derivatives_and_pytrees() -> None:
    x = torch.tensor([[0.3], [0.7]], requires_grad=True)
    starts = torch.zeros(2, 2, 1)
    solution = ic.fixed_point(
        lambda h, z: {"h": 0.5 * h["h"] + z}, {"h": starts + torch.tensor([[[9.0]], [[0.0]]])}, x, batch_ndim=2
    )
    best = solution.best()
    assert best.value["h"].shape == (2, 1)
    (gradient,) = torch.autograd.grad(best.value["h"].sum(), x)
    (all_of_them,) = torch.autograd.grad(
        ic.fixed_point(lambda h, z: 0.5 * h + z, torch.zeros(2, 1), x, batch_ndim=1).value.sum(), x
    )
    torch.testing.assert_close(gradient, all_of_them, rtol=1e-4, atol=0.0)


def test_the_best_of_none_is_refused() -> None:
    solution = ic.solve(lambda h, z: 0.5 * h, np.ones((0, 2, 1)), None, batch_ndim=2)
    with pytest.raises(ValueError, match="there is nothing to choose from"):
        solution.best()
    assert solution.best(1).value.shape == (0, 1)


def test_the_best_of_one_system_is_refused() -> None:
    solution = ic.solve(lambda h, z: 0.5 * h, np.ones(2), None)
    with pytest.raises(ValueError, match="axis must be one of the 0 axes of the batch"):
        solution.best()
