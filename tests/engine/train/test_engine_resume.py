"""Runs that break off inside an epoch and go on end as if they had not."""
import os
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from loader_tools import Shards
from resume_tools import break_off, rows, unequal
from timm.data import IterableImageDataset

from cpool_vision.engine.data import loaders as data
from cpool_vision.engine.settings.config import read_train
from cpool_vision.engine.train import build as train_build
from cpool_vision.engine.train import checkpointer
from cpool_vision.engine.train import loop as train_loop
from cpool_vision.engine.train.fit import train
from cpool_vision.errors import CheckpointError, ConfigError

Train = Callable[..., dict[str, Any]]
Load = Callable[..., dict[str, Any]]

# 24 images: 6 batches of 4, without the last of 5 with batches of 5
CASES = {
    'plain': ['-b', '4'],
    'mixed': ['-b', '4', '--model-ema', '--model-ema-decay', '0.7', '--mixup', '0.2', '--cutmix', '1', '--reprob',
              '0.5', '--grad-accum-steps', '2', '--sched-on-updates', '--clip-grad', '1'],
    'tail': ['-b', '5', '--grad-accum-steps', '3', '--model-ema', '--model-ema-warmup', '--lr-noise', '0.1', '0.9'],
    'workers': ['-b', '4', '-j', '1', '--aa', 'rand-m5-mstd0.5', '--opt', 'lookahead_sgd'],
    'float16': ['-b', '4', '--model', 'test_vit', '--amp', '--amp-dtype', 'float16', '--no-prefetcher', '--mixup',
                '0.5'],
    'plateau': ['-b', '4', '--sched', 'plateau', '--patience-epochs', '0', '--decay-rate', '0.5', '--lr-noise', '0.1'],
    'sizes': ['--train-img-sizes', '32', '64', '--train-batch-sizes', '4', '6', '--drop-path', '0.3',
              '--model', 'test_convnext'],
    'naflex': ['-b', '4', '--model', 'naflexvit_base_patch16_gap', '--model-kwargs', 'embed_dim=16', 'depth=1',
               'num_heads=2', 'patch_size=8', '--naflex-loader', '--naflex-train-seq-lens', '4', '9',
               '--naflex-max-seq-len', '16', '--reprob', '0.5'],
    'albumentations': ['-b', '4', '-j', '1', '--aug-config', 'strong', '--mixup', '0.2', '--reprob', '0.3'],
    'unvalidated': ['-b', '4', '--val-interval', '2', '--nonfinite', 'skip', '--opt', 'sgd'],
}


# updates after which a run, and each continuation of it, breaks off; an epoch of "mixed" has 3, of "tail" 2, others 6
STOPS = {'mixed': (1,) * 6, 'tail': (3,)}


@pytest.mark.parametrize('name, interval, stops', [
    *((name, 1, STOPS.get(name, (8,))) for name in CASES),
    *(pytest.param(name, 2, (3,) if name == 'tail' else (3, 2), marks=() if name == 'mixed' else pytest.mark.slow)
      for name in CASES),
])
def test_a_run_that_breaks_off_inside_an_epoch_ends_as_the_uninterrupted_one(
        run_train: Train, load: Load, name: str, interval: int, stops: tuple[int, ...]) -> None:
    flags = CASES[name]
    whole = run_train(*flags, '--experiment', 'whole')
    flags = [*flags, '--experiment', 'broken', '--resume', 'auto', '--recovery-interval', str(interval)]
    for stop in stops:
        break_off(lambda: run_train(*flags), stop)
    again = run_train(*flags)
    one, two = load(whole['folder'], 'last.pth.tar'), load(again['folder'], 'last.pth.tar')
    assert unequal(one, two) == []
    assert rows(whole['folder']) == rows(again['folder'])
    assert {key: one['saver'][key] for key in ('best_metric', 'best_epoch')} == {
        key: two['saver'][key] for key in ('best_metric', 'best_epoch')}
    best, other = load(whole['folder'], 'model_best.pth.tar'), load(again['folder'], 'model_best.pth.tar')
    assert unequal(best, other) == []


def test_a_streamed_set_is_entered_inside_an_epoch(run_train: Train, load: Load, monkeypatch: pytest.MonkeyPatch,
                                                   ) -> None:
    real = data.build_dataset
    monkeypatch.setattr(data, 'build_dataset', lambda args, split, training, *more: IterableImageDataset(
        '', reader=Shards()) if training else real(args, split, training, *more))
    flags = ['-b', '4', '-j', '2', '--mixup', '0.2', '--experiment']
    whole = run_train(*flags, 'whole')['folder']
    flags += ['broken', '--resume', 'auto', '--recovery-interval', '1']
    break_off(lambda: run_train(*flags), 2)
    with pytest.raises(ConfigError, match='--workers 2, now 1'):
        run_train(*flags, '-j', '1')
    assert unequal(load(whole, 'last.pth.tar'), load(run_train(*flags)['folder'], 'last.pth.tar')) == []


def test_meaningless_entries_are_errors(run_train: Train, load: Load, tmp_path: Any) -> None:
    good = load(run_train('--experiment', 'x', '--epochs', '1')['folder'], 'last.pth.tar')
    for number, (key, value, words) in enumerate([
            ('position', {'epoch': 0}, 'no valid progress'), ('position', 'x', 'no valid progress'),
            ('processes', 'x', 'no valid state'), ('processes', torch.ones(3), 'no valid state')]):
        torch.save({**good, key: value}, tmp_path / 'bad.pth.tar')
        with pytest.raises(CheckpointError, match=f'bad.pth.tar.*{words}'):
            run_train('--experiment', f'y{number}', '--resume', str(tmp_path / 'bad.pth.tar'))


def drop_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_loop, 'seed_everything', lambda *_: None)


def drop_offset(monkeypatch: pytest.MonkeyPatch) -> None:
    real = data.start_at
    monkeypatch.setattr(data, 'start_at', lambda loader, epoch, batch=0: real(loader, epoch))


def drop_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_build, 'load_process_state', lambda *_: None)


def drop_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_build.TrainState, '_load_optimizer', lambda *_: None)


def drop_average(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_build.TrainState, 'load_ema', lambda *_: None)


AVERAGED = ['-b', '4', '--model-ema', '--model-ema-decay', '0.7']
RESUMED = ['--resume', 'auto', '--recovery-interval', '1']


@pytest.fixture(scope='module')
def folders(flags_into: Callable[[Any], list[str]], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """An uninterrupted run, and one that broke off after its third update."""
    root = tmp_path_factory.mktemp('runs')
    flags = [*flags_into(root), *AVERAGED, '--experiment']
    whole = train(read_train([*flags, 'whole']))['folder']
    break_off(lambda: train(read_train([*flags, 'broken', *RESUMED])), 3)
    return whole, str(root / 'broken')


@pytest.mark.parametrize('drop, part', [
    (drop_seed, '.state_dict.'), (drop_offset, '.state_dict.'), (drop_optimizer, '.state_dict.'),
    (drop_average, '.state_dict_ema.'), (drop_sums, ''),
], ids=lambda value: value.__name__ if callable(value) else '')
def test_the_comparison_sees_what_is_lost(
        run_train: Train, load: Load, folders: tuple[str, str], drop: Callable[..., None], part: str, tmp_path: Any,
        monkeypatch: pytest.MonkeyPatch) -> None:
    whole, broken = folders
    shutil.copytree(broken, tmp_path / 'runs' / 'broken')
    drop(monkeypatch)
    again = run_train(*AVERAGED, '--experiment', 'broken', *RESUMED)['folder']
    wrong = unequal(load(whole, 'last.pth.tar'), load(again, 'last.pth.tar'))
    assert any(name.startswith(part) for name in wrong) if part else rows(whole) != rows(again)


def test_the_newest_two_stay(run_train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    listings: list[list[str]] = []
    real = checkpointer.Checkpointer._save

    def save(self: Any, *args: Any) -> None:
        real(self, *args)
        listings.append(sorted(name.removesuffix('.pth.tar') for name in os.listdir(self.saver.folder)
                               if name.startswith(('last', 'previous', 'recovery'))))

    monkeypatch.setattr(checkpointer.Checkpointer, '_save', save)
    folder = run_train('-b', '4', '--recovery-interval', '2', '--experiment', 'x')['folder']
    assert listings == [
        ['recovery-0-2'], ['recovery-0-2', 'recovery-0-4'], ['recovery-0-4', 'recovery-0-6'], ['last', 'recovery-0-6'],
        ['last', 'recovery-1-2'], ['last', 'recovery-1-2', 'recovery-1-4'], ['last', 'recovery-1-4', 'recovery-1-6'],
        ['last', 'previous', 'recovery-1-6']]
    assert not [name for name in os.listdir(folder) if name.startswith('recovery')]


def test_a_run_that_broke_off_before_its_first_checkpoint_begins_again(run_train: Train, load: Load) -> None:
    flags = ['-b', '4', '--experiment', 'x', '--resume', 'auto']
    break_off(lambda: run_train(*flags), 2)
    again = run_train(*flags)
    assert [row['epoch'] for row in rows(again['folder'])] == ['0', '1']


@pytest.mark.parametrize('flags, words', [
    (['-b', '6'], '--batch-size 4, now 6'),
    (['--grad-accum-steps', '2'], '--grad-accum-steps 1, now 2'),
    (['--seed', '3'], '--seed 42, now 3'),
])
def test_another_order_of_batches_inside_an_epoch_is_refused(run_train: Train, flags: list[str], words: str) -> None:
    common = ['-b', '4', '--experiment', 'x', '--resume', 'auto', '--recovery-interval', '2']
    break_off(lambda: run_train(*common), 3)
    with pytest.raises(ConfigError, match=f'recovery-0-2.*{words}.*end of an epoch'):
        run_train(*common, *flags)


def test_start_epoch_overrides_a_position_inside_an_epoch(run_train: Train) -> None:
    flags = ['-b', '4', '--experiment', 'x', '--resume', 'auto', '--recovery-interval', '2']
    break_off(lambda: run_train(*flags), 3)
    result = run_train(*flags, '--start-epoch', '1')
    assert [row['epoch'] for row in result['epochs']] == [1]
