"""Without CuPy, or with CuPy but no GPU: which parts work, and which errors are raised."""

import importlib.util
import re
import subprocess
import sys

import gpus
import pytest

INSTALLED = importlib.util.find_spec("cupy") is not None
with_cupy = pytest.mark.skipif(not INSTALLED, reason="CuPy is not installed")
without_gpu = pytest.mark.skipif(gpus.WITHOUT_CUPY == "", reason="CuPy has a device")
NOT_INSTALLED = (
    "import sys, importlib.util\n"
    "sys.modules['cupy'] = None\n"
    "find_spec = importlib.util.find_spec\n"
    "importlib.util.find_spec = lambda name, *rest: None if name == 'cupy' else find_spec(name, *rest)\n"
)


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)


def test_only_parts_for_cupy_need_cupy() -> None:
    code = (
        "import numpy as np, implicit_core as ic\n"
        "print(ic.solve(lambda h, z: 0.5 * h + 1, np.zeros(1), None).converged)\n"
        "from implicit_core.__main__ import main\n"
        "main(['info'])\n"
    )
    done = python(NOT_INSTALLED + code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("True\n")
    assert re.search(r"^cupy +no +-", done.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    "code",
    ["from implicit_core.adapters import cupy", "from implicit_core.registry import load_backend as f; f('cupy')"],
)
def test_parts_for_cupy_name_it(code: str) -> None:
    done = python(NOT_INSTALLED + code)
    assert done.returncode == 1
    assert re.search(r"^(ImportError|ModuleNotFoundError): .*cupy", done.stderr, re.MULTILINE)


def test_the_demo_says_how_to_install_it() -> None:
    done = python(
        NOT_INSTALLED + "from implicit_core.__main__ import main; sys.exit(main(['demo', '--framework', 'cupy']))"
    )
    assert done.returncode == 2
    assert "The demo needs CuPy, which is not installed" in done.stderr
    assert 'pip install -e ".[demo,cupy12]"' in done.stderr
    assert "for CUDA 13 it is cupy13" in done.stderr


@with_cupy
def test_it_is_not_imported_unless_it_is_used() -> None:
    code = (
        "import sys, numpy as np, implicit_core as ic\n"
        "ic.fixed_point(lambda h, z: 0.5 * h, np.ones(3), None)\n"
        "print('cupy' in sys.modules)\n"
        "import cupy\n"
        "print(ic.solve(lambda h, z: 0.5 * h, np.ones(3), None).converged)"
    )
    done = python(code)
    assert done.stdout == "False\nTrue\n", done.stderr


@with_cupy
def test_a_stream_of_another_framework() -> None:
    """Without a warning: newer versions deprecate the class that older ones have for it."""
    done = python("from implicit_core.backends.cupy import external_stream\nprint(external_stream(4096).ptr)")
    assert done.stdout == "4096\n", done.stderr


@with_cupy
@without_gpu
def test_without_a_gpu_it_can_be_imported_and_says_so() -> None:
    code = (
        "from implicit_core.adapters import cupy as icc\n"
        "icc.Pointwise('a', 'tanh(a)', slopes='1 - y * y')\n"
        "icc.problem(lambda h, z: h, vjp=lambda h, z, v: (v, v))\n"
        "icc.from_torch(lambda h, z: h)\n"
        "from implicit_core.registry import load_backend\n"
        "print(load_backend('cupy').devices())\n"
        "from implicit_core.__main__ import main\n"
        "main(['info'])\n"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert re.match(r"\['no CUDA device \(cudaError\w+\)'\]\n", done.stdout)
    assert re.search(r"^cupy +yes +\d+\.\S+ +no CUDA device", done.stdout, re.MULTILINE)
    assert max(map(len, done.stdout.splitlines())) <= 80
