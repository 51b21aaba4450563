"""Seal of a checkpoint: content hash, schema version and serial number.

`torch.save` writes a zip archive whose checksums `torch.load` does not verify. The comment, which every reader skips,
holds a hash: file and seal are published by one rename, and a second name of the file carries the seal too. In a folder
of parts the seal is the first line of the index, which holds the hash of each part.
"""
import hashlib
import json
import os
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..atomic import write_atomic
from ..errors import CheckpointError, CheckpointVersionError

SCHEMA = 1
INDEX = 'index.json'  # of a folder of parts
_MARK = b'cpool_vision checkpoint '
_END = b'PK\x05\x06'  # of the archive: 22 bytes that close with the length of the comment
_TAIL = 2048
_CHUNK = 1 << 22
_OPEN, _NEXT = b'{"seal": ', b',\n'


@dataclass(frozen=True)
class Seal:
    """What a sealed checkpoint says of itself.

    Attributes:
        sha256: of the file as `torch.save` wrote it; of an index, of all but the first line.
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
    with open(path, 'rb') as file:
        file.seek(max(0, size - _TAIL))
        tail = file.read()
    end = tail.rfind(_END)
    if end < 0 or len(tail) < end + 22:
        return size, b''
    comment = tail[end + 22:]
    return size - len(comment), comment


def read_seal(path: str) -> Seal | None:
    """Seal of a file or folder, without a look at the rest; None if it has none or cannot be read."""
    try:
        if os.path.isdir(path):
            with open(os.path.join(path, INDEX), 'rb') as file:
                return _parse_line(file.readline(_TAIL))
        comment = _find_comment(path)[1]
        return Seal(**json.loads(comment[len(_MARK):])) if comment.startswith(_MARK) else None
    except (OSError, ValueError, TypeError):
        return None


def _check_schema(seal: Seal, path: str, flag: str) -> None:
    if seal.schema > SCHEMA:
        raise CheckpointVersionError(f'{flag} {path!r} has schema version {seal.schema}, this release reads up to '
                                     f'{SCHEMA}: upgrade cpool_vision')


def hash_file(path: str, size: int | None = None) -> Any:
    """SHA-256 of the first bytes of a file, or of all; to be updated further.

    Args:
        path: the file, which may be larger than the memory.
        size: how many bytes, all of them if None.
    """
    sha256 = hashlib.sha256()
    with open(path, 'rb') as file:
        left = os.path.getsize(path) if size is None else size
        while left > 0:
            chunk = file.read(min(_CHUNK, left))
            if not chunk:
                break
            sha256.update(chunk)
            left -= len(chunk)
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
    _check_schema(seal, path, flag)
    sha256 = hash_file(path, start - 2)
    sha256.update(b'\0\0')  # the length of the comment before there was one
    if sha256.hexdigest() != seal.sha256:
        raise CheckpointError(f'{flag} {path!r} is damaged (its content does not have the hash that it was written '
                              'with): use another copy')
    return seal


def seal_json(content: Any, serial: int) -> bytes:
    """A JSON text with its seal: an object of `seal`, which fills the first line, and `content`."""
    body = b'"content": ' + json.dumps(content).encode() + b'}\n'
    seal = Seal(hashlib.sha256(body).hexdigest(), SCHEMA, serial)
    return _OPEN + json.dumps(asdict(seal)).encode() + _NEXT + body


def _parse_line(line: bytes) -> Seal | None:
    if not line.startswith(_OPEN) or not line.endswith(_NEXT):
        return None
    return Seal(**json.loads(line[len(_OPEN):-len(_NEXT)]))


def read_sealed_json(path: str, flag: str) -> Any:
    """Content of a file that `seal_json` made.

    Raises:
        CheckpointVersionError: written by a newer release.
        CheckpointError: it cannot be read, or is not what was written.
    """
    try:
        with open(path, 'rb') as file:
            seal, body = _parse_line(file.readline(_TAIL)), file.read()
        if seal is None:
            raise ValueError('no seal')
        _check_schema(seal, path, flag)
        if hashlib.sha256(body).hexdigest() != seal.sha256:
            raise ValueError('its content does not have the hash that it was written with')
        return json.loads(b'{' + body)['content']
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f'{flag} {path!r} is damaged ({error}): use another copy') from error
