"""Folders of parts: what is in them, saves that break off, and damage that is found."""
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import safetensors.torch
import torch
from divided_tools import in_threads
from resume_tools import die_at_every_call, watch_calls
from shard_tools import SOME, alter, cut, divided, link, lose, reseal, save_one, save_steps, whole_tensors

from cpool_vision.engine.checkpoints import folder_store, parts, seal
from cpool_vision.engine.checkpoints.checkpoint import open_checkpoint, read_checkpoint
from cpool_vision.engine.checkpoints.folder_index import open_folder
from cpool_vision.engine.checkpoints.folder_store import FolderStore
from cpool_vision.engine.checkpoints.parts import Part, StoredTensor
from cpool_vision.engine.checkpoints.resume import find_newest, list_candidates
from cpool_vision.engine.checkpoints.saver import CheckpointSaver
from cpool_vision.engine.checkpoints.seal import read_seal
from cpool_vision.engine.errors import CheckpointError, CheckpointVersionError, OutputError


@pytest.mark.parametrize('count', [1, 2, 3, 7])
def test_parts_make_up_the_whole_bit_for_bit(tmp_path: pathlib.Path, count: int) -> None:
    content = read_checkpoint(save_one(str(tmp_path), count), '')
    assert (content['epoch'], content['at'], content['metric']) == (0, [0, 0], 0.)
    for name, tensor in whole_tensors().items():
        assert torch.equal(content[name], tensor) and content[name].dtype == tensor.dtype
    assert list(content['whole']) == [0, 'x.y'] and content['whole'][0].item() == 2.5
    assert content['whole']['x.y'].view(torch.int32).tolist() == [[2143289344, -2147483648]]


@pytest.mark.parametrize('count', [1, 3])
def test_any_slice_is_read_from_the_parts_it_lies_in(tmp_path: pathlib.Path, count: int,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    content = open_checkpoint(save_one(str(tmp_path), count), '')
    for name, tensor in whole_tensors().items():
        stored = content[name]
        assert isinstance(stored, StoredTensor) and (stored.shape, stored.dtype) == (tensor.shape, tensor.dtype)
        for dim in range(tensor.ndim):
            for start in range(tensor.shape[dim] + 1):
                for length in range(tensor.shape[dim] - start + 1):
                    assert torch.equal(stored.narrow(dim, start, length), tensor.narrow(dim, start, length))
    opened: list[int] = []
    real = StoredTensor._fetch
    monkeypatch.setattr(StoredTensor, '_fetch', lambda self, index, *rest: opened.append(index) or real(
        self, index, *rest))
    content['a'].narrow(0, 0, 1)
    assert opened == [0]


def test_a_part_is_an_ordinary_safetensors_file_that_holds_this_part_only(tmp_path: pathlib.Path) -> None:
    path = pathlib.Path(save_one(str(tmp_path), 2))
    assert sorted(each.name for each in path.iterdir()) == [
        'index.json', 'part-00000-of-00002.safetensors', 'part-00001-of-00002.safetensors']
    first, second = (safetensors.torch.load_file(path / f'part-{rank:05d}-of-00002.safetensors') for rank in range(2))
    for rank, found in enumerate((first, second)):
        for name, part in divided(rank, 2).items():
            if isinstance(part, Part) and part.local.numel():
                assert torch.equal(found[name], part.local)
            else:
                assert name not in found
    assert set(first) - set(second) == {'whole/0', 'whole/x.y', 'c'}
    index = json.loads((path / 'index.json').read_text())
    assert index['content']['tensors']['a'] == {'shape': [5, 3], 'dtype': 'F32', 'dim': 0, 'offsets': [0, 3, 5]}
    assert set(index['seal']) == {'sha256', 'schema', 'serial'}


@pytest.mark.parametrize('damage', [cut, alter, lose, link])
@pytest.mark.parametrize('name', ['index.json', 'part-00000-of-00002.safetensors', 'part-00001-of-00002.safetensors'])
def test_the_checkpoint_before_a_damaged_one_is_taken(tmp_path: pathlib.Path, name: str, damage: Callable[..., None],
                                                      caplog: pytest.LogCaptureFixture) -> None:
    save_steps(str(tmp_path), SOME)
    assert find_newest(str(tmp_path)).path.endswith('recovery-2-4.sharded')
    damage(tmp_path / 'recovery-2-4.sharded' / name)
    with caplog.at_level(logging.WARNING):
        found = find_newest(str(tmp_path))
    assert found.path.endswith('recovery-2-2.sharded') and found.content is not None and found.content['at'] == [2, 2]
    assert [os.path.basename(each) for each in found.damaged] == ['recovery-2-4.sharded']
    assert 'recovery-2-4.sharded' in caplog.text and 'Going back to the one before' in caplog.text
    damage(tmp_path / 'recovery-2-2.sharded' / name)
    found = find_newest(str(tmp_path))
    assert found.path.endswith('last.sharded') and found.content is not None and found.content['at'] == [1, 4]


def test_parts_in_each_others_places_are_refused(tmp_path: pathlib.Path) -> None:
    path = pathlib.Path(save_one(str(tmp_path), 2))
    one, two = (path / f'part-{rank:05d}-of-00002.safetensors' for rank in range(2))
    one.rename(path / 'other')
    two.rename(one)
    (path / 'other').rename(two)
    with pytest.raises(CheckpointError, match=r'last.sharded.* is damaged .*part-00000-of-00002.*: use another'):
        read_checkpoint(str(path), '--resume')


def swap(index: dict[str, Any]) -> None:
    one, two = index['files']
    for key in ('bytes', 'sha256'):
        one[key], two[key] = two[key], one[key]


def test_parts_in_each_others_places_are_refused_also_with_hashes_to_match(tmp_path: pathlib.Path) -> None:
    """Of equal shapes only the header of the file tells."""
    def work(rank: int, exchange: Any) -> None:
        store = FolderStore(str(tmp_path), rank, 2, exchange)
        tree = store.stage({'a': Part(torch.full((2,), rank), (4,), 0, (0, 2, 4))})
        if rank == 0:
            store.write(str(tmp_path / 'last.sharded'), tree, 1)

    in_threads(2, work)
    path = tmp_path / 'last.sharded'
    assert read_checkpoint(str(path), '')['a'].tolist() == [0, 0, 1, 1]
    files = [path / f'part-{rank:05d}-of-00002.safetensors' for rank in range(2)]
    contents = [file.read_bytes() for file in files]
    for file, content in zip(files, reversed(contents), strict=True):
        file.write_bytes(content)
    reseal(path, swap)
    with pytest.raises(CheckpointError, match="holds part '2 of 2', expected '1 of 2'"):
        read_checkpoint(str(path), '--resume')


def test_a_newer_schema_is_an_error_and_nothing_is_passed_over(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch,
                                                               ) -> None:
    save_steps(str(tmp_path), SOME)
    with monkeypatch.context() as patch:
        patch.setattr(seal, 'SCHEMA', 2)
        save_steps(str(tmp_path), [('recovery', 2, 6)], fresh=False)
    with pytest.raises(CheckpointVersionError, match='schema version 2, .* up to 1: upgrade'):
        find_newest(str(tmp_path))


CALLS = ('mkdir', 'fsync', 'rename', 'replace', 'symlink', 'remove')


def count_calls(patch: pytest.MonkeyPatch, act: Callable[[str], None]) -> None:
    """Lets `act` happen before each call that changes a file, with the name of the call."""
    watch_calls(
        patch, act, *((os, name) for name in CALLS), (parts.HashedFile, 'write'), (folder_store.shutil, 'rmtree'),
        (folder_store, 'seal_json'))


@pytest.mark.parametrize('kind', ['epoch', 'recovery'])
def test_processes_that_die_at_any_call_of_a_save_leave_the_old_or_the_new_checkpoint(
        tmp_path: pathlib.Path, kind: str) -> None:
    start = str(tmp_path / 'start')
    os.mkdir(start)
    save_steps(start, SOME)
    died, saw = 0, set()
    for folder, done in die_at_every_call(
            tmp_path, start, count_calls, lambda folder: save_steps(folder, [(kind, 2, 6)], fresh=False)):
        found = find_newest(folder)
        assert found.damaged == () and found.content is not None
        assert found.content['at'] in ([[2, 6]] if done else [[2, 4], [2, 6]])
        saw.add(str(found.content['at']))
        for path in pathlib.Path(folder).iterdir():  # a folder under its name is complete
            assert path.name.startswith('.') or open_folder(str(path), '')['version'] == 2
        kept = [each for each in list_candidates(folder) if read_seal(each) is not None]
        assert len(kept) >= 2
        for _ in range(2):  # the run goes on, and tidies up
            saver = CheckpointSaver(folder, 1, store=FolderStore(folder, 0, 1, lambda row: [list(row)]))
            saver.restore(find_newest(folder).content or {}, found.path)
            best = read_checkpoint(os.path.join(folder, 'model_best.sharded'), '')
            assert best['epoch'] == saver.best_epoch
        died += not done
    assert died > 15 and len(saw) == 2


@pytest.mark.parametrize('name', ['mkdir', 'write', 'fsync', 'rename', 'symlink', 'replace'])
def test_a_full_disk_leaves_the_old_checkpoints_and_a_clear_error(tmp_path: pathlib.Path, name: str,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    save_steps(str(tmp_path), SOME)
    links = {each: os.readlink(each) for each in tmp_path.iterdir() if each.is_symlink()}

    def act(called: str) -> None:
        if called == name:
            raise OSError(28, 'No space left on device')

    with monkeypatch.context() as patch:
        count_calls(patch, act)
        with pytest.raises(OutputError, match='No space left on device'):
            save_steps(str(tmp_path), [('recovery', 2, 6)], fresh=False)
    assert {each: os.readlink(each) for each in tmp_path.iterdir() if each.is_symlink()} == links
    found = find_newest(str(tmp_path))
    assert found.damaged == () and found.path.endswith('recovery-2-4.sharded')
    assert [each.name for each in tmp_path.iterdir() if each.name.startswith('.')] == []
    save_steps(str(tmp_path), [('recovery', 2, 6)], fresh=False)
    assert find_newest(str(tmp_path)).path.endswith('recovery-2-6.sharded')
    assert len(list(tmp_path.glob('shards-*'))) == len({os.path.realpath(each) for each in links})


def test_a_process_that_cannot_write_stops_all_and_says_so(tmp_path: pathlib.Path) -> None:
    """The second one sees another folder, of a file system that is not shared."""
    def work(rank: int, exchange: Any) -> str:
        store = FolderStore(str(tmp_path / ('none' if rank else '')), rank, 2, exchange)
        try:
            store.stage(divided(rank, 2))
        except OutputError as error:
            return str(error)
        return ''

    first, second = in_threads(2, work)
    assert 'another process cannot write' in first and "none' (No such file" in second
    assert list(tmp_path.iterdir()) == []


def test_parts_that_lie_elsewhere_are_noticed(tmp_path: pathlib.Path) -> None:
    (tmp_path / 'other' / '.shards.tmp').mkdir(parents=True)

    def work(rank: int, exchange: Any) -> str:
        store = FolderStore(str(tmp_path / ('other' if rank else '')), rank, 2, exchange)
        tree = store.stage(divided(rank, 2))
        if rank == 0:
            with pytest.raises(OutputError, match='part-00001.*a folder that all of them share'):
                store.write(str(tmp_path / 'last.sharded'), tree, 1)
        return ''

    in_threads(2, work)
    assert [each.name for each in tmp_path.iterdir()] == ['other']


def test_processes_with_other_tensors_are_noticed(tmp_path: pathlib.Path) -> None:
    def work(rank: int, exchange: Any) -> None:
        FolderStore(str(tmp_path), rank, 2, exchange).stage({'a': torch.zeros(2 + rank)})

    with pytest.raises(OutputError, match='do not hold parts of the same tensors'):
        in_threads(2, work)


def test_folders_without_a_name_are_removed_and_no_others(tmp_path: pathlib.Path) -> None:
    save_steps(str(tmp_path), SOME)
    names = sorted(each.name for each in tmp_path.iterdir())
    assert names == ['checkpoint-1.sharded', 'last.sharded', 'model_best.sharded', 'previous.sharded',
                     'recovery-2-2.sharded', 'recovery-2-4.sharded', 'shards-2', 'shards-4', 'shards-5', 'shards-6']
    assert os.readlink(tmp_path / 'last.sharded') == os.readlink(tmp_path / 'model_best.sharded') == 'shards-4'
    (tmp_path / 'kept.sharded').symlink_to('shards-5')
    (tmp_path / 'shards-mine').mkdir()
    save_steps(str(tmp_path), [('recovery', 2, 6), ('recovery', 2, 8), ('epoch', 2, 10)], fresh=False)
    assert {each.name for each in tmp_path.glob('shards-*')} == {
        'shards-mine', 'shards-5', 'shards-4', 'shards-8', 'shards-9'}
    assert find_newest(str(tmp_path)).path.endswith('last.sharded')


def test_a_link_without_its_folder_is_damaged(tmp_path: pathlib.Path) -> None:
    save_steps(str(tmp_path), SOME)
    shutil.rmtree(tmp_path / 'shards-6')
    found = find_newest(str(tmp_path))
    assert found.path.endswith('recovery-2-2.sharded') and len(found.damaged) == 1
