"""A tiny model to divide among processes."""
from typing import Any

import torch
import torch.nn as nn
from loop_tools import make_batches, make_run

from cpool_vision.engine.checkpoints.saver import TrainState
from cpool_vision.engine.distributed import sharding
from cpool_vision.engine.settings.train import EmaSettings


class TinyBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 12)
        self.norm = nn.BatchNorm1d(12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.norm(self.linear(x)).relu()


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Sequential(TinyBlock(), TinyBlock()), nn.Dropout(0.2), nn.Linear(12, 3))


def prepare(fsdp: bool, batches: int = 7, **flags: Any) -> tuple[Any, TrainState]:
    """A run of `tiny` with an average, and what is saved of it."""
    run: Any = make_run(make_batches(batches), 3, model=tiny(), **flags)
    average = EmaSettings(model_ema=True, model_ema_decay=0.9)
    if fsdp:
        sharding.shard_task(run.task, average, torch.device('cpu'))
    else:
        run.task.setup_ema(decay=0.9)
    run.optimizer = torch.optim.AdamW(run.task.get_trainable_module().parameters(), lr=0.1)
    return run, TrainState(run.task, run.optimizer, run.loss_scaler, None, {'model': 'tiny'})
