"""What two processes must decide alike, over gloo."""
import os
import pathlib
import signal
import types
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from process_tools import in_processes

from cpool_vision.engine.checkpoints.progress import Progress
from cpool_vision.engine.checkpoints.resume import Team, check_agreement
from cpool_vision.engine.checkpoints.seal import save_sealed
from cpool_vision.engine.device import Precision, Runtime
from cpool_vision.engine.distributed.rendezvous import agree_on_attempt, rendezvous_url
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
        with pytest.raises(CheckpointError, match='--output must be a folder that all processes share'):
            check_agreement(path, team)

    norm, average = torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2)
    norm.running_mean.fill_(rank)
    average.running_var.fill_(rank + 2)
    meter = LossMeter(cpu)
    meter.sums.fill_(rank + 5)
    task = types.SimpleNamespace(get_trainable_module=lambda ema=False: average if ema else norm)
    run: Any = types.SimpleNamespace(
        settings=TrainSettings(), runtime=Runtime(cpu, Precision(None, None, 'cpu'), rank, 2), task=task, meter=meter,
        loader=[1, 2], progress=Progress(1, 1), data=None)
    rows = gather_process_state(run)
    assert rows.tolist() == [[5, 5, 5, 5, 0, 0, 1, 1, 0, 0, 2, 2], [6, 6, 6, 6, 1, 1, 1, 1, 0, 0, 3, 3]]
    for value in (norm.running_mean, average.running_var, meter.sums):
        value.zero_()
    load_process_state(run, rows, 'x')
    assert norm.running_mean.tolist() == [rank] * 2 and average.running_var.tolist() == [rank + 2] * 2
    assert meter.sums.tolist() == [rank + 5] * 4

    class Full:
        def save_recovery(self, state: Any, progress: Any) -> None:
            raise OutputError('No space left on device')

    states: Any = types.SimpleNamespace(gather=lambda keep: None)
    keeper = Checkpointer(run, states, None if rank else Full(), 1)  # type: ignore[arg-type]
    with pytest.raises(OutputError, match='the first process cannot write' if rank else 'No space left'):
        keeper.after_update(1, False, Verdict(True, True, 0))


def test_only_torchrun_needs_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv('TORCHELASTIC_RUN_ID', raising=False)
    assert rendezvous_url() == 'env://'
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'job')
    assert rendezvous_url() == rendezvous_url() == 'attempt://'


def meet_often(environment: dict[str, str], counts: list[str], rank: int) -> list[int]:
    """Exit codes of processes that meet one after another, each 0 if it met the one of its own attempt."""
    codes = []
    for number, count in enumerate(counts):
        child = os.fork()
        if child == 0:
            os.environ.update(environment, TORCHELASTIC_RESTART_COUNT=count[rank])
            dist.init_process_group('gloo', init_method=rendezvous_url(), timeout=timedelta(seconds=60))
            sums = torch.tensor([1., number])
            dist.all_reduce(sums)
            os._exit(sums.tolist() != [2, 2 * number])  # without leaving the group, as when it is killed
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    return codes


def test_each_attempt_of_torchrun_meets_though_others_met_in_its_store(tmp_path: pathlib.Path) -> None:
    """The process of one node fails, that of the other is stopped: each node counts restarts for itself."""
    store = dist.TCPStore('localhost', 0, is_master=True, wait_for_workers=False)  # torchrun's own
    store.set('token 1', 'of a process that died before it was answered')
    environment = {'TORCHELASTIC_RUN_ID': 'job', 'TORCHELASTIC_USE_AGENT_STORE': 'True', 'MASTER_ADDR': 'localhost',
                   'MASTER_PORT': str(store.port)}
    work = partial(meet_often, environment, ['00', '01', '11', '11'])
    assert in_processes(2, tmp_path, work, group=False) == [[0] * 4] * 2


def test_an_attempt_waits_for_all_processes_and_not_forever(tmp_path: pathlib.Path) -> None:
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=0.1))
    assert agree_on_attempt(store, 0, 1) != agree_on_attempt(store, 0, 1)
    store.set('token 1', 'stale')
    with pytest.raises(TimeoutError, match=r'processes \[1\] of 2 did not arrive within 0:00:00.1'):
        agree_on_attempt(store, 0, 2, timedelta(seconds=0.1))
    with pytest.raises(dist.DistStoreError, match='timeout'):
        agree_on_attempt(store, 1, 2)


def test_processes_decide_alike(tmp_path: pathlib.Path) -> None:
    in_processes(2, tmp_path, partial(decide, str(tmp_path)))
