"""A backend, a solver and an estimator by somebody else: one file each, and one line to join."""

import importlib.metadata
import inspect
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import array_api_strict
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from libraries import Library
from third_party import backend as their_backend
from third_party.estimator import TailedSeries
from third_party.solver import HeavyBall

import implicit_core as ic
from implicit_core import backend, registry
from implicit_core.space import Space

HERE = Path(__file__).parent / "third_party"


def public(kind: type) -> set[str]:
    """Public names of a class."""
    return {name for name, value in vars(kind).items() if inspect.isfunction(value) and not name.startswith("_")}


def test_the_interface_is_small_and_defined_once() -> None:
    assert len(public(backend.Backend)) <= 33
    assert not public(backend.Backend) & public(Space)


def test_backends_override_methods_of_the_interface_only() -> None:
    """A framework adds no method that the core has to know."""
    for name in ("numpy", "torch", "jax", "array_api_strict"):
        found = registry.load_backend(name)
        assert public(type(found)) <= public(backend.Backend), name
        assert public(type(found.space(found.xp.ones(2), 0))) <= public(Space), name


@pytest.mark.parametrize("name", ["backend", "solver", "estimator"])
def test_a_file_is_short(name: str) -> None:
    assert len((HERE / f"{name}.py").read_text().splitlines()) <= 40


@pytest.fixture
def _joined(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Their backend, joined by an entry point, and no other that knows its arrays."""
    entry = importlib.metadata.EntryPoint("my_framework", "third_party.backend", "implicit_core.backends")
    monkeypatch.setattr(registry, "_BACKENDS", {})
    monkeypatch.setattr(registry, "_ADAPTERS", {})
    monkeypatch.setitem(sys.modules, "my_framework", types.ModuleType("my_framework"))
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda group: [entry] if group == "implicit_core.backends" else []
    )
    registry._joined.cache_clear()
    yield
    registry._joined.cache_clear()


@pytest.mark.usefixtures("_joined")
@pytest.mark.parametrize(
    "solver", [ic.FixedPointIteration(damping=0.9), ic.Anderson(), ic.Broyden(), ic.NewtonKrylov(), HeavyBall()]
)
def test_their_backend(solver: ic.Solver) -> None:
    xp = array_api_strict
    z = xp.asarray([[1.0, 2.0], [0.5, -1.0]])
    problem = ic.Problem(
        lambda h, z: 0.5 * h + z,
        vjp=lambda h, z, v: (0.5 * v, v),
        jvp=lambda h, z, dh, dz: 0.5 * dh + dz,
        batch_ndim=1,
    )
    their_backend.LAUNCHED.clear()
    solution = ic.fixed_point(problem, xp.zeros((2, 2)), z, solver=solver)
    assert registry.find_backend(z) is their_backend.BACKEND
    assert registry.find_backend(z).devices() == ["accelerator 0"]
    assert their_backend.LAUNCHED
    assert bool(xp.all(solution.status == ic.CONVERGED.value))
    np.testing.assert_allclose(np.from_dlpack(solution.value), 2 * np.from_dlpack(z), rtol=1e-4)
    _, pullback = ic.Implicit().vjp(problem, solution.value, z)
    np.testing.assert_allclose(np.from_dlpack(pullback(xp.ones((2, 2)))), 2.0, rtol=1e-5)


def test_their_solver(library: Library) -> None:
    z = np.asarray([[1.0, -2.0, 0.5], [0.1, 0.2, 0.3]])
    solution = ic.solve(
        lambda h, z: 0.9 * h + z, library.array(0 * z), library.array(z), solver=HeavyBall(max_steps=300), batch_ndim=1
    )
    assert np.all(library.to_numpy(solution.status) == ic.CONVERGED)
    np.testing.assert_allclose(library.to_numpy(solution.value), 10 * z, rtol=1e-3)


def test_their_estimator() -> None:
    """It is called with a callback that returns one array at every call.

    On h = a h + z with a = c = 0.5 it is exact, 1 / (1 - a); at a = 0.2 it is 1 + 0.2 + 0.04 / 0.5."""
    for a, expected in ((0.5, 2.0), (0.2, 1.28)):
        out = np.empty(2)
        problem: Any = ic.Problem(
            lambda h, z, a=a: a * h + z, vjp=lambda h, z, v, a=a, out=out: (np.multiply(a, v, out=out), v)
        )
        assert TailedSeries().vjp(problem, np.ones(2), np.ones(2))[1](np.ones(2)) == pytest.approx(expected)

        z = torch.ones(2, dtype=torch.float64, requires_grad=True)
        layer = ic.fixed_point(lambda h, z, a=a: a * h + z, torch.zeros_like(z).detach(), z, gradient=TailedSeries())
        layer.value.sum().backward()
        np.testing.assert_allclose(z.grad, expected)

        def loss(z: Any, a: float = a) -> Any:
            return jnp.sum(ic.fixed_point(lambda h, z: a * h + z, jnp.zeros(2), z, gradient=TailedSeries()).value)

        np.testing.assert_allclose(jax.grad(loss)(jnp.ones(2)), expected)


class Halved(ic.Unroll):
    """A class derived from one that adapters differentiate by autodiff."""

    def vjp(self, problem: Any, h: Any, z: Any) -> Any:
        value, pullback = super().vjp(problem, h, z)
        return value, lambda v: pullback(0.5 * v)


def test_an_overridden_vjp_is_the_derivative() -> None:
    """Of h = h / 2 + z: three steps give 1 + 1/2 + 1/4."""
    x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    ic.fixed_point(lambda h, z: 0.5 * h + z, torch.zeros_like(x), x, gradient=Halved(3, 1.0)).value.sum().backward()
    np.testing.assert_allclose(x.grad, 0.875)

    def loss(z: Any) -> Any:
        return jnp.sum(ic.fixed_point(lambda h, z: 0.5 * h + z, jnp.zeros(2), z, gradient=Halved(3, 1.0)).value)

    np.testing.assert_allclose(jax.grad(loss)(jnp.zeros(2)), 0.875)


@dataclass(frozen=True, kw_only=True)
class Stepping(ic.Solver):
    """A solver with any step."""

    result: Any

    def init(self, system: Any, x: Any) -> None:
        return None

    def step(self, system: Any, memory: None, point: Any) -> Any:
        return self.result(point.f[0])


@dataclass(frozen=True)
class Inverting(ic.estimators.AtFixedPoint):
    """An estimator with any inverse."""

    result: Any

    def inverse(self, space: Any, jacobian: Any, v: Any) -> Any:
        return self.result(v[0])


class Overridden(ic.Anderson):
    """A solver with a step, whose ``solve`` is another."""

    def solve(self, problem: Any, h0: Any, z: Any, *, trace: bool = False) -> Any:
        return h0


class Solving:
    """An object with any ``solve``."""

    def __init__(self, result: Any) -> None:
        self.result = result

    def solve(self, problem: Any, h0: Any, z: Any, **options: Any) -> Any:
        return self.result(h0)


WRONG_STATES = {
    "bare": (lambda a: a, r"must return a state, a tuple with an array for each leaf of h, \(\S+ \(2, 3\),\); got"),
    "empty": (lambda a: (), r"must return a state, .* got \(\)"),
    "shape": (lambda a: (a[:, :1],), r".* got \(\S+ \(2, 1\),\)"),
    "dtype": (lambda a: (a > 0,), r".* got \(\S*bool\S* \(2, 3\),\)"),
}


@pytest.mark.parametrize("wrong", WRONG_STATES)
def test_a_state_that_is_none_is_refused(library: Library, wrong: str) -> None:
    result, message = WRONG_STATES[wrong]
    h0, z = library.array(np.zeros((2, 3))), library.array(np.ones((2, 3)))
    problem = ic.Problem(
        lambda h, z: 0.5 * h + z, vjp=lambda h, z, v: (0.5 * v, v), jvp=lambda h, z, dh, dz: 0.5 * dh + dz, batch_ndim=1
    )
    solver, estimator = Stepping(result=lambda f: (result(f), None)), Inverting(result)
    with pytest.raises(TypeError, match=f"Stepping.step {message}"):
        ic.solve(problem, h0, z, solver=solver)
    with pytest.raises(TypeError, match=f"Inverting.inverse {message}"):
        estimator.vjp(problem, h0, z)[1](z)
    with pytest.raises(TypeError, match=f"Inverting.inverse {message}"):
        estimator.jvp(problem, h0, z, z)


@pytest.mark.parametrize("wrong", WRONG_STATES)
def test_a_layer_refuses_an_inverse_that_is_no_state(wrong: str) -> None:
    result, message = WRONG_STATES[wrong]
    x = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    layer = {"gradient": Inverting(result), "batch_ndim": 1}
    value = ic.fixed_point(lambda h, z: 0.5 * h + z, torch.zeros(2, 3, dtype=torch.float64), x, **layer).value
    with pytest.raises(TypeError, match=f"Inverting.inverse {message}"):
        value.sum().backward()

    def loss(z: Any) -> Any:
        return jnp.sum(ic.fixed_point(lambda h, z: 0.5 * h + z, jnp.zeros((2, 3)), z, **layer).value)

    with pytest.raises(TypeError, match=f"Inverting.inverse {message}"):
        jax.grad(loss)(jnp.ones((2, 3)))


def test_results_of_another_kind_are_refused() -> None:
    z = np.ones(2)
    for result in (lambda f: None, lambda f: (f,)):
        with pytest.raises(TypeError, match=r"Stepping\.step must return a pair \(x, memory\), got"):
            ic.solve(lambda h, z: 0.5 * h + z, z, z, solver=Stepping(result=result))
    for result in (lambda h: None, lambda h: h):
        with pytest.raises(TypeError, match=r"Solving\.solve must return a Solution, got"):
            ic.solve(lambda h, z: 0.5 * h + z, z, z, solver=Solving(result))
    with pytest.raises(TypeError, match=r"Overridden\.solve must return a Solution, got"):
        ic.solve(lambda h, z: 0.5 * h + z, z, z, solver=Overridden())
    other = ic.solve(lambda h, z: 0.5 * h + z, np.ones(3), np.ones(3))
    with pytest.raises(ValueError, match=r"the value of Solving\.solve must have the shape of h0, \(2,\), got \(3,\)"):
        ic.solve(lambda h, z: 0.5 * h + z, z, z, solver=Solving(lambda h: other))


class Bisection:
    """A class with ``solve`` and no other method of a solver."""

    def solve(self, problem: Any, h0: Any, z: Any, *, trace: bool = False) -> ic.Solution:
        low, high = h0 - 4, h0 + 4
        for _ in range(60):
            middle = (low + high) / 2
            below = problem(middle, z) > middle
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        return ic.solve(problem, middle, z, solver=ic.FixedPointIteration(max_steps=1))


class Twice:
    """A callable whose own method ``solve`` is no solver's."""

    def __call__(self, problem: Any, h0: Any, z: Any) -> Any:
        return problem(problem(h0, z), z)

    def solve(self, a: Any, b: Any) -> Any:
        raise AssertionError


def test_a_callable_with_a_method_of_that_name_is_called() -> None:
    solution = ic.solve(lambda h, z: 0.0 * h + z, np.zeros(2), np.ones(2), solver=Twice())
    assert solution.status == ic.CONVERGED
    assert solution.stats.evaluations == 4


def test_whatever_has_solve_is_a_solver() -> None:
    z = np.asarray(0.0)
    for solution in (
        ic.solve(lambda h, z: np.cos(h) + z, z, z, solver=Bisection()),
        ic.fixed_point(lambda h, z: np.cos(h) + z, z, z, solver=Bisection(), gradient=ic.OneStep()),
    ):
        assert solution.status == ic.CONVERGED
        assert solution.value == pytest.approx(0.7390851332151607)
    with pytest.raises(TypeError, match="problem must be a Problem, such as Problem"):
        ic.Anderson().solve(np.cos, z, z)
    with pytest.raises(TypeError, match="solver must be a Solver, such as Anderson"):
        ic.solve(np.cos, [1, 2], z, solver=3)
    with pytest.raises(TypeError, match="solver must be a Solver, such as Anderson"):
        ic.solve(lambda h, z: h, z, z, solver=3)
    with pytest.raises(TypeError, match=r"did you mean Anderson\(\)\?"):
        ic.solve(lambda h, z: h, z, z, solver=ic.Anderson)


@pytest.mark.parametrize("framework", ["torch", "jax", "numpy"])
def test_a_missing_derivative_names_what_makes_it(framework: str) -> None:
    """Autodiff for an F without callbacks; where there is one callback, the other one."""
    x: Any = {"torch": torch.ones, "jax": jnp.ones, "numpy": np.ones}[framework](2)
    bare, made = ic.Problem(lambda h, z: 0.5 * h + z), f"take implicit_core.adapters.{framework}.problem(f), "
    with pytest.raises(NotImplementedError, match="needs the VJP of F") as found:
        ic.Neumann().vjp(bare, x, x)
    assert (made in str(found.value)) == (framework != "numpy")
    one = ic.Problem(lambda h, z: 0.5 * h + z, vjp=lambda h, z, v: (0.5 * v, v))
    with pytest.raises(NotImplementedError, match="needs the JVP of F, which this problem doesn't have: pass jvp="):
        ic.Neumann().jvp(one, x, x, x)
