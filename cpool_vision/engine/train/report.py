"""Reports the progress of an epoch: loss, learning rate, throughput, and the time left."""
import logging
import os
import time

import torch
import torchvision.utils

from ..tracking.progress_bar import ProgressBar, format_time
from .run import Run

_logger = logging.getLogger(__name__)


def current_lr(optimizer: torch.optim.Optimizer) -> float:
    """Returns the mean learning rate over the parameter groups."""
    rates = [float(group['lr']) for group in optimizer.param_groups]
    return sum(rates) / len(rates)


class Reporter:
    """Times the batches of an epoch and logs its progress.

    Args:
        run: The run, before the epoch starts or continues.
        shown: Progress bar.
        epoch: The epoch.
    """

    def __init__(self, run: Run, shown: ProgressBar, epoch: int) -> None:
        self.run, self.shown, self.epoch = run, shown, epoch
        self._before = epoch * run.updates_per_epoch
        self._begun = self.updates
        self._started = self._reported = self._waited = time.perf_counter()
        self._waiting, self._images, self._recent_images = 0., 0, 0

    @property
    def updates(self) -> int:
        """Updates of this epoch so far."""
        return self.run.updates_before(self.run.progress) - self._before

    def wait_for_batch(self) -> None:
        """Starts to measure the time spent waiting for data."""
        self._waited = time.perf_counter()

    def begin_batch(self) -> None:
        """Stops measuring the waiting time: a batch is on the device."""
        self._waiting += time.perf_counter() - self._waited

    def end_batch(self, images: int) -> None:
        """Counts a batch of this process after its backward pass."""
        self._images += images * self.run.runtime.world_size
        self._recent_images += images * self.run.runtime.world_size
        self.shown.advance()

    def images_per_sec(self) -> float:
        """Returns the images per second of all processes since the epoch started or resumed."""
        return self._images / max(time.perf_counter() - self._started, 1e-9)

    def report(self, image: torch.Tensor, step: int, last: bool) -> None:
        """Logs the progress of the epoch if a report is due. Every process must call it.

        Args:
            image: The latest batch, for `--save-images`.
            step: Its number.
            last: Whether it is the last one of the epoch.
        """
        run, now = self.run, time.perf_counter()
        if not self.shown.due(self.updates - 1, last):
            return
        mean, recent = run.meter.read(run.runtime.distributed)
        done, rate = run.updates_before(run.progress), self._recent_images / max(now - self._reported, 1e-9)
        per_update = (now - self._started) / (self.updates - self._begun)
        left = format_time(per_update * (run.epochs * run.updates_per_epoch - done))
        lr, data_share = current_lr(run.optimizer), 100 * self._waiting / max(now - self._started, 1e-9)
        self.shown.report(
            _logger,
            f'Train: {self.epoch} [{self.updates:>4d}/{run.updates_per_epoch}]  loss {recent:.4f} (mean {mean:.4f})  '
            f'lr {lr:.3e}  {rate:.1f} img/s  data {data_share:.0f}%  left {left}',
            f'loss {recent:.4f} lr {lr:.2e} {rate:.0f} img/s, run {left} left')
        run.trackers.log_update(done, self.epoch, {'loss': recent, 'lr': lr, 'images_per_sec': rate})
        if run.settings.save_images and run.folder:
            torchvision.utils.save_image(
                image, os.path.join(run.folder, f'train-batch-{step}.jpg'), padding=0, normalize=True)
        self._reported, self._recent_images = now, 0
