"""Performance profiles of root finders and fixed-point solvers, ours and those of other libraries, over four sets."""

import argparse
import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from . import dolan_more, report
from .profile_solvers import DENSE, LIBRARIES, Method, Outcome, methods
from .profile_tasks import SETS, Task, tasks

ROWS = "profile.jsonl"
"""Where the results are kept while a run goes on."""
TAUS = 1.0, 32.0
LEGEND = f"""\
solved   share of the problems that were solved
p(t)     share solved at no more than t times the cost of the cheapest solver
n/a      problems where its matrices would have more than {DENSE} rows: failures
false    results that the solver calls solutions, and that are none
cost     evaluations plus products with the Jacobian or its transpose"""

Row = dict[str, Any]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = report.parser("profile", __doc__, timed=False)
    add = options.add_argument
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
    import jax

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
    with jax.enable_x64(True), warnings.catch_warnings(), report.progress(console, len(problems)) as announce:
        warnings.simplefilter("ignore")
        for task in problems:
            announce(f"{task.set}: {task.name}"[:24])
            measure(task, chosen, rows, timed=options.times)
    found = [rows.of(task, chosen) for task in problems]
    record = {"limits": {"dense": DENSE}, "sets": {name: summary([r for r in found if r["set"] == name]) for name in SETS}}
    record["sets"] = {name: value for name, value in record["sets"].items() if value["problems"]}
    record["rows"] = found
    record |= report.facts(options, *LIBRARIES, "jax", "torch")
    record["settings"] = {name: value for name, value in record["settings"].items() if name != "output"}
    tables = [table(name, record["sets"][name], over) for name in record["sets"] for over in costs_of(record, name)]
    tables += [false_table(record), *absent_table(record)]
    report.publish(console, options.output, "profile", tables, record, picture)
    return 0


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
        """The row of a problem, with no outcomes unless it was measured; only those of the chosen solvers."""
        key = f"{task.set}/{task.name}"
        row = self._rows.get(key) or {"set": task.set, "problem": task.name, "unknowns": task.start.size, "outcomes": {}}
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


def outcome(row: Row, name: str) -> Outcome | None:
    """What a solver made of a problem; None where it is not applicable."""
    found = row["outcomes"].get(name)
    return None if found is None else Outcome(**found)


def cost(row: Row, name: str) -> float:
    """Evaluations plus products; infinite where it failed or is not applicable."""
    found = outcome(row, name)
    return float("inf") if found is None else found.cost


def seconds(row: Row, name: str) -> float:
    """The time of a solve; infinite where it failed or has none."""
    found = outcome(row, name)
    return float("inf") if found is None or not found.solved or found.seconds is None else found.seconds


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """The ratios of all solvers on one set, by cost and by time."""
    names = list(dict.fromkeys(name for row in rows for name in row["outcomes"]))
    result: dict[str, Any] = {"problems": [row["problem"] for row in rows], "solvers": names}
    result["not applicable"] = {name: sum(row["outcomes"].get(name) is None for row in rows) for name in names}
    result["false successes"] = {name: [r["problem"] for r in rows if is_false(r, name)] for name in names}
    for what, of in (("cost", cost), ("time", seconds)):
        values = np.array([[of(row, name) for name in names] for row in rows]).reshape(len(rows), len(names))
        found = dolan_more.ratios(values)
        result[what] = {
            "ratios": [[None if r == float("inf") else round(float(r), 4) for r in line] for line in found],
            "failed": {
                name: [row["problem"] for row, line in zip(rows, found, strict=True) if line[i] == float("inf")]
                for i, name in enumerate(names)
            },
            "rho": dolan_more.profile(found, TAUS).T.tolist(),
        }
    return result


def is_false(row: Row, name: str) -> bool:
    """Whether a solver calls its result a solution, which it is not."""
    found = outcome(row, name)
    return found is not None and found.claimed and found.excess > 1


def costs_of(record: Row, name: str) -> list[str]:
    """What a set was compared by."""
    timed = any(seconds(row, method) < float("inf") for row in record["rows"] for method in row["outcomes"])
    del name
    return ["cost", "time"] if timed and record["settings"]["times"] else ["cost"]


def table(name: str, found: dict[str, Any], over: str) -> report.Table:
    """The solvers of one set, those that solve most at the least cost first."""
    total = len(found["problems"])
    order = sorted(range(len(found["solvers"])), key=lambda i: tuple(-r for r in reversed(found[over]["rho"][i])))
    body = []
    for i in order:
        method = found["solvers"][i]
        failed = len(found[over]["failed"][method])
        body.append(
            (
                method,
                f"{(total - failed) / total:.2f}",
                *(f"{share:.2f}" for share in found[over]["rho"][i]),
                str(found["not applicable"][method] or ""),
                str(len(found["false successes"][method]) or ""),
            )
        )
    head = ("solver", "solved", *(f"p({tau:g})" for tau in TAUS), "n/a", "false")
    what = "evaluations and products" if over == "cost" else "time"
    return report.Table(head, body, [f"{SETS[name]}: by {what}"], LEGEND if over == "cost" else "")


def false_table(record: Row) -> report.Table:
    """Every result that a solver calls a solution, and that is none."""
    body = [
        (name, f"{key}: {problem}"[:50])
        for key, found in record["sets"].items()
        for name, problems in found["false successes"].items()
        for problem in problems
    ]
    return report.Table(("solver", "problem"), body or [("none", "")], ["False successes"], "")


def absent_table(record: Row) -> list[report.Table]:
    """The libraries that are not installed."""
    absent = [name for name in LIBRARIES if record["versions"][name] == "-"]
    return [report.Table(("not installed",), [(name,) for name in absent], [], "")] if absent else []


def picture(record: Row) -> Any:
    """A panel for each set: the share of solved problems as a function of the ratio of costs."""
    import matplotlib.pyplot as plt

    sets = record["sets"]
    columns = min(2, len(sets))
    lines = -(-len(sets) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(6.4 * columns, 4.4 * lines), squeeze=False)
    for axis, (name, found) in zip(axes.flat, sets.items(), strict=False):
        _panel(axis, found)
        axis.set_title(SETS[name], fontsize=10)
    for axis in axes.flat[len(sets) :]:
        axis.set_axis_off()
    figure.tight_layout()
    return figure


def _panel(axis: Any, found: dict[str, Any]) -> None:
    ratios = np.array([[np.inf if r is None else r for r in line] for line in found["cost"]["ratios"]])
    taus = 2 ** np.linspace(0, 8, 400)
    shares = dolan_more.profile(ratios, taus)
    for i, name in enumerate(found["solvers"]):
        axis.plot(np.log2(taus), shares[:, i], label=name)
    axis.set(xlabel="log2 of the ratio to the least cost", ylabel="share of problems", xlim=(0, 8), ylim=(0, 1.02))


_ = Callable
