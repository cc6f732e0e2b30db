"""The command line: ``python -m implicit_core.examples.torch_mnist1d``."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from ..program import add_numbers, exit_code, how_to_go_on, settings_of
from .settings import GRADIENTS, GROUPS, PHANTOM, Settings

PROGRAM = "python -m implicit_core.examples.torch_mnist1d"
MODULES = {"matplotlib", "mnist1d", "requests", "rich", "scipy", "tensorboard", "threadpoolctl", "torch"}
"""Modules that the example needs beyond the core's dependencies."""

EPILOG = f"""\
examples:
  {PROGRAM} --gradient neumann --k 3
  {PROGRAM} \\
      --checkpoint run.pt --tensorboard runs

Ctrl-C stops after the current step. With a checkpoint, --resume goes on from
there, and ends with the same parameters as a run without an interruption."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and test.

    Parameters
    ----------
    arguments
        Those of the command line if None.

    Returns
    -------
    int
        The exit code: 0, 1 if the run can't go on, 2 if a package is missing, 130 after Ctrl-C.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    settings = settings_of(parser, options, Settings(), PHANTOM)
    files = {"checkpoint": options.checkpoint, "tensorboard": options.tensorboard}

    def run() -> None:
        example = importlib.import_module(f"{__package__}.run")
        example.run(
            settings, checkpoint_path=options.checkpoint, resume=options.resume, tensorboard=options.tensorboard
        )

    return exit_code(run, MODULES, "examples", lambda: how_to_go_on(PROGRAM, settings.flags(), files))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        PROGRAM,
        usage="%(prog)s [options]",
        description="Train a convolutional deep equilibrium model on MNIST-1D\nand report its test accuracy.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--gradient", choices=GRADIENTS, default=Settings.gradient, help=f"estimator (default: {Settings.gradient})"
    )
    add_numbers(
        parser,
        Settings,
        ("k", "K", "steps of unroll, or terms of neumann"),
        ("lam", "L", "damping of unroll and neumann, in (0, 1]"),
        ("epochs", "N", "passes over the training samples"),
        ("batch_size", "N", "samples a step"),
        ("lr", "R", "highest learning rate of the schedule"),
        ("channels", "C", f"width of the model, a multiple of {GROUPS}"),
        ("seed", "S", "seed of parameters, split and order"),
    )
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="save the run after each epoch")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint, with the same settings")
    parser.add_argument("--tensorboard", type=Path, metavar="DIR", help="log each epoch for TensorBoard")
    return parser


if __name__ == "__main__":
    sys.exit(main())
