"""Loss and accuracy of a model over a loader: exact, sample-weighted, reduced over processes once."""
import logging
import time
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed
import torch.nn as nn
import torch.nn.functional as F
from timm.task import evaluation_sample_limit

from .data import UNREADABLE
from .device import Precision
from .progress import progress

_logger = logging.getLogger(__name__)


class Tally:
    """Running loss and top-1/top-5 counts; rows labelled `UNREADABLE` count as unreadable and nothing else.

    Sums are kept on the device, losses in float64 (float32 on MPS), counts in int64, so that adding a batch does not
    wait for the device.

    Args:
        device: device of the outputs.
        max_samples: rows beyond this many are the padding of a distributed sampler, and dropped.
    """

    def __init__(self, device: torch.device, max_samples: int | None = None) -> None:
        self.max_samples = max_samples
        self.seen = 0
        self.loss = torch.zeros((), dtype=torch.float32 if device.type == 'mps' else torch.float64, device=device)
        self.counts = torch.zeros(4, dtype=torch.int64, device=device)  # images, top-1, top-5, unreadable

    def trim(self, output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows of a batch that are not padding."""
        if self.max_samples is not None:
            room = max(0, self.max_samples - self.seen)
            output, target = output[:room], target[:room]
        self.seen += len(target)
        return output, target

    @torch.no_grad()
    def add(self, output: torch.Tensor, target: torch.Tensor) -> None:
        """Adds logits (B, classes) and class indices (B,)."""
        output, target = self.trim(output, target)
        if not len(target):
            return
        output = output.detach().float()
        self.loss += F.cross_entropy(output, target, ignore_index=UNREADABLE, reduction='sum').to(self.loss.dtype)
        hits = output.topk(min(5, output.shape[-1]), dim=-1).indices.eq(target[:, None])
        bad = target.eq(UNREADABLE).sum()
        self.counts += torch.stack([target.numel() - bad, hits[:, 0].sum(), hits.any(dim=-1).sum(), bad])

    def compute(self, distributed: bool = False) -> dict[str, float]:
        """Metrics: `loss`, `top1` and `top5` in percent, `images`, `unreadable`; over all processes if asked."""
        loss, counts = self.loss.clone(), self.counts.clone()
        if distributed:
            torch.distributed.all_reduce(loss)
            torch.distributed.all_reduce(counts)
        images, top1, top5, unreadable = counts.tolist()
        whole = images or float('nan')
        return {'loss': loss.item() / whole, 'top1': 100 * top1 / whole, 'top5': 100 * top5 / whole,
                'images': images, 'unreadable': unreadable}


@dataclass
class Evaluation:
    """What `evaluate` measured.

    Attributes:
        metrics: see `Tally.compute`.
        images_per_sec: throughput of this process, loading included.
        unreadable_positions: places, in the order of this process, of images that could not be decoded.
    """

    metrics: dict[str, float]
    images_per_sec: float
    unreadable_positions: list[int] = field(default_factory=list)


def first_output(output: Any) -> torch.Tensor:
    """Logits of models that return several heads."""
    return output[0] if isinstance(output, (tuple, list)) else output


@torch.inference_mode()
def evaluate(
        model: nn.Module,
        loader: Any,
        device: torch.device,
        precision: Precision,
        *,
        prefetched: bool = True,
        channels_last: bool = False,
        distributed: bool = False,
        primary: bool = True,
        log_interval: int = 50,
        title: str = 'Validate',
        valid_labels: list[int] | None = None,
        on_batch: Any = None,
) -> Evaluation:
    """Runs a model over a loader.

    Args:
        model: maps images (B, C, H, W) to logits (B, classes); left in eval mode.
        loader: yields images and class indices.
        device: where to compute.
        precision: autocast and dtype.
        prefetched: the loader puts normalised images on the device itself.
        channels_last: layout of the images.
        distributed: add the counts of all processes.
        primary: whether this process reports.
        log_interval: batches between log lines.
        title: text of log lines.
        valid_labels: outputs that compete; targets are positions in this list.
        on_batch: called with the trimmed logits and targets of each batch.

    Returns:
        Metrics over all images, each counted once.
    """
    model.eval()
    tally = Tally(device, evaluation_sample_limit(loader))
    bad: list[torch.Tensor] = []
    total = len(loader)
    start, images = time.perf_counter(), 0
    with progress(total, title, primary, log_interval) as shown:
        for step, (image, target) in enumerate(loader):
            if not prefetched:
                image = image.to(device=device, dtype=precision.model_dtype)
                target = target.to(device=device)
            if channels_last:
                image = image.contiguous(memory_format=torch.channels_last)
            with precision.autocast():
                output = first_output(model(image))
            if valid_labels is not None:
                output = output[:, valid_labels]
            if on_batch is not None:
                kept = len(target) if tally.max_samples is None else max(0, tally.max_samples - tally.seen)
                on_batch(output[:kept], target[:kept])
            tally.add(output, target)
            bad.append(target.eq(UNREADABLE))
            images += len(target)
            shown.advance()
            if primary and shown.due(step, step == total - 1):
                now = tally.compute()
                rate = images / (time.perf_counter() - start)
                shown.report(
                    _logger,
                    f'{title}: [{step + 1:>4d}/{total}]  loss {now["loss"]:.4f}  top1 {now["top1"]:.3f}  '
                    f'top5 {now["top5"]:.3f}  {rate:.1f} img/s',
                    f'top1 {now["top1"]:.2f}')
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    elapsed = time.perf_counter() - start
    positions = torch.cat(bad).nonzero().flatten().tolist() if bad else []
    return Evaluation(tally.compute(distributed), images / elapsed if elapsed else 0., positions)
