"""Multi-label datasets: flags, targets and class names."""
import itertools
import logging
import os
from collections.abc import Mapping
from typing import Any

import torch
from timm.data import ImageDataset, IterableImageDataset, MultiLabelTarget

from cpool_vision.errors import ConfigError, DatasetError

from ..settings.limits import flag_name
from ..settings.shared import DataSettings, settings_of
from .label_file import LabelFileReader, find_label_file
from .unreadable import UNREADABLE

_logger = logging.getLogger(__name__)
CLASS_NAMES = 'class_names'  # in the settings of a checkpoint
_READERS = ('hfds', 'hfids', 'tfds', 'wds')


class Classes:
    """The classes of a run.

    Args:
        count: Number of classes.
        names: Names of multi-label classes; None until a checkpoint or the first split provides them.
    """

    def __init__(self, count: int, names: list[str] | None = None) -> None:
        self.count, self.names = count, names


def check_task(settings: DataSettings) -> None:
    """Checks that the flags fit the task.

    Raises:
        ConfigError: A flag does not work with the task.
    """
    if not settings.multi_label:
        idle = [flag for flag, given in (('--label-file', settings.label_file),
                                         ('--target-format', settings.target_format),
                                         ('--threshold', settings.threshold != 0.5)) if given]
        if idle:
            raise ConfigError(f'{idle[0]} has no effect without --task multi_label: add that, or drop {idle[0]}')
        return
    for name, reason in (
            ('kd_model_name', 'distillation compares distributions over exclusive classes'),
            ('jsd_loss', 'it compares distributions over exclusive classes'),
            ('real_labels', 'write several labels per image into the label file instead'),
            ('valid_labels', 'labels do not compete'), ('class_subset', 'labels do not compete'),
            ('metrics_avg', 'precision, recall and F1 are always reported'),
            ('corruptions', 'it reads one class from each folder')):
        if getattr(settings, name, None):
            raise ConfigError(
                f'{flag_name(name)} does not work with --task multi_label ({reason}): drop one of them')


class MultiHot:
    """Encodes the labels of an image as float32 `(num_classes,)`: 1 for each label it has, 0 elsewhere.

    The label `UNREADABLE` becomes a row filled with `UNREADABLE`.

    Args:
        num_classes: Number of classes.
        dense: Labels come as one number in [0, 1] per class instead of a list of class indices.
    """

    takes_all = True  # `StrictImageDataset` also passes missing labels and `UNREADABLE`

    def __init__(self, num_classes: int, dense: bool = False) -> None:
        self.num_classes, self.dense = num_classes, dense
        self.encode = MultiLabelTarget(num_classes, dense)

    def __call__(self, labels: object) -> torch.Tensor:
        if isinstance(labels, int) and labels == UNREADABLE:
            return torch.full((self.num_classes,), float(UNREADABLE))
        try:
            return self.encode(labels)
        except (RuntimeError, TypeError, ValueError) as error:
            form = f'{self.num_classes} numbers in [0, 1]' if self.dense else f'class indices below {self.num_classes}'
            raise DatasetError(f'--task multi_label needs {form} per image, got {labels!r:.80} ({error}): check '
                               '--num-classes, --target-key and --target-format') from error


def unreadable_rows(target: torch.Tensor) -> torch.Tensor:
    """Returns a mask `(B,)` of the images that could not be decoded.

    Args:
        target: Class indices `(B,)` or labels `(B, classes)`.
    """
    return (target if target.ndim == 1 else target[:, 0]).eq(UNREADABLE)


def reader_arguments(settings: DataSettings) -> dict[str, str | None]:
    """Returns the arguments that make timm's readers return several labels.

    Raises:
        DatasetError: The images of the dataset have one class each.
    """
    prefix = settings.dataset.partition('/')[0].lower()
    if prefix not in _READERS:
        raise DatasetError(f'--dataset {settings.dataset!r} has one class per image: drop --task multi_label, or use '
                           'a folder with a label file or one of '
                           f'{", ".join(each + "/NAME" for each in _READERS)}')
    if settings.label_file:
        raise DatasetError(f'--label-file works with folders only; {settings.dataset!r} has its labels in the field '
                           '--target-key: drop --label-file')
    return {'target_format': settings.target_format}


def open_label_file(settings: DataSettings, classes: Classes, root: str, folder: str, split: str, **kwargs: Any,
                    ) -> ImageDataset:
    """Opens the images that a label file lists.

    Args:
        settings: Label file, its fields and format.
        classes: Number of classes, and their names if known.
        root: `--data-dir`.
        folder: Folder of the split; may be `root`.
        split: Name of the split.
        **kwargs: More arguments of timm's `ImageDataset`.

    Raises:
        DatasetError: `root` is a file, or the label file is invalid (see `LabelFileReader`).
    """
    if not os.path.isdir(root):
        raise DatasetError(f'--task multi_label needs a folder with a label file, but {root!r} is a file: unpack it')
    known = settings.class_map or {name: index for index, name in enumerate(classes.names or ())}
    reader = LabelFileReader(
        find_label_file(settings.label_file, split, (folder, root)), folder, classes.count, known, settings.input_key,
        settings.target_key, classes.count if settings.target_format == 'multihot' else 0)
    return ImageDataset(root, reader=reader, **kwargs)


def settle_labels(settings: DataSettings, classes: Classes, dataset: ImageDataset | IterableImageDataset, what: str,
                  ) -> None:
    """Makes a dataset return multi-hot labels, and checks its class names.

    Args:
        settings: Format of the labels.
        classes: Class names to compare with; receives those of the dataset if it has none yet.
        dataset: Dataset of a split.
        what: Name of the dataset, for messages.

    Raises:
        DatasetError: The class names differ from those of the checkpoint or of the split loaded first.
    """
    dense = settings.target_format == 'multihot' and not isinstance(dataset.reader, LabelFileReader)
    dataset.target_transform = MultiHot(classes.count, dense)
    indices = getattr(dataset.reader, 'class_to_idx', None)
    if not indices:
        return
    by_index = {index: str(name) for name, index in indices.items()}
    names = [by_index.get(index, str(index)) for index in range(classes.count)]
    known = classes.names
    if known is None:
        classes.names = names
    elif names != known:
        index, (now, former) = next((index, pair) for index, pair in enumerate(
            itertools.zip_longest(names, known)) if pair[0] != pair[1])
        raise DatasetError(f'{what}: class {index} is {now!r}, but it is {former!r} in the checkpoint or in the split '
                           'loaded first: use the same --class-map for all splits')


def names_of(content: Mapping[str, object] | None, path: str, task: str, refuse: bool) -> list[str] | None:
    """Returns the class names stored in a checkpoint, or None if there are none.

    Args:
        content: Content of the checkpoint; None without one.
        path: Its path, for messages.
        task: Task of this run.
        refuse: Raise an error if the checkpoint was trained for another task, instead of a warning.

    Raises:
        ConfigError: The tasks differ and `refuse` is set.
    """
    settings = settings_of(content or {})
    former, names = settings.get('task', 'classification'), settings.get(CLASS_NAMES)
    if settings and former != task:
        text = f'{path!r} was trained with --task {former}, this is --task {task}'
        if refuse:
            raise ConfigError(f'{text}: use the same task, or start a new run')
        _logger.warning('%s.', text)
    elif isinstance(names, list) and task == 'multi_label':
        return [str(name) for name in names]
    return None
