"""Performance profiles of root finders and fixed-point solvers, ours and those of other libraries, over four sets."""

import argparse
import hashlib
import json
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from . import dolan_more, report
from .profile_solvers import DENSE, LIBRARIES, OURS, Method, Outcome, methods
from .profile_tasks import SETS, Task, tasks

ROWS = "profile.jsonl"
"""Where the results are kept while a run goes on."""
TAUS = 1.0, 32.0
SHORT = {"roots": "roots", "systems": "systems", "pde": "implicit Euler", "cells": "cells"}
ABBREVIATED = {
    "FixedPointIteration": "plain",
    "Anderson": "Ander",
    "Broyden": "Broyd",
    "Newton": "Newt",
    "NewtonKrylov": "N-K",
    "Polyalgorithm": "poly",
}
LEGEND = f"""\
p(t)     share of the problems that were solved at no more than t times the cost
         of the solver that was cheapest there
solved   number of solved problems
n/a      problems where its matrices would have more than {DENSE} rows: failures
false    results that the solver calls solutions, and that are none"""
COSTS_LEGEND = """\
A dash: not solved. false: called solved, and not.
peers    the cheapest of the other libraries' solvers"""

EPILOG = """The cost of a solve is its evaluations of g, or of F, plus its products with the Jacobian or the transpose,
until the residual is first small enough; both are counted while it runs. With --output the results are kept after each
problem, and a run that was stopped goes on where it stopped. All of it takes about half an hour. Libraries that are not
installed are left out: the extra "test" has all of them."""

Row = dict[str, Any]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = argparse.ArgumentParser(prog="python -m benchmarks profile", description=__doc__, epilog=EPILOG)
    add = options.add_argument
    add("--quick", action="store_true", help="the usual starts alone, and at most 1000 unknowns: a few minutes")
    add("--output", type=Path, help="folder for the tables (.md), the numbers (.json) and a picture (.png)")
    add("--set", choices=SETS, action="append", help="run only this set; may be repeated")
    add("--problem", action="append", metavar="NAME", help="only problems that begin with this; may be repeated")
    add("--solver", action="append", metavar="NAME", help="only solvers whose name has this in it; may be repeated")
    add("--most", type=report.positive, help="largest number of unknowns (default: 1000000, 1000 if --quick)")
    add("--times", action="store_true", help="also time every solve that succeeds: each program is compiled twice")
    add("--restart", action="store_true", help="measure again what is saved in the folder of --output")
    add("--train", action="store_true", help="train the cells of the last set anew, save them, and stop")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    command = parser()
    options = command.parse_args(arguments)
    console = Console(width=80)
    if options.train:
        from .trained_cells import train

        train(console)
        return 0
    most = options.most or (1000 if options.quick else 1_000_000)
    chosen = {name: m for name, m in methods().items() if not options.solver or any(s in name for s in options.solver)}
    if not chosen:
        command.error(f"no solver has {', '.join(options.solver)} in its name; there are: {', '.join(methods())}")
    problems = [task for name in options.set or SETS for task in tasks(name, most=most)]
    if options.quick:
        problems = [task for task in problems if "start x" not in task.name]
    if options.problem:
        problems = [task for task in problems if task.name.startswith(tuple(options.problem))]
    if not problems:
        command.error("no problem is left")
    rows = Rows(options.output, restart=options.restart)
    with double_precision(), warnings.catch_warnings(), report.progress(console, len(problems)) as announce:
        warnings.simplefilter("ignore")
        for task in problems:
            announce(f"{task.set}: {task.name}"[:24])
            measure(task, chosen, rows, timed=options.times)
    found = [rows.of(task, chosen) for task in problems]
    groups = {name: [row for row in found if row["set"] == name] for name in SETS}
    record: Row = {"sets": {name: summary(group, list(chosen)) for name, group in groups.items() if group}}
    record |= {"rows": [finite(row) for row in found]} | report.facts(options, *LIBRARIES, "jax", "torch")
    measures = ["cost", "time"] if options.times else ["cost"]
    tables = [shares_table(name, values, what) for name, values in record["sets"].items() for what in measures]
    tables[:-1] = [replace(each, legend="") for each in tables[:-1]]
    tables += [costs_table(name, groups[name], list(chosen)) for name in record["sets"]]
    tables += [false_table(record), *absent_table(record)]
    report.publish(console, options.output, "profile", tables, record, picture)
    return 0


@contextmanager
def double_precision() -> Iterator[None]:
    """JAX with float64 in all threads: callbacks of compiled programs may run in threads of its own."""
    import jax

    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


class Rows:
    """What is measured so far, one line for each problem, in a file if there is a folder.

    Only what the same code and the same versions measured is read from it.
    """

    def __init__(self, folder: Path | None, *, restart: bool = False) -> None:
        self._path = None if folder is None else folder / ROWS
        self._codes: dict[str, str] = {}
        self._rows: dict[str, Row] = {}
        if self._path is None or not self._path.exists():
            return
        if restart:
            self._path.unlink()
            return
        for line in self._path.read_text().splitlines():
            row = json.loads(line)
            if row.pop("code") == self._code(row["set"]):
                self._rows[f"{row['set']}/{row['problem']}"] = row

    def _code(self, name: str) -> str:
        if name not in self._codes:
            self._codes[name] = code(name)
        return self._codes[name]

    def of(self, task: Task, chosen: dict[str, Method]) -> Row:
        """The row of a problem with the outcomes of the chosen solvers that were measured."""
        key = f"{task.set}/{task.name}"
        row = self._rows.get(key) or {
            "set": task.set,
            "problem": task.name,
            "unknowns": task.start.size,
            "outcomes": {},
        }
        return row | {"outcomes": {name: row["outcomes"][name] for name in chosen if name in row["outcomes"]}}

    def add(self, row: Row) -> None:
        """Keep the outcomes of a row, beside those of other solvers."""
        key = f"{row['set']}/{row['problem']}"
        outcomes = self._rows.get(key, {}).get("outcomes", {}) | row["outcomes"]
        self._rows[key] = row | {"outcomes": outcomes}
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:
                file.write(json.dumps({"code": self._code(row["set"])} | self._rows[key]) + "\n")


SOURCES = {"roots": ["root_problems.py"], "systems": ["root_problems.py"], "pde": ["stiff.py"]}
SOURCES["cells"] = ["trained_cells.py", "trained_cells.npz"]


def code(name: str) -> str:
    """A digest of the sources and versions that the numbers of a set depend on."""
    digest = hashlib.sha256(json.dumps(report.environment(*LIBRARIES, "jax")["versions"]).encode())
    here = Path(__file__).parent
    own = [here / source for source in ("profile_solvers.py", "profile_tasks.py", "tally.py", *SOURCES[name])]
    folders = ("implicit_core", "implicit_core/solvers", "implicit_core/linear_solvers", "backends", "adapters/jax")
    for path in [*own, *(path for folder in folders for path in sorted((report.ROOT / folder).glob("*.py")))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def measure(task: Task, chosen: dict[str, Method], rows: Rows, *, timed: bool) -> None:
    """Run the solvers that have no outcome yet, or no time."""
    row = rows.of(task, chosen)
    before = row["outcomes"]
    new: dict[str, Any] = {}
    for name, method in chosen.items():
        known = before.get(name, False)
        if known is None or (known and (known["seconds"] is not None or not timed or known["excess"] > 1)):
            continue
        new[name] = asdict(method.run(task, timed)) if method.applies(task) else None
    if new:
        rows.add(row | {"outcomes": new})


def finite(row: Row) -> Row:
    """A row as JSON can have it: an excess that is infinite is None."""
    outcomes = {
        name: found and found | {"excess": None if math.isinf(found["excess"]) else found["excess"]}
        for name, found in row["outcomes"].items()
    }
    return row | {"outcomes": outcomes}


def outcome(row: Row, name: str) -> Outcome | None:
    """What a solver made of a problem; None where it is not applicable."""
    found = row["outcomes"].get(name)
    if found is None:
        return None
    return Outcome(**found | {"excess": math.inf if found["excess"] is None else found["excess"]})


def cost(row: Row, name: str) -> float:
    """Evaluations plus products; infinite where it failed or is not applicable."""
    found = outcome(row, name)
    return float("inf") if found is None else found.cost


def seconds(row: Row, name: str) -> float:
    """The time of a solve; infinite where it failed or has none."""
    found = outcome(row, name)
    return float("inf") if found is None or not found.solved or found.seconds is None else found.seconds


def summary(rows: Sequence[Row], names: Sequence[str]) -> Row:
    """The profiles of the solvers on one set, by cost and by time, and what failed."""
    problems = [row["problem"] for row in rows]
    result: Row = {"problems": problems, "solvers": list(names)}
    result["not applicable"] = {name: sum(row["outcomes"].get(name) is None for row in rows) for name in names}
    result["false successes"] = {name: [r["problem"] for r in rows if is_false(r, name)] for name in names}
    for what, of in (("cost", cost), ("time", seconds)):
        ratios = dolan_more.ratios([[of(row, name) for name in names] for row in rows])
        result[what] = {
            "ratios": [[None if math.isinf(ratio) else round(ratio, 4) for ratio in line] for line in ratios.tolist()],
            "failed": {
                name: [problem for problem, ratio in zip(problems, column, strict=True) if math.isinf(ratio)]
                for name, column in zip(names, ratios.T, strict=True)
            },
            "rho": dolan_more.profile(ratios, TAUS).T.tolist(),
        }
    return result


def is_false(row: Row, name: str) -> bool:
    """Whether a solver calls its result a solution, which it is not."""
    found = outcome(row, name)
    return found is not None and found.claimed and found.excess > 1


def shares_table(name: str, found: Row, what: str) -> report.Table:
    """The shares of all solvers on one set, the largest first."""
    total, rho, failed = len(found["problems"]), found[what]["rho"], found[what]["failed"]
    order = sorted(range(len(found["solvers"])), key=lambda i: [-share for share in reversed(rho[i])])
    body = [
        (
            method,
            *(f"{share:.2f}" for share in rho[i]),
            str(total - len(failed[method])),
            str(found["not applicable"][method] or ""),
            str(len(found["false successes"][method]) or ""),
        )
        for i in order
        for method in [found["solvers"][i]]
    ]
    head = (SHORT[name], *(f"p({tau:g})" for tau in TAUS), "solved", "n/a", "false")
    unsolved = sum(all(ratio is None for ratio in line) for line in found[what]["ratios"])
    title = [f"{SETS[name]}, by {'evaluations and products' if what == 'cost' else 'time'}"]
    title += [f"{unsolved} of {total} were solved by none" if unsolved else f"each of {total} was solved by some"]
    return report.Table(head, body, title, LEGEND)


def costs_table(name: str, rows: Sequence[Row], names: Sequence[str]) -> report.Table:
    """What each problem of a set costs by our solvers, and by the cheapest of the others."""
    ours = [method for method in names if method.startswith("ours ")]
    others = [method for method in names if method not in ours]

    def text(row: Row, method: str) -> str:
        if row["outcomes"].get(method) is None:
            return "n/a"
        value = cost(row, method)
        return "false" if is_false(row, method) else "-" if math.isinf(value) else f"{value:.0f}"

    body = []
    for row in rows:
        best = min((cost(row, method) for method in others), default=math.inf)
        body.append((row["problem"][:34], *(text(row, m) for m in ours), "-" if math.isinf(best) else f"{best:.0f}"))
    head = (SHORT[name], *(ABBREVIATED[method.removeprefix("ours ")] for method in ours), "peers")
    title = [f"{SETS[name]}: evaluations and products"]
    return report.Table(head, body, title, COSTS_LEGEND)


def false_table(record: Row) -> report.Table:
    """The false successes: results that a solver calls solutions, and that do not solve the problem."""
    body = [
        (method, f"{name}: {problem}"[:48])
        for name, found in record["sets"].items()
        for method, problems in found["false successes"].items()
        for problem in problems
    ]
    return report.Table(("solver", "problem"), body or [("none", "")], ["False successes"], "")


def absent_table(record: Row) -> list[report.Table]:
    """The libraries that are not installed, and so not compared."""
    absent = [name for name in LIBRARIES if record["versions"][name] == "-"]
    return [report.Table(("not installed",), [(name,) for name in absent], [], "")] if absent else []


# The picture.

COLORS = dict(zip(OURS, ("C0", "C1", "C2", "C4", "C3", "k"), strict=True))
STYLES = {"SciPy": "-", "jaxopt": "--", "optimistix": "-.", "TorchDEQ": ":"}
DOUBLINGS = 8
"""The largest ratio in the picture, as a power of two."""


def picture(record: Row) -> Any:
    """A panel for each set: shares of solved problems against the ratio to the least cost."""
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    sets = record["sets"]
    columns = min(2, len(sets))
    lines = -(-len(sets) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(6.8 * columns, 4.2 * lines + 0.7), squeeze=False)
    for axis, name in zip(axes.flat, sets, strict=False):
        _panel(axis, sets[name])
        axis.set_title(SETS[name], fontsize=10)
    for axis in axes.flat[len(sets) :]:
        axis.set_axis_off()
    shown = {method for found in sets.values() for method in found["solvers"]}
    handles = [Line2D([], [], color=COLORS[n], lw=2, label=n) for n in COLORS if f"ours {n}" in shown]
    handles += [
        Line2D([], [], color="0.55", ls=style, lw=1, label=library)
        for library, style in STYLES.items()
        if any(method.startswith(library) for method in shown)
    ]
    figure.tight_layout(rect=(0, 0.7 / figure.get_figheight(), 0.95, 1), w_pad=2)
    figure.legend(handles=handles, loc="lower center", ncols=5, fontsize=9, frameon=False)
    return figure


def _panel(axis: Any, found: Row) -> None:
    ratios = np.array([[math.inf if ratio is None else ratio for ratio in line] for line in found["cost"]["ratios"]])
    doublings = np.linspace(0, DOUBLINGS, 801)
    shares = dolan_more.profile(ratios, 2**doublings)
    best: dict[str, int] = {}
    for i, method in enumerate(found["solvers"]):
        library, _, name = method.partition(" ")
        if library == "ours":
            axis.plot(doublings, shares[:, i], color=COLORS[name], lw=2, zorder=3)
            continue
        axis.plot(doublings, shares[:, i], color="0.55", ls=STYLES[library], lw=1, zorder=2)
        if library not in best or shares[:, i].mean() > shares[:, best[library]].mean():
            best[library] = i
    # The best solver of each library has its name at the right end, apart from the others.
    height = 1.05
    for i in sorted((i for i in best.values() if shares[-1, i] > 0), key=lambda i: -shares[-1, i]):
        height = min(shares[-1, i], height - 0.05)
        axis.annotate(
            found["solvers"][i],
            (DOUBLINGS, shares[-1, i]),
            (DOUBLINGS + 0.25, height),
            fontsize=7,
            color="0.3",
            va="center",
            arrowprops={"arrowstyle": "-", "color": "0.7", "lw": 0.6},
            annotation_clip=False,
        )
    axis.set(xlabel="log2 of the cost over the least cost", ylabel="share of the problems")
    axis.set(xlim=(0, DOUBLINGS), ylim=(0, 1.02))
