"""Solvers compared with TorchDEQ, jaxopt, optimistix and SciPy: evaluations of F, time and overhead."""

import argparse
import warnings
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from rich.console import Console

from . import report
from .contenders import LIMIT, OURS, RTOL, TORCHDEQS, Contender
from .counting import Dispatched
from .equations import QUICK, SIZES, Equation, equations, random_layer
from .timing import geometric_mean, interleaved, ratio

FORCED = 30
"""Number of evaluations of F in each solve of the overhead measurement."""
BUDGETS = {
    ("fixed point", "32x128"): 1.5,
    ("Anderson", "32x128"): 5.0,
    ("Broyden", "32x128"): 6.0,
    ("fixed point", "256x1024"): 1.03,
    ("Anderson", "256x1024"): 1.25,
    ("Broyden", "256x1024"): 1.5,
}
LEGEND = """\
F      evaluations of F until every sample's relative residual was at most 1e-5;
       a dash: not reached within 200 evaluations
time   time of that solve, divided by our time: in PyTorch for TorchDEQ and
       SciPy, in JAX under jit for jaxopt and optimistix"""
OVERHEAD_LEGEND = """\
/ F    time of 30 steps, divided by the time of 30 bare evaluations of F
ops    operations per step that reach PyTorch's dispatcher, including views and
       without the operations of F"""

Libraries = dict[str, Callable[[Equation, str], Contender]]


def libraries(family: str) -> Libraries:
    """The libraries that have this solver; ours in PyTorch and in JAX come first."""
    from . import contenders as c

    found: Libraries = {"ours": c.ours_in_torch, "ours, jit": c.ours_in_jax}
    for name, make, families in (
        ("TorchDEQ", c.torchdeqs, c.TORCHDEQS),
        ("SciPy", c.scipys, c.SCIPYS),
        ("jaxopt", c.jaxopts, c.JAXOPTS),
        ("optimistix", c.optimistixs, ("fixed point",)),
    ):
        if family in families:
            found[name] = make
    return found


IN_TORCH = ("ours", "TorchDEQ", "SciPy")
IN_JAX = ("ours, jit", "jaxopt", "optimistix")
OVER = {"TorchDEQ": "ours", "SciPy": "ours", "jaxopt": "ours, jit", "optimistix": "ours, jit"}


def to_a_residual(equation: Equation, family: str, repetitions: int, announce: Callable[[str], None]) -> dict[str, Any]:
    """Evaluations and times of one solver in all libraries on one equation."""
    label = f"{family}, {equation.name}"
    announce(label)
    found = {name: make(equation, family) for name, make in libraries(family).items()}
    arrived = {name: contender.run for name, contender in found.items() if contender.evaluations is not None}
    times: dict[str, list[float]] = {}
    for names in (IN_TORCH, IN_JAX):
        group = {name: run for name, run in arrived.items() if name in names}
        times |= interleaved(group, repetitions, lambda _: announce(label), limit=6.0)
    return {
        "equation": equation.name,
        "evaluations": {name: contender.evaluations for name, contender in found.items()},
        "times": times,
        "over ours": {
            name: ratio(times, name, ours) for name, ours in OVER.items() if name in arrived and ours in arrived
        },
    }


def fastest_in_jax(
    equation: Equation, rows: dict[str, dict[str, Any]], repetitions: int, announce: Callable[[str], None]
) -> dict[str, Any] | None:
    """Our fastest solver compared with the fastest of the other libraries under jit, whatever their methods.

    ``rows`` maps the name of each solver to the result of :func:`to_a_residual`.
    """
    label = f"under jit, {equation.name}"
    announce(label)
    times = {
        (name, family): median(row["times"][name])
        for family, row in rows.items()
        for name in IN_JAX
        if name in row["times"]
    }
    ours = min((key for key in times if key[0] == IN_JAX[0]), key=times.__getitem__, default=None)
    theirs = min((key for key in times if key[0] != IN_JAX[0]), key=times.__getitem__, default=None)
    if ours is None or theirs is None:
        return None
    runs = {name: libraries(family)[name](equation, family).run for name, family in (ours, theirs)}
    found = interleaved(runs, 3 * repetitions, lambda _: announce(label), limit=8.0)
    return {"equation": equation.name, "ours": ours, "theirs": theirs, "ratio": ratio(found, theirs[0], ours[0])}


def operations(make: Callable[..., Contender], equation: Equation, family: str, own: int) -> float:
    """Operations per step without the ``own`` operations of F, counted over late steps, when the history is full."""
    counts = []
    for steps in (FORCED, FORCED - 10):
        run = make(equation, family, steps).run
        with Dispatched() as mode:
            run()
        counts.append(mode.operations.total())
    return (counts[0] - counts[1]) / 10 - own


def overhead(equation: Equation, repetitions: int, announce: Callable[[str], None]) -> list[dict[str, Any]]:
    """Overhead of the steps over F, here and in TorchDEQ."""
    from .contenders import ours_in_torch, torchdeqs

    evaluate = equation.bare(FORCED)
    with Dispatched() as mode:
        evaluate()
    own = mode.operations.total() // FORCED
    rows = []
    for family in TORCHDEQS:
        makes = {"ours": ours_in_torch, "TorchDEQ": torchdeqs}
        runs = {name: make(equation, family, FORCED).run for name, make in makes.items()}
        times = interleaved({"F": evaluate, **runs}, repetitions, lambda _: announce(f"overhead, {equation.name}"))
        rows.append(
            {
                "size": "x".join(map(str, equation.shape)),
                "solver": family,
                "overhead": {name: ratio(times, name, "F") for name in runs},
                "operations": {name: operations(make, equation, family, own) for name, make in makes.items()},
                "times": times,
            }
        )
    return rows


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = report.parser("solvers", __doc__)
    options.add_argument("--solver", choices=OURS, action="append", help="run only this solver; may be repeated")
    options.add_argument(
        "--equation",
        action="append",
        help="only names that begin with this, like 'stiff'; may be repeated",
    )
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    import jax
    import numpy as np
    import torch

    command = parser()
    options = command.parse_args(arguments)
    torch.set_num_threads(options.threads)
    console = Console(width=80)
    problems = equations(options.seed, quick=options.quick)
    if options.equation:
        problems = [e for e in problems if e.name.startswith(tuple(options.equation))]
        if not problems:
            command.error(f"no equation begins with {', '.join(options.equation)}")
    families = options.solver or list(OURS)
    sizes = QUICK if options.quick else SIZES
    repetitions = options.repetitions or (3 if options.quick else 9)
    calls = [len(libraries(family)) * repetitions + 1 for family in families for _ in problems]
    total = sum(calls) + len(problems) * (1 + 6 * repetitions) + len(sizes) * len(TORCHDEQS) * 3 * 3 * repetitions
    record: dict[str, Any] = {"rtol": RTOL, "limit": LIMIT, "solvers": {}, "under jit": [], "overhead": []}
    # Float32 only: with x64 enabled, other libraries mix the two types.
    with warnings.catch_warnings(), jax.enable_x64(False), report.progress(console, total) as announce:
        warnings.simplefilter("ignore")  # warnings of the other libraries
        for size in sizes:
            layer = random_layer(np.random.default_rng(options.seed), *size)
            record["overhead"] += overhead(layer, 3 * repetitions, announce)
        for family in families:
            record["solvers"][family] = [to_a_residual(e, family, repetitions, announce) for e in problems]
        for i, equation in enumerate(problems):
            rows = {family: found[i] for family, found in record["solvers"].items()}
            record["under jit"].append(fastest_in_jax(equation, rows, repetitions, announce))
    tables = [solver_table(family, rows) for family, rows in record["solvers"].items()]
    tables += [jit_table([row for row in record["under jit"] if row]), overhead_table(record)]
    record |= report.facts(options, "torch", "torchdeq", "jax", "jaxopt", "optimistix", "scipy")
    report.publish(console, options.output, "solvers", tables, record, picture)
    return 0


def solver_table(family: str, rows: list[dict[str, Any]]) -> report.Table:
    """Evaluations and relative times of one solver in all libraries."""
    libraries = [name for name in rows[0]["evaluations"] if name != "ours, jit"]
    others = libraries[1:]

    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    body = [
        (
            row["equation"],
            *(cell(row["evaluations"][name], "d") for name in libraries),
            *(cell(row["over ours"].get(name), ".2f") for name in others),
        )
        for row in rows
    ]
    means = [geometric_mean(r["over ours"][name] for r in rows if name in r["over ours"]) for name in others]
    body.append(("geometric mean", *("" for _ in libraries), *(f"{mean:.2f}" for mean in means)))
    head = ("equation", *(f"{name} F" for name in libraries), *(f"{name} time" for name in others))
    return report.Table(head, body, [f"{family}: evaluations of F, and time relative to ours"], LEGEND, wrap=True)


def jit_table(rows: list[dict[str, Any]]) -> report.Table:
    """Our fastest solver and the fastest of the other libraries."""
    body = [
        (row["equation"], row["ours"][1], f"{row['theirs'][0]}, {row['theirs'][1]}", f"{row['ratio']:.2f}")
        for row in rows
    ]
    body.append(("geometric mean", "", "", f"{geometric_mean(row['ratio'] for row in rows):.2f}"))
    head = ("equation", "our fastest", "their fastest", "theirs / ours")
    return report.Table(head, body, ["Under jit: our fastest solver and the fastest of the other libraries"], "")


def overhead_table(record: dict[str, Any]) -> report.Table:
    """Overhead of the steps over F."""
    body = []
    for row in record["overhead"]:
        budget = BUDGETS.get((row["solver"], row["size"]))
        body.append(
            (
                f"{row['size']} {row['solver']}",
                f"{row['overhead']['ours']:.2f}",
                "" if budget is None else f"{budget:g}",
                f"{row['overhead']['TorchDEQ']:.2f}",
                f"{row['operations']['ours']:.0f}",
                f"{row['operations']['TorchDEQ']:.0f}",
            )
        )
    head = ("layer, solver", "ours / F", "budget", "TorchDEQ / F", "ours ops", "TorchDEQ ops")
    return report.Table(head, body, ["Overhead of a step, in PyTorch"], OVERHEAD_LEGEND)


def picture(record: dict[str, Any]) -> Any:
    """Times relative to ours, one point for each equation."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullLocator

    families = record["solvers"]
    figure, axes = plt.subplots(1, len(families), figsize=(3.2 * len(families), 3.6), sharey=True, squeeze=False)
    names = [row["equation"] for row in next(iter(families.values()))]
    for axis, (family, rows) in zip(axes[0], families.items(), strict=True):
        for mark, name in zip("osD^", OVER, strict=True):
            points = [(r["over ours"][name], i) for i, r in enumerate(rows) if name in r["over ours"]]
            if points:
                axis.plot(*zip(*points, strict=True), mark, label=name, alpha=0.8)
        axis.axvline(1.0, color="0.6", linewidth=1)
        axis.set(xscale="log", title=family, xlabel="time / ours")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_locator(NullLocator())
        axis.legend(fontsize=7)
    axes[0][0].set_yticks(range(len(names)), names)
    axes[0][0].invert_yaxis()
    figure.tight_layout()
    return figure
