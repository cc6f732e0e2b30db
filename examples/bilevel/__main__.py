"""The command line: ``python -m implicit_core.examples.bilevel``."""

import argparse
import importlib
import sys
from collections.abc import Sequence

PROGRAM = "python -m implicit_core.examples.bilevel"
MODULES = {"jax", "matplotlib", "rich", "sklearn", "threadpoolctl", "torch"}
"""Modules that the example needs beyond the core's dependencies; of the frameworks, only the chosen one."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare the estimators.

    Parameters
    ----------
    arguments
        Those of the command line if None.

    Returns
    -------
    int
        The exit code: 0, or 2 if a package is missing.
    """
    parser = argparse.ArgumentParser(
        PROGRAM,
        description="Learn an l2 penalty for each pixel of a digit classifier, with hypergradients of every estimator.",
    )
    parser.add_argument("--framework", choices=("torch", "jax"), default="torch", help="default: torch")
    parser.add_argument("--steps", type=int, default=40, metavar="N", help="steps of each search (default: 40)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of noise and split (default: 0)")
    parser.add_argument("--picture", metavar="FILE", help="save the searches and the penalties as .pdf, .png or .svg")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error(f"--steps must be at least 1, got {options.steps}")
    try:
        run = importlib.import_module(f"{__package__}.run")
        importlib.import_module(options.framework)
        path = None if options.picture is None else run.report.picture_path(options.picture)
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in MODULES:
            raise
        extra = f'in a checkout: pip install -e ".[demo,{options.framework}]"'
        print(f"The example needs {module}, which is not installed; {extra}.", file=sys.stderr)
        return 2
    except ValueError as error:
        parser.error(f"--picture: {error}")
    run.run(options.framework, options.steps, options.seed, path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
