"""The benchmarks run and count correctly; times are not tested."""

import doctest
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from libraries import dispatched

from benchmarks import __main__ as benchmarks
from benchmarks import jax_layer, memory, recursive_step, torch_step
from benchmarks.mdeq import steps, table2

pytestmark = pytest.mark.slow

TINY = ["--batch", "2", "--channels", "4", "--size", "6", "--steps", "7", "--k", "3", "--threads", "1"]
COUNTS = {
    "Implicit(Richardson)": (8, 0, 8),
    "Unroll(3)": (10, 0, 3),
    "Unroll(3, recompute)": (10, 3, 3),
    "Neumann(3)": (8, 0, 3),
    "OneStep": (8, 0, 1),
    "BPTT(7)": (7, 0, 7),
    "TorchDEQ IFT": (8, 1, 8),
    "TorchDEQ IFT (hook)": (8, 0, 8),
    "TorchDEQ UPG(3)": (10, 0, 3),
}


def test_the_table_of_a_training_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / "step.json", tmp_path / "step.md"]
    saved = [argument for file in files for argument in ("--output", str(file))]
    assert torch_step.main([*TINY, "--repetitions", "2", "--no-rss", *saved]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    record = json.loads(files[0].read_text())
    assert record["settings"]["steps"] == 7
    rows = {row["name"]: row for row in record["rows"]}
    for name, counts in COUNTS.items():
        assert name in printed
        assert f"| {name} |" in files[1].read_text()
        found = rows[name]["forward_evaluations"], rows[name]["backward_evaluations"], rows[name]["vjps"]
        assert found == counts, name
        assert len(rows[name]["times"]) == len(rows[name]["ratios"]) == 2
    assert rows["OneStep"]["held"] == rows["Neumann(3)"]["held"] < rows["Unroll(3)"]["held"] < rows["BPTT(7)"]["held"]


def test_resident_memory_is_measured_in_a_new_process() -> None:
    grown = torch_step.grown_elsewhere("OneStep", TINY)
    assert grown is None if torch_step.high_water() is None else grown > 0


@pytest.mark.parametrize("arguments", [["--output", "table.txt"], ["--steps", "0"], ["--solver", "newton"]])
def test_wrong_arguments_are_reported_before_anything_runs(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        torch_step.main(arguments)
    assert arguments[0] in capsys.readouterr().err


def test_the_table_of_a_layer_in_jax(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / "layer.json", tmp_path / "layer.md"]
    saved = [argument for file in files for argument in ("--output", str(file))]
    tiny = ["--batch", "4", "--width", "8", "--repetitions", "2", "--compiles", "1", "--k", "3"]
    assert jax_layer.main([*tiny, *saved]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    rows = {row["name"]: row for row in json.loads(files[0].read_text())["rows"]}
    assert {"plain, Neumann(3)", "plain, GMRES", "jaxopt plain, GMRES", "optimistix plain, GMRES"} <= rows.keys()
    for name, row in rows.items():
        assert name in printed
        assert f"| {name} |" in files[1].read_text()
        assert row["residual"] <= 1e-4
        assert len(row["forward"]) == len(row["gradient"]) == 2
        assert (row["cosine"] > 0.9999) == ("Neumann" not in name and "Unroll" not in name)


def test_the_table_of_recursive_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both forms of a loop lead to the same parameters, or the benchmark fails."""
    files = [tmp_path / "recursive.json", tmp_path / "recursive.md"]
    saved = [argument for file in files for argument in ("--output", str(file))]
    tiny = ["--batch", "4", "--tokens", "3", "--width", "8", "--steps", "2", "--cycles", "2", "--pairs", "2"]
    assert recursive_step.main([*tiny, *saved]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    rows = {row["name"]: row for row in json.loads(files[0].read_text())["rows"]}
    assert {"TRM", "TRM, ImplicitLayer", "HRM, nested layers", "8 + 4", "by hand, twice"} <= rows.keys()
    for name, row in rows.items():
        assert name in printed
        assert f"| {name} |" in files[1].read_text()
        assert len(row["by_hand"]) == len(row["library"]) == 2
    assert (rows["TRM"]["free"], rows["TRM"]["graded"]) == (3, 3)
    assert (rows["HRM, nested layers"]["free"], rows["HRM, nested layers"]["graded"]) == (4, 2)


def test_live_tensors() -> None:
    assert doctest.testmod(memory) == (0, 4)


def saved(folder: Path, name: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The saved numbers of a run, after checks of its printed and saved tables."""
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "|---" in (folder / f"{name}.md").read_text()
    record: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return record


def command(name: str, *arguments: str, folder: Path) -> int:
    return benchmarks.main(
        [name, "--quick", "--repetitions", "1", "--threads", "1", "--output", str(folder), *arguments]
    )


def test_solvers_compared_with_other_libraries(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    only = ["--solver", "fixed point", "--solver", "Anderson", "--equation", "stiff", "--equation", "symmetric"]
    assert command("solvers", *only, folder=tmp_path) == 0
    record = saved(tmp_path, "solvers", capsys)
    plain, anderson = ({row["equation"]: row for row in rows} for rows in record["solvers"].values())
    assert set(plain["stiff heat"]["evaluations"].values()) == {None}
    found = plain["symmetric 32x128"]["evaluations"]
    assert found["ours"] == found["ours, jit"] == found["TorchDEQ"] == min(found.values()) == 62
    for row in anderson.values():
        ours, *others = (row["evaluations"][name] for name in ("ours", "TorchDEQ", "SciPy", "jaxopt"))
        assert ours <= min(count for count in others if count)
    # A step of plain iteration copies the result of F: Decision 6.
    limits = {"fixed point": 7, "Anderson": 30, "Broyden": 41}
    for row in record["overhead"]:
        assert 0 < row["operations"]["ours"] <= dispatched(limits[row["solver"]]) < row["operations"]["TorchDEQ"]


def test_gradients_compared_with_torchdeq(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("gradients", "--batch", "4", "--width", "8", folder=tmp_path) == 0
    rows = {row["name"]: row for row in saved(tmp_path, "gradients", capsys)["rows"]}
    counts = {name: (row["evaluations"], row["vjps"]) for name, row in rows.items()}
    assert counts["Neumann(5)"] == counts["loop, Neumann(5)"] == (1, 5)
    assert counts["Unroll(5)"] == counts["loop, Unroll(5)"] == counts["TorchDEQ UPG(5)"] == (5, 5)
    assert counts["OneStep"] == (1, 1)
    assert rows["Neumann(5)"]["held"] == rows["OneStep"]["held"] <= rows["TorchDEQ UPG(5)"]["held"] / 2


def test_a_training_step_compared_with_torchdeq(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("training", folder=tmp_path) == 0
    for rows in saved(tmp_path, "training", capsys)["rows"].values():
        for row in rows:
            assert row["residual"] <= 1e-3
            assert row["cosine"] > (0.999 if "Implicit" in row["name"] or "IFT" in row["name"] else 0.9)


def test_scaling(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("scaling", folder=tmp_path) == 0
    assert saved(tmp_path, "scaling", capsys)["curves"].keys() == {"batch", "width", "memory", "k"}


def test_an_unknown_command_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmarks.main(["solver"]) == 2
    assert "unknown command 'solver'; choose from solvers, gradients" in capsys.readouterr().err
    assert benchmarks.main(["--help"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
    with pytest.raises(SystemExit, match="2"):
        benchmarks.main(["solvers", "--equation", "nonsense"])
    assert "no equation begins with nonsense" in capsys.readouterr().err


def test_the_costs_of_the_papers_table_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command compares them with the paper's orders."""
    assert benchmarks.main(["table2", "--quick", "--output", str(tmp_path)]) == 0
    rows = saved(tmp_path, "table2", capsys)["rows"]
    lines = {
        name: {what: (line["start"], line["slope"]) for what, line in of["lines"].items()} for name, of in rows.items()
    }
    assert lines["Implicit"]["VJP"] == pytest.approx((1, 1))
    assert lines["UPG"]["F"] == lines["UPG"]["VJP"] == pytest.approx((0, 1))
    assert lines["UPG, recomputed"]["F"] == pytest.approx((0, 2))
    assert (lines["NPG"]["F"], lines["NPG"]["VJP"]) == (pytest.approx((1, 0)), pytest.approx((0, 1)))
    wrong = table2.Line(1.0, 0.5, 0.0)
    broken = table2.contradictions({name: dict.fromkeys(of, wrong) for name, of in lines.items()}, 0.06)
    assert len(broken) == 12  # what is held and the peak, in each row


def test_the_steps_of_a_multiscale_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both libraries evaluate the cell equally often. TorchDEQ evaluates it once more in its backward pass."""
    file = tmp_path / "steps.json"
    given = ["--data", "digits", "--batch", "2", "--repetitions", "2", "--output", str(file)]
    assert benchmarks.main(["multiscale", *given]) == 0
    measured = steps.Steps.of(json.loads(file.read_text()))
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    rows = {row.name: row for row in measured.rows}
    assert all(name in printed and len(row.times) == 2 for name, row in rows.items())
    exact, theirs = rows["exact"].costs, rows["TorchDEQ exact"].costs
    assert (exact.forward, exact.backward, exact.vjps) == (23, 0, 25)
    assert (theirs.forward, theirs.backward, theirs.vjps) == (23, 1, 25)
    for name in ("UPG(5, 0.5)", "recomputed", "TorchDEQ UPG"):
        assert (rows[name].costs.forward, rows[name].costs.vjps) == (27, 5)
    assert rows["recomputed"].costs.backward == rows["NPG(5, 0.5)"].costs.vjps == 5
    assert exact.peak < theirs.peak
    with pytest.raises(SystemExit, match="2"):
        benchmarks.main(["multiscale", "--device", "nowhere"])
    assert "no device 'nowhere'" in capsys.readouterr().err
    for model, given, least, side in (("small", ["--pixels", "3"], 2, 3), ("imagenet", ["--data", "digits"], 32, 8)):
        with pytest.raises(SystemExit, match="2"):
            benchmarks.main(["multiscale", "--model", model, *given])
        told = f"the {model} model needs sides that are multiples of {least}, got {side} pixels"
        assert told in capsys.readouterr().err


def test_a_missing_package_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "benchmarks.recursive_step", raising=False)
    assert benchmarks.main(["recursive"]) == 2
    assert capsys.readouterr().err == 'python -m benchmarks recursive needs torch: pip install -e ".[test]"\n'
