"""Seal of a checkpoint: content hash, schema version and serial number.

`torch.save` writes a zip archive whose checksums `torch.load` does not verify. The comment, which every reader skips,
holds a hash: file and seal are published by one rename, and a second name of the file carries the seal too.
"""
import hashlib
import json
import os
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from cpool_vision.errors import CheckpointError, CheckpointVersionError
from cpool_vision.files import write_atomic
from cpool_vision.reading import open_regular

SCHEMA = 1
_MARK = b'cpool_vision checkpoint '
_END = b'PK\x05\x06'  # of the archive: 22 bytes that close with the length of the comment
_TAIL = 2048
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Seal:
    """What a sealed checkpoint says of itself.

    Attributes:
        sha256: of the file as `torch.save` wrote it.
        schema: version of the keys and of their meaning.
        serial: counts the checkpoints that were written into one folder, so that the newest is known.
    """

    sha256: str
    schema: int
    serial: int


class HashedFile:
    """A binary file that hashes what is written to it."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.sha256 = hashlib.sha256()

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def save_sealed(path: str, content: Mapping[str, Any], serial: int) -> None:
    """Writes a checkpoint with its seal in one step, see `write_atomic`.

    Args:
        path: target.
        content: what `torch.save` writes.
        serial: see `Seal`.

    Raises:
        OutputError: the operating system refused; a former file is intact.
    """
    def write(file: Any) -> None:
        hashed: Any = HashedFile(file)
        torch.save(content, hashed)
        seal = Seal(hashed.sha256.hexdigest(), SCHEMA, serial)
        comment = _MARK + json.dumps(asdict(seal)).encode()
        file.seek(-2, os.SEEK_END)
        file.write(struct.pack('<H', len(comment)) + comment)

    write_atomic(path, write)


def _find_comment(path: str) -> tuple[int, bytes]:
    """Where the comment of the archive begins, and the comment; b'' if there is none."""
    size = os.path.getsize(path)
    with open_regular(path) as file:
        file.seek(max(0, size - _TAIL))
        tail = file.read()
    end = tail.rfind(_END)
    if end < 0 or len(tail) < end + 22:
        return size, b''
    comment = tail[end + 22:]
    return size - len(comment), comment


def read_seal(path: str) -> Seal | None:
    """Seal of a file, without a look at the rest; None if it has none or cannot be read."""
    try:
        comment = _find_comment(path)[1]
        return _parse(comment[len(_MARK):]) if comment.startswith(_MARK) else None
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def hash_of(text: str) -> int:
    """63 bits of the hash of a text, for comparison between processes."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], 'little') >> 1


def _hash_start(path: str, size: int) -> Any:
    """SHA-256 of the first bytes of a file, to be updated further; the file may be larger than the memory."""
    sha256 = hashlib.sha256()
    with open_regular(path) as file:
        while size > 0 and (chunk := file.read(min(_CHUNK, size))):
            sha256.update(chunk)
            size -= len(chunk)
    return sha256


def check_seal(path: str, flag: str) -> Seal | None:
    """Compares a file with its seal; files without one, such as timm's, pass.

    Args:
        path: the file.
        flag: flag that named it, for messages.

    Returns:
        The seal, if any.

    Raises:
        CheckpointVersionError: written by a newer release.
        CheckpointError: the content is not what was written.
    """
    start, comment = _find_comment(path)
    if not comment.startswith(_MARK):
        return None
    seal = read_seal(path)
    if seal is None:
        raise CheckpointError(f'{flag} {path!r} is damaged (its seal cannot be read): use another copy')
    if seal.schema > SCHEMA:
        raise CheckpointVersionError(f'{flag} {path!r} has schema version {seal.schema}, this release reads up to '
                                     f'{SCHEMA}: upgrade cpool_vision')
    sha256 = _hash_start(path, start - 2)
    sha256.update(b'\0\0')  # the length of the comment before there was one
    if sha256.hexdigest() != seal.sha256:
        raise CheckpointError(f'{flag} {path!r} is damaged (its content does not have the hash that it was written '
                              'with): use another copy')
    return seal


def _parse(text: bytes) -> Seal:
    seal = Seal(**json.loads(text))
    if not (isinstance(seal.sha256, str) and type(seal.schema) is int and type(seal.serial) is int):
        raise ValueError('a seal holds a hash and two numbers')
    return seal
