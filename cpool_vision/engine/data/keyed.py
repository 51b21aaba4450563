"""Random numbers of samples and batches that depend on their key, not on earlier draws."""
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.utils.data
from timm.data import FastCollateMixup, Mixup
from timm.data.scheduled_sampler import ScheduledTransformDataset

from cpool_vision.data.augment import Augmentation
from cpool_vision.data.counter import CounterDraws

from .sampling import ERASING, MIXING, REPLACEMENT, SAMPLE, BatchKey, keyed_seeds
from .unreadable import DECODE_ERRORS, StrictImageDataset, Unreadable, UnreadableImageError, sample_name

_REPLACEMENTS = 16  # draws before a batch is given up


def seed_generators(seed: int) -> None:
    """Seeds `random`, numpy and torch's CPU generator; 7 microseconds, where `torch.manual_seed` takes 100."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002 - timm's policies and mixing draw from the global generator
    torch.default_generator.manual_seed(seed)


def seed_accelerator(seed: int, device: torch.device) -> None:
    """Seeds the generator of a device that is not the CPU."""
    module: Any = torch.get_device_module(device)
    with module.device(device) if hasattr(module, 'device') else nullcontext():
        module.manual_seed(seed)


@contextmanager
def kept_generators(device: torch.device | None = None) -> Iterator[None]:
    """Gives `random`, numpy and torch (CPU and `device`) their state back on leaving."""
    python, legacy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    accelerator: Any = None if device is None or device.type == 'cpu' else torch.get_device_module(device)
    which = (device,) if accelerator is not None and device.type != 'mps' else ()  # type: ignore[union-attr]
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
    """What travels with a batch from its worker.

    Attributes:
        epoch, batch: the batch.
        unreadable: images that were replaced.
    """

    epoch: int
    batch: int
    unreadable: list[Unreadable] = field(default_factory=list)


@dataclass(frozen=True)
class KeyedSamples:
    """Samples of a batch, before they are collated; none where unreadable images could not be replaced."""

    samples: list[Any]
    report: Report


class DrawnSeeds:
    """A pipeline that is seeded by a number drawn from `random` before each image.

    For streamed datasets, whose workers seed `random` but cannot know which image comes.
    """

    def __init__(self, pipeline: Augmentation) -> None:
        self.pipeline = pipeline

    def __call__(self, image: Any) -> torch.Tensor:
        self.pipeline.set_random_seed(random.getrandbits(32))
        return self.pipeline(image)


class KeyedDataset(torch.utils.data.Dataset[KeyedSamples]):
    """Makes each sample of a map-style set from generators seeded by (seed, epoch, image, copy).

    A pipeline of `--aug-config` is seeded in the same way. An unreadable image is replaced by one
    that a draw keyed in the same way picks, and reported with the batch.

    Args:
        dataset: set whose `transform` is in place; for batches of several sizes timm's `ScheduledTransformDataset`.
        seed: seed of the run, below 2^64.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed
        base = dataset
        while isinstance(getattr(base, 'dataset', None), torch.utils.data.Dataset):
            base = base.dataset
        self.base = base
        self._errors = UnreadableImageError if isinstance(base, StrictImageDataset) else DECODE_ERRORS

    def set_transforms(self, transforms: Sequence[Any]) -> None:
        """Sets the transform of the images, or one for each image size of a `ScheduledTransformDataset`."""
        if isinstance(self.dataset, ScheduledTransformDataset):
            self.dataset.transforms = tuple(transforms)
        else:
            self.dataset.transform, = transforms

    def __len__(self) -> int:
        return len(self.dataset)

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """Path of an image, see timm's readers."""
        return self.base.filename(index, basename, absolute)

    def _make(self, index: int, seed: int, choice: int | None) -> Any:
        seed_generators(seed)
        transform = getattr(self.dataset, 'transform', None) if choice is None else self.dataset.transforms[choice]
        if isinstance(transform, Augmentation):  # which draws from a stream of its own
            transform.set_random_seed(seed & 0xFFFFFFFF)
        return self.dataset[index if choice is None else (index, choice)]

    def __getitems__(self, key: BatchKey) -> KeyedSamples:
        seeds = keyed_seeds(SAMPLE, self.seed, key.epoch, key.indices, key.repeats)
        samples: list[Any] = []
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
    """An image of a set of `size`, and those that are tried in its place if it cannot be read."""
    yield index
    key = keyed_seeds(REPLACEMENT, seed, epoch, [index], [repeat])
    yield from CounterDraws(key[0], 0, np.zeros(1)).integers(_REPLACEMENTS, size)[0].tolist()


class KeyedCollate:
    """Collates keyed samples; mixup and CutMix draw from generators seeded by (seed, epoch, batch, rank).

    Args:
        collate_fn: timm's `fast_collate` or `FastCollateMixup`, or torch's `default_collate`.
        seed, rank: seed of the run, number of the process.
        mixing_ends: epoch from which nothing is mixed, 0 for never.
    """

    def __init__(self, collate_fn: Any, seed: int, rank: int, mixing_ends: int = 0) -> None:
        self.collate_fn = collate_fn
        self.seed, self.rank, self.mixing_ends = seed, rank, mixing_ends

    def __call__(self, batch: KeyedSamples) -> tuple[Any, Any, Report]:
        report = batch.report
        if not batch.samples:
            return None, None, report
        if isinstance(self.collate_fn, FastCollateMixup):
            seed_generators(keyed_seeds(MIXING, self.seed, report.epoch, [report.batch], [self.rank])[0])
            self.collate_fn.mixup_enabled = mixes(report.epoch, self.mixing_ends)
        image, target, *_ = self.collate_fn(batch.samples)
        if isinstance(image, (list, tuple)):  # augmentation splits of `default_collate`: split after split
            target = target.repeat(len(image), *[1] * (target.ndim - 1))
            image = torch.cat(list(image))
        return image, target, report


def mixes(epoch: int, mixing_ends: int) -> bool:
    """Whether an epoch mixes, given the epoch from which nothing is mixed (0: always)."""
    return not mixing_ends or epoch < mixing_ends


class KeyedErasing:
    """Random erasing on the device, drawn from (seed, epoch, batch, rank) of the batch that the stream gave last.

    timm's prefetcher erases a batch right after it has taken it from the stream. Global generators are left as found.

    Args:
        erasing: timm's `RandomErasing`.
        stream: what the batches come from; its `current` is (epoch, batch).
        seed, rank: seed of the run, number of the process.
        device: where the images are.
    """

    def __init__(self, erasing: Any, stream: Any, seed: int, rank: int, device: torch.device) -> None:
        self.erasing, self.stream = erasing, stream
        self.seed, self.rank, self.device = seed, rank, device

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        epoch, batch = self.stream.current
        seed = keyed_seeds(ERASING, self.seed, epoch, [batch], [self.rank])[0]
        with kept_generators(self.device):
            seed_generators(seed)
            if self.device.type != 'cpu':
                seed_accelerator(seed, self.device)
            return self.erasing(images)


class KeyedMixup(Mixup):
    """timm's `Mixup` on the device, drawn from (seed, epoch, batch, rank) of the batch that the stream gave last.

    For loaders without prefetcher, whose last batch is the one in hand. Global generators are left as found.

    Args:
        stream: what the batches come from; its `current` is (epoch, batch).
        seed, rank: seed of the run, number of the process.
        mixing_ends: epoch from which nothing is mixed, 0 for never.
        **kwargs: arguments of `Mixup`.
    """

    def __init__(self, stream: Any, seed: int, rank: int, mixing_ends: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.stream, self.seed, self.rank, self.mixing_ends = stream, seed, rank, mixing_ends

    def __call__(self, x: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        epoch, batch = self.stream.current
        self.mixup_enabled = mixes(epoch, self.mixing_ends)
        with kept_generators():
            seed_generators(keyed_seeds(MIXING, self.seed, epoch, [batch], [self.rank])[0])
            return super().__call__(x, target)
