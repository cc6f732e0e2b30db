"""The paper's Fig. 1 and Theorem 3, small: what they assert holds, and is found false of numbers tampered with."""

import copy
import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import __main__ as benchmarks
from benchmarks import fig1, theorem3

pytestmark = pytest.mark.slow

TOLERANCE = {"rtol": 1e-6, "atol": 1e-9}


def columns(path: Path) -> dict[str, list[str]]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [row[name] for row in rows] for name in rows[0]}


def saved(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The saved numbers of a small run whose statements hold, after checks of its printed and saved tables."""
    assert benchmarks.main([name, "--quick", "--output", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "The paper's statements hold." in printed
    assert max(map(len, printed.splitlines())) <= 80
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "|---" in (folder / f"{name}.md").read_text()
    record: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return record


@pytest.fixture(scope="module")
def cosines() -> tuple[fig1.Curves, dict[str, float]]:
    """Mean cosines (λ, k) of a small run, and its setting."""
    z, targets = fig1.draw(np.random.default_rng(0), 16, 4, 24, "orthogonal")
    curves, setting = fig1.measure(z, targets, 15, lambda _: None)
    return {key: curve.mean(-1) for key, curve in curves.items()}, setting


def test_figure_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = saved("fig1", tmp_path, capsys)
    assert record["setting"]["relative_error"] < 1e-5
    assert record["setting"]["cross_check"] > 0.9999
    found = columns(tmp_path / "fig1.csv")
    assert list(found) == ["form", "fixed_point", "lambda", "k", "mean", "standard_deviation", "minimum"]
    assert len(found["k"]) == 2 * 2 * len(fig1.LAMBDAS) * 20
    mean, low = (np.array(found[name], dtype=float) for name in ("mean", "minimum"))
    np.testing.assert_allclose(mean, [row["mean"] for row in record["rows"]], rtol=1e-7)
    assert np.all((low <= mean) & (mean <= 1))


def test_the_layers_callbacks_are_its_derivatives() -> None:
    """⟨v, F(h + t dh, z + t dz) - F(h, z)⟩ / t tends to the pullbacks' inner products, for all three parameters."""
    z, v = fig1.draw(np.random.default_rng(1), 2, 3, 5, "gaussian")
    rng = np.random.default_rng(2)
    h, dh = rng.normal(size=(2, *v.shape))
    dz = {name: rng.normal(size=z[name].shape) if name != "x" else np.zeros_like(z["x"]) for name in z}
    moved = [fig1.value(h + t * dh, {name: z[name] + t * dz[name] for name in z}) for t in (1e-6, -1e-6)]
    at: Any = fig1.linearize(h, z)
    v_h, v_z = at.vjp_h(v), at.vjp_z(v)
    expected = np.sum(v_h * dh) + sum(np.sum(v_z[name] * dz[name]) for name in ("w", "u", "b"))
    np.testing.assert_allclose(np.sum(v * (moved[0] - moved[1])) / 2e-6, expected, **TOLERANCE)
    norms = np.linalg.norm(z["w"], 2, axis=(1, 2))
    np.testing.assert_allclose(norms, 0.9)


def test_the_figures_statements_hold(cosines: tuple[fig1.Curves, dict[str, float]]) -> None:
    assert fig1.contradictions(*cosines) == []


def fig1_lies() -> list[Any]:
    def swap_forms(means: fig1.Curves, setting: dict[str, float]) -> None:
        means["unrolled", "inexact"], means["Neumann", "inexact"] = (
            means["Neumann", "inexact"],
            means["unrolled", "inexact"],
        )

    def swap_points(means: fig1.Curves, setting: dict[str, float]) -> None:
        means["Neumann", "exact"], means["Neumann", "inexact"] = means["Neumann", "inexact"], means["Neumann", "exact"]

    def reverse(axis: int) -> Any:
        return lambda means, setting: means.update({key: np.flip(mean, axis) for key, mean in means.items()})

    return [
        pytest.param(swap_forms, "3. the unrolled form", id="forms swapped"),
        pytest.param(swap_points, "3. both forms agree", id="points swapped"),
        pytest.param(reverse(1), "1. the cosine rises with k", id="k reversed"),
        pytest.param(reverse(0), "2. the cosine rises more slowly", id="λ reversed"),
        pytest.param(lambda _, setting: setting.update(relative_error=1e-4), "below 1e-5", id="unsolved"),
        pytest.param(lambda _, setting: setting.update(cross_check=0.999), "above 0.9999", id="wrong gradient"),
    ]


@pytest.mark.parametrize(("lie", "sentence"), fig1_lies())
def test_a_contradicted_statement_of_the_figure_is_named(
    cosines: tuple[fig1.Curves, dict[str, float]], lie: Any, sentence: str
) -> None:
    means, setting = copy.deepcopy(cosines)
    lie(means, setting)
    assert any(sentence in found for found in fig1.contradictions(means, setting))


@pytest.fixture(scope="module")
def descent() -> theorem3.Trace:
    return theorem3.descend(seed=0, runs=32, steps=1000, announce=lambda _: None)


def test_theorem_3(monkeypatch: pytest.MonkeyPatch, descent: theorem3.Trace, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.setattr(theorem3, "descend", lambda *_: descent)
    record = saved("theorem3", tmp_path, capsys)
    found = columns(tmp_path / "theorem3.csv")
    assert list(found) == ["gradient", "T", "mean", "standard_deviation", "square", "risk", "reference"]
    assert (
        list(dict.fromkeys(found["gradient"])) == list(record["rows"]) == ["exact", "k = 1", "k = 2", "k = 4", "k = 8"]
    )
    last = [float(mean) for mean, T in zip(found["mean"], found["T"], strict=True) if T == "1000"]
    np.testing.assert_allclose(last, [row["mean"] for row in record["rows"].values()], rtol=1e-7)


def test_the_trace_of_a_descent(descent: theorem3.Trace) -> None:
    """Its weights add up to the sum of all step sizes, and its exact gradient has no error."""
    np.testing.assert_allclose(descent.weights.sum(), theorem3.RATE * np.sum(1 / np.sqrt(np.arange(1, 1001))))
    assert descent.epsilon[0] < 1e-8 < descent.epsilon[-1]
    assert descent.squares.shape == (len(descent.steps), 5, 32)
    np.testing.assert_allclose(descent.squares[0, 1:], descent.squares[0, :1].repeat(4, axis=0))


def test_the_dense_gradient_is_the_gradient_of_the_risk() -> None:
    """Compared with central differences of R, whose fixed points are found by Newton's method."""
    data, theta = theorem3.draw(np.random.default_rng(3)), np.array([0.7, -1.2])

    def risk(theta: np.ndarray) -> float:
        z = theorem3.at(np.tile(theta, (theorem3.DATA, 1)), data, np.arange(theorem3.DATA))
        return float(theorem3.loss(theorem3.newton(np.zeros_like(data["y"]), z), data["y"]).mean())

    expected = [(risk(theta + step) - risk(theta - step)) / 2e-5 for step in 1e-5 * np.eye(2)]
    states = np.zeros((1, theorem3.DATA, theorem3.STATES))
    samples = np.repeat(theta[None], len(theorem3.GRADIENTS), axis=0)
    squares, biases, risks = theorem3.evaluate(samples, data, states.repeat(len(samples), axis=0))
    np.testing.assert_allclose(squares, np.sum(np.square(expected)), **TOLERANCE)
    np.testing.assert_allclose(risks, risk(theta))
    assert biases[0] < 1e-15
    assert np.all(np.diff(biases[1:]) < 0)


def theorem3_lies() -> list[Any]:
    def set_row(name: str, **numbers: float) -> Any:
        return lambda found: found["rows"][name].update(numbers)

    def swap_rows(found: dict[str, Any]) -> None:
        rows = found["rows"]
        rows["k = 1"], rows["k = 8"] = rows["k = 8"], rows["k = 1"]

    def level(found: dict[str, Any]) -> None:
        steps = np.array(found["steps"])
        found["growth"]["exact"] = theorem3.growth(steps, np.maximum(found["means"]["exact"], 0.4))

    def fall(found: dict[str, Any]) -> None:
        found["growth"]["k = 1"] = theorem3.growth(np.array(found["steps"]), np.array(found["means"]["exact"]))

    return [
        pytest.param(level, "1. the exact gradient's mean follows", id="the exact gradient levels off"),
        pytest.param(fall, "2. the mean of k = 1 does not follow", id="no ε term"),
        pytest.param(set_row("k = 1", plateau=0.0), "2. the plateau of k = 1", id="no plateau"),
        pytest.param(swap_rows, "3. the plateau falls with k", id="terms swapped"),
        pytest.param(swap_rows, "3. ε falls with k", id="errors swapped"),
        pytest.param(set_row("k = 2", epsilon=1e-3), "4. the plateau is within ε G", id="ε too small"),
        pytest.param(set_row("k = 2", bias=1e-3), "4. the plateau is within 2 B", id="B too small"),
        pytest.param(set_row("exact", last_risk=9.0), "5. R decreases (exact)", id="R increases"),
    ]


@pytest.mark.parametrize(("lie", "sentence"), theorem3_lies())
def test_a_contradicted_statement_of_the_theorem_is_named(descent: theorem3.Trace, lie: Any, sentence: str) -> None:
    found = theorem3.summary(descent)
    assert theorem3.contradictions(found) == []
    lie(found)
    assert any(sentence in broken for broken in theorem3.contradictions(found))


def test_a_statement_that_fails_is_the_commands_failure(
    monkeypatch: pytest.MonkeyPatch, descent: theorem3.Trace, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(theorem3, "descend", lambda *_: descent)
    monkeypatch.setattr(theorem3, "contradictions", lambda _: ["5. R decreases (exact)"])
    assert theorem3.main(["--quick"]) == 1
    assert "Does not hold: 5. R decreases (exact)." in capsys.readouterr().out


@pytest.mark.parametrize("name", ["fig1", "theorem3"])
def test_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        benchmarks.main([name, "--help"])
    printed = capsys.readouterr().out
    assert "of the paper" in printed
    assert {"--quick", "--seed", "--output"} <= set(printed.replace(",", " ").split())
    assert "--threads" not in printed
