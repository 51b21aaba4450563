"""The folder of one training run: its name, args.yaml and summary.csv."""
import glob
import itertools
import os
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import yaml
from timm.models import safe_model_name

from cpool_vision.errors import OutputError
from cpool_vision.files import write_text
from cpool_vision.reading import read_bytes, reason

from ..checkpoints.checkpoint import to_plain
from ..checkpoints.resume import EXTENSION
from ..settings.train import TrainSettings
from .table import EpochTable, keep_copy

_WRITTEN = (f'*{EXTENSION}', 'unreadable.txt', 'args.yaml', 'augmentation.json', 'tracking.json', 'run.lock', '*.csv')
_MARKS = ('args.yaml', 'summary.csv', f'last{EXTENSION}')


def run_path(settings: TrainSettings, image_size: int | None = None) -> str:
    """Folder of the run: `--output` (output/train) / `--experiment` (time-model-size)."""
    name = settings.experiment
    if not name:
        parts = [datetime.now().strftime('%Y%m%d-%H%M%S'), safe_model_name(settings.model), str(image_size)]
        name = '-'.join(parts)
    return os.path.join(settings.output or os.path.join('output', 'train'), name)


def check_free(folder: str, resume: str, auto: bool = False) -> bool:
    """Whether the run continues the one in `folder`.

    Args:
        folder: run folder.
        resume: checkpoint to continue from, '' for a new run.
        auto: whether `--resume auto` found that; a run that was stopped before its first checkpoint begins again.

    Raises:
        OutputError: the folder holds a run that is not the one being resumed.
    """
    parent = os.path.dirname(os.path.abspath(resume))
    inside = bool(resume) and os.path.realpath(parent) == os.path.realpath(folder)
    if inside:
        return True
    if any(os.path.exists(os.path.join(folder, mark)) for mark in _MARKS):
        if auto:
            return True
        raise OutputError(f'{folder!r} already holds a run: resume it with --resume auto, or choose another '
                          '--experiment or --output')
    return False


def claim(folder: str) -> str:
    """Makes a folder that nobody else has, `folder` or the first free one of folder-2, folder-3, ...

    Two runs that are named by the second they start in must not share one.

    Raises:
        OutputError: it cannot be created.
    """
    path = folder
    for number in itertools.count(2):
        try:
            os.makedirs(path)
            break
        except FileExistsError:
            path = f'{folder}-{number}'
        except OSError as error:
            raise _not_created(path, error) from error
    return path


def _not_created(path: str, error: OSError) -> OutputError:
    return OutputError(f'output folder {path!r} cannot be created ({error.strerror}): choose another --output')


def _holds(path: str, content: bytes) -> bool:
    try:
        return read_bytes(path, len(content)) == content
    except ValueError:  # longer
        return False


def settings_text(settings: TrainSettings) -> str:
    """The settings as YAML that `--config` accepts."""
    return yaml.safe_dump(to_plain(settings.as_dict()), default_flow_style=False)


class RunFolder:
    """An open run folder; created if missing, and proved writable.

    Args:
        path: the folder.
        settings: content of args.yaml; a different former one is kept as args.N.yaml.
        resume_epoch: first epoch to come when a run in this folder is continued, None for a new run.

    Raises:
        OutputError: the folder cannot be created or written.
    """

    def __init__(self, path: str, settings: str, resume_epoch: int | None = None) -> None:
        self.path = path
        self.summary = EpochTable(os.path.join(path, 'summary.csv'))
        try:
            os.makedirs(path, exist_ok=True)
        except OSError as error:
            raise _not_created(path, error) from error
        for name in _WRITTEN:
            for leftover in glob.glob(os.path.join(glob.escape(path), f'.{name}.*tmp')):
                os.remove(leftover)
        self.keep('args.yaml', settings)
        if resume_epoch is not None:
            self.summary.trim(resume_epoch)

    def keep(self, name: str, text: str | None) -> None:
        """Writes a file of the folder, or removes it for None; a different former one is kept as NAME.N.EXTENSION.

        Raises:
            OutputError: it cannot be written.
        """
        target = os.path.join(self.path, name)
        if os.path.exists(target):
            try:
                if text is None or not _holds(target, text.encode()):
                    keep_copy(target)
            except OSError as error:
                raise OutputError(f'{target!r} cannot be read ({reason(error)}): move it away') from error
        if text is not None:
            write_text(target, text)
        elif os.path.exists(target):
            os.remove(target)

    def add_epoch(self, epoch: int, metrics: Mapping[str, float]) -> dict[str, Any]:
        """Adds a row to summary.csv, replacing an earlier row of the same epoch.

        Args:
            epoch: the epoch.
            metrics: the other columns.

        Returns:
            The row.
        """
        return self.summary.add(epoch, [metrics])[0]
