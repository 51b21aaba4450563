"""What the labels of a set mean to the model: classes that compete, folder names, several right answers."""
import json
import os
import re
from dataclasses import dataclass
from importlib import resources
from typing import Any

from timm.data import ImageNetInfo

from cpool_vision.errors import ConfigError
from cpool_vision.reading import open_text, reason

from ..data.dataset import IMAGENET, synset_numbers
from ..settings.validate import SUBSETS

_IMAGENET_CLASSES = 1000
# set -> list of its synsets within timm.data, '' for the 1000 of ImageNet-1k
_SYNSETS = {
    'imagenet-1k': '', 'imagenet-sketch': '', 'imagenet-a': 'imagenet_a_synsets.txt',
    'imagenet-r': 'imagenet_r_synsets.txt', 'mini-imagenet': 'mini_imagenet_synsets.txt',
}
_VALIDATION_NAME = re.compile(r'ILSVRC2012_val_(\d{8})(\.|$)')


def read_valid_labels(path: str, num_classes: int) -> list[int]:
    """Class indices of `--valid-labels`, one a line.

    Raises:
        ConfigError: missing file, a line that is not a class of the model, or a class named twice.
    """
    try:
        with open_text(path, encoding='utf-8') as file:
            lines = [line.strip() for line in file if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        why = reason(error) if isinstance(error, OSError) else 'no UTF-8 text'
        raise ConfigError(f'--valid-labels {path!r} cannot be read ({why}): check the path') from error
    bad = next((line for line in lines if not line.isdigit() or int(line) >= num_classes), None)
    if bad is not None or not lines:
        raise ConfigError(
            f'--valid-labels {path!r}: {bad!r} is not a class index below {num_classes}: one index per line')
    labels = [int(line) for line in lines]
    if len(set(labels)) < len(labels):
        raise ConfigError(f'--valid-labels {path!r} names a class twice: remove the repetition')
    return labels


@dataclass(frozen=True)
class ClassSubset:
    """Folders of a set and the outputs of the model that they stand for.

    Attributes:
        class_map: position in `valid_labels` by folder name; images in other folders are left out.
        valid_labels: outputs that compete, ascending.
    """

    class_map: dict[str, int]
    valid_labels: list[int]


def _subset(index_by_folder: dict[str, int]) -> ClassSubset:
    labels = sorted(set(index_by_folder.values()))
    place = {label: position for position, label in enumerate(labels)}
    return ClassSubset({folder: place[index] for folder, index in index_by_folder.items()}, labels)


def _read_folders(path: str) -> dict[str, Any]:
    try:
        with open_text(path, encoding='utf-8') as file:
            text = file.read()
        if path.lower().endswith('.json'):
            content = json.loads(text)
            if not isinstance(content, dict):
                raise ValueError('it must map folder names to class indices')
            return content
    except (OSError, ValueError) as error:
        raise ConfigError(f'--class-subset {path!r} cannot be read ({error}): check the file') from error
    folders: dict[str, Any] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        folder, _, index = line.replace('\t', ' ').rpartition(' ')
        folder = folder.strip()
        if folder in folders:
            raise ConfigError(f'--class-subset {path!r} names folder {folder!r} twice: remove the repetition')
        folders[folder] = int(index) if folder and index.isdigit() else line
    return folders


def describe_classes(names: list[str]) -> list[str]:
    """Names to show: those of ImageNet synsets (n01440764) followed by what they mean, others as they are."""
    info, known = ImageNetInfo(IMAGENET), synset_numbers()
    return [f'{name} {info.label_name_to_description(name).split(",")[0]}' if name in known else name for name in names]


def read_class_subset(name: str, num_classes: int) -> ClassSubset:
    """Classes of `--class-subset`.

    Args:
        name: one of `SUBSETS`, or a file with lines FOLDER INDEX, or a JSON file that maps folders to indices.
        num_classes: outputs of the model.

    Raises:
        ConfigError: no such set or file, a model of other classes, or an index that the model does not have.
    """
    key = name.lower().replace('_', '-')
    if key not in SUBSETS:
        if not os.path.isfile(name):
            raise ConfigError(f'--class-subset {name!r} is neither a file nor one of {", ".join(SUBSETS)}')
        folders = _read_folders(name)
        bad = next((folder for folder, index in folders.items()
                    if type(index) is not int or not 0 <= index < num_classes), None)
        if bad is not None or not folders:
            raise ConfigError(f'--class-subset {name!r}: {bad!r} has no class index below {num_classes}: '
                              'write FOLDER INDEX on each line')
        return _subset(folders)
    if num_classes != _IMAGENET_CLASSES:
        raise ConfigError(f'--class-subset {name!r} is for models of the 1000 ImageNet classes, this one has '
                          f'{num_classes}: name a file with the folders and their classes')
    if key == 'imagenet-v2':
        return _subset({str(index): index for index in range(_IMAGENET_CLASSES)})
    index = synset_numbers()
    source = _SYNSETS[key]
    names = (resources.files('timm.data') / '_info' / source).read_text('utf-8').split() if source else list(index)
    return _subset({synset: index[synset] for synset in names})


def read_real_labels(path: str, filenames: list[str], num_classes: int) -> list[list[int]]:
    """Right classes of each image, from `--real-labels`.

    Args:
        path: JSON: a list of lists for the ImageNet validation images by number, as of ImageNet-ReaL (Beyer et al.,
            arXiv:2006.07159), or a mapping of file names without folder to lists.
        filenames: files of the dataset.
        num_classes: outputs of the model.

    Returns:
        One list for each file; an empty one where no class is right, and the image does not count.

    Raises:
        ConfigError: unreadable file, a label that is not a class, or an image that it does not cover.
    """
    try:
        with open_text(path, encoding='utf-8') as file:
            content = json.load(file)
    except (OSError, ValueError) as error:
        raise ConfigError(f'--real-labels {path!r} cannot be read ({reason(error)}): check the file') from error
    lists = list(content.values()) if isinstance(content, dict) else content
    if not isinstance(lists, list) or not all(isinstance(labels, list) for labels in lists):
        raise ConfigError(f'--real-labels {path!r} must hold a list of labels for each image')
    bad = next((label for labels in lists for label in labels
                if type(label) is not int or not 0 <= label < num_classes), None)
    if bad is not None:
        raise ConfigError(f'--real-labels {path!r}: {bad!r} is not a class index below {num_classes}: the ImageNet '
                          'labels are for models with its 1000 classes')
    result = []
    for name in map(os.path.basename, filenames):
        labels = content.get(name) if isinstance(content, dict) else None
        match = _VALIDATION_NAME.match(name)
        if isinstance(content, list) and match and 0 < int(match[1]) <= len(content):
            labels = content[int(match[1]) - 1]
        if labels is None:
            raise ConfigError(f'--real-labels {path!r} has no labels for {name!r}: a list is for the ImageNet '
                              'validation images under their own names (ILSVRC2012_val_00000001.JPEG ...), a mapping '
                              'for the files that it names')
        result.append(labels)
    return result
