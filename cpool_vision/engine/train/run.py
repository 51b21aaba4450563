"""A training run: the components that its epochs use, and its progress."""
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.data import Mixup
from timm.task import TrainingTask

from ..checkpoints.progress import Progress
from ..checkpoints.saver import CheckpointSaver
from ..data.stream import Loader
from ..device import Runtime
from ..distributed.signals import StopSignals
from ..distributed.vote import Verdict, Vote
from ..settings.train import TrainSettings
from ..tracking.meter import LossMeter
from ..tracking.run_folder import RunFolder
from ..tracking.track import Trackers
from .validator import Validator


def count_updates(batches: int, accum_steps: int) -> int:
    """Optimizer updates that an epoch of `batches` makes when `accum_steps` of them share an update."""
    return -(-batches // accum_steps)


@dataclass
class Run:
    """The components that an epoch uses.

    Attributes:
        settings: what was asked for.
        runtime: where to compute.
        task: computes the loss.
        optimizer: updates the task's parameters.
        loader: training batches.
        scheduler: timm scheduler, or None.
        epochs: how many there are, for the estimate of the time left.
        mixup_fn: mixes a batch where the loader does not.
        mean_batch: mean images per batch, to which `--variable-batch-loss-scale` refers.
        folder: run folder on the first process, '' elsewhere.
        progress: how far the run is.
        on_report: called at each log line with the updates made so far, the epoch, and the figures.
        after_update: called between updates with how many the epoch has had, whether that was the last one, and the
            verdict on it.
        after_epoch: called once an epoch is trained and validated, with what the epoch is ranked by (None if it was
            not validated) and whether it is the last one.
        metric: what epochs are ranked by.
        validator: validates an epoch; None without a validation split.
        record, saver: run folder and checkpoints on the first process, None elsewhere.
        trackers: what records the figures.
        loss_scaler: scaler of float16 training, inert otherwise.
        meter: loss of the epoch so far.
        vote: what the processes agree on before an update.
        data: `fingerprint` of the training set on the first process, for the checkpoints.
        signals: those that ask the run to stop, as this process received them.
        rehearsed: whether `_rehearse` is done.
    """

    settings: TrainSettings
    runtime: Runtime
    task: TrainingTask
    optimizer: torch.optim.Optimizer
    loader: Loader
    scheduler: Any = None
    epochs: int = 1
    mixup_fn: Mixup | None = None
    mean_batch: float = 1.
    folder: str = ''
    progress: Progress = Progress()
    on_report: Callable[[int, int, dict[str, float]], None] = lambda *_: None
    after_update: Callable[[int, bool, Verdict], None] = lambda *_: None
    after_epoch: Callable[[float | None, bool], None] = lambda *_: None
    metric: str = 'loss'
    data: dict[str, Any] | None = None
    validator: Validator | None = None
    record: RunFolder | None = None
    saver: CheckpointSaver | None = None
    trackers: Trackers = field(default_factory=lambda: Trackers({}))
    loss_scaler: torch.amp.GradScaler = field(init=False)
    meter: LossMeter = field(init=False)
    vote: Vote = field(init=False)
    signals: StopSignals | None = None
    rehearsed: bool = False

    def __post_init__(self) -> None:
        self.loss_scaler = self.runtime.precision.loss_scaler()
        self.meter = LossMeter(self.runtime.device)
        self.vote = Vote(self.runtime.device, self.runtime.distributed, self.signals)

    @property
    def end(self) -> int:
        """The epoch before which this call ends: `epochs`, or `--stop-epoch` where that comes first."""
        return min(self.epochs, self.settings.stop_epoch or self.epochs)

    @property
    def updates_per_epoch(self) -> int:
        """Optimizer updates per epoch: ceil(batches / accumulation)."""
        return count_updates(len(self.loader), self.settings.grad_accum_steps)

    def updates_before(self, progress: Progress) -> int:
        """Optimizer updates from the start of the run up to `progress`, including skipped ones."""
        return progress.epoch * self.updates_per_epoch + count_updates(
            progress.batch, self.settings.grad_accum_steps)

    def enter(self, epoch: int) -> None:
        """Begins an epoch, unless the run stands inside it already."""
        if self.progress.epoch != epoch:
            self.progress = Progress(epoch, 0, 0, self.progress.skipped_before + self.progress.skipped)
        if not self.progress.batch:
            self.meter.clear()
