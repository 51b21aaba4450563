"""Tensors in parts: what one process holds of a tensor, files of such parts, and the reading of any slice of them."""
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import safetensors
import torch

from ..errors import CheckpointError
from .seal import HashedFile

DTYPES = {'F64': torch.float64, 'F32': torch.float32, 'F16': torch.float16, 'BF16': torch.bfloat16, 'I64': torch.int64,
          'I32': torch.int32, 'I16': torch.int16, 'I8': torch.int8, 'U8': torch.uint8, 'BOOL': torch.bool}
_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Part:
    """What one process holds of a tensor.

    Attributes:
        local: its part, possibly without entries.
        shape: of the whole.
        dim: along which the tensor is divided, None if each process has all of it.
        offsets: where the part of each process begins along `dim`, and the end; empty without `dim`.
    """

    local: torch.Tensor
    shape: tuple[int, ...]
    dim: int | None = None
    offsets: tuple[int, ...] = ()


class Item(NamedTuple):
    """An entry of a safetensors file; `fetch` is called when its turn comes, so that one is held at a time."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    fetch: Callable[[], torch.Tensor]


def dtype_code(dtype: torch.dtype) -> str:
    """Name of a dtype in safetensors files.

    Raises:
        TypeError: it has none here.
    """
    if dtype not in _CODES:
        raise TypeError(f'tensors of {dtype} cannot be written in parts')
    return _CODES[dtype]


def write_safetensors(file: Any, items: Mapping[str, Item], metadata: Mapping[str, str]) -> None:
    """Writes tensors, bit for bit, holding one of them at a time.

    Args:
        file: open for writing.
        items: the tensors by name.
        metadata: goes into the header.
    """
    # wide types first, so that every entry is aligned
    names = sorted(items, key=lambda name: (-items[name].dtype.itemsize, name))
    header: dict[str, Any] = {'__metadata__': dict(metadata)}
    end = 0
    for name in names:
        begin, end = end, end + math.prod(items[name].shape) * items[name].dtype.itemsize
        header[name] = {'dtype': dtype_code(items[name].dtype), 'shape': list(items[name].shape),
                        'data_offsets': [begin, end]}
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % 8)
    file.write(len(text).to_bytes(8, 'little') + text)
    for name in names:
        tensor = items[name].fetch()
        file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def write_part(path: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> tuple[bytes, int]:
    """Writes a file of tensors and flushes it to disk.

    Returns:
        SHA-256 and number of bytes.

    Raises:
        OSError: the operating system refused.
    """
    items = {name: Item(tensor.dtype, tuple(tensor.shape), lambda tensor=tensor: tensor)  # type: ignore[misc]
             for name, tensor in tensors.items()}
    with open(path, 'wb') as file:
        hashed = HashedFile(file)
        write_safetensors(hashed, items, metadata)
        file.flush()
        os.fsync(file.fileno())
        return hashed.sha256.digest(), file.tell()


class PartFiles:
    """The files of a divided checkpoint, opened as they are needed and read by memory map.

    Args:
        paths: in the order of the processes that wrote them.
    """

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths
        self._open: dict[int, Any] = {}

    def get(self, index: int) -> Any:
        """A reader of one file.

        Raises:
            CheckpointError: it cannot be read, or is the part of another process.
        """
        if index not in self._open:
            try:
                reader: Any = safetensors.safe_open(self.paths[index], 'pt')
                note = (reader.metadata() or {}).get('part')
            except (OSError, safetensors.SafetensorError) as error:
                raise CheckpointError(f'{self.paths[index]!r} cannot be read ({error}): use another copy') from error
            if note != part_note(index, len(self.paths)):
                raise CheckpointError(f'{self.paths[index]!r} is damaged (it holds part {note!r}, expected '
                                      f'{part_note(index, len(self.paths))!r}): use another copy')
            self._open[index] = reader
        return self._open[index]


def part_note(index: int, count: int) -> str:
    """What the header of a part says of its place, from 1."""
    return f'{index + 1} of {count}'


class StoredTensor:
    """A tensor of a divided checkpoint that stays in its files until a slice of it is read.

    Args:
        name: in the files.
        shape, dtype: of the whole.
        dim, offsets: see `Part`; without `dim` the first file holds all.
        files: where the parts are.
    """

    def __init__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, dim: int | None,
                 offsets: tuple[int, ...], files: PartFiles) -> None:
        self.name, self.shape, self.dtype, self.files = name, torch.Size(shape), dtype, files
        self.ndim = len(shape)
        self._axis = dim or 0
        self._offsets = offsets if dim is not None else (0, *shape[:1])

    def _fetch(self, index: int, shape: list[int], place: tuple[slice, ...]) -> torch.Tensor:
        """A slice of one part, which must have the shape that the index says."""
        path = self.files.paths[index]
        reader = self.files.get(index)
        try:
            part = reader.get_slice(self.name)
            found = part.get_dtype(), list(part.get_shape())
            if found != (dtype_code(self.dtype), shape):
                raise CheckpointError(f'{path!r} is damaged ({self.name} is {found[0]} {found[1]}, expected '
                                      f'{dtype_code(self.dtype)} {shape}): use another copy')
            return part[place] if place else reader.get_tensor(self.name)
        except safetensors.SafetensorError as error:
            raise CheckpointError(f'{path!r} cannot be read ({self.name}: {error}): use another copy') from error

    def narrow(self, dim: int, start: int, length: int) -> torch.Tensor:
        """The entries from `start` to `start + length` along `dim`, on the CPU, as `torch.Tensor.narrow` gives them.

        Only these are read.

        Raises:
            CheckpointError: the files do not hold what the index says.
        """
        lows, highs = [0] * self.ndim, list(self.shape)
        lows[dim], highs[dim] = start, start + length
        out = torch.empty([high - low for low, high in zip(lows, highs, strict=True)], dtype=self.dtype)
        axis = self._axis
        for index, (begin, end) in enumerate(zip(self._offsets, self._offsets[1:], strict=False)):
            low, high = max(begin, lows[axis]), min(end, highs[axis])
            if low >= high or not out.numel():
                continue
            shape = [*self.shape[:axis], end - begin, *self.shape[axis + 1:]]
            place = [slice(low, high) for low, high in zip(lows, highs, strict=True)]
            place[axis] = slice(low - begin, high - begin)
            out.narrow(axis, low - lows[axis], high - low).copy_(self._fetch(index, shape, tuple(place)))
        return out

    def whole(self) -> torch.Tensor:
        """All of it, on the CPU.

        Raises:
            CheckpointError: see `narrow`.
        """
        return self.narrow(0, 0, self.shape[0]) if self.ndim else self._fetch(0, [], ()).clone()


def make_whole(value: Any) -> Any:
    """Nested values with each stored tensor read whole."""
    if isinstance(value, Mapping):
        return {key: make_whole(item) for key, item in value.items()}
    if isinstance(value, list):
        return [make_whole(item) for item in value]
    return value.whole() if isinstance(value, StoredTensor) else value


def hash_of(text: str) -> int:
    """63 bits of the hash of a text, for comparison between processes."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], 'little') >> 1
