"""The one dependency rule, what an import brings in, and a backend by a third party."""

import ast
import importlib.metadata
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import implicit_core as ic
from implicit_core import registry
from implicit_core.backend import Backend

ROOT = Path(__file__).parents[1]
FRAMEWORKS = {"numpy", "torch", "jax", "cupy", "scipy", "array_api_strict", "sklearn", "matplotlib", "rich"}
ROOMS = {"adapters", "backends", "examples"}


def imports(path: Path, text: str | None = None) -> set[str]:
    """Absolute names of the modules a file, with its text or another, imports anywhere in it."""
    found = set()
    package = ".".join(path.relative_to(ROOT).with_suffix("").parts[:-1])
    package = package if package.startswith("implicit_core") else f"implicit_core.{package}"
    for node in ast.walk(ast.parse(path.read_text() if text is None else text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def rooms(names: set[str]) -> set[str]:
    return {name.split(".")[1] for name in names if name.startswith("implicit_core.")} & ROOMS


def files(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found
    return found


@pytest.mark.parametrize("path", files("implicit_core"), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_core_imports_no_framework_no_backend_and_no_adapter(path: Path) -> None:
    names = imports(path)
    assert not {name.split(".")[0] for name in names} & (FRAMEWORKS | {"array_api_compat.numpy"})
    assert not rooms(names)


@pytest.mark.parametrize("path", files("backends"), ids=lambda path: path.name)
def test_backends_know_only_the_seam(path: Path) -> None:
    names = imports(path)
    assert not rooms(names) & {"adapters", "examples"}
    assert all(name.startswith("implicit_core.backend") for name in names if name.startswith("implicit_core."))


@pytest.mark.parametrize("path", files("adapters"), ids=lambda path: path.name)
def test_adapters_know_no_example_and_one_framework(path: Path) -> None:
    names = imports(path)
    assert "examples" not in rooms(names)
    used = {name.split(".")[0] for name in names} & FRAMEWORKS
    assert used <= {path.relative_to(ROOT / "adapters").with_suffix("").parts[0]}


def test_the_rule_has_teeth() -> None:
    """The reader of imports sees each way a file could break the rule."""
    text = "import torch.nn\nfrom ..backends import numpy\ndef f():\n    from implicit_core.adapters import torch\n"
    names = imports(ROOT / "implicit_core" / "solvers" / "new.py", text)
    assert "torch" in {name.split(".")[0] for name in names}
    assert rooms(names) == {"backends", "adapters"}


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_import_brings_in_no_framework() -> None:
    loaded = python("import sys, implicit_core; print(*sorted({m.split('.')[0] for m in sys.modules}))").split()
    assert not set(loaded) & FRAMEWORKS


def test_import_takes_less_than_150_ms_beyond_numpy() -> None:
    # Processor time, which other work on the machine disturbs least.
    code = "import numpy, time; t = time.process_time(); import implicit_core; print(time.process_time() - t)"
    assert min(float(python(code)) for _ in range(5)) < 0.150


def test_a_framework_that_was_not_imported_is_not_imported_for_a_solve() -> None:
    code = (
        "import sys, numpy as np, implicit_core as ic; ic.fixed_point(lambda h, z: 0.5 * h, np.ones(3), None);"
        "print('torch' in sys.modules, 'scipy' in sys.modules)"
    )
    assert python(code).split() == ["False", "False"]


def test_every_public_name_is_documented_with_what_it_takes() -> None:
    for name in ic.__all__:
        value = getattr(ic, name)
        if isinstance(value, ic.Status):
            continue
        assert value.__doc__, name
    assert ic.__all__ == sorted(ic.__all__, key=lambda n: (not n.isupper(), not n[0].isupper(), n))


def test_third_parties_join_through_an_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    import array_api_compat.numpy as xp

    module = types.ModuleType("a_third_party_backend")
    module.BACKEND = Backend("mine", xp, (np.ndarray,))
    monkeypatch.setitem(sys.modules, "a_third_party_backend", module)
    monkeypatch.setitem(sys.modules, "mine", types.ModuleType("mine"))
    entry = importlib.metadata.EntryPoint("mine", "a_third_party_backend", "implicit_core.backends")
    monkeypatch.setattr(registry, "_BACKENDS", {})
    monkeypatch.setattr(
        importlib.metadata,
        "entry_points",
        lambda group: [entry] if group == "implicit_core.backends" else [],
    )
    registry._joined.cache_clear()
    h0 = np.zeros(3)
    assert registry.find_backend(h0).name == "mine"
    solution: Any = ic.solve(lambda h, z: 0.5 * h + 1.0, h0, None)
    np.testing.assert_allclose(solution.value, 2.0, rtol=1e-4)
    registry._joined.cache_clear()


def test_unknown_arrays_and_names_are_errors() -> None:
    with pytest.raises(TypeError, match="of a framework with a backend"):
        registry.find_backend(object())
    with pytest.raises(ValueError, match=r"no backend for 'tensorflow'; there are backends for: .*numpy.*torch"):
        registry.load_backend("tensorflow")
