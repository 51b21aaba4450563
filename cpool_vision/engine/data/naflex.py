"""Batches of patch sequences at native aspect ratio (NaFlex, Dehghani et al., arXiv 2307.06304), by timm's loader."""
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

from ..device import Runtime
from ..settings.shared import DataSettings, InputConfig
from ..settings.train import LossSettings
from .keyed import KeyedErasing, candidates
from .loader_flags import augmentation, mixing
from .loaders import build_dataset, image_mode
from .multi_label import Classes
from .stream import Loader, StreamedTrainStream
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

    def __init__(self, loader: torch.utils.data.DataLoader[Any], seed: int, rank: int, unreadable: UnreadableLog,
                 ) -> None:
        super().__init__(loader, seed, rank)
        self.unreadable: UnreadableLog = unreadable

    def _note(self, item: Any) -> None:
        self.unreadable.add(item[2])

    def start_at(self, epoch: int, batch: int = 0) -> None:
        """Where the next iteration begins.

        Raises:
            ConfigError: no such batch.
        """
        if epoch < 0 or not 0 <= batch <= len(self):
            raise ConfigError(f'there is no batch {batch} in epoch {epoch} of {len(self)} batches: resume with the '
                              'settings of the previous run')
        self.epoch, self.batch = epoch, batch


class ReplacingImages(torch.utils.data.Dataset[Any]):
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
        raise UnreadableImageError(f'no readable image was found to replace {sample_name(self.dataset, index)}')

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
    """Random erasing of patches, drawn from (epoch, batch); see `KeyedErasing` for the arguments."""

    def __init__(self, erasing: Any, *keys: Any) -> None:
        self.erasing, self.keys = erasing, keys

    def __call__(self, patches: torch.Tensor, **places: Any) -> torch.Tensor:
        return KeyedErasing(functools.partial(self.erasing, **places), *self.keys)(patches)


def check_naflex(settings: DataSettings, model: nn.Module) -> tuple[int, int]:
    """Patch size (height, width) of a model that the loader can feed.

    Raises:
        ConfigError: the model takes images only, or a flag does not work with the loader.
    """
    get_patch_size = getattr(model, 'get_patch_size', None)
    if get_patch_size is None:
        raise ConfigError(
            f'--naflex-loader gives patches with coordinates and a mask, this model '
            f'({type(model).__name__}) takes whole images: '
            'choose a naflexvit model (naflexvit_*_cpool_* or one of timm), or leave --naflex-loader out')
    idle = (
        ('no_prefetcher', 'patches are normalized by the prefetcher'), ('channels_last', 'patches have no layout'),
        ('torchscript', 'dictionaries cannot be scripted'), ('train_img_sizes', 'both set the size of a batch'),
        ('use_multi_epochs_loader', 'the order changes with the epoch'), ('aug_splits', 'it makes one view per image'),
        ('aug_repeats', 'it draws each image once'), ('save_images', 'there is no picture to save'),
        ('kd_model_name', 'teachers take whole images'), ('cutmix_minmax', 'boxes follow from --cutmix'),
    )
    for name, reason in idle:
        if getattr(settings, name, None):
            raise ConfigError(
                f'--{name.replace("_", "-")} does not work with --naflex-loader ({reason}): drop one of them')
    if getattr(settings, 'mixup_mode', 'batch') != 'batch':
        raise ConfigError(
            '--mixup-mode does not work with --naflex-loader, which mixes pairs of equal shape: leave it out')
    sizes, probs = settings.naflex_patch_sizes, settings.naflex_patch_size_probs
    if probs and len(probs) != len(sizes or ()):
        raise ConfigError(f'--naflex-patch-size-probs has {len(probs)} values for {len(sizes or ())} '
                          '--naflex-patch-sizes: give one for each')
    return get_patch_size()


def _common(settings: DataSettings, runtime: Runtime, data_config: InputConfig) -> dict[str, Any]:
    return dict(
        mean=data_config['mean'],
        std=data_config['std'],
        channels=data_config['input_size'][0],
        num_workers=settings.workers,
        persistent_workers=False,
        pin_memory=settings.pin_mem,
        img_dtype=runtime.precision.model_dtype or torch.float32,
        device=runtime.device,
        patchify_channels_last=not settings.naflex_patchify_channels_first,
    )


def _open(settings: DataSettings, data_config: InputConfig, classes: Classes, split: str, training: bool,
          samples: int | None) -> Any:
    dataset = build_dataset(settings, classes, split, training, image_mode(settings, data_config), samples)
    if isinstance(dataset, torch.utils.data.IterableDataset):
        raise DatasetError('--naflex-loader needs an indexed dataset, not a streamed one: leave it out')
    return dataset


def _listed(values: tuple[Any, ...] | None) -> list[Any] | None:
    return None if values is None else list(values)


def build_naflex_train_loader(settings: LossSettings, runtime: Runtime, data_config: InputConfig, classes: Classes,
                              model: nn.Module) -> Loader:
    """Loader of the training split: dictionaries of `patches` (B, N, P), `patch_coord` (B, N, 2) and `patch_valid`.

    Each batch has one of `--naflex-train-seq-lens` and about `--batch-size` times the longest of them patches in all.
    With `--naflex-patch-sizes` patches are (B, N, height, width, channels).

    Raises:
        ConfigError: see `check_naflex`.
        DatasetError: see `dataset.build_dataset`; also a streamed dataset.
    """
    patch_size = check_naflex(settings, model)
    dataset = _open(settings, data_config, classes, settings.train_split, True, settings.train_num_samples)
    images = ReplacingImages(dataset, settings.seed)
    mix = mixing(settings, classes.count)
    for name in ('mode', 'cutmix_minmax'):
        mix.pop(name, None)
    mixup_fn = NaFlexMixup(**mix, mixup_off_epoch=settings.mixup_off_epoch) if mix else None
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # timm prints the number of batches
            built: Any = create_naflex_loader(
                images,
                patch_size=None if settings.naflex_patch_sizes else patch_size,
                patch_size_choices=_listed(settings.naflex_patch_sizes),
                patch_size_choice_probs=_listed(settings.naflex_patch_size_probs),
                train_seq_lens=settings.naflex_train_seq_lens,
                batch_size=settings.batch_size,
                is_training=True,
                mixup_fn=mixup_fn,
                distributed=runtime.distributed,
                rank=runtime.rank,
                world_size=runtime.world_size,
                seed=settings.seed,
                worker_seeding=settings.worker_seeding,
                **augmentation(settings, data_config),
                **_common(settings, runtime, data_config),
            )
    except (AssertionError, TypeError, ValueError) as error:
        raise ConfigError(f'the NaFlex loader cannot be built ({error}): check the --naflex- and augmentation flags') \
            from error
    batches: Any = built.loader.dataset
    batches.collate_fns = {length: ReportingCollate(each, images) for length, each in batches.collate_fns.items()}
    log = UnreadableLog(dataset, settings.max_bad_samples)
    stream = NaflexStream(built.loader, settings.seed, runtime.rank, log)
    built.loader = stream
    if built.random_erasing is not None:
        built.random_erasing = KeyedPatchErasing(
            built.random_erasing, stream, settings.seed, runtime.rank, runtime.device)
    return built


def build_naflex_eval_loader(settings: DataSettings, runtime: Runtime, data_config: InputConfig, classes: Classes,
                             model: nn.Module, split: str, batch_size: int, num_samples: int | None) -> Loader:
    """Loader of a validation split, with sequences of at most `--naflex-max-seq-len` patches of the model's size.

    Raises:
        ConfigError: see `check_naflex`.
        DatasetError: see `dataset.build_dataset`; also a streamed dataset.
    """
    patch_size = check_naflex(settings, model)
    dataset = _open(settings, data_config, classes, split, False, num_samples)
    if isinstance(dataset, StrictImageDataset):
        dataset = CountingImageDataset(dataset)
    loader: Any = create_naflex_loader(
        dataset,
        patch_size=patch_size,
        max_seq_len=settings.naflex_max_seq_len,
        batch_size=batch_size,
        interpolation=data_config['interpolation'],
        distributed=runtime.distributed,
        **_common(settings, runtime, data_config),
    )
    loader.loader.worker_init_fn = WorkerSignals(loader.loader.worker_init_fn)
    return loader


def naflex_loss_scale(settings: DataSettings, runtime: Runtime, images: int) -> float:
    """Factor on the mean loss of a batch of `images`.

    It is (images / `--batch-size`), its root or 1, as
    `--naflex-loss-scale` says, times the share that the batch has of those of all processes, relative to an equal one.
    """
    ratio = images / settings.batch_size
    scale = {'none': 1., 'sqrt': ratio ** 0.5, 'linear': ratio}[settings.naflex_loss_scale]
    if runtime.distributed:
        total = torch.tensor(float(images), device=runtime.device)
        torch.distributed.all_reduce(total)
        scale *= runtime.world_size * images / float(total)
    return scale
