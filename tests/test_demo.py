"""The command line and the demo, in all frameworks."""

import importlib
import io
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpus
import numpy as np
import pytest
from libraries import promoting
from rich.console import Console

from implicit_core import __main__ as command_line
from implicit_core.examples import digits
from implicit_core.examples.digits import Result, model

pytestmark = pytest.mark.slow

ESTIMATORS = ["Implicit", "Unroll(5, 0.5)", "Neumann(5, 0.5)", "OneStep"]


@pytest.fixture(scope="module", autouse=True)
def three_frameworks() -> Iterator[None]:
    """The demo runs in NumPy, PyTorch and JAX, with or without a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        train = importlib.import_module("implicit_core.examples.digits.train")
        patch.setattr(train, "installed", lambda: {"cupy": False})
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("demo") / "curves.png"
    console = Console(file=io.StringIO(), width=80)
    with promoting("optax"):
        results = digits.run("all", epochs=3, seed=1, output=path, console=console)
    return results, console.file.getvalue(), path


@pytest.fixture(params=["numpy", "torch", "jax"])
def one(request: pytest.FixtureRequest, trained: Any) -> list[Result]:
    """The results in one framework."""
    return [result for result in trained[0] if result.framework == request.param]


def test_training_learns_and_every_solve_converges(one: list[Result]) -> None:
    assert [result.name for result in one] == ESTIMATORS
    for result in one:
        assert result.accuracy > 0.9
        assert np.mean(result.losses[-10:]) < 0.25 * np.mean(result.losses[:10])
        assert result.loss == pytest.approx(np.mean(result.losses[-22:]))
        assert result.counts.unconverged == 0


def test_the_counts_agree_with_the_cost_table(one: list[Result]) -> None:
    by_name = {result.name: result for result in one}
    assert [by_name[name].value_evaluations for name in ESTIMATORS] == [1, 5, 1, 1]
    assert by_name["OneStep"].vjps == 1
    assert by_name["Neumann(5, 0.5)"].vjps == by_name["Unroll(5, 0.5)"].vjps == 5
    assert by_name["Implicit"].vjps > 5


def test_the_cosines_are_ordered_as_the_estimators_are(one: list[Result]) -> None:
    exact, unrolled, neumann, one_step = (result.cosine for result in one)
    assert exact > 0.99999 > unrolled > one_step > 0.5
    assert unrolled == pytest.approx(neumann, abs=1e-3)


def test_table_and_picture(trained: Any) -> None:
    results, text, path = trained
    assert all(len(line) <= 80 for line in text.splitlines() if not line.startswith("Curves"))
    assert len(results) == 12
    for group in zip(results[::3], results[1::3], results[2::3], strict=True):
        cells = [
            rf"{result.framework} +{result.accuracy:.1%} +{result.loss:.4f} .* {result.cosine:.4f} *"
            for result in group
        ]
        rows = rf"^{re.escape(group[0].name)} +{cells[0]}\n +{cells[1]} \de-\d\d\n +{cells[2]} \de-\d\d$"
        assert re.search(rows, text, re.MULTILINE)
    assert "counted in a second, untimed run" in text
    for result in results:
        assert result.passed == (f"{result.name}, {result.framework}: test accuracy" not in text)
    assert str(path) in text
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("index", "framework"), [(1, "torch"), (2, "jax")])
def test_all_frameworks_train_the_same_model(index: int, framework: str, trained: Any) -> None:
    for a, b in zip(trained[0][::3], trained[0][index::3], strict=True):
        assert (a.framework, b.framework, a.name) == ("numpy", framework, b.name)
        np.testing.assert_allclose(a.losses, b.losses, rtol=1e-3)
        assert a.parameters.keys() == b.parameters.keys() == set("WUbVc")
        assert digits.result.difference(a, b) < digits.result.TOLERANCE
        counts = (a.counts.evaluations, a.counts.vjps), (b.counts.evaluations, b.counts.vjps)
        assert counts[0] == pytest.approx(counts[1], rel=0.01)


def test_failures_are_of_accuracy_and_of_agreement(trained: Any) -> None:
    results = [replace(result, accuracies=np.array([0.97])) for result in trained[0]]
    assert digits.failures(results) == []
    low = replace(results[0], accuracies=np.array([0.95]))
    assert digits.failures([low, *results[1:]]) == ["Implicit, numpy: test accuracy 95.0% is not above 95%."]
    parameters = results[10].parameters
    for offset, shown in ((2e-4, "2.0e-04"), (np.nan, "nan")):
        other = replace(results[10], parameters={**parameters, "c": parameters["c"] + np.float32(offset)})
        (message,) = digits.failures([*results[:10], other, results[11]])
        assert message == f"OneStep: numpy and torch differ by {shown}, which is more than 1e-04."


def test_one_framework_alone(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=80)
    results = digits.run("numpy", epochs=1, output=tmp_path, console=console)
    assert [(result.framework, result.name) for result in results] == [("numpy", name) for name in ESTIMATORS]
    assert "diff" not in console.file.getvalue()
    assert (tmp_path / "digits-numpy.png").exists()


def test_a_wrong_derivative_is_a_disagreement(trained: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An error of a few per cent does not stop training; only the comparison with another framework shows it."""
    module = importlib.import_module("implicit_core.examples.digits.model_numpy")
    right = module.vjp

    def wrong(h: Any, z: Any, v: Any) -> Any:
        v_h, v_z = right(h, z, v)
        return v_h, {**v_z, "b": 1.01 * v_z["b"]}

    monkeypatch.setattr(module, "vjp", wrong)
    wrongly = digits.run("numpy", epochs=3, seed=1, output=tmp_path, console=Console(file=io.StringIO()))
    results = list(trained[0])
    results[::3] = wrongly
    found = digits.failures(results)
    for other in ("torch", "jax"):
        assert sum(f"numpy and {other} differ" in failure for failure in found) == len(ESTIMATORS)


def test_solves_that_fail_are_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    starved = model.ic.FixedPointIteration(rtol=1e-6, max_steps=2)
    monkeypatch.setattr(importlib.import_module("implicit_core.examples.digits.model_numpy"), "SOLVER", starved)
    console = Console(file=io.StringIO(), width=80)
    digits.run("numpy", epochs=1, output=tmp_path, console=console)
    assert "OneStep, numpy: " in console.file.getvalue()
    assert "solves did not converge" in console.file.getvalue()


def test_demo_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "curves.svg"
    code = command_line.main(["demo", "--framework", "numpy", "--epochs", "1", "--output", str(path)])
    assert code == 1  # one epoch is too little, and the demo names them
    assert capsys.readouterr().out.count("is not above 95%") == 4
    assert path.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--framework", "both"], "invalid choice: 'both'"),
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
    assert "--framework {numpy,torch,jax,cupy,all}" in shown
    assert "(default: 20)" in shown


def test_info_names_every_framework(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["info"]) == 0
    shown = capsys.readouterr().out
    for name in ("numpy", "torch", "array_api_strict"):
        assert re.search(rf"^{name} +yes +\d.*cpu", shown, re.MULTILINE)
    assert all(len(line) <= 80 for line in shown.splitlines())


@pytest.mark.parametrize(
    ("framework", "module", "extras"),
    [
        ("all", "torch", "jax-demo,torch"),
        ("all", "optax", "jax-demo,torch"),
        ("jax", "jax", "jax-demo"),
        ("torch", "rich", "demo,torch"),
        ("numpy", "rich", "demo"),
        ("cupy", "cupy", "demo,cupy12"),
    ],
)
def test_a_missing_extra_is_named(
    framework: str, module: str, extras: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named '{module}'", name=module)

    monkeypatch.setattr(importlib, "import_module", missing)
    assert command_line.main(["demo", "--framework", framework]) == 2
    shown = capsys.readouterr().err
    assert f"The demo needs {command_line.MODULES[module]}, which is not installed; " in shown
    assert ("for CUDA 13 it is cupy13" in shown) == (module == "cupy")
    assert f'in a checkout: pip install -e ".[{extras}]"' in shown
    assert (f"With --framework numpy it needs no {module}." in shown) == (module != "rich")


@pytest.mark.parametrize("framework", ["numpy", "torch", "jax"])
def test_only_the_chosen_framework_is_imported(framework: str) -> None:
    """In a new process, where no framework has been imported."""
    code = (
        "import sys; from implicit_core.examples.digits.train import model_classes\n"
        f"print(*model_classes({framework!r}), *{{'torch', 'jax', 'optax'}} & set(sys.modules))"
    )
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    loaded = {"numpy": [], "torch": ["torch"], "jax": ["jax", "optax"]}
    assert sorted(shown.split()) == sorted([framework, *loaded[framework]])


class Missing:
    """An import of a framework that is not installed. (None in ``sys.modules`` would confuse array-api-compat.)"""

    @staticmethod
    def find_spec(name: str, *_: Any) -> None:
        if name in ("torch", "jax"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.mark.parametrize(("framework", "code"), [("all", 2), ("numpy", 1)])
def test_numpy_alone_needs_no_other_framework(
    framework: str, code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("torch", "jax"):
        monkeypatch.delitem(sys.modules, f"implicit_core.examples.digits.model_{module}", raising=False)
        monkeypatch.delattr(digits, f"model_{module}", raising=False)
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "meta_path", [Missing, *sys.meta_path])
    arguments = ["demo", "--framework", framework, "--epochs", "1", "--output", str(tmp_path)]
    assert command_line.main(arguments) == code
    shown = capsys.readouterr()
    assert ("needs torch" in shown.err) == (framework == "all")
    assert ("%" in shown.out) == (framework == "numpy")  # found before any training


@pytest.mark.skipif(gpus.WITHOUT_CUPY == "", reason="CuPy has a device")
def test_without_a_gpu_cupy_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["demo", "--framework", "cupy", "--output", str(tmp_path)]) == 2
    shown = capsys.readouterr().err
    assert re.search(r"can't compute with CuPy, which found no CUDA device \(cudaError\w+\)\.", shown)
    assert "With --framework numpy it needs no GPU." in shown
    with pytest.raises(digits.NoGPUError, match="no CUDA device"):
        digits.run("cupy", epochs=1, output=tmp_path)


@pytest.mark.parametrize("_", [pytest.param("", marks=gpus.CUPY)])
def test_on_a_gpu_cupy_trains_as_numpy_does(_: str, tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=80)
    results = {name: digits.run(name, epochs=3, seed=1, output=tmp_path, console=console) for name in ("numpy", "cupy")}
    for a, b in zip(results["numpy"], results["cupy"], strict=True):
        np.testing.assert_allclose(a.losses, b.losses, rtol=1e-3)
        assert digits.result.difference(a, b) < digits.result.TOLERANCE
        counts = (a.counts.evaluations, a.counts.vjps), (b.counts.evaluations, b.counts.vjps)
        assert counts[0] == pytest.approx(counts[1], rel=0.01)
