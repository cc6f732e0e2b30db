"""The bilevel example: its hypergradients against dense linear algebra, in both frameworks, and its search."""

import functools
import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from threadpoolctl import threadpool_limits

import implicit_core as ic
from implicit_core.examples.bilevel import data, oracle, run, search
from implicit_core.examples.bilevel.__main__ import PROGRAM, main
from implicit_core.examples.bilevel.data import Data, Floats
from implicit_core.examples.bilevel.frameworks import FRAMEWORKS, Evaluation, with_torch
from implicit_core.examples.bilevel.model import cross_entropy

pytestmark = pytest.mark.slow

EXACT = ["Implicit(GMRES)", "Implicit(CG)"]
TIGHT = {"rtol": 1e-13, "max_steps": 1000}


@pytest.fixture(scope="module")
def samples() -> Data:
    return data.load()


@pytest.fixture(autouse=True)
def one_thread() -> object:
    with threadpool_limits(1):
        yield


def hyperparameters() -> Floats:
    """Unequal hyperparameters."""
    return np.random.default_rng(1).uniform(-3.0, -1.0, size=data.FEATURES)


@functools.cache
def exact() -> tuple[Floats, Floats]:
    """The solution at the hyperparameters above, and the hypergradient."""
    samples = data.load()
    w = oracle.solve(samples.training, hyperparameters())
    return w, oracle.hypergradient(samples, hyperparameters(), w)


@functools.cache
def evaluation(
    framework: str, gradient: ic.Estimator, solver: ic.Solver = ic.Anderson(memory=10, **TIGHT)
) -> Evaluation:
    samples = data.load()
    return FRAMEWORKS[framework](samples, solver, gradient)(hyperparameters(), search.start(samples)[1])


def relative(found: Floats, expected: Floats) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def jacobian(samples: Data) -> Floats:
    """∂F/∂w at the solution, dense."""
    w, _ = exact()
    hessian = oracle.hessian(samples.training, w, hyperparameters())
    return np.eye(w.size) - samples.training.step_size(hyperparameters()) * hessian


@pytest.mark.parametrize("feature", [0, 7, 20, 35, 64])
def test_the_oracle_is_the_slope_of_the_solved_problem(samples: Data, feature: int) -> None:
    w, hypergradient = exact()
    slope = oracle.central_difference(samples, hyperparameters(), feature, w)
    np.testing.assert_allclose(hypergradient[feature], slope, rtol=1e-6, atol=1e-10)
    assert np.abs(hypergradient[[7, 20, 35, 64]]).min() > 1e-4


def test_the_model_agrees_with_the_oracle(samples: Data) -> None:
    """Its loss, its gradient, which is zero at the solution, and its products with the Hessian."""
    training, theta, (w, _) = samples.training, hyperparameters(), exact()
    rng = np.random.default_rng(0)
    v, away = rng.normal(size=w.shape), w + 1e-2 * rng.normal(size=w.shape)
    np.testing.assert_allclose(cross_entropy(w, *samples.test), oracle.loss(w, samples.test), rtol=1e-12)
    assert np.linalg.norm(training.gradient(w, theta)) < 1e-11
    assert np.linalg.norm(training.gradient(away, theta)) > 1e-3
    for point in (w, away):
        product = (oracle.hessian(training, point, theta) @ v.ravel()).reshape(v.shape)
        np.testing.assert_allclose(training.hessian_product(point, theta, v), product, rtol=0, atol=1e-12)
        slope = (training.gradient(point + 1e-5 * v, theta) - training.gradient(point - 1e-5 * v, theta)) / 2e-5
        np.testing.assert_allclose(slope, product, rtol=0, atol=1e-8)


def test_the_step_is_a_contraction(samples: Data) -> None:
    """The eigenvalues of its Jacobian lie between 0 and the documented bound."""
    eigenvalues = np.linalg.eigvalsh(jacobian(samples))
    theta = hyperparameters()
    assert eigenvalues[0] >= 0
    assert eigenvalues[-1] <= 1 - samples.training.step_size(theta) * np.exp(theta).min() + 1e-12


@pytest.mark.parametrize("name", EXACT)
def test_implicit_is_the_oracle_in_both_frameworks(name: str) -> None:
    linear_solver = {"Implicit(GMRES)": ic.GMRES(**TIGHT), "Implicit(CG)": ic.CG(**TIGHT)}[name]
    gradient = ic.Implicit(linear_solver)
    w, expected = exact()
    for framework in FRAMEWORKS:
        found = evaluation(framework, gradient)
        np.testing.assert_allclose(found.weights, w, rtol=0, atol=1e-10)
        assert relative(found.gradient, expected) < 1e-9
    ours, theirs = (evaluation(framework, gradient).gradient for framework in FRAMEWORKS)
    assert relative(ours, theirs) < 1e-8


@pytest.mark.parametrize("gradient", [ic.Neumann(k=7, lam=0.8), ic.Unroll(k=4, lam=1.0), ic.BPTT(k=6)], ids=str)
def test_the_frameworks_agree_on_every_estimator(gradient: ic.Estimator) -> None:
    ours, theirs = (evaluation(framework, gradient) for framework in FRAMEWORKS)
    assert relative(ours.gradient, theirs.gradient) < 1e-8
    np.testing.assert_allclose(ours.loss, theirs.loss, rtol=1e-12)
    assert relative(ours.gradient, exact()[1]) > 0.05  # it is not an exact gradient


@pytest.mark.parametrize("kind", [ic.Neumann, ic.Unroll], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("lam", [1.0, 0.5])
def test_phantom_gradients_converge_at_the_rate_of_theorem_2(samples: Data, kind: type, lam: float) -> None:
    """The error is at most ‖∂F/∂z‖ qᵏ / (1 - L_h) times the cotangent's norm, and at last falls by q a step."""
    w, expected = exact()
    theta, training = hyperparameters(), samples.training
    contraction = np.linalg.eigvalsh(jacobian(samples))[-1]
    q = 1 - lam * (1 - contraction)
    x, y = samples.validation
    cotangent = np.linalg.norm(x.T @ (oracle.softmax(x @ w) - y) / len(x))
    # ∂F/∂θ_j is -η e^θ_j w_j in the j-th row of w, and zero in the others.
    in_theta = training.step_size(theta) * np.max(np.exp(theta) * np.linalg.norm(w, axis=1))
    ks = [1, 2, 5, 10, 20, 50, 150, 250]
    evaluate = [with_torch(samples, lambda problem, h0, z: h0, kind(k=k, lam=lam)) for k in ks]
    errors = [float(np.linalg.norm(found(theta, w).gradient - expected)) for found in evaluate]
    bounds = [in_theta * q**k / (1 - contraction) * cotangent for k in ks]
    assert all(error <= bound for error, bound in zip(errors, bounds, strict=True))
    assert errors == sorted(errors, reverse=True)
    measured = (errors[-1] / errors[-2]) ** (1 / (ks[-1] - ks[-2]))
    assert 1.0 <= np.log(measured) / np.log(q) < 1.3


@pytest.mark.parametrize("name", ["OneStep", "Neumann(20)", "Unroll(20)", *EXACT])
def test_products_equal_the_products_of_a_pullback(samples: Data, name: str) -> None:
    """Compared with counts of the callbacks."""
    theta, training, (w, _), count = hyperparameters(), samples.training, exact(), 0

    def linearize(w: Floats, theta: Floats) -> ic.Linearization:
        size = training.step_size(theta)

        def vjp_h(v: Floats) -> Floats:
            nonlocal count
            count += 1
            return v - size * training.hessian_product(w, theta, v)

        def vjp_z(v: Floats) -> Floats:
            nonlocal count
            count += 1
            return -size * np.exp(theta) * np.sum(w * v, axis=1)

        return ic.Linearization(training.step(w, theta), vjp_h=vjp_h, vjp_z=vjp_z)

    gradient = search.ESTIMATORS[name]
    _, pullback = gradient.vjp(ic.Problem(training.step, linearize=linearize), w, theta)
    x, y = samples.validation
    z_bar = pullback(x.T @ (oracle.softmax(x @ w) - y) / len(x))
    assert count == search.products(samples, gradient, theta, w)
    found = evaluation("torch", gradient).gradient
    np.testing.assert_allclose(z_bar, found, rtol=0, atol=1e-7 * np.linalg.norm(found))


def test_products_that_are_not_known_are_not_guessed(samples: Data) -> None:
    with pytest.raises(TypeError, match=r"NeumannSeries.* is not known before it runs"):
        search.products(samples, ic.NeumannSeries(), hyperparameters(), exact()[0])


@pytest.mark.parametrize(
    ("framework", "name"),
    [("torch", "OneStep"), ("torch", "Neumann(20)"), ("torch", "Implicit(CG)"), ("jax", "OneStep")],
)
def test_a_search_lowers_the_validation_loss(samples: Data, framework: str, name: str) -> None:
    """Below the loss of the best common penalty for all pixels; the test loss falls, too."""
    gradient = search.ESTIMATORS[name]
    trace = search.search(samples, FRAMEWORKS[framework](samples, search.SOLVER, gradient), gradient, steps=10)
    shared = search.shared_penalty(samples)
    found, best = (oracle.solve(samples.training, theta) for theta in (trace.theta, shared.theta))
    assert trace.losses[-1] < trace.losses[0] - 0.3
    np.testing.assert_allclose(oracle.loss(best, samples.validation), shared.losses.min(), rtol=1e-9)
    assert oracle.loss(found, samples.validation) < shared.losses.min() - 0.2
    assert oracle.loss(found, samples.test) < oracle.loss(best, samples.test) - 0.2
    pixels = trace.theta[:64].reshape(8, 8)
    assert pixels[:, 6:].mean() > pixels[:, :4].mean() + 1  # the noisy ones are penalized


def test_the_program_prints_a_table_of_80_columns_and_saves_a_picture(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names = ["OneStep", "Implicit(CG)", "BPTT(20)"]
    monkeypatch.setattr(run, "ESTIMATORS", {name: search.ESTIMATORS[name] for name in names})
    console = Console(file=io.StringIO(), width=80)
    rows = run.run(steps=2, picture=tmp_path / "picture.png", console=console)
    assert [row.name for row in rows] == [*names, "one penalty"]
    one_step, implicit, bptt, _ = rows
    assert implicit.start.error < 1e-6 < one_step.start.error
    assert implicit.start.cosine > 0.999999
    assert (bptt.start.solve, bptt.start.value, bptt.start.products) == (0, 20, 39)
    lines = console.file.getvalue().splitlines()
    assert lines.pop().startswith("Picture: ")
    assert all(len(line) <= 80 for line in lines)
    assert any(line.split()[:1] == ["Implicit(CG)"] and line.split()[-1][0] == "1" for line in lines)
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_help_and_bad_arguments(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert PROGRAM in text
    assert "--framework {torch,jax}" in text
    assert all(len(line) <= 80 for line in text.splitlines())
    for arguments, message in (
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--picture", "a.txt"], "ending in one of .pdf, .png, .svg; got 'a.txt'"),
        (["--picture", str(tmp_path / "no" / "a.png")], "there is no folder"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
