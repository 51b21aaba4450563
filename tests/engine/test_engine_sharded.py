"""Runs with checkpoints in parts: each process writes what it holds; equal to whole ones bit for bit."""
import argparse
import json
import logging
import os
import pathlib
import random
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from divided_tools import in_processes, prepare
from port_tools import free_port
from resume_tools import break_off, flatten, rows, unequal
from shard_tools import alter, reseal
from torch.distributed.tensor import DTensor

from benchmarks.kill_test import Run, compare_checkpoints, compare_runs, run_killed
from cpool_vision.cli import consolidate as command
from cpool_vision.engine.checkpoints import parts
from cpool_vision.engine.checkpoints.checkpoint import open_checkpoint, read_checkpoint
from cpool_vision.engine.checkpoints.checkpointer import Checkpointer
from cpool_vision.engine.checkpoints.consolidate import consolidate
from cpool_vision.engine.checkpoints.folder_store import FolderStore
from cpool_vision.engine.checkpoints.parts import StoredTensor
from cpool_vision.engine.checkpoints.resume import find_newest
from cpool_vision.engine.checkpoints.saver import CheckpointSaver
from cpool_vision.engine.checkpoints.seal import read_seal, save_sealed
from cpool_vision.engine.errors import CheckpointError, ConfigError
from cpool_vision.engine.flags import args_train
from cpool_vision.engine.flags.config import parse_args
from cpool_vision.engine.processes.vote import exchange_rows, share_text
from cpool_vision.engine.training.train_loop import train_one_epoch
from cpool_vision.engine.training.train_run import train

FRESH_PROCESS = True
CPU = torch.device('cpu')
def save_run(run: Any, state: Any, folder: str, rank: int, count: int) -> Checkpointer:
    store = FolderStore(folder, rank, count, lambda row: exchange_rows(row, CPU, True))
    saver = CheckpointSaver(folder, 2, store=store) if rank == 0 else None
    run.args.distributed = True
    return Checkpointer(run, state, saver, 1, store)


def no_gathering(patch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError('a tensor was made whole')

    patch.setattr(DTensor, 'full_tensor', refuse)
    patch.setattr(DTensor, 'redistribute', refuse)


def test_no_process_holds_or_writes_more_than_its_part(tmp_path: pathlib.Path) -> None:
    def work(rank: int) -> dict[str, Any]:
        run, state = prepare(True, seed=0, distributed=False, batch_size=4, workers=0, world_size=2)
        run.args.rank = rank
        train_one_epoch(run, 0, 2)
        keeper = save_run(run, state, str(tmp_path), rank, 2)
        mine = [value for value in flatten(state.tensors()).values() if isinstance(value, DTensor)]
        largest, exchanged = [0], [0]
        with pytest.MonkeyPatch.context() as patch:
            no_gathering(patch)
            real, real_gather = parts.HashedFile.write, dist.all_gather

            def write(self: Any, data: Any) -> int:
                if not isinstance(data, bytes):  # such as the header
                    largest[0] = max(largest[0], data.nbytes)
                return real(self, data)

            def all_gather(out: Any, given: torch.Tensor) -> None:
                exchanged[0] = max(exchanged[0], given.nbytes)
                real_gather(out, given)

            patch.setattr(parts.HashedFile, 'write', write)
            patch.setattr(dist, 'all_gather', all_gather)
            keeper.after_epoch(1., True)
        state.gather(keep=True)
        content = state.to_checkpoint(0)
        whole = {name: content[name] for name in ('epoch', 'optimizer', 'state_dict', 'state_dict_ema')}
        if rank == 0:
            save_sealed(str(tmp_path / 'whole.pth.tar'), whole, 1)
        return {'divided': sum(value.to_local().nbytes for value in mine),
                'longest': max(value.to_local().nbytes for value in mine), 'largest': largest[0],
                'exchanged': exchanged[0]}

    sides = in_processes(2, tmp_path, work)
    whole = torch.load(tmp_path / 'whole.pth.tar', weights_only=True)
    ours = read_checkpoint(str(tmp_path / 'last.sharded'), '')
    assert unequal(whole, {name: ours[name] for name in whole}) == [] and len(flatten(whole)) > 60
    total = sum(value.nbytes for value in flatten(whole).values() if isinstance(value, torch.Tensor))
    row = ours['processes'].nbytes // 2
    undivided = total - sum(side['divided'] for side in sides)
    assert 0 < undivided < 0.2 * total
    for rank, side in enumerate(sides):
        part = safetensors.torch.load_file(tmp_path / 'last.sharded' / f'part-{rank:05d}-of-00002.safetensors')
        assert sum(value.nbytes for value in part.values()) == side['divided'] + row + (undivided if rank == 0 else 0)
        assert side['largest'] <= max(side['longest'], row) and side['exchanged'] == 7 * 8
    index = json.loads((tmp_path / 'last.sharded' / 'index.json').read_text())['content']
    assert sum(entry['dim'] == 0 for entry in index['tensors'].values()) > 40


def test_the_count_sees_gathering(tmp_path: pathlib.Path) -> None:
    """Control: that is what whole checkpoints do."""
    def work(rank: int) -> str:
        _, state = prepare(True)
        with pytest.MonkeyPatch.context() as patch:
            no_gathering(patch)
            try:
                state.gather(keep=rank == 0)
            except AssertionError as error:
                return str(error)
        return ''

    assert in_processes(2, tmp_path, work) == ['a tensor was made whole'] * 2


FLAGS = [
    '--model', 'vit_micro_cpool_patch4_32', '--model-kwargs', 'depth=2', '--dataset', 'cpool/shapes', '--num-classes',
    '10', '--train-num-samples', '48', '--val-num-samples', '6', '-b', '4', '-j', '0', '--grad-accum-steps', '2',
    '--epochs', '2', '--warmup-epochs', '0', '--opt', 'adamw', '--lr', '1e-3', '--drop', '0.1', '--model-ema',
    '--model-ema-decay', '0.9', '--device', 'cpu', '--no-tensorboard', '--recovery-interval', '1']
FSDP = ['--fsdp']
SHARDED = [*FSDP, '--checkpoint-format', 'sharded']


def train_by(count: int, folder: pathlib.Path, *flags: str, crash: int = 0, log: bool = False) -> list[str]:
    """Trains in so many processes, up to a crash after an update if one is asked for; gives what each logs."""
    port = free_port()

    def work(rank: int) -> str:
        os.environ.update({'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port)})
        args = parse_args(args_train.build_parser, [*FLAGS, '--output', str(folder), *flags])
        lines: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger('cpool_vision').addHandler(handler)
        logging.getLogger('cpool_vision').setLevel(logging.INFO)
        if crash:
            break_off(lambda: train(args), crash)
        else:
            train(args)
        return '\n'.join(lines)

    return in_processes(count, folder, work, group=False)


@pytest.fixture(scope='module')
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Two processes that nothing disturbs, with whole checkpoints."""
    folder = tmp_path_factory.mktemp('whole')
    train_by(2, folder, *FSDP, '--experiment', 'whole')
    return folder / 'whole'


@pytest.fixture(scope='module')
def broken_run(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Two processes that crash inside the second epoch, with checkpoints in parts."""
    folder = tmp_path_factory.mktemp('broken')
    train_by(2, folder, *SHARDED, '--experiment', 'x', crash=5)
    assert sorted(each.name for each in (folder / 'x').glob('*.sharded')) == [
        'checkpoint-0.sharded', 'last.sharded', 'model_best.sharded', 'recovery-1-2.sharded', 'recovery-1-4.sharded']
    return folder / 'x'


def copy_run(run: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(run, folder / 'x', symlinks=True))


def test_a_run_that_breaks_off_and_goes_on_in_parts_ends_as_one_with_whole_checkpoints(
        whole_run: pathlib.Path, broken_run: pathlib.Path, tmp_path: pathlib.Path) -> None:
    run = copy_run(broken_run, tmp_path)
    logs = train_by(2, tmp_path, *SHARDED, '--experiment', 'x', '--resume', 'auto')
    assert 'recovery-1-4.sharded: batch 4 of epoch 1 comes next' in logs[0]
    assert compare_runs(whole_run, run) == [] and rows(str(whole_run)) == rows(str(run))
    consolidate(str(run / 'last.sharded'), str(tmp_path / 'last.pth.tar'))
    count, wrong = compare_checkpoints(whole_run / 'last.pth.tar', tmp_path / 'last.pth.tar')
    assert wrong == [] and count > 100
    assert sorted(each.name for each in run.glob('shards-*')) == sorted({
        os.readlink(each) for each in run.iterdir() if each.is_symlink()})
    assert not list(run.glob('*.pth.tar')) and not list(run.glob('.*'))


def without_optimizer(run: pathlib.Path) -> None:
    """Control: takes the state of the optimizer out of the newest checkpoint, and seals it again."""
    def change(index: dict[str, Any]) -> None:
        for name in [name for name in index['tensors'] if name.startswith('optimizer/')]:
            del index['tensors'][name]
        del index['state']['optimizer']

    reseal(run / 'recovery-1-4.sharded', change)


def test_the_comparison_sees_a_lost_state_of_the_optimizer(
        whole_run: pathlib.Path, broken_run: pathlib.Path, tmp_path: pathlib.Path) -> None:
    run = copy_run(broken_run, tmp_path)
    without_optimizer(run)
    logs = train_by(2, tmp_path, *SHARDED, '--experiment', 'x', '--resume', 'auto')
    assert 'has no optimizer state' in logs[0]
    assert any(name.startswith('last.pth.tar .state_dict.') for name in compare_runs(whole_run, run))


def test_both_processes_go_back_when_one_finds_a_damaged_part(
        whole_run: pathlib.Path, broken_run: pathlib.Path, tmp_path: pathlib.Path) -> None:
    run = copy_run(broken_run, tmp_path)
    alter(run / 'recovery-1-4.sharded' / 'part-00001-of-00002.safetensors')
    logs = train_by(2, tmp_path, *SHARDED, '--experiment', 'x', '--resume', 'auto')
    assert 'part-00001-of-00002.safetensors does not have the hash' in logs[1]
    assert 'recovery-1-4.sharded\' cannot be read by another process' in logs[0]
    assert 'recovery-1-2.sharded: batch 2 of epoch 1 comes next' in logs[0]
    assert (run / 'recovery-1-4.sharded.damaged').is_symlink() and compare_runs(whole_run, run) == []


@pytest.mark.parametrize('count, flags', [pytest.param(3, SHARDED, marks=pytest.mark.slow), (1, [])])
def test_other_numbers_of_processes_go_on_from_the_end_of_an_epoch_as_from_a_whole_file(
        broken_run: pathlib.Path, tmp_path: pathlib.Path, count: int, flags: list[str]) -> None:
    start = {'parts': str(broken_run / 'last.sharded'), 'whole': str(tmp_path / 'last.pth.tar')}
    consolidate(start['parts'], start['whole'])
    for name, path in start.items():
        train_by(count, tmp_path, *flags, '--experiment', name, '--resume', path)
    assert compare_runs(tmp_path / 'parts', tmp_path / 'whole') == []


def test_inside_an_epoch_another_number_of_processes_is_refused(broken_run: pathlib.Path, tmp_path: pathlib.Path,
                                                                ) -> None:
    path = str(broken_run / 'recovery-1-4.sharded')
    with pytest.raises(AssertionError, match='inside an epoch, .* number of processes 2, now 3'):
        train_by(3, tmp_path, *SHARDED, '--experiment', 'y', '--resume', path)


def test_a_part_is_read_by_the_process_that_needs_it(tmp_path: pathlib.Path) -> None:
    """Three processes go on from what two wrote, and read no more than their slices."""
    def save(rank: int) -> None:
        run, state = prepare(True, seed=0, distributed=False, batch_size=4, workers=0, world_size=2)
        run.args.rank = rank
        train_one_epoch(run, 0, 2)
        save_run(run, state, str(tmp_path), rank, 2).after_epoch(1., True)

    def load(rank: int) -> tuple[int, int, list[str]]:
        read = [0]
        real = StoredTensor._fetch

        def fetch(self: Any, *args: Any) -> torch.Tensor:
            found = real(self, *args)
            read[0] += found.nbytes
            return found

        _, state = prepare(True)
        content = open_checkpoint(str(tmp_path / 'last.sharded'), '', rank, 3)
        with pytest.MonkeyPatch.context() as patch:
            no_gathering(patch)
            patch.setattr(StoredTensor, '_fetch', fetch)
            assert state.load_checkpoint(content, 'last.sharded') == 1
            state.load_ema(content, 'last.sharded')
        mine = [value for value in flatten(state.tensors()).values() if isinstance(value, DTensor)]
        held = sum(value.to_local().nbytes for value in mine)
        state.gather(keep=True)
        saved = read_checkpoint(str(tmp_path / 'last.sharded'), '')
        names = ('optimizer', 'state_dict', 'state_dict_ema')
        whole = state.to_checkpoint(0)
        return read[0], held, unequal({name: saved[name] for name in names}, {name: whole[name] for name in names})

    in_processes(2, tmp_path, save)
    for read, held, wrong in in_processes(3, tmp_path, load):
        assert wrong == [] and held <= read < 1.3 * held  # and what is not divided


def test_consolidated_files(broken_run: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str],
                            ) -> None:
    source, whole = str(broken_run / 'last.sharded'), read_checkpoint(str(broken_run / 'last.sharded'), '')
    path = str(tmp_path / 'x.pth.tar')
    assert command.main([source, '-o', path]) == 0 and capsys.readouterr().out == path + '\n'
    assert unequal(whole, read_checkpoint(path, ''), ()) == [] and read_seal(path).serial == read_seal(source).serial
    for flags, key in (([], 'state_dict'), (['--use-ema'], 'state_dict_ema')):
        path = str(tmp_path / f'{key}.safetensors')
        assert command.main([source, '-o', path, *flags]) == 0
        assert unequal(whole[key], safetensors.torch.load_file(path)) == []
        assert unequal(whole['state_dict_ema' if key == 'state_dict' else 'state_dict'],
                       safetensors.torch.load_file(path)) != []  # control
    assert command.main([source, '-o', path]) == 2 and 'pass --force' in capsys.readouterr().err
    assert command.main([source, '-o', path, '--force']) == 0
    for output, words in (('x.bin', 'suffix must be'), ('y.pth', 'drop it, or write .safetensors')):
        with pytest.raises(ConfigError, match=words):
            consolidate(source, str(tmp_path / output), use_ema=True)
    with pytest.raises(CheckpointError, match='none.*check|no checkpoint|does not exist'):
        consolidate(str(tmp_path / 'none'), str(tmp_path / 'z.pth'))


def test_a_checkpoint_in_parts_is_validated_and_starts_another_run(
        broken_run: pathlib.Path, tmp_path: pathlib.Path, validate_args: Callable[..., argparse.Namespace]) -> None:
    from cpool_vision.engine.model import create_train_model
    from cpool_vision.engine.validation.bulk import plan, run_validation

    source = str(broken_run / 'model_best.sharded')
    consolidate(source, str(tmp_path / 'best.pth.tar'))
    common = [*FLAGS[:8], '--num-samples', '20', '-b', '5', '-j', '0', '--device', 'cpu', '--use-ema', '--checkpoint']
    results: list[Any] = [run_validation(validate_args(*common, path))
                          for path in (source, str(tmp_path / 'best.pth.tar'))]
    assert results[0]['top1'] == results[1]['top1'] and results[0]['loss'] == results[1]['loss']
    jobs = plan(validate_args('--checkpoint', str(broken_run), *FLAGS[:4]))
    assert jobs is not None and (FLAGS[1], source) in jobs and len(jobs) == 5

    args = parse_args(args_train.build_parser, [*FLAGS, '--initial-checkpoint', source])
    model, whole = create_train_model(args), read_checkpoint(source, '')
    assert unequal(dict(model.state_dict()), whole['state_dict_ema']) == []
    assert unequal(dict(model.state_dict()), whole['state_dict']) != []


def test_the_form_may_change_in_the_middle_of_a_run(
        whole_run: pathlib.Path, broken_run: pathlib.Path, tmp_path: pathlib.Path) -> None:
    run = copy_run(broken_run, tmp_path)
    train_by(2, tmp_path, *FSDP, '--experiment', 'x', '--resume', 'auto')
    assert compare_checkpoints(whole_run / 'last.pth.tar', run / 'last.pth.tar')[1] == []
    assert find_newest(str(run)).path.endswith('last.pth.tar') and not list(run.glob('recovery-*.sharded'))
    assert {each.name for each in run.glob('shards-*')} == {os.readlink(each) for each in run.glob('*.sharded')}


def test_parts_without_fsdp_are_refused(train_args: Callable[..., argparse.Namespace]) -> None:
    from cpool_vision.engine.processes.sharding import check_fsdp
    with pytest.raises(ConfigError, match='--checkpoint-format sharded .* add --fsdp, or drop it'):
        check_fsdp(train_args(*SHARDED[1:]))


def test_a_text_is_shared_and_numbers_are_compared(tmp_path: pathlib.Path) -> None:
    from cpool_vision.engine.processes.vote import agree_on_number

    def work(rank: int) -> tuple[str, bool, bool, list[list[int]]]:
        return (share_text('näme' if rank == 0 else 'a longer one', CPU, True), agree_on_number(2 ** 62, CPU, True),
                agree_on_number(rank, CPU, True), exchange_rows([rank, -2 ** 63], CPU, True))

    assert in_processes(2, tmp_path, work) == [('näme', True, False, [[0, -2 ** 63], [1, -2 ** 63]])] * 2
    assert share_text('x', CPU, False) == 'x' and exchange_rows([1], CPU, False) == [[1]]


@pytest.mark.slow
@pytest.mark.parametrize('seed', range(2))
def test_two_processes_killed_at_random_instants_end_as_with_whole_checkpoints(tmp_path: pathlib.Path, seed: int,
                                                                               ) -> None:
    flags = [*FLAGS, '--epochs', '4', '--train-num-samples', '96']
    whole, run = Run(tmp_path, 'whole', [*flags, *FSDP], 2), Run(tmp_path, 'parts', [*flags, *SHARDED], 2)
    whole.finish()
    # over part of the time only, as a machine with other work may be faster the second time
    assert run_killed(run, 4, 0.6 * whole.seconds(), random.Random(40 + seed)) == 4  # noqa: S311
    assert compare_runs(whole.folder, run.folder) == []
    assert not list(run.folder.glob('.*'))
