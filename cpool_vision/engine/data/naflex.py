"""Batches of patch sequences at native aspect ratio (NaFlex, Dehghani et al., arXiv 2307.06304), by timm's loader."""
import contextlib
import io
from typing import Any

import torch
import torch.distributed
import torch.nn as nn
import torch.utils.data
from timm.data import NaFlexMixup, create_naflex_loader

from cpool_vision.errors import ConfigError, DatasetError

from ..device import Runtime
from ..settings.limits import flag_name
from ..settings.shared import DataSettings, InputConfig
from ..settings.train import LossSettings
from .dataset import build_dataset
from .keyed import Collate, KeyedErasing, candidates
from .loader_flags import augmentation, image_mode, mixing, placement
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
    """Training batches of timm's NaFlex loader, over `ReplacingImages`.

    Starting inside an epoch loads the batches before it again. Batches depend on the number of workers, which must stay
    the same when a run is resumed.
    """

    def start_at(self, epoch: int, batch: int = 0) -> None:
        """Sets the epoch and batch at which the next iteration begins.

        Raises:
            ConfigError: There is no such batch.
        """
        if epoch < 0 or not 0 <= batch <= len(self):
            raise ConfigError(f'there is no batch {batch} in epoch {epoch} of {len(self)} batches: resume with the '
                              'settings of the previous run')
        self.epoch, self.batch = epoch, batch


class ReplacingImages(torch.utils.data.Dataset[object]):
    """Replaces an image that cannot be read by another one, which depends on the seed only.

    Args:
        dataset: A `StrictImageDataset` without transform.
        seed: Seed of the run.

    Attributes:
        found: Images replaced in this process since the last call of `drain`.
    """

    def __init__(self, dataset: StrictImageDataset, seed: int) -> None:
        self.dataset, self.seed = dataset, seed
        self.found: list[Unreadable] = []

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> object:
        for candidate in candidates(self.seed, 0, index, 0, len(self)):
            try:
                return self.dataset[candidate]
            except UnreadableImageError as error:
                self.found.append(Unreadable(candidate, sample_name(self.dataset, candidate), str(error)))
        raise UnreadableImageError(f'no readable image was found to replace {sample_name(self.dataset, index)}')

    def drain(self) -> list[Unreadable]:
        """Returns `found` and clears it."""
        found, self.found = self.found, []
        return found


class ReportingCollate:
    """Adds the images that were replaced as a third item to a batch of timm's collation."""

    def __init__(self, collate: Collate, images: ReplacingImages) -> None:
        self.collate, self.images = collate, images

    def __call__(self, samples: list[object]) -> tuple[object, ...]:
        return (*self.collate(samples), self.images.drain())


def check_naflex(settings: DataSettings, model: nn.Module) -> tuple[int, int]:
    """Checks that model and flags work with the NaFlex loader; returns the model's patch size (height, width).

    Raises:
        ConfigError: The model only takes whole images, or a flag does not work with the loader.
    """
    get_patch_size = getattr(model, 'get_patch_size', None)
    if get_patch_size is None:
        raise ConfigError(
            f'--naflex-loader yields patches with coordinates and a mask, but this model '
            f'({type(model).__name__}) takes whole images: '
            "use a naflexvit model (naflexvit_*_cpool_* or one of timm's), or drop --naflex-loader")
    unsupported = (
        ('no_prefetcher', 'patches are normalized by the prefetcher'), ('channels_last', 'patches have no layout'),
        ('torchscript', 'dictionaries cannot be scripted'), ('train_img_sizes', 'both set the size of a batch'),
        ('use_multi_epochs_loader', 'the order changes with the epoch'), ('aug_splits', 'it makes one view per image'),
        ('aug_repeats', 'it draws each image once'), ('save_images', 'there are no images to save'),
        ('kd_model_name', 'teachers take whole images'), ('cutmix_minmax', 'boxes follow from --cutmix'),
    )
    for name, reason in unsupported:
        if getattr(settings, name, None):
            raise ConfigError(
                f'{flag_name(name)} does not work with --naflex-loader ({reason}): drop one of them')
    if getattr(settings, 'mixup_mode', 'batch') != 'batch':
        raise ConfigError('--mixup-mode does not work with --naflex-loader, which mixes pairs of equal shape: drop it')
    sizes, probs = settings.naflex_patch_sizes, settings.naflex_patch_size_probs
    if probs and len(probs) != len(sizes or ()):
        raise ConfigError(f'--naflex-patch-size-probs has {len(probs)} values for {len(sizes or ())} '
                          '--naflex-patch-sizes: give one for each')
    return get_patch_size()


def _common(settings: DataSettings, runtime: Runtime, data_config: InputConfig) -> dict[str, Any]:
    return dict(
        channels=data_config['input_size'][0],
        num_workers=settings.workers,
        persistent_workers=False,
        patchify_channels_last=not settings.naflex_patchify_channels_first,
        **placement(settings, runtime, data_config),
    )


def _open(settings: DataSettings, data_config: InputConfig, classes: Classes, split: str, training: bool,
          samples: int | None) -> Any:
    dataset = build_dataset(settings, classes, split, training, image_mode(settings, data_config), samples)
    if isinstance(dataset, torch.utils.data.IterableDataset):
        raise DatasetError('--naflex-loader needs an indexed dataset, not a streamed one: drop it')
    return dataset


def build_naflex_train_loader(settings: LossSettings, runtime: Runtime, data_config: InputConfig, classes: Classes,
                              model: nn.Module) -> Loader:
    """Builds the loader of the training split.

    Each batch has one of the sequence lengths of `--naflex-train-seq-lens`, and about `--batch-size` times the longest
    of them patches in total.

    Returns:
        A loader of (input, target), where input is a dictionary of `patches` (B, N, P), `patch_coord` (B, N, 2) and
        `patch_valid` (B, N). With `--naflex-patch-sizes`, patches are (B, N, height, width, channels).

    Raises:
        ConfigError: Model or flags do not work with the loader, see `check_naflex`.
        DatasetError: The dataset is streamed or cannot be opened, see `build_dataset`.
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
                patch_size_choices=list(settings.naflex_patch_sizes or ()) or None,
                patch_size_choice_probs=list(settings.naflex_patch_size_probs or ()) or None,
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
    stream = NaflexStream(
        built.loader, settings.seed, runtime.rank, UnreadableLog(dataset, settings.max_bad_samples))
    built.loader = stream
    if built.random_erasing is not None:
        built.random_erasing = KeyedErasing(built.random_erasing, stream, settings.seed, runtime.rank, runtime.device)
    return built


def build_naflex_eval_loader(settings: DataSettings, runtime: Runtime, data_config: InputConfig, classes: Classes,
                             model: nn.Module, split: str, batch_size: int, num_samples: int | None) -> Loader:
    """Builds the loader of a validation split, with sequences of at most `--naflex-max-seq-len` patches.

    Raises:
        ConfigError: Model or flags do not work with the loader, see `check_naflex`.
        DatasetError: The dataset is streamed or cannot be opened, see `build_dataset`.
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
    """Returns the factor for the mean loss of a batch of `images`.

    The factor is images / `--batch-size`, its square root or 1, depending on `--naflex-loss-scale`. In distributed
    training it also includes images / (mean over all processes), so that every image has the same weight.
    """
    ratio = images / settings.batch_size
    scale = {'none': 1., 'sqrt': ratio ** 0.5, 'linear': ratio}[settings.naflex_loss_scale]
    if runtime.distributed:
        total = torch.tensor(float(images), device=runtime.device)
        torch.distributed.all_reduce(total)
        scale *= runtime.world_size * images / float(total)
    return scale
