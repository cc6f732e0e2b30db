"""The text of CuPy's kernels, compiled for the processor, and the methods that launch them, on NumPy arrays.

What is CuPy's own, its arrays and its compiler, can't be had without a GPU; what is ours is the same.
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import array_api_compat.numpy
import numpy as np
import pytest
from libraries import flat
from problems import CASES, Case, layer

import implicit_core as ic
from implicit_core.backend import Backend
from implicit_core.backends import numpy as numpy_backend

if sys.platform != "linux":
    pytest.skip("CuPy is not installed on this platform", allow_module_level=True)

import kernels
from kernels import HostKernel

from implicit_core.adapters import cupy as icc
from implicit_core.adapters.cupy.pointwise import Pointwise
from implicit_core.backends import cupy as module

pytestmark = pytest.mark.skipif(kernels.COMPILER is None, reason="no C++ compiler was found")
NAMES = ["_AXPY", "_AXPY_NUMBER", "_PRODUCTS", "_LARGEST", "_COMBINED", "_COMBINED_ONTO"]
TYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64])
PORTABLE = Backend("numpy", array_api_compat.numpy, (np.ndarray, np.generic))


class OnHost(module.CuPyBackend):
    """CuPy's backend, for NumPy arrays."""

    on_device_of = Backend.on_device_of
    streams = None


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[OnHost]:
    """The backend of all NumPy arrays while a test runs."""
    names = ["empty", "ndarray", "linalg", "concatenate", "hypot", "maximum"]
    numpys = {name: getattr(np, name) for name in names}
    kernel = module.cupy.ElementwiseKernel
    monkeypatch.setattr(module, "cupy", SimpleNamespace(ElementwiseKernel=lambda *a: HostKernel(kernel(*a)), **numpys))
    for name in NAMES:
        monkeypatch.setattr(module, name, HostKernel(getattr(module, name)))
    instance = OnHost("numpy", array_api_compat.numpy, (np.ndarray, np.generic), space=module.CuPySpace)
    monkeypatch.setattr(numpy_backend, "BACKEND", instance)
    module._solve_kernel.cache_clear()
    yield instance
    module._solve_kernel.cache_clear()


def normal(*shape: int, dtype: Any = np.float64, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def close(got: np.ndarray, expected: np.ndarray) -> None:
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    tolerance = 2e-5 if got.dtype == np.float32 else 1e-12
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)


def spaces(backend: OnHost, x: np.ndarray) -> list[Any]:
    """The space of states (N, D) with CuPy's kernels, and the portable one."""
    return [backend.space(x, 1), PORTABLE.space(x, 1)]


# Each method against the portable spelling.


@TYPES
def test_sums_of_products(backend: OnHost, dtype: Any) -> None:
    row, history, weights = normal(3, 1, 7, dtype=dtype), normal(3, 5, 7, dtype=dtype), normal(3, 1, 5, dtype=dtype)
    ours, theirs = spaces(backend, row[:, 0])
    close(ours.products((row,), (history,)), theirs.products((row,), (history,)))
    two = np.concatenate([row, -row], axis=1)
    close(ours.products((two,), (history,)), theirs.products((two,), (history,)))
    close(*(space.combine(weights, (history,))[0] for space in (ours, theirs)))
    close(*(space.combine(weights, (history,), (row,))[0] for space in (ours, theirs)))


@TYPES
def test_a_x_plus_y(backend: OnHost, dtype: Any) -> None:
    x, y, each = normal(4, 6, dtype=dtype), normal(4, 6, dtype=dtype, seed=1), normal(4, 1, dtype=dtype)
    matrices, scaling, floor = normal(3, 2, 2, dtype=dtype), normal(2, 2, dtype=dtype), normal(2, 2, dtype=dtype)
    for arguments in (0.3, x, y), (each, x, y), (matrices, scaling, floor), (1e-5, each, np.asarray(1e-8, dtype)):
        close(*(space.multiply_add(*arguments) for space in spaces(backend, x)))


@TYPES
@pytest.mark.parametrize("length", [1, 2, 3, 8])
def test_the_largest_of_numbers_that_are_not_finite(backend: OnHost, dtype: Any, length: int) -> None:
    inf, nan = np.inf, np.nan
    ours, theirs = spaces(backend, np.zeros((2, length), dtype))
    for special in (1.0, -3.0, inf, -inf, nan, 0.0, -0.0, 1e-30):
        for place in range(length):
            x = np.full((2, length), -0.5, dtype)
            x[1, place] = special
            np.testing.assert_array_equal(ours.largest((x,)), theirs.largest((x,)))
    np.testing.assert_array_equal(ours.largest((np.full((2, length), -inf, dtype),)), [[inf], [inf]])


@TYPES
@pytest.mark.parametrize("m", [1, 2, 3, 5, 8, 20, 32, 33])
def test_small_systems(backend: OnHost, dtype: Any, m: int) -> None:
    space, _ = spaces(backend, np.zeros((6, 1), dtype))
    a = normal(6, m, m)
    systems = {
        "positive definite": a @ a.transpose(0, 2, 1) + m * np.eye(m),
        "upper": np.triu(a) + m * np.eye(m),
        "lower": np.tril(a) + m * np.eye(m),
    }
    row = normal(6, 1, m, dtype=dtype, seed=1)
    for matrix in systems.values():
        got = space.solve_rows(matrix.astype(dtype), row)
        assert got.dtype == dtype
        expected = row @ np.linalg.inv(matrix.astype(dtype).astype(np.float64))
        np.testing.assert_allclose(got, expected, rtol=1e-3 if dtype == np.float32 else 1e-10, atol=1e-5)
    spoiled = systems["positive definite"].astype(dtype)
    before = space.solve_rows(spoiled, row)
    spoiled[2] = np.nan
    after = space.solve_rows(spoiled, row)
    assert np.isnan(after[2]).all()
    np.testing.assert_array_equal(np.delete(after, 2, 0), np.delete(before, 2, 0))


def test_a_gram_matrix_a_row_at_a_time(backend: OnHost) -> None:
    ours, theirs = spaces(backend, np.zeros((3, 9)))
    gram, history = (np.zeros((3, 4, 4)),), (np.zeros((3, 4, 9)),)
    for step in range(6):
        history = ours.set_row(history, step % 4, (normal(3, 9, seed=step),))
        gram = ours.gram(gram, history, step % 4)
        close(gram[0], theirs.gram(gram, history, step % 4)[0])


def test_rows_entries_and_counts(backend: OnHost) -> None:
    history, row = normal(3, 4, 5), normal(3, 1, 5)
    space, _ = spaces(backend, row[:, 0])
    for new in (row, row[:, 0, :]):
        close(space.set_row((history.copy(),), 2, (new,))[0][:, 2], row[:, 0])
    close(space.take(row, 3, axis=2), row[:, :, 3:4])
    counts = space.plus_one(np.ones((3, 1), np.int32), np.array([[True], [False], [True]]))
    assert counts.dtype == np.int32
    assert counts.tolist() == [[2], [1], [2]]


def test_norms_of_several_leaves(backend: OnHost) -> None:
    like = {"a": normal(3, 2), "b": normal(3, 4, seed=1), "empty": np.zeros((3, 0))}
    ours, theirs = (b.space(like, 1) for b in (backend, PORTABLE))
    x = ours.pack(like)
    close(ours.norm(x), theirs.norm(x))
    close(ours.largest(x), theirs.largest(x))


def test_empty_leaves(backend: OnHost) -> None:
    """A leaf of size zero."""
    empty, weights = np.zeros((3, 4, 0)), np.zeros((3, 1, 4))
    space, _ = spaces(backend, np.zeros((3, 0)))
    assert space.combine(weights, (empty,))[0].shape == (3, 1, 0)
    assert space.products((empty[:, :1],), (empty,)).tolist() == np.zeros((3, 1, 4)).tolist()


# The solvers and estimators on this backend.


@pytest.mark.parametrize(
    "solver",
    [ic.FixedPointIteration(damping=0.8), ic.Anderson(rtol=1e-9), ic.Broyden(rtol=1e-9), ic.NewtonKrylov(rtol=1e-9)],
    ids=lambda solver: type(solver).__name__,
)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_problem(backend: OnHost, case: Case, solver: ic.Solver, monkeypatch: pytest.MonkeyPatch) -> None:
    got = ic.solve(case.problem(), case.h0, case.z, solver=solver)
    monkeypatch.setattr(numpy_backend, "BACKEND", PORTABLE)
    expected = ic.solve(case.problem(), case.h0, case.z, solver=solver)
    np.testing.assert_array_equal(got.status, expected.status)
    if np.all(expected.converged):
        np.testing.assert_allclose(flat(got.value), flat(expected.value), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("gradient", [ic.Implicit(ic.GMRES(rtol=1e-9)), ic.Implicit(ic.BiCGSTAB(rtol=1e-9))], ids=repr)
def test_linear_solvers(backend: OnHost, gradient: ic.Estimator, monkeypatch: pytest.MonkeyPatch) -> None:
    case = layer()
    root = case.oracle()
    pulled = []
    for used in (backend, PORTABLE):
        monkeypatch.setattr(numpy_backend, "BACKEND", used)
        pulled.append(flat(gradient.vjp(case.problem(), root, case.z)[1](np.ones_like(root))))
    np.testing.assert_allclose(pulled[0], pulled[1], rtol=1e-7, atol=1e-9)


# Functions of each element.


class HostPointwise(Pointwise):
    """``Pointwise`` with its kernels on NumPy arrays."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._value, self._vjp, self._jvp = map(HostKernel, (self._value, self._vjp, self._jvp))


POINTWISE = {
    "tanh": (("a, x", "tanh(a + x)"), {"slopes": "1 - y * y"}),
    "each": (("a, x", "tanh(a + x)"), {"slopes": ["1 - y * y", "1 - y * y"]}),
    "product": (("a, b", "a * b"), {"slopes": ["b", "a"]}),
    "one": (("a", "a * sigmoid(a)"), {"slopes": "sigmoid(a) + y * (1 - sigmoid(a))"}),
    "three": (("a, b, c", "exp(-a * b) + c"), {"slopes": ["-b * exp(-a * b)", "-a * exp(-a * b)", "1"]}),
}
SIGMOID = "template <typename T> static T sigmoid(T x) { return 1 / (1 + exp(-x)); }"


@pytest.mark.parametrize("shapes", [[(3, 4), (3, 4), (3, 4)], [(3, 4), (4,), (3, 1)], [(2, 3, 4), (3, 1), ()]])
@pytest.mark.parametrize("name", POINTWISE)
def test_pointwise_functions_and_their_derivatives(name: str, shapes: list[tuple[int, ...]]) -> None:
    """Compared with central differences, added up over broadcast axes."""
    arguments, options = POINTWISE[name]
    phi = HostPointwise(*arguments, **options, preamble=SIGMOID)
    count = len(arguments[0].split(","))
    inputs = [normal(*shape, seed=i) for i, shape in enumerate(shapes[:count])]
    inputs = [np.asarray(a) for a in inputs]
    y = phi(*inputs)
    v, tangents = normal(*y.shape, seed=7), [normal(*a.shape, seed=8 + i) for i, a in enumerate(inputs)]
    step = 1e-6
    slopes = []
    for i, a in enumerate(inputs):
        shifted = [phi(*inputs[:i], a + s * step, *inputs[i + 1 :]) for s in (1, -1)]
        slopes.append((shifted[0] - shifted[1]) / (2 * step))
    cotangents = phi.vjp(v, y, *inputs)
    for a, slope, cotangent in zip(inputs, slopes, cotangents, strict=True):
        expected = v * slope
        missing = expected.ndim - a.ndim
        axes = (*range(missing), *(missing + j for j in range(a.ndim) if a.shape[j] == 1))
        expected = expected.sum(axis=axes).reshape(a.shape)
        assert cotangent.shape == a.shape
        np.testing.assert_allclose(cotangent, expected, rtol=1e-7, atol=1e-8)
    expected = sum(slope * np.asarray(d) for slope, d in zip(slopes, tangents, strict=True))
    np.testing.assert_allclose(phi.jvp(tangents, y, *inputs), expected, rtol=1e-7, atol=1e-8)


def test_one_slope_is_one_kernel_with_one_result() -> None:
    phi = HostPointwise("a, x", "tanh(a + x)", slopes="1 - y * y")
    a, x = normal(3, 4), normal(3, 4, seed=1)
    y = phi(a, x)
    first, second = phi.vjp(np.ones_like(y), y, a, x)
    assert first is second
    close(phi.jvp((0.0, np.ones_like(x)), y, a, x), first)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("a, y", "a + y"), {"slopes": "1"}, "names other than i, n, v, y"),
        (("a, g_0", "a"), {"slopes": "1"}, "got 'g_0'"),
        (("2a", "a"), {"slopes": "1"}, "got '2a'"),
        (("a, a", "a"), {"slopes": "1"}, "different names"),
        (("a, b", "a * b"), {"slopes": ["b"]}, "one for each of"),
        (("T", "T"), {"slopes": "1"}, "got 'T'"),
    ],
)
def test_names_and_expressions_that_do_not_fit(arguments: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        icc.Pointwise(*arguments, **options)


@pytest.mark.parametrize(
    ("arguments", "slopes", "message"),
    [
        ((3, "a"), "1", "arguments must be a str"),
        (("a", 3), "1", "value must be a str"),
        (("a", "a"), 3, "slopes must be a Sequence"),
        (("a", "a"), [3], "each of slopes must be a str"),
    ],
)
def test_arguments_that_are_not_text(arguments: Any, slopes: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        icc.Pointwise(*arguments, slopes=slopes)


def test_repr_of_a_pointwise_function() -> None:
    assert repr(icc.Pointwise("a, x", "tanh(a + x)", slopes="1 - y * y")) == "Pointwise('a, x', 'tanh(a + x)')"


def test_a_wrong_number_of_arguments() -> None:
    phi = icc.Pointwise("a, x", "tanh(a + x)", slopes="1 - y * y")
    with pytest.raises(TypeError, match=r"arguments must be one for each of \['a', 'x'\], got 1"):
        phi(np.ones(3))
    with pytest.raises(TypeError, match="tangents must be one for each"):
        phi.jvp([np.ones(3)], np.ones(3), np.ones(3), np.ones(3))


def test_a_problem_without_derivatives_says_where_to_get_them() -> None:
    with pytest.raises(TypeError, match="give problem\\(\\) a vjp, a jvp or a linearize, or borrow"):
        icc.problem(lambda h, z: h)
    assert isinstance(icc.problem(lambda h, z: h, jvp=lambda h, z, dh, dz: dh), ic.Problem)


@pytest.mark.parametrize(
    "estimator", [ic.Implicit(ic.GMRES(rtol=1e-4)), ic.Unroll(5, 0.5), ic.Neumann(5, 0.5)], ids=repr
)
def test_the_demos_model(backend: OnHost, estimator: ic.Estimator, monkeypatch: pytest.MonkeyPatch) -> None:
    """CuPy's model on NumPy arrays has the same steps, gradients, labels and counts as NumPy's."""
    from implicit_core.examples.digits import model_cupy
    from implicit_core.examples.digits.model import PIXELS, initial_parameters
    from implicit_core.examples.digits.model_numpy import NumPyModel

    monkeypatch.setattr(model_cupy, "cupy", SimpleNamespace(asarray=np.asarray, asnumpy=np.asarray))
    monkeypatch.setattr(model_cupy, "PHI", HostPointwise("a, u, b", "tanh(a + u + b)", slopes="1 - y * y"))
    images = normal(16, PIXELS, dtype=np.float32)
    labels = np.arange(16) % 10
    models = [create(initial_parameters(0), estimator) for create in (NumPyModel, model_cupy.CuPyModel)]
    found = []
    for model in models:
        losses = [model.train_step(images, labels) for _ in range(3)]
        gradient = flat(model.gradient(images, labels))
        found.append((losses, gradient, model.predict(images), flat(model.parameters()), model.counts))
    for expected, got in zip(found[0][:-1], found[1][:-1], strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    assert found[0][-1] == found[1][-1]


# The same text is what a GPU can run.


@pytest.mark.skipif(kernels.NVCC is None, reason="nvcc was not found")
def test_the_text_compiles_for_a_gpu(tmp_path: Path) -> None:
    phi = icc.Pointwise("a, x", "tanh(a + x)", slopes="1 - y * y")
    found = [*(getattr(module, name) for name in NAMES), module._solve_kernel(5), module._solve_kernel(32)]
    texts = []
    for i, kernel in enumerate([*found, phi._value, phi._vjp, phi._jvp]):
        for typename in ("float", "double"):
            text = HostKernel(kernel).source(typename, 'extern "C" __global__ void run')
            texts.append(
                f"namespace k{i}{typename} {{\n{text.replace('[](T a', '[] __device__ (T a')}\n}}\n#undef REDUCE"
            )
    path = tmp_path / "kernels.cu"
    path.write_text("\n".join(texts).replace('extern "C" ', ""))
    command = [kernels.NVCC, "--extended-lambda", "-ptx", "-o", str(tmp_path / "kernels.ptx"), str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
