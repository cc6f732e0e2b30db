"""Arrays that a solve cannot compute with are refused in words; numbers are arrays where that is meant."""

import math
import warnings
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from libraries import Library

import implicit_core as ic
from implicit_core import theory
from implicit_core.solution import find_failures

ROOT_OF_COS = 0.7390851332151607


with warnings.catch_warnings(action="ignore"):
    MATRIX = np.matrix([[1.0, 2.0]])


class Metres(np.ndarray):
    """Stands for a class that carries a unit."""


def masked() -> Any:
    return np.ma.masked_invalid([1.0, np.nan, 3.0])


def affine(h: Any, z: Any) -> Any:
    return 0.5 * h + 1.0


REFUSED = {
    "masked": (masked(), r"masked array.*h0\.filled"),
    "matrix": (MATRIX, r"numpy\.matrix.*np\.asarray\(h0\)"),
    "unit": (np.ones(3).view(Metres), r"Metres.*np\.asarray\(h0\)"),
    "longdouble": (np.ones(3, np.longdouble), r"linear algebra.*h0\.astype\(float\)"),
    "big-endian": (np.ones(3, ">f8"), r"byte order.*h0\.astype\(h0\.dtype\.newbyteorder"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize(
    "solver", [ic.Anderson(), ic.FixedPointIteration(), ic.Broyden(), lambda p, h, z: h], ids=lambda s: type(s).__name__
)
def test_states_are_refused(kind: str, solver: Any) -> None:
    h0, message = REFUSED[kind]
    for call in (ic.solve, ic.fixed_point):
        with pytest.raises(TypeError, match=message):
            call(affine, h0, None, solver=solver)
        with pytest.raises(TypeError, match=message):
            call(lambda h, z: h, {"a": np.ones(h0.shape), "b": h0}, None, solver=solver)


@pytest.mark.parametrize("kind", REFUSED)
def test_right_sides_and_points_of_certificates_are_refused(kind: str) -> None:
    array, message = REFUSED[kind]
    with pytest.raises(TypeError, match=message.replace("h0", "b")):
        ic.solve_linear(lambda v: 2 * v, array)
    problem = ic.Problem(affine, vjp=lambda h, z, v: (0.5 * v, v), jvp=lambda h, z, dh, dz: 0.5 * dh + dz)
    with pytest.raises(TypeError, match=message.replace("h0", "h")):
        theory.certify(problem, array, np.ones(array.shape), ic.OneStep())


@pytest.mark.parametrize("kind", REFUSED)
def test_results_are_refused(kind: str) -> None:
    array, _ = REFUSED[kind]
    with pytest.raises(TypeError, match=r"the result of f must"):
        ic.solve(lambda h, z: array, np.ones(array.shape), None)
    problem = ic.Problem(lambda h, z: 0.5 * h, vjp=lambda h, z, v: (array, v))
    with pytest.raises(TypeError, match="the h-cotangent from vjp must"):
        ic.Neumann(2, 1.0).vjp(problem, np.ones(array.shape), np.ones(array.shape))[1](np.ones(array.shape))


@pytest.mark.parametrize("z", [masked(), {"a": [masked()]}, (1.0, masked())])
def test_masked_inputs_are_refused(z: Any) -> None:
    for call in (ic.solve, ic.fixed_point):
        with pytest.raises(TypeError, match=r"z must not hold masked arrays.*z\.filled"):
            call(affine, np.zeros(3), z)
    with pytest.raises(TypeError, match="z must not hold masked arrays"):
        ic.OneStep().vjp(ic.Problem(affine, vjp=lambda h, z, v: (v, v)), np.zeros(3), z)
    with pytest.raises(TypeError, match="h0 must not hold masked arrays"):
        ic.fixed_point(lambda h, z: 0.5 * h + z, masked(), torch.ones(3))


def test_other_objects_in_z_are_left_alone() -> None:
    class Mask:
        mask = filled = True

    z = {"mask": Mask(), "matrix": MATRIX, 3: np.ones(3, np.longdouble), "f": math.cos, "none": None}
    assert ic.solve(affine, np.zeros(3), z).converged


def test_memory_maps_are_arrays(tmp_path: Any) -> None:
    h0 = np.memmap(tmp_path / "h0", dtype=float, mode="w+", shape=(3,))
    np.testing.assert_allclose(ic.solve(affine, h0, None, solver=ic.Anderson(rtol=1e-12)).value, 2.0, rtol=1e-10)


def test_inputs_of_the_other_byte_order() -> None:
    """The cotangent of such a z has the machine's order, since arithmetic returns that."""
    z = np.array([1.0, 2.0], ">f8")
    problem = ic.Problem(lambda h, z: 0.5 * h + z, vjp=lambda h, z, v: (0.5 * v, v))
    np.testing.assert_allclose(ic.solve(problem, np.zeros(2), z, solver=ic.Anderson(rtol=1e-12)).value, 2 * z)
    z_bar = ic.Implicit(ic.GMRES(rtol=1e-12)).vjp(problem, np.zeros(2), z)[1](np.array([1.0, 3.0]))
    np.testing.assert_allclose(z_bar, [2.0, 6.0])


@pytest.mark.parametrize(
    "solver", [ic.Anderson(rtol=1e-10), ic.Broyden(rtol=1e-10), ic.FixedPointIteration(rtol=1e-10)]
)
def test_a_float_is_an_array_without_axes(library: Library, solver: ic.Solver) -> None:
    h0 = library.array(np.asarray(0.5))
    solution = ic.solve(lambda h, z: math.cos(h), h0, None, solver=solver)
    assert type(solution.value) is type(library.array(np.asarray(0.5)) + 0.0) or library.name.startswith("numpy")
    assert float(solution.value) == pytest.approx(ROOT_OF_COS, rel=1e-8)
    pair = ic.solve(lambda h, z: {"a": math.cos(h["a"]), "b": h["a"]}, {"a": h0, "b": h0}, None, solver=solver).value
    assert (float(pair["a"]), float(pair["b"])) == pytest.approx((ROOT_OF_COS, ROOT_OF_COS), rel=1e-8)


def test_a_float_in_single_precision() -> None:
    solution = ic.solve(lambda h, z: math.cos(h), np.asarray(0.5, np.float32), None)
    assert solution.value.dtype == np.float32
    assert float(solution.value) == pytest.approx(ROOT_OF_COS, rel=1e-4)


def test_floats_of_callbacks() -> None:
    problem = ic.Problem(
        lambda h, z: math.cos(h) * float(z), vjp=lambda h, z, v: (-math.sin(h) * float(z) * float(v), math.cos(h) * v)
    )
    h = np.asarray(ROOT_OF_COS)
    z_bar = ic.Implicit().vjp(problem, h, np.asarray(1.0))[1](np.asarray(1.0))
    assert float(z_bar) == pytest.approx(math.cos(ROOT_OF_COS) / (1 + math.sin(ROOT_OF_COS)), rel=1e-5)
    assert float(ic.fixed_point(lambda h, z: math.cos(h), h, None).value) == pytest.approx(ROOT_OF_COS)


@pytest.mark.parametrize("value", [1, True, "1"])
def test_other_numbers_are_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="result of f must hold arrays of numpy"):
        ic.solve(lambda h, z: value, np.asarray(0.5), None)


def test_a_float_for_an_array_with_axes_is_refused() -> None:
    with pytest.raises(TypeError, match=r"result of f must hold arrays of numpy.*0\.5"):
        ic.solve(lambda h, z: 0.5, np.ones(1), None)


@pytest.mark.parametrize("gradient", [ic.Unroll(2, 0.5), ic.Unroll(2, 1.0), ic.Neumann(2, 0.5), ic.BPTT(2)], ids=repr)
def test_a_float_has_no_gradient(gradient: ic.Estimator) -> None:
    z = torch.ones((), requires_grad=True)
    with pytest.raises(TypeError, match=r"result of f must hold arrays of torch.*float"):
        ic.fixed_point(lambda h, z: math.cos(h.item()), torch.tensor(0.5), z, gradient=gradient)


@pytest.mark.parametrize("name", ["throw", "trace"])
@pytest.mark.parametrize("value", ["no", 1, None])
def test_flags_are_booleans(name: str, value: Any) -> None:
    for call in (ic.solve, ic.fixed_point):
        with pytest.raises(TypeError, match=f"{name} must be a bool"):
            call(affine, np.zeros(3), None, **{name: value})


def test_failed_samples_are_found_with_two_reads(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = library.array(np.array([[0, 1, 2], [3, 0, 1]], np.int32))
    residual = library.array(np.array([[0.0, 1.5, 2.5], [3.5, 0.0, 4.5]], np.float32))
    if library.name in ("torch", "jax"):
        kind, reads = type(failed), list[str]()
        for name in ("__bool__", "__int__", "__float__", "__array__", "item", "tolist", "__getitem__"):
            original = getattr(kind, name)

            def counted(self: Any, *args: Any, _name: str = name, _original: Any = original, **options: Any) -> Any:
                reads.append(_name)
                return _original(self, *args, **options)

            monkeypatch.setattr(kind, name, counted)
        failures = find_failures(failed, residual)
        assert [name for name in reads if name != "__array__"] == ["__bool__", "tolist"]
        assert find_failures(0 * failed, residual) == ()
    else:
        failures = find_failures(failed, residual)
    assert {(f.status.name, f.samples, f.residual) for f in failures} == {
        ("MAX_STEPS", ((0, 1), (1, 2)), 4.5),
        ("NONFINITE", ((0, 2),), 2.5),
        ("STAGNATED", ((1, 0),), 3.5),
    }


@pytest.mark.parametrize("z", [torch.ones(3), jnp.ones(3)], ids=["torch", "jax"])
@pytest.mark.parametrize(
    ("h0", "advice"),
    [
        (np.ones(3, np.longdouble), r"write h0.astype\(float\)"),
        (np.ones(3, ">f8"), "byte order"),
        (np.ma.array([1.0, 2.0, 3.0], mask=[0, 1, 0]), r"write h0.filled"),
    ],
)
def test_a_start_of_numpy_beside_arrays_of_a_framework_is_refused_in_words(h0: Any, advice: str, z: Any) -> None:
    with pytest.raises(TypeError, match=advice):
        ic.fixed_point(lambda h, z: 0.5 * h + z, h0, z)


def test_magnitudes_of_masked_arrays_are_refused() -> None:
    with pytest.raises(TypeError, match="masked"):
        ic.magnitudes({"a": np.ma.array([3.0, 4.0], mask=[0, 1])})
