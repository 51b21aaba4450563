"""Accuracy on corrupted copies of a validation set, laid out as ImageNet-C: FOLDER/CORRUPTION/SEVERITY/CLASS/*."""
import os
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from timm.utils import natural_key

from cpool_vision.errors import DatasetError, DatasetNotFoundError

from .results_rows import Row


@dataclass(frozen=True)
class Corruption:
    """Images with one corruption at one severity.

    Attributes:
        corruption, severity: Names of the folders.
        path: Folder of the class folders.
    """

    corruption: str
    severity: str
    path: str


def _folders(path: str) -> list[str]:
    names = [entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith('.')]
    return sorted(names, key=natural_key)


def find_corruptions(root: str) -> list[Corruption]:
    """Finds the folders in `--corruptions`, sorted by corruption and severity.

    Raises:
        DatasetNotFoundError: The folder does not exist.
        DatasetError: The folder, or one of a corruption, contains no folders.
    """
    if not os.path.isdir(root):
        raise DatasetNotFoundError(f'--corruptions {root!r} does not exist: check the path')
    found = []
    for name in _folders(root):
        severities = _folders(os.path.join(root, name))
        if not severities:
            raise DatasetError(f'--corruptions {root!r}: {name!r} contains no folders; expected '
                               f'{name}/SEVERITY/CLASS/*')
        found += [Corruption(name, severity, os.path.join(root, name, severity)) for severity in severities]
    if not found:
        raise DatasetError(f'--corruptions {root!r} contains no folders: expected CORRUPTION/SEVERITY/CLASS/* in it')
    return found


def line(folder: Corruption, row: Row) -> Row:
    """Returns the metrics of one folder, from the row of its validation."""
    kept = ('top1', 'top1_err', 'top1_low', 'top1_high', 'top5', 'top5_err', 'loss', 'nll', 'ece', 'brier', 'images',
            'nonfinite', 'unreadable')
    return {'corruption': folder.corruption, 'severity': folder.severity, **{key: row[key] for key in kept}}


def summarize(about: Row, lines: Sequence[Row]) -> Row:
    """Averages the metrics of all folders.

    Args:
        about: Description of the model, see `head_of_row`.
        lines: Metrics of each folder, see `line`.

    Returns:
        A row with `top1`, `top5`, `loss`, `nll`, `ece` and `brier` as means over corruptions of the mean over
        severities (the mean corruption error of Hendrycks and Dietterich, arXiv:1903.12261, without division by
        AlexNet's error), the total number of `images`, `corruption_means` of top-1 (`by_corruption` and
        `by_severity`), and the lines themselves as `corruptions`.
    """
    names = list(dict.fromkeys(each['corruption'] for each in lines))
    severities = sorted({each['severity'] for each in lines}, key=natural_key)

    def mean(key: str) -> float:
        return fmean(fmean(each[key] for each in lines if each['corruption'] == name) for name in names)

    top1, top5 = mean('top1'), mean('top5')
    return {
        'model': about['model'],
        'top1': round(top1, 4), 'top1_err': round(100 - top1, 4),
        'top5': round(top5, 4), 'top5_err': round(100 - top5, 4),
        **about,
        'loss': round(mean('loss'), 4),
        'images': sum(each['images'] for each in lines),
        **{key: mean(key) for key in ('nll', 'ece', 'brier')},
        **{key: sum(each[key] for each in lines) for key in ('nonfinite', 'unreadable')},
        'corruption_means': {
            'by_corruption': {name: fmean(each['top1'] for each in lines if each['corruption'] == name)
                              for name in names},
            'by_severity': {severity: fmean(each['top1'] for each in lines if each['severity'] == severity)
                            for severity in severities}},
        'corruptions': list(lines),
    }
