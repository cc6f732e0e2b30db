"""Derivatives by PyTorch and JAX for arrays of other libraries, on the CPU, with the code that CuPy uses."""

import gc
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import Any

import array_api_strict
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from libraries import JAX, LIBRARIES, TORCH, Library, flat, unflat
from problems import CASES, Case, layer
from torch import nn

import implicit_core as ic
from implicit_core.adapters import jax as icj
from implicit_core.adapters import torch as ict
from implicit_core.adapters.jax.problem import compiled_once
from implicit_core.backend import Stream
from implicit_core.backends.torch import BACKEND as TORCH_BACKEND
from implicit_core.dlpack import borrow_derivatives

CONVERTERS: dict[str, Callable[..., ic.Problem]] = {
    "torch": lambda f, **options: borrow_derivatives(ict.problem(f, **options), "torch"),
    "jax": lambda f, **options: borrow_derivatives(icj.problem(f, **options), "jax"),
    "jax, compiled": lambda f, **options: borrow_derivatives(icj.problem(compiled_once(f), **options), "jax"),
}
LIBRARY = {"torch": TORCH, "jax": JAX, "jax, compiled": JAX}
OTHERS = [library for library in LIBRARIES if library.name.startswith(("numpy", "array_api_strict"))]
ESTIMATORS = [
    ic.OneStep(),
    ic.Neumann(4, 0.7),
    ic.Unroll(3, 0.6),
    ic.Unroll(3, 0.6, recompute=True),
    ic.Implicit(ic.GMRES(rtol=1e-12)),
]


def converted(case: Case, framework: str) -> ic.Problem:
    return CONVERTERS[framework](lambda h, z: case.f(LIBRARY[framework].xp, h, z), batch_ndim=case.batch_ndim)


# JAX compiles for each shape: all cases once, compiled, and three of them in every way.
EVERY = [
    pytest.param(case, framework, library, id=f"{case.name}-{framework}-{library.name}")
    for case in CASES
    for framework in CONVERTERS
    for library in OTHERS
    if case.name in ("layer", "pytree", "scalar(0.5)")
    or framework == "torch"
    or (framework == "jax, compiled" and library is OTHERS[0])
]


@pytest.mark.parametrize(("case", "framework", "library"), EVERY)
def test_derivatives_equal_hand_written_ones(case: Case, framework: str, library: Library) -> None:
    problem, h, z = converted(case, framework), library.array(case.oracle()), library.array(case.z)
    solver = ic.Anderson(rtol=1e-10, max_steps=30)
    for a, b in zip(
        *(ic.solve(p, library.array(case.h0), z, solver=solver) for p in (problem, case.problem(library))),
        strict=True,
    ):
        if a is not None and not isinstance(a, tuple):
            np.testing.assert_allclose(flat(library.numpy(a)), flat(library.numpy(b)), rtol=1e-6, atol=1e-8)
    v = library.array(unflat(np.linspace(-1, 1, flat(case.h0).size), case.h0))
    dz = library.array(unflat(np.linspace(1, -1, flat(case.z).size), case.z))
    for estimator in ESTIMATORS:
        pulled, pushed = [], []
        for p in (problem, case.problem(library)):
            pulled.append(estimator.vjp(p, h, z)[1](v))
            pushed.append(estimator.jvp(p, h, z, dz)[1])
        for got, expected in (pulled, pushed):
            np.testing.assert_allclose(
                flat(library.numpy(got)),
                flat(library.numpy(expected)),
                rtol=1e-8,
                atol=1e-10,
                err_msg=repr(estimator),
            )


def aligned(*shape: int) -> np.ndarray:
    """Zeros at an address that JAX accepts without a copy."""
    size = int(np.prod(shape)) * 8
    raw = np.zeros(size + 64, np.uint8)
    offset = -raw.ctypes.data % 64
    return raw[offset : offset + size].view(np.float64).reshape(shape)


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_nothing_is_copied(framework: str) -> None:
    seen: list[int] = []
    made: list[int] = []

    def address(x: Any) -> int:
        return x.data_ptr() if framework == "torch" else x.unsafe_buffer_pointer()

    def f(h: Any, z: Any) -> Any:
        value = 0.5 * h + z["x"]
        if framework == "torch" or not isinstance(value, jax.core.Tracer):
            seen.extend([address(h), address(z["x"])])
            made.append(address(value))
        return value

    h, z = aligned(4, 8), {"x": aligned(4, 8)}
    converted = CONVERTERS[framework](f, batch_ndim=1)
    converted.f(h, z)  # in PyTorch the first evaluation has a copy of h, which shows whether f writes to it
    seen.clear()
    made.clear()
    value = converted.f(h, z)
    # JAX calls f in the first evaluation alone, to compile it.
    assert seen == [h.ctypes.data, z["x"].ctypes.data]
    assert made == [value.ctypes.data]


def everything(xp: Any) -> Callable[..., Any]:
    """F of a z with all sorts of leaves."""

    def f(h: Any, z: Any) -> Any:
        shift = z["table"][z["index"]] if z["flag"] else 0.0
        assert z["name"] == "cell"
        assert z["nothing"] is None
        return xp.tanh(z["scale"] * h + z["x"] + shift)

    return f


@pytest.mark.parametrize("framework", CONVERTERS)
def test_leaves_of_every_kind(framework: str) -> None:
    z = {
        "x": np.linspace(0, 1, 3),
        "table": np.array([[0.1, 0.2, 0.3], [0.0, 0.5, 1.0]]),
        "index": 1,
        "counts": np.arange(3),
        "mask": np.array([True, False, True]),
        "scale": 0.5,
        "flag": True,
        "name": "cell",
        "nothing": None,
    }
    problem = CONVERTERS[framework](everything(LIBRARY[framework].xp))
    root = ic.solve(problem, np.zeros(3), z, solver=ic.Anderson(rtol=1e-12)).value
    np.testing.assert_allclose(root, np.tanh(0.5 * root + z["x"] + z["table"][1]), rtol=1e-10)
    z_bar = ic.Implicit(ic.GMRES(rtol=1e-12)).vjp(problem, root, z)[1](np.ones(3))
    slope = (1 - root**2) / (1 - 0.5 * (1 - root**2))
    np.testing.assert_allclose(z_bar["x"], slope, rtol=1e-8)
    np.testing.assert_allclose(z_bar["table"], np.stack([np.zeros(3), slope]), rtol=1e-8)
    assert all(z_bar[name] is None for name in ("index", "counts", "mask", "flag", "name", "nothing"))


@pytest.mark.parametrize("framework", CONVERTERS)
def test_scalars_and_read_only_arrays(framework: str) -> None:
    problem = CONVERTERS[framework](lambda h, z: 0.5 * h + z)
    frozen = np.ones(())
    frozen.flags.writeable = False
    for z in (np.float64(1.0), frozen):
        assert ic.solve(problem, np.zeros(()), z, solver=ic.Anderson(rtol=1e-9)).value == pytest.approx(2.0)
        assert ic.Implicit().vjp(problem, np.asarray(2.0), z)[1](np.asarray(1.0)) == pytest.approx(2.0)


def test_arrays_of_the_framework_itself_pass_through() -> None:
    problem = CONVERTERS["torch"](lambda h, z: 0.5 * h + z)
    z = torch.ones(3, requires_grad=True)
    solution = ic.solve(problem, torch.zeros(3), z)
    assert isinstance(solution.value, torch.Tensor)
    torch.testing.assert_close(
        ic.Neumann(30, 1.0).vjp(problem, solution.value, z)[1](torch.ones(3)), torch.full((3,), 2.0)
    )


def test_tensors_of_a_module_are_constant_unless_they_are_in_z() -> None:
    cell = nn.Linear(4, 4).double()
    nn.init.orthogonal_(cell.weight, gain=0.5)
    parameters = {name: value.detach().numpy() for name, value in cell.named_parameters()}
    x = np.linspace(-1, 1, 12).reshape(3, 4)

    def f(h: Any, z: Any) -> Any:
        return torch.tanh(torch.func.functional_call(cell, z["parameters"], (h,)) + z["x"])

    closed = CONVERTERS["torch"](lambda h, x: torch.tanh(cell(h) + x), batch_ndim=1)
    explicit = CONVERTERS["torch"](f, batch_ndim=1)
    z = {"x": x, "parameters": parameters}
    root = ic.solve(closed, np.zeros_like(x), x, solver=ic.Anderson(rtol=1e-11)).value
    z_bar = ic.Neumann(5, 0.5).vjp(explicit, root, z)[1](np.ones_like(x))
    np.testing.assert_allclose(ic.Neumann(5, 0.5).vjp(closed, root, x)[1](np.ones_like(x)), z_bar["x"], rtol=1e-10)
    assert cell.weight.grad is None
    value = ic.fixed_point(
        lambda h, x: torch.tanh(cell(h) + x),
        torch.zeros(3, 4, dtype=torch.float64),
        torch.from_numpy(x),
        solver=ic.Anderson(rtol=1e-11),
        gradient=ic.Neumann(5, 0.5),
        batch_ndim=1,
    ).value
    value.sum().backward()
    np.testing.assert_allclose(z_bar["parameters"]["weight"], cell.weight.grad.numpy(), rtol=1e-8, atol=1e-10)


def test_compiled_programs_are_made_once() -> None:
    traced = 0

    def f(h: Any, z: Any) -> Any:
        nonlocal traced
        traced += 1
        return jnp.tanh(z["scale"] * h @ z["w"].T + z["x"])

    case = layer()
    z, problem = {**case.z, "scale": 1.0}, CONVERTERS["jax, compiled"](f, batch_ndim=1)
    v = np.ones_like(case.h0)

    def all_there_is(z: Any) -> None:
        root = ic.solve(problem, case.h0, z).value
        for estimator in ESTIMATORS:
            estimator.vjp(problem, root, z)[1](v)
            estimator.jvp(problem, root, z, z)

    all_there_is(z)
    once = traced
    assert once <= 3, "the value, the linearization and the pushforward"
    for _ in range(3):
        all_there_is({**z, "x": 2 * z["x"]})
    assert traced == once
    all_there_is({**z, "scale": 0.9})
    assert once < traced <= 2 * once, "a number in z is part of the program"


def test_static_leaves_must_be_hashable() -> None:
    class Unhashable:
        __hash__ = None  # type: ignore[assignment]

    problem = CONVERTERS["jax, compiled"](lambda h, z: 0.5 * h + z[0])
    with pytest.raises(TypeError, match="must be hashable, got a leaf of type Unhashable"):
        ic.solve(problem, np.zeros(3), (np.ones(3), Unhashable()))


def test_a_derivative_that_the_framework_lacks() -> None:
    @jax.custom_vjp
    def g(x: jax.Array) -> jax.Array:
        return jnp.tanh(x)

    g.defvjp(lambda x: (jnp.tanh(x), jnp.tanh(x)), lambda y, v: (v * (1 - y**2),))
    for framework in ("jax", "jax, compiled"):
        problem = CONVERTERS[framework](lambda h, z: g(0.5 * h + z))
        h, z = np.full(3, 0.3), np.linspace(0, 1, 3)
        z_bar = ic.OneStep().vjp(problem, h, z)[1](np.ones(3))
        np.testing.assert_allclose(z_bar, 1 - np.tanh(0.5 * h + z) ** 2, rtol=1e-10)
        with pytest.raises((NotImplementedError, TypeError), match=r"JVP of F|custom_vjp"):
            ic.OneStep().jvp(problem, h, z, z)


@pytest.mark.parametrize("framework", CONVERTERS)
def test_arguments_that_are_not_functions_are_refused(framework: str) -> None:
    with pytest.raises(TypeError, match="f must be callable, got 3 of type int"):
        CONVERTERS[framework](3)


def test_an_unknown_framework_is_named() -> None:
    with pytest.raises(ValueError, match="no backend for 'numppy'"):
        borrow_derivatives(ic.Problem(lambda h, z: h), "numppy")


def test_a_solve_is_refused_in_jaxs_single_precision() -> None:
    code = (
        "import numpy as np, jax.numpy as jnp, implicit_core as ic\n"
        "from implicit_core.adapters import jax as icj\n"
        "from implicit_core.dlpack import borrow_derivatives\n"
        "problem = borrow_derivatives(icj.problem(lambda h, z: 0.5 * h + z), 'jax')\n"
        "print(ic.solve(problem, np.zeros(2, np.float32), np.ones(2, np.float32)).converged)\n"
        "ic.solve(problem, np.zeros(2), np.ones(2))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "True\n"
    assert "TypeError: JAX converts float64 to float32: call jax.config.update" in done.stderr


@pytest.mark.parametrize("framework", CONVERTERS)
def test_nothing_outlives_its_use(framework: str) -> None:
    problem = CONVERTERS[framework](lambda h, z: 0.5 * h + z)
    z = np.ones(3)
    value, pullback = ic.Unroll(3, 0.5).vjp(problem, np.zeros(3), z)
    watched = [weakref.ref(x) for x in (z, value)]
    pullback(np.ones(3))
    del z, value, pullback
    gc.collect()
    assert [watch() for watch in watched] == [None, None]


def test_the_adapter_of_cupy_uses_the_same_functions() -> None:
    """``from_torch`` and ``from_jax`` take NumPy's arrays as well."""
    icc = pytest.importorskip("implicit_core.adapters.cupy", reason="CuPy is not installed", exc_type=ImportError)
    case = layer()
    roots = [
        ic.solve(make(lambda h, z, xp=xp: case.f(xp, h, z), batch_ndim=1), case.h0, case.z).value
        for make, xp in ((icc.from_torch, TORCH.xp), (icc.from_jax, JAX.xp))
    ]
    for root in roots:
        np.testing.assert_allclose(root, case.oracle(), rtol=1e-4, atol=1e-5)
    assert isinstance(roots[0], np.ndarray)


def test_arrays_of_another_device_are_refused() -> None:
    elsewhere = array_api_strict.zeros(3, device=array_api_strict.Device("device1"))
    problem = CONVERTERS["torch"](lambda h, z: 0.5 * h + z)
    with pytest.raises((BufferError, RuntimeError, ValueError, TypeError)):
        ic.solve(problem, elsewhere, elsewhere)


@pytest.mark.parametrize(
    "gradient", [ic.Neumann(4, 0.5), ic.Unroll(3, 0.5), ic.Implicit(ic.GMRES(rtol=1e-11))], ids=repr
)
def test_a_compiled_problem_is_one_of_the_layer_too(gradient: ic.Estimator) -> None:
    case = layer(batch=2, width=3)
    h0, z = JAX.array(case.h0), JAX.array(case.z)

    def loss(w: jax.Array, jit: bool) -> jax.Array:
        problem = icj.problem(lambda h, z: case.f(JAX.xp, h, z), batch_ndim=1, jit=jit)
        solver = ic.Anderson(rtol=1e-11)
        return (icj.fixed_point(problem, h0, {**z, "w": w}, solver=solver, gradient=gradient).value ** 2).sum()

    compiled = (jax.jit(derivative(loss), static_argnums=1) for derivative in (jax.grad, jax.hessian))
    for derivative in (jax.grad(loss), *compiled):
        np.testing.assert_allclose(derivative(z["w"], True), derivative(z["w"], False), rtol=1e-8, atol=1e-10)


VIEWS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "reversed": lambda x: x[::-1].copy()[::-1],
    "both axes reversed": lambda x: x[::-1, ::-1].copy()[::-1, ::-1],
    "broadcast": lambda x: np.broadcast_to(x[:1], x.shape),
    "strided": lambda x: np.repeat(x, 2, axis=1)[:, ::2],
    "transposed": lambda x: x.T.copy().T,
    "read-only and reversed": lambda x: _sealed(x[::-1].copy()[::-1]),
}


def _sealed(x: np.ndarray) -> np.ndarray:
    x.flags.writeable = False
    return x


@pytest.mark.parametrize("framework", CONVERTERS)
@pytest.mark.parametrize("view", VIEWS)
def test_views_are_lent_as_copies(framework: str, view: str) -> None:
    """JAX ends the process on some of them, which an exception handler cannot prevent."""
    make = VIEWS[view]
    x, h, v = (make(np.linspace(a, 1.0, 12).reshape(3, 4)) for a in (-1.0, 0.0, 0.5))
    problem = CONVERTERS[framework](lambda h, z: 0.5 * h * z + z)
    z_bar = ic.OneStep().vjp(problem, h, x)[1](v)
    np.testing.assert_allclose(problem(h, x), 0.5 * h * x + x, rtol=1e-12)
    np.testing.assert_allclose(z_bar, (0.5 * h + 1.0) * v, rtol=1e-12)
    root = ic.solve(problem, h, x, solver=ic.Anderson(rtol=1e-12)).value
    np.testing.assert_allclose(root, x / (1 - 0.5 * x), rtol=1e-9)


@pytest.mark.parametrize("framework", CONVERTERS)
def test_views_that_the_framework_returns(framework: str) -> None:
    problem = CONVERTERS[framework](lambda h, z: 0.5 * h + LIBRARY[framework].xp.broadcast_to(z, h.shape).T.T)
    h, z = np.zeros((3, 4)), np.arange(4.0)
    np.testing.assert_allclose(ic.OneStep().vjp(problem, h, z)[1](np.ones((3, 4))), 3 * np.ones(4))
    constant = CONVERTERS[framework](lambda h, z: LIBRARY[framework].xp.broadcast_to(z, h.shape))
    np.testing.assert_allclose(ic.solve(constant, h, z).value, np.broadcast_to(z, (3, 4)))


@pytest.mark.parametrize(("address", "expected"), [(0, "default"), (1, "default"), (4096, "external 4096")])
def test_a_stream_of_another_framework_in_torch(address: int, expected: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: f"default of {device}")
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda address, device: f"external {address} of {device}")
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    assert TORCH_BACKEND.streams.use(Stream(3, address)) == f"{expected} of 3"


def test_torch_refuses_the_per_thread_default_stream() -> None:
    """DLPack does not take it, and memory that PyTorch frees would be reused in the order of another stream."""
    with pytest.raises(NotImplementedError, match=r"per-thread default stream\. Make another stream the current one"):
        TORCH_BACKEND.streams.use(Stream(0, 2))
