"""What a checkpoint of a training run holds, and which of them are kept."""
import glob
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
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
    """Everything of a run that a checkpoint carries.

    Attributes:
        task: the model and its average.
        optimizer: its optimizer.
        loss_scaler: scaler of float16 training, inert otherwise.
        scheduler: timm scheduler, or None. Its progress follows from the epoch; only `plateau` has a memory.
        args: the settings, stored as a plain dictionary.
        extra: more entries of the checkpoint, such as the progress inside an epoch.
    """

    task: TrainingTask
    optimizer: torch.optim.Optimizer
    loss_scaler: torch.amp.GradScaler
    scheduler: Any = None
    args: dict[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._gathered: dict[str, Any] | None = None

    def tensors(self) -> dict[str, Any]:
        """Model, average and optimizer, as this process holds them."""
        return {'optimizer': self.optimizer.state_dict(), **self.task.get_checkpoint_state(),
                **self.task.get_checkpoint_state(ema=True)}

    def gather(self, keep: bool) -> None:
        """Makes whole what `--fsdp` divides, for the next checkpoint; every process must call it."""
        if isinstance(self.task.get_trainable_module(), FSDPModule):
            self._gathered = gather_whole(self.tensors(), keep)

    def to_checkpoint(self, epoch: int) -> dict[str, Any]:
        """Content of a checkpoint in timm's format (version 2: `epoch` is the last finished one, -1 for none)."""
        content: dict[str, Any] = {
            'epoch': int(epoch),
            'arch': str(self.args.get('model', '')),
            'version': 2,
            'args': to_plain(self.args),
            **self.extra,
        }
        content.update(self.tensors() if self._gathered is None else self._gathered)
        self._gathered = None  # as large as the model
        if self.loss_scaler.is_enabled():
            content[SCALER_KEY] = self.loss_scaler.state_dict()
        plateau = getattr(self.scheduler, 'lr_scheduler', None)
        if plateau is not None:
            content['lr_scheduler'] = {key: to_plain(value) for key, value in plateau.state_dict().items()}
            content['lr_before_noise'] = to_plain(self.scheduler.restore_lr)
        return content

    def load_checkpoint(self, content: dict[str, Any], path: str, weights_only: bool = False) -> int:
        """Restores the run; nothing is changed if the weights do not fit.

        Args:
            content: a checkpoint's dictionary.
            path: its file, for messages.
            weights_only: leave optimizer, scaler and schedule state out (`--no-resume-opt`).

        Returns:
            The epoch to continue with.

        Raises:
            CheckpointError: another architecture, class count or optimizer.
        """
        weights, _ = pick_weights(content, use_ema=False)
        self._load_weights(weights, content.get('task_state'), path, ema=False)
        if not weights_only:
            self._load_optimizer(content, path)
        epoch = content.get('epoch')
        if epoch is None:
            return 0
        return int(epoch) + (1 if content.get('version', 1) > 1 else 0)

    def load_ema(self, content: dict[str, Any], path: str) -> None:
        """Restores the average, from the plain weights if the checkpoint has no average."""
        weights, is_ema = pick_weights(content, use_ema=True)
        if not is_ema:
            _logger.warning('%s has no averaged weights: the average starts from its plain weights.', path)
        task_state = content.get('task_state_ema' if is_ema else 'task_state')
        self._load_weights(weights, task_state, path, ema=True)

    def _load_weights(self, weights: dict[str, torch.Tensor], task_state: Any, path: str, ema: bool) -> None:
        model = unwrap_model(self.task.get_eval_model(ema=ema))
        expected = model.state_dict()
        misfit = describe_misfit(expected, weights)
        if misfit:
            raise CheckpointError(
                f'--resume {path!r} does not fit model {self.args.get("model", "")!r}: {misfit}; use the --model, '
                '--model-kwargs and --num-classes of the run that wrote it')
        weights = {name: divide_like(value, expected[name]) for name, value in weights.items()}
        self.task.load_checkpoint_state(weights, task_state, ema=ema)

    def _load_optimizer(self, content: dict[str, Any], path: str) -> None:
        if 'optimizer' in content:
            try:
                self.optimizer.load_state_dict(divide_optimizer_state(self.optimizer, content['optimizer']))
            except (ValueError, KeyError) as error:
                raise CheckpointError(f'--resume {path!r} comes from another optimizer ({error}): use its --opt, or '
                                      '--no-resume-opt') from error
        else:
            _logger.warning('%s has no optimizer state: the optimizer starts from scratch.', path)
        if self.loss_scaler.is_enabled() and SCALER_KEY in content:
            self.loss_scaler.load_state_dict(content[SCALER_KEY])
        plateau = getattr(self.scheduler, 'lr_scheduler', None)
        if plateau is not None and 'lr_scheduler' in content:
            plateau.load_state_dict(content['lr_scheduler'])
            self.scheduler.restore_lr = content.get('lr_before_noise')


class CheckpointSaver:
    """Writes `last`, `checkpoint-EPOCH` for the best epochs, `model_best`, `milestone-N` and, inside epochs,
    `recovery-EPOCH-BATCH`.

    File names, keys and the order of the history are timm's. Unlike timm's saver it never unlinks a file before its
    replacement stands on disk, and of the files to resume from (`last`, the one before it as `previous`, `recovery-`)
    at least the newest two stay.

    Args:
        folder: run folder.
        max_history: numbered checkpoints to keep, best first.
        decreasing: a lower metric is better.
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
        """Path of `last`, `model_best`, `checkpoint-EPOCH` and so on."""
        return os.path.join(self.folder, stem + EXTENSION)

    def is_better(self, metric: float, than: float | None) -> bool:
        """Whether a metric beats another; anything beats None, and NaN beats nothing."""
        if than is None:
            return metric == metric
        return metric < than if self.decreasing else metric > than

    def _history(self, files: list[tuple[str, float]]) -> dict[str, Any]:
        return {
            'checkpoint_files': [list(entry) for entry in files],
            'best_metric': self.best_metric,
            'best_epoch': self.best_epoch,
        }

    def save(self, state: TrainState, epoch: int, metric: float, milestone: bool = False,
             ) -> tuple[float | None, int | None]:
        """Saves the state after an epoch and prunes the history.

        Args:
            state: the run.
            epoch: the epoch just finished.
            metric: what checkpoints are ranked by.
            milestone: keep it as `milestone-N`, too, N the epochs done; the history never drops that.

        Returns:
            Best metric and its epoch.

        Raises:
            OutputError: a file cannot be written; the former checkpoints are intact.
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
        """Saves the state between two updates and removes older such files.

        Returns:
            The path.

        Raises:
            OutputError: the file cannot be written; the former checkpoints are intact.
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
        """Removes the files from inside epochs when the run is complete and two whole checkpoints stand."""
        if os.path.exists(self.path('last')) and os.path.exists(self.path(PREVIOUS)):
            for path in self._recoveries():
                self._remove(path)

    def _remove(self, path: str) -> None:
        try:
            os.remove(path)
        except OSError as error:
            _logger.warning('Old checkpoint %s cannot be removed (%s).', os.path.basename(path), error.strerror)

    def _complete(self, content: dict[str, Any], saved: dict[str, Any]) -> None:
        """Gives `last` the further names that a kill right after it was written kept it from getting."""
        last, epoch = self.path('last'), content.get('epoch')
        name = f'checkpoint-{epoch}{EXTENSION}'
        names = [name] if any(entry[0] == name for entry in saved.get('checkpoint_files', [])) else []
        if content.get('milestone') and epoch is not None:
            names.append(f'{MILESTONE}{epoch + 1}{EXTENSION}')
        if saved.get('best_epoch') == epoch:
            names.append(f'model_best{EXTENSION}')
        for target in (os.path.join(self.folder, each) for each in names):
            if not os.path.exists(target) or not os.path.samefile(last, target):
                link_atomic(last, target)

    def restore(self, content: dict[str, Any], path: str = '') -> None:
        """Takes over history and best metric from a checkpoint of this folder; lost files are forgotten.

        Args:
            content: its dictionary.
            path: its file; what a kill left undone after writing `last` is made up for.
        """
        saved = content.get('saver')
        if not isinstance(saved, dict):
            return
        if os.path.realpath(path) == os.path.realpath(self.path('last')):
            self._complete(content, saved)
        self.files = [
            (os.path.basename(str(name)), float(metric)) for name, metric in saved.get('checkpoint_files', [])
            if metric is not None and os.path.exists(os.path.join(self.folder, os.path.basename(str(name))))
        ]
        self.best_metric = saved.get('best_metric')
        self.best_epoch = saved.get('best_epoch')
