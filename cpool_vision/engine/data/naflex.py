"""Batches of patch sequences at native aspect ratio (NaFlex, Dehghani et al., arXiv 2307.06304), by timm's loader."""
import argparse
import contextlib
import functools
import io
from typing import Any

import torch
import torch.distributed
import torch.nn as nn
import torch.utils.data
from timm.data import NaFlexMixup, create_naflex_loader

from cpool_vision.errors import ConfigError, DatasetError

from ..device import Precision
from .keyed import KeyedErasing, candidates
from .loader_flags import augmentation, mixing
from .loaders import build_dataset, image_mode
from .stream import StreamedTrainStream
from .unreadable import (
    CountingImageDataset,
    StrictImageDataset,
    Unreadable,
    UnreadableImageError,
    UnreadableLog,
    sample_name,
)
from .worker import WorkerSignals


class NaflexStream(StreamedTrainStream):
    """Training batches from (epoch, batch) on; those before it in the epoch are loaded again.

    They depend on the number of workers, which must stay the same when a run is resumed.

    Args:
        loader: `DataLoader` of timm's batches over a `ReplacingImages`.
        seed, rank: seed of the run, number of the process.
        unreadable: where to note images that were replaced.
    """

    def __init__(self, loader: torch.utils.data.DataLoader, seed: int, rank: int, unreadable: UnreadableLog) -> None:
        super().__init__(loader, seed, rank)
        self.unreadable: UnreadableLog = unreadable

    def _note(self, item: Any) -> None:
        self.unreadable.add(item[2])

    def set_position(self, epoch: int, batch: int = 0) -> None:
        """Where the next iteration begins.

        Raises:
            ConfigError: no such position.
        """
        if epoch < 0 or not 0 <= batch <= len(self):
            raise ConfigError(f'there is no batch {batch} in epoch {epoch} of {len(self)} batches: resume with the '
                              'settings of the former run')
        self.epoch, self.batch = epoch, batch


class ReplacingImages(torch.utils.data.Dataset):
    """Lets another image, which follows from the seed, take the place of one that cannot be read.

    Args:
        dataset: a `StrictImageDataset` without transform.
        seed: seed of the run.

    Attributes:
        found: images that were replaced since `drain`, in this process.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed = dataset, seed
        self.found: list[Unreadable] = []

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        for candidate in candidates(self.seed, 0, index, 0, len(self)):
            try:
                return self.dataset[candidate]
            except UnreadableImageError as error:
                self.found.append(Unreadable(candidate, sample_name(self.dataset, candidate), str(error)))
        raise UnreadableImageError(f'nothing readable was found in place of {sample_name(self.dataset, index)}')

    def drain(self) -> list[Unreadable]:
        """What was found since the last call."""
        found, self.found = self.found, []
        return found


class ReportingCollate:
    """timm's collation, with the images that a batch did without as a third item."""

    def __init__(self, collate: Any, images: ReplacingImages) -> None:
        self.collate, self.images = collate, images

    def __call__(self, samples: Any) -> tuple[Any, Any, list[Unreadable]]:
        return (*self.collate(samples), self.images.drain())


class KeyedPatchErasing:
    """Random erasing of patches, drawn from the position of the batch; see `KeyedErasing` for the arguments."""

    def __init__(self, erasing: Any, *keys: Any) -> None:
        self.erasing, self.keys = erasing, keys

    def __call__(self, patches: torch.Tensor, **places: Any) -> torch.Tensor:
        return KeyedErasing(functools.partial(self.erasing, **places), *self.keys)(patches)


def check_naflex(args: argparse.Namespace, model: nn.Module) -> tuple[int, int]:
    """Patch size (height, width) of a model that the loader can feed.

    Raises:
        ConfigError: the model takes images only, or a flag does not go with the loader.
    """
    get_patch_size = getattr(model, 'get_patch_size', None)
    if get_patch_size is None:
        raise ConfigError(
            f'--naflex-loader gives patches with coordinates and a mask, --model {args.model!r} takes whole images: '
            'choose a naflexvit model (naflexvit_*_cpool_* or one of timm), or leave --naflex-loader out')
    idle = (
        ('no_prefetcher', 'patches are normalised by the prefetcher'), ('channels_last', 'patches have no layout'),
        ('torchscript', 'dictionaries cannot be scripted'), ('train_img_sizes', 'both set the size of a batch'),
        ('use_multi_epochs_loader', 'the order changes with the epoch'), ('aug_splits', 'it makes one view per image'),
        ('aug_repeats', 'it draws each image once'), ('save_images', 'there is no picture to save'),
        ('kd_model_name', 'teachers take whole images'), ('cutmix_minmax', 'boxes follow from --cutmix'),
    )
    for name, reason in idle:
        if getattr(args, name, None):
            raise ConfigError(
                f'--{name.replace("_", "-")} does not go with --naflex-loader ({reason}): drop one of them')
    if getattr(args, 'mixup_mode', 'batch') != 'batch':
        raise ConfigError(
            '--mixup-mode does not go with --naflex-loader, which mixes pairs of like shape: leave it out')
    sizes, probs = getattr(args, 'naflex_patch_sizes', None), getattr(args, 'naflex_patch_size_probs', None)
    if probs and len(probs) != len(sizes or ()):
        raise ConfigError(f'--naflex-patch-size-probs has {len(probs)} values for {len(sizes or ())} '
                          '--naflex-patch-sizes: give one for each')
    for flag in ('naflex_train_seq_lens', 'naflex_max_seq_len', 'naflex_patch_sizes'):
        value = getattr(args, flag, None)
        if value is not None and min(value if isinstance(value, list) else [value]) < 1:
            raise ConfigError(f'--{flag.replace("_", "-")} must be positive, got {value}')
    return get_patch_size()


def _common(args: argparse.Namespace, data_config: dict[str, Any], device: torch.device, precision: Precision,
            ) -> dict[str, Any]:
    return dict(
        mean=data_config['mean'],
        std=data_config['std'],
        channels=data_config['input_size'][0],
        num_workers=args.workers,
        persistent_workers=False,
        pin_memory=args.pin_mem,
        img_dtype=precision.model_dtype or torch.float32,
        device=device,
        patchify_channels_last=not getattr(args, 'naflex_patchify_channels_first', False),
    )


def _open(args: argparse.Namespace, data_config: dict[str, Any], split: str, training: bool, samples: int | None,
          ) -> Any:
    dataset = build_dataset(args, split, training, image_mode(args, data_config), samples)
    if isinstance(dataset, torch.utils.data.IterableDataset):
        raise DatasetError('--naflex-loader needs a set with an index, not a streamed one: leave it out')
    return dataset


def build_naflex_train_loader(args: argparse.Namespace, model: nn.Module, data_config: dict[str, Any],
                              device: torch.device, precision: Precision) -> Any:
    """Loader of the training split: dictionaries of `patches` (B, N, P), `patch_coord` (B, N, 2) and `patch_valid`.

    Each batch has one of `--naflex-train-seq-lens` and about `--batch-size` times the longest of them patches in all.
    With `--naflex-patch-sizes` patches are (B, N, height, width, channels).

    Raises:
        ConfigError: see `check_naflex`.
        DatasetError: see `dataset.build_dataset`; also a streamed set.
    """
    patch_size = check_naflex(args, model)
    dataset = _open(args, data_config, args.train_split, True, args.train_num_samples)
    images = ReplacingImages(dataset, args.seed)
    mix = mixing(args)
    for name in ('mode', 'cutmix_minmax'):
        mix.pop(name, None)
    mixup_fn = NaFlexMixup(**mix, mixup_off_epoch=args.mixup_off_epoch) if mix else None
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # timm prints the number of batches
            built: Any = create_naflex_loader(
                images,
                patch_size=None if args.naflex_patch_sizes else patch_size,
                patch_size_choices=args.naflex_patch_sizes,
                patch_size_choice_probs=args.naflex_patch_size_probs,
                train_seq_lens=args.naflex_train_seq_lens,
                batch_size=args.batch_size,
                is_training=True,
                mixup_fn=mixup_fn,
                distributed=args.distributed,
                rank=args.rank,
                world_size=args.world_size,
                seed=args.seed,
                worker_seeding=args.worker_seeding,
                **augmentation(args, data_config),
                **_common(args, data_config, device, precision),
            )
    except (AssertionError, TypeError, ValueError) as error:
        raise ConfigError(f'the NaFlex loader cannot be built ({error}): check the --naflex- and augmentation flags') \
            from error
    batches: Any = built.loader.dataset
    batches.collate_fns = {length: ReportingCollate(each, images) for length, each in batches.collate_fns.items()}
    stream = NaflexStream(built.loader, args.seed, args.rank, UnreadableLog(dataset, args.max_bad_samples))
    built.loader = stream
    if built.random_erasing is not None:
        built.random_erasing = KeyedPatchErasing(built.random_erasing, stream, args.seed, args.rank, device)
    return built


def build_naflex_eval_loader(args: argparse.Namespace, model: nn.Module, data_config: dict[str, Any],
                             device: torch.device, precision: Precision, split: str, batch_size: int,
                             num_samples: int | None, distributed: bool = False) -> Any:
    """Loader of a validation split, with sequences of at most `--naflex-max-seq-len` patches of the model's size.

    Raises:
        ConfigError: see `check_naflex`.
        DatasetError: see `dataset.build_dataset`; also a streamed set.
    """
    patch_size = check_naflex(args, model)
    dataset = _open(args, data_config, split, False, num_samples)
    if isinstance(dataset, StrictImageDataset):
        dataset = CountingImageDataset(dataset)
    loader: Any = create_naflex_loader(
        dataset,
        patch_size=patch_size,
        max_seq_len=args.naflex_max_seq_len,
        batch_size=batch_size,
        interpolation=data_config['interpolation'],
        distributed=distributed,
        **_common(args, data_config, device, precision),
    )
    loader.loader.worker_init_fn = WorkerSignals(loader.loader.worker_init_fn)
    return loader


def build_naflex_loaders(args: argparse.Namespace, model: nn.Module, data_config: dict[str, Any],
                         device: torch.device, precision: Precision) -> tuple[Any, Any]:
    """Loaders of train.py: training, and validation or None; see the functions for each."""
    loader = build_naflex_train_loader(args, model, data_config, device, precision)
    if not args.val_split:
        return loader, None
    return loader, build_naflex_eval_loader(
        args, model, data_config, device, precision, args.val_split, args.validation_batch_size or args.batch_size,
        args.val_num_samples, distributed=args.distributed)


def naflex_loss_scale(args: argparse.Namespace, images: int, device: torch.device) -> float:
    """Factor on the mean loss of a batch of `images`.

    It is (images / `--batch-size`), its root or 1, as
    `--naflex-loss-scale` says, times the share that the batch has of those of all processes, relative to an equal one.
    """
    ratio = images / args.batch_size
    scale = {'none': 1., 'sqrt': ratio ** 0.5, 'linear': ratio}[args.naflex_loss_scale]
    if args.distributed:
        total = torch.tensor(float(images), device=device)
        torch.distributed.all_reduce(total)
        scale *= args.world_size * images / float(total)
    return scale
