"""Loaders of training and validation."""
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
from .loader_flags import augmentation, check_train_flags, image_mode, mixing, size_schedule
from .multi_label import Classes
from .posterize import allow_zero_bits
from .sampling import BatchKeys, EpochOrder
from .stream import Loader, StreamedTrainStream, TrainStream
from .unreadable import UNREADABLE, CountingImageDataset, StrictImageDataset, Unreadable, UnreadableLog
from .worker import WorkerSignals

__all__ = [
    'UNREADABLE', 'base_dataset', 'build_dataset', 'build_eval_loader', 'build_train_loader', 'close_workers',
    'image_mode', 'list_unreadable', 'mixing', 'start_at', 'share_unreadable', 'unreadable_report',
]


def _common(settings: DataSettings, runtime: Runtime, data_config: InputConfig) -> dict[str, Any]:
    return dict(
        input_size=data_config['input_size'],
        mean=data_config['mean'],
        std=data_config['std'],
        pin_memory=settings.pin_mem,
        img_dtype=runtime.precision.model_dtype or torch.float32,
        device=runtime.device,
        use_prefetcher=not settings.no_prefetcher,
    )


def build_train_loader(settings: LossSettings, runtime: Runtime, data_config: InputConfig, classes: Classes,
                       ) -> tuple[Loader, Mixup | None]:
    """Loader of the training split, and the mixer to apply to its batches where the loader does not mix itself.

    Its batches are a function of (seed, epoch, rank, batch): iteration begins at the batch that `start_at`
    gave, is the same for any number of workers, and neither reads nor moves this process's global generators. Its
    length is that of a whole epoch. Of streamed datasets see `StreamedTrainStream`.

    Args:
        settings, runtime, data_config, classes: the run.

    Raises:
        DatasetError: see `build_dataset`; also a split smaller than one batch.
        ConfigError: flags that cannot be combined.
    """
    check_train_flags(settings, runtime.distributed)
    pipeline = open_pipeline(settings)
    allow_zero_bits()
    dataset = build_dataset(
        settings, classes, settings.train_split, True, image_mode(settings, data_config), settings.train_num_samples)
    order = _order_of(dataset, settings, runtime)
    mix = mixing(settings, classes.count)
    try:
        built: Any = _timm_loader(settings, runtime, data_config, dataset, mix)
        inner = _stream(built)
        if order is None:
            stream: Any = StreamedTrainStream(inner, settings.seed, runtime.rank)
        else:
            stream = _keyed_stream(settings, runtime.rank, inner, BatchKeys(
                order, settings.batch_size, size_schedule(settings, len(order))))
    except (AssertionError, TypeError, ValueError) as error:
        raise ConfigError(f'the training loader cannot be built ({error}): check the loader and augmentation flags') \
            from error
    if pipeline is not None:
        use_pipeline(settings, data_config, pipeline, stream.dataset)
        try_pipeline(settings, stream.dataset)
    if not isinstance(built, PrefetchLoader):
        mixup_fn = KeyedMixup(stream, settings.seed, runtime.rank, settings.mixup_off_epoch, **mix) if mix else None
        return stream, mixup_fn
    prefetcher: Any = built
    prefetcher.loader = stream
    if prefetcher.random_erasing is not None:
        prefetcher.random_erasing = KeyedErasing(
            prefetcher.random_erasing, stream, settings.seed, runtime.rank, runtime.device)
    return prefetcher, None


def _timm_loader(settings: LossSettings, runtime: Runtime, data_config: InputConfig, dataset: Any,
                 mix: dict[str, Any]) -> Any:
    """timm's own loader, of which transforms, collation and prefetcher are used."""
    if settings.aug_splits > 1:
        dataset = AugMixDataset(dataset, num_splits=settings.aug_splits)
    return create_loader(
        dataset,
        batch_size=settings.batch_size,
        is_training=True,
        re_split=settings.resplit,
        num_aug_splits=settings.aug_splits,
        num_workers=settings.workers,
        collate_fn=FastCollateMixup(**mix) if mix and not settings.no_prefetcher else None,
        worker_seeding=settings.worker_seeding,
        persistent_workers=False,
        input_size_choices=settings.train_img_sizes,
        batch_size_choices=settings.train_batch_sizes,
        batch_choice_weights=settings.train_size_probs,
        **augmentation(settings, data_config),
        **_common(settings, runtime, data_config),
    )


def _order_of(dataset: Any, settings: LoaderSettings, runtime: Runtime) -> EpochOrder | None:
    """Order of the images of an indexed set, None for a streamed one."""
    if isinstance(dataset, torch.utils.data.IterableDataset):
        if settings.aug_repeats:
            raise ConfigError('--aug-repeats needs an indexed dataset, not a streamed one: leave it out')
        return None
    order = EpochOrder(len(dataset), settings.seed, runtime.rank, runtime.world_size, settings.aug_repeats)
    smallest = min(settings.train_batch_sizes or [settings.batch_size])
    if len(order) < smallest:
        raise DatasetError(f'the training split has {len(order)} images per process, fewer than one batch of '
                           f'{smallest}: lower --batch-size')
    return order


def _keyed_stream(settings: LoaderSettings, rank: int, inner: torch.utils.data.DataLoader[Any], keys: BatchKeys,
                  ) -> TrainStream:
    dataset = KeyedDataset(inner.dataset, settings.seed)
    make_loader: Any = torch.utils.data.DataLoader  # typed for lists of indices, for which the keys stand
    loader = make_loader(
        dataset,
        batch_sampler=keys,
        num_workers=settings.workers,
        collate_fn=KeyedCollate(inner.collate_fn, settings.seed, rank, settings.mixup_off_epoch),
        pin_memory=settings.pin_mem,
        worker_init_fn=WorkerSignals(),
        persistent_workers=settings.workers > 0,
        generator=torch.Generator(),  # else each epoch would draw from the global one
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
    """Loader of a validation split; images that cannot be read come out with the label `UNREADABLE`.

    Args:
        settings, runtime, data_config, classes: the run; each process gets its share.
        split: its name.
        batch_size: images per batch.
        num_samples: size, for streamed datasets.
        **kwargs: more arguments of timm's `create_loader`.

    Raises:
        DatasetError: see `build_dataset`.
    """
    dataset = build_dataset(settings, classes, split, False, image_mode(settings, data_config), num_samples,
                            bool(kwargs.get('tf_preprocessing')))
    if isinstance(dataset, StrictImageDataset):
        dataset = CountingImageDataset(dataset)
    workers = settings.workers
    if runtime.distributed and isinstance(dataset, IterableImageDataset):
        workers = min(2, workers)  # each worker of a streamed dataset pads its share
    loader = create_loader(
        dataset,
        batch_size=batch_size,
        interpolation=data_config['interpolation'],
        num_workers=workers,
        distributed=runtime.distributed,
        **{'crop_pct': data_config['crop_pct'], **kwargs},
        **_common(settings, runtime, data_config),
    )
    inner: Any = _stream(loader)
    inner.worker_init_fn = WorkerSignals(inner.worker_init_fn)
    return loader


def _stream(loader: Loader) -> Any:
    return loader.loader if isinstance(loader, (PrefetchLoader, NaFlexPrefetchLoader)) else loader


def base_dataset(loader: Loader) -> Any:
    """The set that a loader of training or validation reads, without what was wrapped around it."""
    dataset = loader.dataset
    while True:
        inner = next((getattr(dataset, name) for name in ('base_dataset', 'base', 'dataset')
                      if isinstance(getattr(dataset, name, None), torch.utils.data.Dataset)), None)
        if inner is None or inner is dataset:  # a stream may be its own loader
            return dataset
        dataset = inner


def start_at(loader: Loader, epoch: int, batch: int = 0) -> None:
    """Makes the next iteration of a training loader begin at a batch of an epoch, both counted from 0.

    Raises:
        ConfigError: no such batch.
    """
    _stream(loader).start_at(epoch, batch)


def close_workers(loader: Loader) -> None:
    """Ends workers that outlive an epoch."""
    stream = _stream(loader)
    if isinstance(stream, TrainStream):
        stream.close()


def unreadable_report(loader: Loader) -> list[Unreadable]:
    """Training images that this process could not decode so far and replaced, by their number."""
    log = _stream(loader).unreadable
    return [] if log is None else [log.found[index] for index in sorted(log.found)]


def list_unreadable(loader: Loader, folder: str) -> None:
    """Lists unreadable training images in `folder`/unreadable.txt from now on; '' for no list."""
    log = _stream(loader).unreadable
    if log is not None:
        log.open(folder)


def share_unreadable(loader: Loader, device: torch.device) -> int:
    """Completes the list by what other processes found; every process must call it, at the end of an epoch say.

    Returns:
        How many unreadable training images there are in all.
    """
    log = _stream(loader).unreadable
    return 0 if log is None else log.share(device)
