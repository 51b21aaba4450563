"""Datasets in class folders; each folder is read once, and only regular files are read."""
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

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
    """Yields folder and name of each wanted file below `folder`, and follows symbolic links.

    A folder that can be reached by several paths, for example through a loop of links, is entered once, by the shortest
    path with the fewest links. Entries that are neither files nor folders are skipped. Both are logged.

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
            _logger.warning('Folder %s was already read by another path. Skipping it.', one_line(path))
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
                        _logger.warning('%s is not a regular file. Skipping it.', one_line(entry.path))


class PathReader(Reader):
    """Reader for timm's `ImageDataset` over a list of files.

    Attributes:
        root: Folder that names of samples are relative to.
        samples: Path and target of each image.
    """

    root: str
    samples: Sequence[tuple[str, object]]

    def __getitem__(self, index: int) -> tuple[BinaryIO, object]:
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
    """Reader for timm's `ImageDataset` over class folders; finds the same samples and classes as timm's own reader.

    The class of an image is the name of the folder it is in.

    Args:
        root: Folder of class folders.
        class_map: File or mapping of class names to indices, as in timm; images in other folders are ignored. Without
            one, class names are numbered in natural order.
        input_key: Suffixes of image files, separated by ';'.

    Attributes:
        samples: Path and class index of each image.
        class_to_idx: Class index of each class name.

    Raises:
        RuntimeError: There are no images.
    """

    def __init__(self, root: str, class_map: str | Mapping[str, int] | None = None, input_key: str | None = None,
                 ) -> None:
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
            raise RuntimeError(f'there are no images in class folders below {root!r} (suffixes: '
                               f'{", ".join(sorted(endings))})')


class SafeImageFolder(ImageFolder):
    """torchvision's `ImageFolder`, with files found by `walk_files` and decoded by `images.open_image`."""

    def __init__(self, root: str, **kwargs: Any) -> None:
        super().__init__(root, loader=load_image, **kwargs)

    @staticmethod
    def make_dataset(directory: Any, class_to_idx: dict[str, int], extensions: Any = None, is_valid_file: Any = None,
                     allow_empty: bool = False) -> list[tuple[str, int]]:
        """Returns path and class index of each image, see torchvision."""
        def wanted(name: str) -> bool:
            return has_file_allowed_extension(name, extensions)

        samples = [(os.path.join(folder, name), class_to_idx[label]) for label in sorted(class_to_idx)
                   for folder, name in sorted(walk_files(os.path.join(directory, label), wanted))]
        if not samples:
            raise FileNotFoundError(f'no images in the folders of {", ".join(sorted(class_to_idx)[:5])}')
        return samples
