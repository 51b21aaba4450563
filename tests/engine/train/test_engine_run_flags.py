"""What flags leave behind in a run: its rows, files, rates and averages."""
import csv
import logging
import os
from collections.abc import Callable
from fnmatch import filter as matching
from typing import Any

import pytest
import torch
from loop_tools import make_batches, make_run

from cpool_vision.engine.device import start_runtime
from cpool_vision.engine.settings.config import read_train
from cpool_vision.engine.tracking.run_lock import RunLock
from cpool_vision.engine.train.build import build
from cpool_vision.engine.train.fit import train
from cpool_vision.engine.train.loop import train_one_epoch

Train = Callable[..., dict[str, Any]]
Load = Callable[..., dict[str, Any]]


def test_positional_folder(image_root: str, base_flags: list[str]) -> None:
    assert len(train(read_train([image_root, *base_flags[2:], '--epochs', '1']))['epochs']) == 1


@pytest.mark.parametrize('mode, size', [('norm', lambda gradient: gradient.norm()),
                                        ('value', lambda gradient: gradient.abs().max())])
def test_how_gradients_are_clipped(mode: str, size: Callable[[torch.Tensor], torch.Tensor]) -> None:
    run: Any = make_run(make_batches(1), 1, clip_grad=0.01, clip_mode=mode)
    train_one_epoch(run, 0)
    assert size(run.optimizer.seen[0]) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize('scale, factor', [('none', 1.), ('sqrt', 2 ** 0.5), ('linear', 2.)])
def test_losses_of_batches_of_several_sizes(scale: str, factor: float) -> None:
    runs = [make_run(make_batches(1, 8), 1, variable_batch_loss_scale=each) for each in ('none', scale)]
    for run in runs:
        run.mean_batch = 4.
        train_one_epoch(run, 0)
    plain, scaled = (run.optimizer.seen[0] for run in runs)  # type: ignore[attr-defined]
    torch.testing.assert_close(scaled, factor * plain)


def rates(folder: str) -> list[str]:
    with open(os.path.join(folder, 'updates.csv'), newline='', encoding='utf-8') as file:
        return [row['lr'] for row in csv.DictReader(file)]


@pytest.mark.parametrize('flags, distinct', [([], 1), (['--sched-on-updates'], 3)])
def test_the_schedule_steps_by_epoch_or_update(run_train: Train, flags: list[str], distinct: int) -> None:
    found = rates(run_train('--experiment', 'x', '--log-interval', '1', *flags)['folder'])
    assert len(found) == 6 and len(set(found[3:])) == distinct


def test_what_a_run_is_ranked_by_and_how_much_is_kept(run_train: Train) -> None:
    result = run_train('--experiment', 'x', '--eval-metric', 'loss', '--epochs', '3', '--checkpoint-hist', '1',
                       '--save-images', '--log-interval', '1')
    losses = [row['eval_loss'] for row in result['epochs']]
    assert (result['metric'], result['best_metric']) == ('loss', min(losses))
    names = os.listdir(result['folder'])
    assert matching(names, 'checkpoint-*') == [f'checkpoint-{losses.index(min(losses))}.pth.tar']
    assert sorted(matching(names, 'train-batch-*.jpg')) == [f'train-batch-{step}.jpg' for step in range(3)]


def test_epochs_that_are_trained_and_validated(run_train: Train) -> None:
    rows = run_train('--experiment', 'x', '--epochs', '5', '--val-interval', '3', '--start-epoch', '1')['epochs']
    assert [(row['epoch'], 'eval_loss' in row) for row in rows] == [(1, False), (2, True), (3, False), (4, True)]


@pytest.mark.parametrize('interval, lines', [(1, 3), (2, 2), (9, 2)])
def test_log_lines(run_train: Train, caplog: pytest.LogCaptureFixture, interval: int, lines: int) -> None:
    with caplog.at_level(logging.INFO):
        run_train('--experiment', 'x', '--epochs', '1', '--log-interval', str(interval))
    # of 3 updates, the last included
    assert sum('Train: ' in record.getMessage() for record in caplog.records) == lines


@pytest.mark.parametrize('flags, decay', [
    ([], 0.9998), (['--model-ema-decay', '0.5'], 0.5), (['--model-ema-decay', '0.5', '--model-ema-warmup'],
                                                        1 - 2 ** (-2 / 3))])
def test_the_average_of_weights(run_train: Train, load: Load, flags: list[str], decay: float) -> None:
    folder = run_train('--experiment', 'x', '-b', '24', '--model-ema', '--lr', '0.01', '--drop', '0', *flags)['folder']
    first, last = load(folder, 'checkpoint-0.pth.tar'), load(folder, 'last.pth.tar')
    one, two = (content['state_dict']['fc.weight'] for content in (first, last))
    assert not torch.equal(one, two)
    assert torch.equal(first['state_dict_ema']['fc.weight'], one)  # the average starts as the weights of one update
    torch.testing.assert_close(last['state_dict_ema']['fc.weight'], decay * one + (1 - decay) * two)


def test_an_average_on_the_cpu_is_not_validated(run_train: Train) -> None:
    flags = ['--epochs', '1', '--lr', '0.1', '--experiment']
    average = ['--model-ema', '--model-ema-decay', '0.1']
    plain, validated, kept = (run_train(*flags, name, *more)['epochs'][0]['eval_loss'] for name, more in (
        ('a', []), ('b', average), ('c', [*average, '--model-ema-force-cpu'])))
    assert kept == plain != validated


SPLITS = {
    'val_split': (['--val-split', 'train'], 24, 8),
    'validation_batch_size': (['-vb', '3'], 7, 3),
    'val_num_samples': (['--dataset', 'cpool/shapes', '--num-classes', '10', '--train-num-samples', '30',
                         '--val-num-samples', '12'], 12, 8),
}


@pytest.mark.parametrize('flag', SPLITS)
def test_the_split_that_is_validated(base_flags: list[str], flag: str) -> None:
    flags, images, batch = SPLITS[flag]
    settings = read_train([*base_flags, *flags])
    with RunLock() as lock:
        run = build(settings, start_runtime(settings, join=False), lock)
    run.trackers.close(False)
    assert run.validator is not None
    sizes = [len(target) for _, target in run.validator.loader]
    assert (sum(sizes), sizes[0]) == (images, min(batch, images))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_each_update_waits_for_the_device(run_train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    from cpool_vision.engine.train.checkpointer import Checkpointer

    idle: list[bool] = []
    monkeypatch.setattr(Checkpointer, 'after_update', lambda *_: idle.append(torch.cuda.current_stream().query()))
    run_train('--device', 'cuda', '--experiment', 'x', '--epochs', '1', '--synchronize-step')
    assert idle and all(idle)
