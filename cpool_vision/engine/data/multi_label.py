"""Sets with any number of labels per image: their flags, targets and class names."""
import itertools
import logging
import os
from collections.abc import Mapping
from typing import Any

import torch
from timm.data import ImageDataset, MultiLabelTarget

from cpool_vision.errors import ConfigError, DatasetError

from ..settings.shared import DataSettings, settings_of
from .label_file import LabelFileReader, find_label_file
from .unreadable import UNREADABLE

_logger = logging.getLogger(__name__)
CLASS_NAMES = 'class_names'  # among the settings in a checkpoint
_READERS = ('hfds', 'hfids', 'tfds', 'wds')


class Classes:
    """The classes of a run.

    Args:
        count: outputs of the model.
        names: names of multi-label classes; None until the first split or a checkpoint tells them.
    """

    def __init__(self, count: int, names: list[str] | None = None) -> None:
        self.count, self.names = count, names


def check_task(settings: DataSettings) -> None:
    """Refuses flags that do not go with the task.

    Raises:
        ConfigError: names the flag.
    """
    if not settings.multi_label:
        idle = [flag for flag, given in (('--label-file', settings.label_file),
                                         ('--target-format', settings.target_format),
                                         ('--threshold', settings.threshold != 0.5)) if given]
        if idle:
            raise ConfigError(f'{idle[0]} has no effect without --task multi_label: add it, or leave {idle[0]} out')
        return
    for name, reason in (
            ('kd_model_name', 'distillation compares distributions over exclusive classes'),
            ('jsd_loss', 'it compares distributions over exclusive classes'),
            ('real_labels', 'it replaces one label by several; write them into the label file'),
            ('valid_labels', 'labels do not compete'), ('class_subset', 'labels do not compete'),
            ('metrics_avg', 'precision, recall and F1 are reported anyway'),
            ('corruptions', 'its folders are classes')):
        if getattr(settings, name, None):
            raise ConfigError(
                f'--{name.replace("_", "-")} does not work with --task multi_label ({reason}): drop one of them')


class MultiHot:
    """Labels of an image as float32 `(num_classes,)`: 1 for a label that it has, 0 for others.

    Args:
        num_classes: outputs of the model.
        dense: labels come as one number in [0, 1] per class, not as a list of class numbers.

    Attributes:
        takes_all: that `UNREADABLE`, of which it makes a row of it, and a missing label are its business too.
    """

    takes_all = True

    def __init__(self, num_classes: int, dense: bool = False) -> None:
        self.num_classes, self.dense = num_classes, dense
        self.encode = MultiLabelTarget(num_classes, dense)

    def __call__(self, labels: Any) -> torch.Tensor:
        if isinstance(labels, int) and labels == UNREADABLE:
            return torch.full((self.num_classes,), float(UNREADABLE))
        try:
            return self.encode(labels)
        except (RuntimeError, TypeError, ValueError) as error:
            form = f'{self.num_classes} numbers in [0, 1]' if self.dense else f'class numbers below {self.num_classes}'
            raise DatasetError(f'--task multi_label takes {form} per image, not {labels!r:.80} ({error}): check '
                               '--num-classes, --target-key and --target-format') from error


def unreadable_rows(target: torch.Tensor) -> torch.Tensor:
    """Which images of a batch could not be decoded, `(B,)`, from class indices `(B,)` or labels `(B, classes)`."""
    return (target if target.ndim == 1 else target[:, 0]).eq(UNREADABLE)


def reader_arguments(settings: DataSettings) -> dict[str, Any]:
    """Arguments of timm's readers that give several labels.

    Raises:
        DatasetError: a set whose images have one class each.
    """
    prefix = settings.dataset.partition('/')[0].lower()
    if prefix not in _READERS:
        raise DatasetError(f'--dataset {settings.dataset!r} has one class per image: leave out --task multi_label, or '
                           'name a folder with a label file or one of '
                           f'{", ".join(each + "/NAME" for each in _READERS)}')
    if settings.label_file:
        raise DatasetError(f'--label-file works with a folder; the labels of {settings.dataset!r} are in its field '
                           '--target-key: leave it out')
    return {'target_format': settings.target_format}


def open_label_file(settings: DataSettings, classes: Classes, root: str, folder: str, split: str, **kwargs: Any,
                    ) -> ImageDataset:
    """The images that a label file lists.

    Args:
        settings: label file, its fields and format.
        classes: their number, and their names if these are known.
        root: `--data-dir`.
        folder: folder of the split, or `root` again.
        split: its name.
        **kwargs: more arguments of timm's `ImageDataset`.

    Raises:
        DatasetError: `root` is a file, or see `LabelFileReader`.
    """
    if not os.path.isdir(root):
        raise DatasetError(f'--task multi_label needs a folder with a label file, {root!r} is a file: unpack it')
    known = settings.class_map or (classes.names and {name: index for index, name in enumerate(classes.names)})
    reader = LabelFileReader(
        find_label_file(settings.label_file, split, (folder, root)), folder, classes.count, known, settings.input_key,
        settings.target_key, classes.count if settings.target_format == 'multihot' else 0)
    return ImageDataset(root, reader=reader, **kwargs)


def settle_labels(settings: DataSettings, classes: Classes, dataset: Any, what: str) -> None:
    """Makes a set give multi-hot labels, and keeps the names of its classes for the splits that follow.

    Args:
        settings: format of the labels.
        classes: gets its names from the first split that knows them.
        dataset: the set.
        what: its name, for messages.

    Raises:
        DatasetError: its classes are not those of the splits before, or of the checkpoint.
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
        place, (now, former) = next((place, pair) for place, pair in enumerate(
            itertools.zip_longest(names, known)) if pair[0] != pair[1])
        raise DatasetError(f'{what}: class {place} is {now!r}, and was {former!r} in the split or checkpoint before: '
                           'name the classes of all with one --class-map')


def names_of(content: Mapping[str, Any] | None, path: str, task: str, refuse: bool) -> list[str] | None:
    """Class names in a checkpoint: a run continues, and is measured, with the classes it started with.

    Args:
        content: the checkpoint, None for none.
        path: its file, for messages.
        task: of this run.
        refuse: a checkpoint of another task is an error rather than a warning.

    Raises:
        ConfigError: it is of another task, and `refuse`.
    """
    settings = settings_of(content or {})
    former, names = settings.get('task', 'classification'), settings.get(CLASS_NAMES)
    if settings and former != task:
        text = f'{path!r} was trained with --task {former}, this is --task {task}'
        if refuse:
            raise ConfigError(f'{text}: name the same one, or begin another run')
        _logger.warning('%s.', text)
    elif isinstance(names, list) and task == 'multi_label':
        return [str(name) for name in names]
    return None
