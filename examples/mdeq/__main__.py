"""The command line: ``python -m implicit_core.examples.mdeq``."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ..program import at_least, exit_code, flag, how_to_go_on, settings_of
from .settings import CHOICES, PHANTOM, PRESETS, Settings

PROGRAM = "python -m implicit_core.examples.mdeq"
MODULES = {"PIL", "matplotlib", "rich", "sklearn", "tensorboard", "threadpoolctl", "torch"}
"""Modules that the example needs beyond the core's dependencies."""

EPILOG = f"""\
models: small, with two branches, and small-4, with four, train on one core
within minutes. tiny and large (CIFAR-10) and imagenet have the sizes and the
settings of the published runs. Other options replace single settings.

examples:
  {PROGRAM}
  {PROGRAM} \\
      --data cifar10 --data-dir DIR --train 3000 --gradient neumann
  torchrun --nproc-per-node 2 -m implicit_core.examples.mdeq \\
      --model tiny --data-dir DIR --checkpoint run.pt --tensorboard runs

Ctrl-C stops after the current step. With a checkpoint, --resume goes on from
there, and ends with the same parameters as a run without an interruption."""

NUMBERS = (
    ("pixels", "N", "height and width that larger images are reduced to; 0: as they are"),
    ("train", "N", "most images to train on; 0 for all"),
    ("test", "N", "most images to test on; 0 for all"),
    ("k", "K", "steps of unroll, or terms of neumann"),
    ("lam", "L", "damping of unroll and neumann, in (0, 1]"),
    ("products", "N", "Jacobian products of a backward solve of implicit"),
    ("pretraining", "P", "share of the steps that apply the cell ten times, without a solve"),
    ("dropout", "P", "probability that a channel is left out in a solve"),
    ("solver_steps", "N", "steps of Broyden's method"),
    ("epochs", "N", "passes over the images"),
    ("batch", "N", "images a step, of all processes together"),
    ("rate", "R", "learning rate at the start; it falls on a cosine"),
    ("decay", "D", "weight decay of SGD"),
    ("augment", "0/1", "1 to crop and flip images at random"),
    ("seed", "S", "seed of parameters, order, dropout and augmentation"),
)


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
    settings = settings_of(parser, options, PRESETS[getattr(options, "model", Settings.model)], PHANTOM)
    if "products" in options and settings.gradient != "implicit":
        parser.error(f"--products belongs to --gradient implicit, not to {settings.gradient}")
    if "decay" in options and settings.optimizer == "adam":
        parser.error("--decay belongs to --optimizer sgd and nesterov, not to adam")
    files = {name: getattr(options, name) for name in ("checkpoint", "tensorboard", "data_dir")}

    def run() -> None:
        more = {name: getattr(options, name) for name in ("device", "threads", "workers", "resume")}
        importlib.import_module(f"{__package__}.run").run(settings, **files, **more)

    flags = settings.flags() | {flag(name): str(getattr(options, name)) for name in ("device", "threads", "workers")}

    def stopped() -> str | None:
        if os.environ.get("RANK", "0") != "0":
            return None
        processes = os.environ.get("LOCAL_WORLD_SIZE")
        launcher = f"torchrun --nproc-per-node {processes}" if processes else "python"
        return how_to_go_on(PROGRAM.replace("python", launcher, 1), flags, files)

    return exit_code(run, MODULES, "examples", stopped)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        PROGRAM,
        usage="%(prog)s [options]",
        description="Train a multiscale deep equilibrium model that classifies images.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, about in (
        ("model", "sizes of the model, and the settings that are not given"),
        ("data", "what to train on"),
        ("gradient", "of the implicit layer"),
        ("optimizer", "SGD with momentum 0.9, with Nesterov's, or Adam"),
        ("precision", "of the layers; solves are in float32"),
    ):
        parser.add_argument(flag(name), choices=CHOICES[name], default=argparse.SUPPRESS, help=about + _default(name))
    for name, metavar, about in NUMBERS:
        kind = type(getattr(Settings, name))
        about += _default(name)
        parser.add_argument(flag(name), type=kind, default=argparse.SUPPRESS, metavar=metavar, help=about)
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="folder of the images")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (default: a GPU if there is one)")
    parser.add_argument("--threads", type=at_least(1), default=1, metavar="N", help="of the CPU (default: 1)")
    about = "processes that read the files of ImageNet (default: 4)"
    parser.add_argument("--workers", type=at_least(0), default=4, metavar="N", help=about)
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="save the run every epoch, and after Ctrl-C")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint, with the same settings")
    parser.add_argument("--tensorboard", type=Path, metavar="DIR", help="log the run for TensorBoard")
    return parser


def _default(name: str) -> str:
    """The value of a setting that is not given, and those of models with another one."""
    value = getattr(Settings, name)
    others = {model: getattr(preset, name) for model, preset in PRESETS.items()} if name != "model" else {}
    groups: dict[object, list[str]] = {}
    for model, other in others.items():
        if other != value:
            groups.setdefault(other, []).append(model)
    more = "".join(f"; {', '.join(models)}: {other}" for other, models in groups.items())
    return f" (default: {value}{more})"


if __name__ == "__main__":
    sys.exit(main())
