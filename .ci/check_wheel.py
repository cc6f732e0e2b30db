"""Check what dist/ holds, and that the wheel works in an empty environment, away from the checkout."""

import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
# Folder of the checkout -> package it is installed as.
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


def sources() -> set[str]:
    """Modules of the checkout, by their paths once installed."""
    modules = {
        f"{package}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, package in PACKAGES.items()
        for path in (ROOT / folder).rglob("*.py")
    }
    return modules | {"implicit_core/py.typed"}


def check_wheel(wheel: Path) -> None:
    """The wheel holds every module and one top-level package."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    tops = {name.split("/")[0] for name in names}
    beside = {top for top in tops if top != "implicit_core" and not top.endswith(".dist-info")}
    assert not beside, f"the wheel holds {sorted(beside)} beside implicit_core"
    missing = sources() - names
    assert not missing, f"the wheel lacks {sorted(missing)}; is a package missing in pyproject.toml?"
    print(f"{wheel.name}: {len(names)} files below {', '.join(sorted(tops))}")


def check_sdist(sdist: Path) -> None:
    """The sdist holds what a packager needs, tests included."""
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    tests = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*.py")}
    missing = (SDIST_FILES | tests) - names
    assert not missing, f"the sdist lacks {sorted(missing)}"
    print(f"{sdist.name}: {len(names)} files")


def check_install(wheel: Path) -> None:
    """The wheel installs into an empty environment, and works there."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(Path(folder, "venv"), with_pip=True)
        python = Path(folder, "venv", "bin", "python")

        def run(*arguments: str) -> None:
            subprocess.run([python, *arguments], cwd=folder, check=True)

        install = ("-m", "pip", "install", "--quiet", "--constraint", str(CONSTRAINTS))
        run(*install, "--upgrade", "pip")
        run(*install, str(wheel))
        run("-m", "pip", "check")
        run("-c", LIGHT_IMPORT)
        run("-m", "implicit_core", "info")
        run("-c", SMALL_SOLVE)


def main() -> None:
    """Check the one sdist and the one wheel of dist/."""
    check_sdist(only("*.tar.gz"))
    check_wheel(only("*.whl"))
    check_install(only("*.whl"))


if __name__ == "__main__":
    sys.exit(main())
