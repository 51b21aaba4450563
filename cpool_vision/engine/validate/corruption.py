"""Accuracy on corrupted copies of a validation set, laid out as ImageNet-C: FOLDER/CORRUPTION/SEVERITY/CLASS/*."""
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from timm.utils import natural_key

from cpool_vision.errors import DatasetError, DatasetNotFoundError


@dataclass(frozen=True)
class Corruption:
    """One folder of images.

    Attributes:
        corruption, severity: names of the folders.
        path: the folder with the classes.
    """

    corruption: str
    severity: str
    path: str


def _folders(path: str) -> list[str]:
    names = [entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith('.')]
    return sorted(names, key=natural_key)


def find_corruptions(root: str) -> list[Corruption]:
    """Folders of `--corruptions`, by corruption and severity.

    Raises:
        DatasetNotFoundError: no such folder.
        DatasetError: it, or a corruption in it, has no folders.
    """
    if not os.path.isdir(root):
        raise DatasetNotFoundError(f'--corruptions {root!r} does not exist: check the path')
    found = []
    for name in _folders(root):
        severities = _folders(os.path.join(root, name))
        if not severities:
            raise DatasetError(f'--corruptions {root!r}: {name!r} holds no folders; expected {name}/SEVERITY/CLASS/*')
        found += [Corruption(name, severity, os.path.join(root, name, severity)) for severity in severities]
    if not found:
        raise DatasetError(f'--corruptions {root!r} holds no folders: expected CORRUPTION/SEVERITY/CLASS/* in it')
    return found


def line(place: Corruption, row: dict[str, Any]) -> dict[str, Any]:
    """The figures of one folder."""
    kept = ('top1', 'top1_err', 'top1_low', 'top1_high', 'top5', 'top5_err', 'loss', 'nll', 'ece', 'brier', 'images',
            'nonfinite', 'unreadable')
    return {'corruption': place.corruption, 'severity': place.severity, **{key: row[key] for key in kept}}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def summarize(about: dict[str, Any], lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The row of a model over all corruptions.

    Args:
        about: what the row says of the model.
        lines: see `line`.

    Returns:
        `top1`, `top5`, `loss` and the like: means over corruptions of the mean over their severities, in percent (mean
        corruption error of Hendrycks and Dietterich, arXiv:1903.12261, but not divided by the error of AlexNet);
        `images` in all; `corruptions`: the lines; `corruption_means`: top-1 `by_corruption` and `by_severity`.
    """
    names = list(dict.fromkeys(each['corruption'] for each in lines))
    severities = sorted({each['severity'] for each in lines}, key=natural_key)

    def mean(key: str) -> float:
        return _mean([_mean([each[key] for each in lines if each['corruption'] == name]) for name in names])

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
            'by_corruption': {name: _mean([each['top1'] for each in lines if each['corruption'] == name])
                              for name in names},
            'by_severity': {severity: _mean([each['top1'] for each in lines if each['severity'] == severity])
                            for severity in severities}},
        'corruptions': list(lines),
    }
