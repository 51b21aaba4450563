"""Order of the training images: batches as a pure function of (seed, epoch, rank, batch)."""
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch.utils.data
from numpy.typing import NDArray
from timm.data.scheduled_sampler import ScheduledBatchSampler

from cpool_vision.data.counter import CounterDraws
from cpool_vision.errors import ConfigError

# independent streams of random numbers
ORDER, SAMPLE, REPLACEMENT, MIXING, ERASING, SIZES, WORKERS = range(7)
_LOW_BITS = 20  # of a counter, for the copy of an image or the rank; the bits above hold the image or batch
_TIMM_ROUND = 256  # timm's repeated augmentation keeps a multiple of this many images


def keyed_seeds(stream: int, seed: int, epoch: int, high: Sequence[int], low: Sequence[int] | int = 0) -> list[int]:
    """Hashes (stream, seed, epoch, high, low) to one 63-bit seed per pair (high, low).

    Args:
        stream: One of `ORDER`, `SAMPLE`, ...
        seed: Seed of the run, 0 to 2^64 - 1.
        epoch: Epoch, from 0.
        high: Indices of images or batches, 0 to 2^44 - 1.
        low: Copies of the images or ranks of the processes, 0 to 2^20 - 1.
    """
    base = int(CounterDraws(seed, stream, np.asarray([epoch])).bits(1)[0, 0])
    counters = (np.asarray(high, np.uint64) << np.uint64(_LOW_BITS)) + np.asarray(low, np.uint64)
    return (CounterDraws(base, 0, counters).bits(1)[:, 0] >> np.uint64(1)).tolist()


def keyed_permutation(stream: int, seed: int, epoch: int, size: int) -> NDArray[np.int64]:
    """Returns a permutation of `size` integers, by sorting hashes: the same with every release of numpy and torch."""
    base = int(CounterDraws(seed, stream, np.asarray([epoch])).bits(1)[0, 0])
    return CounterDraws(base, 1, np.arange(size)).bits(1)[:, 0].argsort(kind='stable')


@dataclass(frozen=True)
class BatchKey:
    """Everything a worker needs to load a batch.

    Attributes:
        epoch, batch: Which batch it is, both from 0.
        indices: Indices of the images.
        repeats: For each image, how often it occurred earlier in this epoch.
        choice: Index of the image size; None if there is only one.
    """

    epoch: int
    batch: int
    indices: tuple[int, ...]
    repeats: tuple[int, ...]
    choice: int | None = None


class EpochOrder:
    """Shuffled order of the images of one process.

    As in torch's `DistributedSampler`, process r of W takes elements r, r + W, ... of a permutation shared by all
    processes, and up to W - 1 images are used twice so that all processes have equally many. With repeated augmentation
    (Berman et al., arXiv:1902.05509; timm's `RepeatAugSampler`), each image is first repeated `repeats` times in a row,
    so that its copies go to different processes, and an epoch ends after about size / W images per process.

    Args:
        size: Number of images in the dataset.
        seed: Seed of the run.
        rank, world_size: Rank of this process and number of processes.
        repeats: Copies of each image, may be fractional; 0 turns repetition off.
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
        """Returns the images of an epoch, and for each which copy it is, both `(len(self),)`."""
        order = keyed_permutation(ORDER, self.seed, epoch, self.size)
        places = np.arange(len(self), dtype=np.int64) * self.world_size + self.rank
        if not self.repeats:
            return order[places % self.size], np.zeros(len(self), np.int64)
        source = (np.arange(int(np.ceil(self.repeats * self.size))) // self.repeats).astype(np.int64)
        copy = np.arange(len(source)) - np.searchsorted(source, source)
        places %= len(source)
        return order[source[places]], copy[places]


class BatchKeys(torch.utils.data.Sampler[BatchKey]):
    """Batch sampler that yields the keys of an epoch's batches, starting at a given batch; drops a partial last batch.

    Args:
        order: Order of the images.
        batch_size: Images per batch.
        schedule: timm's `ScheduledBatchSampler` over the same number of samples, for several image sizes. The sequence
            of sizes is drawn anew in each epoch and is the same in every process.
    """

    def __init__(self, order: EpochOrder, batch_size: int, schedule: ScheduledBatchSampler | None = None) -> None:
        self.order = order
        self.batch_size = batch_size
        self.schedule = schedule
        self.epoch = 0
        self.batch = 0

    @property
    def average_batch_size(self) -> float:
        """Mean number of images per batch."""
        return float(self.batch_size if self.schedule is None else self.schedule.average_batch_size)

    def start_at(self, epoch: int, batch: int = 0) -> None:
        """Sets the epoch and batch at which the next iteration begins.

        Raises:
            ConfigError: There is no such batch.
        """
        if epoch < 0 or not 0 <= batch <= len(self):
            raise ConfigError(f'there is no batch {batch} in epoch {epoch}: an epoch has {len(self)} batches with '
                              'these settings; resume with the batch size and number of processes of the previous run')
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
            # a schedule of fixed length may go through the images more than once
            again, place = np.divmod(np.arange(start, start + size), len(indices))
            yield BatchKey(epoch, batch, tuple(indices[place].tolist()),
                           tuple((repeats[place] + copies * again).tolist()), choice)
            start += size

    def __iter__(self) -> Iterator[BatchKey]:
        return self._keys(self.epoch, self.batch)

    def __len__(self) -> int:
        return len(self.order) // self.batch_size if self.schedule is None else len(self.schedule)
