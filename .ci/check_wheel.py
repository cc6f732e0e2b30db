"""Check the contents of dist/, and that the wheel works in an empty environment, wherever Python is started."""

import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
# Folder of the checkout -> package it is installed as. Links to the last three lie in the first.
PACKAGES = {
    "implicit_core": "implicit_core",
    "backends": "implicit_core/backends",
    "adapters": "implicit_core/adapters",
    "examples": "implicit_core/examples",
}
SDIST_FILES = {
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "Makefile",
    "README.md",
    "constraints.txt",
    "pyproject.toml",
}

LIGHT_IMPORT = """
import sys
import implicit_core
heavy = {"numpy", "scipy", "torch", "jax", "cupy"} & set(sys.modules)
assert not heavy, f"import implicit_core imports {sorted(heavy)}"
assert implicit_core.__version__[0].isdigit() and "unknown" not in implicit_core.__version__
print("implicit_core", implicit_core.__version__, "from", implicit_core.__file__)
"""

SMALL_SOLVE = """
import numpy as np
import implicit_core as ic
import implicit_core.adapters, implicit_core.examples
problem = ic.Problem(lambda h, z: 0.5 * h + z, vjp=lambda h, z, v: (0.5 * v, v))
solution = ic.solve(problem, np.zeros(2), np.ones(2), throw=True)
value, pullback = ic.Implicit().vjp(problem, solution.value, np.ones(2))
assert np.allclose(value, 2.0) and np.allclose(pullback(np.ones(2)), 2.0)
print("solved to", value, "in", solution.stats.evaluations, "evaluations")
"""


def only(pattern: str) -> Path:
    """The one file of dist/ that matches."""
    found = list((ROOT / "dist").glob(pattern))
    assert len(found) == 1, f"dist/ must hold one {pattern}, got {[path.name for path in found]}"
    return found[0]


def sources() -> dict[str, str]:
    """Modules of the checkout: their paths in it, and once installed."""
    paths = {
        path.relative_to(ROOT): PurePosixPath(package, path.relative_to(ROOT / folder).as_posix())
        for folder, package in PACKAGES.items()
        for path in (ROOT / folder).rglob("*.py")
    }
    modules = {path.as_posix(): str(installed) for path, installed in paths.items()}
    return modules | {"implicit_core/py.typed": "implicit_core/py.typed"}


def code(names: Iterable[str]) -> set[str]:
    """The modules among files."""
    return {name for name in names if name.endswith((".py", "py.typed"))}


def check_wheel(wheel: Path) -> None:
    """The wheel holds every module, no other, and one top-level package."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    others = {top for top in tops if top != "implicit_core" and not top.endswith(".dist-info")}
    assert not others, f"the wheel holds {sorted(others)} next to implicit_core"
    missing, unknown = set(sources().values()) - set(names), code(names) - set(sources().values())
    assert not missing, f"the wheel lacks {sorted(missing)}; is a package missing in pyproject.toml?"
    assert not unknown, f"the wheel holds {sorted(unknown)}, which the checkout does not"
    assert len(names) == len(set(names)), "the wheel holds a file twice"
    print(f"{wheel.name}: {len(names)} files below {', '.join(sorted(tops))}")


def check_sdist(sdist: Path) -> None:
    """The sdist holds every module once, no link, and what a packager needs, tests included."""
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    links = [member.name for member in members if not member.isfile() and not member.isdir()]
    assert not links, f"the sdist holds links: {links}"
    names = [member.name.partition("/")[2] for member in members if member.isfile()]
    tests = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*.py")}
    missing = (SDIST_FILES | tests | set(sources())) - set(names)
    assert not missing, f"the sdist lacks {sorted(missing)}"
    folders = tuple(f"{folder}/" for folder in PACKAGES)
    unknown = {name for name in code(names) if name.startswith(folders)} - set(sources())
    assert not unknown, f"the sdist holds {sorted(unknown)}, which the checkout does not"
    assert len(names) == len(set(names)), "the sdist holds a file twice"
    print(f"{sdist.name}: {len(names)} files")


def check_install(wheel: Path) -> None:
    """The wheel installs into an empty environment, and works there, also for Python started in the checkout."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(Path(folder, "venv"), with_pip=True)
        python = Path(folder, "venv", "bin", "python")

        def run(*arguments: str, where: str | Path = folder) -> None:
            subprocess.run([python, *arguments], cwd=where, check=True)

        install = ("-m", "pip", "install", "--quiet", "--constraint", str(CONSTRAINTS))
        run(*install, "--upgrade", "pip")
        run(*install, str(wheel))
        run("-m", "pip", "check")
        for where in (folder, ROOT):
            run("-c", LIGHT_IMPORT, where=where)
            run("-c", SMALL_SOLVE, where=where)
        run("-m", "implicit_core", "info")


def main() -> None:
    """Check the one sdist and the one wheel of dist/."""
    check_sdist(only("*.tar.gz"))
    check_wheel(only("*.whl"))
    check_install(only("*.whl"))


if __name__ == "__main__":
    sys.exit(main())
