"""Find the backend and the adapter of given arrays, without importing a framework."""

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, ParamSpec, TypeVar

import optree

from . import checks
from .arrays import PyTree
from .backend import Backend

P = ParamSpec("P")
R = TypeVar("R")

# Root module of a framework -> the module that holds its BACKEND. Third parties join with an entry point of the
# group "implicit_core.backends" (name: the framework's root module; value: the module).
_BACKENDS = {
    "numpy": "implicit_core.backends.numpy",
    "torch": "implicit_core.backends.torch",
    "jax": "implicit_core.backends.jax",
    "cupy": "implicit_core.backends.cupy",
    "array_api_strict": "implicit_core.backends.array_api_strict",
}
_ADAPTERS = {
    "torch": "implicit_core.adapters.torch",
    "jax": "implicit_core.adapters.jax",
}


class Compiler(NamedTuple):
    """For frameworks that compile the user's Python code: how they leave a function out of it."""

    is_compiling: Callable[[], bool]
    leave_out: Callable[[Callable[..., Any]], Callable[..., Any]]


COMPILERS: list[Compiler] = []
"""Those of the adapters that were imported."""


def not_compiled(function: Callable[P, R]) -> Callable[P, R]:
    """``function``, which runs as it is where code that calls it is compiled (Decision 42)."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        for compiler in COMPILERS:
            if compiler.is_compiling():
                result: R = compiler.leave_out(call)(*args, **kwargs)
                return result
        return function(*args, **kwargs)

    return call


def _require_folders() -> None:
    """Raise if a part of the package is missing, which a later import would report as a module that does not exist."""
    missing = [name for name in ("adapters", "backends") if importlib.util.find_spec(f"implicit_core.{name}") is None]
    if missing:
        raise ImportError(
            f"The package in {Path(__file__).parent} is incomplete (no {', no '.join(missing)}): run "
            "`pip install -e .` in a complete checkout, or delete this copy if implicit_core is installed elsewhere."
        )


_require_folders()


def _modules(kind: str, built_in: dict[str, str]) -> dict[str, str]:
    return _joined(kind) | built_in


@functools.cache
def _joined(kind: str) -> dict[str, str]:
    """Registrations by third parties; read once, since reading takes milliseconds."""
    import importlib.metadata  # takes 30 ms, and is needed only if no built-in module matches

    return {entry.name: entry.value for entry in importlib.metadata.entry_points(group=f"implicit_core.{kind}")}


def _imported(name: str, attribute: str) -> ModuleType:
    """A module with an attribute. One that has it already is looked up: torch.compile can trace that, but no import."""
    module = sys.modules.get(name)
    return module if module is not None and hasattr(module, attribute) else importlib.import_module(name)


def load_backend(framework: str) -> Backend:
    """The backend of a framework, imported with the framework itself.

    Parameters
    ----------
    framework
        Name of the framework's root module, e.g. ``"torch"``.

    Raises
    ------
    ValueError
        If no backend is registered under that name.
    ImportError
        If the framework is not installed.
    """
    module = _BACKENDS.get(framework) or _modules("backends", _BACKENDS).get(framework)
    if module is None:
        known = ", ".join(sorted(_modules("backends", _BACKENDS)))
        raise ValueError(f"no backend for {framework!r}; there are backends for: {known}")
    backend: Backend = _imported(module, "BACKEND").BACKEND
    return backend


def installed() -> dict[str, bool]:
    """Frameworks with a backend, and whether each is installed here; nothing is imported."""
    return {name: importlib.util.find_spec(name) is not None for name in _modules("backends", _BACKENDS)}


def load_adapter(framework: str) -> ModuleType | None:
    """The adapter that binds a framework's autodiff, or None if it has no adapter."""
    module = _ADAPTERS.get(framework) or _modules("adapters", _ADAPTERS).get(framework)
    return None if module is None else _imported(module, "problem")


def find_adapter(tree: PyTree) -> ModuleType | None:
    """The adapter of the arrays in ``tree``, or None if they have no adapter."""
    backend = _owner(tree, _ADAPTERS) or _owner(tree, _modules("adapters", _ADAPTERS))
    return None if backend is None else load_adapter(backend.name)


def _owner(tree: PyTree, frameworks: dict[str, str]) -> Backend | None:
    # Nearly always one array, or a pytree of arrays of one framework, whose name is in the name of their class.
    leaves = [tree] if hasattr(tree, "dtype") else optree.tree_leaves(tree)
    roots = {type(leaf).__module__.partition(".")[0] for leaf in leaves}
    if len(roots) == 1 and (root := roots.pop()) in frameworks and (backend := load_backend(root)).is_array(leaves[0]):
        return backend
    for framework in frameworks:
        if sys.modules.get(framework) is not None:  # None stands for a module that must not be imported
            backend = load_backend(framework)
            if any(map(backend.is_array, backend.flatten(tree)[0])):
                return backend
    return None


def flattened(tree: PyTree) -> tuple[list[Any], Any]:
    """The leaves of a pytree of any framework's arrays, or of numbers, and its structure."""
    backend = _owner(tree, _BACKENDS) or _owner(tree, _modules("backends", _BACKENDS))
    return optree.tree_flatten(tree) if backend is None else backend.flatten(tree)


def leaves_of(tree: PyTree) -> list[Any]:
    """The leaves of a pytree of any framework's arrays, or of numbers."""
    return flattened(tree)[0]


def find_backend(tree: PyTree, name: str = "h0") -> Backend:
    """The backend of the arrays in ``tree``.

    Parameters
    ----------
    tree
        An array, or a pytree of arrays of one framework.
    name
        Name of ``tree`` in an error.

    Raises
    ------
    TypeError
        If ``tree`` holds no array of a known framework.
    """
    backend = _owner(tree, _BACKENDS) or _owner(tree, _modules("backends", _BACKENDS))
    if backend is None:
        kind = f"{type(tree).__module__}.{type(tree).__qualname__}".removeprefix("builtins.")
        hint = "" if hasattr(tree, "dtype") else f". A number becomes an array with, for example, numpy.asarray({name})"
        hint = checks.unregistered(optree.tree_leaves(tree)) or hint
        raise TypeError(
            f"{name} must be an array, or a pytree of arrays, of a framework with a backend "
            f"({', '.join(_modules('backends', _BACKENDS))}); got {kind}{hint}"
        )
    return backend
