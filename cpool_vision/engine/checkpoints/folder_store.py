"""Folders of parts, written: each process its own part, none the whole.

A checkpoint is a folder `shards-SERIAL`, which appears under that name when all its files are on disk, and is not
changed after that. `last.sharded`, `recovery-EPOCH-BATCH.sharded` and so on are symbolic links to such folders: a link
can be replaced in one step, a folder cannot, and several links can name one checkpoint.
"""
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..atomic import point_atomic, sync_directory
from ..errors import OutputError
from ..processes.sharding import part_of
from .folder_index import FORMAT, Reference, encode, part_name
from .parts import Part, dtype_code, hash_of, part_note, write_part
from .resume import FOLDER
from .seal import INDEX, seal_json

_logger = logging.getLogger(__name__)
_NAME = re.compile(r'shards-\d+(-\d+)?')
_GROWING = '.shards.tmp'  # swept when the run folder is opened


class FolderStore:
    """Where `CheckpointSaver` puts checkpoints in parts.

    Args:
        folder: run folder, the same for all processes.
        rank, processes: of this one, and how many.
        exchange: gives the numbers of all processes for those of this one; see `vote.exchange_rows`.
    """

    extension = FOLDER

    def __init__(self, folder: str, rank: int, processes: int,
                 exchange: Callable[[Sequence[int]], list[list[int]]]) -> None:
        self.folder, self.rank, self.processes, self.exchange = folder, rank, processes, exchange
        self._growing = os.path.join(folder, _GROWING)
        self._index: dict[str, Any] = {}

    def _refuse(self, error: Exception | None, rows: list[list[int]]) -> None:
        """Raises on all processes if one of them failed."""
        if error is not None:
            self._drop()
            reason = getattr(error, 'strerror', None) or error
            raise OutputError(f'the checkpoint cannot be written to {self.folder!r} ({reason}): free space or choose '
                              'another folder') from error
        if not all(row[0] for row in rows):
            self._drop()
            raise OutputError('another process cannot write its part of the checkpoint: see its message')

    def _drop(self) -> None:
        if self.rank == 0:
            shutil.rmtree(self._growing, ignore_errors=True)

    def stage(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Writes the parts of a checkpoint, which `write` completes; every process must call it.

        Args:
            state: nested dictionaries and lists. Of a divided tensor, or a `Part`, each process writes what it holds;
                other tensors are the same on all processes, and the first one writes them.

        Returns:
            The same with the names of the tensors in their places.

        Raises:
            OutputError: a process cannot write; the former checkpoints are intact.
        """
        parts: dict[str, Part] = {}
        tree = self._take(state, '', parts)
        error: Exception | None = None
        if self.rank == 0:
            try:
                if os.path.exists(self._growing):
                    shutil.rmtree(self._growing)
                os.mkdir(self._growing)
            except OSError as caught:
                error = caught
        self._refuse(error, self.exchange([error is None]))

        mine = {name: part.local for name, part in parts.items()
                if part.local.numel() and (part.dim is not None or self.rank == 0)}
        table = {name: {'shape': list(part.shape), 'dtype': dtype_code(part.local.dtype), 'dim': part.dim,
                        'offsets': list(part.offsets)} for name, part in parts.items()}
        sha256, size = b'\0' * 32, 0
        try:
            sha256, size = write_part(os.path.join(self._growing, part_name(self.rank, self.processes)), mine,
                                      {'format': 'pt', 'part': part_note(self.rank, self.processes)})
        except (OSError, RuntimeError) as caught:
            error = caught
        words = [int.from_bytes(sha256[place:place + 8], 'little', signed=True) for place in range(0, 32, 8)]
        rows = self.exchange([error is None, size, hash_of(repr(table)), *words])
        self._refuse(error, rows)
        if len({row[2] for row in rows}) > 1:
            self._drop()
            raise OutputError('the processes do not hold parts of the same tensors: start them with the same flags')
        self._index = {
            'format': FORMAT,
            'files': [{'name': part_name(index, self.processes), 'bytes': row[1], 'sha256': b''.join(
                word.to_bytes(8, 'little', signed=True) for word in row[3:]).hex()} for index, row in enumerate(rows)],
            'tensors': table,
        }
        return tree

    def _take(self, value: Any, name: str, parts: dict[str, Part]) -> Any:
        if isinstance(value, Mapping):
            return {key: self._take(item, f'{name}/{key}' if name else str(key), parts) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._take(item, f'{name}/{place}', parts) for place, item in enumerate(value)]
        if not isinstance(value, (Part, torch.Tensor)):
            return value
        if name in parts:
            raise ValueError(f'two tensors have the name {name}')
        parts[name] = value if isinstance(value, Part) else part_of(value)
        return Reference(name)

    def write(self, path: str, content: Mapping[str, Any], serial: int) -> None:
        """Completes the parts that were staged last by an index, and publishes them; for the first process.

        Args:
            path: link to the new folder.
            content: what `stage` returned, with further plain values.
            serial: see `seal.Seal`.

        Raises:
            OutputError: the operating system refused, or other processes wrote elsewhere; the former checkpoint stands.
        """
        text = seal_json({**self._index, 'state': encode(content)}, serial)
        try:
            for entry in self._index['files']:
                found = os.path.getsize(os.path.join(self._growing, entry['name']))
                if found != entry['bytes']:
                    raise OSError(f'{entry["name"]} has {found} of {entry["bytes"]} bytes')
            with open(os.path.join(self._growing, INDEX), 'wb') as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            sync_directory(self._growing)
            name, number = f'shards-{serial}', 0
            while os.path.lexists(os.path.join(self.folder, name)):  # of a run that was killed, or damaged
                number += 1
                name = f'shards-{serial}-{number}'
            os.rename(self._growing, os.path.join(self.folder, name))
            sync_directory(self.folder)
        except FileNotFoundError as error:
            raise OutputError(f'{error.filename!r}, a part of another process, is missing: --output must be a folder '
                              'that all of them share') from error
        except OSError as error:
            raise OutputError(f'{path!r} cannot be written ({error.strerror or error}): free space or choose another '
                              'folder') from error
        finally:
            self._drop()
        point_atomic(path, name)

    def link(self, source: str, target: str) -> None:
        """Gives a checkpoint a second name.

        Raises:
            OutputError: the operating system refused.
        """
        point_atomic(target, os.path.basename(os.path.realpath(source)))

    @contextmanager
    def keep_former(self, path: str, name: str) -> Iterator[None]:
        """Gives the checkpoint under `path` the name `name`, if the body replaces it and does not fail."""
        former = os.path.basename(os.path.realpath(path)) if os.path.exists(path) else ''
        yield
        if former:
            point_atomic(name, former)


def remove_unnamed(folder: str) -> None:
    """Removes the checkpoints in parts of a run folder that no link there names, as file systems do with files."""
    try:
        entries = list(os.scandir(folder))
        named = {os.path.realpath(entry.path) for entry in entries if entry.is_symlink()}
        for entry in entries:
            if _NAME.fullmatch(entry.name) and not entry.is_symlink() and os.path.realpath(entry.path) not in named:
                # a folder under its name is complete, also when this is cut off
                hidden = os.path.join(folder, f'.{entry.name}.tmp')
                os.replace(entry.path, hidden)
                shutil.rmtree(hidden)
    except OSError as error:
        _logger.warning('Old checkpoints cannot be removed (%s).', error)
