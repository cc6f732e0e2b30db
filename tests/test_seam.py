"""The seam admits a traced backend: every solver and linear solver under ``jax.jit``, with ``lax.while_loop``."""

import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import Case, layer, pytree

import implicit_core as ic
from implicit_core import registry
from implicit_core.backend import Backend


class Traced(Backend):
    """What a traced framework overrides, and no more: pytrees, two loops, and what a counter may index."""

    def device(self, x: Any) -> None:
        return None

    def unchanged(self, x: Any, before: Any) -> bool:
        return True

    def flatten(self, tree: Any) -> Any:
        return jax.tree.flatten(tree)

    def unflatten(self, structure: Any, leaves: Any) -> Any:
        return jax.tree.unflatten(structure, leaves)

    def map(self, fn: Callable[..., Any], tree: Any, *rest: Any) -> Any:
        return jax.tree.map(fn, tree, *rest)

    def repeat(self, body: Any, carry: Any, times: int) -> Any:
        return jax.lax.fori_loop(0, times, lambda _, carry: body(carry), carry)

    def while_loop(self, cond: Any, body: Any, carry: Any, max_steps: int, check_every: int = 1) -> Any:
        def more(state: Any) -> Any:
            return (state[0] < max_steps) & cond(state[1])

        start = (0, jax.tree.map(jnp.asarray, carry))
        return jax.lax.while_loop(more, lambda state: (state[0] + 1, body(state[1])), start)[1]

    def minimum(self, index: Any, limit: int) -> Any:
        return jnp.minimum(index, limit)

    def table(self, rows: Any) -> Any:
        return rows


@pytest.fixture(autouse=True)
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    module = types.ModuleType("a_traced_backend")
    module.BACKEND = Traced("jax", jnp, (jax.Array,))
    monkeypatch.setitem(sys.modules, "a_traced_backend", module)
    monkeypatch.setitem(registry._BACKENDS, "jax", "a_traced_backend")
    with jax.enable_x64(True):
        yield


def problem_of(case: Case) -> ic.Problem:
    return ic.Problem(
        lambda h, z: case.f(jnp, h, z),
        vjp=lambda h, z, v: case.vjp(jnp, h, z, v),
        jvp=lambda h, z, dh, dz: case.jvp(jnp, h, z, dh, dz),
        batch_ndim=case.batch_ndim,
    )


def arrays(tree: Any) -> Any:
    return jax.tree.map(jnp.asarray, tree)


@pytest.mark.parametrize("case", [layer(), pytree()], ids=lambda case: case.name)
@pytest.mark.parametrize(
    "solver",
    [ic.FixedPointIteration(), ic.Anderson(), ic.Broyden(), ic.Broyden(memory=3), ic.NewtonKrylov()],
    ids=["iteration", "anderson", "broyden", "short broyden", "newton"],
)
def test_solvers_under_jit(case: Case, solver: ic.Solver) -> None:
    problem = problem_of(case)
    traced = jax.jit(lambda h0, z: ic.solve(problem, h0, z, solver=solver, trace=True))(arrays(case.h0), arrays(case.z))
    eager = ic.solve(case.problem(), case.h0, case.z, solver=solver, trace=True)
    assert int(traced.stats.evaluations) == eager.stats.evaluations
    for ours, theirs in zip(jax.tree.leaves(traced), jax.tree.leaves(tuple(eager)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("solver", [ic.GMRES(), ic.GMRES(restart=3), ic.BiCGSTAB(), ic.Richardson()])
def test_estimators_under_jit(solver: ic.LinearSolver) -> None:
    case = layer()
    problem, v = problem_of(case), np.ones_like(case.h0)
    h = case.oracle()
    for estimator in (ic.Implicit(solver, on_failure="nan"), ic.Neumann(6, 0.5), ic.Unroll(3, 0.5)):
        traced = jax.jit(lambda h, z, v, e=estimator: e.vjp(problem, h, z)[1](v))
        ours = traced(arrays(h), arrays(case.z), arrays(v))
        theirs = estimator.vjp(case.problem(), h, case.z)[1](v)
        for name in ("w", "x"):
            np.testing.assert_allclose(ours[name], theirs[name], atol=1e-9)
