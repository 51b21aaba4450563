"""Trackers for TensorBoard, Weights & Biases and MLflow; see `engine.tracking.track.Tracker`."""
import importlib
import json
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING

from cpool_vision.errors import ConfigError
from cpool_vision.files import write_text
from cpool_vision.inspect import SupportStatistics
from cpool_vision.reading import read_json, reason

from ..checkpoints.checkpoint import to_plain
from ..settings.train import TrackSettings

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_logger = logging.getLogger(__name__)
RECORD = 'tracking.json'


def support_scalars(supports: Sequence[SupportStatistics]) -> dict[str, float]:
    """Names the statistics `supports/LAYER/mean` and so on."""
    return {f'supports/{each.layer}/{name}': value for each in supports
            for name, value in each._asdict().items() if name != 'layer'}


class ServiceRuns:
    """Run IDs that services assigned, stored in the run folder so that a resumed run continues them.

    Args:
        folder: Run folder.
        continuing: Whether to read the IDs from the folder.

    Attributes:
        names: Run IDs by service.
    """

    def __init__(self, folder: str, continuing: bool) -> None:
        self.path = os.path.join(folder, RECORD)
        self.names: dict[str, str] = {}
        if continuing and os.path.exists(self.path):
            try:
                content = read_json(self.path)
                if not isinstance(content, dict):
                    raise ValueError('not a mapping')
                self.names = {str(key): str(value) for key, value in content.items()}
            except (OSError, ValueError) as error:
                _logger.warning('%s cannot be read (%s): services begin a new run.', self.path, reason(error))

    def keep(self, service: str, name: object) -> None:
        """Stores the run ID of a service."""
        if isinstance(name, str) and name and self.names.get(service) != name:
            self.names[service] = name
            write_text(self.path, json.dumps(self.names))


def _skip_writers(former: Callable[[threading.ExceptHookArgs], object], args: threading.ExceptHookArgs) -> None:
    if type(args.thread).__name__ != '_AsyncWriterThread':
        former(args)


def _quiet_writers() -> None:
    """Hides tracebacks of TensorBoard's writer threads; the next call of the writer raises the same error."""
    former = threading.excepthook
    if not (isinstance(former, partial) and former.func is _skip_writers):
        threading.excepthook = partial(_skip_writers, former)


class TensorBoardTracker:
    """Writes event files: tensorboard/updates by update, tensorboard/epochs by epoch.

    TensorBoard does not show the steps that a resumed run writes again, because they are purged.
    """

    def __init__(self, updates: 'SummaryWriter', epochs: 'SummaryWriter') -> None:
        self.updates, self.epochs = updates, epochs

    @classmethod
    def open(cls, folder: str, epoch: int, update: int) -> 'TensorBoardTracker | None':
        """Returns a tracker, or logs why TensorBoard cannot be used and returns None."""
        try:
            from torch.utils.tensorboard import SummaryWriter

            _quiet_writers()
            place = os.path.join(folder, 'tensorboard')
            return cls(SummaryWriter(os.path.join(place, 'updates'), purge_step=update + 1),
                       SummaryWriter(os.path.join(place, 'epochs'), purge_step=epoch))
        except Exception as error:
            why = 'is not installed (pip install tensorboard)' if isinstance(error, ImportError) else f'fails ({error})'
            _logger.info('TensorBoard %s: recording to CSV files only.', why)
            return None

    @staticmethod
    def _add(writer: 'SummaryWriter', values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()  # so that a kill loses nothing older than the last checkpoint

    def log_update(self, update: int, epoch: int, values: Mapping[str, float]) -> None:
        self._add(self.updates, values, update)

    def log_epoch(self, row: Mapping[str, float], update: int, supports: Sequence[SupportStatistics]) -> None:
        values = {key: value for key, value in row.items() if key != 'epoch'}
        self._add(self.epochs, {**values, **support_scalars(supports)}, int(row['epoch']))

    def close(self, failed: bool) -> None:
        self.updates.close()
        self.epochs.close()


def import_service(name: str) -> ModuleType:
    """Imports the package of a service, `wandb` or `mlflow`.

    Raises:
        ConfigError: If it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f'--log-{name} needs the package {name}: pip install {name}, or drop the flag') from error


class WandbTracker:
    """Logs to Weights & Biases by update. Skips steps that the continued run already has."""

    def __init__(self, wandb: ModuleType, settings: TrackSettings, config: Mapping[str, object], folder: str,
                 runs: ServiceRuns) -> None:
        self.wandb = wandb
        former = runs.names.get('wandb')
        try:
            run = wandb.init(
                project=settings.wandb_project,
                name=os.path.basename(folder),
                config=to_plain(config),
                tags=list(settings.wandb_tags),
                resume='must' if settings.wandb_resume_id else 'allow' if former else None,
                id=settings.wandb_resume_id or former or None,
            )
        except Exception as error:
            raise ConfigError(f'--log-wandb: no run can be started ({reason(error, 300)}): run '
                              'wandb login, or set WANDB_MODE=offline') from error
        runs.keep('wandb', getattr(run, 'id', None))
        self.first = int(getattr(run, 'step', 0) or 0)

    def _log(self, values: Mapping[str, float], update: int) -> None:
        if update >= self.first:
            self.wandb.log(dict(values), step=update)

    def log_update(self, update: int, epoch: int, values: Mapping[str, float]) -> None:
        self._log({f'update/{key}': value for key, value in values.items()}, update)

    def log_epoch(self, row: Mapping[str, float], update: int, supports: Sequence[SupportStatistics]) -> None:
        self._log({**row, **support_scalars(supports)}, update)

    def close(self, failed: bool) -> None:
        self.wandb.finish(exit_code=int(failed))


class MlflowTracker:
    """Logs to MLflow at MLFLOW_TRACKING_URI, experiment MLFLOW_EXPERIMENT_NAME. Skips steps that it already has."""

    def __init__(self, mlflow: ModuleType, config: Mapping[str, object], folder: str, runs: ServiceRuns) -> None:
        self.mlflow = mlflow
        self.last = {'update/loss': -1, 'train_loss': -1}
        former = runs.names.get('mlflow')
        try:
            if former:
                mlflow.start_run(run_id=former)
                client = mlflow.MlflowClient()
                for key in self.last:
                    steps = [metric.step for metric in client.get_metric_history(former, key)]
                    self.last[key] = max(steps, default=-1)
            else:
                run = mlflow.start_run(run_name=os.path.basename(folder))
                mlflow.log_params({key: str(to_plain(value))[:500] for key, value in config.items()})
                runs.keep('mlflow', run.info.run_id)
        except Exception as error:
            raise ConfigError(f'--log-mlflow: no run can be started ({reason(error, 300)}): check '
                              'MLFLOW_TRACKING_URI') from error

    def _log(self, values: Mapping[str, float], step: int, key: str) -> None:
        if step > self.last[key]:
            self.mlflow.log_metrics(dict(values), step=step)
            self.last[key] = step

    def log_update(self, update: int, epoch: int, values: Mapping[str, float]) -> None:
        self._log({f'update/{key}': value for key, value in values.items()}, update, 'update/loss')

    def log_epoch(self, row: Mapping[str, float], update: int, supports: Sequence[SupportStatistics]) -> None:
        self._log({**row, **support_scalars(supports)}, int(row['epoch']), 'train_loss')

    def close(self, failed: bool) -> None:
        self.mlflow.end_run(status='FAILED' if failed else 'FINISHED')
