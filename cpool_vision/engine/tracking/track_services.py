"""TensorBoard, Weights & Biases and MLflow behind the interface of `engine.tracking.track`."""
import json
import logging
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from cpool_vision.errors import ConfigError
from cpool_vision.files import write_text
from cpool_vision.inspect import SupportStatistics
from cpool_vision.reading import read_json, reason

from ..checkpoints.checkpoint import to_plain
from ..settings.train import TrackSettings

_logger = logging.getLogger(__name__)
RECORD = 'tracking.json'


def support_scalars(supports: Sequence[SupportStatistics]) -> dict[str, float]:
    """The statistics as `supports/LAYER/mean` and so on."""
    return {f'supports/{each.layer}/{name}': value for each in supports
            for name, value in each._asdict().items() if name != 'layer'}


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    return {key: value for key, value in row.items() if isinstance(value, (int, float))}


class ServiceRuns:
    """Names of the runs that services gave, kept in the run folder so that a resumed run continues them.

    Args:
        folder: the run folder.
        continuing: whether to continue those that the folder names.
    """

    def __init__(self, folder: str, continuing: bool) -> None:
        self.path = os.path.join(folder, RECORD)
        self.names: dict[str, str] = {}
        if continuing and os.path.exists(self.path):
            try:
                self.names = {str(key): str(value) for key, value in read_json(self.path).items()}
            except (OSError, ValueError, AttributeError) as error:
                _logger.warning('%s cannot be read (%s): services begin a new run.', self.path, reason(error))

    def get(self, service: str) -> str:
        """Name of the run to continue, '' if there is none."""
        return self.names.get(service, '')

    def keep(self, service: str, name: Any) -> None:
        """Notes the name of a run."""
        if isinstance(name, str) and name and self.names.get(service) != name:
            self.names[service] = name
            write_text(self.path, json.dumps(self.names))


def _quiet_writers() -> None:
    """Keeps TensorBoard's writing threads from printing their traceback, as the next call raises the same error."""
    former = threading.excepthook
    if getattr(former, 'is_quiet', False):
        return

    def hook(args: Any) -> None:
        if type(args.thread).__name__ != '_AsyncWriterThread':
            former(args)

    hook.is_quiet = True  # type: ignore[attr-defined]
    threading.excepthook = hook


class TensorBoardTracker:
    """Event files in tensorboard/updates, by update, and tensorboard/epochs, by epoch.

    What a resumed run will write again is marked as void, which TensorBoard obeys.
    """

    def __init__(self, updates: Any, epochs: Any) -> None:
        self.updates, self.epochs = updates, epochs

    @classmethod
    def open(cls, folder: str, epoch: int, update: int) -> 'TensorBoardTracker | None':
        """The tracker, or None and a line in the log where TensorBoard cannot be used."""
        try:
            from torch.utils.tensorboard import SummaryWriter

            _quiet_writers()
            place = os.path.join(folder, 'tensorboard')
            return cls(SummaryWriter(os.path.join(place, 'updates'), purge_step=update + 1),
                       SummaryWriter(os.path.join(place, 'epochs'), purge_step=epoch))
        except Exception as error:
            why = 'is not installed (pip install tensorboard)' if isinstance(error, ImportError) else f'fails ({error})'
            _logger.info('TensorBoard %s: curves go to CSV files only.', why)
            return None

    @staticmethod
    def _add(writer: Any, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()  # a kill must not lose what is older than the last checkpoint

    def log_update(self, update: int, epoch: int, values: Mapping[str, float]) -> None:
        self._add(self.updates, values, update)

    def log_epoch(self, row: Mapping[str, Any], update: int, supports: Sequence[SupportStatistics]) -> None:
        values = {key: value for key, value in _numbers(row).items() if key != 'epoch'}
        self._add(self.epochs, {**values, **support_scalars(supports)}, int(row['epoch']))

    def close(self, failed: bool) -> None:
        self.updates.close()
        self.epochs.close()


def import_wandb(settings: TrackSettings) -> Any:
    """The module of Weights & Biases for `--log-wandb`, None if not asked for.

    Raises:
        ConfigError: it is not installed, or a run to continue is named without `--resume`.
    """
    if not settings.log_wandb:
        return None
    if settings.wandb_resume_id and not settings.resume:
        raise ConfigError('--wandb-resume-id needs --resume: add it, or leave the id out')
    try:
        import wandb
    except ImportError as error:
        raise ConfigError('--log-wandb needs the package wandb: pip install wandb, or drop the flag') from error
    return wandb


class WandbTracker:
    """A run of Weights & Biases; its step is the number of updates, and steps that it has already are left out."""

    def __init__(self, wandb: Any, settings: TrackSettings, config: Mapping[str, Any], folder: str,
                 runs: ServiceRuns) -> None:
        self.wandb = wandb
        former = runs.get('wandb')
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
            raise ConfigError(f'--log-wandb: no run can be started ({" ".join(str(error).split())[:300]}): log in by '
                              'wandb login, or set WANDB_MODE=offline') from error
        runs.keep('wandb', getattr(run, 'id', None))
        self.first = int(getattr(run, 'step', 0) or 0)

    def _log(self, values: Mapping[str, Any], update: int) -> None:
        if update >= self.first:
            self.wandb.log(dict(values), step=update)

    def log_update(self, update: int, epoch: int, values: Mapping[str, float]) -> None:
        self._log({f'update/{key}': value for key, value in values.items()}, update)

    def log_epoch(self, row: Mapping[str, Any], update: int, supports: Sequence[SupportStatistics]) -> None:
        self._log({**row, **support_scalars(supports)}, update)

    def close(self, failed: bool) -> None:
        self.wandb.finish(exit_code=int(failed))


def import_mlflow(settings: TrackSettings) -> Any:
    """The module of MLflow for `--log-mlflow`, None if not asked for.

    Raises:
        ConfigError: it is not installed.
    """
    if not settings.log_mlflow:
        return None
    try:
        import mlflow
    except ImportError as error:
        raise ConfigError('--log-mlflow needs the package mlflow: pip install mlflow, or drop the flag') from error
    return mlflow


class MlflowTracker:
    """A run of MLflow, at MLFLOW_TRACKING_URI in MLFLOW_EXPERIMENT_NAME; steps that it has already are left out."""

    def __init__(self, mlflow: Any, config: Mapping[str, Any], folder: str, runs: ServiceRuns) -> None:
        self.mlflow = mlflow
        self.last = {'update/loss': -1, 'train_loss': -1}
        former = runs.get('mlflow')
        try:
            if former:
                mlflow.start_run(run_id=former)
                client = mlflow.MlflowClient()
                for key in self.last:
                    steps = [metric.step for metric in client.get_metric_history(former, key)]
                    self.last[key] = max(steps, default=-1)
            else:
                run = mlflow.start_run(run_name=os.path.basename(folder))
                mlflow.log_params({key: str(value)[:500] for key, value in to_plain(config).items()})
                runs.keep('mlflow', run.info.run_id)
        except Exception as error:
            raise ConfigError(f'--log-mlflow: no run can be started ({" ".join(str(error).split())[:300]}): check '
                              'MLFLOW_TRACKING_URI') from error

    def _log(self, values: Mapping[str, float], step: int, key: str) -> None:
        if step > self.last[key]:
            self.mlflow.log_metrics(dict(values), step=step)
            self.last[key] = step

    def log_update(self, update: int, epoch: int, values: Mapping[str, float]) -> None:
        self._log({f'update/{key}': value for key, value in values.items()}, update, 'update/loss')

    def log_epoch(self, row: Mapping[str, Any], update: int, supports: Sequence[SupportStatistics]) -> None:
        self._log({**_numbers(row), **support_scalars(supports)}, int(row['epoch']), 'train_loss')

    def close(self, failed: bool) -> None:
        self.mlflow.end_run(status='FAILED' if failed else 'FINISHED')
