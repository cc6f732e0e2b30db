"""In NumPy, array-api-strict and CuPy a function of the user's that writes to its argument never goes unnoticed.

Every one is tried at a start of zeros, where the first write changes nothing. PyTorch is in test_torch_inplace.py.
"""

from collections.abc import Callable
from typing import Any

import array_api_strict
import numpy as np
import numpy.ctypeslib
import pytest
import scipy.linalg
import torch

import implicit_core as ic
from implicit_core.backends.numpy import BACKEND

Z = np.array([-1.0, 2.0])
ROOT = np.array([-1.0, 4.0])
"""Of h = 0.5 relu(h) + z."""
SOLVERS = [ic.FixedPointIteration(rtol=1e-9), ic.Anderson(rtol=1e-9), ic.Broyden(rtol=1e-9)]
WROTE = "f wrote to its argument h; it must return a new array"


def out(h: Any) -> Any:
    return np.maximum(h, 0, out=h)


def clipped(h: Any) -> Any:
    h.clip(0, None, out=h)
    return h


def masked(h: Any) -> Any:
    h[h < 0] = 0
    return h


def through_a_view(h: Any) -> Any:
    np.copyto(h[::-1], np.maximum(h[::-1], 0))
    return h


def augmented(h: Any) -> Any:
    h *= h > 0
    return h


def put(h: Any) -> Any:
    np.putmask(h, h < 0, 0.0)
    return h


@pytest.mark.parametrize("solver", SOLVERS, ids=["plain", "anderson", "broyden"])
@pytest.mark.parametrize("relu", [out, clipped, masked, through_a_view, augmented, put], ids=lambda f: f.__name__)
def test_a_write_is_refused_where_it_changes_nothing(relu: Callable[[Any], Any], solver: ic.Solver) -> None:
    with pytest.raises(ValueError, match=WROTE):
        ic.solve(lambda h, z: 0.5 * relu(h) + z, np.zeros(2), Z, solver=solver)
    with pytest.raises(ValueError, match=WROTE):
        ic.solve(
            lambda h, z: {"x": 0.5 * relu(h["x"]) + z, "y": h["y"]},
            {"x": np.zeros(2), "y": np.ones(3)},
            Z,
            solver=solver,
        )
    with pytest.raises(ValueError, match=WROTE):
        ic.fixed_point(lambda h, z: 0.5 * relu(h) + z, np.zeros(2), Z, solver=solver, gradient=ic.BPTT(k=9))
    solution = ic.solve(lambda h, z: 0.5 * relu(h.copy()) + z, np.zeros(2), Z, solver=solver)
    assert solution.converged
    np.testing.assert_allclose(solution.value, ROOT, atol=1e-7)


@pytest.mark.parametrize("solver", SOLVERS, ids=["plain", "anderson", "broyden"])
def test_arrays_that_are_never_read_only_are_compared_twice(solver: ic.Solver) -> None:
    """As those of CuPy. array-api-strict runs the same code."""
    zeros, z = array_api_strict.zeros(2, dtype=array_api_strict.float64), array_api_strict.asarray(Z)
    with pytest.raises(ValueError, match=WROTE):
        ic.solve(lambda h, z: 0.5 * masked(h) + z, zeros, z, solver=solver)
    for steps in (1, 2):
        with pytest.raises(ValueError, match=WROTE):
            ic.solve(lambda h, z: 0.5 * masked(h) + z, zeros + 1 - steps, z, solver=type(solver)(max_steps=3 - steps))
    stepper = ic.Stepper(lambda h, z: 0.5 * masked(h) + z, solver=solver)
    with pytest.raises(ValueError, match=WROTE):
        stepper.step(stepper.init(zeros, z), z)
    value = ic.solve(lambda h, z: 0.5 * masked(h - 0.0) + z, zeros, z, solver=solver).value
    np.testing.assert_allclose(np.from_dlpack(value), ROOT, atol=1e-7)


def test_compiled_code_that_does_not_ask() -> None:
    """SciPy's option to overwrite writes to read-only memory, which the comparison finds."""
    factors = scipy.linalg.lu_factor(np.array([[4.0, 1.0], [0.0, 4.0]]))
    view = np.ones(2)
    view.setflags(write=False)
    scipy.linalg.lu_solve(factors, view, overwrite_b=True)
    assert view[0] != 1  # if SciPy asks one day, this test is about nothing

    def f(h: Any, z: Any) -> Any:
        return scipy.linalg.lu_solve(factors, h, overwrite_b=True) + z

    for h0 in (np.zeros(2), np.ones(2)):
        with pytest.raises(ValueError, match=WROTE):
            ic.solve(f, h0, Z)


def by_ctypes(h: Any) -> Any:
    np.ctypeslib.ndpointer(flags=["WRITEABLE"]).from_param(h)  # type: ignore[attr-defined]  # the class is made there
    return np.maximum(h, 0)


def by_dlpack(h: Any) -> Any:
    return torch.relu(torch.utils.dlpack.from_dlpack(h.__dlpack__())).numpy()


def by_cython(h: Any) -> Any:
    """What a signature with `double[:]` does, which is not const."""
    if not h.flags.writeable:
        raise ValueError("buffer source array is read-only")
    return np.maximum(h, 0)


def sorted_in_place(h: Any) -> Any:
    """A write that NumPy reports in words of its own, and that changes nothing in the first evaluation."""
    h.sort()
    return np.maximum(h, 0)


@pytest.mark.parametrize(
    "relu", [by_ctypes, by_dlpack, by_cython, sorted_in_place], ids=["ctypes", "dlpack", "cython", "sort"]
)
@pytest.mark.parametrize("solver", SOLVERS, ids=["plain", "anderson", "broyden"])
def test_functions_that_need_writable_memory_work(relu: Callable[[Any], Any], solver: ic.Solver) -> None:
    """They have copies: one evaluation more in a solve, and right results whatever they write."""
    calls = [0]

    def f(h: Any, z: Any) -> Any:
        calls[0] += 1
        return 0.5 * relu(h) + z

    solution = ic.solve(f, np.zeros(2), Z, solver=solver)
    assert solution.converged
    np.testing.assert_allclose(solution.value, ROOT, atol=1e-7)
    assert calls[0] == solution.stats.evaluations + 1


def test_other_errors_are_the_users() -> None:
    buffer = np.zeros(2)
    buffer.setflags(write=False)

    def to_another_array(h: Any, z: Any) -> Any:
        return np.add(h, z, out=buffer)

    with pytest.raises(ValueError, match=r"^output array is read-only"):
        ic.solve(to_another_array, np.zeros(2), Z)
    error, calls = KeyError("x"), [0]

    def broken(h: Any, z: Any) -> Any:
        calls[0] += 1
        raise error

    with pytest.raises(KeyError) as raised:
        ic.solve(broken, np.zeros(2), Z)
    assert raised.value is error
    assert calls == [1]


def f(h: Any, z: Any) -> Any:
    return np.tanh(0.5 * h + z)


def slope(h: Any, z: Any) -> Any:
    return 1 - f(h, z) ** 2


ESTIMATORS = [ic.Neumann(4), ic.NeumannSeries(), ic.Implicit(), ic.OneStep(), ic.Unroll(4), ic.BPTT(4)]
ESTIMATORS += [ic.Unroll(4, recompute=True)]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_derivatives_that_write(estimator: ic.Estimator) -> None:
    """To their point, and to the vectors of the estimator, which it still needs."""

    def vjp(h: Any, z: Any, v: Any) -> Any:
        v *= slope(h, z)
        return 0.5 * v, v

    def vjp_to_h(h: Any, z: Any, v: Any) -> Any:
        h *= 1.0
        return 0.5 * v, v

    def jvp(h: Any, z: Any, dh: Any, dz: Any) -> Any:
        dh *= 0.5
        return slope(h, z) * (dh + dz)

    def jvp_to_z(h: Any, z: Any, dh: Any, dz: Any) -> Any:
        dz *= 1.0
        return slope(h, z) * (0.5 * dh + dz)

    def f_in_place(h: Any, z: Any) -> Any:
        h *= 0.5
        return np.tanh(h + z)

    h, v = np.zeros(2), np.ones(2)
    for wrong in (vjp, vjp_to_h):
        with pytest.raises(ValueError, match="vjp wrote to its argument h or v; it must return a new array"):
            estimator.vjp(ic.Problem(f, vjp=wrong), h, Z)[1](v)
    for wrong in (jvp, jvp_to_z):
        with pytest.raises(ValueError, match="jvp wrote to its argument h or dh or dz"):
            estimator.jvp(ic.Problem(f, jvp=wrong), h, Z, np.ones(2))
    right = {"vjp": lambda h, z, v: (0.5 * v, v), "jvp": lambda h, z, dh, dz: 0.5 * dh + dz}
    with pytest.raises(ValueError, match=WROTE):
        estimator.vjp(ic.Problem(f_in_place, **right), h, Z)
    with pytest.raises(ValueError, match=WROTE):
        estimator.jvp(ic.Problem(f_in_place, **right), h, Z, np.ones(2))
    if isinstance(estimator, ic.Unroll):
        with pytest.raises(ValueError, match=WROTE):
            estimator.value(ic.Problem(f_in_place), h, Z)
    np.testing.assert_array_equal(h, 0)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_derivatives_of_tensors_that_write(estimator: ic.Estimator) -> None:
    """Neumann's gradient was wrong by half. Without a counter, as in inference mode, nothing is known."""

    def vjp(h: Any, z: Any, v: Any) -> Any:
        return v.mul_(0.5), v

    def jvp(h: Any, z: Any, dh: Any, dz: Any) -> Any:
        return dh.mul_(0.5).add_(dz)

    h, z, v = (torch.full((2,), x, dtype=torch.float64) for x in (0.0, 1.0, 1.0))
    problem = ic.Problem(lambda h, z: 0.5 * h + z, vjp=vjp, jvp=jvp)
    with pytest.raises(ValueError, match="vjp wrote to its argument h or v"):
        estimator.vjp(problem, h, z)[1](v)
    with pytest.raises(ValueError, match="jvp wrote to its argument h or dh or dz"):
        estimator.jvp(problem, h, z, torch.ones_like(z))


@pytest.mark.parametrize("name", ["vjp_h", "vjp_z", "vjp", "jvp_h", "jvp_z", "jvp"])
def test_parts_of_a_linearization_that_write(name: str) -> None:
    def in_place(*vectors: Any) -> Any:
        vectors[-1][...] += 0.0
        return (vectors[0], vectors[0]) if name == "vjp" else vectors[0]

    def linearize(h: Any, z: Any) -> ic.Linearization[Any, Any]:
        right = {
            "vjp_h": lambda v: 0.5 * v,
            "vjp_z": lambda v: 1.0 * v,
            "jvp_h": lambda v: 0.5 * v,
            "jvp_z": lambda v: 1.0 * v,
        }
        return ic.Linearization(f(h, z), **{key: g for key, g in right.items() if key != name}, **{name: in_place})

    problem, v = ic.Problem(f, linearize=linearize), np.ones(2)
    estimator = ic.Unroll(2) if name in ("vjp", "jvp") else ic.Neumann(2)

    def differentiate() -> None:
        if name.startswith("vjp"):
            estimator.vjp(problem, np.zeros(2), Z)[1](v)
        else:
            estimator.jvp(problem, np.zeros(2), Z, v)

    with pytest.raises(ValueError, match=f"{name} wrote to its argument"):
        differentiate()
    np.testing.assert_array_equal(v, 1)


def test_newton() -> None:
    def jvp(h: Any, z: Any, dh: Any, dz: Any) -> Any:
        dh *= 0.5
        return slope(h, z) * (dh + dz)

    with pytest.raises(ValueError, match="jvp wrote to its argument"):
        ic.solve(ic.Problem(f, jvp=jvp), np.zeros(2), Z, solver=ic.NewtonKrylov())
    right = ic.Problem(lambda h, z: 0.5 * out(h) + z, jvp=lambda h, z, dh, dz: 0.5 * (h > 0) * dh + dz)
    with pytest.raises(ValueError, match=WROTE):
        ic.solve(right, np.zeros(2), Z, solver=ic.NewtonKrylov())


@pytest.mark.parametrize("solver", [ic.GMRES(), ic.BiCGSTAB(), ic.CG()], ids=repr)
def test_operators_of_linear_systems(solver: ic.LinearSolver) -> None:
    """GMRES said CONVERGED, of the operator's own vectors. PyTorch hands copies."""
    slopes, b = np.array([2.0, 3.0, 5.0]), np.ones(3)

    def operator(v: Any) -> Any:
        v *= slopes
        return v

    with pytest.raises(ValueError, match="operator wrote to its argument v"):
        ic.solve_linear(operator, b, solver=solver)
    of_tensors = torch.asarray(slopes)
    solution = ic.solve_linear(lambda v: v.mul_(of_tensors), torch.asarray(b), solver=solver)
    assert solution.converged
    np.testing.assert_allclose(solution.value.numpy(), 1 / slopes, rtol=1e-4)


def test_check_tells_of_a_write_that_changes_nothing() -> None:
    report = ic.check(lambda h, z: 0.5 * out(h) + z, np.zeros(2), Z)
    assert "writes" in report.kinds()
    assert not report.ok


def test_results_are_the_users_to_write_to() -> None:
    """Also where F returns its argument, or a part of it."""
    for solver in SOLVERS:
        solution = ic.fixed_point(lambda h, z: h, np.ones(3), None, solver=solver, gradient=ic.OneStep())
        solution.value[...] = 0.0
    swapped = ic.solve(lambda h, z: {"a": h["b"], "b": h["a"]}, {"a": np.ones(2), "b": np.ones(2)}, None)
    swapped.value["a"][...] = 0.0


@pytest.mark.parametrize(
    "gradient", [ic.Neumann(3), ic.OneStep(), ic.Unroll(3), ic.Implicit(), ic.NeumannSeries(), ic.BPTT(3)], ids=str
)
def test_so_are_gradients_and_aux(gradient: ic.Estimator) -> None:
    """Also where a callback returns its argument, or a part of it."""
    h, z = np.full(2, 2.0), np.ones(2)
    by_callbacks = ic.Problem(
        lambda h, z: 0.5 * h + z, vjp=lambda h, z, v: (0.5 * v, v), jvp=lambda h, z, dh, dz: 0.5 * dh + dz
    )

    def linearize(h: Any, z: Any) -> ic.Linearization:
        return ic.Linearization(0.5 * h + z, vjp_h=lambda v: 0.5 * v, vjp_z=lambda v: v)

    for problem in (by_callbacks, ic.Problem(lambda h, z: 0.5 * h + z, linearize=linearize)):
        gradient.vjp(problem, h, z)[1](np.ones(2))[...] = 0.0
    identity = ic.Problem(lambda h, z: h + z, jvp=lambda h, z, dh, dz: dz)
    gradient.jvp(identity, h, z, np.ones(2))[1][...] = 0.0
    solution = ic.fixed_point(lambda h, z: (0.5 * h + z, {"h": h}), np.zeros(2), z, has_aux=True)
    solution.aux["h"][...] = 0.0


def test_a_write_to_the_copy_that_a_function_needs_is_refused() -> None:
    """Compiled code says that it needs writable memory, and then writes to it."""

    def f(h: Any, z: Any) -> Any:
        if not h.flags.writeable:
            raise ValueError("buffer source array is read-only")
        h += 1.0
        return 0.5 * h + z

    with pytest.raises(ValueError, match=WROTE):
        ic.solve(f, np.zeros(2), Z)


@pytest.mark.parametrize("error", [RuntimeError("could not write to the log"), OSError("Read-only file system")])
def test_an_error_that_has_nothing_to_do_with_it_is_raised(error: Exception) -> None:
    calls = []

    def f(h: Any, z: Any) -> Any:
        calls.append(h)
        if len(calls) == 1:
            raise error
        return 0.5 * h + z

    with pytest.raises(type(error), match=str(error)):
        ic.solve(f, np.zeros(2), np.ones(2))
    assert len(calls) == 1


def test_views_are_handed_out_without_a_copy() -> None:
    h = np.zeros(3)
    seen: list[Any] = []
    value = BACKEND.guarded(lambda h: (seen.append(h), h)[1], "f", "h")(h)
    assert seen[0].base is h
    assert not seen[0].flags.writeable
    assert h.flags.writeable
    assert value.flags.writeable
    assert not np.shares_memory(value, h)
    assert BACKEND.guarded(lambda h: h, "f", "h")(np.float64(1.0)) == 1.0
