"""Per-sample and per-batch seeding: random numbers depend on seed, epoch and index, not on earlier draws."""
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
import torch.utils.data
from PIL import Image
from timm.data import FastCollateMixup, Mixup
from timm.data.scheduled_sampler import ScheduledTransformDataset

from cpool_vision.data.augment import Augmentation
from cpool_vision.data.counter import CounterDraws

from .sampling import ERASING, MIXING, REPLACEMENT, SAMPLE, BatchKey, keyed_seeds
from .unreadable import DECODE_ERRORS, StrictImageDataset, Unreadable, UnreadableImageError, sample_name

_REPLACEMENTS = 16  # candidates to try in place of an unreadable image
Collate = Callable[[list[Any]], Sequence[Any]]


class WithTransform(Protocol):
    """A dataset that applies `transform` to its images."""

    transform: Callable[[Image.Image], torch.Tensor] | None


class Current(Protocol):
    """A loader that knows which batch it yielded last."""

    @property
    def current(self) -> tuple[int, int]:
        """(epoch, batch) of that batch."""


def seed_generators(seed: int) -> None:
    """Seeds `random`, numpy and torch's CPU generator, in 7 microseconds; `torch.manual_seed` takes 100."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002 - timm's policies and mixing draw from the global generator
    torch.default_generator.manual_seed(seed)


def seed_accelerator(seed: int, device: torch.device) -> None:
    """Seeds the generator of a device other than the CPU."""
    module = torch.get_device_module(device)
    with module.device(device) if hasattr(module, 'device') else nullcontext():
        module.manual_seed(seed)


@contextmanager
def kept_generators(device: torch.device | None = None) -> Iterator[None]:
    """Restores the states of `random`, numpy and torch (CPU and `device`) on exit."""
    python, legacy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    accelerator = None if device is None or device.type == 'cpu' else torch.get_device_module(device)
    which = () if device is None or device.type == 'mps' else (device,)
    state = None if accelerator is None else accelerator.get_rng_state(*which)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002
        torch.set_rng_state(cpu)
        if accelerator is not None:
            accelerator.set_rng_state(state, *which)


@dataclass(frozen=True)
class Report:
    """Sent by a worker along with a batch.

    Attributes:
        epoch, batch: Which batch it is.
        unreadable: Images that were replaced.
    """

    epoch: int
    batch: int
    unreadable: list[Unreadable] = field(default_factory=list)


@dataclass(frozen=True)
class KeyedSamples:
    """Samples of a batch before collation; empty if an unreadable image could not be replaced."""

    samples: list[object]
    report: Report


class DrawnSeeds:
    """Seeds an augmentation pipeline from `random` before each image.

    Used for streamed datasets: their workers seed `random`, but do not know the index of an image.
    """

    def __init__(self, pipeline: Augmentation) -> None:
        self.pipeline = pipeline

    def __call__(self, image: Image.Image) -> torch.Tensor:
        self.pipeline.set_random_seed(random.getrandbits(32))
        return self.pipeline(image)


class KeyedDataset(torch.utils.data.Dataset[KeyedSamples]):
    """Seeds the generators by (seed, epoch, image, copy) before it reads a sample of a map-style dataset.

    An `--aug-config` pipeline is seeded in the same way. An unreadable image is replaced by another one, drawn from a
    hash of the same key, and reported with the batch.

    Args:
        dataset: Dataset with its transform set; timm's `ScheduledTransformDataset` for batches of several sizes.
        seed: Seed of the run, below 2^64.
    """

    def __init__(self, dataset: torch.utils.data.Dataset[object], seed: int) -> None:
        self.dataset: Any = dataset
        self.seed = seed
        base: Any = dataset
        while isinstance(getattr(base, 'dataset', None), torch.utils.data.Dataset):
            base = base.dataset
        self.base = base
        self._errors = UnreadableImageError if isinstance(base, StrictImageDataset) else DECODE_ERRORS

    def set_transforms(self, transforms: Sequence[Callable[[Image.Image], torch.Tensor]]) -> None:
        """Sets the transform of the images, or one per image size of a `ScheduledTransformDataset`."""
        if isinstance(self.dataset, ScheduledTransformDataset):
            self.dataset.transforms = tuple(transforms)
        else:
            self.dataset.transform, = transforms

    def __len__(self) -> int:
        return len(self.dataset)

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """Returns the path of an image, as timm's readers do."""
        return self.base.filename(index, basename, absolute)

    def _make(self, index: int, seed: int, choice: int | None) -> object:
        seed_generators(seed)
        transform = getattr(self.dataset, 'transform', None) if choice is None else self.dataset.transforms[choice]
        if isinstance(transform, Augmentation):  # has generators of its own
            transform.set_random_seed(seed & 0xFFFFFFFF)
        return self.dataset[index if choice is None else (index, choice)]

    def __getitems__(self, key: BatchKey) -> KeyedSamples:
        seeds = keyed_seeds(SAMPLE, self.seed, key.epoch, key.indices, key.repeats)
        samples: list[object] = []
        report = Report(key.epoch, key.batch)
        for index, repeat, seed in zip(key.indices, key.repeats, seeds, strict=True):
            for candidate in candidates(self.seed, key.epoch, index, repeat, len(self)):
                try:
                    samples.append(self._make(candidate, seed, key.choice))
                    break
                except self._errors as error:
                    report.unreadable.append(Unreadable(candidate, sample_name(self.base, candidate), str(error)))
            else:
                return KeyedSamples([], report)
        return KeyedSamples(samples, report)


def candidates(seed: int, epoch: int, index: int, repeat: int, size: int) -> Iterator[int]:
    """Yields the index of an image, then the indices (below `size`) to try in its place if it cannot be read."""
    yield index
    key = keyed_seeds(REPLACEMENT, seed, epoch, [index], [repeat])
    yield from CounterDraws(key[0], 0, np.zeros(1)).integers(_REPLACEMENTS, size)[0].tolist()


class KeyedCollate:
    """Collates samples; seeds mixup and CutMix by (seed, epoch, batch, rank).

    Args:
        collate_fn: timm's `fast_collate` or `FastCollateMixup`, or torch's `default_collate`.
        seed: Seed of the run.
        rank: Rank of the process.
        mixing_ends: Epoch at which mixing is turned off, 0 for never.
    """

    def __init__(self, collate_fn: Collate, seed: int, rank: int, mixing_ends: int = 0) -> None:
        self.collate_fn = collate_fn
        self.seed, self.rank, self.mixing_ends = seed, rank, mixing_ends

    def __call__(self, batch: KeyedSamples) -> tuple[torch.Tensor | None, torch.Tensor | None, Report]:
        report = batch.report
        if not batch.samples:
            return None, None, report
        if isinstance(self.collate_fn, FastCollateMixup):
            seed_generators(keyed_seeds(MIXING, self.seed, report.epoch, [report.batch], [self.rank])[0])
            self.collate_fn.mixup_enabled = mixes(report.epoch, self.mixing_ends)
        image, target, *_ = self.collate_fn(batch.samples)
        if isinstance(image, (list, tuple)):  # `default_collate` returns augmentation splits one by one
            target = target.repeat(len(image), *[1] * (target.ndim - 1))
            image = torch.cat(list(image))
        return image, target, report


def mixes(epoch: int, mixing_ends: int) -> bool:
    """Returns whether mixing is on in an epoch, given the epoch at which it is turned off (0: never)."""
    return not mixing_ends or epoch < mixing_ends


class KeyedErasing:
    """Random erasing on the device, seeded by (seed, epoch, batch, rank); leaves the global generators unchanged.

    timm's prefetcher erases a batch right after the stream has yielded it, so `stream.current` is that batch.

    Args:
        erasing: timm's `RandomErasing` or `PatchRandomErasing`.
        stream: Source of the batches.
        seed: Seed of the run.
        rank: Rank of the process.
        device: Device of the images.
    """

    def __init__(self, erasing: Callable[..., torch.Tensor], stream: Current, seed: int, rank: int,
                 device: torch.device) -> None:
        self.erasing, self.stream = erasing, stream
        self.seed, self.rank, self.device = seed, rank, device

    def __call__(self, images: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        epoch, batch = self.stream.current
        seed = keyed_seeds(ERASING, self.seed, epoch, [batch], [self.rank])[0]
        with kept_generators(self.device):
            seed_generators(seed)
            if self.device.type != 'cpu':
                seed_accelerator(seed, self.device)
            return self.erasing(images, **kwargs)


class KeyedMixup(Mixup):
    """timm's `Mixup`, seeded by (seed, epoch, batch, rank); leaves the global generators unchanged.

    Only for loaders without prefetcher: there, the batch to mix is the one that the stream yielded last.

    Args:
        stream: Source of the batches.
        seed: Seed of the run.
        rank: Rank of the process.
        mixing_ends: Epoch at which mixing is turned off, 0 for never.
        **kwargs: Arguments of `Mixup`.
    """

    def __init__(self, stream: Current, seed: int, rank: int, mixing_ends: int = 0, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.stream, self.seed, self.rank, self.mixing_ends = stream, seed, rank, mixing_ends

    def __call__(self, x: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        epoch, batch = self.stream.current
        self.mixup_enabled = mixes(epoch, self.mixing_ends)
        with kept_generators():
            seed_generators(keyed_seeds(MIXING, self.seed, epoch, [batch], [self.rank])[0])
            return super().__call__(x, target)
