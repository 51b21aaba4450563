"""Several processes for one test.

They are forked from a server that only imports, not from the process of the tests: threads that earlier tests left
there may hold a lock, which a child forked at that moment waits for forever.
"""
import multiprocessing
import os
import pathlib
import queue
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

ROOT = pathlib.Path(__file__).resolve().parents[2]
# what the children would import otherwise, each of them for seconds
PRELOAD = ['pytest', 'cpool_vision', 'cpool_vision.cli.train', 'cpool_vision.engine.train.fit',
           'cpool_vision.engine.validate.bulk', 'torch.distributed.fsdp']


def clean_context() -> Any:
    """Context of `multiprocessing` whose processes start within milliseconds and without inherited threads."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(PRELOAD)
    return context


def _settle() -> None:
    """Makes a forked process one as the others are: data loaders fork their workers there."""
    torch.set_num_threads(1)
    multiprocessing.set_start_method(None, force=True)


def _work(work: Callable[[int], Any], rank: int, count: int, place: str, port: int | None, answers: Any) -> None:
    _settle()
    try:
        os.environ.update({'RANK': str(rank), 'LOCAL_RANK': str(rank), 'WORLD_SIZE': str(count)})
        if port is None:
            dist.init_process_group('gloo', store=dist.FileStore(place, count), rank=rank, world_size=count)
        else:
            os.environ.update({'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port),
                               'TORCHELASTIC_USE_AGENT_STORE': 'True'})
        answers.put((rank, work(rank), ''))
        if dist.is_initialized():
            dist.destroy_process_group()
    except BaseException:
        answers.put((rank, None, traceback.format_exc()))
    answers.close()
    answers.join_thread()
    os._exit(0)


def _apart(work: Callable[..., None], args: tuple[Any, ...], path: str) -> None:
    file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    _settle()
    work(*args)
    os._exit(0)


def start_apart(work: Callable[..., None], *args: Any, output: pathlib.Path) -> Any:
    """Starts a function in a process of its own; what it writes to descriptors 1 and 2 goes to the file `output`."""
    process = clean_context().Process(target=_apart, args=(work, args, str(output)))
    process.start()
    return process


def in_processes(count: int, folder: pathlib.Path, work: Callable[[int], Any], group: bool = True) -> list[Any]:
    """Calls a function with the rank in each process of a gloo group and returns what it gives, by rank.

    Args:
        count: number of processes.
        folder: folder of the file through which they meet.
        work: function of a module, or a `functools.partial` of one; it and its result must pickle.
        group: whether the group exists when `work` is called; otherwise `work` has to create it, as `train` does, by
            a store that this process keeps, as torchrun does: a port that is only looked up may be taken by then.
    """
    context = clean_context()
    answers = context.Queue()
    store = None if group else dist.TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)
    place = str(folder / f'store-{len(list(folder.glob("store-*")))}')
    pathlib.Path(place).touch()
    port = None if store is None else store.port
    children = [context.Process(target=_work, args=(work, rank, count, place, port, answers))
                for rank in range(count)]
    for child in children:
        child.start()
    results: dict[int, Any] = {}
    end = time.monotonic() + 600
    try:
        while len(results) < count:
            try:
                rank, value, error = answers.get(timeout=1)
            except queue.Empty:
                assert not any(child.exitcode for child in children), [child.exitcode for child in children]
                assert time.monotonic() < end, 'no answer'
                continue
            assert not error, error
            results[rank] = value
    finally:
        for child in children:
            child.join(0 if len(results) < count else 60)
            child.kill()
    return [results[rank] for rank in range(count)]


def torchrun(count: int, *command: str) -> subprocess.CompletedProcess[str]:
    """Runs a script with its flags in so many processes; options of torchrun may stand before it."""
    return subprocess.run(  # noqa: S603
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(count), *command],
        capture_output=True, text=True, timeout=900, cwd=ROOT,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)})


# a script that trains, whose second process kills itself once, after its fourth update
CRASH = '''
import os, signal, sys
from cpool_vision.cli import train
from cpool_vision.engine.train import checkpointer

real, seen = checkpointer.Checkpointer.after_update, [0]

def after_update(self, *args):
    real(self, *args)
    seen[0] += 1
    if seen[0] == 4 and os.environ['RANK'] == '1' and not os.path.exists(sys.argv[0] + '.done'):
        open(sys.argv[0] + '.done', 'w').close()  # the count of restarts is each node's own
        os.kill(os.getpid(), signal.SIGKILL)

checkpointer.Checkpointer.after_update = after_update
sys.exit(train.main())
'''
