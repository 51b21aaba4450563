"""Maps labels and folder names to classes of the model: class subsets, valid labels and several correct labels."""
import json
import os
import re
from dataclasses import dataclass
from importlib import resources

from timm.data import ImageNetInfo

from cpool_vision.errors import ConfigError
from cpool_vision.reading import open_text, reason

from ..data.dataset import IMAGENET, synset_numbers
from ..settings.validate import SUBSETS

_IMAGENET_CLASSES = 1000
# dataset -> file of its synsets in timm.data, '' for the 1000 of ImageNet-1k
_SYNSETS = {
    'imagenet-1k': '', 'imagenet-sketch': '', 'imagenet-a': 'imagenet_a_synsets.txt',
    'imagenet-r': 'imagenet_r_synsets.txt', 'mini-imagenet': 'mini_imagenet_synsets.txt',
}
_VALIDATION_NAME = re.compile(r'ILSVRC2012_val_(\d{8})(\.|$)')


def read_valid_labels(path: str, num_classes: int) -> list[int]:
    """Reads class indices from the file of `--valid-labels`, one per line.

    Raises:
        ConfigError: The file cannot be read, or a line is not a class index or occurs twice.
    """
    try:
        with open_text(path, encoding='utf-8') as file:
            lines = [line.strip() for line in file if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        why = reason(error) if isinstance(error, OSError) else 'not UTF-8 text'
        raise ConfigError(f'--valid-labels {path!r} cannot be read ({why}): check the path') from error
    bad = next((line for line in lines if not line.isdigit() or int(line) >= num_classes), None)
    if bad is not None or not lines:
        raise ConfigError(
            f'--valid-labels {path!r}: {bad!r} is not a class index below {num_classes}: write one index per line')
    labels = [int(line) for line in lines]
    if len(set(labels)) < len(labels):
        raise ConfigError(f'--valid-labels {path!r} lists a class twice: remove the duplicate')
    return labels


@dataclass(frozen=True)
class ClassSubset:
    """Maps the folders of a dataset to a subset of the model's classes.

    Attributes:
        class_map: Position in `valid_labels` of each folder name; images in other folders are ignored.
        valid_labels: Class indices of the subset, ascending.
    """

    class_map: dict[str, int]
    valid_labels: list[int]


def _subset(index_by_folder: dict[str, int]) -> ClassSubset:
    labels = sorted(set(index_by_folder.values()))
    positions = {label: position for position, label in enumerate(labels)}
    return ClassSubset({folder: positions[index] for folder, index in index_by_folder.items()}, labels)


def _read_folders(path: str) -> dict[str, object]:
    """Returns the class index of each folder; what is no index is returned as it is."""
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
    folders: dict[str, object] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        folder, _, index = line.replace('\t', ' ').rpartition(' ')
        folder = folder.strip()
        if folder in folders:
            raise ConfigError(f'--class-subset {path!r} lists folder {folder!r} twice: remove the duplicate')
        folders[folder] = int(index) if folder and index.isdigit() else line
    return folders


def describe_classes(names: list[str]) -> list[str]:
    """Appends a description to the names of ImageNet synsets (n01440764 tench); leaves other names unchanged."""
    info, known = ImageNetInfo(IMAGENET), synset_numbers()
    return [f'{name} {info.label_name_to_description(name).split(",")[0]}' if name in known else name for name in names]


def read_class_subset(name: str, num_classes: int) -> ClassSubset:
    """Returns the subset of `--class-subset`.

    Args:
        name: One of `SUBSETS`, a text file with lines FOLDER INDEX, or a JSON file that maps folders to class indices.
        num_classes: Number of classes of the model.

    Raises:
        ConfigError: There is no such subset or file, the file has an invalid class index, or `SUBSETS` is used with a
            model that does not have 1000 classes.
    """
    key = name.lower().replace('_', '-')
    if key not in SUBSETS:
        if not os.path.isfile(name):
            raise ConfigError(f'--class-subset {name!r} is neither a file nor one of {", ".join(SUBSETS)}')
        folders = _read_folders(name)
        indices = {folder: index for folder, index in folders.items()
                   if type(index) is int and 0 <= index < num_classes}
        bad = next((folder for folder in folders if folder not in indices), None)
        if bad is not None or not folders:
            raise ConfigError(f'--class-subset {name!r}: {bad!r} has no class index below {num_classes}: '
                              'write FOLDER INDEX on each line')
        return _subset(indices)
    if num_classes != _IMAGENET_CLASSES:
        raise ConfigError(f'--class-subset {name!r} is for models with the 1000 ImageNet classes, this one has '
                          f'{num_classes}: use a file of folders and class indices')
    if key == 'imagenet-v2':
        return _subset({str(index): index for index in range(_IMAGENET_CLASSES)})
    index = synset_numbers()
    source = _SYNSETS[key]
    names = (resources.files('timm.data') / '_info' / source).read_text('utf-8').split() if source else list(index)
    return _subset({synset: index[synset] for synset in names})


def read_real_labels(path: str, filenames: list[str], num_classes: int) -> list[list[int]]:
    """Reads the correct classes of each image from the file of `--real-labels`.

    Args:
        path: JSON file with a list of class indices per image: either a list in the order of the ImageNet validation
            images, as in ImageNet-ReaL (Beyer et al., arXiv:2006.07159), or a mapping from file names without folder.
        filenames: Files of the dataset.
        num_classes: Number of classes of the model.

    Returns:
        A list of class indices per file. Images with an empty list do not count.

    Raises:
        ConfigError: The file cannot be read, has an invalid class index, or has no entry for an image.
    """
    try:
        with open_text(path, encoding='utf-8') as file:
            content = json.load(file)
    except (OSError, ValueError) as error:
        raise ConfigError(f'--real-labels {path!r} cannot be read ({reason(error)}): check the file') from error
    lists = list(content.values()) if isinstance(content, dict) else content
    if not isinstance(lists, list) or not all(isinstance(labels, list) for labels in lists):
        raise ConfigError(f'--real-labels {path!r} must contain a list of class indices per image')
    bad = next((label for labels in lists for label in labels
                if type(label) is not int or not 0 <= label < num_classes), None)
    if bad is not None:
        raise ConfigError(f'--real-labels {path!r}: {bad!r} is not a class index below {num_classes}: ImageNet labels '
                          'need a model with the 1000 ImageNet classes')
    result = []
    for name in map(os.path.basename, filenames):
        labels = content.get(name) if isinstance(content, dict) else None
        match = _VALIDATION_NAME.match(name)
        if isinstance(content, list) and match and 0 < int(match[1]) <= len(content):
            labels = content[int(match[1]) - 1]
        if labels is None:
            raise ConfigError(f'--real-labels {path!r} has no labels for {name!r}: use a list for the ImageNet '
                              'validation images under their original names (ILSVRC2012_val_00000001.JPEG ...), and a '
                              'mapping from file names for other images')
        result.append(labels)
    return result
