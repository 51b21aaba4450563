"""Models divided among processes that are forked from the test, so that nothing is imported anew."""
import argparse
import multiprocessing
import os
import pathlib
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from loop_tools import make_batches, make_run

from cpool_vision.engine.checkpoints.saver import TrainState
from cpool_vision.engine.distributed import sharding


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
    args = argparse.Namespace(model_ema=True, model_ema_decay=0.9, model_ema_warmup=False)
    if fsdp:
        sharding.shard_task(run.task, args, torch.device('cpu'))
    else:
        run.task.setup_ema(decay=0.9)
    run.optimizer = torch.optim.AdamW(run.task.get_trainable_module().parameters(), lr=0.1)
    return run, TrainState(run.task, run.optimizer, run.loss_scaler, None, {'model': 'tiny'})


def _child(work: Callable[[int], Any], rank: int, count: int, place: str, group: bool, answers: Any) -> None:
    torch.set_num_threads(1)  # renews a pool of torch that a fork spoils, which two threads at once would lose
    try:
        os.environ.update({'RANK': str(rank), 'LOCAL_RANK': str(rank), 'WORLD_SIZE': str(count)})
        if group:
            dist.init_process_group('gloo', store=dist.FileStore(place, count), rank=rank, world_size=count)
        answers.put((rank, work(rank), ''))
        if dist.is_initialized():
            dist.destroy_process_group()
    except BaseException:
        answers.put((rank, None, traceback.format_exc()))
    answers.close()
    answers.join_thread()
    os._exit(0)


def in_processes(count: int, folder: pathlib.Path, work: Callable[[int], Any], group: bool = True) -> list[Any]:
    """Calls a function with the rank in so many processes, of a gloo group, and returns the plain values it gives.

    Args:
        count: how many.
        folder: for the file by which they meet.
        work: the function.
        group: whether they meet at once; otherwise the function has to do that, as `train` does.
    """
    context = multiprocessing.get_context('fork')
    answers = context.Queue()
    place = str(folder / f'store-{len(list(folder.glob("store-*")))}')
    pathlib.Path(place).touch()
    children = [context.Process(target=_child, args=(work, rank, count, place, group, answers))
                for rank in range(count)]
    for child in children:
        child.start()
    results: dict[int, Any] = {}
    try:
        while len(results) < count:
            rank, value, error = answers.get(timeout=120)
            assert not error, error
            results[rank] = value
    finally:
        for child in children:
            child.join(0 if len(results) < count else 60)
            child.kill()
    return [results[rank] for rank in range(count)]
