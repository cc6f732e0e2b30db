"""Settings of which each sample of a batch has its own: steps k, λ, damping and tolerances, in every framework.

The oracle is h = a h + z, one number for each sample: from a fixed point, k terms of λ give the derivative
(1 - ρᵏ) / (1 - a) with ρ = 1 - λ (1 - a).
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from libraries import Library

import implicit_core as ic
from implicit_core.adapters import torch as ict

A = np.array([[0.5], [-0.3], [0.8], [0.2]])
Z = np.array([[1.0], [2.0], [-1.0], [0.5]])
K = np.array([1, 4, 2, 3], np.int32)
LAM = np.array([0.5, 1.0, 0.7, 0.9])
RTOL = np.array([1e-1, 1e-3, 1e-6, 1e-9])
ESTIMATORS = [ic.Unroll, ic.Neumann]


def derivative(k: Any = K, lam: Any = LAM) -> np.ndarray:
    return ((1 - (1 - lam * (1 - A[:, 0])) ** k) / (1 - A[:, 0]))[:, None]


def affine(library: Library) -> tuple[ic.Problem, Any, Any]:
    a, z = library.array(A), library.array(Z)
    problem = ic.Problem(
        lambda h, z: a * h + z,
        vjp=lambda h, z, v: (a * v, v),
        jvp=lambda h, z, dh, dz: a * dh + dz,
        batch_ndim=1,
    )
    return problem, library.array(Z / (1 - A)), z


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_core_against_the_closed_form(estimator: Any, recompute: bool, library: Library) -> None:
    if estimator is ic.Neumann and recompute:
        pytest.skip("Neumann has no states to recompute")
    problem, h, z = affine(library)
    options = {"recompute": True} if recompute else {}
    gradient = estimator(library.array(K), library.array(LAM), **options)
    value, pullback = gradient.vjp(problem, h, z)
    np.testing.assert_allclose(library.numpy(value), Z / (1 - A), rtol=1e-12)
    ones = library.array(np.ones_like(Z))
    np.testing.assert_allclose(library.numpy(pullback(ones)), derivative(), rtol=1e-12)
    _, tangent = gradient.jvp(problem, h, z, ones)
    np.testing.assert_allclose(library.numpy(tangent), derivative(), rtol=1e-12)


def test_the_theorem_holds_for_each_sample(library: Library) -> None:
    """|A_{k,λ} - A| = qᵏ / (1 - a) for a positive slope, the bound of Theorem 2."""
    slopes = library.array(np.abs(A[:, 0]))
    bound = ic.Neumann(library.array(K), library.array(LAM)).error_bound(slopes)
    q = 1 - LAM * (1 - np.abs(A[:, 0]))
    np.testing.assert_allclose(library.numpy(bound), q**K / (1 - np.abs(A[:, 0])), rtol=1e-12)


@pytest.mark.parametrize("on_growth", ["warn", "nan", "ignore"])
@pytest.mark.parametrize("estimator", [*ESTIMATORS, ic.BPTT])
def test_a_batch_in_torch_is_its_samples(estimator: Any, on_growth: Any) -> None:
    """Value, gradient and second derivative of a cell that is not affine, against a layer for each sample."""
    generator = torch.Generator().manual_seed(0)
    w = (0.4 * torch.randn(3, 3, generator=generator, dtype=torch.float64)).requires_grad_()
    x = torch.randn(4, 3, generator=generator, dtype=torch.float64)

    def loss(x: Any, k: Any, lam: Any) -> Any:
        args = (k,) if estimator is ic.BPTT else (k, lam)
        return (
            ic.fixed_point(
                lambda h, x: torch.tanh(h @ w.T + x),
                torch.zeros_like(x),
                x,
                solver=ic.steps(4),
                gradient=estimator(*args, on_growth=on_growth),
                batch_ndim=1,
            ).value
            ** 3
        ).sum()

    def derivatives(loss: Any) -> Any:
        (gradient,) = torch.autograd.grad(loss, w, create_graph=True)
        return loss, gradient, torch.autograd.grad(gradient.square().sum(), w)[0]

    ours = derivatives(loss(x, torch.tensor(K), torch.tensor(LAM)))
    theirs = derivatives(
        sum(loss(x[i : i + 1], int(k), float(lam)) for i, (k, lam) in enumerate(zip(K, LAM, strict=True)))
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("estimator", [*ESTIMATORS, ic.BPTT])
def test_a_batch_in_jax_is_its_samples(estimator: Any) -> None:
    """Eager, compiled with settings that are constants, and with settings that are traced."""
    rng = np.random.default_rng(0)
    w, x = jnp.asarray(0.4 * rng.normal(size=(3, 3))), jnp.asarray(rng.normal(size=(4, 3)))

    def loss(w: Any, x: Any, k: Any, lam: Any, **most: Any) -> Any:
        args = (k,) if estimator is ic.BPTT else (k, lam)
        gradient = estimator(*args, **most)
        solution = ic.fixed_point(
            lambda h, z: jnp.tanh(h @ z[0].T + z[1]),
            jnp.zeros_like(x),
            (w, x),
            solver=ic.steps(4),
            gradient=gradient,
            batch_ndim=1,
        )
        return jnp.sum(solution.value**3)

    expected = sum(
        jax.grad(loss)(w, x[i : i + 1], int(k), float(lam)) for i, (k, lam) in enumerate(zip(K, LAM, strict=True))
    )
    for gradient in (
        jax.grad(loss)(w, x, K, LAM),
        jax.jit(lambda w: jax.grad(loss)(w, x, K, LAM))(w),
        jax.jit(lambda w, k, lam: jax.grad(loss)(w, x, k, lam, most=6))(w, K, LAM),
    ):
        np.testing.assert_allclose(gradient, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("estimator", [*ESTIMATORS, ic.BPTT])
def test_a_traced_k_out_of_range_is_nan(estimator: Any) -> None:
    """No gradient of fewer steps than asked for: neither of a k above ``most``, nor of a record that was changed."""
    a, z = jnp.asarray(A), jnp.asarray(Z)

    def value_and_gradient(gradient: Any) -> Any:
        def layer(z: Any) -> Any:
            solver, f = ic.steps(1), lambda h, z: a * h + z
            return ic.fixed_point(f, jnp.zeros_like(z), z, solver=solver, gradient=gradient, batch_ndim=1)

        solution = layer(z)
        return solution.value, solution.status, jax.grad(lambda z: layer(z).value.sum())(z)

    def changed(record: Any) -> Any:
        return value_and_gradient(jax.tree.map(lambda x: x + 1 if x.dtype == jnp.int32 else x, record))

    for k, run in (
        (K, lambda k: value_and_gradient(estimator(k, most=3))),
        (K - 1, lambda k: changed(estimator(k + 0, most=3))),
    ):
        value, status, gradient = jax.jit(run)(jnp.asarray(k))
        np.testing.assert_array_equal(np.isnan(gradient[:, 0]), K == 4)
        if estimator is not ic.Neumann:  # whose value has no k
            np.testing.assert_array_equal(np.isnan(value[:, 0]), K == 4)
            np.testing.assert_array_equal(status == ic.NONFINITE, K == 4)


def test_growth_is_told_of_the_samples_whose_terms_grow() -> None:
    """h ← a h + z: each term of λ = 1 is a times the one before, and one term cannot grow."""
    slope = torch.tensor([[-6.0], [-3.0], [0.5]], requires_grad=True)
    k = torch.tensor([1, 3, 3])
    f, h0, z = lambda h, z: slope * h + z, torch.zeros(3, 1), torch.ones(3, 1)
    for gradient in (ic.Neumann(k, 1.0), ic.Unroll(k, 1.0)):
        value = ic.fixed_point(f, h0, z, solver=lambda problem, h0, z: h0, gradient=gradient, batch_ndim=1).value
        with pytest.warns(ic.GrowingGradientWarning, match=r"in 1 of 3 samples \(1\)"):
            value.sum().backward()


@pytest.mark.parametrize("solver", [ic.FixedPointIteration, ic.Anderson, ic.Broyden])
def test_a_tolerance_of_each_sample(solver: Any, library: Library) -> None:
    problem, _, z = affine(library)
    start = library.array(np.zeros_like(Z))
    together = ic.solve(problem, start, z, solver=solver(rtol=library.array(RTOL)))
    for i, rtol in enumerate(RTOL):
        alone = ic.solve(problem, start, z, solver=solver(rtol=float(rtol)))
        assert library.numpy(together.stats.steps)[i] == library.numpy(alone.stats.steps)[i]
        np.testing.assert_allclose(
            library.numpy(together.stats.tolerance)[i], library.numpy(alone.stats.tolerance)[i], rtol=1e-6
        )
    assert list(library.numpy(together.status)) == [ic.CONVERGED] * 4


def test_a_tolerance_of_each_sample_holds_bptt(library: Library) -> None:
    problem, _, z = affine(library)
    solver = ic.FixedPointIteration(rtol=library.array(np.array([0.9, 1e-12, 0.9, 1e-12])))
    solution = ic.fixed_point(
        lambda h, z: problem.f(h, z), library.array(0 * Z), z, solver=solver, gradient=ic.BPTT(4), batch_ndim=1
    )
    assert list(library.numpy(solution.status)) == [ic.CONVERGED, ic.MAX_STEPS] * 2


def test_a_damping_of_each_sample(library: Library) -> None:
    problem, _, z = affine(library)
    solver = ic.steps(3, damping=library.array(LAM))
    value = library.numpy(ic.solve(problem, library.array(np.zeros_like(Z)), z, solver=solver).value)
    h = np.zeros_like(Z)
    for _ in range(3):
        h = LAM[:, None] * (A * h + Z) + (1 - LAM[:, None]) * h
    np.testing.assert_allclose(value, h, rtol=1e-12)


def test_compacting_takes_the_settings_of_its_samples() -> None:
    slope, z = torch.tensor(A), torch.tensor(Z)
    plain = ic.FixedPointIteration(rtol=torch.tensor(RTOL), damping=torch.tensor(LAM), max_steps=400)
    solutions = [
        ic.solve(lambda h, z: z[0] * h + z[1], torch.zeros_like(z), (slope, z), solver=solver, batch_ndim=1)
        for solver in (plain, ic.Compacting(plain, batched=(True, True)))
    ]
    assert [s.status.tolist() for s in solutions] == [[ic.CONVERGED] * 4] * 2
    assert solutions[0].stats.steps.tolist() == solutions[1].stats.steps.tolist()


def test_vmap_of_torch_shares_the_settings_of_samples() -> None:
    x = torch.tensor(Z).expand(3, 4, 1) * torch.tensor([1.0, 2.0, 3.0])[:, None, None]

    a, gradient = torch.tensor(A), ic.Neumann(torch.tensor(K), torch.tensor(LAM))

    def loss(x: Any) -> Any:
        solution = ic.fixed_point(lambda h, x: a * h + x, torch.zeros_like(x), x, gradient=gradient, batch_ndim=1)
        return solution.value.sum()

    gradients = torch.func.vmap(torch.func.grad(loss))(x)
    np.testing.assert_allclose(gradients, np.broadcast_to(derivative(), (3, 4, 1)), rtol=1e-12)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: ic.Unroll(np.array([1, 0])), ValueError, "k must be at least 1"),
        (lambda: ic.Unroll(np.array([1.0, 2.0])), TypeError, "k must be an integer"),
        (lambda: ic.Unroll([1, 2]), TypeError, "k must be an integer, or an array of integers"),
        (lambda: ic.steps(2.0), TypeError, "n must be an integer"),
        (
            lambda: ic.solve(lambda h, z: h, np.ones((2, 1)), None, solver=ic.steps(np.array([1, 2]))),
            ValueError,
            "with batch_ndim=1 the first axis of h counts samples",
        ),
        (lambda: ic.Neumann(np.array([1, 9]), most=8), ValueError, "most must be at least the largest k, 9"),
        (lambda: replace(ic.Unroll(np.array([1, 4])), k=np.array([5, 2])), ValueError, "also give most=None"),
        (lambda: jax.jit(lambda k: ic.Unroll(k).largest)(jnp.asarray([1, 2])), TypeError, "most=8"),
        (
            lambda: ic.fixed_point(
                lambda h, z: h, np.ones((3, 1)), None, gradient=ic.Unroll(np.array([1, 2])), batch_ndim=1
            ),
            ValueError,
            r"k of Unroll must be one number, or one for each sample, of shape \(3,\)",
        ),
        (
            lambda: ic.solve(lambda h, z: h, np.ones(3), None, solver=ic.Anderson(damping=np.array([0.5, 1.0]))),
            ValueError,
            "damping of Anderson must be one number",
        ),
    ],
)
def test_what_is_refused(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


def test_a_number_of_a_framework_is_a_number() -> None:
    for k in (torch.tensor(3), jnp.asarray(3), np.asarray(3)):
        assert ic.Unroll(k) == ic.Unroll(3)
    assert replace(ic.Unroll(np.array([1, 4])), k=7) == ic.Unroll(7)
    assert replace(ic.Unroll(np.array([1, 4])), k=np.array([5, 2]), most=None).largest == 5
    assert ict.ImplicitLayer(lambda h, x: 0.5 * h + x, gradient=ic.Unroll(torch.tensor(3))).gradient.k == 3


@pytest.mark.filterwarnings("ignore:.*get_attr:UserWarning")  # of PyTorch 2.6, for an array k
def test_an_exported_program_makes_a_known_number_of_steps() -> None:
    options: Any = {"solver": ic.steps(torch.tensor([1, 2, 0])), "gradient": ic.Unroll(1, 1.0)}
    layer = ict.ImplicitLayer(torch.nn.Bilinear(2, 2, 2), **options)
    with pytest.raises(TypeError, match="a program that is exported needs to know"):
        torch.export.export(layer, (torch.zeros(3, 2),), strict=False)
    layer.solver, layer.gradient = ic.steps(1), ic.Unroll(torch.tensor([1, 2, 1]), 1.0)
    x = torch.ones(3, 2)
    torch.testing.assert_close(torch.export.export(layer, (x,), strict=False).module()(x), layer(x))


def root_of_difference(xp: Any) -> Any:
    """√(z - h z), whose derivative in h is infinite at h = 1, where F(0) lies for z = 1."""
    return lambda h, z: xp.sqrt(z - h * z)


@pytest.mark.parametrize(
    "estimator", [lambda k: ic.Unroll(k, 1.0, on_growth="ignore"), lambda k: ic.BPTT(k, on_growth="ignore")]
)
def test_a_sample_without_steps_left_is_not_differentiated_where_it_ends(estimator: Any) -> None:
    """F has no derivative at h_1 = 1 of the first sample, which makes one step; the second one makes two."""
    k, h0, z = np.array([1, 2]), np.array([[0.0], [0.5]]), np.array([[1.0], [0.7]])
    x = torch.tensor(z, requires_grad=True)
    options: Any = {"solver": lambda problem, h0, z: h0, "batch_ndim": 1}
    value = ic.fixed_point(root_of_difference(torch), torch.tensor(h0), x, gradient=estimator(k), **options).value
    (of_torch,) = torch.autograd.grad(value.sum(), x)
    expected = np.array([[0.5 / np.sqrt(1.0)], [0.0]])
    (alone,) = torch.autograd.grad(
        ic.fixed_point(
            root_of_difference(torch), torch.tensor(h0[1:]), x[1:], gradient=estimator(2), **options
        ).value.sum(),
        x,
    )
    expected[1] = alone[1].numpy()
    np.testing.assert_allclose(of_torch.numpy(), expected, rtol=1e-12)

    def loss(z: Any) -> Any:
        return ic.fixed_point(root_of_difference(jnp), jnp.asarray(h0), z, gradient=estimator(k), **options).value.sum()

    np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(z)), expected, rtol=1e-12)
    problem = ict.problem(root_of_difference(torch), batch_ndim=1)
    _, pullback = estimator(k).vjp(problem, torch.tensor(h0), x.detach())
    np.testing.assert_allclose(pullback(torch.ones(2, 1).double()).numpy(), expected, rtol=1e-12)
    _, tangent = estimator(k).jvp(problem, torch.tensor(h0), x.detach(), torch.ones(2, 1).double())
    np.testing.assert_allclose(tangent, expected, rtol=1e-12)


@pytest.mark.parametrize("on_growth", ["nan", "warn"])
@pytest.mark.parametrize("estimator", [ic.Unroll, ic.Neumann])
def test_each_sample_has_the_limit_of_its_own_k(
    estimator: Any, on_growth: Any, recwarn: pytest.WarningsRecorder
) -> None:
    """Of h ← -5 h + z two terms grow fivefold, beyond the limit for k = 2, below the one for k = 10."""
    k, slopes = np.array([2, 10]), np.array([[-5.0], [0.5]])
    gradient = estimator(k, 1.0, on_growth=on_growth)
    stay: Any = {"solver": lambda problem, h0, z: h0, "batch_ndim": 1, "gradient": gradient}
    z = torch.ones(2, 1, dtype=torch.float64, requires_grad=True)
    value = ic.fixed_point(lambda h, z: torch.tensor(slopes) * h + z, torch.zeros(2, 1).double(), z, **stay).value
    recwarn.clear()
    (found,) = torch.autograd.grad(value.sum(), z)
    assert found.isnan().flatten().tolist() == [on_growth == "nan", False]
    warned = [str(w.message) for w in recwarn.list if issubclass(w.category, ic.GrowingGradientWarning)]
    assert len(warned) == (on_growth == "warn")
    assert all("in 1 of 2 samples (0): the last of its terms there is larger" in message for message in warned)
    if on_growth == "nan":
        f = lambda h, z: jnp.asarray(slopes) * h + z  # noqa: E731
        loss = lambda z: ic.fixed_point(f, jnp.zeros((2, 1)), z, **stay).value.sum()  # noqa: E731
        for differentiated in (jax.grad(loss), jax.jit(jax.grad(loss))):
            assert np.isnan(differentiated(jnp.ones((2, 1)))).flatten().tolist() == [True, False]
        problem = ic.Problem(lambda h, z: slopes * h + z, vjp=lambda h, z, v: (slopes * v, v), batch_ndim=1)
        pulled = gradient.vjp(problem, np.zeros((2, 1)), np.ones((2, 1)))[1](np.ones((2, 1)))
        assert np.isnan(pulled).flatten().tolist() == [True, False]
