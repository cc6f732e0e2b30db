"""Solvers of this library and of other libraries, each as a function without arguments that solves one equation."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

import implicit_core as ic

from .equations import Equation

RTOL = 1e-5
"""Largest allowed residual ‖F(h) - h‖ of a sample, relative to ‖F(h)‖."""
LIMIT = 200
"""A solver that needs more evaluations of F than this has failed."""
OURS: dict[str, type[ic.Solver]] = {
    "fixed point": ic.FixedPointIteration,
    "Anderson": ic.Anderson,
    "Broyden": ic.Broyden,
    "Newton-Krylov": ic.NewtonKrylov,
}
TORCHDEQS = {"fixed point": "fixed_point_iter", "Anderson": "anderson", "Broyden": "broyden"}
JAXOPTS = {"fixed point": "FixedPointIteration", "Anderson": "AndersonAcceleration", "Broyden": "Broyden"}
SCIPYS = {"Anderson": "anderson", "Broyden": "broyden1", "Newton-Krylov": "newton_krylov"}


@dataclass(frozen=True)
class Contender:
    """One library's solver on one equation.

    Attributes
    ----------
    run
        Solves the equation.
    evaluations
        Number of evaluations of F in one run; None if the residual was not reached.
    """

    run: Callable[[], Any]
    evaluations: int | None


def _worst(value: np.ndarray, h: np.ndarray) -> float:
    value, h = value.reshape(len(h), -1), h.reshape(len(h), -1)
    ratio = np.linalg.norm(value - h, axis=1) / np.linalg.norm(value, axis=1)
    return float(np.max(ratio)) if np.all(np.isfinite(ratio)) else float("inf")


# PyTorch.


def ours_in_torch(equation: Equation, family: str, steps: int | None = None) -> Contender:
    """The solver of this library; with ``steps``, exactly that many evaluations of F, whatever the residual.

    Broyden's method keeps 40 steps here, because TorchDEQ's keeps all its steps.
    """
    from implicit_core.adapters import torch as ict

    f, h0, z = equation.torch()
    settings = {"rtol": 0.0 if steps else RTOL, "atol": 0.0, "max_steps": steps or LIMIT}
    solver = OURS[family](**settings, **({"memory": 40} if family == "Broyden" and not steps else {}))
    run = partial(ic.solve, ict.problem(f, batch_ndim=1), h0, z, solver=solver)
    solution = run()
    reached = bool((solution.status == ic.CONVERGED).all())
    return Contender(run, int(solution.stats.evaluations) if reached or steps else None)


def torchdeqs(equation: Equation, family: str, steps: int | None = None) -> Contender:
    """The solver of TorchDEQ."""
    import torch
    import torchdeq

    f, h0, z = equation.torch()
    evaluations = 0

    def counted(h: Any) -> Any:
        nonlocal evaluations
        evaluations += 1
        return f(h, z)

    deq = torchdeq.get_deq(
        f_solver=TORCHDEQS[family],
        f_max_iter=steps or LIMIT,
        f_tol=0.0 if steps else RTOL,
        f_stop_mode="rel",
    ).eval()

    def run(function: Callable[[Any], Any] = lambda h: f(h, z)) -> Any:
        with torch.no_grad():
            return deq(function, h0)

    try:
        lowest = float(run(counted)[1]["rel_lowest"].max())
    except torch.linalg.LinAlgError:
        lowest = float("inf")
    return Contender(run, evaluations if lowest <= RTOL or steps else None)


# SciPy solves the whole batch as one system. It is stopped at the first point with a small enough residual.


class _ReachedError(Exception):
    """Raised when the residual is small enough, to stop SciPy."""


def scipys(equation: Equation, family: str) -> Contender:
    """The solver of SciPy, on F in PyTorch."""
    import torch
    from scipy import optimize

    f, h0, z = equation.torch()
    evaluations = 0

    def residual(h: np.ndarray) -> np.ndarray:
        nonlocal evaluations
        evaluations += 1
        if evaluations > LIMIT:
            raise optimize.NoConvergence
        with torch.no_grad():
            value = f(torch.from_numpy(h.reshape(equation.shape)), z).numpy()
        if _worst(value, h.reshape(equation.shape)) <= RTOL:
            raise _ReachedError
        return value.reshape(-1) - h

    def run() -> bool:
        nonlocal evaluations
        evaluations = 0
        try:
            # SciPy's default for the initial Jacobian does not fit: here ∂(F - h)/∂h is close to -I.
            guess = {} if family == "Newton-Krylov" else {"alpha": 1.0}
            getattr(optimize, SCIPYS[family])(residual, h0.numpy().reshape(-1), f_tol=0.0, maxiter=LIMIT, **guess)
        except _ReachedError:
            return True
        except (optimize.NoConvergence, ValueError, np.linalg.LinAlgError):
            return False
        return False

    with np.errstate(all="ignore"):
        reached = run()
    return Contender(run, evaluations if reached else None)


# JAX, under jit.


def ours_in_jax(equation: Equation, family: str) -> Contender:
    """The solver of this library, under jit."""
    import jax

    from implicit_core.adapters import jax as icj

    f, h0, z = equation.jax()
    solver = OURS[family](rtol=RTOL, atol=0.0, max_steps=LIMIT)
    problem = icj.problem(f, batch_ndim=1)
    program = jax.jit(lambda h0, z: ic.solve(problem, h0, z, solver=solver)).lower(h0, z).compile()
    solution = program(h0, z)
    reached = bool((solution.status == ic.CONVERGED).all())
    return Contender(
        lambda: jax.block_until_ready(program(h0, z)), int(solution.stats.evaluations) if reached else None
    )


def jaxopts(equation: Equation, family: str) -> Contender:
    """The solver of jaxopt, under jit."""
    import jaxopt

    def make(f: Callable[..., Any], tolerance: Any) -> Callable[[Any, Any], Any]:
        options = {"history_size": 5} if family == "Anderson" else {}
        if family == "Broyden":
            # The root of h - F(h), since jaxopt starts with the identity as the Jacobian.
            solver = jaxopt.Broyden(lambda h, z: h - f(h, z), maxiter=LIMIT, tol=tolerance)
        else:
            solver = getattr(jaxopt, JAXOPTS[family])(f, maxiter=LIMIT, tol=tolerance, **options)
        return lambda h0, z: solver.run(h0, z).params

    return _calibrated(equation, make)


def optimistixs(equation: Equation, family: str) -> Contender:
    """The solver of optimistix, under jit; of these methods it has plain iteration only."""
    import optimistix as optx

    assert family == "fixed point"

    def make(f: Callable[..., Any], tolerance: Any) -> Callable[[Any, Any], Any]:
        solver = optx.FixedPointIteration(rtol=tolerance, atol=tolerance)
        return lambda h0, z: optx.fixed_point(f, solver, h0, args=z, max_steps=LIMIT, throw=False).value

    return _calibrated(equation, make)


def _calibrated(equation: Equation, make: Callable[..., Callable[[Any, Any], Any]]) -> Contender:
    """A solver with another stop test, run with the loosest tolerance that reaches the residual."""
    import jax
    import jax.numpy as jnp

    f, h0, z = equation.jax()
    seen: list[float] = []

    def watched(h: Any, z: Any) -> Any:
        value = f(h, z)
        axes = tuple(range(1, h.ndim))
        norm = jnp.sqrt(jnp.sum((value - h) ** 2, axes)) / jnp.sqrt(jnp.sum(value**2, axes))
        jax.debug.callback(lambda worst: seen.append(float(worst)), jnp.max(norm))
        return value

    search = jax.jit(lambda tolerance, h0, z: make(watched, tolerance)(h0, z))

    def enough(exponent: float) -> bool:
        seen.clear()
        jax.block_until_ready(search(10.0**-exponent, h0, z))
        jax.effects_barrier()
        return min(seen) <= RTOL

    exponents = np.arange(-1.0, 6.0, 0.1)
    low, high = 0, len(exponents) - 1
    reached = enough(exponents[high])
    while reached and low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(exponents[middle]) else (middle + 1, high)
    reached = reached and enough(exponents[high])
    program = jax.jit(make(f, float(10.0 ** -exponents[high]))).lower(h0, z).compile()
    return Contender(lambda: jax.block_until_ready(program(h0, z)), len(seen) if reached else None)
