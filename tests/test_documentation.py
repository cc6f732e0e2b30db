"""Every example in a docstring, and every block of Python in the README, runs."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path
from typing import Any

import gpus
import jax
import pytest

import implicit_core
from implicit_core import adapters, backends

ROOT = Path(__file__).parents[1]
MODULES = ["implicit_core"] + [
    module.name
    for package in (implicit_core, adapters, backends)
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    if not module.name.endswith("__main__")
]
SOLVERS = ["Anderson", "Broyden", "CallableSolver", "FixedPointIteration", "NewtonKrylov"]
ESTIMATORS = ["BPTT", "Implicit", "Neumann", "OneStep", "Unroll"]


def on_a_gpu(name: str) -> Any:
    """A module, or a page, marked if it is about CuPy."""
    return pytest.param(name, marks=gpus.CUPY) if "cupy" in name else name


@pytest.mark.parametrize("name", [on_a_gpu(name) for name in MODULES])
def test_docstrings(name: str) -> None:
    with jax.enable_x64(False):  # as a reader's JAX is
        result = doctest.testmod(importlib.import_module(name))
    assert not result.failed


@pytest.mark.parametrize("name", [*SOLVERS, *ESTIMATORS, "Problem", "fixed_point", "solve", "solve_linear"])
def test_what_users_call_has_an_example(name: str) -> None:
    assert ">>> " in getattr(implicit_core, name).__doc__


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", on_a_gpu("docs/cupy.md"), "docs/jax.md", "docs/pytorch.md"]
)
def test_blocks_of_python_in_pages(page: str) -> None:
    """In order, and in one namespace, as a reader would type them."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert len(blocks) >= 2
    namespace: dict[str, object] = {"__name__": page}
    for block in blocks:
        exec(block, namespace)


def test_links_between_pages_lead_somewhere() -> None:
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
