"""Training steps of a study's arms, timed in one process so that ratios mean something."""
import statistics
import time
from typing import Any

from ..train_step import make_step
from .spec import Study


def step_ratios(study: Study, batch: int, repeats: int) -> dict[str, float]:
    """Median over rounds of the time of every arm's step over that of its base in the same round (fp32).

    Fresh models are timed: pools reach half of their largest support.
    """
    num_classes: Any = study.settings.get('num_classes') or 1000
    steps = {name: make_step(arm.model, batch, num_classes, **arm.model_kwargs) for name, arm in study.arms.items()}
    rounds: list[dict[str, float]] = []
    for _ in range(repeats + 1):
        times = {}
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name] = time.perf_counter() - start
        rounds.append(times)
    return {
        name: statistics.median(times[name] / times[arm.base or name] for times in rounds[1:])
        for name, arm in study.arms.items()
    }
