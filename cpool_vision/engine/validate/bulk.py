"""Validation of many models or checkpoints, and the results file."""
import glob
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from timm.models import is_model, list_models
from timm.utils import check_batch_size_retry, decay_batch_step, natural_key

import cpool_vision  # noqa: F401 - registers the variants
from cpool_vision.errors import CheckpointNotFoundError, ConfigError, UserError

from ..device import Runtime, leave_processes, start_runtime
from ..settings.validate import ValidateSettings
from ..tracking.progress_bar import silence_logging
from .results import check_writable, results_format, write_results
from .run import validate

_logger = logging.getLogger(__name__)
# weights that predict no ImageNet-1k classes
_OTHER_CLASSES = ['*_in21k', '*_in22k', '*in12k', '*_dino', '*fcmae', '*seer']


def _distinct(paths: Sequence[str]) -> list[str]:
    """Files without further names of the same file, such as the numbered one that is also the last and the best."""
    known: dict[tuple[int, int], str] = {}
    for path in paths:
        status = os.stat(path)
        first = known.setdefault((status.st_dev, status.st_ino), path)
        if first != path:
            _logger.info('%s is the same file as %s: measured once.', path, first)
    return list(known.values())


def plan(settings: ValidateSettings) -> list[tuple[str, str]] | None:
    """Models and checkpoints to measure one after the other; None for a single validation.

    A folder as `--checkpoint` means each checkpoint in it; as `--model`, 'all' means every model with ImageNet
    weights, a wildcard those that match, and a file the names in it.

    Raises:
        CheckpointNotFoundError: the folder holds no checkpoint.
        ConfigError: nothing matches, or the file names nothing.
    """
    name = settings.model
    if settings.checkpoint and os.path.isdir(settings.checkpoint):
        folder = glob.escape(settings.checkpoint)
        found = [path for ending in ('*.pth.tar', '*.pth') for path in glob.glob(os.path.join(folder, ending))]
        if not found:
            raise CheckpointNotFoundError(f'--checkpoint {settings.checkpoint!r} holds no .pth.tar or .pth')
        return [(name, path) for path in _distinct(sorted(found, key=natural_key))]
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
            raise ConfigError(f'--model {name!r} is a file without names: put one per line')
        return [(each, '') for each in names]
    return None


def validate_with_retry(settings: ValidateSettings, runtime: Runtime) -> dict[str, Any]:
    """Like `validate`, with a smaller batch after each failure of the device, such as running out of memory.

    Returns:
        The results, or `model` and `error`.
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
                raise  # the others wait for this one
            reason = ' '.join(str(error).split())
            if not check_batch_size_retry(reason):
                break
        batch_size = decay_batch_step(batch_size)
        if batch_size:
            _logger.warning('%s failed (%s): trying again with a batch of %d.', settings.model, reason, batch_size)
    _logger.error('%s could not be measured: %s', settings.model, reason)
    return {'model': settings.model, 'error': reason}


def validate_many(settings: ValidateSettings, jobs: Sequence[tuple[str, str]], runtime: Runtime, kind: str,
                  ) -> list[dict[str, Any]]:
    """Measures models one after the other and returns the best first; models that fail are logged and skipped.
    After every model the results file, if asked for, holds what is known so far.
    """
    results: list[dict[str, Any]] = []
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
        raise ConfigError('--retry works in one process, as others do not learn of a failure: drop it')
    for name in ('predictions', 'plots'):
        if jobs is not None and getattr(settings, name):
            raise ConfigError(f'--{name} is for one model, and {len(jobs)} are to be measured: drop it')
    return kind


def run_validation(settings: ValidateSettings) -> dict[str, Any] | list[dict[str, Any]]:
    """Everything that validate.py does: one model or many, over one process or several, and the results file.

    Returns:
        One row of results, or several, best first; the same on every process.

    Raises:
        UserError: bad input; see `cpool_vision.errors`. With `--retry` or many models, failures become log lines.
        RuntimeError: one of several processes failed.
    """
    runtime = start_runtime(settings)
    if not runtime.primary:
        silence_logging()
    try:
        return _run(settings, runtime)
    finally:
        leave_processes()


def _run(settings: ValidateSettings, runtime: Runtime) -> dict[str, Any] | list[dict[str, Any]]:
    jobs = plan(settings)
    kind = _check(settings, jobs, runtime)
    if jobs is not None:
        _logger.info('Measuring %d: %s', len(jobs), ', '.join(path or name for name, path in jobs))
        results: Any = validate_many(settings, jobs, runtime, kind)
        if not results:
            raise ConfigError(f'none of {len(jobs)} models could be measured: see the messages above')
    elif settings.retry:
        results = validate_with_retry(settings, runtime)
        if 'error' in results:
            raise ConfigError(f'{settings.model}: {results["error"]}')
    else:
        results = validate(settings, runtime)
    if settings.results_file and runtime.primary:
        write_results(settings.results_file, results, kind)
    return results
