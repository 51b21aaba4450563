"""Files that appear under their name only when complete."""
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from .errors import OutputError, UserError


def sync_directory(path: str) -> None:
    """Flushes the names in a folder to disk, where the system can."""
    if os.name != 'posix':
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: str, write: Callable[[Any], None]) -> None:
    """Writes a file so that a crash at any moment leaves either the former content or the new one.

    A temporary file in the same folder is written, flushed to disk and renamed over the target; then the folder is
    flushed. A failure removes the temporary file and leaves the target alone.

    Args:
        path: target.
        write: receives the open binary file.

    Raises:
        OutputError: the operating system refused.
    """
    folder = os.path.dirname(os.path.abspath(path))
    temporary = ''
    try:
        handle, temporary = tempfile.mkstemp(prefix=f'.{os.path.basename(path)}.', suffix='.tmp', dir=folder)
        with os.fdopen(handle, 'wb') as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        temporary = ''
        sync_directory(folder)
    except UserError:  # what `write` reads from is at fault
        raise
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        if temporary and os.path.exists(temporary):
            os.remove(temporary)  # what it holds is free again
            temporary = ''
        reason = _shortage(folder, write) or getattr(error, 'strerror', None) or error
        raise OutputError(f'{path!r} cannot be written ({reason}): free space or choose another folder') from error
    finally:
        if temporary and os.path.exists(temporary):
            os.remove(temporary)


class _Counter:
    """A file that only measures how long it would become."""

    def __init__(self) -> None:
        self.place = self.size = 0

    def write(self, data: Any) -> int:
        count = memoryview(data).nbytes
        self.place += count
        self.size = max(self.size, self.place)
        return count

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.place = offset + (0, self.place, self.size)[whence]
        return self.place

    def tell(self) -> int:
        return self.place

    def flush(self) -> None:
        pass


def _shortage(folder: str, write: Callable[[Any], None]) -> str:
    """How many bytes a folder is short of for a file, in words; '' if that is not why it could not be written."""
    counter = _Counter()
    try:
        free = shutil.disk_usage(folder).free
        write(counter)
    except (OSError, RuntimeError, TypeError, ValueError):
        return ''
    if counter.size <= free:
        return ''
    return f'{folder!r} is full: {counter.size - free:,} bytes more are needed than the {free:,} that are free'


def write_text(path: str, text: str, errors: str = 'strict') -> None:
    """`write_atomic` of a text in UTF-8; `errors` as in `str.encode`."""
    write_atomic(path, lambda file: file.write(text.encode(errors=errors)))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _rewound(file: Any) -> Any:
    file.seek(0)
    return file


def link_atomic(source: str, target: str) -> None:
    """Gives a finished file a second name, by a hard link where the file system has them, never unlinking first.

    Raises:
        OutputError: the operating system refused.
    """
    temporary = os.path.join(os.path.dirname(os.path.abspath(target)), f'.{os.path.basename(target)}.link.tmp')
    try:
        if os.path.exists(temporary):
            os.remove(temporary)
        try:
            os.link(source, temporary)
        except OSError:
            with open(source, 'rb') as file:
                write_atomic(target, lambda out: shutil.copyfileobj(_rewound(file), out))
            return
        os.replace(temporary, target)
        sync_directory(os.path.dirname(os.path.abspath(target)))
    except OSError as error:
        raise OutputError(f'{target!r} cannot be written ({error.strerror or error})') from error
    finally:
        if os.path.exists(temporary):  # a rename between two names of one file leaves the first
            os.remove(temporary)


@contextmanager
def keep_former(path: str, name: str) -> Iterator[None]:
    """Gives the former content of a file another name, if the body replaces the file and does not fail.

    Args:
        path: the file; it need not exist.
        name: path for the former content, in the same folder.

    Raises:
        OutputError: the operating system refused.
    """
    if not os.path.exists(path):
        yield
        return
    temporary = os.path.join(os.path.dirname(os.path.abspath(name)), f'.{os.path.basename(name)}.former.tmp')
    try:
        link_atomic(path, temporary)
        yield
        os.replace(temporary, name)
        sync_directory(os.path.dirname(os.path.abspath(name)))
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f'{name!r} cannot be written ({error.strerror or error})') from error
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
