"""The cost table of the design, by counting: callbacks of the estimators, dispatched operations of the solvers."""

import dataclasses
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from libraries import NUMPY, dispatched
from problems import Case, layer, symmetric_layer

import implicit_core as ic
from benchmarks.counting import Dispatched
from benchmarks.memory import LiveTensors
from implicit_core.backends import torch as torch_backend

K = [1, 2, 5, 9]


def counts(case: Case, estimator: ic.Estimator) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """Callbacks of the value, of one pullback, and of a pushforward with its value."""
    problem = case.linearized()
    h, v = np.zeros_like(case.h0), np.ones_like(case.h0)
    _, pullback = estimator.vjp(problem, h, case.z)
    value = dict(case.counts)
    case.counts.clear()
    pullback(v)
    backward = dict(case.counts)
    case.counts.clear()
    estimator.jvp(problem, h, case.z, case.z)
    return value, backward, dict(case.counts)


def nonzero(**expected: int) -> dict[str, int]:
    return {name: count for name, count in expected.items() if count}


def test_one_step() -> None:
    assert counts(layer(), ic.OneStep()) == ({"f": 1}, {"vjp_z": 1}, {"f": 1, "jvp_z": 1})


@pytest.mark.parametrize("k", K)
def test_neumann(k: int) -> None:
    value, backward, forward = counts(layer(), ic.Neumann(k, 0.5))
    assert value == {"f": 1}
    assert backward == nonzero(vjp_h=k - 1, vjp_z=1)
    assert forward == nonzero(f=1, jvp_z=1, jvp_h=k - 1)


@pytest.mark.parametrize("k", K)
def test_unroll(k: int) -> None:
    value, backward, forward = counts(layer(), ic.Unroll(k, 0.5))
    assert value == {"f": k}
    assert backward == nonzero(vjp_h=k - 1, vjp_z=k)
    assert forward == nonzero(f=k, jvp_z=k, jvp_h=k - 1)
    assert counts(layer(), ic.BPTT(k)) == (value, backward, forward)


@pytest.mark.parametrize("k", K)
def test_unroll_with_recomputation_holds_states_and_pays_evaluations(k: int) -> None:
    value, backward, _ = counts(layer(), ic.Unroll(k, 0.5, recompute=True))
    assert value == {"f": k}
    assert backward == nonzero(f=k, vjp_h=k - 1, vjp_z=k)


def test_implicit_pays_one_pullback_in_h_for_each_product() -> None:
    case = layer()
    value, backward, forward = counts(case, ic.Implicit(ic.GMRES(rtol=1e-8)))
    j = case.linearized().linearize(case.h0, case.z)
    direct = ic.solve_linear(lambda w: w - j.vjp_h(w), np.ones_like(case.h0), solver=ic.GMRES(rtol=1e-8), batch_ndim=1)
    assert value == {"f": 1}
    assert backward == {"vjp_h": int(direct.stats.evaluations), "vjp_z": 1}
    assert forward["jvp_z"] == forward["f"] == 1


@pytest.mark.parametrize(
    ("estimator", "calls"),
    [(ic.OneStep(), 1), (ic.Neumann(5, 0.5), 5), (ic.Unroll(5, 0.5), 5), (ic.BPTT(5), 5)],
    ids=repr,
)
def test_a_joint_vjp_is_called_once_where_both_parts_are_needed(estimator: ic.Estimator, calls: int) -> None:
    case = layer()
    _, pullback = estimator.vjp(case.problem(), case.h0, case.z)
    case.counts.clear()
    pullback(np.ones_like(case.h0))
    assert case.counts == {"vjp": calls}


def test_a_problem_with_one_mode_serves_that_mode() -> None:
    case = layer()
    pull_only = ic.Problem(case.counted(NUMPY, "f"), vjp=case.counted(NUMPY, "vjp"), batch_ndim=1)
    push_only = ic.Problem(case.counted(NUMPY, "f"), jvp=case.counted(NUMPY, "jvp"), batch_ndim=1)
    for estimator in (ic.OneStep(), ic.Neumann(), ic.Unroll(), ic.Implicit(), ic.BPTT(3)):
        estimator.vjp(pull_only, case.h0, case.z)[1](np.ones_like(case.h0))
        estimator.jvp(push_only, case.h0, case.z, case.z)
        with pytest.raises(NotImplementedError, match="pass vjp= to Problem"):
            estimator.vjp(push_only, case.h0, case.z)
        with pytest.raises(NotImplementedError, match="pass jvp= to Problem"):
            estimator.jvp(pull_only, case.h0, case.z, case.z)
    with pytest.raises(NotImplementedError, match="pass jvp= to Problem"):
        ic.solve(pull_only, case.h0, case.z, solver=ic.NewtonKrylov())
    assert np.all(ic.solve(push_only, case.h0, case.z, solver=ic.NewtonKrylov()).status == ic.CONVERGED)


@pytest.mark.parametrize(
    ("solver", "check_every", "limit", "forced"),
    [
        (ic.FixedPointIteration, 1, 10, 1),  # nothing is masked; a forced number of steps copies F's results alone
        (ic.FixedPointIteration, 4, 12, 1),
        (ic.Anderson, 1, 27, 24),
        (ic.Anderson, 4, 67, 61),
        (ic.Broyden, 1, 44, 41),
        (ic.Broyden, 4, 62, 57),
    ],
)
@pytest.mark.parametrize("tolerance", [1e-300, 0.0])
def test_operations_a_step(
    solver: type, check_every: int, limit: int, forced: int, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a tolerance that is not reached, and with a forced number of steps; between two checkpoints.

    Forced steps of plain iteration are not looked at, but for one read at the end.
    """
    reads: list[int] = []
    kind, count = type(torch_backend.BACKEND), torch_backend.BACKEND.count
    monkeypatch.setattr(kind, "count", lambda self, masks: reads.append(len(masks)) or count(masks))
    case = symmetric_layer()
    w, x = torch.asarray(case.z["w"]), torch.asarray(case.z["x"])

    def f(h: torch.Tensor, z: Any) -> torch.Tensor:
        return torch.tanh(h @ w.T + x)

    def run(steps: int) -> Counter[str]:
        settings = solver(rtol=tolerance, atol=0.0, max_steps=steps, check_every=check_every)
        with Dispatched() as mode:
            ic.solve(f, torch.zeros_like(x), None, solver=settings, batch_ndim=1)
        return mode.operations

    own = 4  # of f: transpose, product, sum, tanh
    steps = 24
    once = run(1 + 36)
    plain = solver is ic.FixedPointIteration and not tolerance
    assert len(reads) == (1 if plain else 36 / check_every)
    twice = run(1 + 36 + steps)
    assert len(reads) == (2 if plain else (2 * 36 + steps) / check_every)
    assert not any("_local_scalar_dense" in name for name in twice)
    for operations in (once, twice):
        operations.pop("aten.detach.default")  # from `.numpy()`, when a mask is read
    assert (twice.total() - once.total()) / steps - own <= dispatched(limit if tolerance else forced)


@pytest.mark.parametrize(
    ("solver", "limit"),
    [(ic.GMRES, 87), (ic.CG, 34), (ic.MINRES, 64), (ic.BiCGSTAB, 64), (ic.Richardson, 30)],
)
def test_operations_of_a_step_of_a_linear_solver(solver: type, limit: int) -> None:
    """Of a tolerance that is not reached, with the product itself and a copy of it."""
    generator = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(40, 40, generator=generator, dtype=torch.float64)).Q
    a = q @ torch.diag(torch.linspace(0.01, 1.5, 40, dtype=torch.float64)) @ q.T
    b = torch.randn(8, 40, generator=generator, dtype=torch.float64)
    products = 2 if solver is ic.BiCGSTAB else 1

    def run(steps: int) -> tuple[int, int]:
        cycle = {"restart": steps} if solver is ic.GMRES else {}
        settings = solver(rtol=1e-14, max_steps=products * steps, **cycle)
        with Dispatched() as mode:
            solution = ic.solve_linear(lambda x: x @ a, b, solver=settings, batch_ndim=1)
        return mode.operations.total(), solution.stats.evaluations

    (once, few), (twice, many) = run(9), run(25)
    assert many - few == 16 * products
    assert (twice - once) / 16 <= dispatched(limit)


def test_operations_of_a_checkpoint() -> None:
    """Whether samples make progress is looked at after 32, 64, 128, ... evaluations."""
    h0, w = torch.zeros(4, 8, dtype=torch.float64), 0.9 * torch.eye(8, dtype=torch.float64)

    def run(steps: int) -> int:
        settings = ic.FixedPointIteration(rtol=1e-300, atol=0.0, max_steps=steps)
        with Dispatched() as mode:
            ic.solve(lambda h, z: torch.tanh(h @ w.T + 1.0), h0, None, solver=settings, batch_ndim=1)
        return mode.operations.total()

    assert run(33) - run(31) - (run(30) - run(28)) <= 25


@pytest.mark.parametrize(
    ("solver", "states", "held"),
    [(ic.FixedPointIteration(), 1, 5), (ic.Anderson(memory=5), 2, 10 + 9), (ic.Broyden(memory=10), 6, 10 + 10)],
    ids=["fp", "anderson", "b"],
)
def test_allocations_of_a_step(solver: ic.Solver, states: int, held: int) -> None:
    """In states: the memory that a step allocates besides F, and the peak memory including F."""
    batch, width = 16, 4096  # wide enough for numbers of a sample, and matrices of the memory's size, to vanish
    own = 3  # product, sum and tanh

    def f(h: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return torch.tanh(0.5 * h + z)

    def run(steps: int) -> LiveTensors:
        h0, z = torch.zeros(batch, width), torch.linspace(-1, 1, width).expand(batch, width)
        settings = dataclasses.replace(solver, rtol=0.0, atol=0.0, max_steps=steps)
        with LiveTensors() as live:
            ic.solve(f, h0, z, solver=settings, batch_ndim=1)
        return live

    state = batch * width * 4
    twice, once = run(8), run(4)
    assert round((twice.made - once.made) / (4 * state), 1) - own == states
    assert int(twice.peak / state) == held


def test_memory_of_a_history() -> None:
    """Anderson holds 2m states and Broyden m, in addition to the states of the loop."""
    from implicit_core.system import System

    case = layer(batch=2, width=50)
    system = System(case.problem(), case.h0, case.z)
    x = system.space.pack(case.h0)
    state = case.h0.size
    anderson = ic.Anderson(memory=7).init(system, x)
    broyden = ic.Broyden(memory=7).init(system, x)
    assert sum(a.size for a in (*anderson.proposals, *anderson.residuals)) == 14 * state
    assert sum(a.size for a in broyden.steps) == 7 * state


@pytest.mark.parametrize(
    ("solver", "limit"),
    [(ic.FixedPointIteration, 55), (ic.Anderson, 110), (ic.Broyden, 85)],
    ids=["fp", "anderson", "b"],
)
def test_operations_around_the_loop(solver: type, limit: int) -> None:
    """A solve of two evaluations without one of its steps: four operations of F, and all outside the loop."""
    h0, w = torch.zeros(4, 8), 0.1 * torch.ones(8, 8)

    def run(steps: int) -> int:
        settings = solver(rtol=1e-6, max_steps=steps)
        with Dispatched() as mode:
            ic.solve(lambda h, z: torch.tanh(h @ w.T + 1.0), h0, None, solver=settings, batch_ndim=1)
        return mode.operations.total()

    assert run(2) - (run(3) - run(2)) <= dispatched(limit)
