"""The seal of a checkpoint: a hash of its content, a schema version, and a serial number.

`torch.save` writes a zip archive, whose checksums `torch.load` does not verify. The seal is in the comment of the
archive, which other readers ignore. One rename therefore publishes the file with its seal, and links to it have it too.
"""
import hashlib
import json
import os
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import BinaryIO, cast

import torch

from cpool_vision.errors import CheckpointError, CheckpointVersionError
from cpool_vision.files import write_atomic
from cpool_vision.reading import open_regular

SCHEMA = 1
_MARK = b'cpool_vision checkpoint '
_END = b'PK\x05\x06'  # the end record of the archive: 22 bytes, of which the last two are the length of the comment
_TAIL = 2048  # bytes at the end of the file that contain the end record and the comment
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Seal:
    """The seal of a checkpoint.

    Attributes:
        sha256: Hash of the file as written by `torch.save`.
        schema: Version of the keys and their meaning.
        serial: Number of the checkpoint within its folder; the newest checkpoint has the highest.
    """

    sha256: str
    schema: int
    serial: int


class HashedFile:
    """Passes what is written to it on to a file, and hashes it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> int:
        self.sha256.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def save_sealed(path: str, content: Mapping[str, object], serial: int) -> None:
    """Writes a checkpoint with its seal by `write_atomic`.

    Args:
        path: Target file.
        content: Dictionary to save.
        serial: See `Seal`.

    Raises:
        OutputError: If the file cannot be written. An old file is intact.
    """
    def write(file: BinaryIO) -> None:
        hashed = HashedFile(file)
        torch.save(content, cast(BinaryIO, hashed))
        seal = Seal(hashed.sha256.hexdigest(), SCHEMA, serial)
        comment = _MARK + json.dumps(asdict(seal)).encode()
        file.seek(-2, os.SEEK_END)
        file.write(struct.pack('<H', len(comment)) + comment)

    write_atomic(path, write)


def _find_comment(path: str) -> tuple[int, bytes]:
    """Returns the offset of the comment of the archive, and the comment; b'' if there is none."""
    size = os.path.getsize(path)
    with open_regular(path) as file:
        file.seek(max(0, size - _TAIL))
        tail = file.read()
    end = tail.rfind(_END)
    if end < 0 or len(tail) < end + 22:
        return size, b''
    comment = tail[end + 22:]
    return size - len(comment), comment


def _parse(comment: bytes) -> Seal | None:
    """Parses the seal in a comment; None if it contains no valid seal."""
    try:
        seal = Seal(**json.loads(comment.removeprefix(_MARK)))
    except (ValueError, TypeError, RecursionError):
        return None
    valid = isinstance(seal.sha256, str) and type(seal.schema) is int and type(seal.serial) is int
    return seal if valid and comment.startswith(_MARK) else None


def read_seal(path: str) -> Seal | None:
    """Reads the seal of a file without checking the content; None if the file has no seal or cannot be read."""
    try:
        return _parse(_find_comment(path)[1])
    except OSError:
        return None


def check_seal(path: str, flag: str) -> Seal | None:
    """Checks the content of a file against its seal. Files without a seal, such as timm's, pass.

    Args:
        path: The file.
        flag: Flag that named the file, for messages.

    Returns:
        The seal, or None if there is none.

    Raises:
        CheckpointVersionError: If a newer release wrote the file.
        CheckpointError: If the content has changed since it was written.
    """
    start, comment = _find_comment(path)
    if not comment.startswith(_MARK):
        return None
    seal = _parse(comment)
    if seal is None:
        raise CheckpointError(f'{flag} {path!r} is damaged (its seal cannot be read): use another copy')
    if seal.schema > SCHEMA:
        raise CheckpointVersionError(f'{flag} {path!r} has schema version {seal.schema}, this release reads up to '
                                     f'{SCHEMA}: upgrade cpool_vision')
    sha256, left = hashlib.sha256(), start - 2
    with open_regular(path) as file:  # in chunks: the file may be larger than the memory
        while left > 0 and (chunk := file.read(min(_CHUNK, left))):
            sha256.update(chunk)
            left -= len(chunk)
    sha256.update(b'\0\0')  # the length of the comment before the seal was added
    if sha256.hexdigest() != seal.sha256:
        raise CheckpointError(f'{flag} {path!r} is damaged (its content does not match its hash): use another copy')
    return seal
