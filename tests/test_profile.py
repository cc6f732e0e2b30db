"""Performance profiles: the shares against hand-computed ones, and what is counted against what is known."""

import doctest
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import dolan_more, profile, profile_solvers
from benchmarks.profile_solvers import Method, Outcome
from benchmarks.profile_tasks import Task, tasks
from benchmarks.tally import Tally, counted_in_jax
from benchmarks.trained_cells import load

INF = math.inf


def test_shares_computed_by_hand() -> None:
    """Four problems and three solvers; nobody solves the last one, which counts all the same."""
    ratios = dolan_more.ratios([[10, 20, 40], [30, 10, INF], [INF, INF, 7], [INF, INF, INF]])
    np.testing.assert_array_equal(ratios, [[1, 2, 4], [3, 1, INF], [INF, INF, 1], [INF, INF, INF]])
    shares = dolan_more.profile(ratios, [1, 1.99, 2, 3, 4, 1e9])
    np.testing.assert_array_equal(
        shares,
        [[0.25, 0.25, 0.25], [0.25, 0.25, 0.25], [0.25, 0.5, 0.25], [0.5, 0.5, 0.25], [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]],
    )
    assert doctest.testmod(dolan_more) == (0, 2)
    for costs in ([[1.0, 0.0]], [[1.0, math.nan]], [1.0, 2.0]):
        with pytest.raises(ValueError, match="positive"):
            dolan_more.ratios(costs)


def test_what_a_compiled_program_executes_is_counted() -> None:
    """Also what does not change within a loop, and a Jacobian as many products, the first point that is good enough."""
    tally = Tally()
    matrix = np.diag([1.0, 2.0, 3.0])
    f = counted_in_jax(lambda x, z: z @ x, lambda x, value, _: jnp.max(jnp.abs(value)), tally)
    x = jnp.ones(3)

    def counts(program: Any, *arguments: Any) -> tuple[float, float]:
        tally.reset()
        jax.block_until_ready(jax.jit(program)(*arguments))
        return tally.evaluations, tally.products

    assert counts(lambda x: f(x, matrix), x) == (1, 0)
    assert tally.reached is None
    assert counts(lambda x: f(x / 4, matrix), x) == (1, 0)
    assert tally.reached is not None
    assert tally.reached[:2] == (1, 0)
    assert counts(lambda x: jax.jvp(lambda x: f(x, matrix), (x,), (x,)), x) == (1, 1)
    assert counts(jax.jacfwd(lambda x: f(x, matrix)), x) == (1, 3)
    assert counts(lambda x: jax.vjp(lambda x: f(x, matrix), x)[1](x), x) == (1, 1)
    assert counts(jax.jacrev(lambda x: f(x, matrix)), x) == (1, 3)

    def repeated(x: Any) -> Any:
        push = jax.linearize(lambda x: f(x, matrix), x)[1]
        return jax.lax.fori_loop(0, 5, lambda _, total: total + push(x), x)

    assert counts(repeated, x) == (1, 5)
    np.testing.assert_array_equal(jax.jacfwd(lambda x: f(x, matrix))(x), matrix)
    np.testing.assert_array_equal(jax.jacrev(lambda x: f(x, matrix))(x), matrix)
    # Three solves in step count as one.
    tally.reset(samples=3)
    jax.block_until_ready(jax.jit(jax.vmap(jax.jacfwd(lambda x: f(x, matrix))))(jnp.ones((3, 3))))
    assert (tally.evaluations, tally.products) == (1, 3)


@pytest.mark.slow
def test_a_tiny_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    solvers = ("ours Newton", "ours Anderson", "SciPy hybr", "optimistix Newton", "TorchDEQ anderson", "lying")

    def lying(task: Task, timed: bool) -> Outcome:
        return Outcome(1, 0, 1, None, True, task.solved(task.start))

    real = profile_solvers.methods()
    found = {name: method for name, method in real.items() if name in solvers}
    monkeypatch.setattr(profile, "methods", lambda: found | {"SciPy lying": Method("lying", "SciPy", lying)})
    arguments = ["--set", "roots", "--problem", "Chandrasekhar", "--problem", "circle", "--output", str(tmp_path)]
    assert profile.main([*arguments, "--quick"]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert (tmp_path / "profile.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((tmp_path / "profile.json").read_text())
    outcomes = {row["problem"]: row["outcomes"] for row in record["rows"]}
    assert outcomes.keys() == {"Chandrasekhar", "circle and line"}
    # Newton's method: four points, and a Jacobian of ten unknowns at all but the last.
    for name in ("ours Newton", "optimistix Newton"):
        if name in found:
            one = outcomes["Chandrasekhar"][name]
            assert (one["evaluations"], one["products"]) == (4, 30)
    summary = record["sets"]["roots"]
    costs = [[profile.cost(row, name) for name in summary["solvers"]] for row in record["rows"]]
    for i in range(len(summary["solvers"])):
        share = sum(line[i] <= min(line) for line in costs) / 2
        assert summary["cost"]["rho"][i][0] == share
    assert summary["false successes"]["SciPy lying"] == ["circle and line", "Chandrasekhar"]
    assert summary["cost"]["failed"]["SciPy lying"] == ["circle and line", "Chandrasekhar"]
    assert summary["false successes"]["ours Newton"] == []
    assert "| SciPy lying | roots: Chandrasekhar |" in (tmp_path / "profile.md").read_text()

    # A second run measures nothing again.
    monkeypatch.setattr(profile, "methods", lambda: {name: Method(name, "x", _unexpected) for name in found})
    assert profile.main([*arguments, "--quick"]) == 0
    with pytest.raises(AssertionError, match="measured again"):
        profile.main([*arguments, "--quick", "--restart"])


def _unexpected(task: Task, timed: bool) -> Outcome:
    raise AssertionError("measured again")


def test_all_problems_are_there() -> None:
    """As many as the tables say, and no start is a solution, but of those that are meant to be easy."""
    found = {name: tasks(name, most=10_000) for name in ("roots", "systems", "pde", "cells")}
    assert {name: len(group) for name, group in found.items()} == {"roots": 69, "systems": 60, "pde": 17, "cells": 40}
    for group in found.values():
        assert len({task.name for task in group}) == len(group)
        assert all(task.solved(task.start) > 1 for task in group)
    assert all(np.all(np.isfinite(cell.z["x"])) and cell.least_norm > 0 for cell in load())
    with pytest.raises(SystemExit, match="2"):
        profile.main(["--problem", "nonsense"])
