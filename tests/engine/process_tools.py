"""Several processes for one test.

They are forked from a server that only imports, not from the process of the tests: threads that earlier tests left
there may hold a lock, which a child forked at that moment waits for forever.
"""
import multiprocessing
import os
import pathlib
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

# what the children would import otherwise, each of them for seconds
PRELOAD = ['pytest', 'cpool_vision', 'cpool_vision.cli.train', 'cpool_vision.engine.train.fit',
           'cpool_vision.engine.validate.bulk', 'torch.distributed.fsdp']


def clean_context() -> Any:
    """Context of `multiprocessing` whose processes start within milliseconds and without inherited threads."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(PRELOAD)
    return context


def _work(work: Callable[[int], Any], rank: int, count: int, place: str, group: bool, answers: Any) -> None:
    torch.set_num_threads(1)
    try:
        os.environ.update({'RANK': str(rank), 'LOCAL_RANK': str(rank), 'WORLD_SIZE': str(count)})
        if group:
            dist.init_process_group('gloo', store=dist.FileStore(place, count), rank=rank, world_size=count)
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
        group: whether the group exists when `work` is called; otherwise `work` has to create it, as `train` does.
    """
    context = clean_context()
    answers = context.Queue()
    place = str(folder / f'store-{len(list(folder.glob("store-*")))}')
    pathlib.Path(place).touch()
    children = [context.Process(target=_work, args=(work, rank, count, place, group, answers))
                for rank in range(count)]
    for child in children:
        child.start()
    results: dict[int, Any] = {}
    try:
        while len(results) < count:
            rank, value, error = answers.get(timeout=120)
            assert not error, error
            results[rank] = value
    finally:
        for child in children:
            child.join(0 if len(results) < count else 60)
            child.kill()
    return [results[rank] for rank in range(count)]
