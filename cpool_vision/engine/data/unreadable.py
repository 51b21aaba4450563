"""Images that cannot be decoded: replaced or skipped, listed, and limited by `--max-bad-samples`."""
import logging
import math
import os
import struct
from collections.abc import Sized
from dataclasses import dataclass

import torch.distributed
from PIL import Image
from timm.data import ImageDataset

from cpool_vision.data.images import open_image
from cpool_vision.errors import DatasetError
from cpool_vision.files import write_text
from cpool_vision.reading import one_line, open_text

_logger = logging.getLogger(__name__)
UNREADABLE = -100  # label of an image that cannot be decoded; cross-entropy ignores it
DECODE_ERRORS = (OSError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError)
LIST_NAME = 'unreadable.txt'


class UnreadableImageError(Exception):
    """An image cannot be decoded."""


class StrictImageDataset(ImageDataset):
    """timm's `ImageDataset`, but an unreadable image raises an error; timm's returns the next image instead.

    Images are decoded by `data.images.open_image`.
    """

    def __init__(self, dataset: ImageDataset) -> None:
        super().__init__(None, reader=dataset.reader, load_bytes=dataset.load_bytes,
                         input_img_mode=dataset.input_img_mode, transform=dataset.transform,
                         target_transform=dataset.target_transform)

    def _load(self, index: int) -> tuple[Image.Image | bytes, object]:
        try:
            file, target, *_ = self.reader[index]
            with file:
                return file.read() if self.load_bytes else open_image(file, self.input_img_mode or 'RGB'), target
        except (*DECODE_ERRORS, ValueError) as error:
            raise UnreadableImageError(' '.join(str(error).split()) or type(error).__name__) from error

    def __getitem__(self, index: int) -> tuple[object, object]:
        source, target = self._load(index)
        image = source if self.transform is None else self.transform(source)
        if getattr(self.target_transform, 'takes_all', False):
            target = self.target_transform(target)
        elif target is None:
            target = -1
        elif self.target_transform is not None and target != UNREADABLE:
            target = self.target_transform(target)
        return image, target


class CountingImageDataset(StrictImageDataset):
    """Images for validation: an unreadable one is returned as a blank image with the label `UNREADABLE`."""

    def _load(self, index: int) -> tuple[Image.Image | bytes, object]:
        try:
            return super()._load(index)
        except UnreadableImageError as error:
            _logger.warning('Image %s cannot be read (%s).', one_line(self.filename(index)), error)
            return Image.new(self.input_img_mode or 'RGB', (64, 64)), UNREADABLE


def sample_name(dataset: object, index: int) -> str:
    """Returns the path of a sample within its dataset, or 'sample INDEX' if the dataset has no paths."""
    filename = getattr(dataset, 'filename', None)
    if filename is not None:
        return str(filename(index))
    samples = getattr(dataset, 'samples', None)
    return str(samples[index][0]) if samples else f'sample {index}'


def gather_numbers(numbers: list[int], distributed: bool) -> list[int]:
    """Returns the sorted union of the integers of all processes. Every process must call it."""
    if not distributed:
        return sorted(numbers)
    parts: list[list[int]] = [[]] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, numbers)
    return sorted({number for part in parts for number in part})


def count_allowed(limit: float, total: int) -> int:
    """Returns how many of `total` images may be unreadable: `limit` if at least 1, else that fraction, rounded up."""
    return int(limit) if limit >= 1 else math.ceil(limit * total)


def refuse_unreadable(dataset: object, positions: list[int], total: int, limit: float = 0.) -> None:
    """Raises an error if too many validation images cannot be read, else warns about them.

    Args:
        dataset: Validation dataset.
        positions: Indices of the images that could not be decoded.
        total: Number of images.
        limit: Number or fraction of images to tolerate, see `count_allowed`.

    Raises:
        DatasetError: There are more than allowed.
    """
    if not positions:
        return
    text = f'{len(positions)} of {total} images cannot be read: {_enumerate(dataset, positions)}'
    if len(positions) > count_allowed(limit, total):
        raise DatasetError(f'{text}; restore or remove them, or tolerate them with --max-bad-samples (the metrics then '
                           'leave them out)')
    _logger.warning('%s; they are left out of the metrics.', text)


def _enumerate(dataset: object, indices: list[int]) -> str:
    more = f' and {len(indices) - 5} more' if len(indices) > 5 else ''
    return ', '.join(one_line(sample_name(dataset, index)) for index in indices[:5]) + more


@dataclass(frozen=True)
class Unreadable:
    """A training image that was replaced: its index, its path within the dataset, and the reason."""

    index: int
    path: str
    reason: str


class UnreadableLog:
    """Unreadable training images of a run, listed in the file `unreadable.txt` of its folder.

    Args:
        dataset: Training dataset.
        limit: Number or fraction of images to tolerate, see `count_allowed`.
    """

    def __init__(self, dataset: Sized, limit: float) -> None:
        self.dataset = dataset
        self.allowed = count_allowed(limit, len(dataset))
        self.limit = limit
        self.folder = ''
        self.found: dict[int, Unreadable] = {}
        self._listed: set[int] = set()

    def open(self, folder: str) -> None:
        """Starts listing images in `folder`, and keeps what the run listed before it was resumed; '' for no list."""
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
        # file names may contain bytes that are not UTF-8
        write_text(os.path.join(self.folder, LIST_NAME), text, errors='surrogateescape')

    def add(self, images: list[Unreadable]) -> None:
        """Records images that were replaced in a batch.

        Raises:
            DatasetError: There are more than tolerated.
        """
        new = {image.index: image for image in images if image.index not in self.found}
        if not new:
            return
        self.found.update(new)
        for image in new.values():
            _logger.warning('Training image %s (index %d) cannot be read (%s). Another one replaces it.',
                            one_line(image.path), image.index, image.reason)
        self._list(set(self.found))
        if len(self.found) > self.allowed:
            raise DatasetError(
                f'{len(self.found)} training images cannot be read, more than --max-bad-samples {self.limit:g} allows '
                f'({self.allowed}): {_enumerate(self.dataset, list(self.found))}; restore or remove them, or raise '
                '--max-bad-samples')

    def share(self) -> int:
        """Merges and lists what all processes found. Every process must call it.

        Returns:
            Number of unreadable images found so far by any process.
        """
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        found = gather_numbers(list(self.found), distributed)
        self._list(set(found))
        return len(found)
