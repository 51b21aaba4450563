"""Folders of parts, read: an index in JSON, and the tensors of each process in a safetensors file of its own.

The index names what each tensor is and where its parts begin, the SHA-256 of each file, and holds everything that is no
tensor. It is checked in full before a number in it is used: files lie in the folder under the names that belong to
their places, parts follow each other without gaps, and no tensor is larger than the files.
"""
import math
import os
import stat
from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError, CheckpointNotFoundError
from .parts import DTYPES, PartFiles, StoredTensor
from .seal import INDEX, hash_file, read_sealed_json

FORMAT = 'cpool_vision checkpoint in parts'
_TENSOR, _ITEMS = '$tensor', '$items'
_LARGEST = 2 ** 48  # entries of a tensor, beyond any memory


class Reference(str):
    """Name of a tensor, in the place of it."""


def part_name(index: int, count: int) -> str:
    """File of the part of one process, counted from 0."""
    return f'part-{index:05d}-of-{count:05d}.safetensors'


def encode(value: Any) -> Any:
    """Nested plain values and references as JSON has them; keys keep their types.

    Raises:
        TypeError: another type.
    """
    if isinstance(value, Reference):
        return {_TENSOR: str(value)}
    if isinstance(value, Mapping):
        if all(type(key) is str and not key.startswith('$') for key in value):
            return {key: encode(item) for key, item in value.items()}
        return {_ITEMS: [[encode(key), encode(item)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(f'a checkpoint in parts cannot hold a {type(value).__name__}')


def _decode(value: Any, tensors: dict[str, StoredTensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return tensors.pop(value[_TENSOR])  # a second use would be a KeyError: reading it costs memory each time
    if _ITEMS in value:
        return {key: _decode(item, tensors) for key, item in value[_ITEMS]}
    return {key: _decode(item, tensors) for key, item in value.items()}


def is_folder(path: str) -> bool:
    """Whether a path is a folder that holds a checkpoint in parts, to judge by its index."""
    return os.path.isfile(os.path.join(path, INDEX))


def _check_regular(path: str) -> int:
    """Size of a file that is neither a link nor a device."""
    status = os.lstat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f'{os.path.basename(path)} is no regular file')
    return status.st_size


def _integers(values: Any, what: str) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(each) is int and each >= 0 for each in values):
        raise ValueError(f'{what} {str(values)[:80]} is not a list of sizes')
    return tuple(values)


def _read_tensors(entries: Mapping[str, Any], files: PartFiles, sizes: list[int]) -> dict[str, StoredTensor]:
    left, tensors, count = list(sizes), {}, len(sizes)
    for name, entry in entries.items():
        if entry['dtype'] not in DTYPES:
            raise ValueError(f'{name} has the unknown dtype {entry["dtype"]!r}')
        dtype, dim = DTYPES[entry['dtype']], entry['dim']
        shape, offsets = _integers(entry['shape'], name), _integers(entry['offsets'], name)
        if math.prod(max(size, 1) for size in shape) > _LARGEST:  # also where another size is 0
            raise ValueError(f'{name} of shape {shape} is too large')
        if dim is None:
            left[0] -= math.prod(shape) * dtype.itemsize
            sound = not offsets
        else:
            sound = (type(dim) is int and 0 <= dim < len(shape) and len(offsets) == count + 1 and offsets[0] == 0
                     and offsets[-1] == shape[dim] and list(offsets) == sorted(offsets))
            for index in range(count if sound else 0):
                rest = math.prod(shape[:dim]) * math.prod(shape[dim + 1:])
                left[index] -= (offsets[index + 1] - offsets[index]) * rest * dtype.itemsize
        if not sound:
            raise ValueError(f'the parts of {name} do not make up a tensor of shape {shape}')
        if min(left) < 0:
            raise ValueError(f'{name} of shape {shape} is larger than the files')
        tensors[name] = StoredTensor(name, shape, dtype, dim, offsets, files)
    return tensors


def open_folder(path: str, flag: str, rank: int = 0, processes: int = 1) -> dict[str, Any]:
    """Opens a checkpoint in parts; its tensors stay in the files, see `StoredTensor`.

    Args:
        path: the folder.
        flag: flag that named it, for messages.
        rank, processes: of several processes that open it together, each compares its share of the parts with their
            hashes; what one of them finds the others must be told.

    Returns:
        The dictionary that was saved.

    Raises:
        CheckpointNotFoundError: no such folder, or it has no index.
        CheckpointVersionError: written by a newer release.
        CheckpointError: a file is missing or damaged, or the index does not describe a checkpoint.
    """
    if not is_folder(path):
        raise CheckpointNotFoundError(f'{flag} {path!r} is no checkpoint: a folder of parts has the file {INDEX}')
    index_path = os.path.join(path, INDEX)
    try:
        _check_regular(index_path)
        index = read_sealed_json(index_path, flag)
        if index['format'] != FORMAT:
            raise ValueError(f'its format is {index["format"]!r}')
        count = len(index['files'])
        for number, entry in enumerate(index['files']):
            if entry['name'] != part_name(number, count):
                raise ValueError(f'it names the file {entry["name"]!r}, expected {part_name(number, count)!r}')
        paths = [os.path.join(path, part_name(number, count)) for number in range(count)]
        sizes = [_check_regular(each) for each in paths]
        for number, entry in enumerate(index['files']):
            if sizes[number] != entry['bytes']:
                raise ValueError(f'{entry["name"]} has {sizes[number]} bytes, expected {entry["bytes"]}')
        for number in range(rank, count, processes):
            if hash_file(paths[number]).hexdigest() != index['files'][number]['sha256']:
                raise ValueError(f'{part_name(number, count)} does not have the hash that it was written with')
        tensors = _read_tensors(index['tensors'], PartFiles(paths), sizes)
        content = _decode(index['state'], tensors)
        if tensors or not isinstance(content, dict):
            raise ValueError(f'its state leaves out {next(iter(tensors), "everything")}')
        return content
    except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        reason = error.strerror if isinstance(error, OSError) else ' '.join(str(error).split())[:200]
        name = f'{os.path.basename(error.filename)}: ' if isinstance(error, OSError) and error.filename else ''
        raise CheckpointError(f'{flag} {path!r} is damaged or no checkpoint ({name}{reason}): use another copy') \
            from error
