"""Content of checkpoints of a training run, and which checkpoints are kept."""
import glob
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from timm.scheduler.plateau_lr import PlateauLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch.distributed.fsdp import FSDPModule

from cpool_vision.errors import CheckpointError
from cpool_vision.files import keep_former, link_atomic

from ..distributed.sharding import divide_like, divide_optimizer_state, gather_whole
from .checkpoint import describe_misfit, pick_weights, to_plain
from .progress import Progress
from .resume import EXTENSION, MILESTONE, PREVIOUS, RECOVERY, list_candidates, serial_of
from .seal import read_seal, save_sealed

_logger = logging.getLogger(__name__)
SCALER_KEY = 'amp_scaler'


@dataclass
class TrainState:
    """The state of a run that a checkpoint contains.

    Attributes:
        task: The model and its average.
        optimizer: The optimizer.
        loss_scaler: Loss scaler of float16 training, disabled otherwise.
        scheduler: The schedule, or None. Only `plateau` has state; other schedules follow from the epoch.
        args: The settings, stored as a plain dictionary.
        extra: More entries of the checkpoint, such as the progress inside an epoch.
    """

    task: TrainingTask
    optimizer: torch.optim.Optimizer
    loss_scaler: torch.amp.GradScaler
    scheduler: Scheduler | None = None
    args: Mapping[str, object] = field(default_factory=dict)
    extra: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._gathered: dict[str, object] | None = None

    def tensors(self) -> dict[str, object]:
        """Returns the model, the average and the optimizer state as this process holds them."""
        return {'optimizer': self.optimizer.state_dict(), **self.task.get_checkpoint_state(),
                **self.task.get_checkpoint_state(ema=True)}

    def gather(self, keep: bool) -> None:
        """Gathers the tensors that `--fsdp` shards, for the next checkpoint. Every process must call it.

        Args:
            keep: Whether this process writes the checkpoint.
        """
        if isinstance(self.task.get_trainable_module(), FSDPModule):
            self._gathered = {key: gather_whole(value, keep) for key, value in self.tensors().items()}

    def to_checkpoint(self, epoch: int) -> dict[str, object]:
        """Returns the content of a checkpoint in timm's format, version 2.

        Args:
            epoch: Last finished epoch, -1 for none.
        """
        content: dict[str, object] = {
            'epoch': int(epoch),
            'arch': str(self.args.get('model', '')),
            'version': 2,
            'args': to_plain(self.args),
            **self.extra,
        }
        content.update(self.tensors() if self._gathered is None else self._gathered)
        self._gathered = None  # frees as much memory as the model takes
        if self.loss_scaler.is_enabled():
            content[SCALER_KEY] = self.loss_scaler.state_dict()
        if isinstance(self.scheduler, PlateauLRScheduler):
            content['lr_scheduler'] = to_plain(self.scheduler.lr_scheduler.state_dict())
            content['lr_before_noise'] = to_plain(self.scheduler.restore_lr)
        return content

    def load_checkpoint(self, content: Mapping[str, object], path: str, weights_only: bool = False) -> int:
        """Restores the run. If the weights do not fit, nothing changes.

        Args:
            content: Dictionary of the checkpoint.
            path: Its file, for messages.
            weights_only: Whether to skip the state of optimizer, scaler and schedule (`--no-resume-opt`).

        Returns:
            The epoch to continue with.

        Raises:
            CheckpointError: If it belongs to another architecture, number of classes, or optimizer.
        """
        weights, _ = pick_weights(content, use_ema=False)
        self._load_weights(weights, content.get('task_state'), path, ema=False)
        if not weights_only:
            self._load_optimizer(content, path)
        epoch, version = content.get('epoch'), content.get('version')
        if not isinstance(epoch, int):
            return 0
        return epoch + (isinstance(version, int) and version > 1)

    def load_ema(self, content: Mapping[str, object], path: str) -> None:
        """Restores the average of the weights. Starts it from the plain weights if the checkpoint has no average."""
        weights, is_ema = pick_weights(content, use_ema=True)
        if not is_ema:
            _logger.warning('%s has no averaged weights: the average starts from its plain weights.', path)
        task_state = content.get('task_state_ema' if is_ema else 'task_state')
        self._load_weights(weights, task_state, path, ema=True)

    def _load_weights(self, weights: dict[str, torch.Tensor], task_state: object, path: str, ema: bool) -> None:
        model = unwrap_model(self.task.get_eval_model(ema=ema))
        expected = model.state_dict()
        misfit = describe_misfit(expected, weights)
        if misfit:
            raise CheckpointError(
                f'--resume {path!r} does not fit model {self.args.get("model", "")!r}: {misfit}; use the --model, '
                '--model-kwargs and --num-classes of the run that wrote it')
        weights = {name: divide_like(value, expected[name]) for name, value in weights.items()}
        self.task.load_checkpoint_state(weights, task_state if isinstance(task_state, dict) else None, ema=ema)

    def _load_optimizer(self, content: Mapping[str, object], path: str) -> None:
        optimizer, scaler, schedule = (content.get(key) for key in ('optimizer', SCALER_KEY, 'lr_scheduler'))
        if isinstance(optimizer, dict):
            try:
                self.optimizer.load_state_dict(divide_optimizer_state(self.optimizer, optimizer))
            except (ValueError, KeyError) as error:
                raise CheckpointError(f'--resume {path!r} comes from another optimizer ({error}): use its --opt, or '
                                      '--no-resume-opt') from error
        else:
            _logger.warning('%s has no optimizer state: the optimizer starts from scratch.', path)
        if self.loss_scaler.is_enabled() and isinstance(scaler, dict):
            self.loss_scaler.load_state_dict(scaler)
        if isinstance(self.scheduler, PlateauLRScheduler) and isinstance(schedule, dict):
            self.scheduler.lr_scheduler.load_state_dict(schedule)
            self.scheduler.restore_lr = content.get('lr_before_noise')  # type: ignore[assignment]


class CheckpointSaver:
    """Writes and prunes the checkpoints in a run folder.

    Writes `last`, `previous` (the former `last`), `checkpoint-EPOCH` for the best epochs, `model_best`, `milestone-N`
    and, inside epochs, `recovery-EPOCH-BATCH`. File names, keys and the order of the history are timm's. Unlike timm's
    saver, it removes a file only after its replacement is on disk, and keeps at least the two newest of `last`,
    `previous` and `recovery-` to resume from.

    Args:
        folder: Run folder.
        max_history: Number of `checkpoint-EPOCH` files to keep, the best ones.
        decreasing: Whether a lower metric is better.
    """

    def __init__(self, folder: str, max_history: int = 10, decreasing: bool = False) -> None:
        if max_history < 1:
            raise ValueError(f'max_history must be >= 1, got {max_history}')
        self.folder = folder
        self.max_history = max_history
        self.decreasing = decreasing
        self.files: list[tuple[str, float]] = []  # (file name, metric), best first
        self.best_metric: float | None = None
        self.best_epoch: int | None = None

    def path(self, stem: str) -> str:
        """Returns the path of `last`, `model_best`, `checkpoint-EPOCH` and so on."""
        return os.path.join(self.folder, stem + EXTENSION)

    def is_better(self, metric: float, than: float | None) -> bool:
        """Returns whether a metric is better than another. Everything but NaN is better than None; NaN never is."""
        if than is None:
            return metric == metric
        return metric < than if self.decreasing else metric > than

    def _history(self, files: list[tuple[str, float]]) -> dict[str, object]:
        return {
            'checkpoint_files': [list(entry) for entry in files],
            'best_metric': self.best_metric,
            'best_epoch': self.best_epoch,
        }

    def save(self, state: TrainState, epoch: int, metric: float, milestone: bool = False,
             ) -> tuple[float | None, int | None]:
        """Saves the state after an epoch and prunes the history.

        Args:
            state: State of the run.
            epoch: The finished epoch.
            metric: Metric that ranks the checkpoints.
            milestone: Whether to also keep the checkpoint as `milestone-N` after N epochs. It is never pruned.

        Returns:
            The best metric and its epoch.

        Raises:
            OutputError: If a file cannot be written. The old checkpoints are intact.
        """
        metric = float(metric)
        name = f'checkpoint-{epoch}{EXTENSION}'
        improved = self.is_better(metric, self.best_metric)
        if improved:
            self.best_metric, self.best_epoch = metric, int(epoch)
        files = [entry for entry in self.files if entry[0] != name] + [(name, metric)]
        files.sort(key=lambda entry: (entry[1] != entry[1], entry[1] if self.decreasing else -entry[1]))
        kept, dropped = files[:self.max_history], files[self.max_history:]

        content = {**state.to_checkpoint(epoch), 'metric': metric, 'saver': self._history(kept),
                   'milestone': milestone}
        with keep_former(self.path('last'), self.path(PREVIOUS)):
            save_sealed(self.path('last'), content, self._next_serial())
        if (name, metric) in kept:
            link_atomic(self.path('last'), os.path.join(self.folder, name))
        if milestone:
            link_atomic(self.path('last'), self.path(f'{MILESTONE}{epoch + 1}'))
        if improved:
            link_atomic(self.path('last'), self.path('model_best'))
        self.files = kept
        for old, _ in dropped:
            if old != name:
                self._remove(os.path.join(self.folder, old))
        self._prune()
        return self.best_metric, self.best_epoch

    def save_recovery(self, state: TrainState, progress: Progress) -> str:
        """Saves the state between two updates as `recovery-EPOCH-BATCH` and removes older such files.

        Returns:
            The path.

        Raises:
            OutputError: If the file cannot be written. The old checkpoints are intact.
        """
        path = self.path(f'{RECOVERY}{progress.epoch}-{progress.batch}')
        content = {**state.to_checkpoint(progress.epoch - 1), 'saver': self._history(self.files)}
        save_sealed(path, content, self._next_serial())
        self._prune()
        return path

    def _next_serial(self) -> int:
        return 1 + max((seal.serial for path in list_candidates(self.folder) if (seal := read_seal(path))), default=0)

    def _recoveries(self) -> list[str]:
        return glob.glob(os.path.join(glob.escape(self.folder), f'{RECOVERY}*{EXTENSION}'))

    def _prune(self) -> None:
        recoveries = self._recoveries()
        others = [path for path in map(self.path, ('last', PREVIOUS)) if os.path.exists(path)]
        newest = sorted([*others, *recoveries], key=serial_of, reverse=True)[:2]
        for path in recoveries:
            if path not in newest:
                self._remove(path)

    def finish(self) -> None:
        """Removes the `recovery-` files of a complete run, if `last` and `previous` exist."""
        if os.path.exists(self.path('last')) and os.path.exists(self.path(PREVIOUS)):
            for path in self._recoveries():
                self._remove(path)

    def _remove(self, path: str) -> None:
        try:
            os.remove(path)
        except OSError as error:
            _logger.warning('Old checkpoint %s cannot be removed (%s).', os.path.basename(path), error.strerror)

    def _complete(self, content: Mapping[str, object], history: list[str], best_epoch: int | None) -> None:
        """Links `last` to its other names, in case a kill after writing `last` prevented that."""
        last, epoch = self.path('last'), content.get('epoch')
        if not isinstance(epoch, int):
            return
        stems = [f'checkpoint-{epoch}'] if f'checkpoint-{epoch}{EXTENSION}' in history else []
        if content.get('milestone'):
            stems.append(f'{MILESTONE}{epoch + 1}')
        if best_epoch == epoch:
            stems.append('model_best')
        for target in map(self.path, stems):
            if not os.path.exists(target) or not os.path.samefile(last, target):
                link_atomic(last, target)

    def restore(self, content: Mapping[str, object], path: str = '') -> None:
        """Restores the history and the best metric from a checkpoint in this folder. Drops missing files.

        Args:
            content: Dictionary of the checkpoint.
            path: Its file. If it is `last`, completes a save that was killed after writing `last`.
        """
        saved = content.get('saver')
        if not isinstance(saved, dict):
            return
        files = [(os.path.basename(str(name)), metric) for name, metric in saved.get('checkpoint_files', [])]
        self.best_metric = saved.get('best_metric')
        self.best_epoch = saved.get('best_epoch')
        if os.path.realpath(path) == os.path.realpath(self.path('last')):
            self._complete(content, [name for name, _ in files], self.best_epoch)
        self.files = [(name, float(metric)) for name, metric in files
                      if metric is not None and os.path.exists(os.path.join(self.folder, name))]
