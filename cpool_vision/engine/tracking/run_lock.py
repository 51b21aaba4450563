"""Locks a run folder for one process: the file run.lock identifies its owner and is removed when the run ends."""
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from typing import BinaryIO, Literal

from cpool_vision.errors import OutputError
from cpool_vision.files import write_text
from cpool_vision.reading import read_bytes, read_json

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_logger = logging.getLogger(__name__)
LOCK = 'run.lock'
State = Literal['alive', 'dead', 'unknown']


def _first_line(path: str) -> str:
    try:
        return read_bytes(path).decode(errors='replace').partition('\n')[0].strip()
    except (OSError, ValueError):
        return ''


def _birth(pid: int) -> str:
    """Returns the start time of a local process in clock ticks since boot; '' if it has ended or `/proc` lacks it."""
    try:
        values = read_bytes(f'/proc/{pid}/stat').decode(errors='replace').rpartition(')')[2].split()
        return '' if values[0] in 'ZX' else values[19]  # zombie or dead
    except (OSError, ValueError, IndexError):
        return ''


def _namespace() -> str:
    try:
        return os.readlink('/proc/self/ns/pid')
    except OSError:
        return ''


@dataclass(frozen=True)
class Owner:
    """The process that trains in a folder. A string is '' if the operating system does not provide the value.

    Attributes:
        host: Hostname.
        machine: Machine ID.
        boot: Boot ID, which changes with each restart of the machine.
        namespace: PID namespace, which differs between containers.
        process: Process ID.
        birth: Start time of the process in clock ticks since boot, because process IDs are reused.
        since: Time at which the process locked the folder, for messages.
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
        """Returns the owner for this process."""
        return cls(socket.gethostname(), _first_line('/etc/machine-id'), _first_line(
            '/proc/sys/kernel/random/boot_id'), _namespace(), os.getpid(), _birth(os.getpid()),
            datetime.now().astimezone().isoformat(timespec='seconds'))

    @classmethod
    def read(cls, path: str) -> 'Owner | None':
        """Reads the owner from a lock file; None if there is no lock file.

        Raises:
            OutputError: If the file is not a lock file of a run.
        """
        if not os.path.lexists(path):
            return None
        try:
            content = read_json(path)
            kinds = {each.name: int if each.name == 'process' else str for each in fields(cls)}
            if not isinstance(content, dict) or {name: type(value) for name, value in content.items()} != kinds:
                raise ValueError('not the fields of an owner')
            return cls(**content)
        except (OSError, ValueError) as error:
            raise OutputError(f'{path!r} is not a lock file of a run: remove it if no run is training in this folder') \
                from error

    def state(self, path: str) -> State:
        """Returns whether the process that wrote the lock file `path` is alive, as far as this process can see."""
        me = Owner.here()
        if (self.host, self.machine) != (me.host, me.machine):
            return 'unknown'
        if self.boot != me.boot:  # the machine was restarted
            return 'dead' if self.machine and self.boot and me.boot else 'unknown'
        if self.namespace != me.namespace:  # another container, whose locks are visible here but not its processes
            return _state_of_lock(path)
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return 'dead'
        except PermissionError:
            pass
        return 'alive' if self.birth == _birth(self.process) else 'dead'


def _state_of_lock(path: str) -> State:
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
    """Runs the body in one process of this host at a time."""
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
    """Locks a folder against other runs from `acquire` to `release`. A context manager.

    A lock whose owner is known to be dead is taken over: its process has ended, or the machine was restarted. The lock
    file also works on network file systems without file locks.
    """

    def __init__(self) -> None:
        self.path = ''
        self._made = False
        self._file: BinaryIO | None = None
        self._me: Owner | None = None

    def acquire(self, folder: str) -> None:
        """Locks a folder. Creates it if it is missing.

        Raises:
            OutputError: If another process uses or may use the folder, or if it cannot be written.
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
            if self.path:  # the lock file is written; the file system has no file locks
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
            raise OutputError(f'{folder!r} may be in use by another run ({who}), which cannot be checked from here: if '
                              f'that run has ended, remove {path!r}; otherwise choose another --experiment')
        _logger.warning('Taking over %s from a run that ended without releasing it (%s).', folder, who)

    def release(self) -> None:
        """Unlocks the folder. Removes a folder that `acquire` created if it is still empty."""
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

    def __exit__(self, *_: object) -> None:
        self.release()
