"""Roots between two points where g has different signs, a bracket for each sample: against SciPy, and statuses."""

import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from libraries import JAX, NUMPY, TORCH, Library
from scalar_problems import STANDARD

import implicit_core as ic
from implicit_core.solvers.bracketing import SLACK

SOLVERS = [ic.Bisection, ic.Brent]
Z = np.array([2.0, 10.0, -30.0])
ROOT = np.array([1.0, 2.0, -3.0])
SLOPE = 3 * ROOT**2 + 1
LOWER, UPPER = np.array([-5.0, -6.0, -7.0]), np.array([5.0, 6.0, 7.0])


def cubic(x: Any, z: Any) -> Any:
    return x**3 + x - z


@pytest.fixture(autouse=True)
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ic.ConvergenceWarning)
        yield


def all_standard(solver: type, **options: Any) -> ic.Solution[Any]:
    """All standard problems as one batch, from their lower ends, with their own brackets."""
    lower, upper = (np.array([getattr(p, end) for p in STANDARD]) for end in ("lower", "upper"))

    def g(x: np.ndarray, z: None) -> np.ndarray:
        with np.errstate(all="raise"):  # no point outside of a bracket is looked at
            return np.array([p.function(float(a)) for p, a in zip(STANDARD, x, strict=True)])

    return ic.root(g, lower, None, solver=solver(lower, upper, max_steps=2000, **options), batch_ndim=1)


# Against SciPy.


def test_the_standard_problems_to_the_last_float() -> None:
    """Each root is next to a float where g has the other sign, or one itself. SciPy needs as many evaluations."""
    solution = all_standard(ic.Brent, rtol=0.0)
    assert np.all(solution.status == ic.CONVERGED)
    counts = []
    for problem, x in zip(STANDARD, solution.value, strict=True):
        f, (a, b) = problem.function, (problem.lower, problem.upper)
        theirs, found = scipy.optimize.brentq(f, a, b, xtol=1e-300, rtol=8.9e-16, maxiter=1000, full_output=True)
        counts.append(found.function_calls)
        g = f(x)
        beside = [f(np.nextafter(x, side)) for side in (-math.inf, math.inf)]
        assert g == 0 or any(h * g <= 0 and abs(h) >= abs(g) for h in beside), problem.name
        # Problems 3, 4 and 13 may be zero, by underflow, far from the root.
        assert x == pytest.approx(theirs, rel=1e-12, abs=1e-12) or f(theirs) == 0 == g, problem.name
    assert solution.stats.steps.sum() <= 1.15 * sum(counts)
    assert solution.stats.steps.max() <= 1.1 * max(counts)


def test_the_standard_problems_by_bisection() -> None:
    solution = all_standard(ic.Bisection, rtol=1e-10)
    assert np.all(solution.status == ic.CONVERGED)
    by_brent = all_standard(ic.Brent, rtol=1e-10)
    assert np.all(by_brent.status == ic.CONVERGED)
    assert np.all(by_brent.stats.steps <= solution.stats.steps + SLACK)
    assert 2 * by_brent.stats.steps.sum() < solution.stats.steps.sum()
    for problem, x, tolerance in zip(STANDARD, solution.value, solution.stats.tolerance, strict=True):
        assert abs(problem.function(x)) <= tolerance


class Watched:
    """g, which remembers where it was evaluated, and the bracket after each evaluation."""

    def __init__(self, g: Any, lower: float, upper: float) -> None:
        self.g, self.ends, self.widths, self.calls = g, [lower, upper], list[float](), 0

    def __call__(self, x: Any, z: Any) -> Any:
        self.calls += 1
        value = self.g(float(x))
        if self.calls > 3:
            assert min(self.ends) <= x <= max(self.ends)
        if min(self.ends) < x < max(self.ends):
            left, right = sorted(self.ends)
            self.ends = [left, float(x)] if np.sign(self.g(left)) != np.sign(value) else [float(x), right]
        if self.calls >= 3:
            self.widths.append(abs(self.ends[1] - self.ends[0]))
        return np.asarray(value)


@settings(max_examples=40)
@given(
    st.one_of(st.floats(-10, 10), st.floats(-1e-3, 1e-3)),
    st.floats(0, 5),
    st.floats(-2, 2),
    st.floats(1e-3, 100),
    st.floats(1e-3, 100),
    st.floats(0, 1),
    st.sampled_from(SOLVERS),
)
def test_a_monotone_cubic(
    root: float, cube: float, log_slope: float, left: float, right: float, share: float, solver: Any
) -> None:
    """Its root is found in any bracket, which always holds it, and is as narrow as bisection's a few steps later."""
    slope = 10**log_slope
    lower, upper = root - left, root + right
    g = Watched(lambda x: (x - root) * (cube * (x - root) ** 2 + slope), lower, upper)
    x0 = np.asarray(lower + share * (upper - lower))
    solution = ic.root(g, x0, None, solver=solver(lower, upper, rtol=0.0, max_steps=1200))  # a root may be zero
    assert solution.status == ic.CONVERGED
    assert float(solution.value) == pytest.approx(root, rel=1e-15, abs=1e-15 * max(left, right))
    late = SLACK if solver is ic.Brent else 0  # and among the least numbers, below 3e-308, halves are rounded
    for k, width in enumerate(g.widths):
        assert width <= 1.01 * (left + right) * 2.0 ** (late - k) + 4e-16 * abs(root) + 3e-308


# Frameworks and dtypes.


@pytest.mark.parametrize("solver", SOLVERS)
def test_brackets_of_samples(library: Library, solver: Any) -> None:
    """Ends are numbers, arrays of the framework or of NumPy, in any order, and broadcast."""
    x0, z = library.array(np.zeros((2, 3))), library.array(np.stack([Z, 2 * Z]))
    expected = [[scipy.optimize.brentq(cubic, -9, 9, args=(a,)) for a in row] for row in np.stack([Z, 2 * Z])]
    for ends in ((-9.0, 9), (library.array(UPPER), LOWER), (np.array([[-8.0], [-9.0]]), library.array(UPPER))):
        solution = ic.root(cubic, x0, z, solver=solver(*ends, rtol=1e-12), batch_ndim=2)
        assert np.all(library.numpy(solution.status) == ic.CONVERGED)
        np.testing.assert_allclose(library.numpy(solution.value), expected, rtol=1e-11)


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_to_the_last_float_of_every_dtype(solver: Any, name: str) -> None:
    dtype = getattr(torch, name)
    z = torch.tensor([2.0, 3.0, 5.0], dtype=dtype)
    solution = ic.root(
        lambda x, z: x.double() ** 3 - z.double(), z.double(), z, solver=solver(0.0, 5.0, rtol=0.0), batch_ndim=1
    )
    np.testing.assert_allclose(solution.value, np.cbrt([2.0, 3.0, 5.0]), rtol=4e-16)
    solution = ic.root(lambda x, z: x**3 - z, z, z, solver=solver(0.0, 5.0, rtol=0.0), batch_ndim=1)
    assert solution.status.tolist() == [ic.CONVERGED] * 3
    np.testing.assert_allclose(solution.value.double(), np.cbrt([2.0, 3.0, 5.0]), rtol=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_jump_among_few_floats(solver: Any, name: str) -> None:
    """Between 1 and 2 there are 128 or 1024 floats, and a third is none of them."""
    place = 4 / 3
    x0 = torch.ones(2, dtype=getattr(torch, name))
    size = torch.tensor([0.1, 0.0])  # a jump, and a root

    def g(x: torch.Tensor, z: None) -> torch.Tensor:
        away = x.float() - place
        return (away + size * torch.sign(away)).to(x.dtype)

    solution = ic.root(g, x0, None, solver=solver(1.0, 2.0, rtol=0.0), batch_ndim=1)
    assert solution.status.tolist() == [ic.STAGNATED, ic.CONVERGED]


def test_units_and_pytrees() -> None:
    """A state in units of 1e-9, g in units of 1e6: both ends are in the user's units."""
    solution = ic.root(
        lambda x, z: {"x": 1e6 * (x["x"] * 1e9 - z)},
        {"x": np.array([0.0, 2e-9])},
        np.array([1.0, 3.0]),
        solver=ic.Brent(-1e-9, 5e-9, rtol=1e-12),
        batch_ndim=1,
        scale=1e-9,
        g_scale=1e6,
    )
    assert np.all(solution.status == ic.CONVERGED)
    np.testing.assert_allclose(solution.value["x"], [1e-9, 3e-9], rtol=1e-10)


def test_a_fixed_point_between_two_points() -> None:
    solution = ic.solve(lambda h, z: 3 * np.cos(h), np.zeros(2), None, solver=ic.Brent(0.0, 2.0), batch_ndim=1)
    np.testing.assert_allclose(solution.value, scipy.optimize.brentq(lambda h: 3 * np.cos(h) - h, 0, 2), rtol=1e-6)


# Derivatives and transformations.


@pytest.mark.parametrize("solver", SOLVERS)
def test_gradients_in_torch(solver: Any) -> None:
    def root(z: Any) -> Any:
        ends = LOWER if z.ndim else -10.0, 10.0
        return ic.root(cubic, torch.zeros_like(z), z, solver=solver(*ends, rtol=1e-12), batch_ndim=z.ndim).value

    z = torch.tensor(Z, requires_grad=True)
    (first,) = torch.autograd.grad(root(z).sum(), z, create_graph=True)
    np.testing.assert_allclose(first.detach(), 1 / SLOPE, rtol=1e-9)
    np.testing.assert_allclose(torch.autograd.grad(first.sum(), z)[0], -6 * ROOT / SLOPE**3, rtol=1e-9)
    np.testing.assert_allclose(torch.vmap(torch.func.grad(root))(z.detach()), 1 / SLOPE, rtol=1e-9)
    np.testing.assert_allclose(torch.func.jacfwd(root)(z.detach()), np.diag(1 / SLOPE), rtol=1e-9, atol=1e-15)


def test_gradients_and_mapped_brackets_in_jax() -> None:
    def root(z: Any, lower: Any, upper: Any) -> Any:
        return ic.root(cubic, jnp.zeros_like(z), z, solver=ic.Brent(lower, upper, rtol=1e-12), batch_ndim=z.ndim).value

    z, lower, upper = map(jnp.asarray, (Z, LOWER, UPPER))
    # Each sample with its own bracket; one bracket for all; brackets that are the results of a program.
    for function, ends in ((jax.vmap(root), (lower, upper)), (jax.vmap(root, (0, None, None)), (-10.0, 10.0))):
        np.testing.assert_allclose(function(z, *ends), ROOT, rtol=1e-10)
    slope = jax.jit(jax.vmap(jax.grad(root)))
    np.testing.assert_allclose(slope(z, lower, upper), 1 / SLOPE, rtol=1e-9)
    found = jax.lax.scan(lambda x, z: (x, root(z, x - 10.0, x + 10.0)), jnp.zeros(()), z)[1]
    np.testing.assert_allclose(found, ROOT, rtol=1e-10)


def test_scale_and_derivatives_of_the_users_own() -> None:
    problem = ic.RootProblem(cubic, vjp=lambda x, z, v: ((3 * x**2 + 1) * v, -v), batch_ndim=1, scale=2.0)
    solution = ic.solve(problem, np.zeros(3), Z, solver=ic.Brent(LOWER, UPPER, rtol=1e-12))
    np.testing.assert_allclose(ic.Implicit().vjp(problem, solution.value, Z)[1](np.ones(3)), 1 / SLOPE, rtol=1e-6)


# Statuses.

HARD: dict[str, tuple[Any, float, float, float, str]] = {
    "a pole at a float": (lambda x: 1 / x if x else math.inf, 0.3, -1, 1, "STAGNATED"),
    "a pole between floats": (lambda x: 1 / (x - 1 / 3) if x != 1 / 3 else math.inf, 0.2, -1, 1, "STAGNATED"),
    "a weak pole": (lambda x: x - 0.1 + 1e-10 / (x - 0.1) if x != 0.1 else math.inf, 0.2, 0.0995, 0.15, "STAGNATED"),
    "a pole that hides": (lambda x: 1e10 * (x - 0.3) - 1e-10 / (x - math.pi / 10), 1, 0, 1, "CONVERGED"),
    "a jump": (lambda x: 1.0 if x > 1 / 3 else -1.0, 0.2, -1, 1, "STAGNATED"),
    "a jump to infinity": (lambda x: math.inf if x > 1 / 3 else -1.0, 0.2, -1, 1, "STAGNATED"),
    "a jump in a slope": (lambda x: 100 * (x - 1 / 3) + (1 if x > 1 / 3 else -1), 0.2, -1, 1, "STAGNATED"),
    "a small jump": (lambda x: x - 1 / 3 + (1e-9 if x > 1 / 3 else -1e-9), 1 / 3 + 1e-8, -1, 1, "STAGNATED"),
    "steep": (lambda x: 1e20 * (math.exp(x) - 1.5), math.log(1.5) + 1e-15, 0, 1, "CONVERGED"),
    "a steep cube root": (lambda x: math.copysign(abs(x - math.e) ** (1 / 3), x - math.e), 1, -1, 5, "CONVERGED"),
    "an infinite end": (lambda x: math.log(x) + x if x else -math.inf, 0.2, 0, 1, "CONVERGED"),
    "an overflow": (lambda x: math.exp(x) - 2 if x < 700 else math.inf, 0, -1, 1e6, "CONVERGED"),
    "small ends": (lambda x: (x - 1) * math.exp(-((x - 1) ** 2)), -6, -6, 6, "CONVERGED"),
    "the same sign": (lambda x: x * x + 1, 0.3, -1, 1, "UNBRACKETED"),
    "two roots": (lambda x: x * x - 1, 0, -2, 2, "UNBRACKETED"),
    "an empty bracket": (lambda x: x - 1, 0, 2, 2, "UNBRACKETED"),
    "NaN at an end": (lambda x: math.sqrt(x) - 0.5 if x >= 0 else math.nan, 1, -1, 1, "NONFINITE"),
    "NaN within": (lambda x: x - 0.9 if abs(x - 0.5) > 0.4 else math.nan, 0, 0, 1, "NONFINITE"),
    "infinite at x0": (lambda x: 1 / (x - 0.5) if x != 0.5 else math.inf, 0.5, 0, 1, "NONFINITE"),
    "a root at lower": (lambda x: x - 1, 5, 1, 4, "CONVERGED"),
    "a root at upper": (lambda x: x - 1, 5, -4, 1, "CONVERGED"),
    "a root at x0": (lambda x: x * x, 0, -1, 2, "CONVERGED"),
}


@pytest.mark.parametrize(
    ("library", "solver", "rtol"),
    [
        *((NUMPY, solver, rtol) for solver in SOLVERS for rtol in (1e-14, 0.0)),
        (TORCH, ic.Brent, 1e-14),
        (JAX, ic.Brent, 0.0),
    ],
)
def test_statuses(library: Library, solver: Any, rtol: float) -> None:
    """All in one batch: a sample that fails leaves the others as they are."""
    functions, x0, lower, upper, expected = zip(*HARD.values(), strict=True)

    def values(x: Any) -> Any:
        return np.array([f(float(a)) for f, a in zip(functions, np.asarray(x), strict=True)])

    def g(x: Any, z: Any) -> Any:
        if library is JAX:
            return jax.pure_callback(values, jax.ShapeDtypeStruct(x.shape, x.dtype), x)
        return library.from_numpy(values(library.numpy(x)))

    ends = (np.array(x, float) for x in (lower, upper))
    start, options = library.array(np.array(x0, float)), {"rtol": rtol, "max_steps": 300}
    problem = ic.RootProblem(g, batch_ndim=1)
    solution = ic.solve(problem, start, None, solver=solver(*ends, **options))
    status = [ic.Status(int(code)).name for code in library.numpy(solution.status)]
    # At zero there is always a float left; the loop finds that |g| grew, if it may take steps enough.
    status = ["STAGNATED" if code == "DIVERGED" else code for code in status]
    wrong = {name: (a, b) for name, a, b in zip(HARD, status, expected, strict=True) if a != b}
    stats = solution.stats
    x, residual, tolerance = map(library.numpy, (solution.value, stats.residual, stats.tolerance))
    assert not wrong, (wrong, x)
    for name, f, a, code, norm, held in zip(HARD, functions, x, status, residual, tolerance, strict=True):
        if code != "NONFINITE":
            assert abs(f(float(a))) == pytest.approx(norm, rel=1e-14), name
            assert (norm <= held) == (code == "CONVERGED"), name
    for name, root in (("steep", math.log(1.5)), ("a steep cube root", math.e), ("small ends", 1.0)):
        assert x[list(HARD).index(name)] == pytest.approx(root, rel=4e-16)


def test_what_a_user_reads() -> None:
    z = np.array([2.0, -1.0, 3.0])
    with pytest.raises(ic.SolveError, match=r"UNBRACKETED in 1 of 3 samples \(1\).*same sign at lower and at upper"):
        ic.root(lambda x, z: x**2 - z, np.ones(3), z, solver=ic.Brent(0.0, 5.0), batch_ndim=1, throw=True)
    with pytest.warns(ic.ConvergenceWarning, match="UNBRACKETED"):
        ic.root(lambda x, z: x**2 - z, np.ones(3), z, solver=ic.Brent(0.0, 5.0, rtol=0.0), batch_ndim=1)


# What else takes a solver.


@pytest.mark.parametrize("solver", SOLVERS)
def test_compacting_and_single_steps(solver: Any) -> None:
    z = np.linspace(-100, 100, 60)
    chosen = solver(np.full(60, -5.0), np.linspace(5, 50, 60), rtol=1e-13)
    wanted = ic.root(cubic, np.zeros(60), z, solver=chosen, batch_ndim=1)
    compacted = ic.root(cubic, np.zeros(60), z, solver=ic.Compacting(chosen), batch_ndim=1)
    stepper = ic.Stepper(ic.RootProblem(cubic, batch_ndim=1), solver=chosen)
    state = stepper.init(np.zeros(60), z)
    while not state.finished.all():
        state = stepper.step(state, z)
    for value, status, steps in ((*compacted[:2], compacted.stats.steps), (state.value, state.status, state.steps)):
        np.testing.assert_array_equal(value, wanted.value)
        np.testing.assert_array_equal(status, wanted.status)
        np.testing.assert_array_equal(steps, wanted.stats.steps)


@pytest.mark.parametrize(
    ("ends", "batch_ndim", "message"),
    [
        ((-5.0, 5.0), 0, r"one unknown for each sample.*shape \(3,\), has 3.*batch_ndim=x0.ndim"),
        ((np.zeros(2), 5.0), 1, r"lower of Brent must.*broadcasts to x0 of shape \(3,\); got an array of shape \(2,\)"),
        ((0.0, jnp.zeros(3)), 1, "upper of Brent must.*of jax, while x0 is one of numpy"),
        ((0.0, math.inf), 1, r"upper must lie in \(-inf, inf\)"),
        ((np.array([0.0, np.nan, 0.0]), 1.0), 1, r"lower must lie in \(-inf, inf\)"),
        (([0.0, 1.0, 2.0], 1.0), 1, r"lower must be a number, or an array that broadcasts to x0; got \[0"),
    ],
)
def test_wrong_arguments(ends: tuple[Any, Any], batch_ndim: int, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        ic.root(cubic, np.zeros(3), Z, solver=ic.Brent(*ends), batch_ndim=batch_ndim)


def test_a_mapped_sample_does_not_take_one_end_of_an_array() -> None:
    ends = np.full(3, -10.0), 10.0
    with pytest.raises(ValueError, match=r"broadcasts to x0 of shape \(\)"):
        jax.vmap(lambda z: ic.root(cubic, jnp.zeros(()), z, solver=ic.Brent(*ends)).value)(jnp.asarray(Z))
    start = torch.zeros((), dtype=torch.float64)
    with pytest.raises(ValueError, match=r"broadcasts to x0 of shape \(\)"):
        torch.vmap(lambda z: ic.root(cubic, start, z, solver=ic.Brent(*ends)).value)(torch.tensor(Z))


def test_a_start_outside_of_the_bracket_says_nothing() -> None:
    """It is a root itself, or makes the tolerance large."""
    for solver in (ic.Brent(3.0, 4.0), ic.Bisection(3.0, 4.0)):
        solution = ic.root(lambda x, z: np.sin(x), np.zeros(1), None, solver=solver, batch_ndim=1)
        assert solution.status == ic.CONVERGED
        np.testing.assert_allclose(solution.value, np.pi, rtol=1e-5)
    solution = ic.root(lambda x, z: x**5 + 0.7, np.array([1000.0]), None, solver=ic.Brent(0.0, 10.0), batch_ndim=1)
    assert solution.status == ic.UNBRACKETED
    slope = ic.root(lambda x, z: np.exp(-20 * (x - 3)) - 1, np.zeros(1), None, solver=ic.Brent(2.0, 4.0), batch_ndim=1)
    assert slope.status == ic.CONVERGED
    np.testing.assert_allclose(slope.value, 3.0, rtol=1e-4)
