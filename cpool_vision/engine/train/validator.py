"""Validates the model and its average after an epoch."""
import logging

import torch.nn as nn
from timm import utils
from timm.task import TrainingTask

from cpool_vision.inspect import SupportStatistics

from ..data.multi_label import Classes
from ..data.stream import Loader
from ..data.unreadable import refuse_unreadable
from ..device import Runtime, settle_threads
from ..distributed.sharding import validated_model
from ..settings.shared import DataSettings
from ..settings.train import TrainSettings
from ..tracking.support_log import keep_first_input, measure_supports
from ..validate.evaluate import Evaluation, evaluate
from ..validate.metrics import Tally
from ..validate.multi_label import LabelTally

_logger = logging.getLogger(__name__)


def columns_of(settings: DataSettings) -> tuple[str, ...]:
    """Returns the names of the validation metrics in summary.csv, without `eval_`."""
    return (LabelTally if settings.multi_label else Tally).columns


def average_statistics(settings: TrainSettings, runtime: Runtime, model: nn.Module | None) -> None:
    """Synchronizes batch norm statistics between processes as `--dist-bn` says. Not needed with `--sync-bn`."""
    if runtime.distributed and settings.dist_bn and not settings.sync_bn:
        utils.distribute_bn(model, runtime.world_size, settings.dist_bn == 'reduce')


class Validator:
    """Validates a run on its validation split.

    Args:
        settings: Settings of the run.
        runtime: Device and process of the run.
        classes: Classes of the run.
        loader: Batches of the split.
        model: The model, without DDP.
    """

    def __init__(self, settings: TrainSettings, runtime: Runtime, classes: Classes, loader: Loader, model: nn.Module,
                 ) -> None:
        self.settings, self.runtime, self.classes = settings, runtime, classes
        self.loader, self.model = loader, model

    def _evaluate(self, model: nn.Module, title: str) -> Evaluation:
        settings, runtime = self.settings, self.runtime
        tally = LabelTally(runtime.device, self.classes.count, settings.threshold) if settings.multi_label \
            else Tally(runtime.device)
        return evaluate(
            model, self.loader, runtime, prefetched=not settings.no_prefetcher, channels_last=settings.channels_last,
            log_interval=settings.log_interval, title=title, views=settings.tta, tally=tally)

    def measure(self, task: TrainingTask) -> tuple[Evaluation, list[SupportStatistics]]:
        """Validates the model and, if there is one, its average. Every process must call it.

        Returns:
            Metrics and support statistics of the average or, without one, of the model.
        """
        settings, runtime, measured = self.settings, self.runtime, self.model
        settle_threads(runtime.distributed)
        with keep_first_input(measured) as images:
            result = self._evaluate(measured, 'Validate')
        if task.has_ema() and not settings.model_ema_force_cpu:
            name = 'map' if settings.multi_label else 'top1'
            _logger.info('Without averaging: loss %.4f  %s %.3f', result.metrics['loss'], name, result.metrics[name])
            average_statistics(settings, runtime, task.get_trainable_module(ema=True))
            measured = validated_model(task, ema=True)
            result = self._evaluate(measured, 'Validate average')
        if images and (runtime.primary or settings.fsdp):
            return result, measure_supports(measured, images[0], runtime.precision)
        return result, []

    def refuse_unreadable(self, result: Evaluation) -> None:
        """Checks that the split has no more unreadable images than `--max-bad-samples` allows.

        Raises:
            DatasetError: If it has.
        """
        total = int(result.metrics['images'] + result.metrics['unreadable'])
        refuse_unreadable(self.loader.dataset, result.unreadable_positions, total, self.settings.max_bad_samples)
