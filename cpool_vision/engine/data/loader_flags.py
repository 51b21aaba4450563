"""What the flags of the loaders say."""
import argparse
from typing import Any

from timm.data.scheduled_sampler import ScheduledBatchSampler

from cpool_vision.errors import ConfigError

from .multi_label import is_multi_label


def image_mode(args: argparse.Namespace, data_config: dict[str, Any]) -> str:
    """PIL mode of the images: `--input-img-mode`, else by the number of channels."""
    return args.input_img_mode or ('RGB' if data_config['input_size'][0] == 3 else 'L')


def mixing(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of mixup and CutMix; empty if both are off."""
    if not (args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None):
        return {}
    mix = dict(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=args.num_classes,
    )
    return {**mix, 'multi_label': True} if is_multi_label(args) else mix


def augmentation(args: argparse.Namespace, data_config: dict[str, Any]) -> dict[str, Any]:
    """Arguments of timm's transforms and random erasing for training images."""
    interpolation = None if args.no_aug else args.train_interpolation
    return dict(
        no_aug=args.no_aug,
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
        train_crop_mode=args.train_crop_mode,
        scale=args.scale,
        ratio=args.ratio,
        hflip=args.hflip,
        vflip=args.vflip,
        color_jitter=args.color_jitter,
        color_jitter_prob=args.color_jitter_prob,
        grayscale_prob=args.grayscale_prob or 0.,
        gaussian_blur_prob=args.gaussian_blur_prob or 0.,
        auto_augment=args.aa,
        interpolation=interpolation or data_config['interpolation'],
    )


def check_train_flags(args: argparse.Namespace) -> None:
    """Refuses flags of the training loader that are out of range or exclude each other.

    Raises:
        ConfigError: names the flag.
    """
    if args.batch_size < 1:
        raise ConfigError(f'--batch-size must be >= 1, got {args.batch_size}')
    if args.aug_splits == 1 or args.aug_splits < 0:
        raise ConfigError(f'--aug-splits must be 0, or 2 and more, got {args.aug_splits}')
    sizes = args.train_batch_sizes or [args.batch_size]
    if mixing(args) and any(size % 2 for size in sizes):
        raise ConfigError(f'mixup and CutMix pair the images of a batch, so that its size must be even, got {sizes}: '
                          'change --batch-size or --train-batch-sizes')
    if args.worker_seeding not in ('all', 'part'):
        raise ConfigError(f"--worker-seeding must be 'all' or 'part', got {args.worker_seeding!r}")
    if args.max_bad_samples < 0:
        raise ConfigError(f'--max-bad-samples must be >= 0, got {args.max_bad_samples:g}')
    if args.aug_splits and mixing(args):
        raise ConfigError('--aug-splits does not go with mixup or CutMix: drop one of them')
    if args.aug_repeats and not args.distributed:
        raise ConfigError(f'--aug-repeats {args.aug_repeats:g} needs several processes: launch with torchrun, or '
                          'leave it out')
    if args.train_batches_per_epoch is not None and not args.train_img_sizes:
        raise ConfigError('--train-batches-per-epoch needs --train-img-sizes: add it, or leave it out')
    if args.variable_batch_loss_scale != 'none' and not args.train_img_sizes:
        raise ConfigError('--variable-batch-loss-scale needs --train-img-sizes: add it, or leave it out')


def size_schedule(args: argparse.Namespace, samples: int) -> ScheduledBatchSampler | None:
    """timm's schedule of image and batch sizes for `samples` per epoch and process, None without `--train-img-sizes`.

    Raises:
        ValueError: flags that do not fit each other.
    """
    if not args.train_img_sizes:
        return None
    places: Any = range(samples)
    return ScheduledBatchSampler(
        places,
        batch_sizes=args.train_batch_sizes or [args.batch_size] * len(args.train_img_sizes),
        choice_weights=args.train_size_probs,
        seed=args.seed,
        num_batches=args.train_batches_per_epoch,
        choice_schedule=args.train_size_schedule,
        schedule_epochs=args.epochs if args.train_size_schedule == 'progressive' else None,
        schedule_spread=args.train_size_schedule_spread,
        schedule_random_mix=args.train_size_random_mix,
    )
