"""Order of the training images: batches as a pure function of (seed, epoch, process, batch)."""
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.utils.data
from numpy.typing import NDArray

from cpool_vision.data.counter import CounterDraws
from cpool_vision.errors import ConfigError

# streams of random numbers, each independent of the others
ORDER, SAMPLE, REPLACEMENT, MIXING, ERASING, SIZES, WORKERS = range(7)
_LOW_BITS = 20  # room for the copy of an image, or for the process, below the number of the image or batch
_TIMM_ROUND = 256  # timm's repeated augmentation keeps a multiple of this many images


def keyed_seeds(stream: int, seed: int, epoch: int, high: Sequence[int], low: Sequence[int] | int = 0) -> list[int]:
    """Seeds for the pairs (high, low), by a hash of (stream, seed, epoch, high, low): 63-bit integers.

    Args:
        stream: one of `ORDER`, `SAMPLE`, ...
        seed: seed of the run, 0 to 2^64 - 1.
        epoch: from 0.
        high: numbers of images or batches, 0 to 2^44 - 1.
        low: copy of the image or rank of the process, 0 to 2^20 - 1.
    """
    base = int(CounterDraws(seed, stream, np.asarray([epoch])).bits(1)[0, 0])
    counters = (np.asarray(high, np.uint64) << np.uint64(_LOW_BITS)) + np.asarray(low, np.uint64)
    return (CounterDraws(base, 0, counters).bits(1)[:, 0] >> np.uint64(1)).tolist()


def keyed_permutation(stream: int, seed: int, epoch: int, size: int) -> NDArray[np.int64]:
    """Permutation of `size` integers by sorting hashes: the same under every release of numpy and torch."""
    base = int(CounterDraws(seed, stream, np.asarray([epoch])).bits(1)[0, 0])
    return CounterDraws(base, 1, np.arange(size)).bits(1)[:, 0].argsort(kind='stable')


@dataclass(frozen=True)
class BatchKey:
    """What a worker must know to make a batch.

    Attributes:
        epoch, batch: the batch, both from 0.
        indices: images.
        repeats: which copy of the image in this epoch each of them is, from 0.
        choice: number of the image size, None where there is only one.
    """

    epoch: int
    batch: int
    indices: tuple[int, ...]
    repeats: tuple[int, ...]
    choice: int | None = None


class EpochOrder:
    """Shuffled images of one process in any epoch.

    As in torch's `DistributedSampler`, process r of W takes places r, r + W, ... of one permutation that all share,
    and up to W - 1 images are taken twice to give each process equally many. With repeated augmentation (Berman et
    al., arXiv:1902.05509; timm's `RepeatAugSampler`) each image stands `repeats` times in a row before that, so that
    its copies go to different processes, and an epoch ends after about size / W of a process's places.

    Args:
        size: images in the set.
        seed: seed of the run.
        rank, world_size: this process, number of processes.
        repeats: copies of each image, may be fractional; 0 for none.
    """

    def __init__(self, size: int, seed: int, rank: int = 0, world_size: int = 1, repeats: float = 0.) -> None:
        self.size, self.seed, self.rank, self.world_size = size, seed, rank, world_size
        self.repeats = float(repeats)
        self._length = -(-size // world_size)
        if repeats:
            places = int(np.ceil(self.repeats * size))
            kept = size // _TIMM_ROUND * _TIMM_ROUND // world_size if size >= _TIMM_ROUND else self._length
            self._length = min(kept, -(-places // world_size))

    def __len__(self) -> int:
        return self._length

    def draw(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Images of an epoch and which copy of its image each is, both `(len(self),)`."""
        order = keyed_permutation(ORDER, self.seed, epoch, self.size)
        places = np.arange(len(self), dtype=np.int64) * self.world_size + self.rank
        if not self.repeats:
            return order[places % self.size], np.zeros(len(self), np.int64)
        source = (np.arange(int(np.ceil(self.repeats * self.size))) // self.repeats).astype(np.int64)
        copy = np.arange(len(source)) - np.searchsorted(source, source)
        places %= len(source)
        return order[source[places]], copy[places]


class BatchKeys(torch.utils.data.Sampler[BatchKey]):
    """Batch sampler that yields the keys of an epoch's batches from a given batch on; the last, partial one is left.

    Args:
        order: the images.
        batch_size: images per batch.
        schedule: timm's `ScheduledBatchSampler` over as many samples, for batches of several image sizes. Its sizes
            are drawn per epoch, the same in every process.
    """

    def __init__(self, order: EpochOrder, batch_size: int, schedule: Any = None) -> None:
        self.order = order
        self.batch_size = batch_size
        self.schedule = schedule
        self.epoch = 0
        self.batch = 0

    @property
    def average_batch_size(self) -> float:
        """Mean images per batch."""
        return float(self.batch_size if self.schedule is None else self.schedule.average_batch_size)

    def start_at(self, epoch: int, batch: int = 0) -> None:
        """Where the next iteration begins.

        Raises:
            ConfigError: no such batch.
        """
        if epoch < 0 or not 0 <= batch <= len(self):
            raise ConfigError(f'there is no batch {batch} in epoch {epoch}: an epoch of these settings has {len(self)} '
                              'batches; resume with the batch size and number of processes of the previous run')
        self.epoch, self.batch = epoch, batch

    def _plan(self, epoch: int) -> list[tuple[int | None, int]]:
        if self.schedule is None:
            return [(None, self.batch_size)] * len(self)
        self.schedule.set_epoch(epoch)
        plan = self.schedule.schedule
        return [plan[i] for i in keyed_permutation(SIZES, self.order.seed, epoch, len(plan))]

    def _keys(self, epoch: int, first: int) -> Iterator[BatchKey]:
        plan = self._plan(epoch)
        indices, repeats = self.order.draw(epoch)
        copies = int(repeats.max(initial=0)) + 1
        start = sum(size for _, size in plan[:first])
        for batch in range(first, len(plan)):
            choice, size = plan[batch]
            # a schedule of fixed length may pass over the images more than once
            again, place = np.divmod(np.arange(start, start + size), len(indices))
            yield BatchKey(epoch, batch, tuple(indices[place].tolist()),
                           tuple((repeats[place] + copies * again).tolist()), choice)
            start += size

    def __iter__(self) -> Iterator[BatchKey]:
        return self._keys(self.epoch, self.batch)

    def __len__(self) -> int:
        return len(self.order) // self.batch_size if self.schedule is None else len(self.schedule)
