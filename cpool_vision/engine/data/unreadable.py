"""Images that cannot be decoded: found, counted, listed and capped."""
import logging
import math
import os
import struct
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from PIL import Image
from timm.data import ImageDataset
from torch.utils.data import Dataset

from cpool_vision.data.images import open_image
from cpool_vision.errors import DatasetError
from cpool_vision.files import write_atomic
from cpool_vision.reading import one_line, open_text

_logger = logging.getLogger(__name__)
UNREADABLE = -100  # label of an image that could not be decoded: the ignore_index of cross-entropy
DECODE_ERRORS = (OSError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError)
LIST_NAME = 'unreadable.txt'


class UnreadableImageError(Exception):
    """The image of a sample cannot be decoded."""


class StrictImageDataset(ImageDataset):
    """timm's `ImageDataset`, but an unreadable image is an error, where timm's hands out its neighbor.

    Images are decoded by `data.images.open_image`.
    """

    def __init__(self, dataset: ImageDataset) -> None:
        super().__init__(None, reader=dataset.reader, load_bytes=dataset.load_bytes,
                         input_img_mode=dataset.input_img_mode, transform=dataset.transform,
                         target_transform=dataset.target_transform)

    def _load(self, index: int) -> tuple[Any, Any]:
        try:
            file, target, *_ = self.reader[index]
            with file:
                return file.read() if self.load_bytes else open_image(file, self.input_img_mode or 'RGB'), target
        except (*DECODE_ERRORS, ValueError) as error:
            raise UnreadableImageError(' '.join(str(error).split()) or type(error).__name__) from error

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image, target = self._load(index)
        if self.transform is not None:
            image = self.transform(image)
        if getattr(self.target_transform, 'takes_all', False):
            target = self.target_transform(target)
        elif target is None:
            target = -1
        elif self.target_transform is not None and target != UNREADABLE:
            target = self.target_transform(target)
        return image, target


class CountingImageDataset(StrictImageDataset):
    """Validation images, of which an unreadable one comes out blank with the label `UNREADABLE`."""

    def _load(self, index: int) -> tuple[Any, Any]:
        try:
            return super()._load(index)
        except UnreadableImageError as error:
            _logger.warning('Image %s cannot be read (%s).', one_line(self.filename(index)), error)
            return Image.new(self.input_img_mode or 'RGB', (64, 64)), UNREADABLE


def sample_name(dataset: Dataset[Any], index: int) -> str:
    """Path of a sample within its set, or its number where the set has no names."""
    filename = getattr(dataset, 'filename', None)
    if filename is not None:
        return str(filename(index))
    samples = getattr(dataset, 'samples', None)
    return str(samples[index][0]) if samples else f'sample {index}'


def count_allowed(limit: float, total: int) -> int:
    """How many of `total` images `--max-bad-samples` allows: from 1 on a number, below 1 a share, rounded up."""
    return int(limit) if limit >= 1 else math.ceil(limit * total)


def refuse_unreadable(dataset: Dataset[Any], positions: list[int], total: int, limit: float = 0.) -> None:
    """Refuses validation images that cannot be read, or warns of as many as are allowed.

    Args:
        dataset: validation set.
        positions: numbers of the images that could not be decoded.
        total: images in all.
        limit: see `count_allowed`.

    Raises:
        DatasetError: there are more than allowed.
    """
    if not positions:
        return
    text = f'{len(positions)} of {total} images cannot be read: {_enumerate(dataset, positions)}'
    if len(positions) > count_allowed(limit, total):
        raise DatasetError(f'{text}; restore or remove them, or allow them with --max-bad-samples; the accuracy would '
                           'be wrong')
    _logger.warning('%s; they are left out of the metrics.', text)


def _enumerate(dataset: Any, indices: list[int]) -> str:
    more = f' and {len(indices) - 5} more' if len(indices) > 5 else ''
    return ', '.join(one_line(sample_name(dataset, index)) for index in indices[:5]) + more


@dataclass(frozen=True)
class Unreadable:
    """A training image that was replaced: its number, its path within the set, and why."""

    index: int
    path: str
    reason: str


class UnreadableLog:
    """The unreadable training images of a run, listed in the file `unreadable.txt` of its folder.

    Args:
        dataset: training set.
        limit: how many are tolerated, see `count_allowed`.
    """

    def __init__(self, dataset: Any, limit: float) -> None:
        self.dataset = dataset
        self.allowed = count_allowed(limit, len(dataset))
        self.limit = limit
        self.folder = ''
        self.found: dict[int, Unreadable] = {}
        self._listed: set[int] = set()

    def open(self, folder: str) -> None:
        """Lists into `folder` from now on, beside what an earlier part of the run listed; '' for no list."""
        self.folder = folder
        path = os.path.join(folder, LIST_NAME)
        if folder and os.path.exists(path):
            with open_text(path, encoding='utf-8', errors='surrogateescape') as file:
                numbers = [line.split('\t')[0] for line in file]
            self._listed |= {int(number) for number in numbers if number.isdecimal()}
        self._list(set(self.found))

    def _list(self, indices: set[int]) -> None:
        if not self.folder or indices <= self._listed:
            return
        self._listed |= indices
        text = ''.join(f'{index}\t{one_line(sample_name(self.dataset, index))}\n' for index in sorted(self._listed))
        content = text.encode(errors='surrogateescape')  # as file names may hold bytes that are not UTF-8
        write_atomic(os.path.join(self.folder, LIST_NAME), lambda file: file.write(content))

    def add(self, images: list[Unreadable]) -> None:
        """Takes note of images that a batch did without.

        Raises:
            DatasetError: there are more than tolerated.
        """
        new = {image.index: image for image in images if image.index not in self.found}
        if not new:
            return
        self.found.update(new)
        for image in new.values():
            _logger.warning('Training image %s (number %d) cannot be read (%s): it is replaced by another one.',
                            one_line(image.path), image.index, image.reason)
        self._list(set(self.found))
        if len(self.found) > self.allowed:
            raise DatasetError(
                f'{len(self.found)} training images cannot be read, more than --max-bad-samples {self.limit:g} allows '
                f'({self.allowed}): {_enumerate(self.dataset, list(self.found))}; restore or remove them, or raise '
                '--max-bad-samples')

    def share(self, device: torch.device) -> int:
        """Lists what all processes found, on the one that has a folder; every process must call it.

        Returns:
            How many there are in all.
        """
        found = set(self.found)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            world_size = torch.distributed.get_world_size()
            count = torch.tensor([len(found)], device=device)
            counts = [torch.zeros_like(count) for _ in range(world_size)]
            torch.distributed.all_gather(counts, count)
            longest = int(torch.cat(counts).max())
            if longest:
                mine = torch.tensor([*sorted(found), *[-1] * (longest - len(found))], device=device)
                all_found = [torch.empty_like(mine) for _ in range(world_size)]
                torch.distributed.all_gather(all_found, mine)
                found = set(torch.cat(all_found).tolist()) - {-1}
        self._list(found)
        return len(found)
