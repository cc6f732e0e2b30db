"""Roots of g(x, z) = 0: what is solved, what is told, and their derivatives, against closed forms."""

import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from libraries import JAX, NUMPY, TORCH, Library

import implicit_core as ic
import implicit_core.theory
from benchmarks.root_problems import TWENTY_THREE, RootProblem

UNITS = [1e-160, 1e-9, 1e-6, 1e-3, 1.0, 1e3, 1e6, 1e9, 1e160]
TIGHT = {"rtol": 1e-10}
SOLVERS = [
    ic.Polyalgorithm(**TIGHT),
    ic.Anderson(**TIGHT),
    ic.Broyden(**TIGHT),
    ic.Newton(**TIGHT),
    ic.NewtonKrylov(**TIGHT),
]
NAMES = [type(solver).__name__ for solver in SOLVERS]


def cubic(unit: float, batch_ndim: int = 0, **scales: Any) -> ic.RootProblem:
    """x³ + x = z in other units, whose slope is 3 x² + 1, with its derivatives."""
    return ic.RootProblem(
        lambda x, z: unit * (x**3 + x - z),
        vjp=lambda x, z, v: (unit * (3 * x**2 + 1) * v, -unit * v),
        jvp=lambda x, z, dx, dz: unit * ((3 * x**2 + 1) * dx - dz),
        batch_ndim=batch_ndim,
        **scales,
    )


Z = np.array([[2.0], [10.0], [-30.0]])
ROOT = np.array([[1.0], [2.0], [-3.0]])
SLOPE = 3 * ROOT**2 + 1


@pytest.mark.parametrize("unit", [*UNITS, *(-unit for unit in UNITS)])
@pytest.mark.parametrize("solver", SOLVERS, ids=NAMES)
def test_the_units_and_the_sign_of_g_do_not_matter(solver: Any, unit: float) -> None:
    solution = ic.solve(cubic(unit, 1), np.ones((3, 1)), Z, solver=solver)
    assert np.all(solution.status == ic.CONVERGED)
    np.testing.assert_allclose(solution.value, ROOT, rtol=1e-8)
    g = np.abs(unit * (solution.value**3 + solution.value - Z))[:, 0]
    np.testing.assert_allclose(solution.stats.residual, g, rtol=1e-6, atol=1e-14 * abs(unit))
    first = np.abs(unit * (2 - Z))[:, 0]
    assert np.all(g <= 1.01e-10 * first + 1e-300)


@pytest.mark.parametrize("solver", SOLVERS, ids=NAMES)
def test_a_large_state_hides_no_residual(solver: Any) -> None:
    """All |g| are at most 41, so that x - g(x) rounds to x where x is large: no root is found there."""
    k = np.arange(1, 11)

    def g(x: Any, z: Any) -> Any:
        return 10 - np.cos(x).sum() + k * (1 - np.cos(x)) - np.sin(x)

    def jvp(x: Any, z: Any, dx: Any, dz: Any) -> Any:
        return np.sum(np.sin(x) * dx) + (k * np.sin(x) - np.cos(x)) * dx

    for start in (0.1, 1e9, 1e18):
        solution = ic.solve(ic.RootProblem(g, jvp=jvp), np.full(10, start), None, solver=replace(solver, atol=1e-6))
        largest = np.linalg.norm(g(solution.value, None))
        assert (solution.status == ic.CONVERGED) == (largest <= solution.stats.tolerance)
        np.testing.assert_allclose(solution.stats.residual, largest, rtol=1e-6, atol=1e-12)


def test_a_start_at_the_root_costs_one_evaluation(library: Library) -> None:
    x = library.array(np.array([1.0, 2.0]))
    z = library.array(np.array([2.0, 10.0]))
    for solver in (ic.Anderson(), ic.Polyalgorithm(), ic.Polyalgorithm(atol=1e-6)):
        solution = ic.root(lambda x, z: x**3 + x - z, x, z, solver=solver)
        assert int(solution.status) == ic.CONVERGED
        assert solution.stats.evaluations == 1
    near = library.array(np.array([1.0, 2.0 + 1e-9]))
    solution = ic.root(lambda x, z: x**3 + x - z, near, z, solver=ic.Polyalgorithm(atol=1e-6))
    assert solution.stats.evaluations == 1


# Derivatives.


@pytest.mark.parametrize("unit", [1.0, -1e-6, 1e9])
@pytest.mark.parametrize(
    "gradient",
    [ic.Implicit(), ic.Neumann(k=150, lam=0.5), ic.Unroll(k=150, lam=0.5), ic.NeumannSeries(rtol=1e-10, lam=0.5)],
    ids=repr,
)
def test_estimators_of_a_root(gradient: ic.Estimator, unit: float) -> None:
    """dx/dz = 1 / (3 x² + 1), in both modes, and with the units of both given."""
    for problem in (cubic(unit, 1), cubic(unit, 1, g_scale=10 * abs(unit)), cubic(unit, 1, scale=3.0)):
        if problem.g_scale is not None:  # α is ± 1 then: smaller than it has to be
            gradient = replace(gradient, k=2000) if hasattr(gradient, "k") else gradient
        if isinstance(gradient, ic.NeumannSeries):
            gradient = replace(gradient, max_terms=3000)
        v = np.array([[1.0], [-2.0], [0.5]])
        value, pullback = gradient.vjp(problem, ROOT, Z)
        np.testing.assert_allclose(value, ROOT, rtol=1e-12)
        np.testing.assert_allclose(pullback(v), v / SLOPE, rtol=1e-6)
        np.testing.assert_allclose(gradient.jvp(problem, ROOT, Z, v)[1], v / SLOPE, rtol=1e-6)


def test_derivatives_in_torch() -> None:
    def root(z: Any, unit: float = 1.0, **options: Any) -> Any:
        return ic.root(
            lambda x, z: unit * (x**3 + x - z), torch.ones_like(z), z, solver=ic.Polyalgorithm(**TIGHT), **options
        ).value

    z = torch.tensor(Z[:, 0], requires_grad=True)
    slope = SLOPE[:, 0]
    for unit in (1.0, -1e-7):
        (first,) = torch.autograd.grad(root(z, unit).sum(), z, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), z)
        np.testing.assert_allclose(first.detach(), 1 / slope, rtol=1e-8)
        np.testing.assert_allclose(second, -6 * ROOT[:, 0] / slope**3, rtol=1e-7)
        for jacobian in (torch.func.jacrev, torch.func.jacfwd):
            found = jacobian(lambda z, unit=unit: root(z, unit))(z.detach())
            np.testing.assert_allclose(found, np.diag(1 / slope), rtol=1e-8, atol=1e-12)
        mapped = torch.vmap(torch.func.grad(lambda z, unit=unit: root(z, unit)))(z.detach())
        np.testing.assert_allclose(mapped, 1 / slope, rtol=1e-8)
    for gradient in (ic.Neumann(k=150, lam=0.5), ic.Unroll(k=150, lam=0.5)):
        value = root(z, -1e-7, gradient=gradient, batch_ndim=1)
        np.testing.assert_allclose(torch.autograd.grad(value.sum(), z)[0], 1 / slope, rtol=1e-6)
        found = torch.func.grad(lambda z, e=gradient: root(z, -1e-7, gradient=e, batch_ndim=1).sum())(z.detach())
        np.testing.assert_allclose(found, 1 / slope, rtol=1e-6)
    # A tensor that g closes over, and the graph of nothing else.
    weight = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    x = ic.root(lambda x, z: weight * x - z, torch.ones(1, dtype=torch.float64), 6.0).value
    np.testing.assert_allclose(torch.autograd.grad(x.sum(), weight)[0], -6 / 4, rtol=1e-6)


def test_derivatives_in_jax() -> None:
    def root(z: Any, unit: float = 1.0, **options: Any) -> Any:
        solver = ic.Newton(**TIGHT)
        return ic.root(lambda x, z: unit * (x**3 + x - z), jnp.ones_like(z), z, solver=solver, **options).value

    z, slope = jnp.asarray(Z[:, 0]), SLOPE[:, 0]
    for unit in (1.0, -1e-7):
        np.testing.assert_allclose(jax.jacrev(root)(z, unit), np.diag(1 / slope), rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(jax.jacfwd(root)(z), np.diag(1 / slope), rtol=1e-8, atol=1e-12)
    second = jnp.einsum("iii->i", jax.hessian(root)(z))
    np.testing.assert_allclose(second, -6 * ROOT[:, 0] / slope**3, rtol=1e-7)
    np.testing.assert_allclose(jax.jit(jax.vmap(jax.grad(root)))(z), 1 / slope, rtol=1e-8)
    for gradient in (ic.Neumann(k=150, lam=0.5), ic.Unroll(k=150, lam=0.5)):
        found = jax.grad(lambda z, e=gradient: root(z, -1e-7, gradient=e, batch_ndim=1).sum())(z)
        np.testing.assert_allclose(found, 1 / slope, rtol=1e-6)


@pytest.mark.parametrize("gradient", [ic.Unroll(k=3, lam=0.5), ic.BPTT(k=3)], ids=repr)
@pytest.mark.parametrize("library", [NUMPY, TORCH, JAX], ids=lambda library: library.name)
def test_the_residual_of_steps_is_that_of_g(library: Library, gradient: ic.Estimator) -> None:
    """Of h_{k-1}, in the units of g: 2 x = z with α = 1 / 2, whose first step finds the root."""
    for unit in (1.0, 1e-6):
        solution = ic.root(
            lambda x, z, unit=unit: unit * (2 * x - z),
            library.array(np.zeros(2)),
            library.array(np.array([4.0, 6.0])),
            gradient=gradient,
            solver=ic.FixedPointIteration(max_steps=1),
        )
        # Without callbacks NumPy has no derivatives, and α is 1.
        alpha = 0.5 / unit if library is not NUMPY else 1.0
        lam = getattr(gradient, "lam", 1.0)
        left = (1 - 2 * unit * alpha * lam) ** 2
        np.testing.assert_allclose(solution.stats.residual, unit * 52**0.5 * abs(left), atol=1e-12 * unit)


# What else takes a problem.


@pytest.mark.parametrize("solver", [*SOLVERS[1:], ic.FixedPointIteration(damping=0.05, max_steps=500, rtol=1e-6)])
def test_a_root_one_step_at_a_time(solver: ic.Solver) -> None:
    problem, x0 = cubic(1.0, 1), np.ones((3, 1))
    wanted = ic.solve(problem, x0, Z, solver=solver)
    stepper = ic.Stepper(problem, solver=solver)
    state = stepper.init(x0, Z)
    while not state.finished.all():
        state = stepper.step(state, Z)
    np.testing.assert_array_equal(state.converged, wanted.converged)
    np.testing.assert_allclose(state.value, wanted.value, rtol=1e-8)
    np.testing.assert_array_equal(state.steps, wanted.stats.steps)


def test_theory_speaks_of_the_map_that_estimators_differentiate() -> None:
    """One unknown: α ∂g/∂x = 1, so that F is constant at the root, and OneStep exact."""
    for problem in (cubic(-1e-3, 1), cubic(7.0, 1)):
        assert np.all(ic.theory.contraction(problem, ROOT, Z) < 1e-12)
        assert ic.theory.certify(problem, ROOT, Z, ic.OneStep(), cotangent=ROOT).cosine == pytest.approx(1.0)
    assert np.all(ic.theory.contraction(cubic(1.0, 1, g_scale=56.0), ROOT, Z) == pytest.approx(1 - SLOPE[:, 0] / 56))


def test_borrowed_derivatives_of_a_root() -> None:
    from implicit_core.adapters import torch as ict
    from implicit_core.dlpack import borrow_derivatives

    g = ict.problem(lambda x, z: x**3 + x - z, batch_ndim=1)
    problem = borrow_derivatives(ic.RootProblem.of(g, 2.0), "torch")
    solution = ic.solve(problem, np.ones((3, 1)), Z, solver=ic.Newton(**TIGHT))
    np.testing.assert_allclose(solution.value, ROOT, rtol=1e-8)
    np.testing.assert_allclose(ic.Implicit().vjp(problem, ROOT, Z)[1](np.ones((3, 1))), 1 / SLOPE, rtol=1e-6)


# What users bring.


def test_a_solver_of_the_users_own_sees_g() -> None:
    calls = []

    def bisection(problem: Any, x0: Any, z: Any) -> Any:
        low, high = x0 - 2.0, x0 + 2.0
        for _ in range(60):
            middle = (low + high) / 2
            calls.append(problem(middle, z))
            below = calls[-1] < 0
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        return middle

    solution = ic.root(lambda x, z: 1e-9 * (x**2 - z), np.array([1.0]), np.array([2.0]), solver=bisection)
    assert solution.status == ic.CONVERGED
    np.testing.assert_allclose(solution.value, 2**0.5)
    assert solution.stats.evaluations == len(calls) + 2
    assert ic.root(lambda x, z: 1e-9 * (x**2 + z), np.ones(1), np.ones(1), solver=bisection).status == ic.STAGNATED
    exactly = ic.CallableSolver(lambda problem, x0, z: z + 0.0, rtol=0.0)
    assert ic.root(lambda x, z: x - z, np.zeros(1), np.ones(1), solver=exactly).status == ic.CONVERGED
    assert ic.root(lambda x, z: x - 2 * z, np.zeros(1), np.ones(1), solver=exactly).status == ic.STAGNATED


def test_numbers_pytrees_and_auxiliary_results() -> None:
    assert ic.root(lambda x, z: x**2 - z, 1.0, 2.0).value == pytest.approx(2**0.5)

    def g(x: Any, z: Any) -> Any:
        return {"a": x["a"] + x["b"].sum() - z, "b": x["b"] * 2 - x["a"]}, x["a"] + 1

    x0 = {"a": jnp.zeros(()), "b": jnp.zeros(2)}
    solution = ic.root(g, x0, 4.0, has_aux=True)
    np.testing.assert_allclose(solution.value["a"], 2.0, rtol=1e-5)
    np.testing.assert_allclose(solution.value["b"], [1.0, 1.0], rtol=1e-5)
    np.testing.assert_allclose(solution.aux, 3.0, rtol=1e-5)


def test_units_of_the_parts_of_a_root(library: Library) -> None:
    """Two parts of sizes 1e3 and 1e-6 in equations of sizes 1e6 and 1e-9: each is accurate."""

    def g(x: Any, z: Any) -> Any:
        hot, thin = x
        return [1e3 * (hot - 1e3) + 1e9 * thin, 1e-3 * thin * hot / 1e3 - 1e-9]

    x0 = [library.array(np.array([500.0])), library.array(np.array([1e-7]))]
    z = library.array(np.zeros(1))
    solution = ic.root(g, x0, z, scale=[1e3, 1e-6], g_scale=[1e6, 1e-9], solver=ic.Polyalgorithm(rtol=1e-9))
    assert int(solution.status) == ic.CONVERGED
    hot, thin = (library.numpy(x).item() for x in solution.value)
    assert 1e3 * (hot - 1e3) + 1e9 * thin == pytest.approx(0.0, abs=1e-3)
    assert thin * hot == pytest.approx(1e-3, rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"g_scale": 0.0}, "g_scale must"),
        ({"solver": ic.Polyalgorithm}, "solver must be a Solver"),
        ({"batch_ndim": -1}, "batch_ndim must be at least 0"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        ic.root(lambda x, z: x - z, np.zeros(2), np.ones(2), **arguments)


def written(x: Any, z: Any) -> Any:
    x *= 0.5
    return x


COUPLING = {"batch_ndim": 1, "solver": ic.Broyden(max_steps=30)}
MISTAKES: dict[str, tuple[Callable[[Any, Any], Any], dict[str, Any]]] = {
    "x0 must hold real floating-point arrays": (lambda x, z: x, {"x0": np.array([1, 2])}),
    r"solve for the real.*to_real\(x0\)": (lambda x, z: x, {"x0": np.array([1j])}),
    "x0 must (be an array|hold arrays)": (lambda x, z: x, {"x0": "no array"}),
    r"x0 has a leaf of shape \(2,\), too few axes": (lambda x, z: x, {"batch_ndim": 2}),
    r"x0 must not hold masked arrays.*x0\.filled": (lambda x, z: x, {"x0": np.ma.masked_array([1.0, 2.0], [0, 1])}),
    r"the result of g must have the shape of x0?, \(2,\), got \(1,\)": (lambda x, z: x[:1], {}),
    "the result of g must have the dtype of x0?": (lambda x, z: x > 0, {}),
    "the result of g must have the structure of x0?": (lambda x, z: {"a": x}, {}),
    "g wrote to its argument x.*`0.5 . x`, not `x": (written, {"library": NUMPY}),
    r"with has_aux=True g must return a pair \(x, aux\)": (lambda x, z: x, {"has_aux": True}),
    "g must be callable, got 3": (3, {}),
    r"a plain g, which returns \(x, aux\)": (ic.RootProblem(lambda x, z: x), {"has_aux": True}),
    "g_scale must be a number, or have the structure": (lambda x, z: x, {"g_scale": {"a": 1.0}}),
    r"a callable \(problem, x0, z\) -> x;": (lambda x, z: x, {"solver": 3}),
    "the result of the solver must have the shape of x0": (lambda x, z: x, {"solver": lambda problem, x0, z: x0[:1]}),
    "needs the JVP of g, .*pass jvp= to RootProblem": (lambda x, z: x, {"solver": ic.Newton(), "library": NUMPY}),
    "^g couples what batch_ndim takes": (lambda x, z: x - z + x.sum(), {**COUPLING, "library": NUMPY}),
    "STAGNATED: the equation has no solution there": (lambda x, z: x * x + 1, {}),
    "DIVERGED: start closer": (lambda x, z: -x, {"solver": ic.FixedPointIteration(max_steps=300)}),
    "NONFINITE: look for NaN or overflow in the function": (lambda x, z: x * float("nan"), {}),
    "UNBRACKETED: g has the same sign at lower and at upper": (
        lambda x, z: x * x + 1,
        {"solver": ic.Brent(0.0, 1.0), "batch_ndim": 1},
    ),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_errors_are_in_the_words_of_a_root(message: str) -> None:
    """None speaks of f, of h or h0, or of a fixed point."""
    g, arguments = MISTAKES[message]
    for library in [only] if (only := arguments.get("library")) else [NUMPY, TORCH, JAX]:
        options = {name: value for name, value in arguments.items() if name not in ("x0", "library")}
        x0 = arguments.get("x0", np.array([1.0, 2.0]))
        x0 = x0 if isinstance(x0, np.ma.MaskedArray) else library.array(x0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            with pytest.raises(Exception, match=message) as raised:
                ic.root(g, x0, library.array(np.array([1.0, 2.0])), throw=True, **options)
        said = re.sub(r"as_real\(f\)|whose f returns|PyTreeSpec", "", str(raised.value))
        assert not re.search(r"\b(f|F|h|h0|fixed point)\b", said), said


def test_a_solve_of_a_root_that_begins_with_numbers() -> None:
    with pytest.raises(np.linalg.LinAlgError) as raised:
        ic.root(lambda x, z: np.linalg.inv(x), 1.0, None)
    assert raised.value.__notes__[0].startswith("g was called with the Python numbers of x0")


# Where Newton's line search fails.


def test_a_dense_system_goes_on_by_levenberg_and_marquardt(library: Library) -> None:
    """Freudenstein and Roth: from the first two starts no fraction of a step is short enough; the third is easy."""
    starts = np.array([[50.0, -200.0], [5.0, -20.0], [4.0, 3.0]])
    xp = library.xp

    def g(x: Any, z: Any) -> Any:
        a, b = x[:, 0], x[:, 1]
        return xp.stack([a - b**3 + 5 * b**2 - 2 * b - 13, a + b**3 + b**2 - 14 * b - 29], axis=1)

    def of_g(x: Any, z: Any) -> Any:
        b, one = x[:, 1], xp.ones_like(x[:, 0])
        rows = [[one, -3 * b**2 + 10 * b - 2], [one, 3 * b**2 + 2 * b - 14]]
        return xp.stack([xp.stack(row, axis=1) for row in rows], axis=1)

    problem = ic.RootProblem(g, jacobian=of_g, batch_ndim=1)
    solver = ic.Newton(rtol=1e-11, max_steps=150)
    solutions = [ic.solve(problem, library.array(starts), None, solver=solver)]
    if library is JAX:
        solutions.append(jax.jit(lambda x: ic.solve(problem, x, None, solver=solver))(library.array(starts)))
    for solution in solutions:
        assert np.all(library.numpy(solution.status) == ic.CONVERGED)
        np.testing.assert_allclose(library.numpy(solution.value), np.tile([5.0, 4.0], (3, 1)), rtol=1e-8)
        steps = library.numpy(solution.stats.steps)
        assert np.all(steps[:2] > 20)
        assert steps[2] < 10
    alone = ic.solve(problem, library.array(starts[1:2]), None, solver=solver)
    np.testing.assert_array_equal(library.numpy(alone.stats.steps), steps[1:2])


# The polyalgorithm.


def test_samples_end_with_the_solver_that_solves_them(library: Library) -> None:
    """Roots that the first solver finds, one that takes Newton's method, and none at all, in one batch."""
    calls = []

    def g(x: Any, z: Any) -> Any:
        calls.append(1)
        xp = library.xp
        a, b = x[:, :1], x[:, 1:]
        easy = xp.concat([a - 1, b - 2], axis=1)
        hard = xp.concat([a - b**3 + 5 * b**2 - 2 * b - 13, a + b**3 + b**2 - 14 * b - 29], axis=1)
        none = xp.concat([a**2 + 1, b], axis=1)
        return xp.where(z == 0, easy, xp.where(z == 1, hard, none))

    z = library.array(np.array([[0.0], [1.0], [2.0]]))
    x0 = library.array(np.array([[0.5, -2.0]] * 3))
    solution = ic.root(g, x0, z, batch_ndim=1, solver=ic.Polyalgorithm(rtol=1e-8), trace=True)
    status, used = library.numpy(solution.status), library.numpy(solution.stats.solver)
    assert status[0] == ic.CONVERGED
    assert status[2] != ic.CONVERGED
    assert used[0] == 0
    assert used[2] == (2 if library.name in ("numpy", "numpy-readonly", "array_api_strict") else 3)
    np.testing.assert_allclose(library.numpy(solution.value)[0], [1.0, 2.0], rtol=1e-6)
    residual, trace = library.numpy(solution.stats.residual), library.numpy(solution.stats.trace)
    np.testing.assert_allclose(np.nanmin(trace, axis=0), residual)
    assert library.numpy(solution.stats.steps).max() <= solution.stats.evaluations
    if library is TORCH:
        assert status[1] == ic.CONVERGED
        np.testing.assert_allclose(library.numpy(solution.value)[1], [5.0, 4.0], rtol=1e-5)
    if used[2] == 1:  # no derivatives, which call g too
        assert len(calls) == solution.stats.evaluations


def test_a_polyalgorithm_of_other_solvers() -> None:
    chosen = ic.Polyalgorithm(solvers=(ic.FixedPointIteration(max_steps=5), ic.Newton()), rtol=1e-10)
    solution = ic.solve(cubic(1.0), np.array([1.5]), np.array([10.0]), solver=chosen)
    assert solution.status == ic.CONVERGED
    assert solution.stats.solver == 1
    # It solves fixed points, too.
    solution = ic.solve(lambda h, z: 3 * np.cos(h) + z, np.ones(2), np.zeros(2), solver=ic.Polyalgorithm(rtol=1e-9))
    np.testing.assert_allclose(solution.value, 3 * np.cos(solution.value), atol=1e-7)
    with pytest.raises(ValueError, match="at least one solver"):
        ic.Polyalgorithm(solvers=())
    with pytest.raises(ValueError, match="needs a tolerance"):
        ic.Polyalgorithm(rtol=0.0)
    with pytest.raises(TypeError, match="each of solvers"):
        ic.Polyalgorithm(solvers=("newton",))  # type: ignore[arg-type]  # what the test is about


def test_a_jitted_root_is_the_eager_one() -> None:
    def root(x0: Any) -> ic.Solution[Any]:
        return ic.root(lambda x, z: x**3 - 2 * x + 2, x0, None, batch_ndim=1)

    x0 = jnp.asarray([[0.5], [-2.0], [3.0]])
    eager, traced = root(x0), jax.jit(root)(x0)
    np.testing.assert_allclose(eager.value, traced.value, rtol=1e-6)
    np.testing.assert_array_equal(eager.status, traced.status)
    np.testing.assert_array_equal(eager.stats.solver, traced.stats.solver)
    np.testing.assert_allclose(eager.value, -1.7692923542, rtol=1e-5)


@given(st.integers(2, 40))
def test_patience_ends_what_is_not_halved(patience: int) -> None:
    """Each step leaves 0.99 of the residual, which is halved after 69 steps."""
    solver = ic.FixedPointIteration(damping=0.01, rtol=1e-12, max_steps=500, patience=patience)
    solution = ic.solve(lambda h, z: 0 * h + z, np.zeros(1), np.ones(1), solver=solver)
    assert solution.status == ic.STAGNATED
    assert solution.stats.evaluations == 1 + patience
    patient = ic.solve(lambda h, z: 0 * h + z, np.zeros(1), np.ones(1), solver=replace(solver, patience=70))
    assert patient.stats.evaluations == 500


# The 23 problems.


def solved(problem: RootProblem, solver: Any) -> bool:
    """Whether a solver finds a root; what it calls one is one, in float64."""
    push = jax.jit(lambda x, dx: jax.jvp(lambda x: problem.function(jnp, x), (x,), (dx,))[1])
    stated = ic.RootProblem(
        lambda x, z: problem.function(np, x), jvp=lambda x, z, dx, dz: np.asarray(push(np.array(x), np.array(dx)))
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        solution = ic.solve(stated, problem.start, None, solver=solver)
        largest = problem.largest(solution.value)
    assert largest <= 1e-4 or solution.status != ic.CONVERGED, (problem.name, solver)
    return largest <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("solver", "least"),
    [
        (ic.Polyalgorithm(rtol=0.0, atol=1e-4), 23),
        (ic.Newton(rtol=0.0, atol=1e-4, max_steps=300), 23),
        (ic.Anderson(rtol=0.0, atol=1e-4, max_steps=300), 21),
        (ic.Broyden(rtol=0.0, atol=1e-4, max_steps=300), 21),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, int) else "",
)
def test_the_23_problems(solver: Any, least: int) -> None:
    failed = [problem.name for problem in TWENTY_THREE if not solved(problem, solver)]
    assert len(failed) <= 23 - least, failed


@pytest.mark.parametrize("linear_solver", [ic.GMRES(), ic.CG(), ic.MINRES(), ic.Richardson(relaxation=0.5)], ids=repr)
def test_a_newton_step_pays_for_no_residual_of_its_linear_system(linear_solver: ic.LinearSolver) -> None:
    """One product solves 2 x = z. Only Richardson's iteration needs the residual for its next step."""
    products = 0

    def jvp(x: Any, z: Any, dx: Any, dz: Any) -> Any:
        nonlocal products
        products += 1
        return 2 * dx - dz

    problem = ic.RootProblem(lambda x, z: 2 * x - z, jvp=jvp)
    solver = ic.NewtonKrylov(linear_solver=linear_solver, rtol=1e-10)
    solution = ic.solve(problem, np.zeros(3), np.arange(3.0), solver=solver)
    np.testing.assert_allclose(solution.value, np.arange(3.0) / 2, rtol=1e-12)
    assert (int(solution.stats.evaluations), products) == (2, 1)


# Where rounding is all that is left of g.


@pytest.mark.parametrize("solver", [ic.Polyalgorithm(), ic.Newton(rtol=1e-6), ic.NewtonKrylov(rtol=1e-6)], ids=repr)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_start_at_the_root_is_found_out(dtype: Any, solver: Any) -> None:
    """No residual can fall to a fraction of one that is a rounding error."""
    z = jnp.arange(2, 12, dtype=dtype)[:, None]
    for run in (lambda f: f, jax.jit):
        solution = run(lambda z: ic.root(lambda x, z: x**2 - z, jnp.sqrt(z), z, solver=solver, batch_ndim=1))(z)
        assert bool(jnp.all(solution.converged))
        if not isinstance(solver, ic.Polyalgorithm):  # which begins with Anderson, and has no products there
            assert int(solution.stats.evaluations) == 2
        np.testing.assert_allclose(solution.value, jnp.sqrt(z), rtol=4 * float(jnp.finfo(dtype).eps))


def test_a_start_that_is_no_root_is_not_taken_for_one() -> None:
    """|g| has a minimum at the start, or nowhere a zero."""
    for g in (lambda x, z: 10 - jnp.cos(x), lambda x, z: 2 + jnp.tanh((x - 1) ** 2), lambda x, z: jnp.exp(-(x**2)) + 1):
        for start in (0.0, 1.0, 1e9):
            solution = ic.root(g, jnp.full(1, start), None)
            assert not solution.converged


@pytest.mark.parametrize("solver", [ic.Polyalgorithm(), ic.Newton(), ic.NewtonKrylov(), ic.Broyden()], ids=repr)
def test_products_that_are_not_finite_explain_nothing(solver: Any) -> None:
    """The Jacobian at the start is infinite, or NaN, so that no step is made."""

    def by_root(x: Any, z: Any) -> Any:
        return z - jnp.sqrt(jnp.abs(x)) - 0.3 * x[::-1]

    def by_norm(x: Any, z: Any) -> Any:
        return jnp.linalg.norm(x) * x + x - z

    for g, start in ((by_root, jnp.zeros(4)), (by_norm, jnp.zeros(4)), (by_norm, 1e-200 * jnp.ones(4))):
        solution = ic.root(g, start, jnp.asarray([1.3, 0.6, 1.2, 0.9]), solver=solver)
        assert not solution.converged or solution.stats.residual < 1e-4


@pytest.mark.parametrize("solver", [ic.Newton, ic.NewtonKrylov, ic.Broyden])
def test_a_residual_that_still_falls_is_not_taken_for_rounding(solver: Any) -> None:
    """The first unknown is large, so that its rounding errors could explain the second equation, but it is exact."""

    def g(x: Any, z: Any) -> Any:
        return jnp.stack([x[0] - 1e9, jnp.exp(x[1]) - 2 + (x[0] - 1e9)])

    solution = ic.root(g, jnp.asarray([1e9, 0.6928]), None, solver=solver(rtol=1e-10))
    assert solution.converged
    assert abs(float(solution.value[1]) - np.log(2)) < 1e-10


@pytest.mark.parametrize("solver", [ic.Polyalgorithm(), ic.Newton(rtol=1e-6), ic.Broyden(rtol=1e-6)], ids=repr)
def test_rounding_is_found_out_beside_a_component_that_is_exact(solver: Any) -> None:
    """Large terms cancel in the first equation, and the second says that an unknown is zero."""
    z = jnp.asarray([2.0, 0.0], jnp.float32)

    def g(x: Any, z: Any) -> Any:
        return jnp.stack([100 * jnp.exp(x[0]) - 100 * jnp.exp(z[0]) + (x[0] - z[0]), x[1] - z[1]])

    solution = ic.root(g, jnp.asarray([1.9999, 1e-3], jnp.float32), z, solver=solver)
    assert solution.converged
    assert solution.stats.residual <= solution.stats.tolerance
    np.testing.assert_allclose(solution.value[0], 2.0, rtol=1e-6)


# A way back.


def ces(seed: int) -> tuple[Callable[[Any, Any], Any], np.ndarray]:
    """Prices of a CES economy, which have to be positive, and plain iteration keeps so."""
    rng = np.random.default_rng(seed)
    shares, costs = rng.random((6, 6)), rng.uniform(0.5, 1.5, 6)
    shares /= 2 * shares.sum(1, keepdims=True)
    return lambda p, z: (shares @ p**-3.0 + 0.5 * costs**-3.0) ** (-1 / 3), np.full(6, 0.2)


@given(st.integers(0, 10**6), st.sampled_from([ic.Anderson(), ic.Broyden()]))
def test_acceleration_succeeds_where_plain_iteration_does(seed: int, solver: Any) -> None:
    """Zero is a fixed point as well, and acceleration may end up there, in one case of 100 or so."""
    f, h0 = ces(seed)
    wanted = ic.solve(f, h0, None, solver=ic.FixedPointIteration(rtol=1e-12, max_steps=2000))
    assert wanted.status == ic.CONVERGED
    solution = ic.solve(f, h0, None, solver=replace(solver, atol=0.0, max_steps=400))
    if np.max(solution.value) < 1e-9:
        assert solution.status != ic.CONVERGED  # since no residual is small beside zero
    else:
        assert solution.status == ic.CONVERGED
        np.testing.assert_allclose(solution.value, wanted.value, rtol=1e-3)


def test_broyden_goes_on_after_a_singular_update(library: Library) -> None:
    """A skew map: the first update divides by zero."""
    skew = library.array(np.array([[0.0, 1.0], [-1.0, 0.0]]))
    z = library.array(np.array([1.0, 2.0]))
    solution = ic.solve(lambda h, z: h + skew @ h + z, 0 * z, z, solver=ic.Broyden())
    assert int(solution.status) == ic.CONVERGED
    np.testing.assert_allclose(library.numpy(solution.value), [2.0, -1.0], atol=1e-4)


@pytest.mark.parametrize("library", [NUMPY, TORCH], ids=lambda library: library.name)
def test_memory_grows_with_the_steps(library: Library) -> None:
    """All steps are held, so that the result is that of a memory for all of them."""
    rng = np.random.default_rng(0)
    weight, x = library.array(rng.normal(size=(40, 40)) / 5), library.array(rng.normal(size=(4, 40)))
    broyden = ic.Broyden(rtol=1e-12, max_steps=200)
    solutions = [
        ic.solve(lambda h, z: library.xp.tanh(h @ weight + z), 0 * x, x, solver=solver, batch_ndim=1)
        for solver in (broyden, replace(broyden, memory=200))
    ]
    assert 33 < solutions[0].stats.evaluations == solutions[1].stats.evaluations
    np.testing.assert_allclose(*(library.numpy(s.value) for s in solutions), rtol=1e-9, atol=1e-12)


def test_the_default_gradient_is_exact_for_stiff_roots() -> None:
    """A step of a diffusion: the adjoint system needs more than the linear solver of ``Implicit()`` by itself makes."""
    n, dt = 32, 1.0
    weights = np.random.default_rng(0).normal(size=(n, n))
    line = (n + 1) ** 2 * (jnp.eye(n, k=1) + jnp.eye(n, k=-1) - 2 * jnp.eye(n))

    def step(u: Any, source: Any) -> Any:
        return u - dt * (line @ u + u @ line + source * jnp.exp(u))

    def total(source: Any, **options: Any) -> Any:
        u = ic.root(step, jnp.zeros((n, n)), source, solver=ic.NewtonKrylov(rtol=1e-9), **options).value
        return (weights * u).sum()

    source = jnp.asarray(6.0)
    u = ic.root(step, jnp.zeros((n, n)), source, solver=ic.NewtonKrylov(rtol=1e-9)).value
    matrix = np.asarray(jax.jacobian(step)(u, source)).reshape(n * n, n * n)
    exact = weights.reshape(-1) @ np.linalg.solve(matrix, dt * np.exp(np.asarray(u)).reshape(-1))
    np.testing.assert_allclose(jax.grad(total)(source), exact, rtol=1e-4)
    assert np.isnan(jax.grad(lambda source: total(source, gradient=ic.Implicit()))(source))
