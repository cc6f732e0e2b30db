"""The site's settings. ``make docs`` builds it: warnings are errors, and nothing is fetched."""

import importlib.util
import os
import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

import implicit_core

DOCS = Path(__file__).parent
ROOT = DOCS.parent

project = "implicit_core"
author = "The implicit_core authors"
copyright = f"2026, {author}"
version = release = implicit_core.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build"]

# Every reference must lead somewhere, except those into other libraries.
nitpicky = True
nitpick_ignore_regex = [(r"py:.*", r"(collections|torch)\..*")]

# Pages
myst_enable_extensions = ["amsmath", "attrs_block", "attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

# Notebooks run at every build, in the environment of the build. An exception in a cell becomes a warning with its
# traceback, and warnings make the build fail once all pages have run. Raised, it would end the build at once, without a
# traceback.
nb_execution_mode = "force"
nb_execution_show_tb = True
nb_execution_timeout = 120
nb_merge_streams = True
# Kernels inherit these: the style of figures, and one thread each, since pages run in parallel.
os.environ["MATPLOTLIBRC"] = str(DOCS)
os.environ.setdefault("OMP_NUM_THREADS", "1")

# MathJax is part of the site, so that formulas are drawn without a network. Its package is not loaded as an extension,
# which would rule out parallel builds.
MATHJAX = importlib.util.find_spec("sphinx-mathjax-offline")
if MATHJAX is None or MATHJAX.origin is None:
    raise ImportError("sphinx-mathjax-offline is missing: make docs installs what the site needs")
mathjax_path = "mathjax/tex-chtml.js"
mathjax_options = {"async": "async"}

# Reference
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "none"  # docstrings describe types; signatures show names and defaults
napoleon_google_docstring = False
napoleon_attr_annotations = False
napoleon_use_ivar = True
napoleon_use_rtype = False

# Appearance
html_theme = "furo"
html_title = "implicit_core"
html_static_path = ["_static", str(Path(MATHJAX.origin).parent / "static")]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {"navigation_with_keys": True}
copybutton_exclude = ".linenos, .gp, .go"

# Files outside of docs/ that have a page; links to them lead there
PAGES = {
    ROOT / "README.md": DOCS / "index.md",
    ROOT / "CHANGELOG.md": DOCS / "changelog.md",
    ROOT / "CONTRIBUTING.md": DOCS / "contributing.md",
    ROOT / "benchmarks/README.md": DOCS / "benchmarks.md",
}
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s#:]+)(#[^)\s]*)?\)")


def on_the_site(text: str, source: Path, page: Path) -> str:
    """Markdown of the file ``source`` for ``page``: links lead to pages, or become plain words if there is no page."""

    def link(match: re.Match[str]) -> str:
        words, path, anchor = match[1], match[2], match[3] or ""
        target = (source.parent / path).resolve()
        if not target.exists():  # code that looks like a link, or a link that Sphinx will report
            return match[0]
        target = PAGES.get(target, target)
        if not target.is_relative_to(DOCS):
            return words
        return f"[{words}]({Path(os.path.relpath(target, page.parent)).as_posix()}{anchor})"

    return LINK.sub(link, text)


def short_name(app: Sphinx, env: Any, node: Any, words: Any) -> Any:
    """Resolve names of ``implicit_core`` without its prefix, such as ``Problem`` or ``Backend.solving``."""
    if node.get("refdomain") == "py" and node["reftarget"].split(".")[0] in implicit_core.__all__:
        target = f"implicit_core.{node['reftarget']}"
        return env.domains["py"].resolve_xref(env, node["refdoc"], app.builder, node["reftype"], target, node, words)
    return None


def attributes(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Make one entry of attributes that a docstring lists together, ``a, b``; Sphinx would read ``a,`` as a type."""
    lines[:] = [re.sub(r"^( *[A-Z])\. ", r"\1\\. ", line) for line in lines]  # "Z. Geng" begins no list
    lines[:] = [re.sub(r"(?<=:ivar )\w+(, \w+)+(?=:)", lambda names: names[0].replace(" ", ""), line) for line in lines]


def setup(app: Sphinx) -> None:
    """Connect the functions above to Sphinx: this configuration is also an extension."""

    def read(app: Sphinx, name: str, source: list[str]) -> None:
        page = Path(app.env.doc2path(name))
        source[0] = on_the_site(source[0], page, page)

    def include(app: Sphinx, path: Path, parent: str, source: list[str]) -> None:
        source[0] = on_the_site(source[0], (DOCS / path).resolve(), Path(app.env.doc2path(parent)))

    app.connect("autodoc-process-docstring", attributes, priority=900)  # after napoleon
    app.connect("missing-reference", short_name)
    app.connect("source-read", read)
    app.connect("include-read", include)
