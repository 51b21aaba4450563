"""Which checkpoint a run goes on from: the newest good one."""
import argparse
import glob
import logging
import math
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed

from ..errors import CheckpointError, CheckpointVersionError, ConfigError
from .checkpoint import read_checkpoint
from .seal import read_seal

_logger = logging.getLogger(__name__)
EXTENSION = '.pth.tar'
PREVIOUS = 'previous'
RECOVERY = 'recovery-'


def serial_of(path: str) -> float:
    """Serial number of a checkpoint; infinite for one that lost its seal, 0 for a numbered one that has none."""
    seal = read_seal(path)
    if seal is not None:
        return seal.serial
    return math.inf if os.path.basename(path).startswith(('last', RECOVERY)) else 0


def list_candidates(folder: str) -> list[str]:
    """Checkpoints in a run folder, the newest first; of several names of one file only the first."""
    patterns = ('last', f'{RECOVERY}*', PREVIOUS, 'checkpoint-*', 'model_best')
    paths = [path for pattern in patterns
             for path in glob.glob(os.path.join(glob.escape(folder), pattern + EXTENSION))]
    known: set[tuple[int, int]] = set()
    distinct = []
    for path in paths:
        status = os.stat(path)
        if (status.st_dev, status.st_ino) not in known:
            known.add((status.st_dev, status.st_ino))
            distinct.append(path)
    return sorted(distinct, key=serial_of, reverse=True)


@dataclass(frozen=True)
class Found:
    """A checkpoint to resume from.

    Attributes:
        path: its file, '' for a new run.
        content: its dictionary, None for a new run.
        damaged: newer files that were passed over.
    """

    path: str = ''
    content: dict[str, Any] | None = None
    damaged: tuple[str, ...] = ()


def find_newest(folder: str) -> Found:
    """The newest checkpoint of a run folder that is whole; nothing if the folder has none at all.

    Damaged ones are named in the log and passed over.

    Raises:
        CheckpointVersionError: the newest whole one is of a newer release.
        CheckpointError: there are some, and all are damaged.
    """
    damaged: list[str] = []
    for path in list_candidates(folder):
        try:
            return Found(path, read_checkpoint(path, '--resume auto:'), tuple(damaged))
        except CheckpointVersionError:
            raise
        except CheckpointError as error:
            _logger.warning('%s. Going back to the one before.', error)
            damaged.append(path)
    if damaged:
        raise CheckpointError(f'--resume auto: all {len(damaged)} checkpoints in {folder!r} are damaged: restore one '
                              'from elsewhere, or start anew with another --experiment')
    return Found()


def set_aside(paths: tuple[str, ...]) -> None:
    """Renames damaged checkpoints to NAME.damaged, so that they no longer count among those to keep."""
    for path in paths:
        try:
            os.replace(path, path + '.damaged')
        except OSError as error:
            _logger.warning('Damaged checkpoint %s cannot be renamed (%s).', path, error.strerror)


def open_resume(args: argparse.Namespace, folder: str) -> Found:
    """The checkpoint that `--resume` names.

    Args:
        args: settings.
        folder: run folder of `--experiment`, in which `auto` looks.

    Raises:
        ConfigError: `auto` without `--experiment`.
        CheckpointError, CheckpointNotFoundError: see `read_checkpoint` and `find_newest`.
    """
    if args.resume != 'auto':
        return Found(args.resume, read_checkpoint(args.resume, '--resume')) if args.resume else Found()
    if not args.experiment:
        raise ConfigError("--resume auto needs --experiment NAME, so that the run's folder is known: add it")
    return find_newest(folder)


def check_agreement(path: str, device: torch.device, distributed: bool) -> None:
    """Refuses processes that resume from different files; every process must call it.

    Raises:
        CheckpointError: the files differ.
    """
    if not distributed:
        return
    seal = read_seal(path) if path else None
    number = int(seal.sha256[:15], 16) if seal is not None else int(bool(path))
    ends = torch.tensor([number, -number], dtype=torch.int64, device=device)
    torch.distributed.all_reduce(ends, op=torch.distributed.ReduceOp.MAX)
    if ends[0] != -ends[1]:
        raise CheckpointError(f'this process would resume from {path or "nothing"!r}, others from another checkpoint: '
                              '--output must be a folder that all of them share')
