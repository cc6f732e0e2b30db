"""The tables and figures that come from trainings of multiscale models: their runs, files and numbers."""

import csv
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.nn.functional import cross_entropy

import implicit_core as ic
from benchmarks import __main__ as benchmarks
from benchmarks import report, runs
from benchmarks.counting import counting
from benchmarks.mdeq import command, cosines, experiments, fig2, fig3, steps, table1, table3, tables, trainings
from benchmarks.mdeq.experiments import MODELS, ROWS, settings_of
from benchmarks.runs import ResultError
from implicit_core.examples.mdeq.settings import PRESETS
from implicit_core.examples.mdeq.source import Source
from implicit_core.examples.mdeq.training import COMPARED, Training, number

pytestmark = pytest.mark.slow

TINY = {"pixels": 0, "train": 64, "test": 32, "epochs": 2, "solver_steps": 4, "products": 4}


@pytest.fixture(autouse=True)
def tiny_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of eight steps."""
    monkeypatch.setattr(experiments, "DATA", {**experiments.DATA, "digits": TINY})
    monkeypatch.setattr(trainings, "MARKS", 2)


def run(folder: Path, row: str = "upg-5-0.5", seed: int = 0, **more: Any) -> trainings.Run:
    return trainings.Run("ablation", row, "small", "digits", seed, folder, folder, **more)


def test_a_run_that_is_stopped_goes_on_and_ends_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = run(tmp_path / "whole", "implicit"), tmp_path / "parts"
    trainings.execute(whole)
    clock = itertools.count()  # it is read before every step
    monkeypatch.setattr(trainings.time, "time", lambda: next(clock))
    for until in (2, 6):  # in the first epoch, and in the second one
        with pytest.raises(trainings.OutOfTimeError):
            trainings.execute(run(parts, "implicit", until=until))
        assert run(parts, "implicit").unfinished.exists()
    trainings.execute(run(parts, "implicit"))
    one, other = (json.loads((folder / whole.result.name).read_text()) for folder in (tmp_path / "whole", parts))
    for record in (one, other):
        for epoch in record["epochs"]:
            del epoch["seconds"], epoch["processor_seconds"]
    assert one == other
    assert [moment["step"] for moment in one["compared"]] == [0, 4, 8]
    assert not list(parts.glob("*.pt"))


def test_table_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--results", str(tmp_path), "--scratch", str(tmp_path)]
    rows = ["--rows", "upg-5-0.5", "npg-5-0.5"]
    assert benchmarks.main(["table1", "--seeds", "2", *rows, *files]) == 0
    printed = capsys.readouterr().out
    assert max(len(line) for line in printed.splitlines() if not line.startswith("digits-")) <= 80
    assert "UPG(5, .5)" in printed
    record = json.loads((tmp_path / "tables" / "table1-digits.json").read_text())
    assert {row: [result["seed"] for result in results] for row, results in record["runs"].items()} == {
        "upg-5-0.5": [0, 1],
        "npg-5-0.5": [0, 1],
    }
    with (tmp_path / "tables" / "table1-digits.csv").open() as file:
        epochs = list(csv.DictReader(file))
    assert len(epochs) == 2 * 2 * 2
    best = max(float(epoch["test/accuracy"]) for epoch in epochs if epoch["row"] == "upg-5-0.5")
    assert f"({100 * best:.1f})" in (tmp_path / "tables" / "table1-digits.md").read_text()
    assert (tmp_path / "tables" / "table1-digits.png").stat().st_size > 1000
    # Nothing is made again, and the other commands use the same runs.
    begun = {path: path.stat().st_mtime_ns for path in tmp_path.glob("digits-*.json")}
    assert fig3.main(["--seeds", "2", "--rows", "upg-5-0.5", *files]) == 0
    assert begun == {path: path.stat().st_mtime_ns for path in tmp_path.glob("digits-*.json")}
    shutil.rmtree(tmp_path / "tables")
    (tmp_path / "tables").touch()
    capsys.readouterr()
    assert benchmarks.main(["table1", "--report", *files]) == 2
    assert re.fullmatch(r"python -m benchmarks table1: .*tables.*: [\w ]+\n", capsys.readouterr().err)
    with pytest.raises(SystemExit):
        table1.main(["--report", "--restart", *files])


def test_table_3(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "REPETITIONS", 2)
    files = ["--results", str(tmp_path), "--scratch", str(tmp_path), "--seeds", "1"]
    assert benchmarks.main(["table3", *files]) == 0
    printed = capsys.readouterr().out
    assert max(len(line) for line in printed.splitlines() if not line.startswith("digits-")) <= 80
    measured = (file := tmp_path / "digits-steps-cpu.json").read_text()
    rows = {row["name"]: row["costs"] for row in json.loads(measured)["rows"]}
    ours, theirs = rows["exact"], rows["TorchDEQ exact"]
    # Equal numbers of evaluations in the forward pass, and of pullbacks. TorchDEQ makes its last graph twice.
    assert (ours[0], ours[2]) == (theirs[0], theirs[2])
    # It is measured once for each device, and never for a report. TorchDEQ's runs are others than ours.
    assert benchmarks.main(["table3", *files]) == 0
    assert file.read_text() == measured
    monkeypatch.setattr(steps, "measure", lambda *_: pytest.fail("measured again"))
    file.rename(tmp_path / "digits-steps-cuda.json")
    capsys.readouterr()
    assert benchmarks.main(["table3", "--report", *files]) == 0
    assert "TorchDEQ, IFT" in (shown := capsys.readouterr().out)
    assert "recomputed" not in shown
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        benchmarks.main(["table3", *files])
    losses = [json.loads(path.read_text())["epochs"][-1]["train/loss"] for path in tmp_path.glob("digits-*-upg*.json")]
    assert len(losses) == 2
    assert losses[0] != losses[1]


def test_steps_are_not_measured_when_the_time_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = ["--results", str(tmp_path), "--scratch", str(tmp_path), "--seeds", "1"]
    trainings.execute(replace(run(tmp_path), family="large"))
    monkeypatch.setattr(steps, "measure", lambda *_: pytest.fail("measured"))
    assert table3.main([*files, "--minutes", "1e-9"]) == 0


def test_figure_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--results", str(tmp_path), "--scratch", str(tmp_path)]
    assert fig2.main(["--seeds", "1", *files]) == 0
    printed = capsys.readouterr().out
    assert max(len(line) for line in printed.splitlines() if not line.startswith("digits-")) <= 80
    assert "…" not in printed  # a cell that is cut off
    compared = json.loads((tmp_path / "digits-ablation-implicit-0.json").read_text())["compared"]
    for moment in compared:
        [cells] = [line.split() for line in printed.splitlines() if line.startswith(f"{moment['step']} ")]
        cosines, lengths = moment["gradients"]["npg-5-0.5"].values()
        assert cells[4:7] == [f"{median(cosines):.3f}", f"{min(cosines):.2f}", f"{median(lengths):.2f}"]
        residuals = median(moment["residual"]), median(moment["adjoint_residual"])
        assert cells[-3:] == [f"{x:.0e}" for x in (*residuals, max(moment["largest_adjoint_residual"]))]
    assert fig2.main(["--seeds", "1", "--report", *files]) == 0


def test_a_gradient_beside_itself_has_cosine_and_length_one(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of("ablation", "implicit", "small", "digits", 0)
    training = Training(settings, Source.of(settings, None))
    before = {name: value.clone() for name, value in training.model.state_dict().items()}
    monkeypatch.setattr(cosines, "estimators", lambda _: {"exact": cosines.exact()})
    compared = cosines.compare(training)
    found = compared["gradients"]["exact"]
    assert found["cosine"] == pytest.approx([1.0] * len(found["cosine"]), abs=1e-5)
    assert found["length"] == pytest.approx([1.0] * len(found["length"]), abs=1e-4)
    for name, value in training.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    # The median tells nothing of the sample that decides a batch's gradient.
    largest = compared["largest_adjoint_residual"]
    assert all(a >= b for a, b in zip(largest, compared["adjoint_residual"], strict=True))
    assert max(largest) > max(compared["adjoint_residual"])
    assert min(compared["adjoint_residual"]) < 1e-3


def test_gradients_are_compared_with_the_masks_and_the_norms_of_a_training(monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(
        settings := settings_of("ablation", "implicit", "small", "digits", 0), Source.of(settings, None)
    )
    made, original = [], cosines.gradient
    monkeypatch.setattr(cosines, "estimators", lambda _: {"one-step": ic.OneStep()})
    monkeypatch.setattr(cosines, "gradient", lambda *given: made.append(original(*given)) or made[-1])
    cosines.compare(training)
    images, labels = training.source.test.pixels[:16], training.source.test.labels[:16]
    model = training.model.train()
    torch.manual_seed(number(0, COMPARED, 0, 0))
    cross_entropy(model(training.source.normalized(images), gradient=ic.OneStep()), labels).backward()
    expected = torch.cat([p.grad.flatten() for name, p in model.named_parameters() if not name.startswith("head.")])
    assert settings.dropout > 0
    torch.testing.assert_close(made[1][0].float(), expected)
    assert made[1][1] == float(model.stats.relative.median())


@pytest.mark.parametrize(
    ("row", "evaluations", "pullbacks"),
    # The start, the steps and the graph, which the exact gradient makes twice.
    [
        ("implicit", 1 + TINY["solver_steps"] + 2, 1 + TINY["products"] + 1),
        ("upg-5-0.5", 1 + TINY["solver_steps"] + 5, 5),
    ],
)
def test_rows_of_torchdeq_have_the_costs_of_their_gradient(
    row: str, evaluations: int, pullbacks: int, tmp_path: Path
) -> None:
    training = trainings.begin(replace(run(tmp_path, row), family="torchdeq"))
    for _ in range(training.pretraining_steps):
        training.step()
    with counting(training.model.layer.cell) as counted:
        training.step()
    assert (counted.evaluations, counted.vjps) == (evaluations, pullbacks)


@pytest.mark.parametrize("scale", experiments.SCALES)
def test_all_rows_have_settings(scale: str) -> None:
    for family in MODELS:
        for row in ROWS:
            settings = settings_of(family, row, scale, "cifar10", 3)
            assert settings.model == MODELS[family][scale]
            assert (settings.gradient == "implicit") == row.startswith("implicit")
            assert settings.seed == 3


def test_published_settings() -> None:
    tiny = settings_of("ablation", "upg-5-0.5", "paper", "cifar10", 0)
    assert (tiny.epochs, tiny.batch, tiny.rate, tiny.decay, tiny.solver_steps, tiny.augment) == (
        50,
        128,
        0.1,
        1e-4,
        23,
        0,
    )
    exact = settings_of("ablation", "implicit", "paper", "cifar10", 0)
    assert (exact.optimizer, exact.rate, exact.dropout, exact.products) == ("adam", 1e-3, 0.25, 24)
    # 3000 steps of pretraining, out of 50 epochs of 390
    assert round(exact.pretraining * 50 * 390, -2) == 2900
    # 20,000 steps, out of 220 epochs
    exact = settings_of("large", "implicit", "paper", "cifar10", 0)
    assert (exact.optimizer, exact.rate, exact.dropout, exact.products) == ("adam", 1e-3, 0.3, 20)
    assert round(exact.pretraining * 220 * 390, -3) == 20_000
    imagenet = PRESETS["imagenet"]
    assert (imagenet.epochs, imagenet.solver_steps, imagenet.products) == (100, 27, 27)
    large = settings_of("large", "upg-5-0.5", "paper", "cifar10", 0)
    assert (large.epochs, large.batch, large.solver_steps, large.augment) == (220, 128, 19, 1)


def test_what_is_wrong_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--results", str(tmp_path), "--scratch", str(tmp_path)]
    with pytest.raises(SystemExit, match="2"):
        table1.main(["--rows", "sgd", *files])
    assert "no row is named sgd" in capsys.readouterr().err
    assert table1.main(["--data", "cifar10", "--data-dir", str(tmp_path), *files]) == 2
    assert "cifar-10-python.tar.gz" in "".join(capsys.readouterr().out.split("\n"))
    assert table1.main(["--report", *files]) == 1
    capsys.readouterr()
    assert table1.main(["--rows", "upg-5-0.5", "upg-5-0.5", "--seeds", "1", "--minutes", "1e-9", *files]) == 1
    assert "1 runs to make" in capsys.readouterr().out
    trainings.execute(run(tmp_path))
    result = tmp_path / "digits-ablation-upg-5-0.5-0.json"
    result.write_text(result.read_text().replace('"batch": 16', '"batch": 17'))
    assert table1.main(["--rows", "upg-5-0.5", *files]) == 2
    assert "other settings" in capsys.readouterr().out
    for content in ("", "{}", "[]"):
        result.write_text(content)
        assert table1.main(["--report", *files]) == 2
        assert "is from another version, or damaged" in " ".join(capsys.readouterr().out.split())


def test_a_checkpoint_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    made = run(tmp_path)
    other = {"training": {"done": 3}, "compared": []}
    made.save(other)
    with pytest.raises(ResultError, match="is from another version, or damaged: remove it, or pass --restart"):
        trainings.execute(made)
    made.unfinished.write_bytes(b"no checkpoint")
    with pytest.raises(ResultError, match="another version, or damaged"):
        trainings.execute(made)
    made.save({"training": trainings.begin(made).state() | {"optimizer": 3}, "compared": []})
    with pytest.raises(ResultError, match="another version, or damaged"):  # PyTorch raises an AttributeError
        trainings.execute(made)
    replace(made, seed=1).save(other)
    made.unfinished.write_bytes(replace(made, seed=1).unfinished.read_bytes())
    with pytest.raises(ResultError, match="made with other settings"):
        trainings.execute(made)


def test_a_run_that_diverges_counts_as_a_guess(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(experiments.DATA, "digits", TINY | {"rate": float("1e38")})
    trainings.execute(run(tmp_path))
    record = json.loads(run(tmp_path).result.read_text())
    assert record["diverged"] is not None
    assert table1.last([record]) == [10.0]


@pytest.mark.parametrize("row", ["upg-5-0.5", "npg-5-0.5", "implicit-no-pretraining"])
@pytest.mark.parametrize("ruined", [5, 8], ids=["on the way", "in the last step"])
def test_a_run_whose_parameters_become_nan_has_diverged(
    row: str, ruined: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ruined(Training):
        def step(self) -> None:
            super().step()
            if self.done == ruined:
                next(self.model.parameters()).data.fill_(math.nan)

    monkeypatch.setattr(trainings, "Training", Ruined)
    trainings.execute(run(tmp_path, row))
    record = json.loads(run(tmp_path, row).result.read_text())
    assert record["diverged"] == min(ruined + 1, record["steps"])
    assert len(record["epochs"]) == 1


def test_the_name_of_a_gpu_is_in_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card of {device}")
    assert report.environment(device="cuda:1")["machine"]["gpu"] == "card of cuda:1"
    assert "gpu" not in report.environment()["machine"]


def test_cells_of_a_wide_table_are_not_cut_off(capsys: pytest.CaptureFixture[str]) -> None:
    cells = [f"-9.{i} ± 0.{i}" for i in range(10)]
    report.Table([str(i) for i in range(10)], [cells], [], "").show(Console(width=80))
    assert capsys.readouterr().out.splitlines()[1].split("  ")[0].strip() == " ".join(cells)


def result(seed: int, *accuracies: float, diverged: int | None = None) -> dict[str, Any]:
    epochs = [{"test/accuracy": accuracy, "processor_seconds": 2.0, "seconds": 7.0} for accuracy in accuracies]
    return {"seed": seed, "diverged": diverged, "epochs": epochs, "device": "cpu"}


def test_numbers_of_tables() -> None:
    ours, exact = [result(0, 0.5, 0.4), result(1, 0.1, 0.6)], [result(1, 0.2, 0.3), result(0, 0.3, 0.2), result(2, 0.9)]
    assert tables.last(ours) == pytest.approx([40, 60])
    assert tables.best(ours) == pytest.approx([50, 60])
    assert tables.spread([40, 60]) == "50.0 ± 14.1"  # √(10² + 10²)
    assert tables.spread([40]) == "40.0"
    # 40 - 20 and 60 - 30, of equal seeds: mean 25, deviation √50, divided by √2
    assert tables.difference(ours, exact) == pytest.approx((25, 5))
    assert tables.signed((-1.25, 0.5)) == "-1.2 ± 0.5"
    assert tables.difference(ours, exact[2:]) is None
    assert tables.seconds(ours) == 4
    assert tables.seconds([one | {"device": "cuda"} for one in ours]) == 14
    assert tables.seconds([ours[0], ours[1] | {"device": "cuda"}]) == 9
    assert tables.seconds([*ours, result(2, 0.9, diverged=3)]) == 4
    assert math.isnan(tables.seconds([result(2, 0.9, diverged=3)]))
    assert math.isnan(tables.median([]))
    assert tables.count([*ours, result(2, diverged=3)]) == "3 (1)"
    assert tables.accuracies(result(2, 0.9, diverged=3)) == [10]
    assert tables.median([1.0, 3.0, 8.0]) == 3
    assert math.isnan(tables.median([1.0, None]))


def test_rows_train_what_their_names_say() -> None:
    for row, changes in ROWS.items():
        form, *numbers = row.split("-")
        if form in ("upg", "npg"):
            gradient = {"upg": "unroll", "npg": "neumann"}[form]
            assert (changes["gradient"], changes["k"], changes["lam"]) == (gradient, int(numbers[0]), float(numbers[1]))
            assert changes["dropout"] == (0.25 if row.endswith("dropout") else 0.0)
        else:
            assert (changes.get("pretraining", 0) > 0) == ("no-pretraining" not in row)
            assert (changes["dropout"] > 0) == ("no-dropout" not in row)
            assert (changes.get("optimizer") == "adam") == ("sgd" not in row)


def test_what_figure_2_says_of_several_runs() -> None:
    def moment(*cosines: float | None) -> dict[str, Any]:
        return {"compared": [{"gradients": {"upg": {"cosine": list(cosines)}}}]}

    found = fig2.of_all([moment(0.1, 0.2), moment(None, 0.4)], 0, "upg", "cosine")
    assert found[:2] + found[3:] == [0.1, 0.2, 0.4]
    assert math.isnan(found[2])


def test_results_with_other_settings_are_told_in_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--results", str(tmp_path), "--scratch", str(tmp_path), "--seeds", "1", "--rows", "upg-5-0.5"]
    assert table1.main(["--epochs", "1", *files]) == 0
    capsys.readouterr()
    assert table1.main(["--report", *files]) == 2
    assert "made with other settings" in capsys.readouterr().out


def test_runs_of_other_numbers_of_epochs_have_files_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "HERE", tmp_path)
    files = ["--scratch", str(tmp_path), "--seeds", "1", "--rows", "upg-5-0.5"]
    for more in (["--epochs", "1"], []):
        assert table1.main([*files, *more]) == 0
    found = sorted(str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob("digits-*.json"))
    assert found == ["results/small", "results/small-1-epochs"]
    assert run(tmp_path, epochs=1).unfinished != run(tmp_path).unfinished


def test_nothing_is_removed_or_trained_that_ends_in_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = ["--results", str(tmp_path), "--scratch", str(tmp_path), "--seeds", "1", "--rows", "upg-5-0.5"]
    kept = tmp_path / "cifar10-ablation-upg-5-0.5-0.json"
    kept.touch()
    (result := tmp_path / "digits-large-upg-5-0.5-0.json").touch()
    assert table1.main(["--restart", "--data", "cifar10", "--data-dir", str(tmp_path), *files]) == 2
    assert kept.exists()
    monkeypatch.setattr(trainings, "begin", lambda _: pytest.fail("a training was begun"))
    for name in ("--results", "--scratch"):
        assert table1.main([*files, name, str(kept)]) == 2
        assert "can't be written" in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "torchdeq", None)
    monkeypatch.delitem(sys.modules, "benchmarks.mdeq.torchdeq", raising=False)
    for more in ([], ["--restart"]):
        assert table3.main([*files[:-1], *["upg-5-0.5"] * bool(more), "torchdeq-upg-5-0.5", *more]) == 2
        assert "upg-5-0.5 of TorchDEQ needs torchdeq" in capsys.readouterr().out
    assert result.read_text() == ""


def test_a_report_needs_no_device_and_may_be_interrupted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results of a GPU are shown where there is none."""
    files = ["--results", str(tmp_path), "--scratch", str(tmp_path), "--seeds", "1"]
    trainings.execute(run(tmp_path))
    assert table1.main(["--report", "--device", "abacus", *files]) == 0
    assert table1.main(["--device", "abacus", *files]) == 2
    assert "There is no device 'abacus'" in capsys.readouterr().out

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "save", interrupted)
    assert table1.main(["--report", *files]) == 130


def test_results_of_other_images_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = {"train": 64, "test": 32, "pixels": 8, "source": "the official files"}
    results = [{"row": "upg", "seed": seed, "data": "cifar10", "images": dict(images)} for seed in range(2)]
    tables.require_same_images(results)
    results[1]["images"]["source"] = "not the official files"
    with pytest.raises(ResultError, match="upg of seed 1 was trained on other images"):
        tables.require_same_images(results)
    files = ["--results", str(tmp_path), "--scratch", str(tmp_path), "--seeds", "2", "--rows", "upg-5-0.5"]
    assert table1.main(files) == 0
    path = tmp_path / "digits-ablation-upg-5-0.5-1.json"
    path.write_text(path.read_text().replace('"pixels": 8', '"pixels": 4'))
    assert table1.main(["--report", *files]) == 2


def test_a_run_that_another_command_has_finished_is_left_out(tmp_path: Path) -> None:
    made: list[trainings.Run] = []

    def execute(one: trainings.Run) -> None:
        made.append(one)
        for seed in range(2):  # as if another command had made both
            run(tmp_path, seed=seed).finish({"settings": runs.plain(run(tmp_path, seed=seed).settings)})

    runs.make_all([run(tmp_path, seed=seed) for seed in range(2)], execute, workers=1, restart=False)
    assert [one.seed for one in made] == [0]


def test_runs_end_when_the_time_is_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--results", str(tmp_path), "--scratch", str(tmp_path), "--seeds", "1"]
    assert table1.main(["--minutes", "1e-9", *files]) == 1
    assert "the same command goes on" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.pt"))  # nothing was begun
    assert table1.main(["--minutes", "1e-9", "--restart", *files]) == 1
    assert "the same command without --restart goes on" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit, match="2"):
        table1.main(["--minutes", "0", *files])


@pytest.mark.parametrize("reach", ["the terminal", "the parent", "the parent, to terminate"])
def test_ctrl_c_saves_the_run_and_ends_all_workers(reach: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", WORKERS.format(tmp_path)]
    process = subprocess.Popen(
        command, cwd=report.ROOT, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    lines = iter(process.stdout.readline, "")
    assert any("epoch 1" in line for line in lines)
    if reach == "the terminal":
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGTERM if reach.endswith("terminate") else signal.SIGINT)
    rest = process.communicate(timeout=60)[0]
    assert process.returncode == 130, rest
    assert "the same command goes on" in rest
    assert list(tmp_path.glob("*.pt"))


WORKERS = """
import sys
from benchmarks.mdeq import table1
if __name__ == "__main__":
    files = ["--results", "{0}", "--scratch", "{0}"]
    sys.exit(table1.main([*files, "--workers", "2", "--epochs", "30", "--rows", "upg-5-0.5", "npg-5-0.5"]))
"""


def test_files_of_cifar10_that_are_not_the_official_ones_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    assert trainings.origin("digits", None) == ""
    assert trainings.origin("cifar10", tmp_path) == "unknown files"  # an archive
    folder.mkdir()
    for name in trainings.MD5:
        (folder / name).write_bytes(b"other")
    for place in (tmp_path, folder):
        assert trainings.origin("cifar10", place) == "not the official files"
