"""What a GPU benchmark needs and what is there, found in a second: nothing here imports a framework."""

import ctypes
import hashlib
import importlib.util
import runpy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parents[1]
FRAMEWORKS = {"torch": "PyTorch", "jax": "JAX", "cupy": "CuPy"}
NEEDED = {
    "numpy": "numpy",
    "optree": "optree",
    "rich": "rich",
    "array_api_compat": "array-api-compat",
    "array_api_extra": "array-api-extra",
}
"""Modules that every part needs, and the packages that have them."""
PARTS: dict[str, dict[str, str]] = {"torch": {}, "jax": {"jaxlib": "jaxlib"}, "cupy": {}}
"""Further modules of each framework's part."""
TESTS = {name: name for name in ("torch", "jax", "pytest", "hypothesis")}
TESTS |= {"array_api_strict": "array-api-strict"}
"""Modules that the tests need."""
INSTALL = {
    "torch": "pip install torch  # a build for CUDA",
    "jax": 'pip install "jax[cuda13]"',
    "cupy": "pip install cupy-cuda13x",
}
PACKAGES = (
    *("implicit-core", "torch", "jax", "jaxlib", "cupy-cuda13x", "cupy-cuda12x"),
    *("numpy", "array-api-compat", "torchdeq"),
)
"""Packages whose versions belong to a result."""
PACKAGE = ("implicit_core", "backends", "adapters")
"""Folders of the package that is measured and tested."""


@dataclass
class Device:
    """The first CUDA device.

    Attributes
    ----------
    name
        Name of the card; None if there is none.
    driver
        The version of CUDA that the driver has, e.g. ``"13.0"``.
    why
        Why there is none.
    """

    name: str | None = None
    driver: str | None = None
    why: str | None = None


@dataclass
class Ready:
    """What can be run.

    Attributes
    ----------
    card, driver
        The device, or ``"cpu"``.
    missing
        For each framework, why its part is left out, and how to get what it lacks.
    tests
        Why the tests are left out; None if they are not.
    fatal
        What no part can do without.
    """

    card: str
    driver: str | None = None
    missing: dict[str, str] = field(default_factory=dict)
    tests: str | None = None
    fatal: str | None = None


def ready(device: str) -> Ready:
    """What can be run on ``"cuda"`` or on ``"cpu"``."""
    found = Device("cpu") if device == "cpu" else first_device()
    result = Ready(found.name or "none", found.driver)
    lacking = absent(NEEDED)
    if lacking:
        result.fatal = f"not installed: {to_get(lacking)}"
    elif found.name is None:
        result.fatal = found.why
    for framework, title in FRAMEWORKS.items():
        if not installed(framework):
            result.missing[framework] = f"{title} is not installed: {INSTALL[framework]}"
        elif lacking := absent(PARTS[framework]):
            result.missing[framework] = f"{title} needs {to_get(lacking)}"
        elif device == "cuda" and (reason := without_cuda(framework)):
            result.missing[framework] = f"{reason}: {INSTALL[framework]}"
        elif device == "cpu" and framework == "cupy":
            result.missing[framework] = "CuPy has no arrays on the CPU"
    if result.fatal is None and len(result.missing) == len(FRAMEWORKS):
        result.fatal = "; ".join(result.missing.values())
    if lacking := absent(TESTS):
        result.tests = f"they need {to_get(lacking)}"
    return result


def installed(module: str) -> bool:
    """Whether a top-level module can be found."""
    return importlib.util.find_spec(module) is not None


def absent(modules: dict[str, str]) -> list[str]:
    """The packages of the modules that cannot be found."""
    return [package for module, package in modules.items() if not installed(module)]


def to_get(packages: list[str]) -> str:
    """Packages, and the command that installs them."""
    return f"{', '.join(packages)} (pip install {' '.join(packages)})"


def without_cuda(framework: str) -> str | None:
    """Why a framework that is installed cannot use a GPU; None if it may."""
    if framework == "torch":
        spec = importlib.util.find_spec("torch")
        file = Path((spec and spec.origin) or "").with_name("version.py")
        if file.exists() and runpy.run_path(str(file)).get("cuda") is None:
            return "PyTorch is built without CUDA"
    if framework == "jax" and not (any(installed(f"jax_cuda{n}_plugin") for n in range(12, 20)) or _jax_plugins()):
        return "JAX has no plugin for CUDA"
    return None


def _jax_plugins() -> list[Path]:
    """The plugins for CUDA in JAX's namespace for plugins, where builds of one's own have them too."""
    spec = importlib.util.find_spec("jax_plugins")
    folders = (spec and spec.submodule_search_locations) or ()
    return [path for folder in folders for path in Path(folder).glob("*cuda*")]


def first_device() -> Device:
    """The first CUDA device, from the driver."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return Device(why="no CUDA device: there is no driver (libcuda.so.1)")
    if code := cuda.cuInit(0):
        return Device(why=f"no CUDA device: the driver answers with error {code}")
    count, number, name = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(256)
    cuda.cuDeviceGetCount(ctypes.byref(count))
    if not count.value:
        return Device(why="no CUDA device: the driver finds none")
    cuda.cuDriverGetVersion(ctypes.byref(number))
    device = ctypes.c_int()
    cuda.cuDeviceGet(ctypes.byref(device), 0)
    cuda.cuDeviceGetName(name, len(name), device)
    return Device(name.value.decode(), f"{number.value // 1000}.{number.value % 1000 // 10}")


def versions() -> dict[str, str]:
    """Versions of the packages that are installed."""
    return dict(_versions())


def _versions() -> Iterator[tuple[str, str]]:
    for package in PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            continue


def code(folders: Sequence[str], root: Path = ROOT) -> str:
    """A short digest of the code in some folders."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
