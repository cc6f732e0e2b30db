"""Errors are raised at the call, and name the argument, its value and the expected values."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from libraries import Library
from problems import layer

import implicit_core as ic

ONES = np.ones(3)


def halved(h: Any, z: Any) -> Any:
    return 0.5 * h


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ic.Neumann(k=0), ValueError, "k must be at least 1, got 0"),
        (lambda: ic.Neumann(k=2.0), TypeError, "k must be an integer, got 2.0 of type float"),
        (lambda: ic.Neumann(k=True), TypeError, "k must be an integer, got True"),
        (lambda: ic.Unroll(k=-3), ValueError, "k must be at least 1, got -3"),
        (lambda: ic.BPTT(k=0), ValueError, "k must be at least 1"),
        (lambda: ic.Neumann(lam=0.0), ValueError, r"lam must lie in \(0, 1\], got 0.0"),
        (lambda: ic.Unroll(lam=1.5), ValueError, r"lam must lie in \(0, 1\], got 1.5"),
        (lambda: ic.Unroll(lam=float("nan")), ValueError, "lam must lie in"),
        (lambda: ic.Neumann(lam="0.5"), TypeError, "lam must be a real number, got '0.5' of type str"),
        (lambda: ic.Unroll(recompute=1), TypeError, "recompute must be a bool"),
        (lambda: ic.Neumann(lamda=0.5), TypeError, "unexpected keyword argument 'lamda'"),
        (lambda: ic.Anderson(memory=0), ValueError, "memory must be at least 1, got 0"),
        (lambda: ic.Anderson(damping=0), ValueError, r"damping must lie in \(0, 1\]"),
        (lambda: ic.Anderson(rtol=-1e-3), ValueError, r"rtol must lie in \[0, inf\)"),
        (lambda: ic.Anderson(tol=1e-3), TypeError, "unexpected keyword argument 'tol'"),
        (lambda: ic.Broyden(max_steps=0), ValueError, "max_steps must be at least 1"),
        (lambda: ic.FixedPointIteration(check_every=0), ValueError, "check_every must be at least 1"),
        (lambda: ic.NewtonKrylov(linear_solver=ic.Anderson()), TypeError, "linear_solver must be a LinearSolver"),
        (lambda: ic.Implicit(ic.GMRES), TypeError, r"linear_solver must be a LinearSolver.*did you mean GMRES\(\)"),
        (lambda: ic.Implicit(on_failure="zero"), ValueError, "on_failure must be 'raise', 'warn', 'nan' or 'ignore'"),
        (lambda: ic.GMRES(restart=0), ValueError, "restart must be at least 1"),
        (lambda: ic.Richardson(relaxation=2.5), ValueError, r"relaxation must lie in \(0, 2\]"),
        (lambda: ic.Problem(3), TypeError, "f must be callable, got 3"),
        (lambda: ic.Problem(halved, vjp=1), TypeError, "vjp must be callable"),
        (lambda: ic.Problem(halved, batch_ndim=-1), ValueError, "batch_ndim must be at least 0"),
        (lambda: ic.Problem(halved, vjp=halved, linearize=halved), TypeError, "not both"),
        (lambda: ic.CallableSolver(3), TypeError, "function must be callable"),
    ],
)
def test_settings(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ic.solve(halved, 1j, None), TypeError, "h0 must be an array.*got complex.*numpy.asarray"),
        (lambda: ic.solve(halved, None, None), TypeError, "h0 must be an array"),
        (lambda: ic.solve(halved, np.ones(3, dtype=int), None), TypeError, "dtype int64.*cast an integer one to float"),
        (lambda: ic.solve(halved, np.ones(3, dtype=complex), None), TypeError, "complex128.*real and imaginary"),
        (lambda: ic.solve(halved, ONES, None, batch_ndim=2), ValueError, "too few axes for batch_ndim=2"),
        (lambda: ic.solve(ic.Problem(halved), ONES, None, batch_ndim=0), TypeError, "belongs to the problem"),
        (lambda: ic.solve(halved, ONES, None, solver=ic.Anderson), TypeError, r"did you mean Anderson\(\)"),
        (
            lambda: ic.solve(halved, ONES, None, solver="anderson"),
            TypeError,
            r"solver must be a Solver.*got 'anderson'",
        ),
        (lambda: ic.solve(halved, ONES, None, solver=ic.GMRES()), TypeError, "solver must be a Solver.*got GMRES"),
        (lambda: ic.Anderson(rtol=float("inf")), ValueError, "rtol must lie in"),
        (lambda: ic.solve(halved, ONES, None, tolerance=1), TypeError, "unexpected keyword argument 'tolerance'"),
        (lambda: ic.solve(lambda h, z: h[:2], ONES, None), ValueError, r"result of f.*shape of h0, \(3,\), got \(2,\)"),
        (lambda: ic.solve(lambda h, z: h.astype("f4"), ONES, None), TypeError, "result of f.*float64, got float32"),
        (lambda: ic.solve(lambda h, z: [h], ONES, None), TypeError, "result of f must have the structure of h0"),
        (lambda: ic.solve(lambda h, z: None, ONES, None), TypeError, "result of f must have the structure of h0"),
        (lambda: ic.solve(lambda h, z: 0.5, ONES, None), TypeError, "result of f must hold arrays of numpy.*0.5"),
        (
            lambda: ic.solve(lambda h, z: torch.ones(3), ONES, None),
            TypeError,
            "torch.float64, got torch.float32",
        ),
        (lambda: ic.solve(halved, (ONES, torch.ones(3)), None), TypeError, "h0 must hold arrays of numpy only"),
        (lambda: ic.solve(halved, (np.ones((2, 3)), np.ones((4, 3))), None, batch_ndim=1), ValueError, "must agree"),
        (lambda: ic.solve(halved, ONES, None, solver=lambda p, h, z: h[:1]), ValueError, "result of the solver"),
        (lambda: ic.fixed_point(halved, ONES, None, gradient="unroll"), TypeError, "gradient must be an Estimator"),
        (lambda: ic.fixed_point(halved, ONES, None, gradient=ic.Unroll), TypeError, r"did you mean Unroll\(\)"),
        (lambda: ic.solve_linear(halved, ONES, solver=ic.Anderson()), TypeError, "solver must be a LinearSolver"),
        (lambda: ic.solve_linear(lambda v: v[:1], ONES), ValueError, "result of operator must have the shape of b"),
        (lambda: ic.solve_linear(lambda v: v, np.ones(3, dtype=int)), TypeError, "b must hold real floating-point"),
        (lambda: ic.Neumann().vjp(halved, ONES, None), TypeError, "problem must be a Problem"),
    ],
)
def test_calls(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def problem(**callbacks: Any) -> ic.Problem:
    return ic.Problem(lambda h, z: 0.5 * h + z, **callbacks)


@pytest.mark.parametrize("estimator", [ic.Neumann(2, 0.5), ic.Unroll(2, 0.5), ic.OneStep(), ic.Implicit(), ic.BPTT(2)])
@pytest.mark.parametrize(
    ("vjp", "error", "message"),
    [
        (lambda h, z, v: v, TypeError, r"must return the pair \(v_h, v_z\), got ndarray"),
        (lambda h, z, v: (v, v[:2]), ValueError, r"z-cotangent from vjp.*expected \(3,\), got \(2,\)"),
        (lambda h, z, v: (v, (v,)), TypeError, "z-cotangent from vjp must have the structure of z"),
        (lambda h, z, v: (v, v.astype("f4")), TypeError, "z-cotangent.*dtypes of z: expected float64, got float32"),
        (lambda h, z, v: (v, torch.ones(3)), TypeError, "z-cotangent.*arrays of numpy, or None.*torch.Tensor"),
    ],
)
def test_results_of_callbacks(estimator: ic.Estimator, vjp: Any, error: type[Exception], message: str) -> None:
    _, pullback = estimator.vjp(problem(vjp=vjp), ONES, ONES)
    with pytest.raises(error, match=message):
        pullback(ONES)


@pytest.mark.parametrize("estimator", [ic.Neumann(2, 0.5), ic.Unroll(2, 0.5), ic.OneStep(), ic.Implicit(), ic.BPTT(2)])
def test_cotangents_and_tangents(estimator: ic.Estimator) -> None:
    both = problem(vjp=lambda h, z, v: (0.5 * v, v), jvp=lambda h, z, dh, dz: 0.5 * dh + dz)
    _, pullback = estimator.vjp(both, ONES, ONES)
    with pytest.raises(ValueError, match=r"h_bar must have the shape of h, \(3,\), got \(2,\)"):
        pullback(np.ones(2))
    with pytest.raises(TypeError, match="h_bar must have the dtype of h, float64, got float32"):
        pullback(np.ones(3, dtype=np.float32))
    with pytest.raises(ValueError, match="dz must have the shapes of z"):
        estimator.jvp(both, ONES, ONES, np.ones(2))
    with pytest.raises(TypeError, match="dz must have the structure of z"):
        estimator.jvp(both, ONES, ONES, {"z": ONES})
    bad = problem(vjp=lambda h, z, v: (v[:2], v[:2]), jvp=lambda h, z, dh, dz: dh[:2])
    with pytest.raises(ValueError, match="cotangent from vjp must have the shape"):
        estimator.vjp(bad, ONES, ONES)[1](ONES)
    with pytest.raises(ValueError, match="tangent from jvp must have the shape"):
        estimator.jvp(bad, ONES, ONES, ONES)


def test_a_state_on_another_device_is_an_error() -> None:
    with pytest.raises(ValueError, match="result of f must be on the device of h0, cpu, got meta"):
        ic.solve(lambda h, z: torch.ones(3, device="meta"), torch.ones(3), None)


def test_linearize_must_return_a_linearization() -> None:
    with pytest.raises(TypeError, match="result of linearize must be a Linearization"):
        ic.Neumann().vjp(ic.Problem(halved, linearize=lambda h, z: (h, z)), ONES, None)
    no_parts = ic.Problem(halved, linearize=lambda h, z: ic.Linearization(0.5 * h))
    with pytest.raises(NotImplementedError, match="return vjp_h and vjp_z from its linearize"):
        ic.Neumann().vjp(no_parts, ONES, None)
    with pytest.raises(ValueError, match="result of f must have the shape of h"):
        ic.Neumann().vjp(ic.Problem(halved, linearize=lambda h, z: ic.Linearization(h[:1])), ONES, None)


def test_throw_names_the_samples_and_the_reason(library: Library) -> None:
    case = layer(batch=5)
    h0, z = library.array(case.h0), library.array(case.z)
    solver = ic.FixedPointIteration(max_steps=2)
    for call in (ic.solve, ic.fixed_point):
        plain = {"f": case.counted(library, "f")} if call is ic.fixed_point else {"problem": case.counted(library, "f")}
        with pytest.raises(ic.SolveError, match=r"MAX_STEPS in 5 of 5 samples \(0, 1, 2, 3, 4\)") as caught:
            call(*plain.values(), h0, z, solver=solver, throw=True, batch_ndim=1)
        assert caught.value.failures[0].status is ic.Status.MAX_STEPS
    assert ic.solve(case.problem(library), h0, z, throw=True) is not None


def test_repr_shows_the_settings() -> None:
    assert repr(ic.Unroll(3, 0.25)) == "Unroll(k=3, lam=0.25, recompute=False)"
    assert "memory=7" in repr(ic.Anderson(memory=7))
    assert repr(problem(vjp=halved)) == "Problem(problem.<locals>.<lambda>, vjp, batch_ndim=0)"


def test_solvers_are_frozen_hashable_comparable_records() -> None:
    assert ic.Anderson(memory=3) == ic.Anderson(memory=3) != ic.Anderson(memory=4)
    assert len({ic.Broyden(), ic.Broyden(), ic.Broyden(memory=3), ic.Anderson()}) == 3
    assert eval(repr(ic.NewtonKrylov()), vars(ic)) == ic.NewtonKrylov()
    with pytest.raises(AttributeError):
        ic.Anderson().memory = 3


@pytest.mark.parametrize("solver", [ic.FixedPointIteration(), ic.Anderson(), ic.Broyden()], ids=repr)
def test_a_map_that_writes_to_its_argument_is_an_error(solver: ic.Solver) -> None:
    """Without the check such a map would return its argument and appear to have converged. PyTorch sees each write."""

    def in_place(h: Any, z: Any) -> Any:
        h *= 0.5
        h += z
        return h

    for ones in (np.ones(3), np.ones(3, dtype=np.float16)):
        with pytest.raises(ValueError, match="f wrote to its argument h"):
            ic.solve(in_place, 0 * ones, ones, solver=solver)
    for dtype, accuracy in ((torch.float64, 1e-4), (torch.bfloat16, 0.15)):
        solution = ic.solve(in_place, torch.zeros(3, dtype=dtype), torch.ones(3, dtype=dtype), solver=solver)
        assert solution.status == ic.CONVERGED
        assert float((solution.value - 2).abs().max()) < accuracy
    assert ic.solve(lambda h, z: h, np.asarray([np.nan, 1.0]), None, solver=solver).status == ic.NONFINITE


def test_a_linearization_that_writes_to_its_argument_is_an_error() -> None:
    def in_place(h: Any, z: Any) -> Any:
        h += 1.0
        return ic.Linearization(h, jvp_h=lambda dh: 0.5 * dh, jvp_z=lambda dz: dz)

    with pytest.raises(ValueError, match="linearize wrote to its argument h"):
        ic.solve(ic.Problem(halved, linearize=in_place), np.zeros(3), ONES, solver=ic.NewtonKrylov())


def test_objects_in_z_reach_newton() -> None:
    """A leaf of z may be an object such as a module: it has no tangent and needs none."""
    cell = torch.nn.Identity()
    mixed = ic.Problem(lambda h, z: 0.5 * h + z["x"], jvp=lambda h, z, dh, dz: 0.5 * dh + dz["x"])
    solution = ic.solve(mixed, np.zeros(3), {"x": ONES, "cell": cell, "n": 3}, solver=ic.NewtonKrylov())
    np.testing.assert_allclose(solution.value, 2.0)
