"""Which data a run was trained on: its classes and their numbers, how many images, and a hash of the rest."""
import hashlib
import logging
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from cpool_vision.errors import ConfigError, DatasetError

from ..settings.shared import DataSettings
from ..settings.train import LoaderSettings
from .dataset import numbers_folders

_logger = logging.getLogger(__name__)
KEY = 'data'  # in a checkpoint
_SHOWN = 5


def classes_of(dataset: Dataset[Any]) -> dict[str, int]:
    """Numbers of the classes by name; empty where the set names none."""
    known: Any = getattr(getattr(dataset, 'reader', dataset), 'class_to_idx', None)
    if not isinstance(known, Mapping):
        known = {name: index for index, name in enumerate(getattr(dataset, 'classes', None) or ())}
    return {str(name): int(index) for name, index in known.items() if isinstance(index, (int, np.integer))}


def _facts(dataset: Any) -> Iterable[Any]:
    """What makes one set differ from another of as many images."""
    reader = getattr(dataset, 'reader', dataset)
    samples = getattr(reader, 'samples', None)
    if isinstance(samples, list) and samples and isinstance(samples[0], tuple) and len(samples[0]) == 2:
        root = getattr(reader, 'root', '')
        for path, target in samples:
            size = os.stat(path).st_size if isinstance(path, str) and os.path.exists(path) else -1
            name = os.path.relpath(path, root) if isinstance(path, str) and root else path
            yield name, size, target
        return
    if isinstance(getattr(dataset, 'data', None), np.ndarray):  # torchvision's sets in memory
        yield dataset.data.shape, hashlib.sha256(np.ascontiguousarray(dataset.data).data).hexdigest()
        yield list(map(int, dataset.targets))
        return
    for name in ('_fingerprint', 'split', 'image_size', 'data_seed'):
        yield name, str(getattr(getattr(reader, 'dataset', reader), name, ''))


def fingerprint(dataset: Dataset[Any]) -> dict[str, Any] | None:
    """Plain description of an indexed set: `classes`, `images`, `sha256` of names, sizes and labels; None of a stream.

    The sizes of files stand for their content: one that was altered without a change of size is not noticed.
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
    """How the classes of two sets differ, in words; '' if they are the same under the same numbers."""
    parts = []
    for what, names in (('lacks', set(former) - set(now)), ('also has', set(now) - set(former))):
        if names:
            parts.append(f'{what} {_listed(names)}')
    moved = sorted(name for name in set(former) & set(now) if former[name] != now[name])
    if moved:
        parts.append(f'numbers {moved[0]!r} {now[moved[0]]}, not {former[moved[0]]}'
                     + (f', and {len(moved) - 1} more otherwise' if len(moved) > 1 else ''))
    return ', '.join(parts)


def _difference(former: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    classes = compare_classes(former['classes'], now['classes'])
    if classes:
        return f'it {classes}'
    if former['images'] != now['images']:
        return f'it has {now["images"]} images, and had {former["images"]}'
    return 'names, sizes or labels of its images' if former['sha256'] != now['sha256'] else ''


def _stored(content: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    stored = (content or {}).get(KEY)
    kinds = {'classes': Mapping, 'images': int, 'sha256': str}
    if not isinstance(stored, Mapping) or any(not isinstance(stored.get(key), kind) for key, kind in kinds.items()):
        return None
    return stored


def check_same_data(content: Mapping[str, Any], path: str, now: Mapping[str, Any] | None, inside: bool) -> None:
    """Compares the training data with those of the run that wrote a checkpoint; many checkpoints name none.

    Args:
        content: the checkpoint.
        path: its file, for messages.
        now: `fingerprint` of the training set.
        inside: the run continues inside an epoch, whose batches would differ.

    Raises:
        ConfigError: they differ, and `inside`.
    """
    former = _stored(content)
    what = _difference(former, now) if former is not None and now is not None else ''
    if not what:
        return
    if inside:
        raise ConfigError(f'--resume {path!r} is from the middle of an epoch, and the training data have changed '
                          f'({what}): restore them, or resume from a checkpoint at the end of an epoch')
    _logger.warning('The training data are not those that %s was trained on: %s.', path, what)


def check_classes(former: Mapping[str, int], dataset: Dataset[Any], settings: DataSettings, what: str, where: str,
                  ) -> None:
    """Refuses a set whose classes are not those that the model was trained with.

    Sets that name no classes, and folders whose classes a `--class-map` numbers, are left alone. Of sets whose classes
    have their own numbers a difference is told in the log.

    Args:
        former: numbers of the classes by name; empty if not known.
        dataset: the set.
        settings: how the set was opened.
        what: the set, for messages.
        where: what `former` is from, for messages.

    Raises:
        DatasetError: names the difference.
    """
    now = classes_of(dataset)
    if not former or not now or settings.class_map:
        return
    difference = compare_classes(former, now)
    if difference and not numbers_folders(settings):
        _logger.warning('%s %s compared with %s: its labels may mean other classes.', what, difference, where)
    elif difference:
        raise DatasetError(f'{what} {difference} compared with {where}: its labels would mean other classes. Fix the '
                           'folders, or pass the same --class-map FILE for all sets (.txt: one name per line)')


def classes_in(content: Mapping[str, Any] | None) -> dict[str, int]:
    """Numbers of the classes by name that a checkpoint was trained with; empty if it does not say."""
    stored = _stored(content)
    return {} if stored is None else {str(name): int(index) for name, index in stored['classes'].items()
                                      if isinstance(index, int)}


def compare_splits(settings: LoaderSettings, train_set: Dataset[Any], val_set: Dataset[Any]) -> None:
    """`check_classes` of the validation split against the training split."""
    if not settings.multi_label:  # which settles the labels of its splits itself
        check_classes(classes_of(train_set), val_set, settings, f'split {settings.val_split!r}',
                      f'split {settings.train_split!r}')
