"""What two processes must decide alike, over gloo."""
import pathlib
import signal
import types
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from process_tools import in_processes
from torch.distributed.rendezvous import rendezvous

from cpool_vision.engine.checkpoints.position import Position
from cpool_vision.engine.checkpoints.resume import Team, check_agreement
from cpool_vision.engine.checkpoints.seal import save_sealed
from cpool_vision.engine.device import Precision, Runtime
from cpool_vision.engine.distributed.rendezvous import rendezvous_url
from cpool_vision.engine.distributed.vote import Verdict, Vote, agree_on_failure
from cpool_vision.engine.settings.train import TrainSettings
from cpool_vision.engine.tracking.meter import LossMeter
from cpool_vision.engine.train.checkpointer import Checkpointer, gather_process_state, load_process_state
from cpool_vision.errors import CheckpointError, OutputError


def decide(folder: str, rank: int) -> None:
    """What each of two processes asks of the other, and what it must learn."""
    cpu = torch.device('cpu')
    good, bad = torch.tensor(1.), torch.tensor(float('nan'))
    vote = Vote(cpu, True)
    assert vote.take(good, [good]) == Verdict(True, True, 0)
    assert vote.take(bad if rank else good, [good]) == Verdict(False, True, 0)
    assert vote.take(good, [good if rank else bad]) == Verdict(True, False, 0)
    vote.signals.number = signal.SIGTERM if rank else signal.SIGINT
    assert vote.take(good, [good]) == Verdict(True, True, signal.SIGTERM)
    vote.signals.number = 0 if rank else signal.SIGINT
    assert vote.take() == Verdict(True, True, signal.SIGINT)

    assert agree_on_failure(bool(rank), cpu, True) and not agree_on_failure(False, cpu, True)

    team = Team(2, cpu)
    save_sealed(f'{folder}/{rank}', {'rank': rank}, rank)
    dist.barrier()
    check_agreement('', team)
    check_agreement(f'{folder}/1', team)
    for path in (f'{folder}/{rank}', f'{folder}/1' if rank else ''):
        with pytest.raises(CheckpointError, match='--output must be a folder that all of them share'):
            check_agreement(path, team)

    norm, average = torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2)
    norm.running_mean.fill_(rank)
    average.running_var.fill_(rank + 2)
    meter = LossMeter(cpu)
    meter.sums.fill_(rank + 5)
    task = types.SimpleNamespace(get_trainable_module=lambda ema=False: average if ema else norm)
    run: Any = types.SimpleNamespace(
        settings=TrainSettings(), runtime=Runtime(cpu, Precision(None, None, 'cpu'), rank, 2), task=task, meter=meter,
        loader=[1, 2], position=Position(1, 1), data=None)
    rows = gather_process_state(run)
    assert rows.tolist() == [[5, 5, 5, 5, 0, 0, 1, 1, 0, 0, 2, 2], [6, 6, 6, 6, 1, 1, 1, 1, 0, 0, 3, 3]]
    for value in (norm.running_mean, average.running_var, meter.sums):
        value.zero_()
    load_process_state(run, rows, 'x')
    assert norm.running_mean.tolist() == [rank] * 2 and average.running_var.tolist() == [rank + 2] * 2
    assert meter.sums.tolist() == [rank + 5] * 4

    class Full:
        def save_recovery(self, state: Any, position: Any) -> None:
            raise OutputError('No space left on device')

    states: Any = types.SimpleNamespace(gather=lambda keep: None)
    keeper = Checkpointer(run, states, None if rank else Full(), 1)  # type: ignore[arg-type]
    with pytest.raises(OutputError, match='the first process cannot write' if rank else 'No space left'):
        keeper.after_update(1, False, Verdict(True, True, 0))


def test_each_attempt_of_torchrun_has_its_own_part_of_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rendezvous_url() == 'env://'
    monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', '0')
    assert rendezvous_url() == 'env://'
    for name, value in {'TORCHELASTIC_RESTART_COUNT': '2', 'RANK': '0', 'WORLD_SIZE': '1', 'MASTER_ADDR': 'localhost',
                        'MASTER_PORT': '0'}.items():
        monkeypatch.setenv(name, value)
    assert rendezvous_url() == rendezvous_url() == 'attempt://'
    store, rank, world_size = next(rendezvous(rendezvous_url()))
    assert (rank, world_size) == (0, 1)
    store.set('key', 'value')
    assert store.underlying_store.get('attempt 2/key') == b'value'


def test_processes_decide_alike(tmp_path: pathlib.Path) -> None:
    in_processes(2, tmp_path, partial(decide, str(tmp_path)))
