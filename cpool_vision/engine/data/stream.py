"""Training loaders that can start at any batch of an epoch."""
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
    """A data loader of torch, timm or this package."""

    @property
    def dataset(self) -> Any:
        """Dataset that the loader reads."""

    def __iter__(self) -> Iterator[Any]:
        """Yields batches (input, target); input is a tensor or, with NaFlex, a dictionary of patches."""

    def __len__(self) -> int:
        """Returns the number of batches."""


class _Stream:
    loader: Any  # a DataLoader, or what stands for one in tests

    @property
    def dataset(self) -> Any:
        """Dataset that the loader reads."""
        return self.loader.dataset

    def __len__(self) -> int:
        return len(self.loader)


class TrainStream(_Stream):
    """Batches of an indexed dataset, starting at any batch of any epoch.

    Batches do not depend on the number of workers. Every iteration begins where `start_at` was set last. The global
    generators of the process are left unchanged.

    Args:
        loader: `DataLoader` with `BatchKeys`, a `KeyedDataset` and `KeyedCollate`.
        unreadable: Log of images that were replaced.
        read_ahead: Start loading the next epoch as soon as one ends.

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
        """Sampler of the batches."""
        return self.loader.batch_sampler

    @property
    def sampler(self) -> list[int]:
        """Indices of this process's images in the current epoch, in order, including those of a partial last batch."""
        return self.batch_sampler.order.draw(self.batch_sampler.epoch)[0].tolist()

    def start_at(self, epoch: int, batch: int = 0) -> None:
        """Sets the epoch and batch at which the next iteration begins.

        Raises:
            ConfigError: There is no such batch.
        """
        self.batch_sampler.start_at(epoch, batch)

    def close(self) -> None:
        """Stops the workers. After an exception, the garbage collector would take many seconds to do so."""
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
        # without workers, samples are read in this process and seed its global generators
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
            raise DatasetError(f'no readable image was found to replace {last.path} ({last.reason}): repair the '
                               'dataset, or lower --max-bad-samples to stop earlier')


class StreamedTrainStream(_Stream):
    """Batches of a streamed dataset (wds, tfds, hfids), which has no index.

    Workers are restarted in each epoch and seeded by (seed, epoch, rank). A resumed epoch has the same batches if the
    reader's order depends on seed and epoch only and the number of workers is the same. Starting inside an epoch loads
    the batches before it again. Without workers, the reader lives in this process and can only go from one epoch to
    the next.

    Args:
        loader: `DataLoader` of the dataset, without persistent workers.
        seed: Seed of the run.
        rank: Rank of the process.
        unreadable: Log of images that were replaced, which must be the third item of each batch.

    Attributes:
        current: (epoch, batch) of the batch that was yielded last.
    """

    def __init__(self, loader: torch.utils.data.DataLoader[Any], seed: int, rank: int,
                 unreadable: UnreadableLog | None = None) -> None:
        self.loader = loader
        self.loader.worker_init_fn = WorkerSignals(loader.worker_init_fn)
        self.seed, self.rank, self.unreadable = seed, rank, unreadable
        self.epoch = self.batch = 0
        self.current = (0, 0)
        self._next_epoch = 0

    def start_at(self, epoch: int, batch: int = 0) -> None:
        """Sets the epoch and batch at which the next iteration begins.

        Raises:
            ConfigError: There is no such batch, or it cannot be reached without workers.
        """
        if epoch < 0 or batch < 0:
            raise ConfigError(f'there is no batch {batch} in epoch {epoch}: both are counted from 0')
        if not self.loader.num_workers and (epoch, batch) != (self._next_epoch, 0):
            raise ConfigError(f'without workers, a streamed dataset cannot continue at batch {batch} of epoch {epoch}: '
                              'start the run with --workers 1 or more')
        self.epoch, self.batch = epoch, batch

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        epoch, first = self.epoch, self.batch
        self._next_epoch = epoch + 1
        if hasattr(self.dataset, 'set_epoch'):
            self.dataset.set_epoch(epoch)
        seed = keyed_seeds(WORKERS, self.seed, epoch, [0], [self.rank])[0]
        self.loader.generator = torch.Generator().manual_seed(seed)  # torch draws the seeds of the workers from it
        if first:
            _logger.info('A streamed dataset can only be read from its start: loading %d batches of epoch %d again.',
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
                if self.unreadable is not None:
                    self.unreadable.add(item[2])
                self.current = epoch, number
                yield tuple(item[:2])
            number += 1
        if number < first:
            raise DatasetError(f'epoch {epoch} of the streamed dataset ended after {number} batches, before batch '
                               f'{first}: resume with the data, batch size and --workers of the previous run')
