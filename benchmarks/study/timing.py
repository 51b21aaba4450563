"""Training steps of a study's arms."""
from typing import Any

from ..train_step import make_step
from ..turns import median_ratio, take_turns
from .spec import Study


def step_ratios(study: Study, batch: int, repeats: int) -> dict[str, float]:
    """Median over rounds of the time of every arm's step over that of its base in the same round (fp32).

    Fresh models are timed: pools reach half of their largest support.
    """
    num_classes: Any = study.settings.get('num_classes') or 1000
    steps = {name: make_step(arm.model, batch, num_classes, **arm.model_kwargs) for name, arm in study.arms.items()}
    rounds = take_turns(steps, repeats)
    return {name: median_ratio(rounds, name, arm.base or name) for name, arm in study.arms.items()}
