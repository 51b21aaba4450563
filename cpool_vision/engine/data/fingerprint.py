"""Dataset fingerprints: detect that a run is resumed, or a model validated, with different data or classes."""
import hashlib
import logging
import os
from collections.abc import Iterable, Mapping
from typing import Any, TypedDict

import numpy as np
from torch.utils.data import Dataset

from cpool_vision.errors import ConfigError, DatasetError

from ..settings.shared import DataSettings
from ..settings.train import LoaderSettings
from .dataset import numbers_folders

_logger = logging.getLogger(__name__)
KEY = 'data'  # in a checkpoint
_SHOWN = 5


def classes_of(dataset: Dataset[object]) -> dict[str, int]:
    """Returns the class index of each class name; empty if the dataset does not name its classes."""
    known = getattr(getattr(dataset, 'reader', dataset), 'class_to_idx', None)
    if not isinstance(known, Mapping):
        known = {name: index for index, name in enumerate(getattr(dataset, 'classes', None) or ())}
    return {str(name): int(index) for name, index in known.items() if isinstance(index, (int, np.integer))}


def _facts(dataset: Any) -> Iterable[object]:
    """Yields what identifies a dataset: name, size and label of each file, or its arrays, or its parameters."""
    reader = getattr(dataset, 'reader', dataset)
    samples = getattr(reader, 'samples', None)
    if isinstance(samples, list) and samples and isinstance(samples[0], tuple) and len(samples[0]) == 2:
        root = getattr(reader, 'root', '')
        for path, target in samples:
            size = os.stat(path).st_size if isinstance(path, str) and os.path.exists(path) else -1
            name = os.path.relpath(path, root) if isinstance(path, str) and root else path
            yield name, size, target
        return
    if isinstance(getattr(dataset, 'data', None), np.ndarray):  # torchvision's in-memory datasets
        yield dataset.data.shape, hashlib.sha256(np.ascontiguousarray(dataset.data).data).hexdigest()
        yield list(map(int, dataset.targets))
        return
    for name in ('_fingerprint', 'split', 'image_size', 'data_seed'):
        yield name, str(getattr(getattr(reader, 'dataset', reader), name, ''))


class Fingerprint(TypedDict):
    """Identity of a dataset.

    Attributes:
        classes: Class index of each class name.
        images: Number of images.
        sha256: Hash of file names, file sizes and labels.
    """

    classes: dict[str, int]
    images: int
    sha256: str


def fingerprint(dataset: Dataset[object]) -> Fingerprint | None:
    """Returns the fingerprint of an indexed dataset, or None for a streamed one.

    Files are identified by name and size. A file that changed but kept its size goes unnoticed.
    """
    if not hasattr(dataset, '__len__'):
        return None
    digest = hashlib.sha256()
    for fact in _facts(dataset):
        digest.update(repr(fact).encode(errors='surrogateescape') + b'\n')
    return {'classes': classes_of(dataset), 'images': len(dataset), 'sha256': digest.hexdigest()}


def _listed(names: Iterable[str]) -> str:
    names = sorted(names)
    return ', '.join(map(repr, names[:_SHOWN])) + (f' and {len(names) - _SHOWN} more' if len(names) > _SHOWN else '')


def compare_classes(former: Mapping[str, int], now: Mapping[str, int]) -> str:
    """Describes how the classes of two datasets differ; returns '' if names and indices are the same."""
    parts = []
    for what, names in (('lacks', set(former) - set(now)), ('also has', set(now) - set(former))):
        if names:
            parts.append(f'{what} {_listed(names)}')
    moved = sorted(name for name in set(former) & set(now) if former[name] != now[name])
    if moved:
        parts.append(f'maps {moved[0]!r} to class {now[moved[0]]} instead of {former[moved[0]]}'
                     + (f' and {len(moved) - 1} more to other classes' if len(moved) > 1 else ''))
    return ', '.join(parts)


def _difference(former: Fingerprint, now: Fingerprint) -> str:
    classes = compare_classes(former['classes'], now['classes'])
    if classes:
        return f'it {classes}'
    if former['images'] != now['images']:
        return f'it had {former["images"]} images and now has {now["images"]}'
    return 'file names, sizes or labels differ' if former['sha256'] != now['sha256'] else ''


def _stored(content: Mapping[str, object] | None) -> Fingerprint | None:
    stored = (content or {}).get(KEY)
    if not isinstance(stored, Mapping):
        return None
    classes, images, sha256 = stored.get('classes'), stored.get('images'), stored.get('sha256')
    if not isinstance(classes, Mapping) or not isinstance(images, int) or not isinstance(sha256, str):
        return None
    return {'classes': {str(name): index for name, index in classes.items() if isinstance(index, int)},
            'images': images, 'sha256': sha256}


def check_same_data(content: Mapping[str, object], path: str, now: Fingerprint | None, inside: bool) -> None:
    """Checks that a run is resumed with the data it was trained on.

    Checkpoints without a fingerprint always pass.

    Args:
        content: Content of the checkpoint.
        path: Its path, for messages.
        now: Fingerprint of the training dataset; None for a streamed one.
        inside: Whether the run resumes in the middle of an epoch. Different data are then an error, as the remaining
            batches would change; otherwise a warning.

    Raises:
        ConfigError: The data differ and `inside` is set.
    """
    former = _stored(content)
    what = _difference(former, now) if former is not None and now is not None else ''
    if not what:
        return
    if inside:
        raise ConfigError(f'--resume {path!r} is from the middle of an epoch, and the training data have changed '
                          f'({what}): restore the data, or resume from a checkpoint at the end of an epoch')
    _logger.warning('The training data have changed since %s was written: %s.', path, what)


def check_classes(former: Mapping[str, int], dataset: Dataset[object], settings: DataSettings, what: str, where: str,
                  ) -> None:
    """Checks that a dataset has the classes that the model was trained with.

    A difference is an error where class indices follow from folder names, and a warning for other datasets. Datasets
    that do not name their classes, and runs with a `--class-map`, are not checked.

    Args:
        former: Class index of each class name in training; empty if unknown.
        dataset: The dataset to check.
        settings: How the dataset was opened.
        what: Name of the dataset, for messages.
        where: Where `former` comes from, for messages.

    Raises:
        DatasetError: The classes differ.
    """
    now = classes_of(dataset)
    if not former or not now or settings.class_map:
        return
    difference = compare_classes(former, now)
    if difference and not numbers_folders(settings):
        _logger.warning('%s %s, compared with %s. Its labels may stand for different classes.', what, difference, where)
    elif difference:
        raise DatasetError(f'{what} {difference}, compared with {where}: its labels would stand for different classes. '
                           'Fix the folders, or pass the same --class-map FILE for every dataset (.txt: one name per '
                           'line)')


def classes_in(content: Mapping[str, object] | None) -> dict[str, int]:
    """Returns the class index of each class name stored in a checkpoint; empty if there are none."""
    stored = _stored(content)
    return {} if stored is None else stored['classes']


def compare_splits(settings: LoaderSettings, train_set: Dataset[object], val_set: Dataset[object]) -> None:
    """Checks the classes of the validation split against the training split, see `check_classes`."""
    if not settings.multi_label:  # `settle_labels` compares the splits
        check_classes(classes_of(train_set), val_set, settings, f'split {settings.val_split!r}',
                      f'split {settings.train_split!r}')
