"""One owner per run folder: the file run.lock names host, process and start, and is removed when the run ends."""
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from cpool_vision.errors import OutputError
from cpool_vision.files import write_text
from cpool_vision.reading import read_bytes, read_json

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_logger = logging.getLogger(__name__)
LOCK = 'run.lock'


def _first_line(path: str) -> str:
    try:
        return read_bytes(path).decode(errors='replace').partition('\n')[0].strip()
    except (OSError, ValueError):
        return ''


def _birth(pid: int) -> str:
    """When a process of this host started, in clock ticks since boot; '' if it has ended, or where that is not told."""
    try:
        fields = read_bytes(f'/proc/{pid}/stat').decode(errors='replace').rpartition(')')[2].split()
        return '' if fields[0] in 'ZX' else fields[19]  # ended, but its parent has not asked how
    except (OSError, ValueError, IndexError):
        return ''


def _namespace() -> str:
    try:
        return os.readlink('/proc/self/ns/pid')
    except OSError:
        return ''


@dataclass(frozen=True)
class Owner:
    """A process that trains in a folder.

    Attributes:
        host: name of its machine.
        machine, boot, namespace: which machine, which of its starts, and which of its process tables; '' if not told.
        process: number.
        birth: when it started, in clock ticks since boot; '' if not told.
        since: when it took the folder, for people.
    """

    host: str
    machine: str
    boot: str
    namespace: str
    process: int
    birth: str
    since: str

    @classmethod
    def here(cls) -> 'Owner':
        """This process."""
        return cls(socket.gethostname(), _first_line('/etc/machine-id'), _first_line(
            '/proc/sys/kernel/random/boot_id'), _namespace(), os.getpid(), _birth(os.getpid()),
            datetime.now().astimezone().isoformat(timespec='seconds'))

    @classmethod
    def read(cls, path: str) -> 'Owner | None':
        """The owner that a lock names; None if there is no lock.

        Raises:
            OutputError: the file is not what `here` writes.
        """
        if not os.path.lexists(path):
            return None
        try:
            content: Any = read_json(path)
            owner = cls(**content)
            if any(type(value) is not (int if name == 'process' else str) for name, value in content.items()):
                raise ValueError('other values')
            return owner
        except (OSError, TypeError, ValueError) as error:
            raise OutputError(f'{path!r} is not a lock file of a run: remove it if no run is training in this folder') \
                from error

    def state(self, path: str) -> str:
        """'alive', 'dead', or 'unknown' from here; `path` is its lock."""
        me = Owner.here()
        if (self.host, self.machine) != (me.host, me.machine):
            return 'unknown'
        if self.boot != me.boot:  # the machine was restarted
            return 'dead' if self.machine and self.boot and me.boot else 'unknown'
        if self.namespace != me.namespace:  # another container: its processes are not seen from here, its lock is
            return _held(path)
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return 'dead'
        except PermissionError:
            pass
        return 'alive' if self.birth == _birth(self.process) else 'dead'


def _held(path: str) -> str:
    if fcntl is None:
        return 'unknown'
    try:
        with open(path, 'rb') as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return 'dead'
    except BlockingIOError:
        return 'alive'
    except OSError:
        return 'unknown'


@contextmanager
def _alone(folder: str) -> Iterator[None]:
    """Lets one process of this host at a time decide about a lock."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        if fcntl is not None:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)
            except OSError:  # a file system without locks
                pass
        yield
    finally:
        os.close(handle)


class RunLock:
    """Keeps other runs out of a folder from `acquire` to `release`.

    A lock whose owner is provably dead is taken over: no process of that number and start runs on this host, or the
    host was restarted since. Network file systems whose locks do not reach other hosts are covered as far as the
    file itself is seen by them.
    """

    def __init__(self) -> None:
        self.path = ''
        self._made = False
        self._file: Any = None
        self._me: Owner | None = None

    def acquire(self, folder: str) -> None:
        """Takes a folder, which is created if missing.

        Raises:
            OutputError: another process has it, or may have it, or it cannot be written.
        """
        path = os.path.join(folder, LOCK)
        try:
            self._made = not os.path.isdir(folder)
            os.makedirs(folder, exist_ok=True)
            with _alone(folder):
                former = Owner.read(path)
                if former is not None:
                    self._check(former, folder, path)
                self._me = Owner.here()
                write_text(path, json.dumps(asdict(self._me), indent=1) + '\n')
                self.path = path
                self._file = open(path, 'rb')
                if fcntl is not None:
                    fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OutputError:
            raise
        except OSError as error:
            if self.path:  # written, but the file system has no locks
                return
            raise OutputError(f'output folder {folder!r} cannot be created or written ({error.strerror}): choose '
                              'another --output') from error

    @staticmethod
    def _check(former: Owner, folder: str, path: str) -> None:
        state = former.state(path)
        who = f'process {former.process} on {former.host} since {former.since}'
        if state == 'alive':
            raise OutputError(f'{folder!r} is in use by another run ({who}): wait until it ends, or choose another '
                              '--experiment')
        if state == 'unknown':
            raise OutputError(f'{folder!r} may be in use by another run ({who}), which cannot be seen from here: if '
                              f'that run is over, remove {path!r}; otherwise choose another --experiment')
        _logger.warning('Taking over %s from a run that ended without releasing it (%s).', folder, who)

    def release(self) -> None:
        """Gives the folder back; one that this lock created and nothing was written to is removed."""
        if not self.path:
            return
        path, self.path = self.path, ''
        try:
            with _alone(os.path.dirname(path)):
                if self._file is not None:
                    self._file.close()
                if Owner.read(path) == self._me:
                    os.remove(path)
            if self._made and not os.listdir(os.path.dirname(path)):
                os.rmdir(os.path.dirname(path))
        except OSError as error:
            _logger.warning('%s cannot be removed (%s).', path, error.strerror or error)

    def __enter__(self) -> 'RunLock':
        return self

    def __exit__(self, *_: Any) -> None:
        self.release()
