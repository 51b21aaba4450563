"""The run folder: its path, args.yaml and summary.csv."""
import glob
import itertools
import os
from datetime import datetime

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
    """Returns the path of the run folder: `--output` (output/train) / `--experiment` (time-model-size)."""
    time = datetime.now().strftime('%Y%m%d-%H%M%S')
    name = settings.experiment or f'{time}-{safe_model_name(settings.model)}-{image_size}'
    return os.path.join(settings.output or os.path.join('output', 'train'), name)


def check_free(folder: str, resume: str, auto: bool = False) -> bool:
    """Returns whether the run continues the one in `folder`.

    Args:
        folder: Run folder.
        resume: Checkpoint to continue from, '' for a new run.
        auto: Whether `--resume auto` is set. It also continues a run that was stopped before its first checkpoint.

    Raises:
        OutputError: If the folder holds a run other than the resumed one.
    """
    parent = os.path.dirname(os.path.abspath(resume))
    if resume and os.path.realpath(parent) == os.path.realpath(folder):
        return True
    if any(os.path.exists(os.path.join(folder, mark)) for mark in _MARKS):
        if auto:
            return True
        raise OutputError(f'{folder!r} already holds a run: resume it with --resume auto, or choose another '
                          '--experiment or --output')
    return False


def claim(folder: str) -> str:
    """Creates a new folder: `folder`, or the first free one of folder-2, folder-3, ...

    Two runs that start in the same second would otherwise share a folder.

    Raises:
        OutputError: If the folder cannot be created.
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
    """Formats the settings as YAML that `--config` accepts."""
    return yaml.safe_dump(to_plain(settings.as_dict()), default_flow_style=False)


class RunFolder:
    """An open run folder. Creates the folder, removes temporary files of a killed run, and writes args.yaml.

    Args:
        path: The folder.
        settings: Content of args.yaml. An old file that differs is kept as args.N.yaml.
        resume_epoch: Next epoch of the run that is continued in this folder, None for a new run.

    Attributes:
        summary: The table summary.csv.

    Raises:
        OutputError: If the folder cannot be created or written.
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
        """Writes a file into the folder, or removes it if `text` is None.

        An old file that differs is kept as NAME.N.EXTENSION.

        Raises:
            OutputError: If the file cannot be written.
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
