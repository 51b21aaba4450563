"""Builds the training task, the optimizer and the learning rate schedule."""
import logging
from dataclasses import replace
from typing import Any

import safetensors
import torch
import torch.nn as nn
from timm.optim import create_optimizer_v2, list_optimizers, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.scheduler.scheduler import Scheduler
from timm.task import (
    ClassificationTask,
    FeatureDistillationTask,
    LogitDistillationTask,
    MultiLabelClassificationTask,
    TokenDistillationTask,
    TrainingTask,
)

from cpool_vision.errors import ConfigError
from cpool_vision.reading import reason

from ..device import Runtime
from ..model import check_model_name
from ..settings.train import OptimSettings, TrainSettings

_logger = logging.getLogger(__name__)


def build_task(
        settings: TrainSettings,
        model: nn.Module,
        loss: nn.Module,
        runtime: Runtime,
) -> TrainingTask:
    """Builds timm's training task for `--task`, or for distillation from the teacher `--kd-model-name`.

    Raises:
        UnknownModelError: If there is no such teacher.
        ConfigError: If the student or the teacher does not support the distillation.
    """
    common: dict[str, Any] = dict(device=runtime.device, dtype=runtime.precision.model_dtype,
                                  verbose=runtime.primary)
    if settings.multi_label:
        return MultiLabelClassificationTask(model, criterion=loss, threshold=settings.threshold, **common)
    if settings.kd_model_name is None:
        return ClassificationTask(model, criterion=loss, **common)
    check_model_name(settings.kd_model_name)
    common.update(
        student_model=model,
        teacher_model=settings.kd_model_name,
        criterion=loss,
        distill_loss_weight=settings.distill_loss_weight,
        task_loss_weight=settings.task_loss_weight,
    )
    try:
        if settings.kd_distill_type == 'logit':
            return LogitDistillationTask(loss_type=settings.kd_loss_type, temperature=settings.kd_temperature, **common)
        if settings.kd_distill_type == 'feature':
            return FeatureDistillationTask(
                student_feature_dim=settings.kd_student_feature_dim,
                teacher_feature_dim=settings.kd_teacher_feature_dim,
                **common)
        return TokenDistillationTask(
            distill_type=settings.kd_token_distill_type, temperature=settings.kd_temperature, **common)
    except (AssertionError, OSError, RuntimeError, ValueError, safetensors.SafetensorError) as error:
        raise ConfigError(f'distillation from {settings.kd_model_name!r} cannot be set up '
                          f'({reason(error, 300)}): check the --kd- flags') from error


def resolve_lr(settings: OptimSettings, world_size: int = 1, batch_size: float | None = None) -> float:
    """Returns the peak learning rate: `--lr`, or `--lr-base` scaled with the global batch size.

    Args:
        settings: Settings of optimizer and schedule.
        world_size: Number of processes.
        batch_size: Mean number of images per batch and process, if it differs from `--batch-size`.
    """
    if settings.lr:
        return settings.lr
    scale = settings.lr_base_scale
    if not scale:
        scale = 'sqrt' if any(part in settings.opt.lower() for part in ('ada', 'lamb')) else 'linear'
    images = (batch_size or settings.batch_size) * world_size * settings.grad_accum_steps
    ratio = images / settings.lr_base_size
    lr = settings.lr_base * (ratio ** 0.5 if scale == 'sqrt' else ratio)
    _logger.info('Learning rate %.6g from base %.6g at %d images, global batch %g, %s scaling.',
                 lr, settings.lr_base, settings.lr_base_size, images, scale)
    return lr


def build_optimizer(settings: OptimSettings, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Builds timm's optimizer with weight decay and layer decay.

    Raises:
        ConfigError: If the name or an argument is invalid.
    """
    try:
        return create_optimizer_v2(model, **{**optimizer_kwargs(cfg=replace(settings, lr=lr)), **settings.opt_kwargs})
    except (AssertionError, TypeError, ValueError) as error:
        known = settings.opt.lower() in list_optimizers()
        remedy = 'check --opt-kwargs, --opt-eps and --opt-betas' if known else 'see timm.optim.list_optimizers()'
        raise ConfigError(f'optimizer {settings.opt!r} cannot be created ({error}): {remedy}') from error


def build_scheduler(
        settings: OptimSettings,
        optimizer: torch.optim.Optimizer,
        updates_per_epoch: int,
        decreasing: bool,
) -> tuple[Scheduler | None, int]:
    """Builds timm's learning rate schedule.

    Returns:
        The schedule (None for `--sched none`) and the number of epochs, including cooldown.

    Raises:
        ConfigError: If the lengths are invalid, or the schedule does not support a flag.
    """
    if settings.sched not in ('wsd', 'rsqrt') and settings.lr_decay_fn is not None:
        raise ConfigError(f'--lr-decay-fn has no effect on --sched {settings.sched}: choose wsd or rsqrt, or '
                          'leave it out')
    if settings.sched != 'rsqrt' and settings.lr_stable_timescale is not None:
        raise ConfigError(f'--lr-stable-timescale has no effect on --sched {settings.sched}: choose rsqrt, or '
                          'leave it out')
    if list(settings.decay_milestones) != sorted(settings.decay_milestones):
        raise ConfigError(f'--decay-milestones {list(settings.decay_milestones)} must increase: sort them')
    try:
        return create_scheduler_v2(
            optimizer,
            **scheduler_kwargs(settings, decreasing_metric=decreasing),
            updates_per_epoch=updates_per_epoch,
        )
    except (AssertionError, ValueError) as error:
        raise ConfigError(f'--sched {settings.sched!r} cannot be set up ({error}): check the schedule flags') from error
