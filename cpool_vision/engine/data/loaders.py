"""Builds the data loaders for training and validation."""
from typing import Any

import torch
import torch.utils.data
from timm.data import AugMixDataset, FastCollateMixup, IterableImageDataset, Mixup, create_loader
from timm.data.loader import PrefetchLoader
from timm.data.naflex_loader import NaFlexPrefetchLoader

from cpool_vision.errors import ConfigError, DatasetError

from ..device import Runtime
from ..settings.shared import DataSettings, InputConfig
from ..settings.train import LoaderSettings, LossSettings
from .augmentation import open_pipeline, try_pipeline, use_pipeline
from .dataset import build_dataset
from .keyed import KeyedCollate, KeyedDataset, KeyedErasing, KeyedMixup
from .loader_flags import augmentation, check_train_flags, image_mode, mixing, placement, size_schedule
from .multi_label import Classes
from .posterize import allow_zero_bits
from .sampling import BatchKeys, EpochOrder
from .stream import Loader, StreamedTrainStream, TrainStream
from .unreadable import CountingImageDataset, StrictImageDataset, UnreadableLog
from .worker import WorkerSignals


def build_train_loader(settings: LossSettings, runtime: Runtime, data_config: InputConfig, classes: Classes,
                       ) -> tuple[Loader, Mixup | None]:
    """Builds the loader of the training split.

    Each batch is a function of (seed, epoch, rank, batch). The number of workers does not matter, and iterating neither
    reads nor changes the global generators of this process. Iteration begins at the batch set by `start_at`; the length
    is always that of a whole epoch. For streamed datasets, see `StreamedTrainStream`.

    Args:
        settings: Dataset, loader, augmentation and mixing.
        runtime: Device and processes; each process loads its share.
        data_config: Input size and normalization.
        classes: Number of classes; may receive their names, see `build_dataset`.

    Returns:
        The loader, and the `Mixup` to call on its batches; None if the loader mixes them itself or mixing is off.

    Raises:
        DatasetError: The dataset cannot be opened (see `build_dataset`) or is smaller than one batch.
        ConfigError: Flags cannot be combined.
    """
    check_train_flags(settings, runtime.distributed)
    pipeline = open_pipeline(settings)
    allow_zero_bits()
    dataset = build_dataset(
        settings, classes, settings.train_split, True, image_mode(settings, data_config), settings.train_num_samples)
    order = _order_of(dataset, settings, runtime)
    mix = mixing(settings, classes.count)
    try:
        built = _timm_loader(settings, runtime, data_config, dataset, mix)
        inner = _stream(built)
        stream: StreamedTrainStream | TrainStream
        if order is None:
            stream = StreamedTrainStream(inner, settings.seed, runtime.rank)
        else:
            stream = _keyed_stream(settings, runtime.rank, inner, BatchKeys(
                order, settings.batch_size, size_schedule(settings, len(order))))
    except (AssertionError, TypeError, ValueError) as error:
        raise ConfigError(f'the training loader cannot be built ({error}): check the loader and augmentation flags') \
            from error
    if pipeline is not None:
        use_pipeline(settings, data_config, pipeline, stream.dataset)
        try_pipeline(settings, stream.dataset)
    if settings.no_prefetcher:
        mixup_fn = KeyedMixup(stream, settings.seed, runtime.rank, settings.mixup_off_epoch, **mix) if mix else None
        return stream, mixup_fn
    built.loader = stream
    if built.random_erasing is not None:
        built.random_erasing = KeyedErasing(built.random_erasing, stream, settings.seed, runtime.rank, runtime.device)
    return built, None


def _timm_loader(settings: LossSettings, runtime: Runtime, data_config: InputConfig, dataset: Any,
                 mix: dict[str, Any]) -> Any:
    """Creates timm's loader, whose transforms, collation and prefetcher are used."""
    if settings.aug_splits > 1:
        dataset = AugMixDataset(dataset, num_splits=settings.aug_splits)
    return create_loader(
        dataset,
        batch_size=settings.batch_size,
        is_training=True,
        re_split=settings.resplit,
        num_aug_splits=settings.aug_splits,
        num_workers=settings.workers,
        input_size=data_config['input_size'],
        use_prefetcher=not settings.no_prefetcher,
        collate_fn=FastCollateMixup(**mix) if mix and not settings.no_prefetcher else None,
        worker_seeding=settings.worker_seeding,
        persistent_workers=False,
        input_size_choices=settings.train_img_sizes,
        batch_size_choices=settings.train_batch_sizes,
        batch_choice_weights=settings.train_size_probs,
        **augmentation(settings, data_config),
        **placement(settings, runtime, data_config),
    )


def _order_of(dataset: Any, settings: LoaderSettings, runtime: Runtime) -> EpochOrder | None:
    """Returns the order of the images of an indexed dataset, or None for a streamed one."""
    if isinstance(dataset, torch.utils.data.IterableDataset):
        if settings.aug_repeats:
            raise ConfigError('--aug-repeats needs an indexed dataset, not a streamed one: drop it')
        return None
    order = EpochOrder(len(dataset), settings.seed, runtime.rank, runtime.world_size, settings.aug_repeats)
    smallest = min(settings.train_batch_sizes or [settings.batch_size])
    if len(order) < smallest:
        raise DatasetError(f'the training split has {len(order)} images per process, fewer than a batch of '
                           f'{smallest}: lower --batch-size')
    return order


def _keyed_stream(settings: LoaderSettings, rank: int, inner: torch.utils.data.DataLoader[Any], keys: BatchKeys,
                  ) -> TrainStream:
    dataset = KeyedDataset(inner.dataset, settings.seed)
    make_loader: Any = torch.utils.data.DataLoader  # annotated for lists of indices, not for keys
    loader = make_loader(
        dataset,
        batch_sampler=keys,
        num_workers=settings.workers,
        collate_fn=KeyedCollate(inner.collate_fn, settings.seed, rank, settings.mixup_off_epoch),
        pin_memory=settings.pin_mem,
        worker_init_fn=WorkerSignals(),
        persistent_workers=settings.workers > 0,
        generator=torch.Generator(),  # else each epoch would draw from the global generator
    )
    return TrainStream(loader, UnreadableLog(dataset.base, settings.max_bad_samples), settings.use_multi_epochs_loader)


def build_eval_loader(
        settings: DataSettings,
        runtime: Runtime,
        data_config: InputConfig,
        classes: Classes,
        split: str,
        batch_size: int,
        num_samples: int | None,
        **kwargs: Any,
) -> Loader:
    """Builds the loader of a validation split. Images that cannot be read have the label `UNREADABLE`.

    Args:
        settings: Dataset and loader.
        runtime: Device and processes; each process loads its share.
        data_config: Input size, cropping and normalization.
        classes: Number of classes; may receive their names, see `build_dataset`.
        split: Name of the split.
        batch_size: Images per batch and process.
        num_samples: Number of samples of a streamed or generated dataset.
        **kwargs: More arguments of timm's `create_loader`.

    Raises:
        DatasetError: See `build_dataset`.
    """
    dataset = build_dataset(settings, classes, split, False, image_mode(settings, data_config), num_samples,
                            bool(kwargs.get('tf_preprocessing')))
    if isinstance(dataset, StrictImageDataset):
        dataset = CountingImageDataset(dataset)
    workers = settings.workers
    if runtime.distributed and isinstance(dataset, IterableImageDataset):
        workers = min(2, workers)  # each worker of a streamed dataset pads its share, so few workers waste less
    loader = create_loader(
        dataset,
        batch_size=batch_size,
        interpolation=data_config['interpolation'],
        num_workers=workers,
        distributed=runtime.distributed,
        input_size=data_config['input_size'],
        use_prefetcher=not settings.no_prefetcher,
        **{'crop_pct': data_config['crop_pct'], **kwargs},
        **placement(settings, runtime, data_config),
    )
    inner = _stream(loader)
    inner.worker_init_fn = WorkerSignals(inner.worker_init_fn)
    return loader


def _stream(loader: Loader) -> Any:
    return loader.loader if isinstance(loader, (PrefetchLoader, NaFlexPrefetchLoader)) else loader


def base_dataset(loader: Loader) -> torch.utils.data.Dataset[object]:
    """Returns the dataset that a loader reads, without its wrappers."""
    dataset = loader.dataset
    while True:
        inner = next((getattr(dataset, name) for name in ('base_dataset', 'base', 'dataset')
                      if isinstance(getattr(dataset, name, None), torch.utils.data.Dataset)), None)
        if inner is None or inner is dataset:
            return dataset
        dataset = inner


def start_at(loader: Loader, epoch: int, batch: int = 0) -> None:
    """Sets the epoch and batch, both from 0, at which the next iteration of a training loader begins.

    Raises:
        ConfigError: There is no such batch.
    """
    _stream(loader).start_at(epoch, batch)


def close_workers(loader: Loader) -> None:
    """Stops persistent workers of a training loader."""
    stream = _stream(loader)
    if isinstance(stream, TrainStream):
        stream.close()


def list_unreadable(loader: Loader, folder: str) -> None:
    """Starts listing unreadable training images in `folder`/unreadable.txt; '' for no list."""
    log = _stream(loader).unreadable
    if log is not None:
        log.open(folder)


def share_unreadable(loader: Loader) -> int:
    """Merges the lists of unreadable images of all processes. Every process must call it.

    Returns:
        Number of unreadable training images found so far by any process.
    """
    log = _stream(loader).unreadable
    return 0 if log is None else log.share()
