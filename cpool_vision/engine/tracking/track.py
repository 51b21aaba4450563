"""What is recorded while a run trains: one interface for files in the run folder and for services."""
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from cpool_vision.errors import UserError
from cpool_vision.inspect import SupportStatistics

from ..distributed.signals import StopRequested
from ..settings.train import TrackSettings
from .table import EpochTable, UpdateTable
from .track_services import (
    MlflowTracker,
    ServiceRuns,
    TensorBoardTracker,
    WandbTracker,
    import_mlflow,
    import_wandb,
)

_logger = logging.getLogger(__name__)
SUPPORTS, UPDATES = 'supports.csv', 'updates.csv'


class Tracker(Protocol):
    """Where figures of a run go; only the first process has any. Calls come in the order of the run."""

    def log_update(self, update: int, epoch: int, values: Mapping[str, float]) -> None:
        """Takes what a log line inside an epoch reports.

        Args:
            update: updates made since the start of the run.
            epoch: the current epoch.
            values: `loss` since the last report, `lr`, `images_per_sec`.
        """

    def log_epoch(self, row: Mapping[str, Any], update: int, supports: Sequence[SupportStatistics]) -> None:
        """Takes the figures of a finished epoch.

        Args:
            row: the row of summary.csv.
            update: updates made since the start of the run.
            supports: one entry per context pool; none if the epoch was not validated.
        """

    def close(self, failed: bool) -> None:
        """Ends the record; `failed` if the run broke off."""


class CsvTracker:
    """updates.csv and supports.csv beside the summary.csv of the run folder."""

    def __init__(self, folder: str, epoch: int, update: int) -> None:
        self.supports = EpochTable(os.path.join(folder, SUPPORTS))
        self.supports.trim(epoch)
        self.updates = UpdateTable(os.path.join(folder, UPDATES), epoch, update)

    def log_update(self, update: int, epoch: int, values: Mapping[str, float]) -> None:
        self.updates.add(update, epoch, values)

    def log_epoch(self, row: Mapping[str, Any], update: int, supports: Sequence[SupportStatistics]) -> None:
        if supports:
            self.supports.add(int(row['epoch']), [each._asdict() for each in supports])

    def close(self, failed: bool) -> None:
        self.updates.close()


class Trackers:
    """Several trackers as one. A service that fails is named in the log and left out; the run continues.

    Args:
        trackers: by their name in messages; may be empty.
    """

    def __init__(self, trackers: Mapping[str, Tracker]) -> None:
        self.trackers = dict(trackers)

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self.trackers.items()):
            try:
                call(tracker)
            except UserError:
                raise
            except Exception as error:
                _logger.warning('%s failed and gets no more figures of this run (%s: %s).', name, type(error).__name__,
                                ' '.join(str(error).split())[:300])
                del self.trackers[name]

    def log_update(self, update: int, epoch: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        self._each(lambda tracker: tracker.log_update(update, epoch, values))

    def log_epoch(self, row: Mapping[str, Any], update: int, supports: Sequence[SupportStatistics]) -> None:
        """See `Tracker`."""
        self._each(lambda tracker: tracker.log_epoch(row, update, supports))

    def close(self, failed: bool) -> None:
        """See `Tracker`."""
        self._each(lambda tracker: tracker.close(failed))

    def __enter__(self) -> 'Trackers':
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self.close(failed=kind is not None and not issubclass(kind, StopRequested))


def check_services(settings: TrackSettings) -> None:
    """Raises `ConfigError` if a service that the flags ask for is not installed."""
    import_wandb(settings)
    import_mlflow(settings)


def open_trackers(settings: TrackSettings, config: Mapping[str, Any], folder: str, epoch: int, update: int,
                  continuing: bool) -> Trackers:
    """The trackers of a run, on the first process.

    Args:
        settings: what records the run.
        config: all settings of the run, for the services.
        folder: the run folder.
        epoch: epoch in which the run begins or continues.
        update: updates that it has made.
        continuing: whether the folder holds the former part of the run.

    Raises:
        ConfigError: a service cannot be reached or lacks its package.
        OutputError: a table cannot be written.
    """
    trackers: dict[str, Tracker] = {'CSV': CsvTracker(folder, epoch, update)}
    if not settings.no_tensorboard:
        board = TensorBoardTracker.open(folder, epoch, update)
        if board is not None:
            trackers['TensorBoard'] = board
    runs = ServiceRuns(folder, continuing)
    if settings.log_wandb:
        trackers['Weights & Biases'] = WandbTracker(import_wandb(settings), settings, config, folder, runs)
    if settings.log_mlflow:
        trackers['MLflow'] = MlflowTracker(import_mlflow(settings), config, folder, runs)
    return Trackers(trackers)
