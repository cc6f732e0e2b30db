"""Train each layer on two spirals: ``python -m implicit_core.examples.jax_layers``."""

from collections.abc import Callable, Iterator
from functools import partial
from time import perf_counter

import jax
import numpy as np
import optimistix as optx
from flax import nnx
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

import implicit_core as ic

from . import equinox_layer, nnx_layer, optimistix_solver
from .task import Metrics, spirals

SAMPLES, WIDTH, STEPS = 128, 32, 300

Train = Callable[[jax.Array, jax.Array, int], Iterator[Metrics]]


def with_equinox(x: jax.Array, labels: jax.Array, steps: int) -> Iterator[Metrics]:
    """An Equinox module, solved by Anderson's method."""
    return equinox_layer.train(equinox_layer.Classifier(2, WIDTH, 2, jax.random.key(0)), x, labels, steps)


def with_nnx(x: jax.Array, labels: jax.Array, steps: int) -> Iterator[Metrics]:
    """An NNX module, solved by Anderson's method."""
    return nnx_layer.train(nnx_layer.Classifier(2, WIDTH, 2, rngs=nnx.Rngs(0)), x, labels, steps)


def with_optimistix(x: jax.Array, labels: jax.Array, steps: int) -> Iterator[Metrics]:
    """An Equinox module, solved by Optimistix."""
    solver = optimistix_solver.solver(optx.FixedPointIteration(rtol=1e-5, atol=1e-5))
    solve = partial(ic.fixed_point, solver=solver, gradient=ic.Neumann(k=5, lam=0.5))
    model = equinox_layer.Classifier(2, WIDTH, 2, jax.random.key(0), solve=solve)
    return equinox_layer.train(model, x, labels, steps)


LAYERS: dict[str, Train] = {"Equinox": with_equinox, "Flax NNX": with_nnx, "Optimistix": with_optimistix}


def main(steps: int = STEPS, console: Console | None = None) -> None:
    """Train all layers, and print a table."""
    console = Console() if console is None else console
    x, labels = spirals(SAMPLES)
    table = Table(title="Two spirals, Neumann(5, 0.5), Adam", box=box.SIMPLE_HEAD)
    table.add_column("layer")
    for name in ("loss before", "after", "correct", "converged", "ms a step"):
        table.add_column(name, justify="right")
    for name, train in LAYERS.items():
        seconds, history, start = [], [], perf_counter()
        for metrics in track(train(x, labels, steps), f"{name:<10}", total=steps, console=console):
            history.append([float(value) for value in metrics])
            seconds.append(perf_counter() - start)
            start = perf_counter()
        first, last = history[0], history[-1]
        converged = np.mean([converged for *_, converged in history])
        # The median: a first step also compiles.
        numbers = f"{first[0]:.3f}", f"{last[0]:.4f}", f"{last[1]:.1%}", f"{converged:.1%}"
        table.add_row(name, *numbers, f"{1e3 * np.median(seconds):.1f}")
    console.print(table)


if __name__ == "__main__":
    main()
