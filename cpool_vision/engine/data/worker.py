"""Signal handling in data loading workers, and clear errors when a worker dies."""
import atexit
import ctypes
import multiprocessing
import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import FrameType

from cpool_vision.errors import DatasetError

_KILLED = re.compile(r'DataLoader worker \(pid.*(exited unexpectedly|is killed by signal: Killed)')
_NO_SHARED_MEMORY = re.compile(r'DataLoader worker .* is killed by signal: Bus error')


@cache
def _exiting() -> ctypes.c_byte:
    """Returns a value shared with the workers, which becomes 1 when this process begins to exit."""
    flag = multiprocessing.RawValue(ctypes.c_byte, 0)
    # registered after multiprocessing's own hook, which terminates the workers, and so called before it
    atexit.register(setattr, flag, 'value', 1)
    return flag


class WorkerSignals:
    """Worker initialization that ignores the signals which schedulers and terminals send to every process of a job.

    The training process needs more batches until it has saved a checkpoint. Its workers therefore ignore SIGINT,
    SIGUSR1 and SIGTERM until it exits and terminates them. A worker still notices when the training process was killed.

    Args:
        start: Another initialization function, called with the worker's number.
    """

    def __init__(self, start: Callable[[int], None] | None = None) -> None:
        self.start = start
        self.exiting = _exiting()

    def __call__(self, worker: int) -> None:
        for name in ('SIGINT', 'SIGUSR1'):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._terminate)
        if self.start is not None:
            self.start(worker)

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        if self.exiting.value:
            os._exit(0)


@contextmanager
def explained_deaths() -> Iterator[None]:
    """Replaces torch's error about a dead data loading worker by one that names the likely cause.

    Raises:
        DatasetError: A worker was killed or ran out of shared memory.
    """
    try:
        yield
    except RuntimeError as error:
        text = ' '.join(str(error).split())
        if _KILLED.search(text):
            raise DatasetError('a data loading worker was killed, most likely because memory ran out: lower --workers '
                               'or --batch-size, or give the job more memory') from error
        if _NO_SHARED_MEMORY.search(text):
            raise DatasetError('a data loading worker ran out of shared memory (/dev/shm): lower --workers or '
                               '--batch-size, or enlarge it (docker run --shm-size)') from error
        raise
