"""Paired times: on a shared machine, only times measured in the same round can be compared."""

import gc
import math
import time
from collections.abc import Callable, Iterable, Mapping
from statistics import median
from typing import Any

Clock = Callable[[], float]


def seconds(run: Callable[[], Any], clock: Clock = time.perf_counter) -> float:
    """Seconds that one call takes."""
    begin = clock()
    run()
    return clock() - begin


def interleaved(
    runs: Mapping[str, Callable[[], Any]],
    repetitions: int,
    announce: Callable[[str], None] = lambda _: None,
    limit: float = 60.0,
    clock: Clock = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every run in every repetition; a repetition calls all runs in turn.

    Each run is called twice in a row and the second call is timed, since the first one warms up threads and caches.
    If all repetitions would take longer than ``limit`` seconds, there are fewer, but at least two. Other processes
    disturb ``time.process_time`` less than the default clock.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    once = sum(seconds(run, clock) for run in runs.values())
    gc.collect()
    for _ in range(min(repetitions, max(2, int(limit / max(2 * once, 1e-9))))):
        for name, run in runs.items():
            announce(name)
            run()
            times[name].append(seconds(run, clock))
    return times


def ratio(times: Mapping[str, list[float]], name: str, to: str) -> float:
    """The median over the repetitions of time(``name``) / time(``to``)."""
    return median(a / b for a, b in zip(times[name], times[to], strict=True))


def geometric_mean(values: Iterable[float]) -> float:
    """The geometric mean of positive numbers; NaN if there are no numbers."""
    logarithms = [math.log(value) for value in values]
    return math.exp(sum(logarithms) / len(logarithms)) if logarithms else math.nan
