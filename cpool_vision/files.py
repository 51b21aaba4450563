"""Atomic file writing: a file appears under its name only once it is complete."""
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import BinaryIO, cast

from .errors import OutputError, UserError


def sync_directory(path: str) -> None:
    """Flushes a folder's entries to disk. Does nothing on systems that cannot."""
    if os.name != 'posix':
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: str, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file so that a crash at any moment leaves either the old content or the new one.

    Writes a temporary file in the same folder, flushes it to disk, renames it over the target, and flushes the folder.
    On failure, removes the temporary file and leaves the target untouched.

    Args:
        path: Target file.
        write: Writes the content to the open binary file. If the disk is full, it is called a second time.

    Raises:
        OutputError: If the file cannot be written.
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
    except UserError:  # the source that `write` reads is at fault, not the target
        raise
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        if temporary and os.path.exists(temporary):
            os.remove(temporary)  # frees its space before `_shortage` looks at the disk
            temporary = ''
        reason = _shortage(folder, write) or getattr(error, 'strerror', None) or error
        raise OutputError(f'{path!r} cannot be written ({reason}): free space or choose another folder') from error
    finally:
        if temporary and os.path.exists(temporary):
            os.remove(temporary)


class _Counter:
    """A file that stores nothing and counts how long it would become."""

    def __init__(self) -> None:
        self.place = self.size = 0

    def write(self, data: bytes | memoryview) -> int:
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


def _shortage(folder: str, write: Callable[[BinaryIO], object]) -> str:
    """Says how many bytes the disk lacks for a file; '' if a full disk was not the reason for the failure."""
    counter = _Counter()
    try:
        free = shutil.disk_usage(folder).free
        write(cast(BinaryIO, counter))
    except (OSError, RuntimeError, TypeError, ValueError):
        return ''
    if counter.size <= free:
        return ''
    return f'{folder!r} is full: {counter.size - free:,} bytes more are needed than the {free:,} that are free'


def write_text(path: str, text: str, errors: str = 'strict') -> None:
    """Writes a text file in UTF-8 by `write_atomic`; `errors` as in `str.encode`."""
    write_atomic(path, lambda file: file.write(text.encode(errors=errors)))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _copy(source: str, target: BinaryIO) -> None:
    with open(source, 'rb') as file:
        shutil.copyfileobj(file, target)


def link_atomic(source: str, target: str) -> None:
    """Gives a finished file a second name: a hard link, or a copy on file systems without links.

    An existing target is replaced in one step.

    Raises:
        OutputError: If the target cannot be written.
    """
    temporary = os.path.join(os.path.dirname(os.path.abspath(target)), f'.{os.path.basename(target)}.link.tmp')
    try:
        if os.path.exists(temporary):
            os.remove(temporary)
        try:
            os.link(source, temporary)
        except OSError:
            write_atomic(target, lambda file: _copy(source, file))
            return
        os.replace(temporary, target)
        sync_directory(os.path.dirname(os.path.abspath(target)))
    except OSError as error:
        raise OutputError(f'{target!r} cannot be written ({error.strerror or error})') from error
    finally:
        if os.path.exists(temporary):  # renaming between two links to one file does nothing
            os.remove(temporary)


@contextmanager
def keep_former(path: str, name: str) -> Iterator[None]:
    """Keeps the old content of a file under another name if the body succeeds in replacing the file.

    Args:
        path: File that the body replaces; it need not exist.
        name: Path for the old content, in the same folder.

    Raises:
        OutputError: If the old content cannot be kept.
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
