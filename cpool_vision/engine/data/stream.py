"""The training loader: yields (image, target) from a given batch on."""
import logging
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, Protocol

import torch
import torch.utils.data

from cpool_vision.errors import ConfigError, DatasetError

from .keyed import Report, kept_generators, seed_generators
from .sampling import WORKERS, BatchKeys, keyed_seeds
from .unreadable import UnreadableLog
from .worker import WorkerSignals

_logger = logging.getLogger(__name__)


class Loader(Protocol):
    """Batches of a split, as loaders of torch, of timm and of this package give them."""

    @property
    def dataset(self) -> Any:
        """The set."""

    def __iter__(self) -> Iterator[Any]:
        """Images, or dictionaries of patches, and targets."""

    def __len__(self) -> int:
        """How many batches."""


class _Stream:
    """What is asked of a torch loader."""
    loader: Any

    @property
    def dataset(self) -> Any:
        """The set."""
        return self.loader.dataset

    @property
    def collate_fn(self) -> Any:
        """How samples become a batch."""
        return self.loader.collate_fn

    def __len__(self) -> int:
        return len(self.loader)


class TrainStream(_Stream):
    """Batches of an indexed set from (epoch, batch) on, the same for any number of workers.

    Iterating does not move the start: only `start_at` does. Global generators of the process are left as found.

    Args:
        loader: `DataLoader` with `BatchKeys`, a `KeyedDataset` and `KeyedCollate`.
        unreadable: where to note images that were replaced.
        read_ahead: begin to load the next epoch when one ends.

    Attributes:
        current: (epoch, batch) of the batch that was yielded last.
    """

    def __init__(self, loader: torch.utils.data.DataLoader[Any], unreadable: UnreadableLog, read_ahead: bool = False,
                 ) -> None:
        self.loader = loader
        self.unreadable = unreadable
        self.read_ahead = read_ahead and loader.num_workers > 0
        self.current = (0, 0)
        self._ahead: tuple[tuple[int, int], Iterator[Any]] | None = None

    @property
    def batch_sampler(self) -> BatchKeys:
        """The keys."""
        return self.loader.batch_sampler

    @property
    def sampler(self) -> list[int]:
        """Images of the current epoch, of this process, in order; also those that no full batch is left for."""
        return self.batch_sampler.order.draw(self.batch_sampler.epoch)[0].tolist()

    def start_at(self, epoch: int, batch: int = 0) -> None:
        """Where the next iteration begins.

        Raises:
            ConfigError: no such batch.
        """
        self.batch_sampler.start_at(epoch, batch)

    def close(self) -> None:
        """Ends the workers; left to the garbage collector after an exception, they would take many seconds."""
        iterator, self.loader._iterator = self.loader._iterator, None
        if hasattr(iterator, '_shutdown_workers'):
            iterator._shutdown_workers()

    def _open(self) -> Iterator[Any]:
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == (self.batch_sampler.epoch, self.batch_sampler.batch):
            return ahead[1]
        return iter(self.loader)

    def _load_next_epoch(self) -> None:
        keys = self.batch_sampler
        here = keys.epoch, keys.batch
        keys.start_at(keys.epoch + 1)
        self._ahead = (keys.epoch, keys.batch), iter(self.loader)
        keys.start_at(*here)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        # without workers the samples are made here, and seed the global generators
        kept = nullcontext if self.loader.num_workers else kept_generators
        batches = self._open()
        while True:
            with kept():
                item = next(batches, None)
            if item is None:
                break
            image, target, report = item
            self._note(report, image is None)
            self.current = report.epoch, report.batch
            yield image, target
        if self.read_ahead:
            self._load_next_epoch()

    def _note(self, report: Report, failed: bool) -> None:
        self.unreadable.add(report.unreadable)
        if failed:
            last = report.unreadable[-1]
            raise DatasetError(f'no readable image was found to replace {last.path} ({last.reason}): fix the '
                               'dataset, or lower --max-bad-samples to stop earlier')


class StreamedTrainStream(_Stream):
    """Batches of a streamed dataset (wds, tfds, hfids), which has no index.

    An epoch is repeated if the reader's order depends on seed and epoch only, by workers that are restarted and
    seeded by (seed, epoch, rank); their number must stay the same. A batch within an epoch is reached by loading
    what comes before it. Without workers the reader lives on in this process and can only go from epoch to epoch.

    Args:
        loader: `DataLoader` over the set, without persistent workers.
        seed, rank: seed of the run, number of the process.

    Attributes:
        current: (epoch, batch) of the batch that was yielded last.
    """

    def __init__(self, loader: torch.utils.data.DataLoader[Any], seed: int, rank: int) -> None:
        self.loader = loader
        self.loader.worker_init_fn = WorkerSignals(loader.worker_init_fn)
        self.seed, self.rank = seed, rank
        self.epoch = self.batch = 0
        self.current = (0, 0)
        self.unreadable: Any = None  # an UnreadableLog where there is one
        self._next_epoch = 0

    @property
    def batch_sampler(self) -> Any:
        """None: the workers cut the batches."""
        return None

    @property
    def sampler(self) -> Any:
        """torch's placeholder."""
        return self.loader.sampler

    def start_at(self, epoch: int, batch: int = 0) -> None:
        """Where the next iteration begins.

        Raises:
            ConfigError: no such batch.
        """
        if epoch < 0 or batch < 0:
            raise ConfigError(f'there is no batch {batch} in epoch {epoch}: both count from 0')
        if not self.loader.num_workers and (epoch, batch) != (self._next_epoch, 0):
            raise ConfigError(f'a streamed dataset that is read without workers cannot continue at batch {batch} of '
                              f'epoch {epoch}: start the run with --workers 1 or more')
        self.epoch, self.batch = epoch, batch

    def _note(self, item: Any) -> None:
        """Takes what travels with a batch from its worker."""

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        epoch, first = self.epoch, self.batch
        self._next_epoch = epoch + 1
        if hasattr(self.dataset, 'set_epoch'):
            self.dataset.set_epoch(epoch)
        seed = keyed_seeds(WORKERS, self.seed, epoch, [0], [self.rank])[0]
        self.loader.generator = torch.Generator().manual_seed(seed)  # from which the workers' seeds are drawn
        if first:
            _logger.info('A streamed dataset cannot be entered in the middle: loading %d batches of epoch %d again.',
                         first, epoch)
        batches, number = iter(self.loader), 0
        while True:
            if self.loader.num_workers:
                item = next(batches, None)
            else:
                with kept_generators():
                    seed_generators(keyed_seeds(WORKERS, self.seed, epoch, [number + 1], [self.rank])[0])
                    item = next(batches, None)
            if item is None:
                break
            if number >= first:
                self._note(item)
                self.current = epoch, number
                yield tuple(item[:2])
            number += 1
        if number < first:
            raise DatasetError(f'epoch {epoch} of the streamed dataset ended after {number} batches, before batch '
                               f'{first} to resume from: use the data, batch size and --workers of the previous run')
