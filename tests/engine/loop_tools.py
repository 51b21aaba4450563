"""Epochs of a tiny model over batches that are given as a list."""
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn as nn
from timm.task import ClassificationTask

from cpool_vision.engine.device import Precision, Runtime
from cpool_vision.engine.settings.train import TrainSettings
from cpool_vision.engine.train.run import Run


class CountingTask(ClassificationTask):
    """Counts the micro-steps whose gradients are not exchanged."""

    silent = 0

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        self.silent += 1
        yield


class Recorder(torch.optim.SGD):
    """Keeps the gradient of each step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[torch.Tensor] = []

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.seen.append(torch.cat([p.grad.flatten() for group in self.param_groups for p in group['params']]))
        super().step(closure)


def make_run(batches: list[Any], accum: int, lr: float = 0.1, model: nn.Module | None = None,
             amp_dtype: torch.dtype | None = None, rank: int = 1, world_size: int = 1, **flags: Any) -> Run:
    """A run over batches on the CPU, by default of a process that reports nothing."""
    settings = TrainSettings(grad_accum_steps=accum, **{'log_interval': 1000, 'seed': 0, **flags})
    torch.manual_seed(0)
    if model is None:
        model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    task = CountingTask(model, criterion=nn.CrossEntropyLoss(), verbose=False)
    runtime = Runtime(torch.device('cpu'), Precision(None, amp_dtype, 'cpu'), rank, world_size)
    return Run(settings, runtime, task, Recorder(model.parameters(), lr=lr), batches)


def make_batches(count: int, size: int = 4) -> list[Any]:
    """Random images (size, 3, 2, 2) of 3 classes."""
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(size, 3, 2, 2, generator=generator), torch.randint(0, 3, (size,), generator=generator))
            for _ in range(count)]
