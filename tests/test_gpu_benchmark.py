"""The GPU benchmark: a dry run on the CPU, what it needs, how it is continued, and how it reports what is missing."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gpus
import numpy as np
import pytest
import test_jax_gpu
import torch

from benchmarks import gpu, gpu_process, gpu_ready, gpu_record, gpu_rows, gpu_tests, report

pytestmark = pytest.mark.slow

DRY = ["--device", "cpu", "--quick"]
HAS_GPU = gpus.WITHOUT_CUPY == "" or torch.cuda.is_available() or test_jax_gpu.gpu() is not None
QUICK = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


def run(folder: Path, *more: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """A dry run, and what it saved."""
    command = [*report.COMMAND, "gpu", *DRY, "--output", str(folder), *more]
    done = subprocess.run(command, capture_output=True, text=True, cwd=report.ROOT, env=QUICK)
    return done, json.loads((folder / "gpu-cpu.json").read_text())


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """One dry run, with the tests."""
    folder = tmp_path_factory.mktemp("results")
    return run(folder)[0], folder


def test_a_dry_run_measures_on_the_cpu(dry: Any) -> None:
    done, folder = dry
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((folder / "gpu-cpu.json").read_text())
    assert record["key"]["card"] == "cpu"
    assert record["failures"] == []
    assert {"torch", "jax", "implicit-core", "torchdeq", "numpy"} <= record["key"]["versions"].keys()
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
    assert set(record["finished"]) == {f"{gpu.FRAMEWORKS[name]}, {part}" for name, part in gpu.STAGES if name != "cupy"}


def test_it_lists_omissions_with_reasons(dry: Any) -> None:
    done, folder = dry
    for said in (
        "Left out: CuPy: CuPy has no arrays on the CPU.",
        "Left out: CUDA graphs; captured training steps: they need a CUDA device.",
        "Left out: peak memory in JAX",
    ):
        assert said in done.stdout
        assert said in (folder / "gpu-cpu.md").read_text()
    shown = [line for line in done.stdout.splitlines() if not line.startswith(("Written", "Left out"))]
    assert max(map(len, shown)) <= 80
    assert "| tanh 4 x 8 | plain, Neumann(5) |" in (folder / "gpu-cpu.md").read_text()


def test_it_shows_what_is_running(dry: Any) -> None:
    done, _ = dry
    lines = [line for line in done.stdout.splitlines() if " s  " in line]
    assert len(lines) > 2
    assert any("collecting tests" in line for line in lines)
    assert done.stdout.startswith("cpu; budget 480 s\nLeft out: CuPy has no arrays on the CPU.\n")


def test_a_second_run_measures_nothing_again_and_reports_the_same(dry: Any) -> None:
    done, folder = dry
    before = json.loads((folder / "gpu-cpu.json").read_text())
    again, after = run(folder, "--no-tests")
    assert again.returncode == 0, again.stdout + again.stderr
    assert after["rows"] == before["rows"]
    assert f"Going on after {sum(map(len, before['rows'].values()))} rows" in again.stdout
    for line in done.stdout.splitlines():
        if line.startswith(("Left out: peak", "Left out: CUDA", "tanh", "conv")):
            assert line in again.stdout.splitlines()
    other, anew = run(folder, "--no-tests", "--repetitions", "1", "--budget", "21")
    assert "Going on" not in other.stdout
    assert anew["rows"] != before["rows"]
    assert json.loads((folder / "gpu-cpu.old.json").read_text())["rows"] == before["rows"]


def test_a_run_that_is_killed_loses_at_most_one_row(tmp_path: Path) -> None:
    command = [*report.COMMAND, "gpu", *DRY, "--no-tests", "--output", str(tmp_path)]
    path = tmp_path / "gpu-cpu.json"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=report.ROOT) as process:
        while process.poll() is None and not (path.exists() and json.loads(path.read_text())["rows"]):
            time.sleep(0.1)
        process.kill()
    rows = json.loads(path.read_text())["rows"]["torch"]
    assert rows
    _, after = run(tmp_path, "--no-tests", "--budget", "40")
    assert after["rows"]["torch"][: len(rows)] == rows
    names = [(row["case"], row["method"]) for row in after["rows"]["torch"]]
    assert len(set(names)) == len(names)


def test_a_record_is_continued_under_its_key_only(tmp_path: Path) -> None:
    key = {"card": "GPU 1", "versions": {"torch": "2.11"}, "settings": {"repetitions": 20}, "code": "ab"}
    record = gpu_record.Record(key, "tests")
    record.rows["torch"] = [gpu_rows.Row("case", "one", forward=[1.0])]
    record.crashed["jax"] = ["case, two"]
    record.finished["CuPy, table"] = [gpu_rows.Omission("it", "so")]
    record.tests.outcomes["test_x.py::test_y"] = "passed", ""
    gpu_record.save(record, tmp_path)
    same = gpu_record.load(tmp_path, key, "tests", restart=False)
    assert same == record
    assert same.done("torch") == ["case, one"]
    assert same.done("jax") == ["case, two"]
    other_tests = gpu_record.load(tmp_path, key, "other", restart=False)
    assert other_tests.rows == record.rows
    assert not other_tests.tests.outcomes
    for change in ({"versions": {"torch": "2.12"}}, {"settings": {"repetitions": 5}}, {"code": "cd"}):
        assert not gpu_record.load(tmp_path, key | change, "tests", restart=False).rows
        assert not (tmp_path / "gpu-gpu-1.json").exists(), "moved aside"
        gpu_record.save(record, tmp_path)
    assert not gpu_record.load(tmp_path, key | {"card": "GPU 2"}, "tests", restart=False).rows
    assert gpu_record.load(tmp_path, key, "tests", restart=False).rows
    assert not gpu_record.load(tmp_path, key, "tests", restart=True).rows


def test_the_code_is_part_of_the_key(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x.py").write_text("1")
    first = gpu_ready.code(["a"], tmp_path)
    (tmp_path / "a/x.txt").write_text("2")
    assert gpu_ready.code(["a"], tmp_path) == first
    (tmp_path / "a/x.py").write_text("2")
    assert gpu_ready.code(["a"], tmp_path) != first


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
def test_without_a_gpu_it_reports_this_and_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    before = set(gpu.RESULTS.glob("*")) if gpu.RESULTS.exists() else set()
    assert gpu.main([]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("Nothing can be run: no CUDA device: ")
    assert ("PyTorch is built without CUDA: pip install torch" in printed) == (torch.version.cuda is None)
    assert 'JAX has no plugin for CUDA: pip install "jax[cuda13]"' in printed
    assert "--device cpu" in printed
    assert before == (set(gpu.RESULTS.glob("*")) if gpu.RESULTS.exists() else set())


WITHOUT = """
import sys, importlib.util, time
absent, find = sys.argv[1].split(), importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in absent else find(name, *rest)
for name in absent:
    sys.modules[name] = None
from benchmarks import gpu
begin = time.monotonic()
code = gpu.main(["--device", "cpu", "--budget", "1", "--no-tests"] if sys.argv[2] == "cpu" else [])
assert code == int(sys.argv[3]), code
if sys.argv[2] == "cuda":
    assert not {"torch", "jax", "cupy", "implicit_core"} & {name for name in sys.modules if sys.modules[name]}
    assert time.monotonic() - begin < 5
"""


def without(absent: str, device: str, code: int) -> subprocess.CompletedProcess[str]:
    """The benchmark on a machine without some modules."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, absent, device, str(code)], capture_output=True, text=True, cwd=report.ROOT
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return done


def test_what_is_missing_is_named_with_how_to_get_it_before_anything_is_imported() -> None:
    told = without("array_api_compat rich", "cuda", 2).stderr
    assert told.startswith(
        "Nothing can be run: not installed: rich, array-api-compat (pip install rich\narray-api-compat)."
    )
    told = without("torch cupy hypothesis", "cuda", 2).stderr
    assert "PyTorch is not installed: pip install torch" in told
    assert "CuPy is not installed: pip install cupy-cuda13x" in told
    assert "Tests: they need torch, hypothesis (pip install torch hypothesis)" in told


def test_a_missing_framework_leaves_out_its_part() -> None:
    told = without("jax", "cpu", 0).stdout
    assert 'Left out: JAX is not installed: pip install "jax[cuda13]".' in told
    assert "Left out: PyTorch, table; PyTorch, graphs; PyTorch, step: the time was up." in told


def test_the_build_of_a_framework_is_found_without_importing_it(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("raise AssertionError('it was imported')")
    monkeypatch.setattr(gpu_ready.importlib.util, "find_spec", importer(tmp_path))
    for cuda, expected in (("'13.0'", None), ("None", "PyTorch is built without CUDA")):
        (tmp_path / "torch/version.py").write_text(f"cuda = {cuda}")
        assert gpu_ready.without_cuda("torch") == expected
    assert gpu_ready.without_cuda("jax") == "JAX has no plugin for CUDA"
    for plugin in ("jax_cuda13_plugin", "jax_plugins/xla_cuda13"):
        (tmp_path / plugin).mkdir(parents=True)
        assert gpu_ready.without_cuda("jax") is None
        shutil.rmtree(tmp_path / plugin)
    assert gpu_ready.without_cuda("jax") is not None


def importer(folder: Path) -> Any:
    """A ``find_spec`` that looks in one folder only."""
    from importlib.machinery import PathFinder

    return lambda name: PathFinder.find_spec(name, [str(folder)])


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
    record = gpu_record.Record({})
    record.take("torch", {"omission": {"what": "case, one", "why": "failed: RuntimeError: out of memory"}})
    assert record.failures == ["PyTorch, case, one: failed: RuntimeError: out of memory"]
    assert "FAILED: PyTorch, case, one: failed: RuntimeError: out of memory" in gpu_record.summary(record)


def test_rows_that_are_done_are_not_measured_again() -> None:
    tasks = [("case", name, lambda name=name: gpu_rows.Row("case", name)) for name in ("one", "two")]
    found = list(gpu_rows.carry_out(tasks, settings(done=frozenset({"case, one"})), lambda _: None))
    assert found == [gpu_rows.Row("case", "two")]


def test_rows_that_do_not_fit_into_the_time_are_listed() -> None:
    tasks = [("case", name, lambda: pytest.fail("it was begun")) for name in ("one", "two")]
    found = list(gpu_rows.carry_out(tasks, settings(until=0.0), lambda _: None))
    assert found == [gpu_rows.Omission(f"case, {name}", "the time was up") for name in ("one", "two")]


def test_a_process_that_crashes_is_a_failure_and_the_other_rows_are_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "gpu.py"
    script.write_text(
        "import json, os, sys\n"
        "done = json.loads(sys.argv[sys.argv.index('--done') + 1])\n"
        "if 'torch' in sys.argv: sys.exit('the driver is gone')\n"
        "for method in 'one', 'two', 'three':\n"
        "    if f'tanh, {method}' in done: continue\n"
        "    print(json.dumps({'begin': f'tanh, {method}'}), flush=True)\n"
        "    if method == 'two': os._exit(134)\n"
        "    print(json.dumps({'row': {'case': 'tanh', 'method': method, 'forward': [1.0]}}), flush=True)\n"
    )
    monkeypatch.setattr(report, "COMMAND", (sys.executable, str(script)))
    arguments = [*DRY, "--no-tests", "--output", str(tmp_path)]
    for _ in range(2):
        assert gpu.main(arguments) == 1
        printed = capsys.readouterr().out
        assert "FAILED: PyTorch, table: exited with 1: the driver is gone" in printed
        assert "FAILED: JAX, tanh, two: the process ended" in printed
        record = json.loads((tmp_path / "gpu-cpu.json").read_text())
        assert [row["method"] for row in record["rows"]["jax"]] == ["one", "three"]
        assert record["crashed"] == {"jax": ["tanh, two"]}


def test_a_process_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_process, "GRACE", 0.5)
    process = gpu_process.Process([sys.executable, "-c", "print('{}', flush=True); import time; time.sleep(60)"], 2.0)
    begin = time.monotonic()
    assert list(process.events()) == [{}]
    assert time.monotonic() - begin < 30
    assert process.ended().late


SUITE = {
    "test_cupy_some": "import pytest\npytest.skip('CuPy found no CUDA device', allow_module_level=True)",
    "test_jax_some": """
@pytest.mark.skipif(True, reason='JAX found no GPU')
def test_skipped(): pass

def test_fails(): assert False, 'it is wrong'

@pytest.mark.xfail
def test_known(): assert False
""",
    "test_some": """
def test_one(): ran('one')
def test_two(): ran('two')
def test_three(): ran('three')
""",
    "test_crashing": "def test_crashes():\n    ran('crash')\n    os._exit(139)",
    "test_broken": "import a_module_that_is_missing",
    "test_peers": "import another_missing_module",
    "test_of_the_processor": "pytestmark = []\ndef test_it(): ran('of the processor')",
}
BEFORE = """
import os, time
import pytest
pytestmark = pytest.mark.gpu
def ran(name):
    time.sleep(0.1)
    with open(os.environ['RAN'], 'a') as file:
        print(name, file=file)
"""


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A suite of its own; its folder."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: needs a GPU\n")
    for name, text in SUITE.items():
        before = BEFORE if name != "test_peers" else ""  # without a mark: it is not imported
        (tmp_path / "tests" / f"{name}.py").write_text(before + text + "\n")
    monkeypatch.setenv("PYTHONPATH", str(report.ROOT))
    monkeypatch.setenv("RAN", str(tmp_path / "ran.txt"))
    for module in (gpu_tests, gpu_process):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_tests, "OWN", ("tests/test_some.py",))
    return tmp_path


def carry_out(tests: gpu_tests.Tests, seconds: float) -> list[str]:
    told: list[str] = []
    gpu_tests.run(tests, seconds, told.append, lambda: None, dry=False)
    return told


def test_tests_that_passed_are_not_run_again(suite: Path) -> None:
    tests = gpu_tests.Tests()
    carry_out(tests, 100.0)
    assert (suite / "ran.txt").read_text().split() == ["one", "two", "three", "crash"]
    assert tests.outcomes == {
        "tests/test_some.py::test_one": ("passed", ""),
        "tests/test_some.py::test_two": ("passed", ""),
        "tests/test_some.py::test_three": ("passed", ""),
        "tests/test_broken.py": ("not collected", "ModuleNotFoundError: No module named 'a_module_that_is_missing'"),
        "tests/test_cupy_some.py": ("skipped", "CuPy found no CUDA device"),
        "tests/test_crashing.py::test_crashes": ("crashed", "the process ended with 139"),
        "tests/test_jax_some.py::test_skipped": ("skipped", "JAX found no GPU"),
        "tests/test_jax_some.py::test_fails": ("failed", "AssertionError: it is wrong"),
        "tests/test_jax_some.py::test_known": ("passed", ""),
    }
    assert tests.left == 0
    assert tests.wrong == []
    assert sorted(tests.failures()) == [
        "tests/test_broken.py: ModuleNotFoundError: No module named 'a_module_that_is_missing'",
        "tests/test_crashing.py::test_crashes: the process ended with 139",
        "tests/test_jax_some.py::test_fails: AssertionError: it is wrong",
    ]
    found = tests.by_framework()
    assert {name: (each.passed, each.failed, each.skipped.total()) for name, each in found.items()} == {
        "PyTorch": (3, 1, 0),
        "CuPy": (0, 0, 1),
        "JAX": (1, 1, 1),
    }
    record = gpu_record.Record({}, tests=tests)
    said = gpu_record.summary(record)
    assert "Tests of JAX: 1 passed, 1 failed, 1 skipped." in said
    assert "  skipped 1: JAX found no GPU" in said
    assert "FAILED: tests/test_jax_some.py::test_fails: AssertionError: it is wrong" in said
    (suite / "ran.txt").unlink()
    text = (suite / "tests/test_jax_some.py").read_text().replace("assert False, 'it is wrong'", "ran('mended')")
    (suite / "tests/test_jax_some.py").write_text(text)
    again = gpu_tests.from_json(json.loads(json.dumps(gpu_tests.as_json(tests))))
    carry_out(again, 100.0)
    assert (suite / "ran.txt").read_text().split() == ["mended"], "no test that passed, and none that crashed"
    assert again.outcomes["tests/test_jax_some.py::test_fails"] == ("passed", "")


def test_tests_that_do_not_fit_into_the_time_are_run_by_the_next_run(suite: Path) -> None:
    (suite / "tests/test_some.py").write_text(
        BEFORE + "@pytest.mark.parametrize('i', range(6))\ndef test_it(i):\n    time.sleep(1.5)\n    ran(str(i))\n"
    )
    tests = gpu_tests.Tests()
    carry_out(tests, 4.0)
    first = (suite / "ran.txt").read_text().split()
    assert 0 < len(first) < 6
    assert tests.left == 6 - len(first)
    said = gpu_record.summary(gpu_record.Record({}, tests=tests))
    assert f"{tests.left} tests did not fit into the time: the next run goes on with them." in said
    carry_out(tests, 100.0)
    assert (suite / "ran.txt").read_text().split()[:6] == [str(i) for i in range(6)]


def test_a_test_that_hangs_is_ended_and_told(suite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_process, "GRACE", 1.0)
    (suite / "tests/test_some.py").write_text(BEFORE + "def test_hangs(): time.sleep(1000)\n")
    tests = gpu_tests.Tests()
    carry_out(tests, 10.0)
    assert tests.outcomes == {"tests/test_some.py::test_hangs": ("crashed", "it did not end in time")}


def test_what_pytest_cannot_do_is_told(suite: Path) -> None:
    (suite / "tests/conftest.py").write_text("raise RuntimeError('no')")
    tests = gpu_tests.Tests()
    carry_out(tests, 100.0)
    (wrong,) = tests.failures()
    assert wrong.startswith("pytest ended with 4: ")


@pytest.mark.skipif(HAS_GPU, reason="more tests have the mark where there is CuPy with a GPU")
def test_every_test_for_gpus_is_in_the_files_that_are_run() -> None:
    everything = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n",
        "0",
        "-m",
        "gpu",
        "--collect-only",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(everything, capture_output=True, text=True, cwd=report.ROOT)
    found = {line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line}
    assert found
    assert found <= {*gpu_tests.OWN, *gpu_tests.others()}


def test_the_files_of_most_value_come_first() -> None:
    files = [Path(report.ROOT, file) for file in gpu_tests.OWN]
    assert all(file.exists() for file in files)
    for path in Path(report.ROOT, "tests").glob("test_*.py"):
        marked = any(word in path.read_text() for word in ("mark.gpu", "= gpus.", "ON_GPU", "on_gpu_with"))
        assert not marked or path in files or path == Path(__file__), f"{path.name} has tests that are only for GPUs"


def test_the_speed_up_by_cuda_graphs() -> None:
    record = gpu_record.Record({})
    rows = (
        gpu_rows.Row("tanh 32 x 128", "Anderson, Neumann(5)", 21, forward=[9.0, 8.0, 30.0], step=[12.0]),
        gpu_rows.Row("tanh 32 x 128", "Anderson, graphs", 22, forward=[2.0, 3.0, 1.0]),
        gpu_rows.Row("tanh 32 x 128", "Anderson, step captured", step=[6.0]),
        gpu_rows.Row("tanh 256 x 1024", "Anderson, graphs", 22, forward=[1.0]),
    )
    record.rows["torch"] = list(rows)
    assert record.speedups() == {"a solve": 4.5, "a captured training step": 2.0}
    said = "\n".join(gpu_record.summary(record))
    assert "a solve of the 32 x 128 layer is 4.5 times as fast, at least 3.0." in said
    assert "a captured training step of the 32 x 128 layer is 2.0 times as fast, less than 3.0." in said


@pytest.mark.parametrize("size", [(3, 5), (32, 128)])
def test_the_layer_is_a_contraction(size: tuple[int, int]) -> None:
    given = gpu_rows.layer(*size)
    assert given["x"].shape == size
    assert given["w"].dtype == given["x"].dtype == np.float32
    np.testing.assert_allclose(np.linalg.svd(given["w"])[1], 0.9, rtol=1e-5)
