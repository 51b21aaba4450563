"""Two processes under torchrun on the CPU."""
import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from cpool_vision.engine.validate.bulk import run_validation

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), '..', '..', '..'))


def torchrun(flags: list[str], script: str = os.path.join(ROOT, 'train.py')) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # noqa: S603
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', script, *flags],
        capture_output=True, text=True, timeout=300, env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': ROOT})


# lists the threads before and after the last step of main
_LIST_THREADS = """
import contextlib, gc, glob, types
from cpool_vision.cli import train

def list_threads(when):
    for name in glob.glob('/proc/self/task/*/comm'):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended since it was listed
            print(when, open(name).read().strip(), flush=True)

train.gc = types.SimpleNamespace(collect=lambda: (list_threads('before'), gc.collect()))
train.main()
list_threads('after')
"""


@pytest.fixture(scope='module')
def flags(flags_into: Callable[[Any], list[str]], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of the two runs."""
    return [*flags_into(tmp_path_factory.mktemp('runs')), '-b', '4', '--grad-accum-steps', '2', '--model-ema',
            '--model-ema-decay', '0.5', '--dist-bn', 'broadcast']


@pytest.fixture(scope='module')
def whole(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """A finished run of two processes, which lists its threads."""
    script = tmp_path_factory.mktemp('script') / 'run.py'
    script.write_text(_LIST_THREADS)
    done = torchrun([*flags, '--experiment', 'whole'], str(script))
    assert done.returncode == 0, done.stderr
    return done


def test_two_processes_train_and_validate_exactly(
        whole: subprocess.CompletedProcess[str], flags: list[str], image_root: str, validate_args: Callable[..., Any],
        ) -> None:
    folder = os.path.join(flags[flags.index('--output') + 1], 'whole')
    assert whole.stdout.count('--result') == 1
    # 24 images: 3 batches of 4 for each process, 2 updates
    assert 'Train: 0 [   2/2]' in whole.stderr and whole.stderr.count('Epoch 0: ') == 1
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
        whole: subprocess.CompletedProcess[str], flags: list[str], load: Callable[..., Any]) -> None:
    folder = os.path.join(flags[flags.index('--output') + 1], 'whole')
    done = torchrun([*flags, '--experiment', 'rest', '--resume', os.path.join(folder, 'checkpoint-0.pth.tar')])
    assert done.returncode == 0, done.stderr
    assert [each['epoch'] for each in json.loads(done.stdout.split('--result\n')[1])] == [1]
    rest = os.path.join(os.path.dirname(folder), 'rest')
    one, two = load(folder, 'last.pth.tar'), load(rest, 'last.pth.tar')
    for key in ('state_dict', 'state_dict_ema'):
        for name, value in one[key].items():
            assert torch.equal(value, two[key][name]), name


@pytest.mark.skipif(not os.path.exists('/proc/self/task'), reason='lists threads by /proc')
def test_threads_of_the_process_group_end_before_the_interpreter(whole: subprocess.CompletedProcess[str]) -> None:
    before, after = (re.findall(rf'^{when} (.*)$', whole.stdout, re.MULTILINE) for when in ('before', 'after'))
    assert any('python' in name for name in after)
    assert any('gloo' in name for name in before)  # without main's last step they live on
    assert not any('gloo' in name for name in after)


@pytest.mark.slow
def test_bad_input_stops_both_processes(base_flags: list[str]) -> None:
    done = torchrun([*base_flags, '--output', '/dev/null/runs'])
    assert done.returncode != 0
    assert 'error: output folder' in done.stderr


@pytest.mark.slow
def test_a_non_finite_loss_on_one_process_stops_both(base_flags: list[str], load: Callable[..., Any]) -> None:
    done = torchrun([*base_flags, '--experiment', 'x', '--opt', 'sgd', '--lr', '1e30', '-b', '4'])
    assert done.returncode != 0
    assert 'error: the loss is not finite' in done.stderr
    assert 'error [process 1]: the loss is not finite' in done.stderr
