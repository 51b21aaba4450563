"""Workers of the training loader over epochs and under signals, and streamed datasets."""
import logging
import multiprocessing
import os
import random
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest
import torch
from loader_tools import (
    CASES,
    INPUT,
    Batch,
    Build,
    Shards,
    check_workers_and_positions,
    same,
    states,
    unreadable_images,
)
from timm.data import IterableImageDataset

from cpool_vision.engine.data import loaders as data
from cpool_vision.errors import ConfigError, DatasetError


def test_workers_stay_from_epoch_to_epoch(build: Build) -> None:
    prepared = build(workers=2)
    prepared.take(0, 0, stop=1)
    workers = [worker.pid for worker in data._stream(prepared.loader).loader._iterator._workers]
    whole = build().take(1)
    assert same(prepared.take(1), whole)  # after an epoch that was left in the middle
    assert [worker.pid for worker in data._stream(prepared.loader).loader._iterator._workers] == workers


def test_closed_workers_are_gone_and_start_again(build: Build) -> None:
    prepared = build(workers=2)
    prepared.take(0, 0, stop=2)
    workers = data._stream(prepared.loader).loader._iterator._workers
    data.close_workers(prepared.loader)
    assert not any(worker.is_alive() for worker in workers)
    assert same(prepared.take(1), build().take(1))
    data.close_workers(prepared.loader)
    data.close_workers(prepared.loader)
    data.close_workers(build().loader)


def test_workers_that_start_anew_give_the_same_batches(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.utils.data.DataLoader
    monkeypatch.setattr(torch.utils.data, 'DataLoader', lambda *args, **kwargs: real(
        *args, **{**kwargs, 'persistent_workers': False}))
    check_workers_and_positions(build, CASES['randaugment'], 2)


def test_an_iterator_kept_over_epochs_gives_the_same_batches(build: Build) -> None:
    plain, eager = build(), build('--use-multi-epochs-loader', workers=2)
    for place in ((0, 0), (1, 0), (0, 3), (1, 0)):  # the third is not what was loaded ahead
        assert same(eager.take(*place), plain.take(*place))


class SeededByTimm:
    """Whether timm's start of a worker has seeded numpy, as an image."""

    def __init__(self, size: tuple[int, int, int]) -> None:
        self.size = size

    def __call__(self, image: Any) -> torch.Tensor:
        seed = torch.utils.data.get_worker_info().seed % (2 ** 32 - 1)
        return torch.full(self.size, int(np.random.get_state()[1][0] == seed), dtype=torch.uint8)  # noqa: NPY002


@pytest.mark.parametrize('part', [False, True])
def test_which_generators_of_a_streamed_set_are_seeded(
        build: Build, part: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, 'build_dataset', lambda *_: IterableImageDataset('', reader=Shards()))
    flags = ['--worker-seeding', 'part'] if part else []
    prepared = build(*flags, workers=1)
    data._stream(prepared.loader).dataset.transform = SeededByTimm((3, 24, 24))
    image = prepared.take(0)[0][0]
    dark, light = ((level / 255 - INPUT['mean'][0]) / INPUT['std'][0] for level in (0, 1))
    assert image[0, 0, 0, 0] == pytest.approx(dark if part else light)


@pytest.mark.slow
def test_workers_that_are_not_forked(build: Build) -> None:
    prepared = build(*CASES['mixed'], workers=1)
    data._stream(prepared.loader).loader.multiprocessing_context = 'spawn'
    assert same(prepared.take(1, 2), build(*CASES['mixed']).take(1, 2))


def take_under_signal(prepared: Any, kind: str) -> list[Batch]:
    """Takes an epoch; its two workers get a signal from another process after the first batch."""
    data.start_at(prepared.loader, 0)
    taken = []
    known = {child.pid for child in multiprocessing.active_children()}
    for image, target in prepared.loader:
        taken.append((image.clone(), target.clone()))
        if len(taken) == 1:
            workers = [str(child.pid) for child in multiprocessing.active_children() if child.pid not in known]
            assert len(workers) == 2
            subprocess.run(['kill', f'-{kind[3:]}', *workers], check=True)  # noqa: S603, S607
    return taken


@pytest.mark.parametrize('streamed', [False, True])
@pytest.mark.parametrize('kind', ['SIGINT', 'SIGUSR1', 'SIGTERM'])
def test_workers_outlive_the_signals_of_a_scheduler(
        build: Build, kind: str, streamed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if streamed:
        monkeypatch.setattr(data, 'build_dataset', lambda *_: IterableImageDataset('', reader=Shards()))
    expected = build(workers=2).take(0)
    assert same(take_under_signal(build(workers=2), kind), expected)


@pytest.mark.slow
@pytest.mark.parametrize('start, survives', [('None', False), ('WorkerSignals()', True)])
@pytest.mark.parametrize('kind', ['INT', 'USR1', 'TERM'])
def test_workers_as_torch_starts_them_do_not(kind: str, start: str, survives: bool) -> None:
    code = f'''
import signal, subprocess
from torch.utils.data import DataLoader
from cpool_vision.engine.data.worker import WorkerSignals
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell that started the tests behind itself ignores
iterator = iter(DataLoader(range(100), num_workers=2, worker_init_fn={start}))
next(iterator)
subprocess.run(['kill', '-{kind}', *[str(worker.pid) for worker in iterator._workers]], check=True)
print(sum(1 for item in iterator))
'''
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=600)  # noqa: S603
    assert (done.returncode == 0 and done.stdout == '99\n') == survives, done.stderr


@pytest.mark.parametrize('leave', ['raise ValueError', *(
    pytest.param(way, marks=pytest.mark.slow) for way in ('sys.exit(3)', 'os.kill(os.getpid(), 9)'))])
def test_workers_end_with_the_process(image_root: str, leave: str) -> None:
    code = f'''
import os, sys
from torch.utils.data import DataLoader
from cpool_vision.engine.data.worker import WorkerSignals
iterator = iter(DataLoader(range(100), num_workers=2, worker_init_fn=WorkerSignals()))
next(iterator)
print(*[worker.pid for worker in iterator._workers], flush=True)
{leave}
'''
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=600)  # noqa: S603
    assert done.returncode in (1, 3, -9)
    pids = done.stdout.split()
    assert len(pids) == 2
    for _ in range(3000):
        if not any(os.path.exists(f'/proc/{pid}') for pid in pids):
            break
        time.sleep(0.1)
    else:
        pytest.fail('workers are left')


@pytest.mark.parametrize('name, workers', [('randaugment', 2), ('mixed', 1), ('unfetched', 2), ('albumentations', 2)])
def test_streamed_sets_are_entered_by_loading_again(
        build: Build, name: str, workers: int, monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(data, 'build_dataset', lambda *_: IterableImageDataset('', reader=Shards()))
    caplog.set_level(logging.INFO, 'cpool_vision')
    random.seed(1)
    one = build(*CASES[name], workers=workers)
    before = states()
    whole = {epoch: one.take(epoch) for epoch in (0, 1)}
    assert states() == before
    assert len(whole[0]) == len(one.loader) == 6 and not same(*whole.values())
    two = build(*CASES[name], workers=workers)
    for epoch, batch in ((1, 2), (0, 5)):
        torch.manual_seed(epoch)
        assert same(two.take(epoch, batch), whole[epoch][batch:])
    assert 'loading 2 batches of epoch 1 again' in caplog.text
    with pytest.raises(DatasetError, match='ended after 6 batches, before batch 7'):
        two.take(0, 7)
    with pytest.raises(ConfigError, match='no batch -1'):
        data.start_at(two.loader, 0, -1)
    assert unreadable_images(two.loader) == [] and data.share_unreadable(two.loader) == 0


@pytest.mark.parametrize('place', [(0, 1), (1, 0), (2, 0)])
def test_streamed_sets_without_workers_go_on_from_epoch_to_epoch_only(
        build: Build, place: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, 'build_dataset', lambda *_: IterableImageDataset('', reader=Shards()))
    prepared = build()
    with pytest.raises(ConfigError, match=f'batch {place[1]} of epoch {place[0]}: start the run with --workers 1'):
        prepared.take(*place)
    assert len(prepared.take(0)) == len(prepared.take(1)) == 6
    with pytest.raises(ConfigError, match='--aug-repeats needs an indexed dataset'):
        build('--aug-repeats', '2', world_size=2)


@pytest.mark.parametrize('workers', [0, 2])
def test_streamed_sets_draw_anew_in_each_epoch_and_process(
        build: Build, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, 'build_dataset', lambda *_: IterableImageDataset('', reader=Shards()))
    monkeypatch.setattr(Shards, 'set_epoch', lambda self, epoch: None)  # the images come in the same order
    prepared = build(workers=workers)
    here = prepared.take(0, 0, 2)
    for other in (prepared.take(1, 0, 2), build('--seed', '5', workers=workers).take(0, 0, 2),
                  build(workers=workers, rank=1, world_size=2).take(0, 0, 2)):
        assert [target.tolist() for _, target in other] == [target.tolist() for _, target in here]
        assert not any(torch.equal(a, b) for (a, _), (b, _) in zip(here, other, strict=True))
