"""The command line and the demo, in both frameworks."""

import importlib
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from implicit_core import __main__ as command_line
from implicit_core.examples import digits
from implicit_core.examples.digits import model

ESTIMATORS = ["Implicit", "Unroll(5, 0.5)", "Neumann(5, 0.5)", "OneStep"]


@pytest.fixture(scope="module", params=["numpy", "torch"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("demo") / "curves.png"
    console = Console(file=io.StringIO(), width=80)
    results = digits.run(request.param, epochs=4, seed=1, output=path, console=console)
    return request.param, results, console.file.getvalue(), path


def test_training_learns_and_every_solve_converges(trained: Any) -> None:
    _, results, _, _ = trained
    assert [result.name for result in results] == ESTIMATORS
    for result in results:
        assert result.accuracy > 0.9
        assert np.mean(result.losses[-10:]) < 0.25 * np.mean(result.losses[:10])
        assert result.counts.unconverged == 0


def test_the_counts_are_those_of_the_cost_table(trained: Any) -> None:
    _, results, _, _ = trained
    by_name = {result.name: result for result in results}
    assert [by_name[name].value_evaluations for name in ESTIMATORS] == [1, 5, 1, 1]
    assert by_name["OneStep"].vjps == 1
    assert by_name["Neumann(5, 0.5)"].vjps == by_name["Unroll(5, 0.5)"].vjps == 5
    assert by_name["Implicit"].vjps > 5


def test_the_cosines_are_ordered_as_the_estimators_are(trained: Any) -> None:
    _, results, _, _ = trained
    exact, unrolled, neumann, one_step = (result.cosine for result in results)
    assert exact > 0.99999 > unrolled > one_step > 0.5
    assert unrolled == pytest.approx(neumann, abs=1e-3)


def test_table_and_picture(trained: Any) -> None:
    framework, results, text, path = trained
    assert all(len(line) <= 80 for line in text.splitlines() if not line.startswith("Curves"))
    for result in results:
        assert re.search(rf"{re.escape(result.name)} +│ +{result.accuracy:.1%}", text)
        assert result.passed == (f"{result.name}: test accuracy" not in text)
    assert framework in text
    assert str(path) in text
    assert path.read_bytes().startswith(b"\x89PNG")


def test_both_frameworks_train_the_same_model(tmp_path: Path) -> None:
    quiet = Console(file=io.StringIO())
    ours, theirs = (digits.run(f, epochs=1, output=tmp_path, console=quiet) for f in ("numpy", "torch"))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a.losses, b.losses, rtol=1e-3)
        assert a.counts == b.counts


def test_solves_that_fail_are_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    starved = model.ic.FixedPointIteration(rtol=1e-6, max_steps=2)
    for name in ("model_numpy", "model_torch"):
        monkeypatch.setattr(importlib.import_module(f"implicit_core.examples.digits.{name}"), "SOLVER", starved)
    console = Console(file=io.StringIO(), width=80)
    digits.run("numpy", epochs=1, output=tmp_path, console=console)
    assert "OneStep: " in console.file.getvalue()
    assert "solves did not converge" in console.file.getvalue()


def test_demo_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = command_line.main(["demo", "--epochs", "1", "--output", str(tmp_path / "new" / "curves.svg")])
    assert code == 1  # one epoch is too little, and the demo says for whom
    assert capsys.readouterr().out.count("is not above 95%") == 4
    assert (tmp_path / "new" / "curves.svg").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--framework", "jax"], "invalid choice: 'jax'"),
        (["demo", "--epochs", "0"], "--epochs: must be at least 1, got 0"),
        (["demo", "--epochs", "many"], "--epochs: must be an integer, got 'many'"),
        (["demo", "--output", "curves.gif"], "--output: .*curves.gif"),
        (["train"], "invalid choice: 'train'"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        command_line.main(arguments)
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main([]) == 2
    assert "demo" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command_line.main(["demo", "--help"])
    shown = capsys.readouterr().out
    assert "--framework {numpy,torch}" in shown
    assert "(default: 20)" in shown


def test_info_names_every_framework(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["info"]) == 0
    shown = capsys.readouterr().out
    for name in ("numpy", "torch", "array_api_strict"):
        assert re.search(rf"^{name} +yes +\d.*cpu", shown, re.MULTILINE)
    assert all(len(line) <= 80 for line in shown.splitlines())


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError("No module named 'rich'", name="rich")

    monkeypatch.setattr(importlib, "import_module", missing)
    assert command_line.main(["demo"]) == 2
    assert 'pip install "implicit-core[demo]"' in capsys.readouterr().err
