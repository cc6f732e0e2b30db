"""``python -m benchmarks``: run one benchmark by its name."""

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "solvers": ("solvers", "solvers, compared with TorchDEQ, jaxopt, optimistix and SciPy"),
    "gradients": ("gradients", "time and memory of gradients, compared with TorchDEQ"),
    "training": ("training", "a training step solved to a given residual, compared with TorchDEQ"),
    "profile": ("profile", "solved problems against cost: profiles of root finders and solvers"),
    "scaling": ("scaling", "cost as a function of batch, width, k and the solver's memory"),
    "step": ("torch_step", "a training step with a given number of evaluations, likewise"),
    "recursive": ("recursive_step", "a training step of recursive models, compared with loops by hand"),
    "layer": ("jax_layer", "a layer in JAX, compared with jaxopt and optimistix"),
    "fig1": ("fig1", "Figure 1: cosine of phantom and exact gradient as a function of k"),
    "theorem3": ("theorem3", "Theorem 3: SGD with phantom gradients, compared with its bound"),
    "ladder": ("ladder", "recursive models trained with every gradient, from one step to all"),
    "table1": ("mdeq.table1", "Table 1: MDEQ with the exact gradient, its parts, and others"),
    "table2": ("mdeq.table2", "Table 2: evaluations, pullbacks and bytes against K and k"),
    "table3": ("mdeq.table3", "Table 3: large MDEQ, accuracy, time and memory, beside TorchDEQ"),
    "fig2": ("mdeq.fig2", "Figure 2: cosine of phantom gradients along a training"),
    "fig3": ("mdeq.fig3", "Figure 3: accuracy for several k and λ, and for both forms"),
    "multiscale": ("mdeq.steps", "a training step of MDEQ of any size, compared with TorchDEQ"),
    "gpu": ("gpu", "everything that needs a GPU: the tests marked gpu, then timings"),
}


def usage() -> str:
    """The text of --help."""
    lines = [f"  {name:<11}{what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: python -m benchmarks COMMAND [--help] [options]",
            "",
            "Compare ratios of times within one run; absolute times depend on the machine.",
            "",
            *lines,
        ]
    )


def main(arguments: Sequence[str]) -> int:
    """Run one benchmark and return the exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in COMMANDS:
        print(f"python -m benchmarks: unknown command {name!r}; choose from {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    try:
        module = importlib.import_module(f".{COMMANDS[name][0]}", __package__)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("benchmarks", "implicit_core"):
            raise
        print(f'python -m benchmarks {name} needs {error.name}: pip install -e ".[test]"', file=sys.stderr)
        return 2
    try:
        code: int = module.main(rest)
    except OSError as error:
        if error.filename is None:
            raise
        print(f"python -m benchmarks {name}: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
