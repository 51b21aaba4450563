"""Builds a training run from its settings, component by component."""
import logging
from collections.abc import Mapping

import torch
import torch.nn as nn
from timm.data import Mixup
from timm.models import safe_model_name
from timm.scheduler.plateau_lr import PlateauLRScheduler
from timm.task import TrainingTask

import cpool_vision  # noqa: F401 - registers the variants
from cpool_vision.errors import ConfigError

from ..checkpoints.progress import Progress, check_batch_facts, read_progress
from ..checkpoints.resume import Found, Team, open_resume, set_aside
from ..checkpoints.saver import CheckpointSaver, TrainState
from ..data import loaders, naflex
from ..data.augmentation import KEY, RECORD, check_same_pipeline, describe_pipeline, record_text
from ..data.fingerprint import check_same_data, compare_splits, fingerprint
from ..data.multi_label import CLASS_NAMES, Classes, check_task, names_of
from ..data.stream import Loader
from ..device import Runtime, seed_everything
from ..distributed.sharding import check_fsdp, shard_task, trained_module, validated_model
from ..distributed.signals import StopSignals
from ..model import create_train_model, place_model, resolve_input
from ..settings.limits import check_limits
from ..settings.shared import InputConfig
from ..settings.train import LossSettings, TrainSettings
from ..tracking.run_folder import RunFolder, check_free, claim, run_path, settings_text
from ..tracking.run_lock import RunLock
from ..tracking.track import check_services, open_trackers
from ..validate.evaluate import check_views
from . import objective
from .checkpointer import Checkpointer, batch_facts, load_process_state
from .loss import build_loss
from .opening import log_opening, warn_of_changes
from .run import Run
from .validator import Validator, columns_of

_logger = logging.getLogger(__name__)


def check(settings: TrainSettings, runtime: Runtime) -> None:
    """Checks that settings are in range and can be combined.

    Raises:
        ConfigError: If they are not. The message names the flag.
    """
    check_limits(settings)
    check_task(settings)
    known = columns_of(settings)
    if settings.eval_metric not in known:
        raise ConfigError(f'--eval-metric {settings.eval_metric!r} is unknown: choose {", ".join(known)}')
    check_views(settings.tta, settings.naflex_loader)
    check_fsdp(settings, runtime.distributed)
    if runtime.primary:
        check_services(settings)


def build(settings: TrainSettings, runtime: Runtime, lock: RunLock, signals: StopSignals | None = None) -> Run:
    """Builds a run, and restores a checkpoint if it resumes. Every process must call it.

    Args:
        settings: Settings, for example from `config.read_train`.
        runtime: Device and process of the run.
        lock: Locks the run folder on the first process.
        signals: Signals that stop the run.

    Raises:
        UserError: If the input is bad; see `cpool_vision.errors`.
    """
    check(settings, runtime)
    if runtime.primary and settings.experiment:
        lock.acquire(run_path(settings))  # before reading its checkpoints
    team = Team(runtime.world_size, runtime.device)
    found = open_resume(settings, run_path(settings), team)
    names = names_of(found.content, found.path, settings.task, refuse=True)
    pipeline = describe_pipeline(settings)

    seed_everything(settings.seed)  # the same on every process, so that they start with the same weights
    model = create_train_model(settings)
    _logger.info('Model %s: %d parameters.', safe_model_name(settings.model), sum(
        p.numel() for p in model.parameters()))
    classes = Classes(settings.num_classes or int(getattr(model, 'num_classes', 0)), names)
    data_config = resolve_input(model, settings)
    folder = run_path(settings, data_config['input_size'][-1])
    continuing = runtime.primary and bool(settings.experiment) and check_free(
        folder, found.path, settings.resume == 'auto')
    model = place_model(model, settings, runtime)
    loader, eval_loader, mixup_fn = _build_loaders(settings, runtime, data_config, classes, model)
    train_set = loaders.base_dataset(loader)
    if eval_loader is not None:
        compare_splits(settings, train_set, loaders.base_dataset(eval_loader))
    mean_batch = float(getattr(getattr(loader, 'batch_sampler', None), 'average_batch_size', settings.batch_size))

    task = objective.build_task(settings, model, build_loss(settings, classes), runtime)
    if settings.fsdp:
        shard_task(task, settings, runtime.device)
    lr = objective.resolve_lr(settings, runtime.world_size, mean_batch)
    optimizer = objective.build_optimizer(settings, trained_module(task), lr)
    run = Run(settings, runtime, task, optimizer, loader, mixup_fn=mixup_fn, mean_batch=mean_batch, signals=signals)
    run.data = fingerprint(train_set) if runtime.primary else None
    run.metric = settings.eval_metric if eval_loader is not None else 'loss'
    run.scheduler, run.epochs = objective.build_scheduler(
        settings, optimizer, run.updates_per_epoch, decreasing=run.metric == 'loss')
    state = TrainState(task, optimizer, run.loss_scaler, run.scheduler, {
        **settings.as_dict(), 'device': str(runtime.device), 'distributed': runtime.distributed, 'rank': runtime.rank,
        'world_size': runtime.world_size, 'local_rank': runtime.local_rank, 'num_classes': classes.count, 'lr': lr,
        KEY: pipeline, **({} if classes.names is None else {CLASS_NAMES: classes.names})})
    eval_model = _restore(run, state, found, pipeline)
    if eval_loader is not None:
        run.validator = Validator(settings, runtime, classes, eval_loader, eval_model)
    if runtime.primary and not settings.experiment:
        folder = claim(folder)
        lock.acquire(folder)
    _open_folder(run, state, found, folder, continuing, pipeline)
    log_opening(run, data_config)
    return run


def _build_loaders(settings: LossSettings, runtime: Runtime, data_config: InputConfig, classes: Classes,
                   model: nn.Module) -> tuple[Loader, Loader | None, Mixup | None]:
    """Returns the training loader, the validation loader (None without a split), and mixup if the loader has none."""
    validation = (settings.val_split, settings.validation_batch_size or settings.batch_size, settings.val_num_samples)
    common = (settings, runtime, data_config, classes)
    eval_loader = None
    if settings.naflex_loader:
        loader = naflex.build_naflex_train_loader(*common, model)
        if settings.val_split:
            eval_loader = naflex.build_naflex_eval_loader(*common, model, *validation)
        return loader, eval_loader, None
    loader, mixup_fn = loaders.build_train_loader(*common)
    if settings.val_split:
        eval_loader = loaders.build_eval_loader(*common, *validation)
    return loader, eval_loader, mixup_fn


def _restore(run: Run, state: TrainState, found: Found, pipeline: Mapping[str, object] | None) -> nn.Module:
    """Restores the run from its checkpoint, compiles and distributes it, and returns the model to validate."""
    settings, content, start = run.settings, found.content, Progress()
    if content is not None:
        next_epoch = state.load_checkpoint(content, found.path, weights_only=settings.no_resume_opt)
        start = read_progress(content, found.path) or Progress(next_epoch)
        check_same_pipeline(content, found.path, pipeline, refuse=settings.resume == 'auto' or bool(start.batch))
        check_same_data(content, found.path, run.data, bool(start.batch))
        if start.batch:
            check_batch_facts(content, batch_facts(run), found.path)
        warn_of_changes(settings, content, found.path)
        _logger.info('Resumed from %s: continuing at batch %d of epoch %d.', found.path, start.batch, start.epoch)
    if settings.model_ema:
        if not settings.fsdp:
            run.task.setup_ema(
                decay=settings.model_ema_decay,
                use_warmup=settings.model_ema_warmup,
                device=torch.device('cpu') if settings.model_ema_force_cpu else None)
        if content is not None:
            state.load_ema(content, found.path)
    eval_model = _compile_and_distribute(settings, run.runtime, run.task)
    if content is not None and 'processes' in content:
        load_process_state(run, content['processes'], found.path)  # after DDP, which broadcasts that of the first
    if settings.start_epoch is not None:
        start = Progress(settings.start_epoch)
    if start.epoch >= run.end:
        _logger.warning('Nothing to train: %d of %d epochs are done; raise --%s.', start.epoch, run.end,
                        'epochs' if run.end == run.epochs else 'stop-epoch')
    run.progress = start
    _place_schedule(run, restored=content is not None and not settings.no_resume_opt)
    return eval_model


def _compile_and_distribute(settings: TrainSettings, runtime: Runtime, task: TrainingTask) -> nn.Module:
    """Compiles the task if requested, wraps it in DDP if distributed, and returns the model without DDP."""
    if settings.torchcompile:
        task.compile(backend=settings.torchcompile, mode=settings.torchcompile_mode)
        if task.has_ema():
            task.compile_ema(backend=settings.torchcompile, mode=settings.torchcompile_mode)
    eval_model = validated_model(task)
    if runtime.distributed and not settings.fsdp:
        device_ids = None if runtime.device.type == 'cpu' else [runtime.device]
        task.prepare_distributed(device_ids=device_ids, broadcast_buffers=not settings.no_ddp_bb)
    return eval_model


def _place_schedule(run: Run, restored: bool) -> None:
    """Sets the learning rate for the progress of the run. For `plateau`, the optimizer has restored it already."""
    if run.scheduler is None or restored and isinstance(run.scheduler, PlateauLRScheduler):
        return
    updates = run.updates_before(run.progress)
    if run.settings.sched_on_updates and updates:
        run.scheduler.step_update(updates)
    elif not run.settings.sched_on_updates and run.progress.epoch:
        run.scheduler.step(run.progress.epoch)


def _open_folder(run: Run, state: TrainState, found: Found, folder: str, continuing: bool,
                 pipeline: Mapping[str, object] | None) -> None:
    """Opens the run folder on the first process, and connects checkpoints and trackers to the run."""
    settings, start = run.settings, run.progress
    if run.runtime.primary:
        run.folder = folder
        run.record = RunFolder(run.folder, settings_text(settings), start.epoch if continuing else None)
        run.record.keep(RECORD, record_text(pipeline))
        run.saver = CheckpointSaver(run.folder, settings.checkpoint_hist, decreasing=run.metric == 'loss')
        if continuing and found.content is not None:
            run.saver.restore(found.content, found.path)
        set_aside(found.damaged)
        run.trackers = open_trackers(settings, state.args, run.folder, start.epoch,
                                     run.updates_before(start), continuing)
    loaders.list_unreadable(run.loader, run.folder)
    checkpointer = Checkpointer(run, state, run.saver, settings.recovery_interval)
    run.after_update, run.after_epoch = checkpointer.after_update, checkpointer.after_epoch
