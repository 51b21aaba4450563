"""Runs a model over a loader and counts every image once, for any number of processes."""
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed
import torch.nn as nn
from timm.task import evaluation_sample_limit

from cpool_vision.errors import ConfigError, DatasetError

from ..data.multi_label import unreadable_rows
from ..data.stream import Loader
from ..data.unreadable import gather_numbers
from ..device import Precision, Runtime
from ..tracking.progress_bar import ProgressBar
from .metrics import Tally

_logger = logging.getLogger(__name__)


@dataclass
class Evaluation:
    """Result of `evaluate`.

    Attributes:
        metrics: See `metrics.Tally.read`.
        images_per_sec: Throughput of this process, including data loading.
        unreadable_positions: Indices of the images that could not be decoded, over all processes.
    """

    metrics: dict[str, float]
    images_per_sec: float
    unreadable_positions: list[int] = field(default_factory=list)


class Rows:
    """Maps rows of this process's batches to indices in the dataset, and recognizes padding.

    As in timm's `OrderedDistributedSampler`, process r of W has images r, r + W, ..., followed by padding.

    Args:
        loader: The loader.
        distributed: Whether other processes share the dataset.

    Attributes:
        numbers: Indices of the images so far.
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
        """Returns the indices of the images in a batch; further rows are padding."""
        first, self.seen = self.seen, self.seen + len(target)
        last = self.seen if self.limit is None else min(self.seen, self.limit)
        positions = [self.rank + row * self.world_size for row in range(first, last)]
        self.numbers += positions
        self._unreadable.append(unreadable_rows(target[:len(positions)]))
        return positions

    def unreadable(self) -> list[int]:
        """Returns the indices of unreadable images over all processes. Every process must call it."""
        rows = torch.cat(self._unreadable).nonzero().flatten().tolist() if self._unreadable else []
        return gather_numbers([self.numbers[row] for row in rows], self.distributed)


def first_output(output: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
    """Returns the logits, or those of the first head if the model returns several."""
    return output if isinstance(output, torch.Tensor) else output[0]


def check_views(views: int, naflex: bool = False) -> None:
    """Checks the value of `--tta`.

    Raises:
        ConfigError: It is not 0, 1 or 2, or does not work with the NaFlex loader.
    """
    if views not in (0, 1, 2):
        raise ConfigError(f'--tta {views} is out of range: use 2 (average with the mirror image), or 0 or 1 (the image '
                          'alone)')
    if views == 2 and naflex:
        raise ConfigError('--tta 2 mirrors whole images, but --naflex-loader yields patches: drop one of them')


def predict(model: nn.Module, image: Any, precision: Precision, views: int = 0) -> torch.Tensor:
    """Computes the logits of a batch.

    Args:
        model: The model.
        image: Images `(B, C, H, W)`, or a dictionary of patches with `views` < 2.
        precision: Autocast and dtype.
        views: 2 to average, in float32, the logits of each image and its mirror image.

    Returns:
        Logits `(B, classes)`.
    """
    with precision.autocast():
        output = first_output(model(image))
        if views != 2:
            return output
        mirrored = first_output(model(image.flip(-1)))
    return (output.float() + mirrored.float()) / 2


def fill_batch(image: Any, size: int) -> Any:
    """Pads a batch to `size` with copies of its first row.

    Kernels, and so rounding, depend on the batch size. In batches of equal size, an image always has the same logits.

    Args:
        image: Images `(B, C, H, W)`, or a dictionary of tensors `(B, ...)` and other values; B >= 1.
        size: Number of rows; a larger batch is returned as it is.
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
    """Runs a model over a loader and returns its metrics. Every process must call it.

    Args:
        model: Maps images `(B, C, H, W)` to logits `(B, classes)`; left in eval mode.
        loader: Yields images and targets: class indices, or what `tally` expects.
        runtime: Device and processes; metrics are computed over all processes.
        prefetched: Whether the loader itself normalizes images and moves them to the device.
        channels_last: Whether to convert images to NHWC layout.
        log_interval: Batches between log lines.
        title: Title of log lines and errors.
        valid_labels: Outputs to choose between; targets are positions in this list. All outputs if None.
        views: 2 to average the logits of each image and its mirror image.
        fill: Size to pad every batch to, so that the logits of an image do not depend on its batch; 0 for no padding.
        tally: Computes the metrics; `Tally` if None.
        on_batch: Called with the logits, the targets and the indices of the images of each batch, without padding.

    Raises:
        DatasetError: An image has no label, or one that is not a class.
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
    """Raises an error about images without a valid label; warns about logits that are NaN or infinite."""
    if metrics.get('unlabeled'):
        raise DatasetError(f'{metrics["unlabeled"]} images have no label, or one that is not a class of the model: '
                           'check --num-classes and --class-map, or whether the split has labels')
    if primary and metrics['nonfinite']:
        _logger.warning('%s: the logits of %d images are NaN or infinite. These images count as errors, and are left '
                        'out of the loss.', title, metrics['nonfinite'])
