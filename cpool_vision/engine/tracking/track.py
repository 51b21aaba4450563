"""Trackers record a run: one interface for files in the run folder and for tracking services."""
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Protocol

from cpool_vision.errors import ConfigError, UserError
from cpool_vision.inspect import SupportStatistics
from cpool_vision.reading import reason

from ..distributed.signals import StopRequested
from ..settings.train import TrackSettings
from .table import EpochTable, UpdateTable
from .track_services import MlflowTracker, ServiceRuns, TensorBoardTracker, WandbTracker, import_service

_logger = logging.getLogger(__name__)
SUPPORTS, UPDATES = 'supports.csv', 'updates.csv'


class Tracker(Protocol):
    """Records metrics of a run, on the first process. Called in the order of the run."""

    def log_update(self, update: int, epoch: int, values: Mapping[str, float]) -> None:
        """Records the values of a log line.

        Args:
            update: Updates since the start of the run.
            epoch: Current epoch.
            values: `loss` since the last log line, `lr`, and `images_per_sec`.
        """

    def log_epoch(self, row: Mapping[str, float], update: int, supports: Sequence[SupportStatistics]) -> None:
        """Records the metrics of a finished epoch.

        Args:
            row: The row of summary.csv.
            update: Updates since the start of the run.
            supports: One entry per context pool; empty if the epoch was not validated.
        """

    def close(self, failed: bool) -> None:
        """Finishes the record.

        Args:
            failed: Whether the run ended with an error.
        """


class CsvTracker:
    """Writes updates.csv and supports.csv in the run folder."""

    def __init__(self, folder: str, epoch: int, update: int) -> None:
        self.supports = EpochTable(os.path.join(folder, SUPPORTS))
        self.supports.trim(epoch)
        self.updates = UpdateTable(os.path.join(folder, UPDATES), epoch, update)

    def log_update(self, update: int, epoch: int, values: Mapping[str, float]) -> None:
        self.updates.add(update, epoch, values)

    def log_epoch(self, row: Mapping[str, float], update: int, supports: Sequence[SupportStatistics]) -> None:
        if supports:
            self.supports.add(int(row['epoch']), [each._asdict() for each in supports])

    def close(self, failed: bool) -> None:
        self.updates.close()


class Trackers:
    """Calls several trackers. Drops a service that fails, with a warning, and continues.

    Args:
        trackers: Trackers by their names in messages.
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
                _logger.warning('%s failed and will not record the rest of this run (%s: %s).', name,
                                type(error).__name__, reason(error, 300))
                del self.trackers[name]

    def log_update(self, update: int, epoch: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        self._each(lambda tracker: tracker.log_update(update, epoch, values))

    def log_epoch(self, row: Mapping[str, float], update: int, supports: Sequence[SupportStatistics]) -> None:
        """See `Tracker`."""
        self._each(lambda tracker: tracker.log_epoch(row, update, supports))

    def close(self, failed: bool) -> None:
        """See `Tracker`."""
        self._each(lambda tracker: tracker.close(failed))

    def __enter__(self) -> 'Trackers':
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None,
                 ) -> None:
        self.close(failed=kind is not None and not issubclass(kind, StopRequested))


def check_services(settings: TrackSettings) -> None:
    """Checks that the packages of the requested services are installed.

    Raises:
        ConfigError: If a package is missing, or if `--wandb-resume-id` is given without `--resume`.
    """
    if settings.log_wandb:
        if settings.wandb_resume_id and not settings.resume:
            raise ConfigError('--wandb-resume-id needs --resume: add it, or drop --wandb-resume-id')
        import_service('wandb')
    if settings.log_mlflow:
        import_service('mlflow')


def open_trackers(settings: TrackSettings, config: Mapping[str, object], folder: str, epoch: int, update: int,
                  continuing: bool) -> Trackers:
    """Opens the trackers of a run, on the first process.

    Args:
        settings: Settings of the services.
        config: All settings of the run, for the services.
        folder: Run folder.
        epoch: Epoch in which the run starts or continues.
        update: Updates since the start of the run.
        continuing: Whether the folder holds the earlier part of the run.

    Raises:
        ConfigError: If a service cannot be reached or its package is missing.
        OutputError: If a table cannot be written.
    """
    trackers: dict[str, Tracker] = {'CSV': CsvTracker(folder, epoch, update)}
    if not settings.no_tensorboard:
        board = TensorBoardTracker.open(folder, epoch, update)
        if board is not None:
            trackers['TensorBoard'] = board
    runs = ServiceRuns(folder, continuing)
    if settings.log_wandb:
        trackers['Weights & Biases'] = WandbTracker(import_service('wandb'), settings, config, folder, runs)
    if settings.log_mlflow:
        trackers['MLflow'] = MlflowTracker(import_service('mlflow'), config, folder, runs)
    return Trackers(trackers)
