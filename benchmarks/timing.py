"""Paired times: on a shared machine only what ran side by side can be compared."""

import gc
import math
import time
from collections.abc import Callable, Iterable, Mapping
from statistics import median
from typing import Any


def seconds(run: Callable[[], Any]) -> float:
    """For one call."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def interleaved(
    runs: Mapping[str, Callable[[], Any]],
    repetitions: int,
    announce: Callable[[str], None] = lambda _: None,
    limit: float = 60.0,
) -> dict[str, list[float]]:
    """Seconds of every run in every repetition; in each, all of them run, one after the other.

    Each runs twice, and the second time counts: what ran before has left its threads awake and its memory in the cache.
    There are fewer, two at least, where they would take longer than ``limit`` seconds.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    once = sum(seconds(run) for run in runs.values())
    gc.collect()
    for _ in range(min(repetitions, max(2, int(limit / max(2 * once, 1e-9))))):
        for name, run in runs.items():
            announce(name)
            run()
            times[name].append(seconds(run))
    return times


def ratio(times: Mapping[str, list[float]], name: str, to: str) -> float:
    """The median, over the repetitions, of the time of one run over that of another."""
    return median(a / b for a, b in zip(times[name], times[to], strict=True))


def geometric_mean(values: Iterable[float]) -> float:
    """Of positive numbers; NaN of none."""
    logarithms = [math.log(value) for value in values]
    return math.exp(sum(logarithms) / len(logarithms)) if logarithms else math.nan
