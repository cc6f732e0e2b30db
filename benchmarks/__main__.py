"""``python -m benchmarks``: all measurements, by name."""

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "solvers": ("solvers", "solvers beside TorchDEQ's, jaxopt's, optimistix' and SciPy's"),
    "gradients": ("gradients", "time and memory after the solve, beside TorchDEQ's"),
    "training": ("training", "a step of a convolution block to one residual, beside TorchDEQ's"),
    "scaling": ("scaling", "cost against batch, width, k and the solver's memory"),
    "step": ("torch_step", "the same of forced evaluations: time and memory of all gradients"),
    "layer": ("jax_layer", "a layer in JAX, beside jaxopt's and optimistix'"),
    "fig1": ("fig1", "Figure 1: cosine of the phantom and the exact gradient against k"),
    "theorem3": ("theorem3", "Theorem 3: SGD with phantom gradients, beside its bound"),
    "gpu": ("gpu", "all that needs a GPU: the tests marked gpu, and times"),
}


def usage() -> str:
    """What --help prints."""
    lines = [f"  {name:<11}{what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: python -m benchmarks COMMAND [--help] [options]",
            "",
            "Times are ratios of what ran side by side; absolute ones mean little.",
            "",
            *lines,
        ]
    )


def main(arguments: Sequence[str]) -> int:
    """Run one of them; returns the exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in COMMANDS:
        print(f"python -m benchmarks: there is no {name!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    module = importlib.import_module(f".{COMMANDS[name][0]}", __package__)
    code: int = module.main(rest)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
