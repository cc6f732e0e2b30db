"""Warnings point at the line that the user wrote."""

import inspect
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import implicit_core as ic
from implicit_core.adapters import jax as icj
from implicit_core.warnings_ import warn

STRICT = ic.Implicit(ic.GMRES(rtol=1e-12, max_steps=1), on_failure="warn")


def here() -> int:
    """The line of the caller."""
    frame = inspect.currentframe()
    assert frame is not None
    assert frame.f_back is not None
    return frame.f_back.f_lineno


def by_numpy() -> int:
    matrix = np.array([[0.5, 0.0], [0.0, 0.2]])
    problem = ic.Problem(lambda h, z: matrix @ h + z, vjp=lambda h, z, v: (matrix.T @ v, v))
    _, pullback = STRICT.vjp(problem, np.ones(2), np.ones(2))
    pullback(np.ones(2))
    return here() - 1


def by_torch() -> int:
    matrix = torch.tensor([[0.5, 0.0], [0.0, 0.2]])
    z = torch.ones(2, requires_grad=True)
    loss = ic.fixed_point(lambda h, z: matrix @ h + z, torch.zeros(2), z, gradient=STRICT).value.sum()
    loss.backward()
    return here() - 1


def by_jax() -> int:
    matrix = jnp.array([[0.5, 0.0], [0.0, 0.2]])
    problem = icj.problem(lambda h, z: matrix @ h + z)
    _, pullback = STRICT.vjp(problem, jnp.ones(2), jnp.ones(2))
    pullback(jnp.ones(2))
    return here() - 1


@pytest.mark.parametrize("run", [by_numpy, by_torch, by_jax])
def test_an_inexact_gradient_points_at_the_line_that_asked_for_it(run: Callable[[], int]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        line = run()
    [warning] = [w for w in caught if issubclass(w.category, ic.InexactGradientWarning)]
    assert (warning.filename, warning.lineno) == (__file__, line)


@pytest.mark.parametrize(
    "module", ["implicit_core.solvers.base", "implicit_core.adapters.torch.function", "torch.autograd", "jax._src"]
)
def test_frames_of_the_package_and_of_the_frameworks_are_skipped(module: str) -> None:
    namespace: dict[str, Any] = {"__name__": module, "warn": warn}
    exec("def inner(): warn('found', RuntimeWarning)\ndef outer(): inner()", namespace)
    with pytest.warns(RuntimeWarning, match="found") as caught:
        namespace["outer"]()
    line = here() - 1
    assert (caught[0].filename, caught[0].lineno) == (__file__, line)


@pytest.mark.parametrize("module", ["implicit_core.examples.digits.train", "torchmetrics", "jaxopt.loop", "__main__"])
def test_frames_of_the_user_are_not(module: str) -> None:
    namespace: dict[str, Any] = {"__name__": module, "warn": warn}
    exec(compile("def run(): warn('found', RuntimeWarning)", "train.py", "exec"), namespace)
    with pytest.warns(RuntimeWarning, match="found") as caught:
        namespace["run"]()
    assert caught[0].filename == "train.py"


def test_a_thread_without_a_frame_of_the_user() -> None:
    namespace: dict[str, Any] = {"__name__": "torch.autograd", "warn": warn}
    exec("def inner(): warn('found', RuntimeWarning)", namespace)
    with pytest.warns(RuntimeWarning, match="found") as caught, ThreadPoolExecutor(1) as threads:
        threads.submit(namespace["inner"])
    assert caught[0].filename == threading.__file__


FORWARD_MODE = """
import warnings, torch
import implicit_core as ic
from implicit_core.adapters import torch as ict

with warnings.catch_warnings():
    warnings.simplefilter("error")
    problem = ict.problem(lambda h, z: torch.tanh(0.5 * h) + z)
    with torch.no_grad():
        ic.fixed_point(problem, torch.zeros(3), torch.ones(3))
    assert ic.solve(problem, torch.zeros(3), torch.ones(3), solver=ic.NewtonKrylov()).converged
    ic.Implicit().jvp(problem, torch.zeros(3), torch.ones(3), torch.ones(3))
    torch.func.jvp(lambda z: ic.fixed_point(problem, torch.zeros(3), z).value, (torch.ones(3),), (torch.ones(3),))
"""


def test_forward_mode_of_pytorch_warns_of_nothing() -> None:
    """PyTorch compiles its rules at the first use, which is in a new process, by functions that it deprecates."""
    subprocess.run([sys.executable, "-c", FORWARD_MODE], check=True)
