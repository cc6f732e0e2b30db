"""A start of Python numbers or NumPy arrays is one of the framework that F computes in."""

import math
from collections.abc import Callable
from typing import Any

import array_api_strict
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import implicit_core as ic

ROOT = 0.7390851332151607
"""h = cos(h)."""
SLOPE = ROOT / (1 + math.sin(ROOT))
"""d h / d w of h = w cos(h) at w = 1: cos(h) / (1 + sin(h))."""
SOLVER = ic.FixedPointIteration(rtol=1e-13, max_steps=200)
SCALARS = {
    "float": 0.5,
    "int": 1,
    "float64": np.float64(0.5),
    "array": np.asarray(0.5),
    "vector": np.full(3, 0.5),
    "read-only": np.broadcast_to(np.asarray(0.5), (3,)),
}


def cos(h: Any, w: Any) -> Any:
    if isinstance(w, torch.Tensor):
        return torch.cos(torch.as_tensor(h)) * w
    return (jnp if isinstance(w, jax.Array) else np).cos(h) * w


def closing_over(w: Any) -> tuple[Callable[[Any, Any], Any], Any]:
    return (lambda h, z: cos(h, w)), None


def in_z(w: Any) -> tuple[Callable[[Any, Any], Any], Any]:
    return (lambda h, z: cos(h, z["w"])), {"w": w, "name": "w"}


WAYS = [closing_over, in_z]
GRADIENTS = [ic.Implicit(ic.GMRES(rtol=1e-13)), ic.Neumann(200, 1.0), ic.Unroll(200, 1.0)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("start", SCALARS)
@pytest.mark.parametrize("gradient", GRADIENTS, ids=lambda g: type(g).__name__)
def test_gradients_in_pytorch(start: str, way: Any, gradient: ic.Estimator) -> None:
    w = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    f, z = way(w)
    value = ic.fixed_point(f, SCALARS[start], z, solver=SOLVER, gradient=gradient).value
    assert (value.dtype, value.shape) == (torch.float64, np.shape(SCALARS[start]))
    np.testing.assert_allclose(value.detach(), ROOT, atol=1e-12)
    (slope,) = torch.autograd.grad(value.mean(), w)
    assert float(slope) == pytest.approx(SLOPE, abs=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("start", SCALARS)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_gradients_in_jax(start: str, way: Any, compiled: bool) -> None:
    for gradient in GRADIENTS[:2]:

        def loss(w: jax.Array, gradient: ic.Estimator = gradient) -> jax.Array:
            f, z = way(w)
            value = ic.fixed_point(f, SCALARS[start], z, solver=SOLVER, gradient=gradient).value
            assert (value.dtype, value.shape) == (np.float64, np.shape(SCALARS[start]))
            return value.mean()

        run = jax.value_and_grad(loss)
        value, slope = (jax.jit(run) if compiled else run)(jnp.asarray(1.0))
        assert (float(value), float(slope)) == pytest.approx((ROOT, SLOPE), abs=1e-10)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("start", SCALARS)
def test_solve(start: str, way: Any) -> None:
    for w in (np.asarray(1.0), torch.tensor(1.0, dtype=torch.float64), jnp.asarray(1.0)):
        f, z = way(w)
        value = ic.solve(f, SCALARS[start], z, solver=SOLVER).value
        assert isinstance(value, (type(w), np.generic))
        np.testing.assert_allclose(np.asarray(value), ROOT, atol=1e-12)
    run = jax.jit(lambda w: ic.solve(*((g := way(w))[0], SCALARS[start], g[1]), solver=SOLVER).value)
    np.testing.assert_allclose(run(1.0), ROOT, atol=1e-12)


@pytest.mark.parametrize("call", [ic.solve, ic.fixed_point])
@pytest.mark.parametrize("array", [torch.ones, jnp.ones])
def test_an_array_of_numpy_beside_inputs_of_another_framework(array: Any, call: Any) -> None:
    """PyTorch has no sum of an array of NumPy and a tensor."""
    z = array(2)
    value = call(lambda h, z: 0.5 * h + z["x"], np.zeros(2), {"x": z, "n": 3}, solver=SOLVER).value
    assert type(value) is type(z)
    np.testing.assert_allclose(value, 2.0, rtol=1e-6)
    with pytest.raises(TypeError, match="no such operation"):
        call(refuses, np.zeros(2), z, solver=SOLVER)


def refuses(h: Any, z: Any) -> Any:
    raise TypeError("no such operation")


@pytest.mark.parametrize("call", [ic.solve, ic.fixed_point])
def test_numbers_take_the_dtype_of_the_result(call: Any) -> None:
    for dtype in (np.float32, np.float16, jnp.bfloat16):
        w = jnp.asarray(1.0, dtype)
        value = call(lambda h, z, w=w: jnp.cos(h) * w, 0.5, None, solver=ic.FixedPointIteration()).value
        assert value.dtype == dtype
        assert float(value) == pytest.approx(ROOT, rel=2e-3 if dtype == np.float32 else 4e-2)
    w = torch.tensor(1.0, dtype=torch.float32)
    value = call(lambda h, z: torch.cos(torch.as_tensor(h, dtype=torch.float32)) * w, 0.5, None).value
    assert value.dtype == torch.float32
    value = call(lambda h, z: torch.cos(h) * z, 0.5, w).value
    assert value.dtype == torch.float32


@pytest.mark.parametrize("call", [ic.solve, ic.fixed_point])
def test_pytrees_of_numbers_and_python_functions(call: Any) -> None:
    w = jnp.asarray(1.0)
    value = call(lambda h, z: [jnp.cos(h[0]) * w, {"a": 0.5 * h[1]["a"] + w}], [0.5, {"a": 0}], None).value
    np.testing.assert_allclose([value[0], value[1]["a"]], [ROOT, 2.0], rtol=1e-3)
    assert float(call(lambda h, z: math.cos(h), 0.5, None).value) == pytest.approx(ROOT, rel=1e-3)
    mixed = call(lambda h, z: (jnp.cos(h[0]), 0.5 * h[1] + w), (np.asarray(0.5), np.zeros(3)), None).value
    np.testing.assert_allclose(mixed[1], [2.0] * 3, rtol=1e-3)


def test_a_start_of_numbers_costs_one_evaluation_and_arrays_none() -> None:
    calls = []

    def f(h: Any, z: Any) -> Any:
        calls.append(h)
        return 0.5 * np.cos(h)

    for h0, more in ((0.5, 1), (np.asarray(0.5), 0)):
        for call in (ic.solve, lambda *args, **options: ic.fixed_point(*args, gradient=ic.Implicit(), **options)):
            calls.clear()
            solution = call(f, h0, None, solver=ic.FixedPointIteration(rtol=1e-6))
            assert len(calls) == int(solution.stats.evaluations) + more


@pytest.mark.parametrize("call", [ic.solve, ic.fixed_point])
def test_what_is_no_start(call: Any) -> None:
    w = jnp.asarray(1.0)
    for h0 in (np.asarray(1), np.asarray([1, 2])):
        with pytest.raises(TypeError, match=r"real floating-point arrays, got dtype int.*cast an integer one to float"):
            call(lambda h, z: jnp.cos(h) * w, h0, None)
    for h0 in (True, "a", None, 1j):
        with pytest.raises(TypeError, match="h0 must"):
            call(lambda h, z: jnp.cos(h) * w, h0, None)
    with pytest.raises((TypeError, AttributeError)) as info:
        call(lambda h, z: torch.cos(h), 0.5, None)
    assert "make h0 an array, or pass arrays of that framework in z" in info.value.__notes__[0]
    with pytest.raises(TypeError, match=r"torch\.Tensor.*not a valid JAX type"):
        call(lambda h, z: torch.ones(3), jnp.ones(3), None)


def test_a_start_of_another_library_is_left_as_it_is() -> None:
    with pytest.raises(TypeError, match="must hold arrays of array_api_strict"):
        ic.solve(lambda h, z: jnp.ones(3), array_api_strict.ones(3), None)


def test_a_user_s_solver_that_solves_by_itself() -> None:
    def solver(problem: Any, h0: Any, z: Any) -> Any:
        return ic.solve(problem, h0, z, solver=SOLVER).value

    def loss(w: jax.Array) -> jax.Array:
        return ic.fixed_point(lambda h, z: jnp.cos(h) * w, np.asarray(0.5), None, solver=solver).value

    value, slope = jax.value_and_grad(loss)(1.0)
    assert float(value) == pytest.approx(ROOT, abs=1e-10)
    assert float(slope) == pytest.approx(SLOPE, abs=1e-3)  # five damped steps
