"""Validation of many models or checkpoints, and the results file."""
import argparse
import copy
import glob
import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed
from timm.models import is_model, list_models
from timm.utils import check_batch_size_retry, decay_batch_step, natural_key

import cpool_vision  # noqa: F401 - registers the variants
from cpool_vision.errors import CheckpointNotFoundError, ConfigError, UserError

from ..data.multi_label import is_multi_label
from ..device import setup_device
from ..tracking.progress import silence_logging
from .results import check_writable, results_format, write_results
from .run import validate

_logger = logging.getLogger(__name__)
# weights that predict no ImageNet-1k classes
_OTHER_CLASSES = ['*_in21k', '*_in22k', '*in12k', '*_dino', '*fcmae', '*seer']


def plan(args: argparse.Namespace) -> list[tuple[str, str]] | None:
    """Models and checkpoints to measure one after the other; None for a single validation.

    A folder as `--checkpoint` means each checkpoint in it; as `--model`, 'all' means every model with ImageNet
    weights, a wildcard those that match, and a file the names in it.

    Raises:
        CheckpointNotFoundError: the folder holds no checkpoint.
        ConfigError: nothing matches, or the file names nothing.
    """
    name = args.model
    if args.checkpoint and os.path.isdir(args.checkpoint):
        folder = glob.escape(args.checkpoint)
        found = [path for ending in ('*.pth.tar', '*.pth') for path in glob.glob(os.path.join(folder, ending))]
        if not found:
            raise CheckpointNotFoundError(f'--checkpoint {args.checkpoint!r} holds no .pth.tar or .pth')
        return [(name, path) for path in sorted(found, key=natural_key)]
    if name == 'all':
        return [(each, '') for each in list_models(pretrained=True, exclude_filters=_OTHER_CLASSES)]
    if ':' in name or is_model(name.split('.', 1)[0]):
        return None
    if any(mark in name for mark in '*?['):
        names = list_models(name, pretrained=True)
        if not names:
            raise ConfigError(f'--model {name!r} matches no model that has pretrained weights: widen the wildcard')
        return [(each, '') for each in names]
    if os.path.isfile(name):
        with open(name, encoding='utf-8') as file:
            names = [line.strip() for line in file if line.strip()]
        if not names:
            raise ConfigError(f'--model {name!r} is a file without names: put one a line')
        return [(each, '') for each in names]
    return None


def validate_with_retry(args: argparse.Namespace) -> dict[str, Any]:
    """Like `validate`, with a smaller batch after each failure of the device, such as running out of memory.

    Returns:
        The results, or `model` and `error`.
    """
    batch_size, reason = args.batch_size, 'no batch size is left to try'
    while batch_size:
        attempt = copy.deepcopy(args)
        attempt.batch_size = batch_size * args.num_gpu
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        try:
            return validate(attempt)
        except UserError as error:
            reason = ' '.join(str(error).split())
            break
        except RuntimeError as error:
            if getattr(args, 'distributed', False):
                raise  # the others wait for this one
            reason = ' '.join(str(error).split())
            if not check_batch_size_retry(reason):
                break
        batch_size = decay_batch_step(batch_size)
        if batch_size:
            _logger.warning('%s failed (%s): trying again with a batch of %d.', args.model, reason, batch_size)
    _logger.error('%s could not be measured: %s', args.model, reason)
    return {'model': args.model, 'error': reason}


def validate_many(args: argparse.Namespace, jobs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """Measures models one after the other, best first in the answer; those that fail are logged and left out.

    After every model the results file, if asked for, holds what is known so far.
    """
    results: list[dict[str, Any]] = []
    for name, checkpoint in jobs:
        attempt = copy.deepcopy(args)
        attempt.model, attempt.checkpoint = name, checkpoint
        attempt.pretrained = attempt.pretrained or not checkpoint
        row = validate_with_retry(attempt)
        if 'error' in row:
            continue
        if checkpoint:
            row['checkpoint'] = checkpoint
        metric = 'map' if is_multi_label(args) else 'top1'
        results = sorted([*results, row], key=lambda each: each[metric], reverse=True)
        if args.results_file and args.rank == 0:
            write_results(args.results_file, results, args.results_format)
    return results


def join_processes(args: argparse.Namespace) -> None:
    """Joins the processes of torchrun or SLURM, if there are several, and silences all but the first."""
    args.device = str(setup_device(args))
    if args.rank != 0:
        silence_logging()


def _check(args: argparse.Namespace, jobs: Sequence[tuple[str, str]] | None) -> str:
    kind = results_format(args.results_file, args.results_format)
    if args.results_file:
        check_writable(args.results_file, '--results-file')
    if args.retry and args.distributed:
        raise ConfigError('--retry works in one process, as others do not learn of a failure: drop it')
    for name in ('predictions', 'plots'):
        if jobs is not None and getattr(args, name):
            raise ConfigError(f'--{name} is for one model, and {len(jobs)} are to be measured: drop it')
    return kind


def run_validation(args: argparse.Namespace) -> dict[str, Any] | list[dict[str, Any]]:
    """Everything that validate.py does: one model or many, over one process or several, and the results file.

    Returns:
        One row of results, or several, best first; the same on every process.

    Raises:
        UserError: bad input; see `cpool_vision.errors`. With `--retry` or many models, failures become log lines.
        RuntimeError: one of several processes failed.
    """
    join_processes(args)
    try:
        return _run(args)
    finally:
        if args.distributed and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _run(args: argparse.Namespace) -> dict[str, Any] | list[dict[str, Any]]:
    jobs = plan(args)
    args.results_format = _check(args, jobs)
    if jobs is not None:
        _logger.info('Measuring %d: %s', len(jobs), ', '.join(path or name for name, path in jobs))
        results: Any = validate_many(args, jobs)
        if not results:
            raise ConfigError(f'none of {len(jobs)} models could be measured: see the messages above')
    elif args.retry:
        results = validate_with_retry(args)
        if 'error' in results:
            raise ConfigError(f'{args.model}: {results["error"]}')
    else:
        results = validate(args)
    if args.results_file and args.rank == 0:
        write_results(args.results_file, results, args.results_format)
    return results
