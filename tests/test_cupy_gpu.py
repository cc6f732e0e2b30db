"""CuPy on a GPU: kernels, devices, streams, copies, and derivatives of other frameworks."""

from typing import Any

import gpus
import numpy as np
import pytest
import torch
from libraries import JAX, TORCH, flat
from problems import CASES, Case, layer, symmetric_layer

import implicit_core as ic
from implicit_core.backend import Backend

if gpus.WITHOUT_CUPY:
    pytest.skip(gpus.WITHOUT_CUPY, allow_module_level=True)

import cupy
from libraries import CUPY

from implicit_core.adapters import cupy as icc
from implicit_core.backends.cupy import BACKEND
from implicit_core.dlpack import borrow_derivatives

pytestmark = gpus.CUPY
PORTABLE = Backend("cupy", CUPY.xp, (cupy.ndarray,))
ESTIMATORS = [ic.OneStep(), ic.Neumann(4, 0.5), ic.Unroll(3, 0.5), ic.BPTT(4), ic.Implicit(ic.GMRES(rtol=1e-10))]
SOLVERS = [ic.FixedPointIteration(), ic.Anderson(), ic.Broyden(), ic.NewtonKrylov()]


def normal(*shape: int, dtype: Any = np.float64, seed: int = 0) -> Any:
    return cupy.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def close(got: Any, expected: Any) -> None:
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    tolerance = 1e-4 if got.dtype == np.float32 else 1e-10
    np.testing.assert_allclose(cupy.asnumpy(got), cupy.asnumpy(expected), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("d", [1, 7, 300])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_fused_kernels_against_the_portable_spelling(dtype: Any, d: int) -> None:
    m = 5
    row, history, weights = normal(9, 1, d, dtype=dtype), normal(9, m, d, dtype=dtype), normal(9, 1, m, dtype=dtype)
    x, y, each = (normal(9, n, dtype=dtype, seed=n) for n in (d, d, 1))
    matrix = history @ history.transpose(0, 2, 1) + m * cupy.eye(m, dtype=dtype)
    large = normal(3, 40, 40, dtype=dtype) + 40 * cupy.eye(40, dtype=dtype)
    results = []
    for backend in (BACKEND, PORTABLE):
        space = backend.space(x, 1)
        results.append(
            [
                space.products((row,), (history,)),
                *space.combine(weights, (history,)),
                *space.combine(weights, (history,), (row,)),
                space.multiply_add(0.3, x, y),
                space.multiply_add(each, x, y),
                space.norm((x,)),
                space.solve_rows(matrix, weights),
                space.gram((matrix.copy(),), (history,), 2)[0][:, 2],
                space.solve_rows(large, normal(3, 1, 40, dtype=dtype)),
            ]
        )
    for got, expected in zip(*results, strict=True):
        close(got, expected)


@pytest.mark.parametrize("special", [np.inf, -np.inf, np.nan, -5.0, 0.0])
@pytest.mark.parametrize("length", [1, 5, 3000])
def test_the_largest_of_numbers_that_are_not_finite(special: float, length: int) -> None:
    x = np.full((3, length), -0.5)
    x[1, length // 2] = special
    state = cupy.asarray(x)
    found = cupy.asnumpy(BACKEND.space(state, 1).largest((state,)))
    np.testing.assert_array_equal(found, np.max(np.abs(x), axis=1, keepdims=True))


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_problem_is_solved_as_by_numpy(case: Case, solver: ic.Solver) -> None:
    got = ic.solve(case.problem(CUPY), CUPY.array(case.h0), CUPY.array(case.z), solver=solver)
    expected = ic.solve(case.problem(), case.h0, case.z, solver=solver)
    np.testing.assert_array_equal(cupy.asnumpy(got.status), expected.status)
    if np.all(expected.converged):
        np.testing.assert_allclose(flat(CUPY.numpy(got.value)), flat(expected.value), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
@pytest.mark.parametrize("framework", ["by hand", "torch", "jax"])
def test_gradients_are_numpys(framework: str, estimator: ic.Estimator) -> None:
    case = layer()
    if framework == "torch" and not torch.cuda.is_available():
        pytest.skip("PyTorch found no CUDA device")
    if framework == "jax" and not has_jax():
        pytest.skip("JAX found no GPU")
    problem = {
        "by hand": lambda: case.problem(CUPY),
        "torch": lambda: icc.from_torch(lambda h, z: case.f(TORCH.xp, h, z), batch_ndim=case.batch_ndim),
        "jax": lambda: icc.from_jax(lambda h, z: case.f(JAX.xp, h, z), batch_ndim=case.batch_ndim),
    }[framework]()
    root, z, v = case.oracle(), case.z, np.ones_like(case.h0)
    value, pullback = estimator.vjp(problem, CUPY.array(root), CUPY.array(z))
    expected, pull = estimator.vjp(case.problem(), root, z)
    np.testing.assert_allclose(cupy.asnumpy(value), expected, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(flat(CUPY.numpy(pullback(CUPY.array(v)))), flat(pull(v)), rtol=1e-8, atol=1e-10)
    pushed = estimator.jvp(problem, CUPY.array(root), CUPY.array(z), CUPY.array(z))[1]
    np.testing.assert_allclose(
        flat(CUPY.numpy(pushed)), flat(estimator.jvp(case.problem(), root, z, z)[1]), rtol=1e-8, atol=1e-10
    )


def has_jax() -> bool:
    import jax

    return any(device.platform == "gpu" for device in jax.devices())


def test_torch_works_in_the_same_memory_and_on_the_same_stream() -> None:
    if not torch.cuda.is_available():
        pytest.skip("PyTorch found no CUDA device")
    seen, made, streams = [], [], []

    def f(h: Any, z: Any) -> Any:
        value = 0.5 * h + z
        seen.extend([h.data_ptr(), z.data_ptr()])
        made.append(value.data_ptr())
        streams.append(torch.cuda.current_stream().cuda_stream)
        return value

    h, z = cupy.zeros((4, 8)), cupy.ones((4, 8))
    with cupy.cuda.Stream(non_blocking=True) as stream:
        value = icc.from_torch(f).f(h, z)
    assert seen == [h.data.ptr, z.data.ptr]
    assert made == [value.data.ptr]
    assert streams == [stream.ptr]


def test_cupy_works_for_torch_on_its_stream() -> None:
    """Kernels of CuPy as the derivatives of a problem on tensors."""
    if not torch.cuda.is_available():
        pytest.skip("PyTorch found no CUDA device")
    streams = []

    def f(h: Any, z: Any) -> Any:
        streams.append(cupy.cuda.get_current_stream().ptr)
        return 0.5 * h + z

    problem = borrow_derivatives(icc.problem(f, vjp=lambda h, z, v: (0.5 * v, v)), "cupy")
    side = torch.cuda.Stream()
    z = torch.ones(4, 8, device="cuda")
    for stream in (torch.cuda.current_stream(), side):
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            value = ic.solve(problem, torch.zeros_like(z), z, solver=ic.FixedPointIteration()).value
            torch.testing.assert_close(value, torch.full_like(z, 2.0), rtol=1e-3, atol=1e-3)
        assert set(streams) == {stream.cuda_stream}
        streams.clear()
    assert cupy.cuda.get_current_stream() == cupy.cuda.Stream.null


@pytest.mark.parametrize("factor", [0.3, "each"])
def test_a_x_plus_y_in_half_precision(factor: Any) -> None:
    x, y, each = (normal(9, n, dtype=np.float16, seed=n) for n in (7, 7, 1))
    a = each if factor == "each" else factor
    got = BACKEND.space(x, 1).multiply_add(a, x, y)
    expected = cupy.asnumpy(a) * cupy.asnumpy(x).astype(np.float64) + cupy.asnumpy(y)
    assert got.dtype == np.float16
    np.testing.assert_allclose(cupy.asnumpy(got).astype(np.float64), expected, rtol=4e-3, atol=4e-3)


def test_jax_works_in_the_same_memory() -> None:
    if not has_jax():
        pytest.skip("JAX found no GPU")
    from implicit_core.backends.jax import BACKEND as THERE

    x = cupy.ones((4, 8), cupy.float32)
    array = THERE.from_dlpack(x)
    assert array.unsafe_buffer_pointer() == x.data.ptr
    assert BACKEND.from_dlpack(array).data.ptr == x.data.ptr


# Where the work goes.

SPIN = r"""
extern "C" __global__ void spin(long long cycles) {
    const long long begin = clock64();
    while (clock64() - begin < cycles) {}
}
"""


def everything(case: Case, *, h0: Any, z: Any) -> None:
    for solver in SOLVERS:
        ic.solve(case.problem(CUPY), h0, z, solver=solver)
    for estimator in ESTIMATORS:
        value, pullback = estimator.vjp(case.problem(CUPY), h0, z)
        pullback(value)
        estimator.jvp(case.problem(CUPY), h0, z, z)


def test_nothing_is_launched_but_on_the_current_stream() -> None:
    """A slow kernel runs on the default stream: work that waits for it, or is launched there, ends after it."""
    case = layer()
    h0, z = CUPY.array(case.h0), CUPY.array(case.z)
    spin = cupy.RawKernel(SPIN, "spin")
    spin((1,), (1,), (np.int64(1000),))
    with cupy.cuda.Stream(non_blocking=True):
        everything(case, h0=h0, z=z)  # kernels are compiled in the first
    cupy.cuda.Device().synchronize()
    spin((1,), (1,), (np.int64(20_000_000_000),))
    end = cupy.cuda.Event()
    end.record(cupy.cuda.Stream.null)
    with cupy.cuda.Stream(non_blocking=True):
        everything(case, h0=h0, z=z)
    assert not end.done
    cupy.cuda.Device().synchronize()


def test_arrays_of_another_device_are_worked_on_there() -> None:
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("there is one GPU, and this takes two")
    case = layer()
    with cupy.cuda.Device(1):
        h0, z = CUPY.array(case.h0), CUPY.array(case.z)
    allocated: list[int] = []

    class Allocations(cupy.cuda.MemoryHook):
        name = "devices"

        def malloc_preprocess(self, **facts: Any) -> None:
            allocated.append(facts["device_id"])

        def alloc_preprocess(self, **facts: Any) -> None:
            allocated.append(facts["device_id"])

    with cupy.cuda.Device(0), Allocations():
        everything(case, h0=h0, z=z)
        solution = ic.solve(case.problem(CUPY), h0, z)
    assert solution.value.device == cupy.cuda.Device(1)
    assert set(allocated) == {1}


@pytest.mark.parametrize("check_every", [1, 4])
@pytest.mark.parametrize("solver", [ic.FixedPointIteration, ic.Anderson, ic.Broyden])
def test_a_solve_copies_one_flag_for_each_read(solver: Any, check_every: int) -> None:
    if not torch.cuda.is_available():
        pytest.skip("PyTorch, whose profiler sees copies, found no CUDA device")
    case = symmetric_layer()
    h0, z = CUPY.array(case.h0), CUPY.array(case.z)
    problem, settings = case.problem(CUPY), solver(check_every=check_every)
    ic.solve(problem, h0, z, solver=settings)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        solution = ic.solve(problem, h0, z, solver=settings)
        cupy.cuda.Device().synchronize()
    copies = sum(event.count for event in profile.key_averages() if "Memcpy DtoH" in event.key)
    assert copies == (solution.stats.evaluations - 1) // check_every + 1


def test_the_memory_pool_is_the_users() -> None:
    case = layer()
    pool = cupy.get_default_memory_pool()
    before = pool.get_limit(), cupy.cuda.get_allocator()
    everything(case, h0=CUPY.array(case.h0), z=CUPY.array(case.z))
    assert (pool.get_limit(), cupy.cuda.get_allocator()) == before
    blocks = pool.used_bytes()
    for _ in range(3):
        everything(case, h0=CUPY.array(case.h0), z=CUPY.array(case.z))
    assert pool.used_bytes() == blocks
