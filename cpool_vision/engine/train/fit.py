"""Trains a run: epochs, validation, records and checkpoints."""
import logging
from contextlib import ExitStack
from typing import TypedDict

import torch

from ..data import loaders
from ..data.unreadable import LIST_NAME
from ..data.worker import explained_deaths
from ..device import Precision, leave_processes, settle_threads, start_runtime
from ..distributed.agent import AgentWatch
from ..distributed.sharding import trained_module
from ..distributed.signals import StopSignals
from ..settings.train import TrainSettings
from ..tracking.progress_bar import silence_logging
from ..tracking.run_lock import RunLock
from ..validate.evaluate import Evaluation
from .build import build
from .loop import train_one_epoch
from .report import current_lr
from .run import Run
from .validator import average_statistics, columns_of

_logger = logging.getLogger(__name__)


class RunResult(TypedDict, total=False):
    """Result of a run.

    Attributes:
        folder: Run folder.
        metric: Name of the metric that ranks the epochs.
        best_metric: Metric of the best epoch; None if no epoch was ranked.
        best_epoch: The best epoch; None if no epoch was ranked.
        epochs: Rows of summary.csv that this call added.
    """

    folder: str
    metric: str
    best_metric: float | None
    best_epoch: int | None
    epochs: list[dict[str, float]]


def train(settings: TrainSettings) -> RunResult:
    """Trains a model.

    Under torchrun, every process calls this function, and the first one writes the run folder.

    Args:
        settings: Settings, for example from `config.read_train`.

    Returns:
        The result on the first process, an empty dictionary on the others.

    Raises:
        UserError: If the input is bad; see `cpool_vision.errors`.
        StopRequested: If a signal stopped the run. The run is saved.
    """
    # from the start, because a process whose torchrun is gone would wait for the others until the timeout
    with AgentWatch():
        runtime = start_runtime(settings)
        if not runtime.primary:
            silence_logging()
        try:
            # the signal handlers come first, so that a signal before the first update does not leave the lock behind
            with explained_deaths(), StopSignals() as signals, RunLock() as lock:
                return fit(build(settings, runtime, lock, signals))
        finally:
            leave_processes()


def fit(run: Run) -> RunResult:
    """Trains a run up to its last epoch. Every process must call it.

    Returns:
        See `train`.

    Raises:
        UserError: If data is unreadable, the loss is not finite, or a checkpoint cannot be written.
        StopRequested: If a signal stopped the run. The run is saved.
    """
    _logger.info('Run folder: %s. Epochs %d to %d, %d updates each, %s.', run.folder, run.progress.epoch,
                 run.end - 1, run.updates_per_epoch, _describe(run.runtime.precision))
    rows: list[dict[str, float]] = []
    with ExitStack() as stack:
        stack.callback(loaders.close_workers, run.loader)
        stack.enter_context(run.trackers)
        first, batch = run.progress.epoch, run.progress.batch
        for epoch in range(first, run.end):
            loaders.start_at(run.loader, epoch, batch if epoch == first else 0)
            settle_threads(run.runtime.distributed)
            metrics = train_one_epoch(run, epoch)
            _share_training(run)
            final = epoch + 1 == run.end
            due = (epoch + 1) % run.settings.val_interval == 0 or final or epoch + 1 in run.settings.save_epochs
            result, supports = run.validator.measure(run.task) if due and run.validator else (None, [])
            columns = _columns(run, metrics, result)
            latest = columns.get(f'eval_{run.metric}', columns['train_loss']) if due else None
            if run.scheduler is not None:
                run.scheduler.step(epoch + 1, latest)
            if run.record is not None:
                run.record.summary.add(epoch, [columns])
                rows.append({'epoch': epoch, **columns})
                run.trackers.log_epoch(rows[-1], run.updates_before(run.progress), supports)
                _logger.info('Epoch %d: %s', epoch, '  '.join(f'{key} {value:.5g}' for key, value in columns.items()))
            run.after_epoch(None if latest is None else float(latest), final)
            if result is not None and run.validator is not None:  # after the epoch is saved
                run.validator.refuse_unreadable(result)
    return _finish(run, rows)


def _share_training(run: Run) -> None:
    """Exchanges unreadable images and batch norm statistics between the processes after an epoch."""
    unreadable = loaders.share_unreadable(run.loader)
    if unreadable:
        _logger.warning('%d training images so far could not be read and were replaced: see %s.', unreadable,
                        LIST_NAME)
    average_statistics(run.settings, run.runtime, trained_module(run.task))


def _columns(run: Run, metrics: dict[str, float], result: Evaluation | None) -> dict[str, float]:
    """Returns the columns of an epoch in summary.csv."""
    columns = {'train_loss': metrics['loss']}
    if result is not None:
        columns.update({f'eval_{name}': result.metrics[name] for name in columns_of(run.settings)})
    columns['lr'] = current_lr(run.optimizer)
    columns['train_images_per_sec'] = metrics['images_per_sec']
    if run.settings.nonfinite == 'skip':
        columns['skipped_updates'] = metrics['skipped']
    return columns


def _finish(run: Run, rows: list[dict[str, float]]) -> RunResult:
    """Cleans up the checkpoints of a complete run and returns its result."""
    saver = run.saver
    if saver is None:
        return {}
    saver.finish()
    if saver.best_metric is not None:
        _logger.info('Best %s %.5g at epoch %s: %s', run.metric, saver.best_metric, saver.best_epoch,
                     saver.path('model_best'))
    return {'folder': run.folder, 'metric': run.metric, 'best_metric': saver.best_metric,
            'best_epoch': saver.best_epoch, 'epochs': rows}


def _describe(precision: Precision) -> str:
    dtype = str(precision.amp_dtype or precision.model_dtype or torch.float32).removeprefix('torch.')
    return dtype if precision.amp_dtype is None else f'mixed precision in {dtype}'
