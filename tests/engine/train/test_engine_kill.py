"""Real processes that are killed, and runs over several processes."""
import json
import os
import pathlib
import random
import shutil
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
from process_tools import CRASH, start_apart, torchrun

from benchmarks import kill_campaign, kill_test
from benchmarks.kill_test import Run, compare_checkpoints, compare_runs, descendants, run_killed

FLAGS = [
    '--model', 'test_resnet', '--img-size', '32', '--epochs', '3', '--warmup-epochs', '1', '--opt', 'adamw', '--lr',
    '1e-2', '--drop', '0.2', '--model-ema', '--model-ema-decay', '0.9', '--mixup', '0.2', '--cutmix', '1', '--reprob',
    '0.5', '--aa', 'rand-m5-mstd0.5', '--grad-accum-steps', '3', '--clip-grad', '1', '--sched-on-updates', '--device',
    'cpu', '--recovery-interval', '1', '--log-interval', '1000']
SHAPES = ['--dataset', 'cpool/shapes', '--num-classes', '10', '--val-num-samples', '15', '--train-num-samples']
KINDS = {1: [*FLAGS, *SHAPES, '128', '-b', '4', '-j', '2'], 2: [*FLAGS, *SHAPES, '176', '-b', '4', '-j', '1'],
         3: [*FLAGS, *SHAPES, '180', '-b', '4', '-j', '1']}


@pytest.fixture(scope='module', autouse=True)
def one_thread_each() -> Any:
    """Subprocesses share two cores."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('OMP_NUM_THREADS', '1')
        yield


class Served(Run):
    """A run of a single process, from a server that has imported what it needs."""

    def _spawn(self, flags: list[str]) -> Any:
        return kill_campaign._Forked(start_apart(kill_campaign._train, flags, self.log, {}, output=self.log))


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Run]:
    """The finished run of so many processes that no one killed."""
    runs: dict[int, Run] = {}

    def get(nproc: int) -> Run:
        if nproc not in runs:
            kind = Served if nproc == 1 else Run
            runs[nproc] = kind(tmp_path_factory.mktemp('whole'), 'whole', KINDS[nproc], nproc)
            runs[nproc].finish()
        return runs[nproc]

    return get


def check_kills(whole: Run, output: pathlib.Path, kills: int, seed: int) -> None:
    killed = type(whole)(output, 'killed', whole.flags, whole.nproc)
    # early enough that a machine which is less busy by then has not finished the run before
    assert run_killed(killed, kills, whole.seconds() / 3, random.Random(seed))  # noqa: S311
    assert compare_runs(whole.folder, killed.folder) == []
    assert len(list(killed.folder.glob('.*'))) == 0


def test_kills_at_random_instants_change_nothing(undisturbed: Callable[[int], Run], tmp_path: pathlib.Path) -> None:
    check_kills(undisturbed(1), tmp_path, 2, seed=1)


@pytest.mark.slow
def test_three_processes_killed_at_random_instants(undisturbed: Callable[[int], Run], tmp_path: pathlib.Path) -> None:
    check_kills(undisturbed(3), tmp_path, 3, seed=30)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def stop_one(output: pathlib.Path, rank: int) -> Run:
    """A run of two processes, of which one got a SIGTERM."""
    # the only checkpoint inside an epoch is that of the signal
    run = Run(output, 'stopped', [*KINDS[2], '--recovery-interval', '0'], 2)
    run.launch()
    assert run.wait_for_training()
    ranks = [pid for pid in descendants(run.process.pid)
             if f'\0RANK={rank}\0'.encode() in pathlib.Path(f'/proc/{pid}/environ').read_bytes()]
    os.kill(min(ranks), signal.SIGTERM)
    assert run.process.wait(600) != 0
    log = run.log.read_text()
    assert log.count('SIGTERM: saving after this update') == 1
    assert log.count('stopped by a signal and saved before batch') == 2
    assert 'exitcode  : 143' in log
    assert len(list(run.folder.glob('recovery-*'))) == 1
    return run


def test_sigterm_to_one_of_two_processes_saves_and_stops_both(tmp_path: pathlib.Path) -> None:
    stop_one(tmp_path, 1)


@pytest.mark.slow
@pytest.mark.parametrize('rank', [0, 1])
def test_a_run_stopped_by_sigterm_to_one_process_goes_on_exactly(
        undisturbed: Callable[[int], Run], tmp_path: pathlib.Path, rank: int) -> None:
    run = stop_one(tmp_path, rank)
    run.finish()
    assert compare_runs(undisturbed(2).folder, run.folder) == []


@pytest.mark.slow
def test_training_processes_save_and_stop_when_torchrun_is_killed(
        undisturbed: Callable[[int], Run], tmp_path: pathlib.Path) -> None:
    run = Run(tmp_path, 'orphaned', [*KINDS[2], '--recovery-interval', '0'], 2)
    run.launch()
    assert run.wait_for_training()
    processes = descendants(run.process.pid)
    run.process.kill()  # torchrun alone
    assert run.process.wait(300) == -signal.SIGKILL and any(map(kill_test.alive, processes))
    wait_for(lambda: not any(map(kill_test.alive, processes)))
    log = run.log.read_text()
    assert log.count('torchrun is gone') == 2 and log.count('stopped by a signal and saved before batch') == 2
    assert len(list(run.folder.glob('recovery-*'))) == 1 and not (run.folder / 'run.lock').exists()
    run.finish()
    assert compare_runs(undisturbed(2).folder, run.folder) == []


@pytest.mark.slow
def test_torchrun_restarts_a_run_that_goes_on_by_itself(undisturbed: Callable[[int], Run], tmp_path: pathlib.Path,
                                                        ) -> None:
    whole = undisturbed(2)
    (tmp_path / 'crash.py').write_text(CRASH)
    done = torchrun(2, '--max-restarts', '1', str(tmp_path / 'crash.py'), *whole.flags, '--output', str(tmp_path),
                    '--experiment', 'x', '--resume', 'auto')
    assert done.returncode == 0, done.stderr
    assert 'Resumed from' in done.stderr and json.loads(done.stdout.split('--result\n')[1])
    assert compare_runs(whole.folder, tmp_path / 'x') == []


FORKS = '''
import os, sys, time, torch
import torch.distributed as dist
from cpool_vision.engine.device import settle_threads

dist.init_process_group('gloo')
stuck = 0
for _ in range(700):
    for _ in range(3):
        dist.all_reduce(torch.randn(1000))
    if sys.argv[1] == 'settle':
        settle_threads(True)
    child = os.fork()
    if child == 0:
        os._exit(0)
    end = time.monotonic() + 1
    while not os.waitpid(child, os.WNOHANG)[0]:
        if time.monotonic() > end:
            stuck += 1
            os.kill(child, 9)
            os.waitpid(child, 0)
            break
print(f'stuck {stuck}')
dist.destroy_process_group()
'''


@pytest.mark.slow
def test_forks_after_collective_operations_do_not_hang(tmp_path: pathlib.Path) -> None:
    """`python -m torch.distributed.run --nproc-per-node 2 FILE other` shows the fault under CPython up to 3.11."""
    (tmp_path / 'forks.py').write_text(FORKS)
    done = torchrun(2, str(tmp_path / 'forks.py'), 'settle')
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('stuck 0') == 2, done.stdout


LOSE = '''
import sys
from cpool_vision.cli import train
from cpool_vision.engine.train import build as train_build

train_build.load_process_state = lambda *_: None
sys.exit(train.main())
'''


@pytest.mark.slow
def test_the_comparison_sees_lost_statistics_of_a_process(undisturbed: Callable[[int], Run], tmp_path: pathlib.Path,
                                                          ) -> None:
    """Control: what only the second process holds is missed where it is not restored."""
    whole = undisturbed(2)
    run = Run(tmp_path, 'x', whole.flags, 2)
    run.launch()
    wait_for(lambda: bool(list(run.folder.glob('recovery-1-*'))))
    kill_test.kill(run, False, random.Random(0))  # noqa: S311
    (tmp_path / 'lose.py').write_text(LOSE)
    torchrun(2, str(tmp_path / 'lose.py'), *whole.flags, '--output', str(tmp_path), '--experiment', 'x',
             '--resume', 'auto').check_returncode()
    assert any('state_dict_ema' in name for name in compare_runs(whole.folder, run.folder))


def test_the_command_prints_a_verdict(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch,
                                      capsys: pytest.CaptureFixture[str], undisturbed: Callable[[int], Run]) -> None:
    done = undisturbed(1).folder
    folders = {'undisturbed': done, 'killed': done}
    monkeypatch.setattr(Run, 'folder', property(lambda self: folders[self.name]))
    monkeypatch.setattr(Run, 'finish', lambda self: None)
    monkeypatch.setattr(kill_test, 'run_killed', lambda *_: [None] * 3)
    command = ['--output', str(tmp_path / 'out'), '--kills', '3', '--', '--epochs', '1']
    assert kill_test.main(command) == 0
    assert 'EQUAL after 3 kills' in capsys.readouterr().out
    monkeypatch.setattr(kill_test, 'run_killed', lambda *_: [None] * 2)
    assert kill_test.main(command) == 1
    assert 'only 2 of 3' in capsys.readouterr().out
    (tmp_path / 'out' / 'mine').write_text('')
    with pytest.raises(SystemExit):
        kill_test.main(command)


def test_the_comparison_of_runs_sees_another_pipeline(undisturbed: Callable[[int], Run], tmp_path: pathlib.Path,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    one, two = (shutil.copytree(undisturbed(1).folder, tmp_path / name) for name in 'ab')
    for folder in (one, two):
        (folder / 'augmentation.json').write_text('{}')
    assert compare_runs(one, two) == [] and 'augmentation.json: equal' in capsys.readouterr().out
    (two / 'augmentation.json').write_text('{"p": 1}')
    assert compare_runs(one, two) == ['augmentation.json']
    (two / 'augmentation.json').unlink()
    assert compare_runs(one, two) == ['augmentation.json']


def test_the_comparison_of_files_sees_a_bit(undisturbed: Callable[[int], Run], tmp_path: pathlib.Path) -> None:
    import torch

    path = undisturbed(1).folder / 'last.pth.tar'
    content = torch.load(path, weights_only=True)
    name = next(iter(content['state_dict_ema']))
    value = content['state_dict_ema'][name]
    value.view(torch.int32).view(-1)[0] ^= 1
    torch.save(content, tmp_path / 'a.pth.tar')
    count, wrong = compare_checkpoints(path, tmp_path / 'a.pth.tar')
    assert wrong == [f'.state_dict_ema.{name}'] and count > 100
    del content['optimizer']
    torch.save(content, tmp_path / 'b.pth.tar')
    assert any(name.startswith('.optimizer.state') for name in compare_checkpoints(path, tmp_path / 'b.pth.tar')[1])
