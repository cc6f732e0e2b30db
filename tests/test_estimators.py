"""The estimators against closed forms, dense linear algebra, each other, and differentiation through a long loop."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from libraries import NUMPY, Library, flat, unflat
from problems import CASES, Case, affine, layer, pytree, scalar

import implicit_core as ic

EXACT = ic.Implicit(ic.GMRES(rtol=1e-13, max_steps=600))
ESTIMATORS = [
    ic.OneStep(),
    ic.Neumann(k=4, lam=0.5),
    ic.Neumann(k=7, lam=1.0),
    ic.Unroll(k=4, lam=0.5),
    ic.Unroll(k=3, lam=0.7, recompute=True),
    ic.BPTT(k=4),
    EXACT,
]
SOLVER = ic.NewtonKrylov(rtol=1e-13, atol=1e-14, max_steps=60)


def root_of(case: Case, library: Library) -> Any:
    return ic.solve(case.problem(library), library.array(case.h0), library.array(case.z), solver=SOLVER).value


def pulled_back(estimator: ic.Estimator, problem: ic.Problem, library: Library, h: Any, z: Any, v: np.ndarray) -> Any:
    """The value, and the pullback of ``v`` flattened to a vector."""
    value, pullback = estimator.vjp(problem, h, z)
    like = library.numpy(h)
    return value, flat(library.numpy(pullback(library.array(unflat(v, like)))))


@pytest.mark.parametrize("k", [1, 2, 5, 30])
@pytest.mark.parametrize("lam", [0.3, 0.5, 1.0])
@pytest.mark.parametrize("kind", [ic.Neumann, ic.Unroll])
def test_affine_closed_form(kind: type, k: int, lam: float, library: Library) -> None:
    """A_{k,λ} v = (∂F/∂z)ᵀ (I - M)^-T (I - B^Tᵏ) v with B = λ M + (1 - λ) I; here ∂F/∂b = I."""
    case = affine(20)
    z = library.array(case.z)
    v = np.random.default_rng(0).normal(size=20)
    value, pullback = kind(k=k, lam=lam).vjp(case.problem(library), library.array(case.root), z)
    m, identity = case.z["m"], np.eye(20)
    b_power = np.linalg.matrix_power(lam * m + (1 - lam) * identity, k)
    expected = np.linalg.solve((identity - m).T, (identity - b_power).T @ v)
    gradient = library.numpy(pullback(library.array(v)))
    np.testing.assert_allclose(gradient["b"], expected, atol=1e-9)
    np.testing.assert_allclose(gradient["m"], np.outer(expected, case.root), atol=1e-9)
    np.testing.assert_allclose(library.numpy(value), case.root, atol=1e-12)


@given(
    a=st.floats(-0.95, 0.95), b=st.floats(-3, 3), k=st.integers(1, 40), lam=st.floats(0.01, 1.0), unrolled=st.booleans()
)
def test_scalar_closed_form(a: float, b: float, k: int, lam: float, unrolled: bool) -> None:
    """dh/db = (1 - ρᵏ) / (1 - a) with ρ = 1 - λ (1 - a)."""
    case = scalar(a, b)
    estimator = (ic.Unroll if unrolled else ic.Neumann)(k=k, lam=lam)
    rho = 1 - lam * (1 - a)
    expected = (1 - rho**k) / (1 - a)
    value, pullback = estimator.vjp(case.problem(), case.root, case.z)
    _, tangent = estimator.jvp(case.problem(), case.root, case.z, np.asarray(1.0))
    assert pullback(np.asarray(1.0)) == pytest.approx(expected, abs=1e-9)
    assert tangent == pytest.approx(expected, abs=1e-9)
    assert value == pytest.approx(b / (1 - a), abs=1e-9)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_vjp_and_jvp_are_adjoint(case: Case, estimator: ic.Estimator, library: Library) -> None:
    rng = np.random.default_rng(0)
    h, z = root_of(case, library), library.array(case.z)
    u, dz = rng.normal(size=flat(case.h0).size), rng.normal(size=flat(case.z).size)
    for problem in (case.problem(library), case.linearized(library)):
        value, gradient = pulled_back(estimator, problem, library, h, z, u)
        same, tangent = estimator.jvp(problem, h, z, library.array(unflat(dz, case.z)))
        left, right = u @ flat(library.numpy(tangent)), gradient @ dz
        size = np.linalg.norm(flat(library.numpy(tangent))) * np.linalg.norm(u) + np.linalg.norm(gradient)
        assert abs(left - right) <= 1e-10 * max(1.0, size)
        np.testing.assert_array_equal(flat(library.numpy(value)), flat(library.numpy(same)))


@pytest.mark.parametrize("case", [c for c in CASES if c.name != "affine(200)"], ids=lambda case: case.name)
def test_implicit_is_the_dense_inverse(case: Case, library: Library) -> None:
    v = np.random.default_rng(0).normal(size=flat(case.h0).size)
    h = root_of(case, library)
    _, gradient = pulled_back(EXACT, case.problem(library), library, h, library.array(case.z), v)
    j_h, j_z = case.dense_jacobians(library.numpy(h))
    expected = j_z.T @ np.linalg.solve(np.eye(v.size) - j_h.T, v)
    np.testing.assert_allclose(gradient, expected, atol=1e-5 * max(1.0, np.abs(expected).max()))


@pytest.mark.parametrize(
    "linear_solver",
    [ic.GMRES(rtol=1e-12), ic.BiCGSTAB(rtol=1e-12), ic.Richardson(rtol=1e-12, max_steps=1000)],
    ids=lambda s: type(s).__name__,
)
def test_every_linear_solver_gives_the_gradient_of_a_long_loop(linear_solver: ic.LinearSolver) -> None:
    case = layer()
    w, x = (torch.asarray(case.z[name]).requires_grad_() for name in ("w", "x"))
    h = torch.zeros_like(x)
    for _ in range(300):
        h = torch.tanh(h @ w.T + x)
    v = np.random.default_rng(0).normal(size=case.h0.shape)
    expected = torch.autograd.grad(h, (w, x), torch.asarray(v))
    _, pullback = ic.Implicit(linear_solver).vjp(case.problem(), root_of(case, NUMPY), case.z)
    gradient = pullback(v)
    np.testing.assert_allclose(gradient["w"], expected[0].numpy(), atol=1e-9)
    np.testing.assert_allclose(gradient["x"], expected[1].numpy(), atol=1e-9)


@pytest.mark.parametrize("estimator", [ic.Unroll(k=6, lam=0.6), ic.Unroll(6, 0.6, recompute=True), ic.BPTT(k=6)])
def test_unrolled_estimators_are_derivatives_of_their_steps_from_an_inexact_point(
    estimator: ic.Estimator, library: Library
) -> None:
    case, rng = layer(), np.random.default_rng(0)
    h, v = rng.normal(size=case.h0.shape), rng.normal(size=case.h0.shape)
    lam = getattr(estimator, "lam", 1.0)
    w, x = (torch.asarray(case.z[name]).requires_grad_() for name in ("w", "x"))
    end = torch.asarray(h)
    for _ in range(6):
        end = lam * torch.tanh(end @ w.T + x) + (1 - lam) * end
    expected = torch.autograd.grad(end, (w, x), torch.asarray(v))
    z = library.array(case.z)
    value, pullback = estimator.vjp(case.problem(library), library.array(h), z)
    np.testing.assert_allclose(library.numpy(value), end.detach().numpy(), atol=1e-12)
    np.testing.assert_allclose(
        library.numpy(estimator.value(case.problem(library), library.array(h), z)), library.numpy(value), atol=1e-15
    )
    gradient = library.numpy(pullback(library.array(v)))
    np.testing.assert_allclose(gradient["w"], expected[0].numpy(), atol=1e-10)
    np.testing.assert_allclose(gradient["x"], expected[1].numpy(), atol=1e-10)


@pytest.mark.parametrize("case", [affine(20), layer(), pytree(), scalar(-0.6)], ids=lambda case: case.name)
def test_limits_and_identities(case: Case, library: Library) -> None:
    v = np.random.default_rng(0).normal(size=flat(case.h0).size)
    h, z = root_of(case, library), library.array(case.z)

    def gradient(estimator: ic.Estimator) -> np.ndarray:
        return pulled_back(estimator, case.problem(library), library, h, z, v)[1]

    np.testing.assert_array_equal(gradient(ic.Neumann(1, 1.0)), gradient(ic.OneStep()))
    np.testing.assert_allclose(gradient(ic.Unroll(1, 1.0)), gradient(ic.OneStep()), atol=1e-12)
    np.testing.assert_array_equal(gradient(ic.Unroll(6, 1.0)), gradient(ic.BPTT(6)))
    np.testing.assert_array_equal(gradient(ic.Unroll(4, 0.5)), gradient(ic.Unroll(4, 0.5, recompute=True)))
    np.testing.assert_allclose(gradient(ic.Unroll(5, 0.5)), gradient(ic.Neumann(5, 0.5)), atol=1e-10)
    for lam in (0.5, 1.0):
        np.testing.assert_allclose(gradient(ic.Neumann(300, lam)), gradient(EXACT), atol=1e-9)
        np.testing.assert_allclose(gradient(ic.Unroll(300, lam)), gradient(EXACT), atol=1e-9)
    assert ic.UPG is ic.Unroll
    assert ic.NPG is ic.Neumann


def test_a_pullback_can_be_called_again(library: Library) -> None:
    case = layer()
    h, z = root_of(case, library), library.array(case.z)
    v = library.array(np.ones(case.h0.shape))
    for estimator in ESTIMATORS:
        _, pullback = estimator.vjp(case.problem(library), h, z)
        first, second = (library.numpy(pullback(v)) for _ in range(2))
        np.testing.assert_array_equal(first["w"], second["w"])


def test_value_is_the_solvers_point_or_the_unrolled_one() -> None:
    """At a point that is not the root, only Unroll and BPTT return another value."""
    case = layer()
    for estimator in (ic.Neumann(5, 0.5), ic.OneStep()):
        value, _ = estimator.vjp(case.problem(), case.h0, case.z)
        assert value is case.h0
    step = case.f(NUMPY.xp, case.h0, case.z)
    np.testing.assert_array_equal(ic.BPTT(1).vjp(case.problem(), case.h0, case.z)[0], step)
    np.testing.assert_allclose(ic.Unroll(1, 0.25).vjp(case.problem(), case.h0, case.z)[0], 0.25 * step)


def test_leaves_of_z_without_a_gradient() -> None:
    """Integers, text and None may be leaves of z; their cotangent is None."""

    def vjp(h: Any, z: Any, v: Any) -> Any:
        return 0.5 * v, {"scale": None, "labels": None, "x": v, "nothing": None}

    problem = ic.Problem(lambda h, z: 0.5 * h + z["x"], vjp=vjp)
    z = {"scale": "unused", "labels": np.arange(3), "x": np.ones(3), "nothing": None}
    for estimator in (ic.Neumann(3, 0.5), ic.Unroll(3, 0.5), ic.OneStep(), ic.Implicit(), ic.BPTT(2)):
        _, pullback = estimator.vjp(problem, np.full(3, 2.0), z)
        gradient = pullback(np.ones(3))
        assert gradient["labels"] is None
        assert gradient["scale"] is None
        assert gradient["x"].shape == (3,)


def test_implicit_reports_every_failure() -> None:
    case = layer(contraction=0.95)
    h, v = root_of(case, NUMPY), np.ones(case.h0.shape)
    starved = ic.GMRES(rtol=1e-12, max_steps=2)
    with pytest.raises(ic.SolveError, match="MAX_STEPS in 4 of 4 samples") as failure:
        ic.Implicit(starved).vjp(case.problem(), h, case.z)[1](v)
    assert failure.value.failures[0].samples == ((0,), (1,), (2,), (3,))
    with pytest.warns(ic.InexactGradientWarning, match="did not converge"):
        approximate = ic.Implicit(starved, on_failure="warn").vjp(case.problem(), h, case.z)[1](v)
    assert np.all(np.isfinite(approximate["x"]))
    assert np.all(np.isnan(ic.Implicit(starved, on_failure="nan").vjp(case.problem(), h, case.z)[1](v)["x"]))
    with pytest.raises(ic.SolveError, match="MAX_STEPS"):
        ic.Implicit(starved).jvp(case.problem(), h, case.z, case.z)


@pytest.mark.parametrize("on_failure", ["raise", "warn", "nan"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_cotangent_that_is_not_finite_becomes_nan(bad: float, on_failure: Any) -> None:
    """As in any other operation; gradient scalers overflow on purpose and check for it."""
    case = layer()
    h, v = root_of(case, NUMPY), np.ones(case.h0.shape)
    estimator = ic.Implicit(on_failure=on_failure)
    expected = estimator.vjp(case.problem(), h, case.z)[1](v)["x"]
    with np.errstate(invalid="ignore"):
        gradient = estimator.vjp(case.problem(), h, case.z)[1](np.where(np.arange(4)[:, None] == 2, bad, v))
    assert np.all(np.isnan(gradient["x"][2]))
    np.testing.assert_array_equal(gradient["x"][[0, 1, 3]], expected[[0, 1, 3]])
    assert np.all(np.isnan(gradient["w"]))


def test_a_singular_adjoint_is_an_error_not_a_gradient_of_zero() -> None:
    """I - ∂F/∂h = 0: the identity map."""
    problem = ic.Problem(lambda h, z: h, vjp=lambda h, z, v: (v, v))
    for solver in (ic.GMRES(), ic.BiCGSTAB(), ic.CG(), ic.Richardson()):
        with pytest.raises(ic.SolveError, match="did not converge"):
            ic.Implicit(solver).vjp(problem, np.ones(3), np.ones(3))[1](np.ones(3))


def test_callbacks_may_return_one_buffer_at_every_call() -> None:
    case = layer()
    value, v_h, v_w, v_x = (np.empty_like(a) for a in (case.h0, case.h0, case.z["w"], case.z["x"]))

    def f(h: Any, z: Any) -> Any:
        np.copyto(value, case.f(NUMPY.xp, h, z))
        return value

    def vjp(h: Any, z: Any, v: Any) -> Any:
        to_h, to_z = case.vjp(NUMPY.xp, h, z, v)
        for buffer, result in ((v_h, to_h), (v_w, to_z["w"]), (v_x, to_z["x"])):
            np.copyto(buffer, result)
        return v_h, {"w": v_w, "x": v_x}

    reusing, h, v = ic.Problem(f, vjp=vjp, batch_ndim=1), 0.5 * case.oracle(), np.ones_like(case.h0)
    for estimator in [e for e in ESTIMATORS if e is not EXACT] + [ic.Unroll(4, 1.0), ic.Unroll(4, 1.0, True)]:
        ours, pullback = estimator.vjp(reusing, h, case.z)
        theirs, expected = estimator.vjp(case.problem(), h, case.z)
        gradient = {name: a.copy() for name, a in pullback(v).items()}
        np.testing.assert_allclose(ours, theirs, atol=1e-14)
        np.testing.assert_allclose(gradient["w"], expected(v)["w"], atol=1e-13)
        np.testing.assert_allclose(gradient["x"], expected(v)["x"], atol=1e-13)


def test_the_tangent_system_is_solved_sample_by_sample() -> None:
    slope = np.asarray([[0.5], [1.0], [-0.5]])
    problem = ic.Problem(lambda h, z: slope * h + z, jvp=lambda h, z, dh, dz: slope * dh + dz, batch_ndim=1)
    with pytest.raises(ic.SolveError, match=r"in 1 of 3 samples \(1\)"):
        ic.Implicit().jvp(problem, np.zeros((3, 2)), np.zeros((3, 2)), np.ones((3, 2)))


def test_only_the_failed_sample_is_nan() -> None:
    slope = np.asarray([[0.5], [1.0], [-0.5]])
    problem = ic.Problem(lambda h, z: slope * h + z, vjp=lambda h, z, v: (slope * v, v), batch_ndim=1)
    pullback = ic.Implicit(on_failure="nan").vjp(problem, np.zeros((3, 2)), np.zeros((3, 2)))[1]
    np.testing.assert_allclose(pullback(np.ones((3, 2))), [[2.0, 2.0], [np.nan, np.nan], [2 / 3, 2 / 3]])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dtypes_are_kept(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    w, x = (rng.normal(size=shape).astype(dtype) * dtype(0.2) for shape in ((6, 6), (4, 6)))
    case = layer()
    problem = ic.Problem(
        lambda h, z: case.f(NUMPY.xp, h, z),
        vjp=lambda h, z, v: case.vjp(NUMPY.xp, h, z, v),
        jvp=lambda h, z, dh, dz: case.jvp(NUMPY.xp, h, z, dh, dz),
        batch_ndim=1,
    )
    z = {"w": w, "x": x}
    for estimator in (ic.Neumann(5, 0.3), ic.Unroll(5, 0.3), ic.OneStep(), ic.Implicit(), ic.BPTT(3)):
        value, pullback = estimator.vjp(problem, np.zeros_like(x), z)
        gradient = pullback(np.ones_like(x))
        _, tangent = estimator.jvp(problem, np.zeros_like(x), z, z)
        assert {a.dtype for a in (value, gradient["w"], gradient["x"], tangent)} == {np.dtype(dtype)}


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (ic.Anderson(), "Anderson(rtol=1e-05, atol=None, max_steps=100"),
        (ic.Anderson(freeze=False), "freeze=False"),
        (ic.NewtonKrylov(linear_solver=ic.GMRES(check=False)), "check=False"),
        (ic.NeumannSeries(check=False), "check=False"),
        (ic.Unroll(2, 0.5, on_growth="nan"), "on_growth='nan'"),
        (ic.Compacting(ic.Broyden(check=False), (True, False)), "check=False"),
        (ic.Implicit(ic.CG(check=False)), "check=False"),
        (ic.BPTT(4), "BPTT(k=4)"),
    ],
    ids=repr,
)
def test_words_of_a_record_give_the_record(record: object, words: str) -> None:
    """What is seldom set is shown where it is."""
    assert words in repr(record)
    assert eval(repr(record), vars(ic)) == record
    assert "check=" not in repr(ic.Anderson())
    assert "freeze=" not in repr(ic.Anderson())
    assert "on_growth=" not in repr(ic.Unroll())


@pytest.mark.parametrize("estimator", [*ESTIMATORS, ic.Implicit(ic.CG())], ids=repr)
def test_estimators_are_frozen_hashable_comparable_records(estimator: ic.Estimator) -> None:
    names = [field.name for field in dataclasses.fields(estimator)]
    twin = type(estimator)(**{name: getattr(estimator, name) for name in names})
    assert twin == estimator
    assert hash(twin) == hash(estimator)
    assert eval(repr(estimator), vars(ic)) == estimator
    for name in names:
        with pytest.raises(AttributeError):
            setattr(estimator, name, None)
