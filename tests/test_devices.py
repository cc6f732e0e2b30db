"""Where arrays are: a second device, tensors without numbers, and a framework with a current device."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import array_api_strict
import numpy as np
import pytest
import torch
from libraries import LIBRARIES, TORCH, flat
from problems import CASES, Case, layer

import implicit_core as ic
from implicit_core.adapters import torch as ict
from implicit_core.backend import Backend
from implicit_core.backends import numpy as numpy_backend
from implicit_core.backends import torch as torch_backend
from implicit_core.estimators import implicit, neumann_series

torch_layer = importlib.import_module("implicit_core.adapters.torch.layer")  # the package has a function of this name
STRICT = next(library for library in LIBRARIES if library.name == "array_api_strict")
ELSEWHERE = array_api_strict.Device("device1")
SOLVERS = [
    ic.FixedPointIteration(damping=0.8),
    ic.Anderson(),
    ic.Broyden(),
    ic.NewtonKrylov(),
    ic.NewtonKrylov(linear_solver=ic.BiCGSTAB(rtol=1e-3)),
]
ESTIMATORS = [
    ic.OneStep(),
    ic.Neumann(3, 0.5),
    ic.Unroll(3, 0.5),
    ic.Unroll(3, 0.5, recompute=True),
    ic.BPTT(3),
    *(ic.Implicit(solver) for solver in (ic.GMRES(), ic.BiCGSTAB(), ic.Richardson())),
]


def named(solver: Any) -> str:
    return type(solver).__name__


def arrays(tree: Any) -> list[Any]:
    """The leaves with a dtype."""
    backend = Backend("any", array_api_strict, (object,))
    return [leaf for leaf in backend.flatten(tree)[0] if hasattr(leaf, "dtype")]


# A second device; array-api-strict refuses operations on arrays of two devices.


def there(tree: Any) -> Any:
    return Backend("any", array_api_strict, (object,)).map(
        lambda x: x.to_device(ELSEWHERE) if hasattr(x, "to_device") else x, STRICT.array(tree)
    )


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_solve_stays_on_the_device_of_its_arrays(case: Case, solver: ic.Solver) -> None:
    solution = ic.solve(case.problem(STRICT), there(case.h0), there(case.z), solver=solver, trace=True)
    found = arrays((solution.value, solution.status, solution.stats))
    assert len(found) >= 5
    assert all(x.device == ELSEWHERE for x in found)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_a_gradient_stays_on_the_device_of_its_arrays(estimator: ic.Estimator) -> None:
    case = layer()
    problem, h, z = case.problem(STRICT), there(case.oracle()), there(case.z)
    value, pullback = estimator.vjp(problem, h, z)
    tangent = estimator.jvp(problem, h, z, z)[1]
    found = arrays((value, pullback(value), tangent))
    assert len(found) >= 4
    assert all(x.device == ELSEWHERE for x in found)


def test_arrays_of_two_devices_are_distinguished() -> None:
    case = layer()
    h0, z = STRICT.array(case.h0), there(case.z)
    with pytest.raises(ValueError, match=r"result of f must be on the device of h0, .*CPU_DEVICE.*, got .*device1"):
        ic.solve(lambda h, z: z, h0, there(case.h0), batch_ndim=1)
    with pytest.raises(ValueError, match="all leaves of h0 must be on one device"):
        ic.solve(lambda h, z: h, (h0, there(case.h0)), z)
    problem = case.problem(STRICT)
    pullback = ic.Neumann(3).vjp(problem, there(case.oracle()), z)[1]
    with pytest.raises(ValueError, match=r"h_bar must be on the device of h, .*device1"):
        pullback(h0)


# Tensors without numbers: reading one is an error.


@pytest.fixture
def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loops make a few steps and do not read their masks; the meta device is treated as any other."""
    kind = type(torch_backend.BACKEND)

    def some_steps(backend: Any, masks: Any, body: Any, carry: Any, max_steps: int, *rest: Any) -> Any:
        return backend.repeat(lambda c: body(c, masks(c)), carry, min(4, max_steps))

    monkeypatch.setattr(kind, "while_loop", some_steps)
    monkeypatch.setattr(kind, "readable", lambda self, x: True)
    monkeypatch.setattr(torch_layer, "without_numbers", lambda h0: False)


def meta(tree: Any) -> Any:
    return Backend("any", TORCH.xp, (object,)).map(
        lambda x: x.to("meta") if isinstance(x, torch.Tensor) else x, TORCH.array(tree)
    )


def of_tensors(case: Case) -> Callable[..., Any]:
    return lambda h, z: case.f(TORCH.xp, h, z)


@pytest.mark.parametrize("solver", [*SOLVERS[:-1], ic.Anderson(memory=2, damping=0.5)], ids=repr)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.usefixtures("blind")
def test_a_step_reads_nothing(case: Case, solver: ic.Solver) -> None:
    problem = ict.problem(of_tensors(case), batch_ndim=case.batch_ndim)
    solver = replace(solver, max_steps=30)  # more than any history holds
    solution = ic.solve(problem, meta(case.h0), meta(case.z), solver=solver)
    assert solution.stats.evaluations >= 1
    assert all(x.device.type == "meta" for x in arrays((solution.value, solution.status, solution.stats)))


@pytest.mark.parametrize("gradient", ESTIMATORS[:5], ids=repr)
@pytest.mark.usefixtures("blind")
def test_forward_and_backward_read_no_number(gradient: ic.Estimator) -> None:
    case = layer()
    z = {name: value.requires_grad_() for name, value in meta(case.z).items()}
    value = ic.fixed_point(of_tensors(case), meta(case.h0), z, gradient=gradient, batch_ndim=1).value
    value.square().sum().backward()
    assert all(x.grad.device.type == "meta" for x in z.values())


@pytest.mark.parametrize("gradient", [ic.Implicit(), ic.NeumannSeries()], ids=repr)
@pytest.mark.usefixtures("blind")
def test_an_estimator_that_stops_by_itself_reads_its_statuses_alone(
    gradient: ic.Estimator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reads besides the loop's read in each step."""
    case, statuses = layer(), []
    z = {name: value.requires_grad_() for name, value in meta(case.z).items()}
    module = implicit if isinstance(gradient, ic.Implicit) else neumann_series
    monkeypatch.setattr(module, "settled", lambda space, w, status, *_: statuses.append(status.shape) or w)
    value = ic.fixed_point(of_tensors(case), meta(case.h0), z, gradient=gradient, batch_ndim=1).value
    value.square().sum().backward()
    assert statuses == [(case.h0.shape[0], 1)]


class Reading(ic.Anderson):
    """A step that reads a number."""

    def step(self, system: Any, memory: Any, point: Any) -> Any:
        return super().step(system, memory, point) if bool(system.space.xp.any(point.active)) else None


@pytest.mark.usefixtures("blind")
def test_a_read_is_detected() -> None:
    case = layer()
    with pytest.raises(RuntimeError, match="meta"):
        ic.solve(of_tensors(case), meta(case.h0), meta(case.z), solver=Reading(), batch_ndim=1)


# A framework with a current device, as CuPy: user functions and all arithmetic are within `on_device_of`.


class PlacedSpace(numpy_backend.NumPySpace):
    def norm(self, x: Any) -> Any:
        self.backend.within()
        return super().norm(x)


class Placed(numpy_backend.NumPyBackend):
    """NumPy's backend, which records whether it is within ``on_device_of``."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.depth = self.outside = 0

    @contextmanager
    def on_device_of(self, tree: Any) -> Iterator[None]:
        assert any(self.is_array(leaf) for leaf in self.flatten(tree)[0])
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1

    def within(self) -> None:
        self.outside += self.depth == 0

    def map(self, fn: Any, tree: Any, *rest: Any) -> Any:
        self.within()
        return super().map(fn, tree, *rest)


@pytest.fixture
def placed(monkeypatch: pytest.MonkeyPatch) -> Placed:
    original = numpy_backend.BACKEND
    backend = Placed(original.name, original.xp, original.array_types, space=PlacedSpace)
    monkeypatch.setattr(numpy_backend, "BACKEND", backend)
    return backend


def watched(problem: ic.Problem, backend: Placed) -> ic.Problem:
    """The problem with functions that check that they are called within ``on_device_of``."""

    def noting(function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            backend.within()
            return function(*arguments)

        return None if function is None else call

    given = {name: noting(getattr(problem, f"_{name}")) for name in ("vjp", "jvp", "linearize")}
    return ic.Problem(noting(problem.f), **given, batch_ndim=problem.batch_ndim)


@pytest.mark.parametrize("form", ["callbacks", "linearized"])
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_gradients_are_made_on_the_device_of_the_arrays(estimator: ic.Estimator, form: str, placed: Placed) -> None:
    case = layer()
    problem = watched(case.problem() if form == "callbacks" else case.linearized(), placed)
    root = case.oracle()
    placed.outside = 0
    value, pullback = estimator.vjp(problem, root, case.z)
    pullback(value)
    estimator.jvp(problem, root, case.z, case.z)
    estimator.value(problem, root, case.z)
    ic.fixed_point(problem, case.h0, case.z, gradient=estimator)
    assert placed.outside == 0
    assert placed.depth == 0


@pytest.mark.parametrize("solver", [*SOLVERS, lambda problem, h0, z: problem(problem(h0, z), z)], ids=named)
def test_solves_are_made_on_the_device_of_the_arrays(solver: Any, placed: Placed) -> None:
    for form in (Case.problem, Case.linearized):
        problem = watched(form(layer()), placed)
        placed.outside = 0
        solution = ic.solve(problem, layer().h0, layer().z, solver=solver)
        assert placed.outside == 0
        assert np.all(np.isfinite(flat(solution.value)))


def test_so_are_linear_solves_and_aux(placed: Placed) -> None:
    def operator(v: Any) -> Any:
        placed.within()
        return 2 * v

    def f(h: Any, z: Any) -> Any:
        placed.within()
        return 0.5 * h + z, z

    for solver in (ic.GMRES(), ic.BiCGSTAB(), ic.CG(), ic.Richardson(relaxation=0.4)):
        np.testing.assert_allclose(ic.solve_linear(operator, np.ones(3), solver=solver).value, 0.5, rtol=1e-5)
    assert ic.fixed_point(f, np.zeros(3), np.ones(3), has_aux=True).aux.tolist() == [1, 1, 1]
    with pytest.raises(ic.SolveError):
        ic.solve(lambda h, z: h + 1, np.zeros(3), None, throw=True)
    assert placed.outside == 0
