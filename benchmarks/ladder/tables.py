"""Tables, picture and summary of the finished runs of a task."""

import json
from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any, TypeAlias

import numpy as np
from rich.console import Console

from .. import report
from ..memory import MB
from .tasks import Settings, Task

Array: TypeAlias = np.ndarray[Any, Any]
Result: TypeAlias = dict[str, Any]

LEGEND = """\
exact    examples of the test that are right in every cell, averaged weights, in
         percent; more: after more steps of supervision than in training; a
         number: the same on examples of this length
- full   difference from full in points, of the same seeds, and its standard
         error; = where it is at most one point and one standard error
cos      cosine with the gradient through all recursions, and
len      norm divided by the norm of that: means over seeds, then the median over
         checkpoints
F, VJP   evaluations of the network, and pullbacks through it, of one step
MB       tensors that one step keeps for its backward pass, without parameters
s        processor time of the training, one thread
n        finished runs; in brackets: of which diverged, which count as 0"""


def publish(console: Console, task: Task, folder: Path, quick: bool) -> int:
    """Print the tables of the finished runs, and save them with a picture and a summary; returns the exit code."""
    results = read(task, folder)
    if not any(run["checkpoints"] for runs in results.values() for run in runs):
        console.print(f"no run of {task.name} has anything to show in {folder}", highlight=False)
        return 1
    settings = task.quick if quick else task.settings
    record = summary(settings, results)
    last = next(iter(results.values()))[-1]
    record |= {name: last[name] for name in ("settings", "versions", "machine")}
    tables = [overview(task, record), progress(record)]
    if "full" in record["rungs"]:
        tables += [
            estimates(record, "cosine", "Cosine with"),
            estimates(record, "length", "Length, divided by that of"),
        ]
    report.publish(console, folder, task.name, tables, record, picture)
    return 0


def read(task: Task, folder: Path) -> dict[str, list[Result]]:
    """The results of a task, by rung."""
    found = {
        name: [json.loads(path.read_text()) for path in sorted(folder.glob(f"{task.name}-{name}-[0-9]*.json"))]
        for name in (*task.main, *task.rest)
    }
    return {name: results for name, results in found.items() if results}


def summary(settings: Settings, results: dict[str, list[Result]]) -> dict[str, Any]:
    """Means and standard errors over seeds, by rung."""
    measured = [run for runs in results.values() for run in runs if run["checkpoints"]]
    names = list(measured[0]["checkpoints"][0]["tests"]) if measured else []
    marks = settings.marks()
    rows: dict[str, Any] = {}
    full = {r["seed"]: r for r in results.get("full", ())}
    for rung, runs in results.items():
        # A diverged run has nothing to show from then on.
        curve = {
            f"{test} {key}": [
                statistics([_at(run, i, ("tests", test, key), 0.0) for run in runs]) for i in range(len(marks))
            ]
            for test in names
            for key in ("exact", "exact_more", "cells", "relative")
        }
        along = {
            key: [statistics([_at(run, i, ("gradients", rung, key)) for run in runs]) for i in range(len(marks))]
            for key in ("cosine", "length", "relative")
        }
        times = {
            key: [statistics([_at(run, i, (key,)) for run in runs]) for i in range(len(marks))]
            for key in ("seconds", "processor_seconds", "loss")
        }
        of_first = runs[0]["checkpoints"][0]["gradients"][rung] if runs[0]["checkpoints"] else {}
        vjps = [c["gradients"][rung]["vjps"] for run in runs for c in run["checkpoints"]]
        grew = [c["gradients"][rung]["grew"] for run in runs for c in run["checkpoints"]]
        rows[rung] = {
            "runs": len(runs),
            "diverged": sum(run["diverged"] is not None for run in runs),
            "curves": curve,
            "gradient": along,
            "times": times,
            "evaluations": of_first.get("evaluations"),
            "vjps": float(np.mean(vjps)) if vjps else None,
            "saved": of_first.get("saved"),
            "grew": float(np.mean(grew)) if grew else None,
            "minus_full": {test: _paired(runs, full, len(marks) - 1, ("tests", test, "exact")) for test in names},
        }
    compared = [run for run in full.values() if run["checkpoints"]]
    estimates = {
        rung: {
            key: [statistics([_at(run, i, ("gradients", rung, key)) for run in compared]) for i in range(len(marks))]
            for key in ("cosine", "length")
        }
        for rung in (compared[0]["checkpoints"][0]["gradients"] if compared else ())
    }
    return {"steps": marks, "tests": names, "rungs": rows, "along_full": estimates}


def statistics(numbers: Sequence[float | None]) -> tuple[float, float] | None:
    """The mean and its standard error; None for no number."""
    given = [x for x in numbers if x is not None]
    if not given:
        return None
    error = float(np.std(given, ddof=1) / len(given) ** 0.5) if len(given) > 1 else float("nan")
    return float(np.mean(given)), error


def _at(run: Result, index: int, keys: tuple[str, ...], missing: float | None = None) -> float | None:
    """A number of a checkpoint, or ``missing`` for a run that had diverged before."""
    if index >= len(run["checkpoints"]):
        return missing
    found: Any = run["checkpoints"][index]
    for key in keys:
        found = found[key]
    return found  # type: ignore[no-any-return]  # a number


def _paired(
    runs: Sequence[Result], full: dict[int, Result], index: int, keys: tuple[str, ...]
) -> tuple[float, float] | None:
    """The mean difference from ``full`` of the same seed."""
    pairs = [
        (_at(run, index, keys, 0.0), _at(full[run["seed"]], index, keys, 0.0)) for run in runs if run["seed"] in full
    ]
    return statistics([100 * (a - b) for a, b in pairs if a is not None and b is not None])


def equal(difference: tuple[float, float] | None) -> bool:
    """Whether a difference in points is at most one point and one standard error."""
    if difference is None or not np.isfinite(difference[1]):
        return False
    return abs(difference[0]) <= min(1.0, difference[1])


def overview(task: Task, record: dict[str, Any]) -> report.Table:
    """A row for each rung."""
    tests = record["tests"]
    several = len(tests) > 1
    head = ["estimator", "n", "exact", *(tests[1:] if several else ["more"])]
    head += ["- full", "cos", "len", "F", "VJP", "MB", "s"]
    rows = []
    for name, row in record["rungs"].items():
        curves, gradient = row["curves"], row["gradient"]
        difference = row["minus_full"][tests[0]]
        cells = [name, f"{row['runs']}" + f"({row['diverged']})" * bool(row["diverged"])]
        cells += [_percent(curves[f"{tests[0]} exact"][-1])]
        others = [f"{test} exact" for test in tests[1:]] if several else [f"{tests[0]} exact_more"]
        cells += [_percent(curves[other][-1], False) for other in others]
        cells += [_difference(difference) if name != "full" else ""]
        cells += [_median(gradient["cosine"], ".2f"), _median(gradient["length"], ".2g")]
        cells += [f"{row['evaluations']}", f"{row['vjps']:.0f}" if row["vjps"] else "-"]
        cells += [f"{row['saved'] / MB:.1f}" if row["saved"] else "-"]
        last = row["times"]["processor_seconds"][-1]
        rows.append([*cells, f"{last[0]:.0f}" if last else "-"])
    settings = record["settings"]
    title = [
        f"{task.name}: {settings['steps']} steps of {settings['batch']} examples, each for {settings['supervisions']};",
        f"T = {settings['recursions']} recursions of {settings['latent']} + 1 evaluations, width {settings['width']}",
    ]
    return report.Table(head, rows, title, LEGEND)


def progress(record: dict[str, Any]) -> report.Table:
    """Accuracy at each checkpoint."""
    test = record["tests"][0]
    rows = [
        [name, *(_percent(x, False) for x in row["curves"][f"{test} exact"])] for name, row in record["rungs"].items()
    ]
    grew = [f"{name} {100 * row['grew']:.0f} %" for name, row in record["rungs"].items() if row["grew"]]
    legend = f"checkpoints at which the terms of an estimate grew: {', '.join(grew) or 'none'}"
    head = ["exact at step", *map(str, record["steps"])]
    return report.Table(head, rows, ["Examples right in every cell, percent"], "\n".join(wrap(legend, 80)))


def estimates(record: dict[str, Any], key: str, what: str) -> report.Table:
    """Cosine or length of all estimates at the points that the runs of full pass."""
    rows = [
        [name, *(f"{x[0]:.2f}" if x else "-" for x in row[key])]
        for name, row in record["along_full"].items()
        if name != "full"
    ]
    head = [f"{key} at step", *map(str, record["steps"])]
    return report.Table(head, rows, [f"{what} the gradient through all recursions, along full"], "")


def _percent(found: tuple[float, float] | None, with_error: bool = True) -> str:
    if found is None:
        return "-"
    error = f" ± {100 * found[1]:.1f}" if with_error and np.isfinite(found[1]) else ""
    return f"{100 * found[0]:.1f}{error}"


def _difference(found: tuple[float, float] | None) -> str:
    if found is None:
        return "-"
    error = f" ± {found[1]:.1f}" if np.isfinite(found[1]) else ""
    return f"{found[0]:+.1f}{error}{' =' if equal(found) else ''}"


def _median(found: Sequence[tuple[float, float] | None], how: str) -> str:
    given = [x[0] for x in found if x]
    return f"{np.median(given):{how}}" if given else "-"


def picture(record: dict[str, Any]) -> Any:
    """Accuracy against steps and against time, cosine and length along training; bands are one standard error."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(10, 7.4))
    colors = plt.get_cmap("tab10")
    test = f"{record['tests'][0]} exact"
    for i, (name, row) in enumerate(record["rungs"].items()):
        look = {"color": "k" if name == "full" else colors(i), "label": name, "lw": 2.2 if name == "full" else 1.3}
        seconds = [x[0] if x else np.nan for x in row["times"]["processor_seconds"]]
        _band(axes[0, 0], record["steps"], row["curves"][test], look, 100)
        _band(axes[0, 1], seconds, row["curves"][test], look, 100)
        if name != "full":
            _band(axes[1, 0], record["steps"], row["gradient"]["cosine"], look)
            _band(axes[1, 1], record["steps"], row["gradient"]["length"], look)
    axes[0, 0].set(xlabel="step", ylabel="exact on the test, %")
    axes[0, 1].set(xlabel="processor time of training, s", ylabel="exact on the test, %")
    axes[1, 0].set(xlabel="step", ylabel="cosine with the full gradient")
    axes[1, 1].set(xlabel="step", ylabel="length beside the full gradient", yscale="log")
    axes[0, 0].legend(fontsize=8, frameon=False)
    for axis in axes.flat:
        axis.grid(alpha=0.25)
    figure.tight_layout()
    return figure


def _band(axis: Any, x: Sequence[float], found: Sequence[Any], look: dict[str, Any], factor: float = 1.0) -> None:
    mean, error = (factor * np.array([y[i] if y else np.nan for y in found]) for i in (0, 1))
    axis.plot(x, mean, **look)
    error = np.nan_to_num(error)
    axis.fill_between(x, mean - error, mean + error, color=look["color"], alpha=0.15, lw=0)
