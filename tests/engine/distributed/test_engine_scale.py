"""Several nodes, and how often processes exchange gradients."""
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest
from loop_tools import make_batches, make_run
from process_tools import CRASH, ROOT, torchrun
from torch.distributed.elastic.utils.distributed import get_free_port
from torch.distributed.tensor.debug import CommDebugMode

from benchmarks.kill_test import compare_runs
from cpool_vision.engine.train.loop import train_one_epoch

FLAGS = [
    '--model', 'resnet_micro_cpool_32', '--model-kwargs', 'channels=[8,8,8,8]', 'layers=[1,1,1,1]', 'cpool_groups=1',
    '--dataset', 'cpool/shapes', '--num-classes', '10', '--train-num-samples', '96', '--val-num-samples', '15',
    '-b', '4', '-j', '1', '--grad-accum-steps', '3', '--epochs', '2', '--warmup-epochs', '0', '--opt', 'adamw',
    '--lr', '1e-2', '--drop', '0.2', '--model-ema', '--model-ema-decay', '0.9', '--device', 'cpu',
    '--recovery-interval', '1', '--no-tensorboard']


@pytest.mark.parametrize('batches, accum, exchanges', [(6, 3, 2), (7, 3, 3), (5, 1, 5), (2, 4, 1)])
def test_gradients_are_exchanged_once_per_update(process_group: None, batches: int, accum: int, exchanges: int) -> None:
    run = make_run(make_batches(batches), accum)
    task: Any = run.task
    task.no_sync = lambda: task.trainable_module.no_sync()
    task.prepare_distributed()
    with CommDebugMode() as exchanged:
        train_one_epoch(run, 0)
    assert sum(count for name, count in exchanged.get_comm_counts().items() if 'allreduce' in str(name)) == exchanges


def start_nodes(nodes: int, output: pathlib.Path, flags: list[str], *options: str) -> list[subprocess.Popen[str]]:
    """One torchrun per node, which meet on this machine, with one process each."""
    place = f'127.0.0.1:{get_free_port()}'
    return [subprocess.Popen(  # noqa: S603
        [sys.executable, '-m', 'torch.distributed.run', '--nnodes', str(nodes), '--nproc-per-node', '1',
         '--rdzv-backend', 'c10d', '--rdzv-endpoint', place, '--rdzv-id', 'job', '--local-addr', '127.0.0.1', *options,
         *flags, '--output', str(output), '--experiment', 'run', '--resume', 'auto'],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}) for _ in range(nodes)]


def finish(nodes: list[subprocess.Popen[str]]) -> list[tuple[str, str]]:
    try:
        outputs = [node.communicate(timeout=300) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0] * len(nodes), outputs
    return outputs


@pytest.fixture(scope='module')
def one_node(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The same run as two processes of one torchrun."""
    output = tmp_path_factory.mktemp('one')
    torchrun(2, 'train.py', *FLAGS, '--output', str(output), '--experiment', 'run').check_returncode()
    return output / 'run'


@pytest.mark.slow
def test_two_nodes_train_as_two_processes_of_one(one_node: pathlib.Path, tmp_path: pathlib.Path) -> None:
    outputs = finish(start_nodes(2, tmp_path, ['train.py', *FLAGS]))
    assert sum('--result' in out for out, _ in outputs) == 1
    assert compare_runs(one_node, tmp_path / 'run') == []


@pytest.mark.slow
def test_a_process_that_dies_on_one_node_restarts_both(one_node: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / 'crash.py').write_text(CRASH)
    outputs = finish(start_nodes(2, tmp_path, [str(tmp_path / 'crash.py'), *FLAGS], '--max-restarts', '2'))
    assert 'Resumed from' in ''.join(err for _, err in outputs)
    assert compare_runs(one_node, tmp_path / 'run') == []
