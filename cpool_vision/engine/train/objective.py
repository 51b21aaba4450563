"""What is optimised: loss, training task, optimizer and learning rate schedule."""
import argparse
import logging
from typing import Any

import safetensors
import torch
import torch.nn as nn
from timm.optim import create_optimizer_v2, list_optimizers, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import (
    ClassificationTask,
    FeatureDistillationTask,
    LogitDistillationTask,
    MultiLabelClassificationTask,
    TokenDistillationTask,
    TrainingTask,
)

from cpool_vision.errors import ConfigError

from ..data.multi_label import is_multi_label
from ..device import Precision
from ..model import check_model_name
from .loss import build_loss

__all__ = ['build_loss', 'build_optimizer', 'build_scheduler', 'build_task', 'resolve_lr']

_logger = logging.getLogger(__name__)


def build_task(
        args: argparse.Namespace,
        model: nn.Module,
        loss: nn.Module,
        device: torch.device,
        precision: Precision,
        verbose: bool,
) -> TrainingTask:
    """Training task of timm: `--task`, or distillation from the teacher that `--kd-model-name` names.

    Raises:
        UnknownModelError: no such teacher.
        ConfigError: student or teacher lack what the distillation needs.
    """
    common: dict[str, Any] = dict(device=device, dtype=precision.model_dtype, verbose=verbose)
    if is_multi_label(args):
        return MultiLabelClassificationTask(model, criterion=loss, threshold=args.threshold, **common)
    if args.kd_model_name is None:
        return ClassificationTask(model, criterion=loss, **common)
    check_model_name(args.kd_model_name)
    common.update(
        student_model=model,
        teacher_model=args.kd_model_name,
        criterion=loss,
        distill_loss_weight=args.distill_loss_weight,
        task_loss_weight=args.task_loss_weight,
    )
    try:
        if args.kd_distill_type == 'logit':
            return LogitDistillationTask(loss_type=args.kd_loss_type, temperature=args.kd_temperature, **common)
        if args.kd_distill_type == 'feature':
            return FeatureDistillationTask(
                student_feature_dim=args.kd_student_feature_dim,
                teacher_feature_dim=args.kd_teacher_feature_dim,
                **common)
        return TokenDistillationTask(
            distill_type=args.kd_token_distill_type, temperature=args.kd_temperature, **common)
    except (AssertionError, OSError, RuntimeError, ValueError, safetensors.SafetensorError) as error:
        raise ConfigError(f'distillation from {args.kd_model_name!r} cannot be set up '
                          f'({" ".join(str(error).split())[:300]}): check the --kd- flags') from error


def resolve_lr(args: argparse.Namespace, batch_size: float | None = None) -> float:
    """Learning rate: `--lr`, or `--lr-base` scaled to the global batch.

    Args:
        args: settings; `world_size` included.
        batch_size: mean images per batch and process where it is not `--batch-size`.

    Returns:
        The rate at the top of the schedule.

    Raises:
        ConfigError: unknown `--lr-base-scale`.
    """
    if args.lr:
        return args.lr
    scale = args.lr_base_scale
    if not scale:
        scale = 'sqrt' if any(part in args.opt.lower() for part in ('ada', 'lamb')) else 'linear'
    if scale not in ('linear', 'sqrt'):
        raise ConfigError(f'--lr-base-scale {scale!r} is unknown: choose linear or sqrt')
    images = (batch_size or args.batch_size) * args.world_size * args.grad_accum_steps
    ratio = images / args.lr_base_size
    lr = args.lr_base * (ratio ** 0.5 if scale == 'sqrt' else ratio)
    _logger.info('Learning rate %.6g from base %.6g at %d images, global batch %g, %s scaling.',
                 lr, args.lr_base, args.lr_base_size, images, scale)
    return lr


def build_optimizer(args: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    """Optimizer by its name in timm, with weight decay and layer decay by parameter.

    Raises:
        ConfigError: unknown name or arguments.
    """
    try:
        return create_optimizer_v2(model, **{**optimizer_kwargs(cfg=args), **args.opt_kwargs})
    except (AssertionError, TypeError, ValueError) as error:
        known = args.opt.lower() in list_optimizers()
        remedy = 'check --opt-kwargs, --opt-eps and --opt-betas' if known else 'see timm.optim.list_optimizers()'
        raise ConfigError(f'optimizer {args.opt!r} cannot be created ({error}): {remedy}') from error


def build_scheduler(
        args: argparse.Namespace,
        optimizer: torch.optim.Optimizer,
        updates_per_epoch: int,
        decreasing: bool,
) -> tuple[Any, int]:
    """Learning rate schedule of timm (None for `--sched none`) and the number of epochs, cooldown included.

    Raises:
        ConfigError: unknown name, unusable lengths, or a flag that the schedule does not know.
    """
    if args.sched not in ('wsd', 'rsqrt') and args.lr_decay_fn is not None:
        raise ConfigError(f'--lr-decay-fn has no effect on --sched {args.sched}: choose wsd or rsqrt, or leave it out')
    if args.sched != 'rsqrt' and args.lr_stable_timescale is not None:
        raise ConfigError(f'--lr-stable-timescale has no effect on --sched {args.sched}: choose rsqrt, or leave it out')
    if args.decay_milestones != sorted(args.decay_milestones):
        raise ConfigError(f'--decay-milestones {args.decay_milestones} must increase: sort them')
    try:
        return create_scheduler_v2(
            optimizer,
            **scheduler_kwargs(args, decreasing_metric=decreasing),
            updates_per_epoch=updates_per_epoch,
        )
    except (AssertionError, ValueError) as error:
        raise ConfigError(f'--sched {args.sched!r} cannot be set up ({error}): check the schedule flags') from error
