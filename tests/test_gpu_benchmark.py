"""The GPU benchmark: a dry run on the CPU, and how it reports missing parts and failures."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gpus
import numpy as np
import pytest
import test_jax_gpu
import torch

from benchmarks import gpu, gpu_rows, gpu_tests, report

pytestmark = pytest.mark.slow

DRY = ["--device", "cpu", "--quick"]
HAS_GPU = gpus.WITHOUT_CUPY == "" or torch.cuda.is_available() or test_jax_gpu.gpu() is not None


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """One dry run."""
    folder = tmp_path_factory.mktemp("results")
    command = [*report.COMMAND, "gpu", *DRY, "--output", str(folder)]
    quick = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=report.ROOT, env=quick), folder


def test_a_dry_run_measures_on_the_cpu(dry: Any) -> None:
    done, folder = dry
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((folder / "gpu-cpu.json").read_text())
    assert record["card"] == "cpu"
    assert record["failures"] == []
    assert {"torch", "jax", "implicit-core", "torchdeq"} <= record["versions"].keys()
    assert record["rows"].keys() == {"torch", "jax"}
    for framework, rows in record["rows"].items():
        cases = {row["case"] for row in rows}
        assert cases == {"tanh 4 x 8", "conv 2x4x6²"}
        methods = {row["method"] for row in rows}
        assert {"plain, Neumann(5)", "Broyden, Neumann(5)", "Anderson, Implicit(GMRES)"} <= methods
        assert ("TorchDEQ Anderson, IFT" in methods) == (framework == "torch")
        assert ("Anderson, without jit" in methods) == (framework == "jax")
        for row in rows:
            assert all(len(row[name]) == 2 for name in ("forward", "step") if row[name])
            assert all(time > 0 for time in (*row["forward"], row["bare"]))


def test_it_lists_omissions_with_reasons(dry: Any) -> None:
    done, folder = dry
    for said in (
        "Left out: CuPy: CuPy has no arrays on the CPU.",
        "Left out: CUDA graphs: they need a CUDA device.",
        "Left out: peak memory in JAX",
    ):
        assert said in done.stdout
        assert said in (folder / "gpu-cpu.md").read_text()
    shown = [line for line in done.stdout.splitlines() if not line.startswith(("Written", "Left out"))]
    assert max(map(len, shown)) <= 80
    assert "| tanh 4 x 8 | plain, Neumann(5) |" in (folder / "gpu-cpu.md").read_text()


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
def test_without_a_gpu_it_reports_this_and_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    before = set(gpu.RESULTS.glob("*")) if gpu.RESULTS.exists() else set()
    assert gpu.main([]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("No GPU was found: PyTorch found no CUDA device; JAX found no GPU; ")
    assert "--device cpu" in printed
    assert before == (set(gpu.RESULTS.glob("*")) if gpu.RESULTS.exists() else set())


def settings(**changes: Any) -> gpu_rows.Settings:
    given = {"device": "cpu", "repetitions": 1, "sizes": (), "block": (1, 1, 1), "until": float("inf")} | changes
    return gpu_rows.Settings(**given)


def test_a_row_that_fails_is_reported_and_the_others_go_on() -> None:
    def fail() -> gpu_rows.Row:
        raise RuntimeError("out of memory")

    tasks = [("case", "one", fail), ("case", "two", lambda: gpu_rows.Row("case", "two"))]
    found = list(gpu_rows.carry_out(tasks, settings(), lambda _: None))
    assert found == [
        gpu_rows.Omission("case, one", "failed: RuntimeError: out of memory"),
        gpu_rows.Row("case", "two"),
    ]
    record = gpu.Record()
    record.take("torch", {"omission": {"what": "case, one", "why": "failed: RuntimeError: out of memory"}})
    assert record.failures == ["PyTorch, case, one: failed: RuntimeError: out of memory"]
    assert "FAILED: PyTorch, case, one: failed: RuntimeError: out of memory" in gpu.summary(record)


def test_rows_that_do_not_fit_into_the_time_are_listed() -> None:
    tasks = [("case", name, lambda: pytest.fail("it was begun")) for name in ("one", "two")]
    found = list(gpu_rows.carry_out(tasks, settings(until=0.0), lambda _: None))
    assert found == [gpu_rows.Omission(f"case, {name}", "the time was up") for name in ("one", "two")]


def test_a_framework_that_crashes_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "gpu.py"
    script.write_text(
        "import sys\n"
        "if 'jax' in sys.argv: sys.exit(\"ModuleNotFoundError: No module named 'jax'\")\n"
        "if 'cupy' in sys.argv: print('{\"card\": \"cpu\"}')\n"
        "if 'torch' in sys.argv: sys.exit('the driver is gone')\n"
    )
    monkeypatch.setattr(report, "COMMAND", (sys.executable, str(script)))
    assert gpu.main(DRY) == 1
    printed = capsys.readouterr().out
    assert "FAILED: PyTorch exited with 1: the driver is gone" in printed
    assert "Left out: JAX: it is not installed." in printed
    assert "Dry run: nothing was written." in printed


def test_a_skipped_test_has_not_passed(tmp_path: Path) -> None:
    """Outcomes read from the report of a real run of pytest."""
    (tmp_path / "test_cupy_some.py").write_text(
        "import pytest\npytest.skip('CuPy found no CUDA device', allow_module_level=True)\n"
    )
    (tmp_path / "test_jax_some.py").write_text(
        "import pytest\n"
        "@pytest.mark.skipif(True, reason='JAX found no GPU')\n"
        "def test_one(): pass\n"
        "def test_two(): assert False\n"
    )
    (tmp_path / "test_some.py").write_text("def test_one(): pass\ndef test_two(): pass\n")
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", "-p", "no:cacheprovider", str(tmp_path)]
    subprocess.run(command, capture_output=True, cwd=tmp_path)
    found = gpu_tests.read(report)
    assert found.keys() == {"CuPy", "JAX", "PyTorch"}
    assert (found["PyTorch"].passed, found["PyTorch"].failed, found["PyTorch"].skipped.total()) == (2, 0, 0)
    assert (found["JAX"].passed, found["JAX"].failed) == (0, 1)
    assert found["JAX"].skipped == {"JAX found no GPU": 1}
    assert found["CuPy"].passed == 0
    assert found["CuPy"].skipped == {"CuPy found no CUDA device": 1}
    record = gpu.Record()
    record.add_tests(found, None)
    assert record.failures == ["JAX: 1 tests failed"]
    assert record.omissions == [gpu_rows.Omission("tests of CuPy", "no test was run")]
    said = gpu.summary(record)
    assert "Tests of JAX: 0 passed, 1 failed, 1 skipped." in said
    assert "  skipped 1: JAX found no GPU" in said
    assert "Left out: tests of CuPy: no test was run." in said


def test_tests_that_take_too_long_are_stopped() -> None:
    found, wrong = gpu_tests.run(0.01)
    assert found == {}
    assert wrong == "the tests did not end within 0 s"


def test_the_speed_up_by_cuda_graphs() -> None:
    record = gpu.Record()
    rows = (
        gpu_rows.Row("tanh 32 x 128", "Anderson, Neumann(5)", 21, forward=[9.0, 8.0, 30.0], step=[12.0]),
        gpu_rows.Row("tanh 32 x 128", "Anderson, graphs", 22, forward=[2.0, 3.0, 1.0]),
        gpu_rows.Row("tanh 32 x 128", "Anderson, step captured", step=[6.0]),
        gpu_rows.Row("tanh 256 x 1024", "Anderson, graphs", 22, forward=[1.0]),
    )
    record.rows["torch"] = list(rows)
    assert record.speedups() == {"a solve": 4.5, "a captured training step": 2.0}
    said = "\n".join(gpu.summary(record))
    assert "a solve of the 32 x 128 layer is 4.5 times as fast, at least 3.0." in said
    assert "a captured training step of the 32 x 128 layer is 2.0 times as fast, less than 3.0." in said


@pytest.mark.parametrize("size", [(3, 5), (32, 128)])
def test_the_layer_is_a_contraction(size: tuple[int, int]) -> None:
    given = gpu_rows.layer(*size)
    assert given["x"].shape == size
    assert given["w"].dtype == given["x"].dtype == np.float32
    np.testing.assert_allclose(np.linalg.svd(given["w"])[1], 0.9, rtol=1e-5)
