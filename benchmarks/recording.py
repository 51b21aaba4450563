"""What a program does to the files of one folder, read from the output of strace."""
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .kill_test import ROOT

CALLS = ('open,openat,creat,write,pwrite64,writev,lseek,ftruncate,fsync,fdatasync,rename,renameat,renameat2,link,'
         'linkat,unlink,unlinkat,close,sendfile,copy_file_range')


@dataclass(frozen=True)
class Event:
    """A call that changes what a folder holds.

    Attributes:
        kind: 'names', 'write', 'sync' or 'sync folder'.
        names: what becomes of names: number of a file, None for removed.
        file: number of the file.
        offset, data: of a write; a truncation has None for data.
    """

    kind: str
    names: tuple[tuple[str, int | None], ...] = ()
    file: int = -1
    offset: int = 0
    data: bytes | None = None


class Recording:
    """Events of a folder, read from the output of strace.

    Args:
        folder: absolute path.
        lines: of `strace -xx`.

    Raises:
        ValueError: a call that changes a file in a way that is not known here.
    """

    def __init__(self, folder: str, lines: Iterator[str]) -> None:
        self.folder, self.events = folder, list[Event]()
        self._names: dict[str, int] = {}
        self._open: dict[int, list[Any]] = {}  # descriptor: file (None for the folder), position, whether at the end
        self._sizes: dict[int, int] = {}
        for line in lines:
            found = re.match(r'(\w+)\((.*)\)\s+= (\d+)', line)
            if found:
                name, arguments, result = found.groups()
                texts = [bytes.fromhex(text.replace('\\x', '')) for text in re.findall(r'"((?:\\x\w\w)*)"', arguments)]
                self._take(name, arguments, texts, int(result))

    def _inside(self, text: bytes) -> str | None:
        folder, name = os.path.split(os.path.join(ROOT, text.decode()))
        return name if folder == self.folder else None

    def _take(self, call: str, arguments: str, texts: list[bytes], result: int) -> None:
        first = arguments.partition(',')[0]
        handle = self._open.get(int(first)) if first.isdecimal() else None
        if call in ('open', 'openat', 'creat'):
            self._take_open(arguments, texts[0], result)
        elif call == 'close':
            self._open.pop(int(first), None)
        elif call.startswith(('rename', 'link')):
            self._take_names(call, [self._inside(text) for text in texts])
        elif call.startswith('unlink'):
            name = self._inside(texts[0])
            if name is not None:
                del self._names[name]
                self.events.append(Event('names', ((name, None),)))
        elif handle is not None:
            self._take_handle(call, arguments, texts, result, handle)

    def _take_open(self, arguments: str, text: bytes, result: int) -> None:
        name = self._inside(text)
        if os.path.join(ROOT, text.decode()) == self.folder:
            self._open[result] = [None, 0, False]
        elif name is not None:
            if name not in self._names and 'O_CREAT' in arguments:
                self._names[name] = len(self._sizes)
                self._sizes[self._names[name]] = 0
                self.events.append(Event('names', ((name, self._names[name]),)))
            file = self._names[name]
            if 'O_TRUNC' in arguments and self._sizes[file]:
                self.events.append(Event('write', file=file))
                self._sizes[file] = 0
            self._open[result] = [file, 0, 'O_APPEND' in arguments]

    def _take_names(self, call: str, names: list[str | None]) -> None:
        one, two = names
        if one is None or two is None:
            if one is not two:
                raise ValueError(f'a file of {self.folder} came from elsewhere or went away: {names}')
            return
        file = self._names[one]
        changes: list[tuple[str, int | None]] = [(two, file)]
        if call.startswith('rename') and self._names.get(two) != file:  # of two names of one file it leaves both
            changes.append((one, None))
            del self._names[one]
        self._names[two] = file
        self.events.append(Event('names', tuple(changes)))

    def _take_handle(self, call: str, arguments: str, texts: list[bytes], result: int, handle: list[Any]) -> None:
        file, position, at_end = handle
        if call in ('fsync', 'fdatasync'):
            self.events.append(Event('sync folder') if file is None else Event('sync', file=file))
        elif call == 'lseek':
            handle[1] = result
        elif call in ('write', 'pwrite64') and file is not None:
            offset = self._sizes[file] if at_end else position
            if call == 'pwrite64':
                offset = int(arguments.rpartition(',')[2])
            else:
                handle[1] = offset + result
            self._sizes[file] = max(self._sizes[file], offset + result)
            self.events.append(Event('write', file=file, offset=offset, data=texts[0][:result]))
        elif call == 'ftruncate' and file is not None:
            self._sizes[file] = int(arguments.rpartition(',')[2])
            self.events.append(Event('write', file=file, offset=self._sizes[file]))
        else:
            raise ValueError(f'{call} of a file of {self.folder} is not known here')
