"""The command line: ``python -m implicit_core info`` and ``python -m implicit_core demo``."""

import argparse
import importlib
import platform
import sys
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from typing import NoReturn

from . import __version__
from .registry import installed, load_backend
from .solution import SolveError

COLUMNS = 80
MODULES = {
    "cupy": "CuPy",
    "jax": "jax",
    "matplotlib": "matplotlib",
    "optax": "optax",
    "rich": "rich",
    "sklearn": "scikit-learn",
    "threadpoolctl": "threadpoolctl",
    "torch": "torch",
}
"""Modules that the demo needs beyond the core's dependencies, and the names of their distributions."""
EXTRAS = {"numpy": "demo", "torch": "demo,torch", "jax": "jax-demo", "cupy": "demo,cupy12", "all": "jax-demo,torch"}
"""Extras that install them, for each choice of frameworks."""


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and keeps the examples' lines."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code.

    Parameters
    ----------
    arguments
        Arguments of the command line if None.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if "command" not in options:
        parser.print_help()
        return 2
    command: Callable[[argparse.Namespace], int] = options.command
    return command(options)


def info(_options: argparse.Namespace) -> int:
    """Print the versions of the library, Python and the frameworks, and the devices found."""
    print(f"implicit_core {__version__}")
    print(f"Python        {platform.python_version()} ({platform.system()} {platform.machine()})")
    print()
    rows = [("framework", "installed", "version", ["devices"]), *(_framework(*found) for found in installed().items())]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for *cells, notes in rows:
        start = "".join(f"{cell:<{width}}  " for cell, width in zip(cells, widths, strict=True))
        indent = " " * len(start)
        for note in notes:
            print(textwrap.fill(note, COLUMNS, initial_indent=start, subsequent_indent=indent + "  ").rstrip())
            start = indent
    return 0


def _framework(name: str, is_installed: bool) -> tuple[str, str, str, list[str]]:
    """A row of the table: name, installed or not, version, and lines about the devices."""
    if not is_installed:
        return name, "no", "-", ["-"]
    try:
        devices = load_backend(name).devices()
    except Exception as error:  # a broken framework must not hide the others
        return name, "broken", "-", [f"{type(error).__name__}: {error}"]
    return name, "yes", str(getattr(sys.modules[name], "__version__", "?")), devices


def demo(options: argparse.Namespace, error: Callable[[str], NoReturn]) -> int:
    """Train the digit classifier; 1 if accuracy is missed or frameworks disagree, 2 if an extra is missing."""
    try:
        digits = importlib.import_module("implicit_core.examples.digits")
        try:
            output = digits.picture_path(options.output, options.framework)
        except (OSError, ValueError) as problem:
            error(f"argument --output: {problem}")
        try:
            results = digits.run(options.framework, options.epochs, options.seed, output)
        except digits.NoGPUError as problem:
            print(f"The demo can't compute with CuPy, which found {problem}.", file=sys.stderr)
            print("With --framework numpy it needs no GPU.", file=sys.stderr)
            return 2
    except ModuleNotFoundError as problem:
        module = (problem.name or "").partition(".")[0]
        if module not in MODULES:
            raise
        extras = EXTRAS[options.framework]
        print(
            f'The demo needs {MODULES[module]}, which is not installed; in a checkout: pip install -e ".[{extras}]".',
            file=sys.stderr,
        )
        if module == "cupy":
            print("cupy12 is for CUDA 12; for CUDA 13 it is cupy13.", file=sys.stderr)
        if module in ("cupy", "torch", "jax", "optax"):
            print(f"With --framework numpy it needs no {module}.", file=sys.stderr)
        return 2
    except SolveError as problem:
        print(f"The demo stopped: {problem}", file=sys.stderr)
        return 1
    return 1 if digits.failures(results) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m implicit_core",
        description="Implicit layers and phantom gradients, the same in every array framework.",
        epilog="example:\n  python -m implicit_core demo --framework torch --epochs 10",
        formatter_class=_Formatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="{demo,info}")
    about = "train a deep equilibrium classifier with four gradient estimators"
    trial = commands.add_parser(
        "demo",
        help=about,
        description=f"{about.capitalize()}\non scikit-learn's handwritten digits, "
        "in NumPy, PyTorch and JAX;\nprint a table and save the curves.",
        epilog="example:\n  python -m implicit_core demo --framework torch --output curves.png",
        formatter_class=_Formatter,
    )
    trial.add_argument("--framework", choices=tuple(EXTRAS), default="all", help="what to compute with")
    trial.add_argument("--epochs", type=partial(_integer, 1), default=20, metavar="N", help="passes over the data")
    trial.add_argument("--seed", type=partial(_integer, 0), default=0, metavar="S", help="seed of all that is random")
    trial.add_argument("--output", default="outputs", metavar="PATH", help="picture of the curves, or a folder for it")
    trial.set_defaults(command=partial(demo, error=trial.error))
    about = "show versions, frameworks and devices"
    facts = commands.add_parser("info", help=about, description=f"{about.capitalize()}.")
    facts.set_defaults(command=info)
    return parser


def _integer(minimum: int, text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be an integer, got {text!r}") from None
    if number < minimum:
        raise argparse.ArgumentTypeError(f"must be at least {minimum}, got {number}")
    return number


if __name__ == "__main__":
    sys.exit(main())
