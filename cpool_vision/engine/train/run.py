"""The components and the progress of a training run."""
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from timm.data import Mixup
from timm.scheduler.scheduler import Scheduler
from timm.task import TrainingTask

from ..checkpoints.progress import Progress
from ..checkpoints.saver import CheckpointSaver
from ..data.fingerprint import Fingerprint
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
    """Returns the number of optimizer updates for `batches` batches if `accum_steps` of them share an update."""
    return -(-batches // accum_steps)


@dataclass
class Run:
    """The components and the progress of a training run.

    Attributes:
        settings: Settings of the run.
        runtime: Device and process of the run.
        task: Computes the loss.
        optimizer: Updates the parameters of the task.
        loader: Training batches.
        scheduler: Learning rate schedule, or None.
        epochs: Number of epochs, including cooldown.
        mixup_fn: Mixes a batch if the loader does not.
        mean_batch: Mean number of images per batch, for `--variable-batch-loss-scale`.
        folder: Run folder on the first process, '' elsewhere.
        progress: Progress of the run.
        after_update: Called after each update with the updates of the epoch so far, whether it was the last one, and
            the verdict on it.
        after_epoch: Called after each epoch with the metric that ranks it (None without validation) and whether it is
            the last epoch.
        metric: Metric that ranks the epochs.
        data: Fingerprint of the training set, for checkpoints, on the first process.
        validator: Validates an epoch; None without a validation split.
        record: Run folder on the first process, None elsewhere.
        saver: Writes checkpoints on the first process, None elsewhere.
        trackers: Record the metrics.
        loss_scaler: Loss scaler of float16 training, disabled otherwise.
        meter: Mean loss of the epoch so far.
        vote: Lets the processes agree on each update.
        signals: Stop signals that this process received.
        warmed_up: Whether DDP has built its final gradient buckets.
    """

    settings: TrainSettings
    runtime: Runtime
    task: TrainingTask
    optimizer: torch.optim.Optimizer
    loader: Loader
    scheduler: Scheduler | None = None
    epochs: int = 1
    mixup_fn: Mixup | None = None
    mean_batch: float = 1.
    folder: str = ''
    progress: Progress = Progress()
    after_update: Callable[[int, bool, Verdict], None] = lambda *_: None
    after_epoch: Callable[[float | None, bool], None] = lambda *_: None
    metric: str = 'loss'
    data: Fingerprint | None = None
    validator: Validator | None = None
    record: RunFolder | None = None
    saver: CheckpointSaver | None = None
    trackers: Trackers = field(default_factory=lambda: Trackers({}))
    loss_scaler: torch.amp.GradScaler = field(init=False)
    meter: LossMeter = field(init=False)
    vote: Vote = field(init=False)
    signals: StopSignals | None = None
    warmed_up: bool = False

    def __post_init__(self) -> None:
        self.loss_scaler = self.runtime.precision.loss_scaler()
        self.meter = LossMeter(self.runtime.device)
        self.vote = Vote(self.runtime.device, self.runtime.distributed, self.signals)

    @property
    def end(self) -> int:
        """The first epoch that this call does not train: `epochs`, or `--stop-epoch` if it is smaller."""
        return min(self.epochs, self.settings.stop_epoch or self.epochs)

    @property
    def updates_per_epoch(self) -> int:
        """Optimizer updates per epoch: ceil(batches / accumulation steps)."""
        return count_updates(len(self.loader), self.settings.grad_accum_steps)

    def updates_before(self, progress: Progress) -> int:
        """Returns the optimizer updates from the start of the run up to `progress`, including skipped ones."""
        return progress.epoch * self.updates_per_epoch + count_updates(
            progress.batch, self.settings.grad_accum_steps)

    def enter(self, epoch: int) -> None:
        """Starts an epoch. Does nothing if the run resumes inside it."""
        if self.progress.epoch != epoch:
            self.progress = Progress(epoch, 0, 0, self.progress.skipped_before + self.progress.skipped)
        if not self.progress.batch:
            self.meter.clear()
