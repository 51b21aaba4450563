"""Training steps of a study's arms, timed in one process so that ratios mean something."""
import statistics
import time
from collections.abc import Callable
from typing import Any

import timm
import torch
import torch.nn.functional as F

from .spec import Arm, Study


def _make_step(arm: Arm, batch: int, num_classes: int) -> Callable[[], None]:
    torch.manual_seed(0)
    model = timm.create_model(arm.model, num_classes=num_classes, **arm.model_kwargs).train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=.9)
    images = torch.randn(batch, *model.pretrained_cfg['input_size'])
    targets = torch.randint(num_classes, (batch,))

    def step() -> None:
        F.cross_entropy(model(images), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


def step_ratios(study: Study, batch: int, repeats: int) -> dict[str, float]:
    """Median over rounds of the time of every arm's step over that of its base in the same round (fp32).

    Fresh models are timed: pools reach half of their largest support.
    """
    num_classes: Any = study.settings.get('num_classes') or 1000
    steps = {name: _make_step(arm, batch, num_classes) for name, arm in study.arms.items()}
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
