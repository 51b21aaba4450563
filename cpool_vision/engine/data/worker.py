"""Signals in data loading workers."""
import atexit
import multiprocessing
import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import FrameType
from typing import Any

from cpool_vision.errors import DatasetError

_KILLED = re.compile(r'DataLoader worker \(pid.*(exited unexpectedly|is killed by signal: Killed)')
_LITTLE = re.compile(r'DataLoader worker .* is killed by signal: Bus error')


@cache
def _leaving() -> Any:
    """Shared with workers: 1 from the moment when this process begins to exit."""
    flag = multiprocessing.RawValue('b', 0)
    # later than multiprocessing's own hook, which terminates the workers, and so called before it
    atexit.register(setattr, flag, 'value', 1)
    return flag


class WorkerSignals:
    """Start of a worker that outlives the signals which schedulers and terminals send to every process of a job.

    The training process still needs batches until it has saved and stops. SIGINT and SIGUSR1 are ignored, and SIGTERM
    too, which torch lets end a worker, until the training process exits and terminates its workers itself. A worker
    notices when that process was killed.

    Args:
        start: further function to call with the number of the worker.
    """

    def __init__(self, start: Callable[[int], None] | None = None) -> None:
        self.start = start
        self.leaving = _leaving()

    def __call__(self, worker: int) -> None:
        for name in ('SIGINT', 'SIGUSR1'):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._terminate)
        if self.start is not None:
            self.start(worker)

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        if self.leaving.value:
            os._exit(0)


@contextmanager
def explained_deaths() -> Iterator[None]:
    """Turns torch's error about a loader worker that died into one that names the likely cause.

    Raises:
        DatasetError: in its place.
    """
    try:
        yield
    except RuntimeError as error:
        text = ' '.join(str(error).split())
        if _KILLED.search(text):
            raise DatasetError('a data loading worker was killed, most likely because memory ran out: lower --workers '
                               'or --batch-size, or give the job more memory') from error
        if _LITTLE.search(text):
            raise DatasetError('a data loading worker ran out of shared memory (/dev/shm): lower --workers or '
                               '--batch-size, or enlarge it (docker run --shm-size)') from error
        raise
