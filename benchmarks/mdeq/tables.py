"""What the tables of trainings share: reading results, and numbers as text."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..runs import ResultError

Result = dict[str, Any]


def read(path: Path) -> Result:
    """The result of a run."""
    result: Result = json.loads(path.read_text())
    return result


def require_same_images(results: Sequence[Result]) -> None:
    """Raise :class:`ResultError` if results that are compared had other images, as far as they tell."""
    for result in results:
        first, other = results[0]["images"], result["images"]
        names = ("train", "test", "pixels", *(("source",) if result["data"] == "cifar10" else ()))
        if any(first[name] != other[name] for name in names):
            raise ResultError(
                f"{result['row']} of seed {result['seed']} was trained on other images ({other}) than "
                f"{results[0]['row']} of seed {results[0]['seed']} ({first}): choose another --results"
            )


def accuracies(result: Result) -> list[float]:
    """The accuracy in the test after each epoch, in percent; in a run that diverged that of a guess, 10."""
    if result["diverged"] is not None:
        return [10.0]
    return [100 * epoch["test/accuracy"] for epoch in result["epochs"]]


def last(results: Sequence[Result]) -> list[float]:
    """The accuracy of the last epoch of each run."""
    return [accuracies(result)[-1] for result in results]


def best(results: Sequence[Result]) -> list[float]:
    """The accuracy of the best epoch of each run, chosen on the test as in the published code."""
    return [max(accuracies(result)) for result in results]


def seconds(results: Sequence[Result]) -> float:
    """Mean time of the training steps of a run, of the processor; on other devices on the clock.

    Runs that diverged did not make all of their steps, and are left out; NaN if all did.
    """

    def of(result: Result) -> float:
        clock = "processor_seconds" if result["device"] == "cpu" else "seconds"
        return sum(epoch[clock] for epoch in result["epochs"])

    times = [of(result) for result in results if result["diverged"] is None]
    return float(np.mean(times)) if times else float("nan")


def count(results: Sequence[Result]) -> str:
    """How many runs there are and, in brackets, how many of them diverged."""
    diverged = sum(result["diverged"] is not None for result in results)
    return f"{len(results)}" + f" ({diverged})" * bool(diverged)


def median(values: Sequence[float | None]) -> float:
    """The median; NaN without numbers, and where a number was not finite."""
    return float(np.median(numbers(values))) if values else float("nan")


def numbers(values: Sequence[float | None]) -> list[float]:
    """Numbers of a record, which has None where they were not finite; here they are NaN."""
    return [np.nan if value is None else value for value in values]


def spread(values: Sequence[float]) -> str:
    """Mean, and the standard deviation over the runs."""
    deviation = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{deviation}"


def difference(results: Sequence[Result], others: Sequence[Result]) -> tuple[float, float] | None:
    """Mean of the differences of the last accuracy between runs of equal seeds, and its standard error."""
    theirs = {result["seed"]: accuracies(result)[-1] for result in others}
    found = [accuracies(result)[-1] - theirs[result["seed"]] for result in results if result["seed"] in theirs]
    if len(found) < 2:
        return None
    return float(np.mean(found)), float(np.std(found, ddof=1) / np.sqrt(len(found)))


def compared(results: Sequence[Result], others: Sequence[Result]) -> list[str]:
    """Cells of a row: runs, accuracy of the last epoch, of the best one, and the difference from another row."""
    minus = "" if results is others else signed(difference(results, others))
    return [count(results), spread(last(results)), f"{spread(best(results))} ({max(best(results)):.1f})", minus]


def signed(found: tuple[float, float] | None) -> str:
    """A difference and its standard error."""
    return "-" if found is None else f"{found[0]:+.1f} ± {found[1]:.1f}"


def about(results: Sequence[Result]) -> list[str]:
    """What was trained, in lines."""
    one = results[0]
    s = one["settings"]
    source = f" ({one['images']['source']})" if one["data"] == "cifar10" else ""
    images = f"{one['images']['train']} images of {one['images']['pixels']} x {one['images']['pixels']} pixels"
    return [
        f"{one['data']}{source}: {images}, {one['images']['test']} to test on",
        f"{s['model']} model, {one['parameters']:,} parameters; {s['epochs']} epochs of batches of {s['batch']}",
    ]
