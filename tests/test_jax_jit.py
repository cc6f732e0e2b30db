"""JAX under ``jit``: the numbers of an eager NumPy run, F traced once or twice, and run as often as the stats say."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from libraries import JAX, flat, unflat
from problems import CASES, Case, affine, layer, pytree

import implicit_core as ic
from implicit_core.adapters import jax as icj
from implicit_core.adapters.jax.problem import compiled_once

BUDGET = {"max_steps": 40}
SOLVERS = [
    ic.FixedPointIteration(**BUDGET),
    ic.Anderson(**BUDGET),
    ic.Broyden(**BUDGET),
    ic.Broyden(memory=3, **BUDGET),
    ic.NewtonKrylov(**BUDGET),
]
NAMES = ["iteration", "anderson", "broyden", "short broyden", "newton"]
# F's callbacks as functions of their own, and as parts of `linearize`; only Newton's method asks for them.
RUNS = [(solver, Case.problem) for solver in SOLVERS] + [(SOLVERS[-1], Case.linearized)]
TIGHT = {"rtol": 1e-12, "max_steps": 400}


def watched(case: Case) -> tuple[Case, list[None]]:
    """The case, and a list that grows whenever F runs; its ``counts`` grow when F is traced."""
    runs: list[None] = []

    def f(xp: Any, h: Any, z: Any) -> Any:
        if xp is JAX.xp:
            jax.debug.callback(lambda: runs.append(None))
        return case.f(xp, h, z)

    return dataclasses.replace(case, f=f, counts={}), runs


def assert_equal_runs(ours: ic.Solution, theirs: ic.Solution) -> None:
    """Equal up to rounding errors, which a slope of .999 amplifies a thousandfold."""
    np.testing.assert_array_equal(ours.status, theirs.status)
    np.testing.assert_array_equal(ours.stats.steps, theirs.stats.steps)
    assert int(ours.stats.evaluations) == int(theirs.stats.evaluations)
    np.testing.assert_allclose(flat(JAX.numpy(ours.value)), flat(theirs.value), rtol=1e-7, atol=1e-6)
    np.testing.assert_allclose(ours.stats.residual, theirs.stats.residual, rtol=1e-7, atol=1e-7)
    np.testing.assert_allclose(ours.stats.trace, theirs.stats.trace, rtol=1e-7, atol=1e-7)


def both_runs(case: Case, solver: ic.Solver, make: Callable[..., ic.Problem]) -> tuple[ic.Solution, ic.Solution]:
    """Traced and eager, F counted when it is traced and when it runs."""
    watch, runs = watched(case)
    problem = make(watch, JAX)
    jitted = jax.jit(lambda h0, z: ic.solve(problem, h0, z, solver=solver, trace=True))
    ours = jitted(JAX.array(case.h0), JAX.array(case.z))
    jax.effects_barrier()
    assert len(runs) == int(ours.stats.evaluations)
    # At the start and in the loop's body; once more in the steps that fill no chunk.
    assert watch.counts["f"] == 2 + bool((solver.max_steps - 1) % solver.check_every)
    return ours, ic.solve(make(case), case.h0, case.z, solver=solver, trace=True)


# One that converges at once, too slowly or never, one that overflows; numbers, vectors, batches and a pytree.
DIFFERENT = ("diagonal", "cosine(0.00)", "pytree", "rotation", "heat", "constant", "layer")


@pytest.mark.parametrize(("solver", "make"), RUNS, ids=[*NAMES, "linearized newton"])
@pytest.mark.parametrize("case", [case for case in CASES if case.name in DIFFERENT], ids=lambda case: case.name)
def test_a_traced_solve_is_an_eager_one(case: Case, solver: ic.Solver, make: Any) -> None:
    assert_equal_runs(*both_runs(case, solver, make))


@pytest.mark.parametrize("check_every", [3, 20])
@pytest.mark.parametrize("solver", SOLVERS, ids=NAMES)
def test_chunks_of_steps(solver: ic.Solver, check_every: int) -> None:
    """A solve that converges within a chunk, and max_steps that is not a multiple of the chunk."""
    case, chunked = layer(), dataclasses.replace(solver, check_every=check_every)
    ours, theirs = both_runs(case, chunked, Case.problem)
    assert_equal_runs(ours, theirs)
    assert np.all(ours.status == ic.CONVERGED)
    assert int(ours.stats.evaluations) % check_every == 1
    exhausted = dataclasses.replace(chunked, rtol=0.0, atol=0.0, max_steps=6)
    ours, theirs = both_runs(case, exhausted, Case.problem)
    assert_equal_runs(ours, theirs)
    assert int(ours.stats.evaluations) == 6


def symmetric() -> Case:
    """Affine with a symmetric matrix, for conjugate gradients."""
    case = affine(20)
    m = 0.1 * (case.z["m"] + case.z["m"].T)
    return dataclasses.replace(case, name="symmetric", z={**case.z, "m": m}, root=None, counts={}, found={})


ESTIMATORS = [
    (ic.OneStep(), layer()),
    (ic.Neumann(k=1, lam=0.5), pytree()),
    (ic.Neumann(k=5, lam=0.5), layer()),
    (ic.Neumann(k=30, lam=0.7), affine(20)),
    (ic.Unroll(k=4, lam=0.5), layer()),
    (ic.Unroll(k=4, lam=0.5), pytree()),
    (ic.Unroll(k=12, lam=1.0), affine(20)),
    (ic.Unroll(k=4, lam=0.5, recompute=True), layer()),
    (ic.BPTT(k=3), layer()),
    (ic.BPTT(k=12), pytree()),
    (ic.Implicit(ic.GMRES(**TIGHT), on_failure="nan"), layer()),
    (ic.Implicit(ic.GMRES(restart=3, **TIGHT)), pytree()),
    (ic.Implicit(ic.BiCGSTAB(**TIGHT), on_failure="nan"), layer()),
    (ic.Implicit(ic.Richardson(**TIGHT), on_failure="nan"), affine(20)),
    (ic.Implicit(ic.CG(**TIGHT), on_failure="nan"), symmetric()),
]


@pytest.mark.parametrize("make", [Case.problem, Case.linearized])
@pytest.mark.parametrize(("estimator", "case"), ESTIMATORS, ids=[f"{c.name}-{e!r}" for e, c in ESTIMATORS])
def test_a_traced_estimator_is_an_eager_one(estimator: ic.Estimator, case: Case, make: Any) -> None:
    """From a point that is not the root, where only Unroll and BPTT return another value."""
    rng = np.random.default_rng(0)
    h = unflat(0.9 * flat(case.oracle()) + 0.01, case.h0)
    u, dz = (unflat(rng.normal(size=flat(like).size), like) for like in (case.h0, case.z))
    problem, reference = make(case, JAX), make(case)

    @jax.jit
    def traced(h: Any, z: Any, u: Any, dz: Any) -> Any:
        value, pullback = estimator.vjp(problem, h, z)
        return value, pullback(u), estimator.value(problem, h, z), estimator.jvp(problem, h, z, dz)

    ours = JAX.numpy(traced(*map(JAX.array, (h, case.z, u, dz))))
    value, pullback = estimator.vjp(reference, h, case.z)
    theirs = value, pullback(u), estimator.value(reference, h, case.z), estimator.jvp(reference, h, case.z, dz)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(flat(one), flat(other), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("on_failure", ["nan", "raise"])
def test_samples_whose_traced_linear_solve_fails_are_nan(on_failure: Any) -> None:
    """A traced solve cannot raise."""
    slope = jnp.asarray([[0.5], [1.0], [-0.5]])
    problem = ic.Problem(
        lambda h, z: slope * h + z,
        vjp=lambda h, z, v: (slope * v, v),
        jvp=lambda h, z, dh, dz: slope * dh + dz,
        batch_ndim=1,
    )
    expected = [[2.0, 2.0], [np.nan, np.nan], [2 / 3, 2 / 3]]
    zeros, ones = jnp.zeros((3, 2)), jnp.ones((3, 2))
    for linear_solver in (ic.GMRES(), ic.BiCGSTAB(), ic.CG(), ic.Richardson()):
        estimator = ic.Implicit(linear_solver, on_failure)
        pulled = jax.jit(lambda v, e=estimator: e.vjp(problem, zeros, zeros)[1](v))(ones)
        pushed = jax.jit(lambda dz, e=estimator: e.jvp(problem, zeros, zeros, dz)[1])(ones)
        np.testing.assert_allclose(pulled, expected, rtol=1e-5)
        np.testing.assert_allclose(pushed, expected, rtol=1e-5)


def picard(problem: ic.Problem, h0: Any, z: Any) -> Any:
    """A solver of the user's."""
    return jax.lax.fori_loop(0, 40, lambda _, h: problem(h, z), h0)


GRADIENTS = [
    ic.OneStep(),
    ic.Neumann(12, 0.5),
    ic.Unroll(12, 0.5),
    ic.Unroll(3, 0.5, recompute=True),
    ic.BPTT(12),
    ic.Implicit(),
]


@pytest.mark.parametrize(
    ("solver", "gradient"),
    [(solver, ic.Unroll()) for solver in [*SOLVERS, picard]] + [(ic.Anderson(), gradient) for gradient in GRADIENTS],
    ids=[*NAMES, "callable", *map(repr, GRADIENTS)],
)
@pytest.mark.parametrize("differentiate", [lambda f: f, jax.grad, jax.hessian], ids=["value", "gradient", "hessian"])
def test_a_layer_traces_f_once(solver: Any, gradient: ic.Estimator, differentiate: Any) -> None:
    """And once more for ``has_aux``, at the value."""
    traces = 0

    def f(h: Any, z: Any) -> Any:
        nonlocal traces
        traces += 1
        return jnp.tanh(0.5 * h + z)

    def loss(z: Any, has_aux: bool) -> Any:
        map_ = (lambda h, z: (f(h, z), h)) if has_aux else f
        value = icj.fixed_point(map_, jnp.zeros(2), z, solver=solver, gradient=gradient, has_aux=has_aux).value
        return jnp.sum(value**2)

    for has_aux, expected in ((False, 1), (True, 2)):
        traces = 0
        jax.make_jaxpr(differentiate(functools.partial(loss, has_aux=has_aux)))(jnp.ones(2))
        assert traces == expected


def test_equal_settings_do_not_retrace() -> None:
    """Solvers and estimators are static arguments by value, also if they are created in each call."""
    traces = 0

    @functools.partial(jax.jit, static_argnames=("solver", "gradient"))
    def run(z: Any, solver: ic.Solver, gradient: ic.Estimator) -> Any:
        nonlocal traces
        traces += 1
        f = lambda h, z: jnp.tanh(0.5 * h + z)  # noqa: E731
        return icj.fixed_point(f, jnp.zeros(2), z, solver=solver, gradient=gradient).value

    makers = [
        lambda: (ic.Anderson(memory=3), ic.Neumann(3, 0.5)),
        lambda: (ic.Anderson(memory=4), ic.Neumann(3, 0.5)),
        lambda: (ic.Anderson(memory=3), ic.Neumann(3, 0.6)),
        lambda: (ic.NewtonKrylov(linear_solver=ic.GMRES(rtol=1e-2)), ic.Implicit(ic.GMRES(rtol=1e-9))),
        lambda: (ic.NewtonKrylov(linear_solver=ic.GMRES(rtol=1e-2)), ic.Implicit(ic.GMRES(rtol=1e-8))),
        lambda: (ic.NewtonKrylov(linear_solver=ic.GMRES(rtol=1e-3)), ic.Implicit(ic.GMRES(rtol=1e-8))),
    ]
    for different, make in enumerate(makers, start=1):
        for _ in range(2):
            solver, gradient = make()
            run(jnp.ones(2), solver=solver, gradient=gradient)
        assert traces == different


@pytest.mark.parametrize(("one", "other"), [(0.0, -0.0), (1, True), (1, 1.0)], ids=repr)
def test_a_compiled_problem_tells_numbers_apart_that_are_equal(one: Any, other: Any) -> None:
    """Leaves of z that are not arrays are constants of the program."""

    def f(h: Any, z: Any) -> Any:
        return 0.5 * h + {"1": 1.0, "1.0": 2.0, "True": 3.0, "0.0": 4.0, "-0.0": 5.0}[repr(z["number"])] * z["x"]

    problem, x = icj.problem(compiled_once(f)), jnp.ones(2)
    for number in (one, other, one):
        np.testing.assert_array_equal(problem(x, {"number": number, "x": x}), f(x, {"number": number, "x": x}))


@pytest.mark.parametrize("solver", SOLVERS, ids=NAMES)
@pytest.mark.parametrize("gradient", [None, *GRADIENTS], ids=repr)
def test_an_eager_call_with_a_new_function_compiles_nothing(
    solver: ic.Solver, gradient: ic.Estimator | None, compilations: list[float]
) -> None:
    """With every solver and estimator."""

    def run() -> ic.Solution:
        if gradient is None:
            problem = icj.problem(lambda h, z: jnp.tanh(0.5 * h + z))
            return ic.solve(problem, jnp.zeros(2), jnp.ones(2), solver=solver)
        return ic.fixed_point(
            lambda h, z: jnp.tanh(0.5 * h + z), jnp.zeros(2), jnp.ones(2), solver=solver, gradient=gradient
        )

    first = run()
    compilations.clear()
    second = run()
    assert compilations == []
    np.testing.assert_array_equal(first.value, second.value)
    jax.jit(lambda x: x + 1.0)(jnp.ones(2))
    assert len(compilations) > 0, "compilations are to be seen here"


def test_constants_of_a_compiled_program_are_not_read() -> None:
    """The start, a right-hand side and the units are arrays from outside; what is computed from them is traced."""
    h0, b, scale = jnp.zeros((6, 3)), jnp.ones((6, 3)), jnp.asarray([1.0, 10.0, 100.0])
    slopes = jnp.linspace(0.1, 0.8, 6)[:, None]

    def f(h: Any, z: Any) -> Any:
        return slopes * jnp.sin(h) + z

    for solver in (ic.Anderson(), ic.Compacting(ic.Anderson(), batched=False), ic.NewtonKrylov()):
        eager = ic.fixed_point(
            f, h0, b, solver=solver if solver.runs_user_code is False else ic.Anderson(), batch_ndim=1
        )
        jitted = jax.jit(lambda z, solver=solver: ic.fixed_point(f, h0, z, solver=solver, batch_ndim=1, scale=scale))(b)
        np.testing.assert_allclose(jitted.value, eager.value, rtol=1e-4)
    for linear in (ic.GMRES(restart=2), ic.CG(), ic.BiCGSTAB(), ic.Richardson(relaxation=0.5)):
        solve = jax.jit(lambda a, linear=linear: ic.solve_linear(lambda v: a * v, b, solver=linear, batch_ndim=1).value)
        np.testing.assert_allclose(solve(1.0 + slopes), b / (1.0 + slopes), rtol=1e-4)


@pytest.mark.parametrize("solver", [ic.Anderson(), ic.FixedPointIteration(), ic.Broyden()], ids=repr)
def test_a_sample_for_which_atol_is_enough_needs_no_units(solver: ic.Solver) -> None:
    """Squares of 1e-14 leave the range of float32, but a residual of that size is far below atol."""
    z = jnp.asarray([[1.0, 1.0], [1e-14, 1e-14], [0.0, 0.0]], jnp.float32)

    def status(z: Any, solver: Any = solver) -> Any:
        return ic.solve(lambda h, z: 0.5 * jnp.tanh(h) + z, jnp.zeros_like(z), z, solver=solver, batch_ndim=1).status

    assert status(z).tolist() == jax.jit(status)(z).tolist() == [ic.CONVERGED] * 3
    exact = jax.jit(lambda z: status(z, dataclasses.replace(solver, atol=0.0)))
    assert exact(z).tolist() == [ic.CONVERGED, ic.NONFINITE, ic.CONVERGED]
