"""Opens the dataset of a split."""
import os
import pickle
from dataclasses import replace
from functools import cache
from typing import Any

from timm.data import ImageDataset, ImageNetInfo

from cpool_vision.data import create_dataset
from cpool_vision.data.folders import FolderReader, SafeImageFolder
from cpool_vision.data.images import guard_images
from cpool_vision.errors import DatasetError, DatasetNotFoundError, UserError

from ..settings.shared import DataSettings
from .multi_label import Classes, open_label_file, reader_arguments, settle_labels
from .unreadable import StrictImageDataset

IMAGENET = 'imagenet-1k'  # timm's name of the classes, also accepted by --class-map
_FOLDER_NAMES = ('', 'folder', 'image_folder', 'tar', 'image_tar')
_TORCH_FOLDERS = ('torch/image_folder', 'torch/folder')
_PREFIXES = ('cpool', 'torch', 'hfds', 'hfids', 'tfds', 'wds')
_SPLITS = ('train', 'training', 'val', 'valid', 'validation', 'eval', 'evaluation', 'test')


@cache
def synset_numbers() -> dict[str, int]:
    """Returns the class index of each ImageNet-1k synset (n01440764: 0), as in published weights."""
    return {synset: index for index, synset in enumerate(ImageNetInfo(IMAGENET).label_names())}


def _check_name(name: str) -> None:
    prefix, slash, rest = name.partition('/')
    if name in _FOLDER_NAMES or slash and rest and prefix.lower() in _PREFIXES:
        return
    raise DatasetError(f'unknown dataset {name!r}: leave --dataset empty for a folder or tar, or use one of '
                       f'{", ".join(each + "/NAME" for each in _PREFIXES)}')


def _check_folder(root: str | None, split: str) -> None:
    if not root:
        raise DatasetError('no data: give --data-dir FOLDER, or --dataset cpool/shapes for the built-in dataset')
    if not os.path.exists(root):
        raise DatasetNotFoundError(f'data folder {root!r} does not exist: check --data-dir')
    if not os.path.isdir(root) or not split:
        return
    found = sorted(entry for entry in _SPLITS if os.path.isdir(os.path.join(root, entry)))
    if found and split_folder(root, split) == root:
        raise DatasetError(f'split {split!r} is not in {root!r}, which contains {", ".join(found)}: name one of them, '
                           'or leave the split empty to use the folder itself')


def numbers_folders(settings: DataSettings) -> bool:
    """Returns whether class indices follow from the names of the class folders alone."""
    named = settings.dataset in _FOLDER_NAMES or settings.dataset.lower() in _TORCH_FOLDERS
    return named and not settings.class_map and not settings.multi_label


def split_folder(root: str, split: str) -> str:
    """Finds the folder of a split in `root` by its name or a synonym, as timm does; returns `root` if there is none."""
    name = split.split('[')[0]
    groups = (_SPLITS[:2], _SPLITS[2:7])
    names = next((group for group in groups if name in group), ())
    paths = (os.path.join(root, entry) for entry in (name, *names) if entry)
    return next((path for path in paths if os.path.exists(path)), root)


def check_source(settings: DataSettings, split: str) -> None:
    """Checks the dataset's name and folder without opening it.

    Raises:
        DatasetError, DatasetNotFoundError: See `build_dataset`.
    """
    name, root = settings.dataset, settings.data_dir
    _check_name(name)
    if name in _FOLDER_NAMES or name.lower() in _TORCH_FOLDERS:
        # a label file may list the images of a split that has no folder
        _check_folder(root, '' if settings.multi_label and settings.label_file else split)


def build_dataset(
        settings: DataSettings,
        classes: Classes,
        split: str,
        training: bool,
        input_img_mode: str,
        num_samples: int | None,
        load_bytes: bool = False,
) -> Any:
    """Opens the dataset of a split.

    Args:
        settings: Which dataset, and how to read its samples.
        classes: Number of classes. In multi-label training, receives the class names of the first split that has them.
        split: Name of the split.
        training: Whether a streamed dataset is shuffled and sharded for training.
        input_img_mode: PIL mode to convert images to.
        num_samples: Number of samples of a streamed or generated dataset.
        load_bytes: Return the bytes of an image file instead of the image.

    Returns:
        A dataset of `(image, target)`. Folders and tar files give a `StrictImageDataset`.

    Raises:
        DatasetError: The dataset is unknown or empty, cannot be read, or has more classes than the model.
        DatasetNotFoundError: Its folder does not exist.
    """
    name, root = settings.dataset, settings.data_dir
    check_source(settings, split)
    if settings.class_map == IMAGENET and not os.path.exists(IMAGENET):
        settings = replace(settings, class_map=synset_numbers())
    # --class-subset sets class_map to a mapping
    if isinstance(settings.class_map, str) and settings.class_map and not os.path.isfile(settings.class_map):
        raise DatasetNotFoundError(f'--class-map {settings.class_map!r} does not exist: check the path')
    where = f'{name!r} in {root!r}' if name and root else repr(name or root)
    what = f'dataset {where}, split {split!r}'
    try:
        dataset = _open(settings, classes, split, training, input_img_mode, num_samples, load_bytes)
    except UserError:
        raise
    except FileNotFoundError as error:
        raise DatasetNotFoundError(f'{what}: {error}; check --data-dir') from error
    except (AssertionError, ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError,
            pickle.UnpicklingError) as error:
        reason = ' '.join(str(error).split()).replace('download=True', '--dataset-download')  # torchvision's words
        raise DatasetError(f'{what} cannot be opened ({reason}): check --dataset, --data-dir and the split') from error
    if type(dataset) is ImageDataset:
        dataset = StrictImageDataset(dataset)
    elif not name.lower().startswith('cpool/'):
        guard_images(dataset)
    if hasattr(dataset, '__len__') and len(dataset) == 0:
        raise DatasetError(f'{what} is empty: check --data-dir and the split')
    _check_classes(dataset, classes.count, what)
    if settings.multi_label:
        settle_labels(settings, classes, dataset, what)
    return dataset


def _open(settings: DataSettings, classes: Classes, split: str, training: bool, input_img_mode: str,
          num_samples: int | None, load_bytes: bool) -> Any:
    name, root = settings.dataset, settings.data_dir
    kwargs: dict[str, Any] = {'load_bytes': True} if load_bytes else {}
    if settings.multi_label and name in _FOLDER_NAMES:
        assert root is not None  # noqa: S101 - checked by `check_source`
        return open_label_file(
            settings, classes, root, split_folder(root, split), split, input_img_mode=input_img_mode, **kwargs)
    if settings.multi_label:
        kwargs |= reader_arguments(settings)
    place = split_folder(root, split) if root and os.path.isdir(root) else ''
    if name in _FOLDER_NAMES and os.path.isdir(place):
        reader = FolderReader(place, settings.class_map, settings.input_key)
        return ImageDataset(place, reader=reader, input_img_mode=input_img_mode, **kwargs)
    if name.lower() in _TORCH_FOLDERS and place:
        return SafeImageFolder(place)
    return create_dataset(
        name,
        root=root,
        split=split,
        is_training=training,
        class_map=settings.class_map,
        download=settings.dataset_download,
        batch_size=settings.batch_size,
        seed=settings.seed,
        repeats=settings.epoch_repeats,
        input_img_mode=input_img_mode,
        input_key=settings.input_key,
        target_key=settings.target_key,
        num_samples=num_samples,
        trust_remote_code=settings.dataset_trust_remote_code,
        **kwargs,
    )


def _check_classes(dataset: object, num_classes: int, what: str) -> None:
    names = getattr(getattr(dataset, 'reader', None), 'class_to_idx', None) or getattr(dataset, 'classes', None)
    if not names:
        return
    count = max(names.values()) + 1 if isinstance(names, dict) else len(names)
    if count > num_classes:
        raise DatasetError(f'{what} has {count} classes, but the model has {num_classes}: set --num-classes {count}')
