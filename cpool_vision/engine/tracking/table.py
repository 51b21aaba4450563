"""Tables of a run as CSV files that a resumed run continues: no row twice, none missing."""
import csv
import io
import math
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cpool_vision.errors import OutputError
from cpool_vision.files import sync_directory, write_text
from cpool_vision.reading import TABLE_BYTES, read_bytes

from ..checkpoints.checkpoint import to_plain


def keep_copy(path: str) -> str:
    """Copies NAME.EXTENSION to the first free NAME.N.EXTENSION, and returns that."""
    stem, extension = os.path.splitext(path)
    number = 1
    while os.path.exists(f'{stem}.{number}{extension}'):
        number += 1
    backup = f'{stem}.{number}{extension}'
    shutil.copy2(path, backup)
    return backup


def _lines(path: str) -> list[str]:
    text = read_bytes(path, TABLE_BYTES).decode(errors='replace').replace('\0', '\ufffd')
    return [line.rstrip('\r') for line in text.split('\n') if line.strip()]


def read_rows(path: str) -> list[dict[str, str]]:
    """Rows that begin with an epoch, from 0; others, such as one that a crash cut off, are left out.

    Bytes that are not UTF-8 come out as replacement characters.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is larger than any table of a run.
    """
    if not os.path.exists(path):
        return []
    lines = _lines(path)
    names = next(csv.reader(lines[:1]), [])
    rows = []
    for line in lines[1:]:  # one by one, so that a stray quotation mark does not swallow the rest
        try:
            row = dict(zip(names, next(csv.reader([line])), strict=True))
            whole = 0 <= float(row['epoch']) < 1e15
        except (KeyError, StopIteration, ValueError, csv.Error):
            continue
        if whole:
            rows.append(row)
    return rows


def is_spoilt(path: str, rows: Sequence[Any]) -> bool:
    """Whether a table has no head, or lines that are not rows, but for a last one that a crash cut off."""
    lines, cut = _lines(path), not read_bytes(path, TABLE_BYTES).endswith(b'\n')
    return len(rows) < len(lines) - 1 - cut or bool(lines) and 'epoch' not in lines[0].split(',')


def _write(path: str, rows: list[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=columns, restval='', lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def _epoch(row: Mapping[str, Any]) -> int:
    return int(float(row['epoch']))


class EpochTable:
    """A table with one row or several per epoch, rewritten as a whole with each epoch.

    Args:
        path: the file; it appears with the first row.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def trim(self, first_epoch: int) -> None:
        """Removes the rows from an epoch on; the former file is kept as NAME.N.csv if there were any."""
        rows = read_rows(self.path)
        kept: list[dict[str, Any]] = [row for row in rows if _epoch(row) < first_epoch]
        if len(kept) < len(rows) or os.path.exists(self.path) and is_spoilt(self.path, rows):
            keep_copy(self.path)
            _write(self.path, kept) if kept else os.remove(self.path)

    def add(self, epoch: int, rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Adds rows of an epoch, replacing earlier ones of the same epoch, and returns them."""
        new = [{'epoch': int(epoch), **{key: to_plain(value) for key, value in row.items()}} for row in rows]
        former: list[dict[str, Any]] = [row for row in read_rows(self.path) if _epoch(row) != epoch]
        _write(self.path, [*former, *new])
        return new


class UpdateTable:
    """A table with one row per report inside epochs, to which rows are appended.

    Rows that a resumed run will write again are removed first, and so is a row that a crash cut off.

    Args:
        path: the file; it appears with the first row.
        epoch: epoch in which the run continues.
        update: updates that it has made in all.
    """

    COLUMNS = ('update', 'epoch', 'loss', 'lr', 'images_per_sec')

    def __init__(self, path: str, epoch: int, update: int) -> None:
        self.path = path
        self._file: Any = None
        rows = [row for row in read_rows(path) if self._is_whole(row)]
        kept: list[dict[str, Any]] = [row for row in rows if self._stands(row, epoch, update)]
        if os.path.exists(path):
            if any(_epoch(row) > epoch for row in rows) or is_spoilt(path, rows):
                keep_copy(path)
            _write(path, kept) if kept else os.remove(path)

    def _is_whole(self, row: Mapping[str, Any]) -> bool:
        try:
            numbers = {name: float(row[name]) for name in self.COLUMNS}
        except (KeyError, ValueError):
            return False
        return math.isfinite(numbers['update'])

    @staticmethod
    def _stands(row: Mapping[str, Any], epoch: int, update: int) -> bool:
        return _epoch(row) < epoch or _epoch(row) == epoch and int(float(row['update'])) <= update

    def add(self, update: int, epoch: int, values: Mapping[str, float]) -> None:
        """Appends a row and flushes it to disk, as the next checkpoint counts on it.

        Raises:
            OutputError: the operating system refused.
        """
        row = {'update': update, 'epoch': epoch, **values}
        try:
            new = not os.path.exists(self.path)
            if self._file is None:
                self._file = open(self.path, 'a', newline='', encoding='utf-8')
                if new:
                    self._file.write(','.join(self.COLUMNS) + '\n')
            self._file.write(','.join(repr(to_plain(row[name])) for name in self.COLUMNS) + '\n')
            self._file.flush()
            os.fsync(self._file.fileno())
            if new:
                sync_directory(os.path.dirname(os.path.abspath(self.path)))
        except OSError as error:
            raise OutputError(f'{self.path!r} cannot be written ({error.strerror}): free space or choose another '
                              'folder') from error

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
            self._file = None
