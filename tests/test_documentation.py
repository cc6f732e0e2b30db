"""Every example in a docstring and every block of Python on a page runs; links lead somewhere.

Notebooks among the pages are run by ``make docs``, and by nothing here.
"""

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
PUBLIC = ["", ".theory", ".adapters.torch", ".adapters.jax", ".adapters.cupy"]
SEED = r"default_rng\(\d|manual_seed\(\d|random\.(key|PRNGKey)\(\d|random\.seed\(\d"


def read(page: str) -> str:
    """A page, by its path from the root."""
    return (ROOT / page).read_text(encoding="utf-8")


FOLDERS = "*.md", "benchmarks/*.md", "docs/**/*.md"
PAGES = sorted(str(path.relative_to(ROOT)) for folder in FOLDERS for path in ROOT.glob(folder))
NOTEBOOKS = [page for page in PAGES if read(page).startswith("---\nfile_format: mystnb\n")]
WITH_BLOCKS = [page for page in PAGES if "```python\n" in read(page) and page not in NOTEBOOKS]


def on_a_gpu(name: str) -> Any:
    """A module, or a page, marked if it is about CuPy."""
    return pytest.param(name, marks=gpus.CUPY) if "cupy" in name else name


@pytest.mark.parametrize("name", [on_a_gpu(name) for name in MODULES])
def test_docstrings(name: str) -> None:
    with jax.enable_x64(False):  # as a reader's JAX is
        result = doctest.testmod(importlib.import_module(name))
    assert not result.failed


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_has_an_example(module: str) -> None:
    found = vars(importlib.import_module(f"implicit_core{module}"))
    for name in found["__all__"]:
        value = found[name]
        if callable(value) and not (isinstance(value, type) and issubclass(value, Warning)):
            assert ">>> " in value.__doc__, name


@pytest.mark.parametrize("page", [on_a_gpu(page) for page in WITH_BLOCKS])
def test_blocks_of_python_on_pages(page: str) -> None:
    """In order, and in one namespace, as a reader would type them."""
    namespace: dict[str, object] = {"__name__": page}
    for block in re.findall(r"```python\n(.*?)```", read(page), re.DOTALL):
        exec(block, namespace)


@pytest.mark.parametrize("page", NOTEBOOKS)
def test_notebooks_end_with_what_they_have_shown_and_can_be_repeated(page: str) -> None:
    cells = re.findall(r"^```\{code-cell\}.*?\n(.*?)^```", read(page), re.DOTALL | re.MULTILINE)
    assert re.search(r"^assert ", cells[-1], re.MULTILINE), f"the last cell of {page} asserts nothing"
    code = "".join(cells)
    assert "rand" not in code or re.search(SEED, code), f"{page} draws random numbers without a seed"


@pytest.mark.parametrize("module", PUBLIC)
def test_the_reference_has_every_public_name(module: str) -> None:
    words = set(re.findall(r"\w+", "".join(read(page) for page in PAGES if page.startswith("docs/reference/"))))
    assert words.issuperset(importlib.import_module(f"implicit_core{module}").__all__)


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for path, anchor in re.findall(r"\]\(([^)\s#:]*)(?:#([^)\s]*))?\)", prose(page)):
            target = (ROOT / page).parent / path if path else ROOT / page
            assert target.exists(), f"{page} links to {path}"
            if anchor:
                assert anchor in anchors(str(target.resolve().relative_to(ROOT))), f"{page} links to {path}#{anchor}"


def prose(page: str) -> str:
    """A page without its blocks of code, and without code in its lines."""
    return re.sub(r"`[^`\n]*`", "`", re.sub(r"^ *(```+).*?^ *\1 *$", "", read(page), flags=re.DOTALL | re.MULTILINE))


def anchors(page: str) -> set[str]:
    """Of a page's headings, as GitHub and MyST make them, and of its targets ``(name)=``."""
    text = re.sub(r"^```.*?^```$", "", read(page), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r"^\(([^)\n]+)\)=$", text, re.MULTILINE))
