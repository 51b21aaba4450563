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
from timm.task import ClassificationTask

from cpool_vision.engine.checkpoints import checkpoint, saver
from cpool_vision.engine.checkpoints.checkpoint import (
    load_weights,
    read_checkpoint,
    read_weights,
    to_plain,
)
from cpool_vision.engine.checkpoints.saver import CheckpointSaver, TrainState
from cpool_vision.engine.tracking.run_folder import RunFolder
from cpool_vision.engine.validate.bulk import run_validation
from cpool_vision.errors import CheckpointError, CheckpointNotFoundError, OutputError
from cpool_vision.files import link_atomic, write_atomic


def make_state() -> TrainState:
    model = nn.Linear(3, 2)
    task = ClassificationTask(model, criterion=nn.CrossEntropyLoss(), verbose=False)
    optimizer = torch.optim.AdamW(model.parameters())
    return TrainState(task, optimizer, torch.amp.GradScaler('cpu', enabled=False), None, {'model': 'tiny', 'lr': 0.1})


@pytest.mark.parametrize('flag', ['--resume', '--initial-checkpoint', '--pretrained-path'])
def test_training_never_executes_a_checkpoint(
        flag: str, run_train: Callable[..., Any], evil_checkpoint: tuple[str, str]) -> None:
    path, executed = evil_checkpoint
    extra = ['--pretrained'] if flag == '--pretrained-path' else []
    with pytest.raises((CheckpointError, ValueError), match='evil.pth.tar|weights_only'):
        run_train(flag, path, *extra)
    assert not os.path.exists(executed)


@pytest.mark.parametrize('name', ['evil.pth.tar', 'evil.pth', 'evil.safetensors', 'evil.npz'])
def test_validation_never_executes_a_checkpoint(
        name: str, validate_args: Callable[..., Any], image_root: str,
        evil_checkpoint: tuple[str, str]) -> None:
    path, executed = evil_checkpoint
    other = os.path.join(os.path.dirname(path), name)
    os.replace(path, other)
    with pytest.raises(CheckpointError, match=name):
        run_validation(validate_args('--data-dir', image_root, '--model', 'test_vit', '--checkpoint', other,
                                     '-j', '0', '--device', 'cpu'))
    assert not os.path.exists(executed)


def test_the_evil_checkpoint_is_evil(evil_checkpoint: tuple[str, str]) -> None:
    """Control of the two tests above."""
    path, executed = evil_checkpoint
    torch.load(path, weights_only=False)
    assert os.path.exists(executed)


@pytest.mark.parametrize('content', [b'', b'not a checkpoint', b'PK\x03\x04 truncated'])
def test_damaged_files_are_errors(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / 'bad.pth'
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match='--checkpoint.*bad.pth'):
        read_checkpoint(str(path), '--checkpoint')


def test_truncated_checkpoint_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / 'cut.pth'
    torch.save({'state_dict': {'weight': torch.ones(1000)}}, path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match='damaged'):
        read_checkpoint(str(path), '--resume')


def test_missing_and_meaningless_checkpoints_are_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match='none.pth.*check the path'):
        read_checkpoint(str(tmp_path / 'none.pth'), '--resume')
    with pytest.raises(CheckpointNotFoundError):
        read_checkpoint(str(tmp_path), '--resume')
    torch.save([1, 2], tmp_path / 'list.pth')
    with pytest.raises(CheckpointError, match='list'):
        read_checkpoint(str(tmp_path / 'list.pth'), '--resume')
    torch.save({'epoch': 3}, tmp_path / 'empty.pth')
    with pytest.raises(CheckpointError, match='no model weights'):
        read_weights(str(tmp_path / 'empty.pth'), '--checkpoint', use_ema=False)


def test_weights_are_found_in_every_usual_form(tmp_path: Path) -> None:
    weights = {'weight': torch.arange(6.).view(2, 3), 'bias': torch.zeros(2)}
    ema = {name: value + 1 for name, value in weights.items()}
    torch.save(weights, tmp_path / 'bare.pth')
    torch.save({'state_dict': {f'module.{name}': value for name, value in weights.items()}}, tmp_path / 'ddp.pth')
    torch.save({'state_dict': weights, 'state_dict_ema': ema, 'args': argparse.Namespace(lr=1)}, tmp_path / 'timm.pth')
    safetensors.torch.save_file(weights, tmp_path / 'file.safetensors')
    for name in ('bare.pth', 'ddp.pth', 'timm.pth', 'file.safetensors'):
        model = nn.Linear(3, 2)
        load_weights(model, read_weights(str(tmp_path / name), '--checkpoint', False), name, '--checkpoint', 'linear')
        assert torch.equal(model.weight, weights['weight'])
    got = read_weights(str(tmp_path / 'timm.pth'), '--checkpoint', use_ema=True)
    assert torch.equal(got['bias'], ema['bias'])


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


@pytest.mark.parametrize('stage', ['write', 'fsync', 'replace'])
def test_a_failure_while_saving_leaves_the_former_checkpoint(
        tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch, load: Callable[..., Any]) -> None:
    state, keeper = make_state(), CheckpointSaver(str(tmp_path), max_history=2)
    keeper.save(state, 0, 1.0)
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, 'No space left on device')

    if stage == 'write':
        real = torch.save

        def half(content: Any, file: Any) -> None:
            file.write(b'half')
            fail()
        monkeypatch.setattr(saver.torch, 'save', half)
        assert real is not half
    else:
        monkeypatch.setattr(checkpoint.os, stage, fail)
    with pytest.raises(OutputError, match='No space left'):
        keeper.save(state, 1, 2.0)
    monkeypatch.undo()
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before
    assert load(tmp_path, 'last.pth.tar')['epoch'] == 0


def test_no_finished_checkpoint_is_unlinked_before_its_successor_stands(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, keeper = make_state(), CheckpointSaver(str(tmp_path), max_history=1)
    keeper.save(state, 0, 1.0)
    removed: list[str] = []
    real = os.remove

    def watch(path: str) -> None:
        name = os.path.basename(path)
        if not name.startswith('.'):
            removed.append(name)
            assert (tmp_path / 'last.pth.tar').exists() and (tmp_path / 'model_best.pth.tar').exists()
        real(path)

    monkeypatch.setattr(checkpoint.os, 'remove', watch)
    monkeypatch.setattr(checkpoint.os, 'unlink', lambda path: pytest.fail(f'unlinked {path}'))
    keeper.save(state, 1, 2.0)
    assert removed == ['checkpoint-0.pth.tar']


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


def test_second_names_are_atomic_with_and_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomic(str(tmp_path / 'a'), lambda file: file.write(b'one'))
    link_atomic(str(tmp_path / 'a'), str(tmp_path / 'b'))
    link_atomic(str(tmp_path / 'a'), str(tmp_path / 'b'))
    write_atomic(str(tmp_path / 'a'), lambda file: file.write(b'two'))
    assert (tmp_path / 'b').read_bytes() == b'one'

    def refuse(*_: Any) -> None:
        raise OSError(1, 'Operation not permitted')

    monkeypatch.setattr(checkpoint.os, 'link', refuse)
    link_atomic(str(tmp_path / 'a'), str(tmp_path / 'b'))
    assert (tmp_path / 'b').read_bytes() == b'two'
    assert sorted(os.listdir(tmp_path)) == ['a', 'b']


def test_leftovers_of_a_killed_run_are_swept(tmp_path: Path) -> None:
    for name in ('last.pth.tar', 'recovery-0-2.pth.tar', 'previous.pth.tar.former', 'unreadable.txt', 'args.yaml',
                 'summary.csv'):
        (tmp_path / f'.{name}.abc.tmp').write_bytes(b'half')
    (tmp_path / 'notes.tmp').write_bytes(b'mine')
    RunFolder(str(tmp_path), 'a: 1\n')
    assert sorted(os.listdir(tmp_path)) == ['args.yaml', 'notes.tmp']
