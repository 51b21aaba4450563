"""Finds the checkpoint that a run continues from."""
import glob
import logging
import math
import os
from dataclasses import dataclass

import torch

from cpool_vision.errors import CheckpointError, CheckpointVersionError, ConfigError

from ..distributed.vote import agree_on_text, fail_together
from ..settings.train import RunSettings
from .checkpoint import read_checkpoint
from .seal import read_seal

_logger = logging.getLogger(__name__)
EXTENSION = '.pth.tar'
PREVIOUS = 'previous'
RECOVERY = 'recovery-'
MILESTONE = 'milestone-'


def serial_of(path: str) -> float:
    """Returns the serial number of a checkpoint. Without a seal: infinity for `last` and `recovery-`, 0 for others."""
    seal = read_seal(path)
    if seal is not None:
        return seal.serial
    return math.inf if os.path.basename(path).startswith(('last', RECOVERY)) else 0


def list_candidates(folder: str) -> list[str]:
    """Lists the checkpoints in a run folder, the newest first, without further names of the same file."""
    patterns = ('last', f'{RECOVERY}*', PREVIOUS, 'checkpoint-*', f'{MILESTONE}*', 'model_best')
    paths = [path for pattern in patterns
             for path in glob.glob(os.path.join(glob.escape(folder), pattern + EXTENSION))]
    known: set[tuple[int, int]] = set()
    distinct = []
    for path in paths:
        status = os.stat(path) if os.path.exists(path) else os.lstat(path)  # a symbolic link may be broken
        if (status.st_dev, status.st_ino) not in known:
            known.add((status.st_dev, status.st_ino))
            distinct.append(path)
    return sorted(distinct, key=serial_of, reverse=True)


@dataclass(frozen=True)
class Team:
    """The processes that open a checkpoint together.

    Attributes:
        processes: Number of processes.
        device: Device for collective operations.
    """

    processes: int = 1
    device: torch.device = torch.device('cpu')

    def open(self, path: str, flag: str) -> dict[str, object]:
        """Reads a checkpoint; fails on all processes if it fails on one. Every process must call it.

        Raises:
            CheckpointError: See `read_checkpoint`; also if another process cannot read it.
        """
        message = f'{flag} {path!r} cannot be read by another process: see its message'
        with fail_together(CheckpointError, message, self.device, self.processes > 1):
            content = read_checkpoint(path, flag)
        return content

    def check_alike(self, text: str, what: str) -> None:
        """Checks that all processes see the same files. Every process must call it.

        Args:
            text: Description of the files that this process sees.
            what: Checkpoint that this process would resume from, for the message.

        Raises:
            CheckpointError: If `text` differs between processes.
        """
        if not agree_on_text(text, self.device, self.processes > 1):
            raise CheckpointError(f'this process would resume from {what or "nothing"!r}, another process from '
                                  'another checkpoint: --output must be a folder that all processes share')


@dataclass(frozen=True)
class Found:
    """A checkpoint to resume from.

    Attributes:
        path: Its file, '' for a new run.
        content: Its dictionary, None for a new run.
        damaged: Newer files that are damaged and were skipped.
    """

    path: str = ''
    content: dict[str, object] | None = None
    damaged: tuple[str, ...] = ()


def find_newest(folder: str, team: Team = Team()) -> Found:
    """Finds the newest intact checkpoint of a run folder. Logs and skips damaged ones.

    Every process of the team must call it.

    Returns:
        The checkpoint; empty if the folder has no checkpoints.

    Raises:
        CheckpointVersionError: If a newer release wrote the newest intact checkpoint.
        CheckpointError: If all checkpoints are damaged, or the processes see different files.
    """
    damaged: list[str] = []
    candidates = list_candidates(folder)
    seen = [(os.path.basename(path), read_seal(path)) for path in candidates]
    team.check_alike(repr(seen), candidates[0] if candidates else '')
    for path in candidates:
        try:
            return Found(path, team.open(path, '--resume auto:'), tuple(damaged))
        except CheckpointVersionError:
            raise
        except CheckpointError as error:
            _logger.warning('%s. Falling back to the previous checkpoint.', error)
            damaged.append(path)
    if damaged:
        raise CheckpointError(f'--resume auto: all {len(damaged)} checkpoints in {folder!r} are damaged: restore one '
                              'from elsewhere, or start over with another --experiment')
    return Found()


def set_aside(paths: tuple[str, ...]) -> None:
    """Renames damaged checkpoints to NAME.damaged, so that they do not count as checkpoints to keep."""
    for path in paths:
        try:
            os.replace(path, path + '.damaged')
        except OSError as error:
            _logger.warning('Damaged checkpoint %s cannot be renamed (%s).', path, error.strerror)


def open_resume(settings: RunSettings, folder: str, team: Team) -> Found:
    """Opens the checkpoint that `--resume` names. Every process must call it.

    Args:
        settings: Settings of the run.
        folder: Run folder of `--experiment`, in which `auto` looks.
        team: The processes.

    Raises:
        ConfigError: If `auto` is given without `--experiment`.
        CheckpointError: See `read_checkpoint` and `find_newest`; also if the processes see different files.
    """
    if not settings.resume:
        return Found()
    if settings.resume == 'auto':
        if not settings.experiment:
            raise ConfigError('--resume auto needs --experiment NAME to find the run folder: add it')
        return find_newest(folder, team)
    found = Found(settings.resume, team.open(settings.resume, '--resume'))
    check_agreement(found.path, team)
    return found


def check_agreement(path: str, team: Team) -> None:
    """Checks that all processes see the same checkpoint at a path. Every process must call it.

    Raises:
        CheckpointError: If the checkpoints differ.
    """
    seal = read_seal(path)
    team.check_alike('' if seal is None else seal.sha256, path)
