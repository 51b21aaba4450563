"""One pass of a model over a loader, each image counted once, whatever the number of processes."""
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed
import torch.nn as nn
from timm.task import evaluation_sample_limit

from cpool_vision.errors import ConfigError, DatasetError

from ..data.multi_label import unreadable_rows
from ..data.stream import Loader
from ..device import Precision, Runtime
from ..tracking.progress_bar import ProgressBar
from .metrics import Tally

_logger = logging.getLogger(__name__)


@dataclass
class Evaluation:
    """What `evaluate` measured.

    Attributes:
        metrics: see `metrics.Tally.compute`.
        images_per_sec: throughput of this process, loading included.
        unreadable_positions: numbers of images that could not be decoded; those of all processes if distributed.
    """

    metrics: dict[str, float]
    images_per_sec: float
    unreadable_positions: list[int] = field(default_factory=list)


class Rows:
    """Which rows of this process's batches are images, and which they are in the dataset.

    Process r of W has the images r, r + W, ... and then padding, as timm's `OrderedDistributedSampler` gives them out.

    Args:
        loader: the loader.
        distributed: whether other processes share the dataset.

    Attributes:
        numbers: of the images so far.
    """

    def __init__(self, loader: Loader, distributed: bool = False) -> None:
        self.limit = evaluation_sample_limit(loader)
        self.distributed = distributed
        self.rank, self.world_size = 0, 1
        if distributed:
            self.rank, self.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.seen = 0
        self.numbers: list[int] = []
        self._unreadable: list[torch.Tensor] = []

    def take(self, target: torch.Tensor) -> list[int]:
        """Numbers of the images in the rows of a batch; those after them are padding."""
        first, self.seen = self.seen, self.seen + len(target)
        last = self.seen if self.limit is None else min(self.seen, self.limit)
        positions = [self.rank + row * self.world_size for row in range(first, last)]
        self.numbers += positions
        self._unreadable.append(unreadable_rows(target[:len(positions)]))
        return positions

    def unreadable(self) -> list[int]:
        """Numbers of the images of all processes that could not be decoded; every process must call it."""
        rows = torch.cat(self._unreadable).nonzero().flatten().tolist() if self._unreadable else []
        return gather_numbers([self.numbers[row] for row in rows], self.distributed)


def first_output(output: Any) -> torch.Tensor:
    """Logits of models that return several heads."""
    return output[0] if isinstance(output, (tuple, list)) else output


def check_views(views: int, naflex: bool = False) -> None:
    """Raises `ConfigError` unless `--tta` can be done."""
    if views not in (0, 1, 2):
        raise ConfigError(f'--tta {views}: 0 and 1 mean the image alone, 2 the mean of it and its mirror image')
    if views == 2 and naflex:
        raise ConfigError('--tta mirrors whole images, of which --naflex-loader keeps none: drop one of them')


def predict(model: nn.Module, image: Any, precision: Precision, views: int = 0) -> torch.Tensor:
    """Logits `(B, C)`; with 2 views their fp32 mean over images `(B, C, H, W)` and mirror images."""
    with precision.autocast():
        output = first_output(model(image))
        if views != 2:
            return output
        mirrored = first_output(model(image.flip(-1)))
    return (output.float() + mirrored.float()) / 2


def fill_batch(image: Any, size: int) -> Any:
    """A batch of `size`, missing rows being copies of the first: kernels are chosen, and round, by the size of a batch.

    Args:
        image: images (B, C, H, W) or a dictionary of tensors (B, ...) and other values; B >= 1.
        size: what to fill up to; a larger batch stays as it is.
    """
    if isinstance(image, dict):
        return {name: fill_batch(part, size) for name, part in image.items()}
    if not isinstance(image, torch.Tensor):
        return image
    missing = size - len(image)
    return torch.cat([image, image[:1].expand(missing, *image.shape[1:])]) if missing > 0 else image


def _prepare(image: Any, target: torch.Tensor, runtime: Runtime, prefetched: bool, channels_last: bool, fill: int,
             ) -> tuple[Any, torch.Tensor]:
    if not prefetched:
        image = image.to(device=runtime.device, dtype=runtime.precision.model_dtype)
        target = target.to(device=runtime.device)
    image = fill_batch(image, fill)
    return image.contiguous(memory_format=torch.channels_last) if channels_last else image, target


def gather_numbers(numbers: list[int], distributed: bool) -> list[int]:
    """Sorted union of the integers of all processes; every process must call it."""
    if not distributed:
        return sorted(numbers)
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, numbers)
    return sorted({number for part in parts for number in part})


@torch.inference_mode()
def evaluate(
        model: nn.Module,
        loader: Loader,
        runtime: Runtime,
        *,
        prefetched: bool = True,
        channels_last: bool = False,
        log_interval: int = 50,
        title: str = 'Validate',
        valid_labels: list[int] | None = None,
        views: int = 0,
        fill: int = 0,
        tally: Tally | None = None,
        on_batch: Callable[[torch.Tensor, torch.Tensor, list[int]], None] | None = None,
) -> Evaluation:
    """Runs a model over a loader; every image counts once.

    Args:
        model: maps images (B, C, H, W) to logits (B, classes); left in eval mode.
        loader: yields images and targets, class indices or what `tally` takes.
        runtime: where to compute; the counts of all its processes are added.
        prefetched: the loader puts normalized images on the device itself.
        channels_last: layout of the images.
        log_interval, title: batches between log lines, and their text.
        valid_labels: outputs that compete; targets are positions in this list.
        views: 2 to average the logits of each image and its mirror image.
        fill: size that every batch is filled up to, so that an image gives the same logits in whichever it is.
        tally: takes the metrics; a plain `Tally` if None.
        on_batch: called with logits and targets of each batch and the numbers of its images, padding left out.

    Raises:
        DatasetError: images without a label, or with one that is not a class.
    """
    model.eval()
    tally = tally or Tally(runtime.device)
    rows, total, start = Rows(loader, runtime.distributed), len(loader), time.perf_counter()
    with ProgressBar(total, title, runtime.primary, log_interval) as shown:
        for step, (image, target) in enumerate(loader):
            image, target = _prepare(image, target, runtime, prefetched, channels_last, fill)
            output = predict(model, image, runtime.precision, views)
            positions = rows.take(target)
            output, target = output[:len(positions)], target[:len(positions)]
            if valid_labels is not None:
                output = output[:, valid_labels]
            if on_batch is not None:
                on_batch(output, target, positions)
            tally.update(output, target)
            shown.advance()
            if runtime.primary and shown.due(step, step == total - 1):
                line, short = tally.headline()
                rate = len(rows.numbers) / (time.perf_counter() - start)
                shown.report(_logger, f'{title}: [{step + 1:>4d}/{total}]  {line}  {rate:.1f} img/s', short)
    if runtime.device.type == 'cuda':
        torch.cuda.synchronize(runtime.device)
    images_per_sec = len(rows.numbers) / max(time.perf_counter() - start, 1e-9)
    metrics = tally.compute_over_processes() if runtime.distributed else tally.compute()
    _check(metrics, title, runtime.primary)
    return Evaluation(metrics, images_per_sec, rows.unreadable())


def _check(metrics: dict[str, float], title: str, primary: bool) -> None:
    """Refuses images without a class, and warns of logits that are not finite."""
    if metrics.get('unlabeled'):
        raise DatasetError(f'{metrics["unlabeled"]} images are labeled with none of the classes that compete: check '
                           '--num-classes and --class-map, or whether the split has labels')
    if primary and metrics['nonfinite']:
        _logger.warning('%s: %d images gave logits that are NaN or infinite; they count as wrong, and not in the loss.',
                        title, metrics['nonfinite'])
