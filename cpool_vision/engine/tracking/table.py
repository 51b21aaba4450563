"""CSV tables of a run that a resumed run continues without a missing or repeated row."""
import csv
import io
import itertools
import math
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from typing import TextIO

from cpool_vision.errors import OutputError
from cpool_vision.files import sync_directory, write_text
from cpool_vision.reading import TABLE_BYTES, read_bytes


def keep_copy(path: str) -> None:
    """Copies NAME.EXTENSION to the first free NAME.N.EXTENSION."""
    stem, extension = os.path.splitext(path)
    copies = (f'{stem}.{number}{extension}' for number in itertools.count(1))
    shutil.copy2(path, next(copy for copy in copies if not os.path.exists(copy)))


def _lines(path: str) -> list[str]:
    text = read_bytes(path, TABLE_BYTES).decode(errors='replace').replace('\0', '\ufffd')
    return [line.rstrip('\r') for line in text.split('\n') if line.strip()]


def read_rows(path: str) -> list[dict[str, str]]:
    """Reads the rows that have an epoch >= 0. Skips other lines, such as one that a crash cut off.

    Bytes that are not UTF-8 become replacement characters.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If the file is larger than a table of a run can be.
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


def is_damaged(path: str, rows: Sequence[object]) -> bool:
    """Returns whether a table has no header or has lines that are not rows. A last line without its end is fine."""
    lines, cut = _lines(path), not read_bytes(path, TABLE_BYTES).endswith(b'\n')
    return len(rows) < len(lines) - 1 - cut or bool(lines) and 'epoch' not in lines[0].split(',')


def _write(path: str, rows: Sequence[Mapping[str, object]]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=columns, restval='', lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def _whole_number(text: str) -> int:
    return int(float(text))


class EpochTable:
    """A table with one or more rows per epoch. The file is rewritten with each epoch.

    Args:
        path: The file. It is created with the first row.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def trim(self, first_epoch: int) -> None:
        """Removes the rows from `first_epoch` on; if there are any, keeps a copy of the old file as NAME.N.csv."""
        rows = read_rows(self.path)
        kept = [row for row in rows if _whole_number(row['epoch']) < first_epoch]
        if len(kept) < len(rows) or os.path.exists(self.path) and is_damaged(self.path, rows):
            keep_copy(self.path)
            _write(self.path, kept) if kept else os.remove(self.path)

    def add(self, epoch: int, rows: Iterable[Mapping[str, float | str]]) -> None:
        """Adds the rows of an epoch, and drops earlier rows of the same epoch."""
        former = [row for row in read_rows(self.path) if _whole_number(row['epoch']) != epoch]
        _write(self.path, [*former, *({'epoch': epoch, **row} for row in rows)])


class UpdateTable:
    """A table to which a row is appended at each log line.

    Opening it removes the rows that a resumed run will write again, and a row that a crash cut off.

    Args:
        path: The file. It is created with the first row.
        epoch: Epoch in which the run continues.
        update: Updates since the start of the run.
    """

    COLUMNS = ('update', 'epoch', 'loss', 'lr', 'images_per_sec')

    def __init__(self, path: str, epoch: int, update: int) -> None:
        self.path = path
        self._file: TextIO | None = None
        rows = [row for row in read_rows(path) if self._is_complete(row)]
        places = [(_whole_number(row['epoch']), _whole_number(row['update'])) for row in rows]
        kept = [row for row, place in zip(rows, places, strict=True) if place <= (epoch, update)]
        if os.path.exists(path):
            if any(place[0] > epoch for place in places) or is_damaged(path, rows):
                keep_copy(path)
            _write(path, kept) if kept else os.remove(path)

    def _is_complete(self, row: Mapping[str, str]) -> bool:
        try:
            numbers = {name: float(row[name]) for name in self.COLUMNS}
        except (KeyError, ValueError):
            return False
        return math.isfinite(numbers['update'])

    def add(self, update: int, epoch: int, values: Mapping[str, float]) -> None:
        """Appends a row and flushes it to disk before the next checkpoint is written.

        Raises:
            OutputError: If the file cannot be written.
        """
        row = {'update': update, 'epoch': epoch, **values}
        try:
            new = not os.path.exists(self.path)
            if self._file is None:
                self._file = open(self.path, 'a', newline='', encoding='utf-8')
                if new:
                    self._file.write(','.join(self.COLUMNS) + '\n')
            self._file.write(','.join(repr(row[name]) for name in self.COLUMNS) + '\n')
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
