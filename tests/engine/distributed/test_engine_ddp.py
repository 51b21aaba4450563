"""Two processes on the CPU."""
import contextlib
import csv
import gc
import glob
import io
import json
import os
import pathlib
import types
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from process_tools import in_processes, torchrun

from cpool_vision.cli import train as cli_train
from cpool_vision.engine.validate.bulk import run_validation


@pytest.fixture(scope='module')
def flags(flags_into: Callable[[Any], list[str]], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of the two runs."""
    return [*flags_into(tmp_path_factory.mktemp('runs')), '-b', '4', '--grad-accum-steps', '2', '--model-ema',
            '--model-ema-decay', '0.5', '--dist-bn', 'broadcast']


def list_threads() -> list[str]:
    """Names of the threads of this process, none where there is no /proc."""
    names = []
    for path in glob.glob('/proc/self/task/*/comm'):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended since it was listed
            names.append(pathlib.Path(path).read_text())
    return names


class Done(NamedTuple):
    """What a process of a run left: exit status, output, threads before and after the last step of `main`."""
    status: int
    out: str
    err: str
    before: list[str]
    after: list[str]


def run_main(flags: list[str], rank: int) -> Done:
    out, err, before = io.StringIO(), io.StringIO(), []
    cli_train.gc = types.SimpleNamespace(collect=lambda: (before.extend(list_threads()), gc.collect()))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli_train.main(flags)
    return Done(status, out.getvalue(), err.getvalue(), before, list_threads())


@pytest.fixture(scope='module')
def whole(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[Done]:
    """A finished run of two processes."""
    work = partial(run_main, [*flags, '--experiment', 'whole'])
    done = in_processes(2, tmp_path_factory.mktemp('store'), work, group=False)
    assert [each.status for each in done] == [0, 0], done
    return done


def test_two_processes_train_and_validate_exactly(
        whole: list[Done], flags: list[str], image_root: str, validate_args: Callable[..., Any]) -> None:
    folder = os.path.join(flags[flags.index('--output') + 1], 'whole')
    assert [each.out.count('--result') for each in whole] == [1, 0]
    # 24 images: 3 batches of 4 for each process, 2 updates
    assert 'Train: 0 [   2/2]' in whole[0].err and [each.err.count('Epoch 0: ') for each in whole] == [1, 0]
    with open(os.path.join(folder, 'summary.csv'), newline='', encoding='utf-8') as file:
        table = list(csv.DictReader(file))
    assert [row['epoch'] for row in table] == ['0', '1']

    # 7 validation images do not divide by 2: the padding must not count
    row = run_validation(validate_args(
        '--data-dir', image_root, '--model', 'test_resnet', '--num-classes', '3', '--img-size', '32', '-j', '0',
        '--device', 'cpu', '--use-ema', '--checkpoint', os.path.join(folder, 'last.pth.tar')))
    assert row['top1'] == pytest.approx(float(table[-1]['eval_top1']), abs=1e-4)
    assert row['loss'] == pytest.approx(float(table[-1]['eval_loss']), abs=1e-4)


@pytest.mark.slow
def test_two_processes_resume_exactly(
        whole: list[Done], flags: list[str], load: Callable[..., Any]) -> None:
    folder = os.path.join(flags[flags.index('--output') + 1], 'whole')
    resumed = os.path.join(folder, 'checkpoint-0.pth.tar')
    done = torchrun(2, 'train.py', *flags, '--experiment', 'rest', '--resume', resumed)
    assert done.returncode == 0, done.stderr
    assert [each['epoch'] for each in json.loads(done.stdout.split('--result\n')[1])] == [1]
    rest = os.path.join(os.path.dirname(folder), 'rest')
    one, two = load(folder, 'last.pth.tar'), load(rest, 'last.pth.tar')
    for key in ('state_dict', 'state_dict_ema'):
        for name, value in one[key].items():
            assert torch.equal(value, two[key][name]), name


@pytest.mark.skipif(not os.path.exists('/proc/self/task'), reason='lists threads by /proc')
def test_threads_of_the_process_group_end_with_the_run(whole: list[Done]) -> None:
    for done in whole:
        assert done.after and any('gloo' in name for name in done.before)  # without main's last step they live on
        assert not any('gloo' in name for name in done.after)


@pytest.mark.slow
def test_bad_input_stops_both_processes(base_flags: list[str]) -> None:
    done = torchrun(2, 'train.py', *base_flags, '--output', '/dev/null/runs')
    assert done.returncode != 0
    assert 'error: output folder' in done.stderr


@pytest.mark.slow
def test_a_non_finite_loss_on_one_process_stops_both(base_flags: list[str], load: Callable[..., Any]) -> None:
    done = torchrun(2, 'train.py', *base_flags, '--experiment', 'x', '--opt', 'sgd', '--lr', '1e30', '-b', '4')
    assert done.returncode != 0
    assert 'error: the loss is not finite' in done.stderr
    assert 'error [process 1]: the loss is not finite' in done.stderr
