"""Solvers of this library and of others, each run on a problem of the performance profiles and counted.

A solver stops by its own test, with a tolerance that implies the one of the problem. What it has cost by then is not
compared, but what it had cost when the residual was first small enough, since tests differ: so nobody pays for a test.
"""

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np

import implicit_core as ic

from .profile_tasks import LARGEST, Task
from .tally import LimitError, Tally, counted_in_jax, counted_in_numpy

DENSE = 1000
"""The most unknowns of a system whose Jacobian is made as a matrix."""
SECONDS = 60.0
"""The processor's time after which a solve that Python can leave has failed."""
LONG = 50_000
"""The number of unknowns from which methods that hold all their steps hold only a few."""


@dataclass(frozen=True)
class Outcome:
    """What a solver made of a problem.

    Attributes
    ----------
    evaluations, products
        Until the residual was first small enough; the whole solve if it never was, but the result is.
    total
        Evaluations and products until the solver stopped.
    seconds
        The time of the solve; None if it was not measured.
    claimed
        Whether the solver says that it succeeded.
    excess
        The residual of the result over the allowed one, in NumPy and float64.
    note
        What happened, if it did not end by itself.
    """

    evaluations: int
    products: int
    total: int
    seconds: float | None
    claimed: bool
    excess: float
    note: str = ""

    @property
    def solved(self) -> bool:
        """Whether the result is a solution."""
        return self.excess <= 1

    @property
    def cost(self) -> float:
        """Evaluations plus products; infinite unless it is solved."""
        return float(self.evaluations + self.products) if self.solved else float("inf")


@dataclass(frozen=True)
class Method:
    """A solver.

    Attributes
    ----------
    name, library
        Names in the table.
    run
        ``(task, timed) -> Outcome``.
    dense
        Whether it holds a matrix of all unknowns; of each sample's, if ``by_sample``.
    """

    name: str
    library: str
    run: Callable[[Task, bool], Outcome]
    dense: bool = False
    by_sample: bool = False

    def applies(self, task: Task) -> bool:
        """Whether the matrices of a dense method are small enough."""
        samples = len(task.start) if self.by_sample and not task.is_root else 1
        return not self.dense or task.start.size // samples <= DENSE


def _outcome(task: Task, tally: Tally, x: Any, claimed: bool, seconds: float | None, note: str = "") -> Outcome:
    excess = float("inf") if x is None else task.solved(x)
    # A solve that is cut after the residual was small enough was a success.
    if excess > 1 and tally.reached and note == "cut" and tally.point is not None:
        excess = task.solved(tally.point)
    units = tally.reached[:2] if tally.reached else (round(tally.evaluations), round(tally.products))
    if sum(units) > task.limit:  # whatever it found then
        excess, claimed, note = float("inf"), False, note or "over the limit"
    return Outcome(*units, round(tally.units), seconds, claimed, excess, note)


def _in_python(task: Task, solve: Callable[[Tally], tuple[Any, bool]], tally: Tally | None = None) -> Outcome:
    """Run a solver that Python can leave, and count and time it at once."""
    tally = tally or Tally()
    tally.reset(task.limit, SECONDS)
    x, claimed, note = None, False, ""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            x, claimed = solve(tally)
        except LimitError:
            note = "cut"
        except (ArithmeticError, ValueError, RuntimeError, np.linalg.LinAlgError) as error:
            if "callback" in str(error):  # ours, which counts
                raise
            note = f"{type(error).__name__}: {error}"[:80]
    seconds = tally.reached[2] if tally.reached else time.perf_counter() - tally.begin - tally.own
    return _outcome(task, tally, x, claimed, seconds, note)


# Ours: counted in NumPy, timed in JAX.

OURS: dict[str, Callable[[Task], Any]] = {
    "FixedPointIteration": lambda task: ic.FixedPointIteration(max_steps=task.limit),
    "Anderson": lambda task: ic.Anderson(max_steps=task.limit),
    "Broyden": lambda task: ic.Broyden(max_steps=min(task.limit, 500), memory=_memory(task)),
    "Newton": lambda _: ic.Newton(max_steps=500),
    "NewtonKrylov": lambda _: ic.NewtonKrylov(max_steps=500),
    "Polyalgorithm": lambda _: ic.Polyalgorithm(),
}


def _memory(task: Task) -> int | None:
    return None if task.start.size < LONG else 20


def _ours(task: Task, name: str) -> Any:
    solver = OURS[name](task)
    if task.measure == LARGEST:
        return replace(solver, rtol=0.0, atol=task.allowed)
    return replace(solver, rtol=1e-6 if task.is_root else task.allowed, atol=0.0)


_pushes: dict[str, Any] = {}


def _push(task: Task) -> Any:
    """The compiled product of the Jacobian of the function with a vector."""
    import jax
    import jax.numpy as jnp

    if task.family not in _pushes:
        _pushes.clear()

        def push(x: Any, z: Any, v: Any) -> Any:
            return jax.jvp(lambda x: task.function(jnp, x, z), (x,), (v,))[1]

        _pushes[task.family] = jax.jit(push)
    return _pushes[task.family]


def ours(name: str, task: Task, timed: bool) -> Outcome:
    """One of our solvers."""
    solver, push = _ours(task, name), _push(task)

    def solve(tally: Tally) -> tuple[Any, bool]:
        counted = counted_in_numpy(partial(task.residual, np), partial(task.excess, np), task.arguments, tally)

        def f(x: Any, _: Any) -> Any:
            residual = counted(x)
            return residual if task.is_root else x - residual

        def linearize(x: Any, _: Any) -> ic.Linearization[Any, Any]:
            def jvp_h(v: Any) -> Any:
                tally.multiplied()
                tally.check()
                return np.asarray(push(x, task.z, v))

            return ic.Linearization(f(x, None), jvp_h=jvp_h)

        kind = ic.RootProblem if task.is_root else ic.Problem
        problem = kind(f, linearize=linearize, batch_ndim=0 if task.is_root else 1)
        solution = ic.solve(problem, task.start, None, solver=solver)
        return solution.value, bool(np.all(solution.status == ic.CONVERGED))

    outcome = _in_python(task, solve)
    seconds = _timed(task, ("ours", name), partial(_our_program, task, solver)) if timed and outcome.solved else None
    return replace(outcome, seconds=seconds)


def _our_program(task: Task, solver: Any) -> Any:
    import jax
    import jax.numpy as jnp

    from implicit_core.adapters import jax as icj

    problem = icj.problem(partial(task.function, jnp), batch_ndim=0 if task.is_root else 1)
    problem = ic.RootProblem.of(problem) if task.is_root else problem
    return jax.jit(lambda x, arguments, _: ic.solve(problem, x, arguments["z"], solver=solver).value)


# JAX: one compiled program that counts and one that is timed, for each family.

_programs: dict[Any, Any] = {}


def _program(task: Task, key: Any, make: Callable[[], Any]) -> Any:
    """A compiled program of the family; those of the family before are dropped."""
    key = (task.family, task.start.shape, *key)
    if key not in _programs:
        if any(other[:2] != key[:2] for other in _programs):
            _programs.clear()
        _programs[key] = make()
    return _programs[key]


def _timed(task: Task, key: Any, make: Callable[[], Any]) -> float:
    """The shortest of a few solves by a compiled program, without the compilation."""
    import jax

    program = _program(task, (*key, "timed"), make)
    arguments = (jax.numpy.asarray(task.start), jax.tree.map(jax.numpy.asarray, task.arguments), task.within)
    jax.block_until_ready(program(*arguments))
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        times.append(time.perf_counter() - begin)
        if times[0] > 5.0:
            break
    return min(times)


def in_jax(
    key: str, make: Callable[..., Callable[[Any, Any], tuple[Any, Any]]], by_sample: bool, task: Task, timed: bool
) -> Outcome:
    """A solver in JAX: ``make(residual, task, x0, arguments, within) -> (x, claimed)`` calls it, and is compiled."""
    import jax
    import jax.numpy as jnp

    mapped = by_sample and not task.is_root
    tally = Tally()

    def program(counting: bool) -> Any:
        def solve(x0: Any, arguments: Any, within: Any) -> Any:
            residual = partial(task.residual, jnp)
            if counting:
                excess = partial(task.excess, jnp, batched=not mapped)
                residual = counted_in_jax(residual, excess, tally)
            return make(residual, task, x0, arguments, within)

        if mapped:  # z["shared"] holds the weights, the rest one row for each sample
            in_axes = {"z": {name: None if name == "shared" else 0 for name in task.z}, "allowed": None}
            solve = jax.vmap(solve, in_axes=(0, in_axes, None))
        return jax.jit(solve)

    counted, tally = _program(task, (key, "counted"), lambda: (program(True), tally))
    arguments = (jnp.asarray(task.start), jax.tree.map(jnp.asarray, task.arguments), task.within)
    tally.reset(samples=len(task.start) if mapped else 1)
    x, claimed = jax.block_until_ready(counted(*arguments))
    outcome = _outcome(task, tally, x, bool(np.all(claimed)), None)
    if timed and outcome.solved:
        outcome = replace(outcome, seconds=_timed(task, (key,), lambda: program(False)))
    return outcome


def _absolute(task: Task, within: Any) -> Any:
    """A bound of each entry that implies the norm ``within``."""
    sample = task.start.size // (1 if task.is_root else len(task.start))
    return within if task.measure == LARGEST else within / sample**0.5


def optimistixs(name: str, residual: Any, task: Task, x0: Any, arguments: Any, within: Any) -> Any:
    """The root finders, least-squares solvers and plain iteration of optimistix."""
    import lineax as lx
    import optimistix as optx

    tolerance = {"rtol": 1e-6, "atol": _absolute(task, within)}
    options = {"max_steps": task.limit, "throw": False}
    if name == "FixedPointIteration":
        # Its test is of the residual, so the relative part would allow more than the problem does.
        solver = optx.FixedPointIteration(rtol=1e-12, atol=tolerance["atol"])
        solution = optx.fixed_point(lambda x, args: x - residual(x, args), solver, x0, args=arguments, **options)
    else:
        if name == "Newton-GMRES":
            linear = lx.GMRES(rtol=1e-3, atol=0.1 * tolerance["atol"], restart=20, stagnation_iters=20)
            solver = optx.Newton(**tolerance, linear_solver=linear)
        else:
            solver = getattr(optx, name)(**tolerance)
            options["max_steps"] = max(2, task.limit // 2) if name == "Chord" else _newton_steps(task)
        solution = optx.root_find(residual, solver, x0, args=arguments, **options)
    return solution.value, solution.result == optx.RESULTS.successful


def _newton_steps(task: Task) -> int:
    """As many steps as the limit allows, each with a Jacobian."""
    samples = 1 if task.is_root else len(task.start)
    return max(2, task.limit // (1 + task.start.size // samples))


def jaxopts(name: str, residual: Any, task: Task, x0: Any, arguments: Any, within: Any) -> Any:
    """The iterative solvers of jaxopt, on the whole batch."""
    import jax
    import jaxopt

    options = {"maxiter": task.limit, "tol": within, "implicit_diff": False}
    if name != "Broyden":
        step = getattr(jaxopt, name)(lambda x, z: x - residual(x, z), **options).run(x0, arguments)
        return step.params, step.state.error <= within
    # All steps would be 500 pairs of states. It is left when its trials, two units each, have cost too much.
    solver = jaxopt.Broyden(residual, history_size=200 if task.start.size < LONG else 20, **options)
    x, state = jax.lax.while_loop(
        lambda carry: (carry[1].error > within) & (2 * carry[1].num_fun_eval <= task.limit),
        lambda carry: tuple(solver.update(*carry, arguments)),
        (x0, solver.init_state(x0, arguments)),
    )
    return x, state.error <= within


def jaxopts_scipy(task: Task, timed: bool) -> Outcome:
    """The wrapper of SciPy's hybr in jaxopt, which gives it the Jacobian."""
    import jax.numpy as jnp
    import jaxopt

    plain = partial(task.residual, jnp)

    def make(residual: Any) -> Any:
        return jaxopt.ScipyRootFinding(optimality_fun=residual, method="hybr", use_jacrev=False)

    def make_counted() -> Any:
        tally = Tally()
        return make(counted_in_jax(plain, partial(task.excess, jnp), tally)), tally

    solver, tally = _program(task, ("jaxopt", "ScipyRootFinding"), make_counted)

    def solve(_: Tally) -> tuple[Any, bool]:
        step = solver.run(jnp.asarray(task.start), task.arguments)
        return step.params, bool(step.state.success)

    outcome, seconds = _in_python(task, solve, tally), None
    if timed and outcome.solved:
        bare = make(plain)
        seconds = _timed(
            task, ("jaxopt", "ScipyRootFinding"), lambda: lambda x, arguments, _: bare.run(x, arguments).params
        )
    return replace(outcome, seconds=seconds)


# SciPy: the whole batch is one system.


def scipys(method: str, task: Task, timed: bool) -> Outcome:
    """A method of scipy.optimize.root, without derivatives."""
    from scipy.optimize import root

    limit = task.limit
    largest = task.measure == LARGEST
    stop = {"fatol": task.within, "tol_norm": None if largest else np.linalg.norm, "maxiter": limit, "maxfev": limit}
    if method == "df-sane":
        stop = {"fatol": task.within, "ftol": 0.0, "maxfev": limit}
    elif method == "hybr":
        stop = {"maxfev": limit}
    elif method == "lm":
        stop = {"maxiter": limit}
    else:
        del stop["maxfev"]

    def solve(tally: Tally) -> tuple[Any, bool]:
        counted = counted_in_numpy(partial(task.residual, np), partial(task.excess, np), task.arguments, tally)
        found = root(
            lambda x: counted(x.reshape(task.start.shape)).reshape(-1),
            task.start.reshape(-1),
            method=method,
            options=stop,
        )
        return found.x, bool(found.success)

    del timed
    return _in_python(task, solve)


# TorchDEQ: fixed points of x - g(x), evaluated in NumPy.


def torchdeqs(name: str, task: Task, timed: bool) -> Outcome:
    """A solver of TorchDEQ; a root is a batch of one."""
    import torch
    import torchdeq

    steps = min(task.limit, 200) if name == "broyden" else task.limit
    if name == "broyden" and task.start.size >= LONG:
        steps = 30  # it holds them all
    relative = not task.is_root
    deq = torchdeq.get_deq(
        f_solver=name,
        f_max_iter=steps,
        f_tol=task.allowed if relative else task.within,
        f_stop_mode="rel" if relative else "abs",
    ).eval()
    shape = (1, *task.start.shape) if task.is_root else task.start.shape

    def solve(tally: Tally) -> tuple[Any, bool]:
        counted = counted_in_numpy(partial(task.residual, np), partial(task.excess, np), task.arguments, tally)

        def f(h: torch.Tensor) -> torch.Tensor:
            x = h.numpy().reshape(task.start.shape)
            return torch.from_numpy(x - counted(x)).reshape(shape)

        with torch.no_grad():
            found, info = deq(f, torch.from_numpy(task.start.copy()).reshape(shape))
        lowest = float(info["rel_lowest" if relative else "abs_lowest"].max())
        return found[-1].numpy(), lowest <= (task.allowed if relative else task.within)

    del timed
    return _in_python(task, solve)


def _present(*packages: str) -> bool:
    return all(find_spec(package) is not None for package in packages)


def methods() -> dict[str, Method]:
    """All solvers of the installed libraries, ours first."""
    found = [Method(name, "ours", partial(ours, name), name == "Newton", by_sample=True) for name in OURS]
    if _present("scipy"):
        for method in ("hybr", "lm", "krylov", "anderson", "broyden1", "df-sane"):
            found.append(Method(method, "SciPy", partial(scipys, method), method in ("hybr", "lm")))
    if _present("jaxopt"):
        for name in ("FixedPointIteration", "AndersonAcceleration", "Broyden"):
            found.append(Method(name, "jaxopt", partial(in_jax, f"jaxopt {name}", partial(jaxopts, name), False)))
        found.append(Method("ScipyRootFinding", "jaxopt", jaxopts_scipy, dense=True))
    if _present("optimistix", "lineax"):
        for name in ("Newton", "Chord", "Dogleg", "LevenbergMarquardt", "Newton-GMRES", "FixedPointIteration"):
            run = partial(in_jax, f"optimistix {name}", partial(optimistixs, name), True)
            dense = name not in ("Newton-GMRES", "FixedPointIteration")
            found.append(Method(name, "optimistix", run, dense, by_sample=True))
    if _present("torch", "torchdeq"):
        for name in ("anderson", "broyden", "fixed_point_iter"):
            found.append(Method(name, "TorchDEQ", partial(torchdeqs, name)))
    return {f"{method.library} {method.name}": method for method in found}


LIBRARIES = ("scipy", "jaxopt", "optimistix", "torchdeq")
