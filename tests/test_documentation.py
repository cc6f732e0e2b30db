"""Every example in a docstring and every block of Python on a page runs; links and cited decisions exist.

``make docs`` runs the notebooks among the pages; the tests here do not.
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
PACKAGES = (implicit_core, adapters, backends)
MODULES = sorted(
    {"implicit_core"}
    | {
        module.name
        for package in PACKAGES
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
        if not module.name.endswith("__main__") and not module.name.startswith("implicit_core.examples")
    }
)
PUBLIC = ["", ".theory", ".adapters.torch", ".adapters.jax", ".adapters.cupy"]
SEED = r"default_rng\(\d|manual_seed\(\d|random\.(key|PRNGKey)\(\d|random\.seed\(\d"


def read(page: str) -> str:
    """The text of a page, given its path from the root."""
    return (ROOT / page).read_text(encoding="utf-8")


FOLDERS = "*.md", "benchmarks/*.md", "docs/**/*.md"
PAGES = sorted(str(path.relative_to(ROOT)) for folder in FOLDERS for path in ROOT.glob(folder))
NOTEBOOKS = [page for page in PAGES if read(page).startswith("---\nfile_format: mystnb\n")]
WITH_BLOCKS = [page for page in PAGES if "```python\n" in read(page) and page not in NOTEBOOKS]


def on_a_gpu(name: str) -> Any:
    """A parameter for a module or a page; it has the marks of CuPy if it needs CuPy."""
    return pytest.param(name, marks=gpus.CUPY) if "cupy" in name else name


@pytest.mark.parametrize("name", [on_a_gpu(name) for name in MODULES])
def test_docstrings(name: str) -> None:
    with jax.enable_x64(False):  # JAX's default
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
    """In order and in one namespace, as a reader would type them."""
    namespace: dict[str, object] = {"__name__": page}
    for block in re.findall(r"```python\n(.*?)```", read(page), re.DOTALL):
        exec(block, namespace)


@pytest.mark.parametrize("page", NOTEBOOKS)
def test_notebooks_end_with_assertions_and_seed_random_numbers(page: str) -> None:
    cells = re.findall(r"^```\{code-cell\}.*?\n(.*?)^```", read(page), re.DOTALL | re.MULTILINE)
    assert re.search(r"^assert ", cells[-1], re.MULTILINE), f"the last cell of {page} asserts nothing"
    code = "".join(cells)
    assert "rand" not in code or re.search(SEED, code), f"{page} draws random numbers without a seed"


def documented() -> list[Any]:
    """The objects that the reference documents."""
    pages = "".join(read(page) for page in PAGES if page.startswith("docs/reference/"))
    names = re.findall(r"^\.\. auto(?:class|exception|function):: (\S+)$", pages, re.MULTILINE)
    return [getattr(importlib.import_module(module), name) for module, _, name in (n.rpartition(".") for n in names)]


@pytest.mark.parametrize("module", PUBLIC)
def test_the_reference_documents_every_public_name(module: str) -> None:
    objects = documented()
    found = vars(importlib.import_module(f"implicit_core{module}"))
    for name in found["__all__"]:
        value = found[name]
        documents = type(value) if isinstance(value, implicit_core.Status) else value
        assert any(documents is each for each in objects), name


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for path, anchor in re.findall(r"\]\(([^)\s#:]*)(?:#([^)\s]*))?\)", prose(page)):
            target = (ROOT / page).parent / path if path else ROOT / page
            assert target.exists(), f"{page} links to {path}"
            if anchor:
                assert anchor in anchors(str(target.resolve().relative_to(ROOT))), f"{page} links to {path}#{anchor}"


def test_decisions_are_numbered_and_cited_decisions_exist() -> None:
    numbers = re.findall(r"^\(decision-(\d+)\)=\n### Decision (\d+): \S", read("docs/decisions.md"), re.MULTILINE)
    known = [number for number, _ in numbers]
    assert numbers == [(n, n) for n in known]
    assert known == [str(n) for n in range(1, len(known) + 1)]
    assert len(known) == read("docs/decisions.md").count("\n### ")
    modules = [path for package in PACKAGES for path in Path(package.__path__[0]).rglob("*.py")]
    cited = {path: re.findall(r"\bDecision (\d+)", path.read_text(encoding="utf-8")) for path in modules}
    assert any(cited.values())
    for source, found in cited.items():
        assert set(found) <= set(known), source
    for page in PAGES:
        assert set(re.findall(r"\bDecision (\d+)", read(page))) <= set(known), page


def prose(page: str) -> str:
    """A page without blocks of code and without inline code."""
    return re.sub(r"`[^`\n]*`", "`", re.sub(r"^ *(```+).*?^ *\1 *$", "", read(page), flags=re.DOTALL | re.MULTILINE))


def anchors(page: str) -> set[str]:
    """The anchors of a page: of its headings, as GitHub and MyST name them, and its targets ``(name)=``."""
    text = re.sub(r"^```.*?^```$", "", read(page), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r"^\(([^)\n]+)\)=$", text, re.MULTILINE))
