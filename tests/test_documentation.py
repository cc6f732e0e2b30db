"""Every example in a docstring, and every block of Python in the README, runs."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

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


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert not result.failed


@pytest.mark.parametrize("name", [*SOLVERS, *ESTIMATORS, "Problem", "fixed_point", "solve", "solve_linear"])
def test_what_users_call_has_an_example(name: str) -> None:
    assert ">>> " in getattr(implicit_core, name).__doc__


def test_readme() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 2
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(block, namespace)
