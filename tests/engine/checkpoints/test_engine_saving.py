"""A save that breaks off at any instant leaves a folder to resume from; damaged files are found and passed over."""
import json
import logging
import os
import resource
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
from resume_tools import break_off, rows, unequal
from timm.models import load_state_dict
from timm.task import ClassificationTask

from cpool_vision.engine.checkpoints import resume, seal
from cpool_vision.engine.checkpoints.progress import Progress
from cpool_vision.engine.checkpoints.resume import find_newest, list_candidates
from cpool_vision.engine.checkpoints.saver import CheckpointSaver, TrainState
from cpool_vision.engine.checkpoints.seal import check_seal, read_seal, save_sealed
from cpool_vision.errors import CheckpointError, CheckpointVersionError, OutputError

Train = Callable[..., dict[str, Any]]
Load = Callable[..., dict[str, Any]]


def make_state() -> TrainState:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    task = ClassificationTask(model, criterion=nn.CrossEntropyLoss(), verbose=False)
    return TrainState(task, torch.optim.AdamW(model.parameters()), torch.amp.GradScaler('cpu', enabled=False), None,
                      {'model': 'tiny'})


def save_some(folder: str, last: bool = False) -> CheckpointSaver:
    """Two epochs with checkpoints inside, and half of a third one; `last`: and its end."""
    state, keeper = make_state(), CheckpointSaver(folder, max_history=1)
    for epoch in range(3):
        for batch in (2, 4):
            state.extra = {'at': [epoch, batch]}
            keeper.save_recovery(state, Progress(epoch, batch))
        if epoch < 2 or last:
            state.extra = {'at': [epoch + 1, 0]}
            keeper.save(state, epoch, float(epoch))
    return keeper


def save_one(folder: str, kind: str) -> None:
    state, keeper = make_state(), CheckpointSaver(folder, max_history=1)
    content = find_newest(folder).content
    assert content is not None
    keeper.restore(content)
    state.extra = {'at': ['new']}
    if kind == 'epoch':
        keeper.save(state, 2, 2.)
    else:
        keeper.save_recovery(state, Progress(2, 6))


def states_at_every_call(folder: str, copies: Path, save: Callable[[str], None]) -> list[str]:
    """What a process killed before any call into the system or a file object leaves: copies of the folder, in order.

    The last one is from after the save.
    """
    states: list[str] = []
    seen: list[dict[str, tuple[int, int]]] = []

    def copy() -> None:
        now = {entry.name: (entry.inode(), entry.stat().st_size) for entry in os.scandir(folder)}
        if not seen or now != seen[-1]:
            seen.append(now)
            states.append(str(copies / str(len(states))))
            shutil.copytree(folder, states[-1])

    def before_call(_: Any, event: str, call: Any) -> None:
        if event == 'c_call' and (call.__module__ == 'posix' or hasattr(getattr(call, '__self__', None), 'fileno')):
            copy()

    sys.setprofile(before_call)
    try:
        save(folder)
    finally:
        sys.setprofile(None)
    copy()
    return states


@pytest.mark.parametrize('kind', ['epoch', 'recovery'])
def test_a_process_killed_at_any_call_of_a_save_leaves_the_old_or_the_new_checkpoint(
        tmp_path: Path, kind: str) -> None:
    work = str(tmp_path / 'work')
    os.mkdir(work)
    save_some(work)
    states = states_at_every_call(work, tmp_path, partial(save_one, kind=kind))
    saw = set()
    for folder in states:
        found = find_newest(folder)
        assert found.damaged == () and found.content is not None
        assert found.content['at'] in ([['new']] if folder == states[-1] else [[2, 4], ['new']])
        saw.add(str(found.content['at']))
        kept = [each for each in list_candidates(folder) if read_seal(each) is not None]
        assert len(kept) >= 2 and all(check_seal(each, '') for each in kept)
        keeper = CheckpointSaver(folder, max_history=1)
        keeper.restore(found.content, found.path)
        for name in ('model_best', f'checkpoint-{keeper.best_epoch}'):  # every epoch is better than the one before
            best = torch.load(os.path.join(folder, f'{name}.pth.tar'), weights_only=True)
            assert best['epoch'] == keeper.best_epoch
    assert len(states) > (8 if kind == 'epoch' else 4) and len(saw) == 2


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """Lets no file grow beyond a size in bytes, as a full disk does."""
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, former[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)


@pytest.mark.parametrize('kind', ['epoch', 'recovery'])
@pytest.mark.parametrize('missing', [10 ** 6, 1000, 1], ids=['all', 'some', 'one'])
def test_a_full_disk_leaves_the_old_checkpoints_and_a_clear_error(tmp_path: Path, missing: int, kind: str) -> None:
    save_some(str(tmp_path))
    before = {each: (tmp_path / each).read_bytes() for each in os.listdir(tmp_path)}
    size = len(before['recovery-2-4.pth.tar'])
    with room_for(max(0, size - missing - 100)), pytest.raises(OutputError, match='cannot be written .*too large'):
        save_one(str(tmp_path), kind)
    assert {each: (tmp_path / each).read_bytes() for each in os.listdir(tmp_path)} == before


def test_a_full_disk_ends_a_run_that_can_go_on_later(run_train: Train, load: Load, monkeypatch: pytest.MonkeyPatch,
                                                     ) -> None:
    flags = ['-b', '4', '--recovery-interval', '2', '--experiment']
    whole = run_train(*flags, 'whole')['folder']
    real, calls = seal.torch.save, [0]

    def save(*args: Any) -> None:
        calls[0] += 1
        if calls[0] == 3:
            raise OSError(28, 'No space left on device')
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(seal.torch, 'save', save)
        with pytest.raises(OutputError, match='recovery-0-6.*No space left on device.*free space'):
            run_train(*flags, 'broken')
    again = run_train(*flags, 'broken', '--resume', 'auto')['folder']
    assert unequal(load(whole, 'last.pth.tar'), load(again, 'last.pth.tar')) == []


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b'')


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:  # a bit of a weight, which torch.load would not notice
        entry = next(item for item in archive.infolist() if item.filename.endswith('data/0'))
    place = entry.header_offset + 30 + len(entry.filename) + 200
    data[place] = (data[place] + 1) % 256
    path.write_bytes(data)


def poison(path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(path) + '.executed',)

    torch.save({'epoch': 0, 'state_dict': Evil()}, path)


def poison_and_seal(path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(path) + '.executed',)

    other = path.parent.parent / 'evil'
    save_sealed(str(other), {'epoch': 0, 'state_dict': Evil()}, 99)
    path.write_bytes(other.read_bytes())  # in place, so that all names of the file have it


def spoil_seal(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"serial"', b'"Serial"'))


DAMAGES = [truncate, empty, flip, poison, poison_and_seal, spoil_seal]


@pytest.mark.parametrize('damage', DAMAGES)
def test_damaged_files_are_passed_over_and_named(tmp_path: Path, damage: Callable[[Path], None],
                                                 caplog: pytest.LogCaptureFixture) -> None:
    save_some(str(tmp_path))
    damage(tmp_path / 'recovery-2-4.pth.tar')
    with caplog.at_level(logging.WARNING):
        found = find_newest(str(tmp_path))
    assert found.path.endswith('recovery-2-2.pth.tar') and found.content is not None
    assert found.content['at'] == [2, 2]
    assert [os.path.basename(path) for path in found.damaged] == ['recovery-2-4.pth.tar']
    assert 'recovery-2-4.pth.tar' in caplog.text and 'Falling back to the previous checkpoint' in caplog.text
    damage(tmp_path / 'recovery-2-2.pth.tar')
    found = find_newest(str(tmp_path))
    assert found.path.endswith('last.pth.tar') and found.content is not None and found.content['at'] == [2, 0]
    damage(tmp_path / 'last.pth.tar')  # and the other names of the same file
    found = find_newest(str(tmp_path))
    assert found.path.endswith('previous.pth.tar') and found.content is not None and found.content['at'] == [1, 0]
    for path in tmp_path.iterdir():
        damage(path)
    with pytest.raises(CheckpointError, match='all .* are damaged'):
        find_newest(str(tmp_path))
    assert not [path for path in tmp_path.iterdir() if path.name.endswith('executed')]


def test_torch_does_not_notice_a_flipped_bit(tmp_path: Path) -> None:
    """Control: why there is a seal."""
    path = tmp_path / 'x.pth.tar'
    torch.save({'weight': torch.ones(100)}, path)
    flip(path)
    assert not torch.equal(torch.load(path, weights_only=True)['weight'], torch.ones(100))
    assert check_seal(str(path), '') is None


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(run_train: Train, load: Load,
                                                                caplog: pytest.LogCaptureFixture) -> None:
    flags = ['-b', '4', '--experiment']
    whole = run_train(*flags, 'whole')['folder']
    flags += ['broken', '--recovery-interval', '1', '--resume', 'auto']
    break_off(lambda: run_train(*flags), 4)
    folder = os.path.join(os.path.dirname(whole), 'broken')
    truncate(Path(folder) / 'recovery-0-4.pth.tar')
    with caplog.at_level(logging.INFO):
        break_off(lambda: run_train(*flags), 1)
    assert 'recovery-0-4.pth.tar' in caplog.text and 'continuing at batch 3 of epoch 0' in caplog.text
    assert {name for name in os.listdir(folder) if name.startswith('recovery')} == {
        'recovery-0-3.pth.tar', 'recovery-0-4.pth.tar', 'recovery-0-4.pth.tar.damaged'}
    run_train(*flags)
    assert unequal(load(whole, 'last.pth.tar'), load(folder, 'last.pth.tar')) == []
    assert rows(whole) == rows(folder)


def test_an_explicit_damaged_file_is_an_error(run_train: Train) -> None:
    folder = run_train('--experiment', 'x', '--epochs', '1')['folder']
    flip(Path(folder) / 'last.pth.tar')
    with pytest.raises(CheckpointError, match='--resume .*last.pth.tar.* is damaged .*hash'):
        run_train('--experiment', 'y', '--resume', os.path.join(folder, 'last.pth.tar'))


def test_a_newer_schema_is_an_error_and_nothing_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_some(str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(seal, 'SCHEMA', 2)
        save_one(str(tmp_path), 'recovery')
    with pytest.raises(CheckpointVersionError, match='recovery-2-6.*schema version 2, .* up to 1: upgrade') as caught:
        find_newest(str(tmp_path))
    assert isinstance(caught.value, CheckpointError)


def test_a_seal_holds_hash_schema_and_serial_and_leaves_the_archive_readable(tmp_path: Path) -> None:
    path = str(tmp_path / 'x.pth.tar')
    weights = {'weight': torch.arange(5.)}
    save_sealed(path, {'state_dict': weights}, 7)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        comment = archive.comment
    assert set(json.loads(comment[comment.index(b'{'):])) == {'sha256', 'schema', 'serial'}
    found = check_seal(path, '--resume')
    assert found is not None and (found.schema, found.serial, len(found.sha256)) == (1, 7, 64)
    for mmap in (False, True):
        assert torch.equal(torch.load(path, weights_only=True, mmap=mmap)['state_dict']['weight'], weights['weight'])
    assert torch.equal(load_state_dict(path, use_ema=False)['weight'], weights['weight'])


def test_large_files_are_hashed_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seal, '_CHUNK', 1000)
    path = str(tmp_path / 'x.pth.tar')
    save_sealed(path, {'weight': torch.arange(5000.)}, 1)
    assert check_seal(path, '') is not None


def test_the_newest_is_known_by_its_serial_number_not_by_name_or_time(tmp_path: Path) -> None:
    save_some(str(tmp_path), last=True)
    assert find_newest(str(tmp_path)).path.endswith('last.pth.tar')
    content = torch.load(tmp_path / 'checkpoint-2.pth.tar', weights_only=True)
    keeper, state = CheckpointSaver(str(tmp_path), max_history=1), make_state()
    keeper.restore(content)
    state.extra = {'at': 'again'}  # an earlier epoch once more
    path = keeper.save_recovery(state, Progress(1, 4))
    os.utime(path, (0, 0))
    assert find_newest(str(tmp_path)).path == path


def test_an_unsealed_run_of_timm_is_resumed_from_last(tmp_path: Path) -> None:
    torch.save({'epoch': 3, 'version': 2, 'state_dict': {}}, tmp_path / 'last.pth.tar')
    torch.save({'epoch': 4, 'version': 2, 'state_dict': {}}, tmp_path / 'checkpoint-4.pth.tar')
    assert find_newest(str(tmp_path)).path.endswith('last.pth.tar')


def test_without_hard_links_there_are_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(1, 'Operation not permitted')

    monkeypatch.setattr(os, 'link', refuse)
    save_some(str(tmp_path), last=True)
    for name, at in (('last', [3, 0]), ('previous', [2, 0]), ('model_best', [3, 0])):
        assert torch.load(tmp_path / f'{name}.pth.tar', weights_only=True)['at'] == at
    assert find_newest(str(tmp_path)).path.endswith('last.pth.tar')


def test_damaged_files_that_cannot_be_renamed_are_reported(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    with caplog.at_level(logging.WARNING):
        resume.set_aside((str(tmp_path / 'gone.pth.tar'),))
    assert 'gone.pth.tar cannot be renamed' in caplog.text
