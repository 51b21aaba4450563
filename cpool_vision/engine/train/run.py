"""A whole training run, from settings to the best checkpoint."""
import argparse
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed
from timm import utils
from timm.models import safe_model_name

import cpool_vision  # noqa: F401 - registers the variants
from cpool_vision.errors import ConfigError
from cpool_vision.inspect import SupportStatistics

from ..checkpoints.position import Position, check_same_batches, read_position
from ..checkpoints.resume import check_agreement, open_resume, set_aside
from ..checkpoints.saver import CheckpointSaver, TrainState
from ..data import loaders as data
from ..data import naflex
from ..data.augmentation import KEY, RECORD, check_same_pipeline, describe_pipeline, record_text
from ..data.fingerprint import check_same_data, compare_splits, fingerprint
from ..data.multi_label import adopt_labels, check_task, is_multi_label
from ..data.unreadable import LIST_NAME, refuse_unreadable
from ..data.worker import explained_deaths
from ..device import Precision, resolve_precision, seed_everything, settle_threads, setup_device
from ..distributed.agent import AgentWatch
from ..distributed.sharding import check_fsdp, shard_task
from ..model import create_train_model, place_model, resolve_input
from ..tracking.progress import silence_logging
from ..tracking.run_folder import RunFolder, check_free, claim, run_path, settings_text
from ..tracking.run_lock import RunLock
from ..tracking.support_log import keep_first_input, measure_supports
from ..tracking.track import Trackers, check_services, open_trackers
from ..validate.evaluate import Evaluation, check_views, evaluate
from ..validate.metrics import Tally
from ..validate.multi_label import LabelTally
from . import objective
from .checkpointer import Checkpointer, load_process_state
from .loop import Run, current_lr, train_one_epoch

_logger = logging.getLogger(__name__)


def _columns(args: argparse.Namespace) -> tuple[str, ...]:
    return (LabelTally if is_multi_label(args) else Tally).columns


def _check(args: argparse.Namespace) -> None:
    for flag, value, least in (('--grad-accum-steps', args.grad_accum_steps, 1), ('--epochs', args.epochs, 1),
                               ('--val-interval', args.val_interval, 1), ('--log-interval', args.log_interval, 1),
                               ('--checkpoint-hist', args.checkpoint_hist, 1), ('--seed', args.seed, 0),
                               ('--workers', args.workers, 0), ('--max-skipped', args.max_skipped, 0),
                               ('--recovery-interval', args.recovery_interval, 0)):
        if value < least:
            raise ConfigError(f'{flag} must be >= {least}, got {value}')
    check_task(args)
    if args.eval_metric not in _columns(args):
        raise ConfigError(f'--eval-metric {args.eval_metric!r} is unknown: choose {", ".join(_columns(args))}')
    if args.clip_mode not in ('norm', 'value', 'agc'):
        raise ConfigError(f'--clip-mode {args.clip_mode!r} is unknown: choose norm, value or agc')
    check_views(args.tta, args.naflex_loader)
    if args.dist_bn not in ('', 'reduce', 'broadcast'):
        raise ConfigError(f"--dist-bn {args.dist_bn!r} is unknown: choose reduce, broadcast or ''")


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Trains as the settings say.

    Under torchrun every process calls this function; the first one writes the run folder.

    Args:
        args: settings as `config.parse_args(train_flags.build_parser)` gives them; changed in place.

    Returns:
        `folder`, `best_metric`, `best_epoch`, and `epochs`: the rows of summary.csv that this call added. Empty on
        other processes than the first.

    Raises:
        UserError: bad input; see `cpool_vision.errors`.
        StopRequested: a signal asked to stop, and the run is saved.
    """
    if is_multi_label(args) and args.eval_metric == 'top1':  # timm's default, which stands for no choice
        args.eval_metric = 'map'
    settings = settings_text(args)
    _check(args)
    device = setup_device(args)
    if args.rank != 0:
        silence_logging()
    try:
        with AgentWatch(), explained_deaths(), RunLock() as lock:
            return _train(args, settings, device, lock)
    finally:
        if args.distributed and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _train(args: argparse.Namespace, settings: str, device: torch.device, lock: RunLock) -> dict[str, Any]:
    primary = args.rank == 0
    check_fsdp(args)
    precision = resolve_precision(args, device)
    if args.data and not args.data_dir:
        args.data_dir = args.data
    if primary:
        check_services(args)
    if primary and args.experiment:
        lock.acquire(run_path(args))  # before its checkpoints are looked at
    found = open_resume(args, run_path(args), device)
    resume, content = found.path, found.content
    check_agreement(resume, device, args.distributed)
    adopt_labels(args, content, resume, refuse=True)
    setattr(args, KEY, describe_pipeline(args))

    seed_everything(args.seed)  # the same on every process: they start from the same weights
    model = create_train_model(args)
    _logger.info('Model %s: %d parameters.', safe_model_name(args.model), sum(p.numel() for p in model.parameters()))
    data_config = resolve_input(model, args)
    folder = run_path(args, data_config['input_size'][-1])
    continuing = check_free(folder, resume, args.resume == 'auto') if primary and args.experiment else False
    model = place_model(model, args, device, precision)

    eval_loader, mixup_fn = None, None
    if args.naflex_loader:
        loader, eval_loader = naflex.build_naflex_loaders(args, model, data_config, device, precision)
    else:
        loader, mixup_fn = data.build_train_loader(args, data_config, device, precision)
    if args.val_split and eval_loader is None:
        eval_loader = data.build_eval_loader(
            args, data_config, device, precision, args.val_split, args.validation_batch_size or args.batch_size,
            args.val_num_samples, distributed=args.distributed)
    train_set = data.base_dataset(loader)
    if eval_loader is not None:
        compare_splits(args, train_set, data.base_dataset(eval_loader))
    mean_batch = float(getattr(loader.batch_sampler, 'average_batch_size', args.batch_size))
    task: Any = objective.build_task(args, model, objective.build_loss(args), device, precision, primary)
    if args.fsdp:
        shard_task(task, args, device)
    args.lr = objective.resolve_lr(args, mean_batch)
    optimizer = objective.build_optimizer(args, task.get_trainable_module())
    run = Run(args, device, precision, task, optimizer, precision.loss_scaler(), None, loader, mixup_fn, mean_batch)
    if primary:
        run.data = fingerprint(train_set)
    metric_name = args.eval_metric if eval_loader is not None else 'loss'
    run.scheduler, num_epochs = objective.build_scheduler(
        args, optimizer, run.updates_per_epoch, decreasing=metric_name == 'loss')
    state = TrainState(task, optimizer, run.loss_scaler, run.scheduler, vars(args).copy())

    start = Position()
    if content is not None:
        next_epoch = state.load_checkpoint(content, resume, weights_only=args.no_resume_opt)
        start = read_position(content, resume) or Position(next_epoch)
        check_same_pipeline(content, resume, getattr(args, KEY), refuse=args.resume == 'auto' or bool(start.batch))
        check_same_data(content, resume, run.data, bool(start.batch))
        if start.batch:
            check_same_batches(content, resume, args, len(loader), getattr(loader, 'batch_sampler', None) is None)
        _logger.info('Resumed from %s: batch %d of epoch %d comes next.', resume, start.batch, start.epoch)
    if args.model_ema:
        if not args.fsdp:
            task.setup_ema(
                decay=args.model_ema_decay,
                use_warmup=args.model_ema_warmup,
                device=torch.device('cpu') if args.model_ema_force_cpu else None)
        if content is not None:
            state.load_ema(content, resume)
    eval_model = _compile_and_distribute(args, task, device)
    if content is not None and 'processes' in content:
        load_process_state(run, content['processes'], resume)  # after DDP, which copies those of the first process
    if args.start_epoch is not None:
        start = Position(args.start_epoch)
    if start.epoch >= num_epochs:
        _logger.warning('Nothing to train: epoch %d of %d comes next; raise --epochs.', start.epoch, num_epochs)
    run.position = start
    _place_schedule(run, start, restored=content is not None and not args.no_resume_opt)

    if primary and not args.experiment:
        folder = claim(folder)
        lock.acquire(folder)
    opened, saver, trackers = None, None, Trackers({})
    if primary:
        opened = RunFolder(folder, settings, start.epoch if continuing else None)
        opened.keep(RECORD, record_text(getattr(args, KEY)))
        run.folder = folder
        saver = CheckpointSaver(folder, args.checkpoint_hist, decreasing=metric_name == 'loss')
        if continuing and content is not None:
            saver.restore(content, resume)
        set_aside(found.damaged)
        trackers = open_trackers(args, folder, start.epoch, run.updates_before(start), continuing)
        run.on_report = trackers.log_update
    del found, content  # as large as model and optimizer
    data.list_unreadable(loader, run.folder)
    _logger.info('Run folder: %s. Epochs %d to %d, %d updates each, %s.', folder, start.epoch, num_epochs - 1,
                 run.updates_per_epoch, _describe(precision))

    checkpointer = Checkpointer(run, state, saver, args.recovery_interval)
    run.after_update = checkpointer.after_update
    rows: list[dict[str, Any]] = []
    with _closing(loader), trackers, run.vote.signals:
        for epoch in range(start.epoch, num_epochs):
            batch = start.batch if epoch == start.epoch else 0
            data.set_position(loader, epoch, batch)
            settle_threads(args.distributed)
            metrics = train_one_epoch(run, epoch, num_epochs)
            unreadable = data.share_unreadable(loader, device)
            if unreadable:
                _logger.warning('%d training images so far could not be read and were replaced: see %s.', unreadable,
                                LIST_NAME)
            if args.distributed and args.dist_bn:
                utils.distribute_bn(task.get_trainable_module(), args.world_size, args.dist_bn == 'reduce')
            columns = {'train_loss': metrics['loss']}
            final = epoch + 1 == num_epochs
            due = (epoch + 1) % args.val_interval == 0 or final
            evaluation: Evaluation | None = None
            supports: list[SupportStatistics] = []
            if due and eval_loader is not None:
                evaluation, supports = _evaluate_all(args, run, eval_model, eval_loader)
                columns.update({f'eval_{key}': evaluation.metrics[key] for key in _columns(args)})
            columns['lr'] = current_lr(optimizer)
            columns['train_images_per_sec'] = metrics['images_per_sec']
            if args.nonfinite == 'skip':
                columns['skipped_updates'] = metrics['skipped']
            latest = columns.get(f'eval_{metric_name}', columns['train_loss']) if due else None
            if run.scheduler is not None:
                run.scheduler.step(epoch + 1, latest)
            if opened is not None:
                rows.append(opened.add_epoch(epoch, columns))
                trackers.log_epoch(rows[-1], run.updates_before(run.position), supports)
                _logger.info('Epoch %d: %s', epoch, '  '.join(f'{key} {value:.5g}' for key, value in columns.items()))
            checkpointer.after_epoch(None if latest is None else float(latest), final)
            if evaluation is not None and eval_loader is not None:  # once the epoch is saved
                refuse_unreadable(eval_loader.dataset, evaluation.unreadable_positions, int(
                    evaluation.metrics['images'] + evaluation.metrics['unreadable']), args.max_bad_samples)
    if saver is None:
        return {}
    saver.finish()
    if saver.best_metric is not None:
        _logger.info('Best %s %.5g at epoch %s: %s', metric_name, saver.best_metric, saver.best_epoch,
                     saver.path('model_best'))
    return {'folder': folder, 'metric': metric_name, 'best_metric': saver.best_metric, 'best_epoch': saver.best_epoch,
            'epochs': rows}


@contextmanager
def _closing(loader: Any) -> Iterator[None]:
    try:
        yield
    finally:
        data.close_workers(loader)


def _place_schedule(run: Run, start: Position, restored: bool) -> None:
    """Sets the learning rate of a position; that of `plateau` depends on the past and came with the optimizer."""
    if run.scheduler is None or restored and hasattr(run.scheduler, 'lr_scheduler'):
        return
    updates = run.updates_before(start)
    if run.args.sched_on_updates and updates:
        run.scheduler.step_update(updates)
    elif not run.args.sched_on_updates and start.epoch:
        run.scheduler.step(start.epoch)


def _describe(precision: Precision) -> str:
    if precision.amp_dtype is not None:
        return f'mixed precision in {str(precision.amp_dtype).split(".")[-1]}'
    return str(precision.model_dtype or torch.float32).split('.')[-1]


def _compile_and_distribute(args: argparse.Namespace, task: Any, device: torch.device) -> Any:
    """Compiles if asked to, wraps in DDP under several processes, and returns the model to validate, without DDP."""
    if args.torchcompile:
        task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
        if task.has_ema():
            task.compile_ema(backend=args.torchcompile, mode=args.torchcompile_mode)
    eval_model = task.get_eval_model()
    if args.distributed and not args.fsdp:
        device_ids = None if device.type == 'cpu' else [device]
        task.prepare_distributed(device_ids=device_ids, broadcast_buffers=not args.no_ddp_bb)
    return eval_model


def _tally(args: argparse.Namespace, device: torch.device) -> Tally:
    return LabelTally(device, args.num_classes, args.threshold) if is_multi_label(args) else Tally(device)


def _evaluate_all(args: argparse.Namespace, run: Run, eval_model: Any, loader: Any,
                  ) -> tuple[Evaluation, list[SupportStatistics]]:
    """Validates the model and, if there is one, its average, whose metrics and supports then count."""
    common: dict[str, Any] = dict(
        loader=loader, device=run.device, precision=run.precision, prefetched=not args.no_prefetcher,
        channels_last=args.channels_last, distributed=args.distributed, primary=args.rank == 0,
        log_interval=args.log_interval, views=args.tta)
    task: Any = run.task
    settle_threads(args.distributed)
    measured = eval_model
    with keep_first_input(measured) as images:
        result = evaluate(measured, tally=_tally(args, run.device), **common)
    if task.has_ema() and not args.model_ema_force_cpu:
        name = 'map' if is_multi_label(args) else 'top1'
        _logger.info('Without averaging: loss %.4f  %s %.3f', result.metrics['loss'], name, result.metrics[name])
        average = task.get_trainable_module(ema=True)
        if args.distributed and args.dist_bn:
            utils.distribute_bn(average, args.world_size, args.dist_bn == 'reduce')
        measured = task.get_eval_model(ema=True)
        result = evaluate(measured, title='Validate average', tally=_tally(args, run.device), **common)
    supports = measure_supports(measured, images[0], run.precision) if images and (args.rank == 0 or args.fsdp) else []
    return result, supports
