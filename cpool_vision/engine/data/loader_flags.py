"""Turns the loader flags into arguments of timm's loaders, and checks them."""
from typing import Any

import torch
from timm.data.scheduled_sampler import ScheduledBatchSampler
from torch.utils.data import SequentialSampler

from cpool_vision.errors import ConfigError

from ..device import Runtime
from ..settings.shared import DataSettings, InputConfig
from ..settings.train import AugmentSettings, LoaderSettings, LossSettings


def image_mode(settings: DataSettings, data_config: InputConfig) -> str:
    """Returns the PIL mode of the images: `--input-img-mode`, or RGB or L by the number of channels."""
    return settings.input_img_mode or ('RGB' if data_config['input_size'][0] == 3 else 'L')


def mixes_images(settings: AugmentSettings) -> bool:
    """Returns whether mixup or CutMix is on."""
    return settings.mixup > 0 or settings.cutmix > 0 or settings.cutmix_minmax is not None


def mixing(settings: LossSettings, num_classes: int) -> dict[str, Any]:
    """Returns the arguments of timm's `Mixup`; empty if mixup and CutMix are off."""
    if not mixes_images(settings):
        return {}
    mix = dict(
        mixup_alpha=settings.mixup,
        cutmix_alpha=settings.cutmix,
        cutmix_minmax=settings.cutmix_minmax,
        prob=settings.mixup_prob,
        switch_prob=settings.mixup_switch_prob,
        mode=settings.mixup_mode,
        label_smoothing=settings.smoothing,
        num_classes=num_classes,
    )
    return {**mix, 'multi_label': True} if settings.multi_label else mix


def augmentation(settings: AugmentSettings, data_config: InputConfig) -> dict[str, Any]:
    """Returns the arguments of timm's training transforms and random erasing."""
    interpolation = None if settings.no_aug else settings.train_interpolation
    return dict(
        no_aug=settings.no_aug,
        re_prob=settings.reprob,
        re_mode=settings.remode,
        re_count=settings.recount,
        train_crop_mode=settings.train_crop_mode,
        scale=settings.scale,
        ratio=settings.ratio,
        hflip=settings.hflip,
        vflip=settings.vflip,
        color_jitter=settings.color_jitter,
        color_jitter_prob=settings.color_jitter_prob,
        grayscale_prob=settings.grayscale_prob or 0.,
        gaussian_blur_prob=settings.gaussian_blur_prob or 0.,
        auto_augment=settings.aa,
        interpolation=interpolation or data_config['interpolation'],
    )


def placement(settings: DataSettings, runtime: Runtime, data_config: InputConfig) -> dict[str, Any]:
    """Returns the arguments of timm's loaders for normalization and for copying images to the device."""
    return dict(
        mean=data_config['mean'],
        std=data_config['std'],
        pin_memory=settings.pin_mem,
        img_dtype=runtime.precision.model_dtype or torch.float32,
        device=runtime.device,
    )


def check_train_flags(settings: LoaderSettings, distributed: bool) -> None:
    """Checks that flags of the training loader are in range and can be combined.

    Raises:
        ConfigError: A flag is out of range or conflicts with another.
    """
    if settings.aug_splits == 1 or settings.aug_splits < 0:
        raise ConfigError(f'--aug-splits must be 0 or at least 2, got {settings.aug_splits}')
    sizes = settings.train_batch_sizes or [settings.batch_size]
    if mixes_images(settings) and any(size % 2 for size in sizes):
        raise ConfigError(f'mixup and CutMix pair images, so the batch size must be even, got {sizes}: change '
                          '--batch-size or --train-batch-sizes')
    if settings.aug_splits and mixes_images(settings):
        raise ConfigError('--aug-splits does not work with mixup or CutMix: drop one of them')
    if settings.aug_repeats and not distributed:
        raise ConfigError(f'--aug-repeats {settings.aug_repeats:g} needs several processes: launch with torchrun, or '
                          'drop it')
    if settings.train_batches_per_epoch is not None and not settings.train_img_sizes:
        raise ConfigError('--train-batches-per-epoch needs --train-img-sizes: add it, or leave it out')
    if settings.variable_batch_loss_scale != 'none' and not settings.train_img_sizes:
        raise ConfigError('--variable-batch-loss-scale needs --train-img-sizes: add it, or leave it out')


def size_schedule(settings: LoaderSettings, samples: int) -> ScheduledBatchSampler | None:
    """Creates timm's schedule of image and batch sizes; returns None without `--train-img-sizes`.

    Args:
        settings: Flags of the training loader.
        samples: Images per epoch and process.

    Raises:
        ValueError: The flags contradict each other.
    """
    if not settings.train_img_sizes:
        return None
    return ScheduledBatchSampler(
        SequentialSampler(range(samples)),
        batch_sizes=settings.train_batch_sizes or [settings.batch_size] * len(settings.train_img_sizes),
        choice_weights=settings.train_size_probs,
        seed=settings.seed,
        num_batches=settings.train_batches_per_epoch,
        choice_schedule=settings.train_size_schedule,
        schedule_epochs=settings.epochs if settings.train_size_schedule == 'progressive' else None,
        schedule_spread=settings.train_size_schedule_spread,
        schedule_random_mix=settings.train_size_random_mix,
    )
