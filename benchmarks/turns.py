"""Steps timed in turn within one process, so that ratios mean something: other load comes and goes."""
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any


def take_turns(
        steps: Mapping[str, Callable[[], Any]], repeats: int, warm_up: int = 1,
        clock: Callable[[], float] = time.perf_counter) -> list[dict[str, float]]:
    """Seconds of every step in each of `repeats` rounds, after `warm_up` rounds that do not count."""
    rounds = []
    for _ in range(warm_up + repeats):
        times = {}
        for name, step in steps.items():
            start = clock()
            step()
            times[name] = clock() - start
        rounds.append(times)
    return rounds[warm_up:]


def median_ratio(rounds: list[dict[str, float]], name: str, base: str) -> float:
    """Median over rounds of the time of a step over that of another in the same round."""
    return statistics.median(times[name] / times[base] for times in rounds)
