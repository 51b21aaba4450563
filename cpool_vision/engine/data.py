"""Data sets and loaders of training and validation."""
import argparse
import logging
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.utils.data
from PIL import Image
from timm.data import (
    AugMixDataset,
    FastCollateMixup,
    ImageDataset,
    IterableImageDataset,
    Mixup,
    create_loader,
)

from cpool_vision.data import create_dataset

from .device import Precision
from .errors import ConfigError, DatasetError, DatasetNotFoundError
from .posterize import allow_zero_bits

_logger = logging.getLogger(__name__)
UNREADABLE = -100  # label of an image that could not be decoded: the ignore_index of cross-entropy
_FOLDER_NAMES = ('', 'folder', 'image_folder', 'tar', 'image_tar')
_PREFIXES = ('cpool', 'torch', 'hfds', 'hfids', 'tfds', 'wds')
_SPLITS = ('train', 'training', 'val', 'valid', 'validation', 'eval', 'evaluation', 'test')


class CountingImageDataset(ImageDataset):
    """Like timm's `ImageDataset`, but an unreadable image comes out blank with the label `UNREADABLE`.

    timm's class hands out a neighbour in its place, which would count that neighbour twice.
    """

    def __init__(self, dataset: ImageDataset) -> None:
        super().__init__(None, reader=dataset.reader, load_bytes=dataset.load_bytes,
                         input_img_mode=dataset.input_img_mode, transform=dataset.transform,
                         target_transform=dataset.target_transform)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        mode = self.input_img_mode or 'RGB'
        try:
            file, target, *_ = self.reader[index]
            image = file.read() if self.load_bytes else Image.open(file).convert(mode)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            _logger.warning('Image %s cannot be read (%s).', self.filename(index), error)
            image, target = Image.new(mode, (64, 64)), UNREADABLE
        if self.transform is not None:
            image = self.transform(image)
        if target is None:
            target = -1
        elif self.target_transform is not None and target != UNREADABLE:
            target = self.target_transform(target)
        return image, target


def _check_name(name: str) -> None:
    prefix, slash, rest = name.partition('/')
    if name in _FOLDER_NAMES or slash and rest and prefix.lower() in _PREFIXES:
        return
    raise DatasetError(f'unknown data set {name!r}: leave --dataset empty for a folder or tar, or use one of '
                       f'{", ".join(each + "/NAME" for each in _PREFIXES)}')


def _check_folder(root: str | None, split: str) -> None:
    if not root:
        raise DatasetError('no data: give --data-dir FOLDER, or --dataset cpool/shapes for the built-in set')
    if not os.path.exists(root):
        raise DatasetNotFoundError(f'data folder {root!r} does not exist: check --data-dir')
    if not os.path.isdir(root) or not split:
        return
    name = split.split('[')[0]
    groups = (_SPLITS[:2], _SPLITS[2:7])
    names = next((group for group in groups if name in group), (name,))
    found = sorted(entry for entry in _SPLITS if os.path.isdir(os.path.join(root, entry)))
    if found and not any(os.path.exists(os.path.join(root, entry)) for entry in (name, *names)):
        raise DatasetError(f'split {split!r} is not in {root!r}, which holds {", ".join(found)}: name one of them, '
                           'or leave the split empty to take the folder itself')


def build_dataset(
        args: argparse.Namespace,
        split: str,
        training: bool,
        input_img_mode: str,
        num_samples: int | None,
) -> Any:
    """Data set of one split.

    Raises:
        DatasetError: unknown, empty, or more classes than the model has.
        DatasetNotFoundError: its folder does not exist.
    """
    name, root = args.dataset, args.data_dir
    _check_name(name)
    if name in _FOLDER_NAMES or name.lower() in ('torch/image_folder', 'torch/folder'):
        _check_folder(root, split)
    if args.class_map and not os.path.isfile(args.class_map):
        raise DatasetNotFoundError(f'--class-map {args.class_map!r} does not exist: check the path')
    what = f'data set {name or root!r}, split {split!r}'
    kwargs = {'load_bytes': True} if getattr(args, 'tf_preprocessing', False) else {}
    try:
        dataset = create_dataset(
            name,
            root=root,
            split=split,
            is_training=training,
            class_map=args.class_map,
            download=args.dataset_download,
            batch_size=args.batch_size,
            seed=args.seed,
            repeats=getattr(args, 'epoch_repeats', 0.),
            input_img_mode=input_img_mode,
            input_key=args.input_key,
            target_key=args.target_key,
            num_samples=num_samples,
            trust_remote_code=args.dataset_trust_remote_code,
            **kwargs,
        )
    except FileNotFoundError as error:
        raise DatasetNotFoundError(f'{what}: {error}; check --data-dir') from error
    except (AssertionError, ImportError, KeyError, OSError, RuntimeError, ValueError) as error:
        raise DatasetError(f'{what} cannot be opened ({" ".join(str(error).split())}): check --dataset, --data-dir and '
                           'the split') from error
    if hasattr(dataset, '__len__') and len(dataset) == 0:
        raise DatasetError(f'{what} is empty: check --data-dir and the split')
    _check_classes(dataset, args.num_classes, what)
    return dataset


def _check_classes(dataset: Any, num_classes: int, what: str) -> None:
    names = getattr(getattr(dataset, 'reader', None), 'class_to_idx', None) or getattr(dataset, 'classes', None)
    if not names:
        return
    count = max(names.values()) + 1 if isinstance(names, dict) else len(names)
    if count > num_classes:
        raise DatasetError(f'{what} has {count} classes, the model {num_classes}: set --num-classes {count}')


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

    Raises:
        DatasetError: see `build_dataset`; also a split smaller than one batch.
        ConfigError: flags that exclude each other.
    """
    _check_train_flags(args)
    allow_zero_bits()
    dataset = build_dataset(args, args.train_split, True, image_mode(args, data_config), args.train_num_samples)
    smallest = min(args.train_batch_sizes or [args.batch_size])
    if hasattr(dataset, '__len__') and not isinstance(dataset, IterableImageDataset):
        per_process = len(dataset) // args.world_size
        if per_process < smallest:
            raise DatasetError(f'the training split has {per_process} images per process, fewer than one batch of '
                               f'{smallest}: lower --batch-size')
    mix = mixing(args)
    collate_fn: Callable[..., Any] | None = None
    mixup_fn = None
    if mix and args.no_prefetcher:
        mixup_fn = Mixup(**mix)
    elif mix:
        collate_fn = FastCollateMixup(**mix)
    if args.aug_splits > 1:
        dataset = AugMixDataset(dataset, num_splits=args.aug_splits)
    interpolation = data_config['interpolation'] if args.no_aug else args.train_interpolation
    try:
        loader = create_loader(
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
            num_aug_repeats=args.aug_repeats,
            num_aug_splits=args.aug_splits,
            interpolation=interpolation or data_config['interpolation'],
            num_workers=args.workers,
            distributed=args.distributed,
            collate_fn=collate_fn,
            use_multi_epochs_loader=args.use_multi_epochs_loader,
            worker_seeding=args.worker_seeding,
            persistent_workers=False,  # fresh workers are seeded anew, so that an epoch can be repeated on resume
            input_size_choices=args.train_img_sizes,
            batch_size_choices=args.train_batch_sizes,
            batch_choice_weights=args.train_size_probs,
            batch_choice_seed=args.seed,
            batch_choice_schedule=args.train_size_schedule,
            batch_schedule_epochs=args.epochs if args.train_size_schedule == 'progressive' else None,
            batch_schedule_spread=args.train_size_schedule_spread,
            batch_schedule_random_mix=args.train_size_random_mix,
            num_batches=args.train_batches_per_epoch,
            **_common(args, data_config, device, precision),
        )
    except (AssertionError, TypeError, ValueError) as error:
        raise ConfigError(f'the training loader cannot be built ({error}): check the loader and augmentation flags') \
            from error
    if isinstance(loader.sampler, torch.utils.data.distributed.DistributedSampler):
        loader.sampler.seed = args.seed  # timm leaves it at 0 whatever the seed of the run
    return loader, mixup_fn


def _check_train_flags(args: argparse.Namespace) -> None:
    if args.batch_size < 1:
        raise ConfigError(f'--batch-size must be >= 1, got {args.batch_size}')
    if args.aug_splits == 1 or args.aug_splits < 0:
        raise ConfigError(f'--aug-splits must be 0, or 2 and more, got {args.aug_splits}')
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


def set_epoch(loader: Any, epoch: int) -> None:
    """Tells everything in a loader that depends on the epoch which one begins."""
    for part in (loader.dataset, loader.batch_sampler, loader.sampler, getattr(loader.batch_sampler, 'sampler', None)):
        advance = getattr(part, 'set_epoch', None)
        if advance is not None:
            advance(epoch)
