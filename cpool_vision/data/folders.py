"""Folders of class folders: each real folder once, and regular files only."""
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

from timm.data.readers.class_map import load_class_map
from timm.data.readers.img_extensions import get_img_extensions
from timm.data.readers.reader import Reader
from timm.utils import natural_key
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import has_file_allowed_extension

from cpool_vision.reading import one_line, open_regular

from .images import load_image

_logger = logging.getLogger(__name__)


def walk_files(folder: str, wanted: Callable[[str], bool]) -> Iterator[tuple[str, str]]:
    """Folder and name of each wanted file below `folder`, through symbolic links too.

    A folder that several paths lead to, by a loop of links say, is entered once, by the shortest path that uses the
    fewest links. What is neither a file nor a folder is skipped. Both are told in the log.

    Raises:
        OSError: `folder` cannot be listed.
    """
    waiting, known = [folder], set()
    links: list[str] = []
    while waiting or links:
        if not waiting:
            waiting.append(links.pop(0))
        path = waiting.pop(0)
        status = os.stat(path)
        if (status.st_dev, status.st_ino) in known:
            _logger.warning('Folder %s is reached by another path already: its images are taken once.', one_line(path))
            continue
        known.add((status.st_dev, status.st_ino))
        with os.scandir(path) as entries:
            for entry in sorted(entries, key=lambda each: each.name):
                if entry.is_dir():
                    (links if entry.is_symlink() else waiting).append(entry.path)
                elif wanted(entry.name):
                    if entry.is_file():
                        yield path, entry.name
                    else:
                        _logger.warning('%s is not a regular file: it is left out.', one_line(entry.path))


class PathReader(Reader):
    """Reader of timm's `ImageDataset` over files with a path each.

    Attributes:
        root: folder that names of samples start from.
        samples: path and target of each image.
    """

    root: str
    samples: list[tuple[str, Any]]

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        path, target = self.samples[index]
        return open_regular(path), target

    def __len__(self) -> int:
        return len(self.samples)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        path = self.samples[index][0]
        if basename:
            return os.path.basename(path)
        return path if absolute else os.path.relpath(path, self.root)


class FolderReader(PathReader):
    """Reader of timm's `ImageDataset` for a folder: samples and classes as timm's own reader finds them.

    A class is named by the last folder above an image.

    Args:
        root: folder of class folders.
        class_map: file or mapping of names to numbers, as of timm; images in other folders are left out. None or ''
            to number the names in natural order.
        input_key: endings of image files, separated by ';'.

    Attributes:
        samples: path and class number of each image.
        class_to_idx: class numbers by name.

    Raises:
        RuntimeError: there is no image.
    """

    def __init__(self, root: str, class_map: Any = None, input_key: str | None = None) -> None:
        super().__init__()
        self.root = root
        endings = set(input_key.split(';')) if input_key else get_img_extensions(as_set=True)
        found = []
        for folder, name in walk_files(root, lambda name: os.path.splitext(name)[1].lower() in endings):
            label = '' if folder == root else os.path.basename(folder)
            found.append((os.path.join(folder, name), label))
        if class_map:
            self.class_to_idx: dict[str, int] = load_class_map(class_map, root)
        else:
            names = sorted({label for _, label in found}, key=natural_key)
            self.class_to_idx = {name: index for index, name in enumerate(names)}
        samples = [(path, self.class_to_idx[label]) for path, label in found if label in self.class_to_idx]
        self.samples = sorted(samples, key=lambda sample: natural_key(sample[0]))
        if not self.samples:
            raise RuntimeError(f'there is no image in class folders below {root!r}; endings that count: '
                               f'{", ".join(sorted(endings))}')


class SafeImageFolder(ImageFolder):
    """torchvision's `ImageFolder` with the files of `walk_files`, decoded by `images.open_image`."""

    def __init__(self, root: str, **kwargs: Any) -> None:
        super().__init__(root, loader=load_image, **kwargs)

    @staticmethod
    def make_dataset(directory: Any, class_to_idx: dict[str, int], extensions: Any = None, is_valid_file: Any = None,
                     allow_empty: bool = False) -> list[tuple[str, int]]:
        """Path and class number of each image; see torchvision."""
        def wanted(name: str) -> bool:
            return has_file_allowed_extension(name, extensions)

        samples = [(os.path.join(folder, name), class_to_idx[label]) for label in sorted(class_to_idx)
                   for folder, name in sorted(walk_files(os.path.join(directory, label), wanted))]
        if not samples:
            raise FileNotFoundError(f'no image in the folders of {", ".join(sorted(class_to_idx)[:5])}')
        return samples
