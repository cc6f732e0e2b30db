"""Costs of a gradient in JAX: runs of F and of its derivatives, counted at run time, and memory."""

from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.custom_derivatives import SymbolicZero, linear_call
from jax.extend.core import jaxprs_in_params
from jax_layers import data

import implicit_core as ic
from implicit_core.adapters import jax as icj

RUNS: Counter[str] = Counter()


def counted(name: str, x: Any) -> Any:
    """``x``, with a count of each run; a pure callback, so that JAX and XLA drop it if the result is unused."""

    def count(x: Any) -> Any:
        RUNS[name] += 1
        return np.asarray(x)

    return jax.pure_callback(count, jax.ShapeDtypeStruct(x.shape, x.dtype), x, vmap_method="broadcast_all")


@jax.custom_jvp
def product(h: Any, w: Any) -> Any:
    return counted("F", h @ w.T)


def product_rule(primals: Any, tangents: Any) -> Any:
    """Tangents that are known to be zero cost nothing, as in JAX's own rules."""
    (h, w), (dh, dw) = primals, tangents
    result = product(h, w)
    total = jnp.zeros_like(result)
    if not isinstance(dh, SymbolicZero):
        total += linear_call(lambda w, dh: counted("h-JVP", dh @ w.T), lambda w, v: counted("h-VJP", v @ w), w, dh)
    if not isinstance(dw, SymbolicZero):
        total += linear_call(lambda h, dw: counted("z-JVP", h @ dw.T), lambda h, v: counted("z-VJP", v.T @ h), h, dw)
    return result, total


product.defjvp(product_rule, symbolic_zeros=True)


def run_gradient(estimator: ic.Estimator, forward: bool) -> tuple[Counter[str], int]:
    """The counts of one jitted gradient, or tangent, and the solve's evaluations of F."""
    w, x = data()
    solver = ic.Anderson(rtol=1e-10)

    def total(w: Any) -> Any:
        f = lambda h, w: jnp.tanh(product(h, w) + x)  # noqa: E731
        solution = icj.fixed_point(f, jnp.zeros_like(x), w, solver=solver, gradient=estimator, batch_ndim=1)
        return jnp.sum(solution.value**3), solution.stats.evaluations

    if forward:
        run = jax.jit(lambda w: jax.jvp(lambda w: total(w)[0], (w,), (w,))[1])
        evaluations = jax.jit(total)(w)[1]
    else:
        run = jax.jit(jax.grad(total, has_aux=True))
        evaluations = run(w)[1]
    jax.block_until_ready(run(w))
    RUNS.clear()
    jax.block_until_ready(run(w))
    return Counter(RUNS), int(evaluations)


@pytest.mark.parametrize(
    ("estimator", "f", "by_h", "by_z"),
    [
        (ic.OneStep(), 1, 0, 1),
        (ic.Neumann(1, 0.5), 1, 0, 1),
        (ic.Neumann(4, 0.5), 1, 3, 1),
        (ic.Neumann(12, 0.5), 1, 11, 1),
        (ic.Unroll(1, 0.5), 1, 0, 1),
        (ic.Unroll(4, 0.5), 4, 3, 4),
        (ic.Unroll(12, 0.5), 12, 11, 12),
        (ic.Unroll(4, 0.5, recompute=True), 8, 3, 4),
    ],
    ids=repr,
)
@pytest.mark.parametrize("forward", [False, True], ids=["pullback", "pushforward"])
def test_costs(estimator: Any, f: int, by_h: int, by_z: int, forward: bool) -> None:
    """Section "costs" of the contract, beyond the solve."""
    counts, evaluations = run_gradient(estimator, forward)
    kind = "JVP" if forward else "VJP"
    if forward and isinstance(estimator, ic.Unroll):
        f = estimator.k  # nothing to recompute
    assert counts["F"] - evaluations == f
    assert (counts[f"h-{kind}"], counts[f"z-{kind}"]) == (by_h, by_z)
    assert counts.total() == counts["F"] + by_h + by_z


@pytest.mark.parametrize("linear_solver", [ic.GMRES(rtol=1e-6), ic.BiCGSTAB(), ic.Richardson()], ids=repr)
def test_implicit_costs_the_products_of_its_linear_solver(linear_solver: ic.LinearSolver) -> None:
    """It makes as many h-VJPs as the same solve in NumPy."""
    counts, evaluations = run_gradient(ic.Implicit(linear_solver), forward=False)
    w, x = (np.asarray(a) for a in data())
    h = np.zeros_like(x)
    for _ in range(200):
        h = np.tanh(h @ w.T + x)
    linear = ic.solve_linear(lambda v: v - (v * (1 - h**2)) @ w, 3 * h**2, solver=linear_solver, batch_ndim=1)
    assert counts["F"] - evaluations == 1
    assert counts["z-VJP"] == 1
    assert counts["h-VJP"] == int(linear.stats.evaluations)
    assert counts["h-JVP"] == counts["z-JVP"] == 0


BATCH, WIDTH = 13, 17  # sizes of no other array
SMALL = ic.Implicit(ic.GMRES(restart=3))
ESTIMATORS = [ic.Neumann(4, 0.5), ic.Neumann(12, 0.5), ic.Unroll(4, 0.5), ic.Unroll(12, 0.5), ic.Implicit()]


def shapes(jaxpr: Any) -> set[tuple[int, ...]]:
    """Shapes of all values computed in a jaxpr, including loops and branches."""
    found = {v.aval.shape for eqn in jaxpr.eqns for v in eqn.outvars if hasattr(v.aval, "shape")}
    return found.union(*(shapes(inner) for eqn in jaxpr.eqns for inner in jaxprs_in_params(eqn.params)))


def gradient_of(estimator: ic.Estimator, mapped: bool) -> Any:
    def total(w: Any, x: Any) -> Any:
        def solve(x: Any) -> Any:
            f = lambda h, z: jnp.tanh(h @ z[0].T + z[1])  # noqa: E731
            return icj.fixed_point(f, jnp.zeros_like(x), (w, x), gradient=estimator, batch_ndim=x.ndim - 1).value

        return jnp.sum((jax.vmap(solve) if mapped else solve)(x) ** 3)

    return jax.grad(total)


def per_sample_parameters(found: set[tuple[int, ...]]) -> list[tuple[int, ...]]:
    return [s for s in found if BATCH in s and s.count(WIDTH) >= 2]


@pytest.mark.parametrize("mapped", [False, True], ids=["batch", "vmap"])
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_no_sample_has_a_copy_of_the_parameters(estimator: ic.Estimator, mapped: bool) -> None:
    w, x = jnp.zeros((WIDTH, WIDTH)), jnp.zeros((BATCH, WIDTH))
    found = shapes(jax.make_jaxpr(gradient_of(estimator, mapped))(w, x).jaxpr)
    assert {(BATCH, WIDTH), (WIDTH, WIDTH)} <= found
    assert per_sample_parameters(found) == []
    naive = jax.make_jaxpr(jax.vmap(jax.grad(lambda w, x: jnp.sum(jnp.tanh(x @ w.T))), (None, 0)))(w, x)
    assert per_sample_parameters(shapes(naive.jaxpr)), "the naive gradient has such copies"


@pytest.mark.parametrize("mapped", [False, True], ids=["batch", "vmap"])
@pytest.mark.parametrize("estimator", [ic.Neumann(12, 0.5), ic.Unroll(4, 0.5), SMALL], ids=repr)
def test_temporary_memory_is_far_below_a_copy_of_the_parameters_for_each_sample(
    estimator: ic.Estimator, mapped: bool
) -> None:
    batch, width = 128, 128
    w, x = jnp.zeros((width, width)), jnp.zeros((batch, width))
    compiled = jax.jit(gradient_of(estimator, mapped)).lower(w, x).compile()
    assert 0 < compiled.memory_analysis().temp_size_in_bytes < batch * w.nbytes / 4
