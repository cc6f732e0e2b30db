"""The command line: ``python -m implicit_core.examples.torch_mnist1d``."""

import argparse
import importlib
import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from .settings import GRADIENTS, GROUPS, PHANTOM, Settings, flag

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
    given = {field.name: getattr(options, field.name) for field in fields(Settings) if field.name in options}
    try:
        settings = Settings(**given)
    except ValueError as error:
        parser.error(str(error))
    if settings.gradient not in PHANTOM and given.keys() & {"k", "lam"}:
        parser.error(f"--k and --lam belong to --gradient {' and '.join(PHANTOM)}, not to {settings.gradient}")
    if options.resume and options.checkpoint is None:
        parser.error("--resume needs --checkpoint FILE, the file to go on from")
    try:
        return _run(settings, options)
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in MODULES:
            raise
        extra = 'in a checkout: pip install -e ".[examples]"'
        print(f"The example needs {module}, which is not installed; {extra}.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nStopped. {_how_to_go_on(settings, options)}", file=sys.stderr)
        return 130


def _run(settings: Settings, options: argparse.Namespace) -> int:
    example = importlib.import_module(f"{__package__}.run")
    try:
        example.run(
            settings,
            checkpoint_path=options.checkpoint,
            resume=options.resume,
            tensorboard=options.tensorboard,
        )
    except example.ERRORS as error:
        print(f"The training stopped: {error}", file=sys.stderr)
        return 1
    return 0


def _how_to_go_on(settings: Settings, options: argparse.Namespace) -> str:
    path: Path | None = options.checkpoint
    if path is None:
        return "Nothing is kept; --checkpoint FILE would have saved the run."
    if not path.exists():
        return f"Nothing was done yet, and there is no {path}."
    words = [word for pair in settings.flags().items() for word in pair] + ["--checkpoint", str(path)]
    if options.tensorboard is not None:
        words += ["--tensorboard", str(options.tensorboard)]
    return f"The run is in {path}; go on with\n  {PROGRAM} {shlex.join([*words, '--resume'])}"


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
    for name, metavar, about in (
        ("k", "K", "steps of unroll, or terms of neumann"),
        ("lam", "L", "damping of unroll and neumann, in (0, 1]"),
        ("epochs", "N", "passes over the training samples"),
        ("batch_size", "N", "samples a step"),
        ("lr", "R", "highest learning rate of the schedule"),
        ("channels", "C", f"width of the model, a multiple of {GROUPS}"),
        ("seed", "S", "seed of parameters, split and order"),
    ):
        default = getattr(Settings, name)
        about = f"{about} (default: {default})"
        parser.add_argument(flag(name), type=type(default), default=argparse.SUPPRESS, metavar=metavar, help=about)
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="save the run after each epoch")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint, with the same settings")
    parser.add_argument("--tensorboard", type=Path, metavar="DIR", help="log each epoch for TensorBoard")
    return parser


if __name__ == "__main__":
    sys.exit(main())
