"""Loaders of training and validation."""
import argparse
from typing import Any

import torch
import torch.utils.data
from timm.data import AugMixDataset, FastCollateMixup, ImageDataset, IterableImageDataset, Mixup, create_loader
from timm.data.loader import PrefetchLoader
from timm.data.scheduled_sampler import ScheduledBatchSampler

from .dataset import build_dataset
from .device import Precision
from .errors import ConfigError, DatasetError
from .keyed import KeyedCollate, KeyedDataset, KeyedErasing, KeyedMixup
from .posterize import allow_zero_bits
from .sampling import BatchKeys, EpochOrder
from .stream import StreamedTrainStream, TrainStream
from .unreadable import UNREADABLE, CountingImageDataset, StrictImageDataset, Unreadable, UnreadableLog

__all__ = [
    'UNREADABLE', 'build_dataset', 'build_eval_loader', 'build_train_loader', 'image_mode', 'list_unreadable', 'mixing',
    'set_epoch', 'set_position', 'share_unreadable', 'unreadable_report',
]


def image_mode(args: argparse.Namespace, data_config: dict[str, Any]) -> str:
    """PIL mode of the images: `--input-img-mode`, else by the number of channels."""
    return args.input_img_mode or ('RGB' if data_config['input_size'][0] == 3 else 'L')


def mixing(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of mixup and CutMix; empty if both are off."""
    if not (args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None):
        return {}
    return dict(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=args.num_classes,
    )


def _common(args: argparse.Namespace, data_config: dict[str, Any], device: torch.device, precision: Precision,
            ) -> dict[str, Any]:
    return dict(
        input_size=data_config['input_size'],
        mean=data_config['mean'],
        std=data_config['std'],
        pin_memory=args.pin_mem,
        img_dtype=precision.model_dtype or torch.float32,
        device=device,
        use_prefetcher=not args.no_prefetcher,
    )


def build_train_loader(
        args: argparse.Namespace,
        data_config: dict[str, Any],
        device: torch.device,
        precision: Precision,
) -> tuple[Any, Mixup | None]:
    """Loader of the training split, and the mixer to apply to its batches where the loader does not mix itself.

    Its batches are a function of (seed, epoch, rank, position): iteration begins at the position that `set_position`
    gave, is the same for any number of workers, and neither reads nor moves this process's global generators. Its
    length is that of a whole epoch. Of streamed sets see `StreamedTrainStream`.

    Raises:
        DatasetError: see `build_dataset`; also a split smaller than one batch.
        ConfigError: flags that exclude each other.
    """
    _check_train_flags(args)
    allow_zero_bits()
    dataset = build_dataset(args, args.train_split, True, image_mode(args, data_config), args.train_num_samples)
    streamed = isinstance(dataset, torch.utils.data.IterableDataset)
    if type(dataset) is ImageDataset:
        dataset = StrictImageDataset(dataset)
    order = None
    if not streamed:
        order = EpochOrder(len(dataset), args.seed, args.rank, args.world_size, args.aug_repeats)
        smallest = min(args.train_batch_sizes or [args.batch_size])
        if len(order) < smallest:
            raise DatasetError(f'the training split has {len(order)} images per process, fewer than one batch of '
                               f'{smallest}: lower --batch-size')
    mix = mixing(args)
    if args.aug_splits > 1:
        dataset = AugMixDataset(dataset, num_splits=args.aug_splits)
    interpolation = data_config['interpolation'] if args.no_aug else args.train_interpolation
    try:
        built = create_loader(
            dataset,
            batch_size=args.batch_size,
            is_training=True,
            no_aug=args.no_aug,
            re_prob=args.reprob,
            re_mode=args.remode,
            re_count=args.recount,
            re_split=args.resplit,
            train_crop_mode=args.train_crop_mode,
            scale=args.scale,
            ratio=args.ratio,
            hflip=args.hflip,
            vflip=args.vflip,
            color_jitter=args.color_jitter,
            color_jitter_prob=args.color_jitter_prob,
            grayscale_prob=args.grayscale_prob,
            gaussian_blur_prob=args.gaussian_blur_prob,
            auto_augment=args.aa,
            num_aug_splits=args.aug_splits,
            interpolation=interpolation or data_config['interpolation'],
            num_workers=args.workers,
            collate_fn=FastCollateMixup(**mix) if mix and not args.no_prefetcher else None,
            worker_seeding=args.worker_seeding,
            persistent_workers=False,
            input_size_choices=args.train_img_sizes,
            batch_size_choices=args.train_batch_sizes,
            batch_choice_weights=args.train_size_probs,
            **_common(args, data_config, device, precision),
        )
        inner = built.loader if isinstance(built, PrefetchLoader) else built
        if order is None:
            stream: Any = StreamedTrainStream(inner, args.seed, args.rank)
        else:
            stream = _keyed_stream(args, inner, BatchKeys(order, args.batch_size, _schedule(args, len(order))))
    except (AssertionError, TypeError, ValueError) as error:
        raise ConfigError(f'the training loader cannot be built ({error}): check the loader and augmentation flags') \
            from error
    if not isinstance(built, PrefetchLoader):
        mixup_fn = KeyedMixup(stream, args.seed, args.rank, args.mixup_off_epoch, **mix) if mix else None
        return stream, mixup_fn
    prefetcher: Any = built
    prefetcher.loader = stream
    if prefetcher.random_erasing is not None:
        prefetcher.random_erasing = KeyedErasing(prefetcher.random_erasing, stream, args.seed, args.rank, device)
    return prefetcher, None


def _schedule(args: argparse.Namespace, samples: int) -> ScheduledBatchSampler | None:
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


def _keyed_stream(args: argparse.Namespace, inner: torch.utils.data.DataLoader, keys: BatchKeys) -> TrainStream:
    dataset = KeyedDataset(inner.dataset, args.seed)
    make_loader: Any = torch.utils.data.DataLoader  # typed for lists of indices, for which the keys stand
    loader = make_loader(
        dataset,
        batch_sampler=keys,
        num_workers=args.workers,
        collate_fn=KeyedCollate(inner.collate_fn, args.seed, args.rank, args.mixup_off_epoch),
        pin_memory=args.pin_mem,
        persistent_workers=args.workers > 0,
        generator=torch.Generator(),  # else each epoch would draw from the global one
    )
    return TrainStream(loader, UnreadableLog(dataset.base, args.max_bad_samples), args.use_multi_epochs_loader)


def _check_train_flags(args: argparse.Namespace) -> None:
    if args.batch_size < 1:
        raise ConfigError(f'--batch-size must be >= 1, got {args.batch_size}')
    if args.aug_splits == 1 or args.aug_splits < 0:
        raise ConfigError(f'--aug-splits must be 0, or 2 and more, got {args.aug_splits}')
    sizes = args.train_batch_sizes or [args.batch_size]
    if mixing(args) and any(size % 2 for size in sizes):
        raise ConfigError(f'mixup and CutMix pair the images of a batch, so that its size must be even, got {sizes}: '
                          'change --batch-size or --train-batch-sizes')
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


def build_eval_loader(
        args: argparse.Namespace,
        data_config: dict[str, Any],
        device: torch.device,
        precision: Precision,
        split: str,
        batch_size: int,
        num_samples: int | None,
        distributed: bool = False,
        **kwargs: Any,
) -> Any:
    """Loader of a validation split; images that cannot be read come out with the label `UNREADABLE`.

    Args:
        args, data_config, device, precision: the run.
        split: its name.
        batch_size: images per batch.
        num_samples: size, for streamed sets.
        distributed: give each process its share.
        **kwargs: further arguments of timm's `create_loader`.

    Raises:
        DatasetError: see `build_dataset`.
    """
    dataset = build_dataset(args, split, False, image_mode(args, data_config), num_samples)
    if type(dataset) is ImageDataset:
        dataset = CountingImageDataset(dataset)
    workers = args.workers
    if distributed and isinstance(dataset, IterableImageDataset):
        workers = min(2, workers)  # each worker of a streamed set pads its share
    return create_loader(
        dataset,
        batch_size=batch_size,
        interpolation=data_config['interpolation'],
        num_workers=workers,
        distributed=distributed,
        **{'crop_pct': data_config['crop_pct'], **kwargs},
        **_common(args, data_config, device, precision),
    )


def _stream(loader: Any) -> Any:
    return loader.loader if isinstance(loader, PrefetchLoader) else loader


def set_position(loader: Any, epoch: int, batch: int = 0) -> None:
    """Makes the next iteration of a training loader begin at a batch of an epoch, both counted from 0.

    Raises:
        ConfigError: no such position.
    """
    _stream(loader).set_position(epoch, batch)


def set_epoch(loader: Any, epoch: int) -> None:
    """`set_position` at the first batch."""
    set_position(loader, epoch)


def unreadable_report(loader: Any) -> list[Unreadable]:
    """Training images that this process could not decode so far and replaced, by their number."""
    log = _stream(loader).unreadable
    return [] if log is None else [log.found[index] for index in sorted(log.found)]


def list_unreadable(loader: Any, folder: str) -> None:
    """Lists unreadable training images in `folder`/unreadable.txt from now on; '' for no list."""
    log = _stream(loader).unreadable
    if log is not None:
        log.open(folder)


def share_unreadable(loader: Any, device: torch.device) -> int:
    """Completes the list by what other processes found; every process must call it, at the end of an epoch say.

    Returns:
        How many unreadable training images there are in all.
    """
    log = _stream(loader).unreadable
    return 0 if log is None else log.share(device)
