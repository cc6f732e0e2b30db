"""The comparison: a search with each estimator, a table and a picture."""

from pathlib import Path

from rich.console import Console
from rich.progress import track
from threadpoolctl import threadpool_limits

from . import data, oracle, report
from .frameworks import FRAMEWORKS
from .report import Row
from .search import ESTIMATORS, SOLVER, compare, search, shared_penalty, start

CHECKED = (7, 30, 64)
"""A noisy pixel, one in the middle, and the intercept."""


def run(
    framework: str = "torch",
    steps: int = 40,
    seed: int = 0,
    picture: Path | None = None,
    console: Console | None = None,
) -> list[Row]:
    """Compare all estimators, print a table, and save a picture if asked to.

    Parameters
    ----------
    framework
        ``"torch"`` or ``"jax"``.
    steps
        Steps of each search.
    seed
        Seed of the noise and the split.
    picture
        Where to save the searches and the penalties; nowhere if None.
    console
        Where to print; standard output if None.

    Returns
    -------
    list of Row
        One for each estimator, and the grid's.
    """
    console = Console() if console is None else console
    samples = data.load(seed)
    theta, _ = start(samples)
    with threadpool_limits(1):  # the matrices are small
        w = oracle.solve(samples.training, theta)
        exact = oracle.hypergradient(samples, theta, w)
        difference = max(abs(oracle.central_difference(samples, theta, j, w) - exact[j]) for j in CHECKED)
        rows = []
        for name, gradient in track(ESTIMATORS.items(), "searching", console=console, transient=True):
            evaluate = FRAMEWORKS[framework](samples, SOLVER, gradient)
            hypergradient = compare(samples, evaluate, gradient, theta, exact)
            trace = search(samples, evaluate, gradient, steps)
            found = oracle.solve(samples.training, trace.theta)
            losses = oracle.loss(found, samples.validation), oracle.loss(found, samples.test)
            rows.append(Row(name, hypergradient, trace, *losses))
        grid = shared_penalty(samples)
        found = oracle.solve(samples.training, grid.theta)
        rows.append(Row("one penalty", None, grid, *(oracle.loss(found, part) for part in samples[1:])))
    console.print(report.table(rows, framework))
    console.print(report.LEGEND, style="dim", highlight=False)
    console.print(
        f"The exact hypergradient is within {difference:.0e} of central differences, at 3 features.\n"
        "'one penalty' is the best of a grid of 9, the same for all pixels.",
        style="dim",
        highlight=False,
    )
    if picture is not None:
        report.save(picture, rows)
        console.print(f"Picture: {picture}", soft_wrap=True, markup=False, highlight=False)
    return rows
