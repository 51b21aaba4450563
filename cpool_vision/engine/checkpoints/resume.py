"""Which checkpoint a run continues from: the newest good one."""
import glob
import logging
import math
import os
from dataclasses import dataclass
from typing import Any

import torch

from cpool_vision.errors import CheckpointError, CheckpointVersionError, ConfigError

from ..distributed.vote import agree_on_failure, agree_on_number
from ..settings.train import RunSettings
from .checkpoint import read_checkpoint
from .seal import hash_of, read_seal

_logger = logging.getLogger(__name__)
EXTENSION = '.pth.tar'
PREVIOUS = 'previous'
RECOVERY = 'recovery-'
MILESTONE = 'milestone-'


def serial_of(path: str) -> float:
    """Serial number of a checkpoint; infinite for one that lost its seal, 0 for a numbered one that has none."""
    seal = read_seal(path)
    if seal is not None:
        return seal.serial
    return math.inf if os.path.basename(path).startswith(('last', RECOVERY)) else 0


def list_candidates(folder: str) -> list[str]:
    """Checkpoints in a run folder, the newest first; of several names of one file only the first."""
    patterns = ('last', f'{RECOVERY}*', PREVIOUS, 'checkpoint-*', f'{MILESTONE}*', 'model_best')
    paths = [path for pattern in patterns
             for path in glob.glob(os.path.join(glob.escape(folder), pattern + EXTENSION))]
    known: set[tuple[int, int]] = set()
    distinct = []
    for path in paths:
        status = os.stat(path) if os.path.exists(path) else os.lstat(path)  # a link may have lost its file
        if (status.st_dev, status.st_ino) not in known:
            known.add((status.st_dev, status.st_ino))
            distinct.append(path)
    return sorted(distinct, key=serial_of, reverse=True)


@dataclass(frozen=True)
class Team:
    """The processes that open a checkpoint together.

    Attributes:
        processes: how many there are.
        device: where what they agree on is reduced.
    """

    processes: int = 1
    device: torch.device = torch.device('cpu')

    def open(self, path: str, flag: str) -> dict[str, Any]:
        """`read_checkpoint`, with the same outcome on all processes; every one must call it.

        Raises:
            CheckpointNotFoundError, CheckpointError: see there; also if another process could not read it.
        """
        content, error = {}, None
        try:
            content = read_checkpoint(path, flag)
        except CheckpointError as caught:
            error = caught
        failed = agree_on_failure(error is not None, self.device, self.processes > 1)
        if error is not None:
            raise error
        if failed:
            raise CheckpointError(f'{flag} {path!r} cannot be read by another process: see its message')
        return content

    def check_alike(self, text: str, what: str) -> None:
        """Refuses processes that see different files; every one must call it.

        Args:
            text: the same on all processes if they see the same.
            what: this process would resume from, for the message.

        Raises:
            CheckpointError: it differs.
        """
        if not agree_on_number(hash_of(text), self.device, self.processes > 1):
            raise CheckpointError(f'this process would resume from {what or "nothing"!r}, others from another '
                                  'checkpoint: --output must be a folder that all of them share')


@dataclass(frozen=True)
class Found:
    """A checkpoint to resume from.

    Attributes:
        path: its file, '' for a new run.
        content: its dictionary, None for a new run.
        damaged: newer files that were skipped.
    """

    path: str = ''
    content: dict[str, Any] | None = None
    damaged: tuple[str, ...] = ()


def find_newest(folder: str, team: Team = Team()) -> Found:
    """The newest intact checkpoint of a run folder; empty if the folder has no checkpoints.

    Damaged ones are named in the log and skipped. Every process of the team must call it.

    Raises:
        CheckpointVersionError: the newest whole one is of a newer release.
        CheckpointError: there are some, and all are damaged; or the processes see different ones.
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
            _logger.warning('%s. Going back to the one before.', error)
            damaged.append(path)
    if damaged:
        raise CheckpointError(f'--resume auto: all {len(damaged)} checkpoints in {folder!r} are damaged: restore one '
                              'from elsewhere, or start over with another --experiment')
    return Found()


def set_aside(paths: tuple[str, ...]) -> None:
    """Renames damaged checkpoints to NAME.damaged, so that they no longer count among those to keep."""
    for path in paths:
        try:
            os.replace(path, path + '.damaged')
        except OSError as error:
            _logger.warning('Damaged checkpoint %s cannot be renamed (%s).', path, error.strerror)


def open_resume(settings: RunSettings, folder: str, team: Team) -> Found:
    """The checkpoint that `--resume` names; every process must call it.

    Args:
        settings: `resume` and `experiment` of the run.
        folder: run folder of `--experiment`, in which `auto` looks.
        team: the processes.

    Raises:
        ConfigError: `auto` without `--experiment`.
        CheckpointError, CheckpointNotFoundError: see `read_checkpoint` and `find_newest`.
    """
    if settings.resume != 'auto':
        return Found(settings.resume, team.open(settings.resume, '--resume')) if settings.resume else Found()
    if not settings.experiment:
        raise ConfigError("--resume auto needs --experiment NAME, so that the run's folder is known: add it")
    return find_newest(folder, team)


def check_agreement(path: str, team: Team) -> None:
    """Refuses processes that resume from different files; every process must call it.

    Raises:
        CheckpointError: the files differ.
    """
    seal = read_seal(path) if path else None
    text = seal.sha256 if seal is not None else str(bool(path))
    team.check_alike(text, path)
