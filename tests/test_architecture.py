"""The dependency rule, the modules that an import loads, and a backend by a third party."""

import ast
import importlib.metadata
import importlib.util
import inspect
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import types
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import implicit_core as ic
from implicit_core import registry
from implicit_core.backend import Backend

ROOT = Path(__file__).parents[1]
PACKAGE = Path(ic.__file__).parent
FOLDERS = {
    name: Path(import_module(f"implicit_core.{name}").__path__[0]) for name in ("adapters", "backends", "examples")
}
SITE_PACKAGES = Path(sysconfig.get_path("purelib"))
FRAMEWORKS = {"numpy", "torch", "jax", "cupy", "scipy", "array_api_strict", "sklearn", "matplotlib", "rich"}
in_a_checkout = pytest.mark.skipif(
    not (ROOT / "implicit_core").is_dir(), reason="no checkout, but an installed package"
)


def source(file: str) -> str:
    """The text of a file of the package."""
    folder, *rest = file.split("/")
    return FOLDERS.get(folder, PACKAGE / folder).joinpath(*rest).read_text(encoding="utf-8")


def imports(file: str, text: str | None = None) -> set[str]:
    """Absolute names of all modules that a file of the package imports; ``text`` replaces the text of the file."""
    found = set()
    package = ["implicit_core", *file.split("/")[:-1]]
    for node in ast.walk(ast.parse(source(file) if text is None else text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def folders(names: set[str]) -> set[str]:
    """The folders beyond the core that modules lie in."""
    return {name.split(".")[1] for name in names if name.startswith("implicit_core.")} & FOLDERS.keys()


def files(folder: str) -> list[str]:
    """Modules of a folder, as paths in the package."""
    found = sorted(f"{folder}/{path.relative_to(FOLDERS[folder]).as_posix()}" for path in FOLDERS[folder].rglob("*.py"))
    assert found
    return found


def core_files() -> list[str]:
    """Modules outside the folders."""
    found = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
    return [file for file in found if file.split("/")[0] not in FOLDERS]


@pytest.mark.parametrize("file", core_files())
def test_the_core_imports_no_framework_no_backend_and_no_adapter(file: str) -> None:
    names = imports(file)
    assert not {name.split(".")[0] for name in names} & (FRAMEWORKS | {"array_api_compat.numpy"})
    assert not folders(names)


@pytest.mark.parametrize("file", files("backends"))
def test_backends_know_only_arrays_spaces_and_the_base_class(file: str) -> None:
    names = imports(file)
    assert not folders(names) & {"adapters", "examples"}
    ours = {name.split(".")[1] for name in names if name.startswith("implicit_core.")}
    assert ours <= {"arrays", "backend", "backends", "records", "space"}


@pytest.mark.parametrize("file", files("adapters"))
def test_adapters_know_no_example_and_one_framework(file: str) -> None:
    names = imports(file)
    assert "examples" not in folders(names)
    used = {name.split(".")[0] for name in names} & FRAMEWORKS
    assert used <= {file.removesuffix(".py").split("/")[1]}


UNSTABLE = re.compile(r"jax\.(_src|core|custom_batching|custom_derivatives|experimental|extend|interpreters)\b")
"""Modules that JAX may change without a deprecation."""
INTERNALS = "backends/jax_internals.py"


def unstable(file: str, text: str | None = None) -> set[str]:
    """Names of these modules that a file uses."""
    nodes = ast.walk(ast.parse(source(file) if text is None else text))
    attributes = {ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)}
    return {name for name in attributes | imports(file, text) if UNSTABLE.match(name)}


@pytest.mark.parametrize("file", sorted({*core_files(), *files("backends"), *files("adapters")}))
def test_names_that_jax_may_move_are_imported_in_one_place(file: str) -> None:
    assert bool(unstable(file)) == (file == INTERNALS)


def test_other_uses_of_such_names_are_found() -> None:
    assert "jax.core.Tracer" in unstable("backends/jax.py", "import jax\nx = [jax.core.Tracer]")
    assert "jax.extend.core" in unstable("backends/jax.py", "def f():\n    from jax.extend.core import Primitive")


def test_this_version_of_jax_has_all_of_them() -> None:
    """Each is looked up by itself, so that the failure names all that are missing."""
    nodes = [node for node in ast.walk(ast.parse(source(INTERNALS))) if isinstance(node, ast.ImportFrom)]
    names = [(node.module, alias.name) for node in nodes for alias in node.names]
    assert len(names) > 15
    assert not [".".join(name) for name in names if not exists(*name)]


def exists(module: str, name: str) -> bool:
    """Whether ``from module import name`` works."""
    try:
        return hasattr(import_module(module), name) or importlib.util.find_spec(f"{module}.{name}") is not None
    except ImportError:
        return False


def test_an_error_names_a_missing_one() -> None:
    code = "import jax.core; del jax.core.eval_jaxpr; import implicit_core.adapters.jax"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    start = f"ImportError: implicit_core does not work with JAX {importlib.metadata.version('jax')}: "
    assert done.stderr.splitlines()[-1].startswith(f"{start}cannot import name 'eval_jaxpr' from 'jax.core'")


def test_violations_of_the_rule_are_found() -> None:
    """``imports`` finds every form of import that breaks the rule."""
    text = "import torch.nn\nfrom ..backends import numpy\ndef f():\n    from implicit_core.adapters import torch\n"
    names = imports("solvers/new.py", text)
    assert "torch" in {name.split(".")[0] for name in names}
    assert folders(names) == {"backends", "adapters"}


def python(code: str, **variables: str) -> str:
    environment = os.environ | variables
    command = [sys.executable, "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout


def python_without_installs(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a folder; distributions are importable, but no editable install (``-S``: no .pth file is read)."""
    environment = os.environ | {"PYTHONPATH": str(Path(np.__file__).parents[1])}
    command = [sys.executable, "-S", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)


def test_the_package_under_test_is_the_checkout_or_else_the_installed_wheel() -> None:
    home = ROOT if (ROOT / "implicit_core").is_dir() else SITE_PACKAGES
    assert home / "implicit_core" == PACKAGE
    assert Path(python("import implicit_core; print(implicit_core.__file__)").strip()).parent == PACKAGE


@in_a_checkout
def test_the_checkout_is_the_package_without_an_install() -> None:
    done = python_without_installs(
        ROOT,
        "import sys, numpy as np, implicit_core as ic, implicit_core.adapters, implicit_core.examples;"
        "print(implicit_core.adapters.__file__, *ic.solve(lambda h, z: 0.5 * h, np.zeros(1), None).value);"
        "print(*{'torch', 'jax', 'cupy'} & set(sys.modules))",
    )
    assert done.stdout == f"{ROOT / 'implicit_core' / 'adapters' / '__init__.py'} 0.0\n\n", done.stderr


@pytest.mark.parametrize("links", ["missing", "text"])
def test_a_part_of_the_package_names_what_is_missing(links: str, tmp_path: Path) -> None:
    """The core copied alone, or a checkout on a system that writes links as text files."""
    part = shutil.copytree(PACKAGE, tmp_path / "implicit_core", ignore=shutil.ignore_patterns(*FOLDERS, "__pycache__"))
    if links == "text":
        for name in FOLDERS:
            (part / name).write_text(f"../{name}")
    for code in ("import implicit_core", "from implicit_core.adapters import torch"):
        done = python_without_installs(tmp_path, code)
        assert done.stderr.splitlines()[-1] == (
            f"ImportError: The package in {part} is incomplete (no adapters, no backends): run `pip install -e .` "
            "in a complete checkout, or delete this copy if implicit_core is installed elsewhere."
        )


def test_import_brings_in_no_framework() -> None:
    loaded = python("import sys, implicit_core; print(*sorted({m.split('.')[0] for m in sys.modules}))").split()
    assert not set(loaded) & FRAMEWORKS


def test_import_takes_less_than_twice_the_time_of_numpy(tmp_path: Path) -> None:
    # Processor time, which other work on the machine disturbs least, and a ratio, since machines differ; of compiled
    # modules, which the first run leaves for the others.
    variables = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path)}
    code = (
        "import time; start = time.process_time(); import numpy; between = time.process_time();"
        "import implicit_core; print((time.process_time() - between) / (between - start))"
    )
    assert min(float(python(code, **variables)) for _ in range(5)) < 2


def test_a_framework_that_was_not_imported_is_not_imported_for_a_solve() -> None:
    code = (
        "import sys, numpy as np, implicit_core as ic; ic.fixed_point(lambda h, z: 0.5 * h, np.ones(3), None);"
        "print('torch' in sys.modules, 'scipy' in sys.modules)"
    )
    assert python(code).split() == ["False", "False"]


def undocumented(value: Any) -> list[str]:
    """Parameters of a function or a class that no heading of its docstring names."""
    text = inspect.getdoc(value) or ""
    sections = re.findall(r"^(?:Parameters|Attributes)\n-+\n(.*?)(?=\n\n\w+\n-+\n|\Z)", text, re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^\*{0,2}\w+(?:, \*{0,2}\w+)*$", "\n".join(sections), re.MULTILINE)
    named = {name.strip("* ") for heading in headings for name in heading.split(",")}
    return [name for name in inspect.signature(value).parameters if name not in named]


def takes_parameters(value: Any) -> bool:
    return callable(value) and not (isinstance(value, type) and issubclass(value, Exception | ic.Status))


@pytest.mark.parametrize("name", [name for name in ic.__all__ if takes_parameters(getattr(ic, name))])
def test_every_parameter_of_a_public_name_is_documented(name: str) -> None:
    assert not undocumented(getattr(ic, name))


def test_a_parameter_without_documentation_is_found() -> None:
    def function(a: int, b: int, c: int) -> None:
        """Do nothing.

        Parameters
        ----------
        a, b
            Two numbers. There is also
            c
        """

    assert undocumented(function) == ["c"]


def test_public_names_are_sorted() -> None:
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
