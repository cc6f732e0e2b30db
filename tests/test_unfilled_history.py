"""A solver whose acceleration is wrong is reported: by status, residual, warning and error, with every estimator.

Anderson acceleration that keeps its history from the last row on, and mixes the first rows, which are still zero, finds
that zeros have no residual. It returns a point near zero, whose residual is as large as F there.
"""

import warnings
from typing import Any

import array_api_compat
import numpy as np
import pytest
import torch
from libraries import JAX, TORCH, Library

import implicit_core as ic
from implicit_core.adapters import torch as ict

ROWS = 5
GRADIENTS = [ic.Unroll(1, 1.0), ic.Neumann(3, 0.5), ic.OneStep(), ic.Implicit(), ic.Unroll(4, 0.8)]


def unfilled(problem: Any, h0: Any, z: Any) -> Any:
    """Four accelerated steps of the wrong method."""
    xp = array_api_compat.array_namespace(h0)
    zeros = [xp.zeros_like(h0)] * (ROWS - 2)
    first = problem(h0, z)
    x, f = [h0, first, *zeros], [first, problem(first, z), *zeros]
    for n in range(2, 6):
        rows = min(n, ROWS)
        residuals = xp.stack([b - a for a, b in zip(x[:rows], f[:rows], strict=True)], axis=1)
        gram = residuals @ xp.matrix_transpose(residuals) + 1e-4 * xp.eye(rows, dtype=h0.dtype)[None]
        weights = xp.linalg.solve(gram, xp.ones((*gram.shape[:2], 1), dtype=h0.dtype))
        weights = weights / xp.sum(weights, axis=1, keepdims=True)
        new = xp.sum(weights * xp.stack(f[:rows], axis=1), axis=1)
        x, f = [*x[1:], new], [*f[1:], problem(new, z)]
    return x[-1]


def cell(h: Any, z: Any) -> Any:
    xp = array_api_compat.array_namespace(h)
    w, x = z
    return xp.tanh(h @ w + x)


@pytest.fixture(params=[TORCH, JAX], ids=lambda library: library.name)
def given(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """(h0, z) of a contraction, in a framework with autodiff."""
    library: Library = request.param
    generator = np.random.default_rng(0)
    w, x = generator.standard_normal((6, 6)), generator.standard_normal((3, 6))
    return library.array((np.zeros((3, 6)), (0.5 * w / np.linalg.norm(w, 2), x)))


@pytest.mark.parametrize("gradient", GRADIENTS, ids=repr)
def test_a_point_that_is_no_solution_is_reported(gradient: ic.Estimator, given: tuple[Any, Any]) -> None:
    h0, z = given
    globals().pop("__warningregistry__", None)  # a line of the user's is warned of once
    with pytest.warns(ic.ConvergenceWarning, match="3 of 3"):
        solution = ic.fixed_point(cell, h0, z, solver=unfilled, gradient=gradient, batch_ndim=1)
    assert not bool(solution.converged.any())
    assert np.all(np.asarray(solution.status) == ic.STAGNATED)
    if gradient != ic.Unroll(4, 0.8):  # of which the residual is that of its third step
        np.testing.assert_allclose(np.asarray(solution.stats.relative), 1.0, rtol=0.1)
    assert np.all(np.asarray(solution.stats.residual) > 100 * np.asarray(solution.stats.tolerance))
    with pytest.raises(ic.SolveError, match="3 of 3"):
        ic.fixed_point(cell, h0, z, solver=unfilled, gradient=gradient, batch_ndim=1, throw=True)


def test_the_library_finds_the_solution_with_as_many_evaluations(given: tuple[Any, Any]) -> None:
    h0, z = given
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ic.ConvergenceWarning)
        wrong = ic.solve(cell, h0, z, solver=unfilled, batch_ndim=1)
        right = ic.solve(cell, h0, z, solver=ic.Anderson(max_steps=6), batch_ndim=1)
    np.testing.assert_allclose(np.asarray(wrong.stats.relative), 1.0, rtol=0.1)
    assert np.all(np.asarray(right.stats.relative) < 1e-2)


def test_a_layer_counts_the_samples() -> None:
    def contraction(h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(0.5 * h + x)

    layer = ict.ImplicitLayer(contraction, solver=unfilled)
    with pytest.warns(ic.ConvergenceWarning, match="3 of 3"):
        layer(torch.ones(3, 6))
    assert (layer.samples, layer.unconverged) == (3, 3)
