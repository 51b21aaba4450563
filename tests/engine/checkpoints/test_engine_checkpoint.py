"""Checkpoint files: never executed, never half written, never lost."""
import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn as nn
import yaml
from test_engine_saving import make_state

from cpool_vision.engine.checkpoints.checkpoint import (
    load_weights,
    read_checkpoint,
    to_plain,
    weights_of,
)
from cpool_vision.engine.checkpoints.saver import CheckpointSaver
from cpool_vision.engine.model import load_model_weights
from cpool_vision.engine.tracking.run_folder import RunFolder
from cpool_vision.errors import CheckpointError, CheckpointNotFoundError


@pytest.mark.parametrize('content', [b'', b'not a checkpoint', b'PK\x03\x04 truncated'])
def test_damaged_files_are_errors(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / 'bad.pth'
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match='--checkpoint.*bad.pth'):
        read_checkpoint(str(path), '--checkpoint')


def test_missing_and_meaningless_checkpoints_are_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match='none.pth.*check the path'):
        read_checkpoint(str(tmp_path / 'none.pth'), '--resume')
    with pytest.raises(CheckpointNotFoundError):
        read_checkpoint(str(tmp_path), '--resume')
    torch.save([1, 2], tmp_path / 'list.pth')
    with pytest.raises(CheckpointError, match='list'):
        read_checkpoint(str(tmp_path / 'list.pth'), '--resume')
    with pytest.raises(CheckpointError, match='no model weights'):
        weights_of({'epoch': 3}, 'empty.pth', '--checkpoint', use_ema=False)


def test_weights_are_found_in_every_usual_form(tmp_path: Path) -> None:
    weights = {'weight': torch.arange(6.).view(2, 3), 'bias': torch.zeros(2)}
    ema = {name: value + 1 for name, value in weights.items()}
    torch.save(weights, tmp_path / 'bare.pth')
    torch.save({'state_dict': {f'module.{name}': value for name, value in weights.items()}}, tmp_path / 'ddp.pth')
    torch.save({'state_dict': weights, 'state_dict_ema': ema, 'args': argparse.Namespace(lr=1)}, tmp_path / 'timm.pth')
    safetensors.torch.save_file(weights, tmp_path / 'file.safetensors')
    for name in ('bare.pth', 'ddp.pth', 'timm.pth', 'file.safetensors'):
        model = nn.Linear(3, 2)
        content = load_model_weights(model, str(tmp_path / name), '--checkpoint', 'linear', use_ema=False)
        assert torch.equal(model.weight, weights['weight'])
        ema_or_plain = weights_of(content, name, '--checkpoint', use_ema=True)['bias']
        assert torch.equal(ema_or_plain, (ema if name == 'timm.pth' else weights)['bias'])


def test_misfit_names_keys_and_shapes_and_changes_nothing() -> None:
    model = nn.Linear(3, 2)
    before = model.weight.clone()
    with pytest.raises(CheckpointError, match=r'1 of another shape \(e.g. bias, \(5,\) for \(2,\)\).*--num-classes'):
        load_weights(model, {'weight': torch.ones(2, 3), 'bias': torch.ones(5)}, 'x', '--checkpoint', 'linear')
    with pytest.raises(CheckpointError, match=r'1 missing \(e.g. bias\); 1 unexpected \(e.g. other\).*--model'):
        load_weights(model, {'weight': torch.ones(2, 3), 'other': torch.ones(5)}, 'x', '--checkpoint', 'linear')
    assert torch.equal(model.weight, before)


def test_plain_values_survive_the_strict_readers(tmp_path: Path) -> None:
    value = {'a': np.float64(0.5), 'b': (1, Path('x')), 'c': torch.tensor(2.), 'd': np.int64(3), 'e': None,
             'f': {'g': torch.float16}, 'h': True}
    plain = to_plain(value)
    assert plain == {'a': 0.5, 'b': [1, 'x'], 'c': 2.0, 'd': 3, 'e': None, 'f': {'g': 'torch.float16'}, 'h': True}
    assert type(plain['a']) is float and type(plain['d']) is int and plain['h'] is True
    torch.save(plain, tmp_path / 'p.pth')
    assert torch.load(tmp_path / 'p.pth', weights_only=True) == yaml.safe_load(yaml.safe_dump(plain))


@pytest.mark.parametrize('decreasing, kept, best', [(False, {1, 3}, 3), (True, {0, 2}, 2)])
def test_history_keeps_the_best(tmp_path: Path, load: Callable[..., Any], decreasing: bool, kept: set[int],
                                best: int) -> None:
    state, keeper = make_state(), CheckpointSaver(str(tmp_path), max_history=2, decreasing=decreasing)
    for epoch, metric in enumerate([2., 3., 1., 4., 2.5]):
        keeper.save(state, epoch, metric)
    names = {name for name in os.listdir(tmp_path) if name.startswith('checkpoint')}
    assert names == {f'checkpoint-{epoch}.pth.tar' for epoch in kept}
    assert load(tmp_path, 'last.pth.tar')['epoch'] == 4
    assert load(tmp_path, 'model_best.pth.tar')['epoch'] == keeper.best_epoch == best
    for epoch in kept:
        assert load(tmp_path, f'checkpoint-{epoch}.pth.tar')['epoch'] == epoch

    again = CheckpointSaver(str(tmp_path), max_history=2, decreasing=decreasing)
    again.restore(load(tmp_path, 'last.pth.tar'))
    assert (again.files, again.best_metric, again.best_epoch) == (keeper.files, keeper.best_metric, keeper.best_epoch)
    os.remove(tmp_path / f'checkpoint-{best}.pth.tar')
    again.restore(load(tmp_path, 'last.pth.tar'))
    assert len(again.files) == 1


def test_nan_metric_never_becomes_best(tmp_path: Path) -> None:
    state, keeper = make_state(), CheckpointSaver(str(tmp_path), max_history=2)
    assert keeper.save(state, 0, float('nan')) == (None, None)
    assert keeper.save(state, 1, 1.0) == (1.0, 1)
    assert keeper.save(state, 2, float('nan')) == (1.0, 1)
    assert keeper.files[0] == ('checkpoint-1.pth.tar', 1.0)


def test_leftovers_of_a_killed_run_are_swept(tmp_path: Path) -> None:
    for name in ('last.pth.tar', 'recovery-0-2.pth.tar', 'previous.pth.tar.former', 'unreadable.txt', 'args.yaml',
                 'summary.csv'):
        (tmp_path / f'.{name}.abc.tmp').write_bytes(b'half')
    (tmp_path / 'notes.tmp').write_bytes(b'mine')
    RunFolder(str(tmp_path), 'a: 1\n')
    assert sorted(os.listdir(tmp_path)) == ['args.yaml', 'notes.tmp']
