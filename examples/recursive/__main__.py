"""The command line: ``python -m implicit_core.examples.recursive``."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from ..program import add_numbers, exit_code, flag, how_to_go_on, settings_of
from .loops import GRADIENTS, PHANTOM
from .settings import FRAMEWORKS, Settings

PROGRAM = "python -m implicit_core.examples.recursive"
MODULES = {"equinox", "jax", "matplotlib", "optax", "rich", "tensorboard", "threadpoolctl", "torch"}
"""Modules that the example needs beyond the core's dependencies."""
FORMATS = (".pdf", ".png", ".svg")

EPILOG = f"""\
gradients: trm passes through the last recursion, hrm through its last update
of the latent, unroll through the last K recursions, full through all of them.
neumann, one-step and implicit estimate the gradient of a fixed point.
switching takes neumann where the state moves little, and unroll elsewhere.

examples:
  {PROGRAM} --picture solved.png
  {PROGRAM} \\
      --framework jax --gradient unroll --k 3
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
    if options.picture is not None and options.picture.suffix not in FORMATS:
        parser.error(f"--picture needs a file ending in one of {', '.join(FORMATS)}, got {str(options.picture)!r}")
    files = {name: getattr(options, name) for name in ("checkpoint", "tensorboard", "picture")}

    def run() -> None:
        importlib.import_module(f"{__package__}.run").run(settings, **files, resume=options.resume)

    return exit_code(run, MODULES, "examples,jax-examples", lambda: how_to_go_on(PROGRAM, settings.flags(), files))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        PROGRAM,
        usage="%(prog)s [options]",
        description="Train a tiny recursive model on Sudoku puzzles of 6 x 6 cells,\nand test it on others.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, choices, about in (
        ("framework", FRAMEWORKS, "PyTorch or JAX"),
        ("gradient", GRADIENTS, "which recursions it passes through"),
    ):
        default = getattr(Settings, name)
        about = f"{about} (default: {default})"
        parser.add_argument(flag(name), choices=choices, default=argparse.SUPPRESS, help=about)
    add_numbers(
        parser,
        Settings,
        ("k", "K", "recursions of unroll, or terms of neumann"),
        ("lam", "L", "damping of unroll and neumann, in (0, 1]"),
        ("recursions", "T", "recursions of a training step"),
        ("latent_steps", "N", "updates of the latent in a recursion"),
        ("supervisions", "N", "training steps that a puzzle stays in the batch"),
        ("width", "C", "channels of a cell"),
        ("batch", "N", "puzzles a step"),
        ("steps", "N", "training steps"),
        ("rate", "R", "highest learning rate of the schedule"),
        ("seed", "S", "seed of parameters and order"),
    )
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="save the run ten times, and after Ctrl-C")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint, with the same settings")
    parser.add_argument("--tensorboard", type=Path, metavar="DIR", help="log the run for TensorBoard")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw how a puzzle is solved: .png, .pdf or .svg")
    return parser


if __name__ == "__main__":
    sys.exit(main())
