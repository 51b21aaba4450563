"""Validates many models or checkpoints and writes the results file."""
import glob
import logging
import os
from collections.abc import Sequence
from dataclasses import replace

import torch
from timm.models import is_model, list_models
from timm.utils import check_batch_size_retry, decay_batch_step, natural_key

import cpool_vision  # noqa: F401 - registers the variants
from cpool_vision.errors import CheckpointNotFoundError, ConfigError, UserError

from ..device import Runtime, leave_processes, start_runtime
from ..settings.validate import ValidateSettings
from ..tracking.progress_bar import silence_logging
from .results import check_writable, results_format, write_results
from .results_rows import Row
from .run import validate

_logger = logging.getLogger(__name__)
# weights for classes other than those of ImageNet-1k
_OTHER_CLASSES = ['*_in21k', '*_in22k', '*in12k', '*_dino', '*fcmae', '*seer']


def _distinct(paths: Sequence[str]) -> list[str]:
    """Drops paths of the same file, such as a numbered checkpoint that is also the last and the best."""
    known: dict[tuple[int, int], str] = {}
    for path in paths:
        status = os.stat(path)
        first = known.setdefault((status.st_dev, status.st_ino), path)
        if first != path:
            _logger.info('%s is the same file as %s. Validating it once.', path, first)
    return list(known.values())


def plan(settings: ValidateSettings) -> list[tuple[str, str]] | None:
    """Returns the (model, checkpoint) pairs to validate, or None for a single validation.

    If `--checkpoint` is a folder, each checkpoint in it is validated. `--model all` stands for every model with
    ImageNet-1k weights, a wildcard for all models that match, and a file for the names in it.

    Raises:
        CheckpointNotFoundError: The folder has no checkpoints.
        ConfigError: No model matches, or the file is empty.
    """
    name = settings.model
    if settings.checkpoint and os.path.isdir(settings.checkpoint):
        folder = glob.escape(settings.checkpoint)
        found = [path for ending in ('*.pth.tar', '*.pth') for path in glob.glob(os.path.join(folder, ending))]
        if not found:
            raise CheckpointNotFoundError(
                f'--checkpoint {settings.checkpoint!r} contains no .pth.tar or .pth: check the path')
        return [(name, path) for path in _distinct(sorted(found, key=natural_key))]
    if name == 'all':
        return [(each, '') for each in list_models(pretrained=True, exclude_filters=_OTHER_CLASSES)]
    if ':' in name or is_model(name.split('.', 1)[0]):
        return None
    if any(mark in name for mark in '*?['):
        names = list_models(name, pretrained=True)
        if not names:
            raise ConfigError(f'--model {name!r} matches no model with pretrained weights: use a wider wildcard')
        return [(each, '') for each in names]
    if os.path.isfile(name):
        with open(name, encoding='utf-8') as file:
            names = [line.strip() for line in file if line.strip()]
        if not names:
            raise ConfigError(f'--model {name!r} is an empty file: write one model name per line')
        return [(each, '') for each in names]
    return None


def validate_with_retry(settings: ValidateSettings, runtime: Runtime) -> Row:
    """Like `validate`, but tries a smaller batch after a device failure, such as running out of memory.

    Returns:
        The row of results, or `model` and `error` if validation failed.
    """
    batch_size, reason = settings.batch_size, 'no batch size is left to try'
    while batch_size:
        attempt = replace(settings, batch_size=batch_size * settings.num_gpu)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        try:
            return validate(attempt, runtime)
        except UserError as error:
            reason = ' '.join(str(error).split())
            break
        except RuntimeError as error:
            if runtime.distributed:
                raise  # the other processes are waiting for this one
            reason = ' '.join(str(error).split())
            if not check_batch_size_retry(reason):
                break
        batch_size = decay_batch_step(batch_size)
        if batch_size:
            _logger.warning('%s failed (%s). Trying again with batch size %d.', settings.model, reason, batch_size)
    _logger.error('%s could not be validated: %s', settings.model, reason)
    return {'model': settings.model, 'error': reason}


def validate_many(settings: ValidateSettings, jobs: Sequence[tuple[str, str]], runtime: Runtime, kind: str,
                  ) -> list[Row]:
    """Validates models one after the other; returns their rows, best first.

    Models that fail are logged and skipped. The results file, if any, is written after every model.
    """
    results: list[Row] = []
    for name, checkpoint in jobs:
        row = validate_with_retry(replace(settings, model=name, checkpoint=checkpoint), runtime)
        if 'error' in row:
            continue
        if checkpoint:
            row['checkpoint'] = checkpoint
        metric = 'map' if settings.multi_label else 'top1'
        results = sorted([*results, row], key=lambda each: each[metric], reverse=True)
        if settings.results_file and runtime.primary:
            write_results(settings.results_file, results, kind)
    return results


def _check(settings: ValidateSettings, jobs: Sequence[tuple[str, str]] | None, runtime: Runtime) -> str:
    kind = results_format(settings.results_file, settings.results_format)
    if settings.results_file:
        check_writable(settings.results_file, '--results-file')
    if settings.retry and runtime.distributed:
        raise ConfigError('--retry works in one process only: drop it')
    for name in ('predictions', 'plots'):
        if jobs is not None and getattr(settings, name):
            raise ConfigError(f'--{name} works with one model, not {len(jobs)}: drop it')
    return kind


def run_validation(settings: ValidateSettings) -> Row | list[Row]:
    """Validates one model or many, in one process or several, and writes the results file.

    Returns:
        A row of results, or several, best first; the same on every process.

    Raises:
        UserError: Bad input, see `cpool_vision.errors`. With `--retry` or many models, failures are logged instead.
        RuntimeError: One of several processes failed.
    """
    runtime = start_runtime(settings)
    if not runtime.primary:
        silence_logging()
    try:
        return _run(settings, runtime)
    finally:
        leave_processes()


def _run(settings: ValidateSettings, runtime: Runtime) -> Row | list[Row]:
    jobs = plan(settings)
    kind = _check(settings, jobs, runtime)
    if jobs is not None:
        _logger.info('Validating %d models: %s', len(jobs), ', '.join(path or name for name, path in jobs))
        rows = validate_many(settings, jobs, runtime, kind)
        if not rows:
            raise ConfigError(f'none of {len(jobs)} models could be validated: see the messages above')
        return rows
    row = validate_with_retry(settings, runtime) if settings.retry else validate(settings, runtime)
    if 'error' in row:
        raise ConfigError(f'{settings.model}: {row["error"]}')
    if settings.results_file and runtime.primary:
        write_results(settings.results_file, row, kind)
    return row
