"""One epoch of training: accumulation, precision, clipping, averaging, schedule and reports."""
import argparse
import logging
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
import torchvision.utils
from timm.data import Mixup
from timm.task import TrainingTask
from timm.utils import dispatch_clip_grad

from .device import Precision
from .errors import NonFiniteLossError
from .naflex import naflex_loss_scale
from .progress import format_time, progress

_logger = logging.getLogger(__name__)


@dataclass
class Run:
    """The parts that an epoch works with.

    Attributes:
        args: settings, with `distributed`, `rank` and `world_size`.
        device: where to compute.
        precision: autocast and dtype.
        task: computes the loss.
        optimizer: updates the task's parameters.
        loss_scaler: scaler of float16 training, inert otherwise.
        scheduler: timm scheduler, or None.
        loader: training batches.
        mixup_fn: mixes a batch where the loader does not.
        mean_batch: mean images per batch, to which `--variable-batch-loss-scale` refers.
        folder: run folder on the first process, '' elsewhere.
    """

    args: argparse.Namespace
    device: torch.device
    precision: Precision
    task: TrainingTask
    optimizer: torch.optim.Optimizer
    loss_scaler: torch.amp.GradScaler
    scheduler: Any
    loader: Any
    mixup_fn: Mixup | None = None
    mean_batch: float = 1.
    folder: str = ''

    @property
    def updates_per_epoch(self) -> int:
        """Optimizer updates per epoch: ceil(batches / accumulation)."""
        return count_updates(len(self.loader), self.args.grad_accum_steps)


def count_updates(batches: int, accum_steps: int) -> int:
    """Optimizer updates that an epoch of `batches` makes when `accum_steps` of them share an update."""
    return -(-batches // accum_steps)


def group_size(step: int, batches: int, accum_steps: int) -> int:
    """How many batches share the update that batch `step` belongs to; the last group may be smaller."""
    tail = batches % accum_steps
    return tail if tail and step >= batches - tail else accum_steps


class FiniteCheck:
    """Tells whether a loss is finite on all processes, without keeping a GPU waiting.

    The answer is copied to the host while the backward pass is queued, and awaited only before the update.
    """

    def __init__(self, device: torch.device, distributed: bool) -> None:
        self.distributed = distributed
        self.on_cuda = device.type == 'cuda'
        self.event = torch.cuda.Event() if self.on_cuda else None
        self.answer = torch.ones(())

    def start(self, loss: torch.Tensor) -> None:
        """Begins to ask about a loss."""
        flag = torch.isfinite(loss.detach()).float()
        if self.distributed:
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MIN)
        if self.event is None:
            self.answer = flag
            return
        self.answer = torch.empty((), pin_memory=True).copy_(flag, non_blocking=True)
        self.event.record()

    def passed(self) -> bool:
        """The answer."""
        if self.event is not None:
            self.event.synchronize()
        return bool(self.answer.item())


class LossMeter:
    """Sample-weighted loss of the epoch and since the last report, kept on the device."""

    def __init__(self, device: torch.device) -> None:
        dtype = torch.float32 if device.type == 'mps' else torch.float64
        self.sums = torch.zeros(4, dtype=dtype, device=device)  # epoch: loss, images; since the report: loss, images

    def add(self, loss: torch.Tensor, images: int) -> None:
        """Adds the mean loss of a batch."""
        weighted = loss.detach().to(self.sums.dtype) * images
        count = torch.full_like(weighted, images)
        self.sums += torch.stack([weighted, count, weighted, count])

    def read(self, distributed: bool) -> tuple[float, float]:
        """Mean loss of the epoch and since the last report, over all processes; resets the latter."""
        sums = self.sums.clone()
        if distributed:
            torch.distributed.all_reduce(sums)
        total, images, recent, recent_images = sums.tolist()
        self.sums[2:] = 0
        mean = total / images if images else float('nan')
        return mean, recent / recent_images if recent_images else mean


def _batch_scale(run: Run, images: int) -> float:
    if run.args.naflex_loader:
        return naflex_loss_scale(run.args, images, run.device)
    if run.args.variable_batch_loss_scale == 'none':
        return 1.
    ratio = images / run.mean_batch
    return ratio ** 0.5 if run.args.variable_batch_loss_scale == 'sqrt' else ratio


def _turn_mixing_off(run: Run) -> None:
    if run.mixup_fn is not None:
        run.mixup_fn.mixup_enabled = False
    elif getattr(run.loader, 'mixup_enabled', False):
        run.loader.mixup_enabled = False


def _synchronize(device: torch.device) -> None:
    if device.type != 'cpu':
        torch.accelerator.synchronize(device)


def current_lr(optimizer: torch.optim.Optimizer) -> float:
    """Mean learning rate over the parameter groups."""
    rates = [float(group['lr']) for group in optimizer.param_groups]
    return sum(rates) / len(rates)


def train_one_epoch(run: Run, epoch: int, num_epochs: int) -> dict[str, float]:
    """Trains for one epoch.

    `--grad-accum-steps` N makes ceil(batches / N) updates; each averages the losses of its own group, the last group
    over its real size. Losses stay on the device between reports.

    Args:
        run: what to train, and with what.
        epoch: which one, from 0.
        num_epochs: how many there are, for the estimate of the time left.

    Returns:
        `loss`: mean over the epoch's images on all processes; `images_per_sec`: over all processes.

    Raises:
        NonFiniteLossError: the loss is NaN or infinite; the weights are those before the failing update.
    """
    args, optimizer, scaler = run.args, run.optimizer, run.loss_scaler
    task: Any = run.task
    if args.mixup_off_epoch and epoch >= args.mixup_off_epoch:
        _turn_mixing_off(run)
    batches = len(run.loader)
    updates = run.updates_per_epoch
    done = epoch * updates
    second_order = bool(getattr(optimizer, 'is_second_order', False))
    meter = LossMeter(run.device)
    check = FiniteCheck(run.device, args.distributed)
    update: Callable[[], None] = _make_update(run)

    task.get_trainable_module().train()
    optimizer.zero_grad()
    started = reported = waited = time.perf_counter()
    waiting, images_done, images_since, step = 0., 0, 0, -1
    group_loss: torch.Tensor | None = None
    with progress(batches, f'Epoch {epoch}', args.rank == 0, args.log_interval) as shown:
        for step, (image, target) in enumerate(run.loader):
            share = group_size(step, batches, args.grad_accum_steps)
            last = step == batches - 1
            final = last or (step + 1) % args.grad_accum_steps == 0
            image, target = _to_device(run, image, target)
            waiting += time.perf_counter() - waited

            # gradients of several processes are averaged once per update
            with nullcontext() if final else task.no_sync():
                with run.precision.autocast():
                    loss = task(image, target)['loss']
                group_loss = loss.detach() if group_loss is None else group_loss + loss.detach()
                if final:
                    check.start(group_loss)
                scale = _batch_scale(run, len(target)) / share
                scaler.scale(loss * scale).backward(create_graph=second_order)
            meter.add(loss, len(target))
            images_done += len(target) * args.world_size
            images_since += len(target) * args.world_size
            shown.advance()
            if final:
                if not check.passed():
                    raise NonFiniteLossError(
                        f'the loss is not finite at epoch {epoch}, update {done % updates} of {updates} (batch {step}, '
                        f'lr {current_lr(optimizer):.3g}): lower --lr, clip with --clip-grad, warm up longer, or use '
                        '--amp-dtype bfloat16; the weights were not updated')
                update()
                optimizer.zero_grad()
                group_loss = None
                done += 1
                task.update_ema(step=done)
                if args.synchronize_step:
                    _synchronize(run.device)
                if run.scheduler is not None:
                    run.scheduler.step_update(num_updates=done)
                index = done - epoch * updates - 1
                if shown.due(index, last):
                    mean, recent = meter.read(args.distributed)
                    now = time.perf_counter()
                    rate = images_since / max(now - reported, 1e-9)
                    per_update = (now - started) / (index + 1)
                    left = format_time(per_update * (num_epochs * updates - done))
                    lr = current_lr(optimizer)
                    data_share = 100 * waiting / max(now - started, 1e-9)
                    shown.report(
                        _logger,
                        f'Train: {epoch} [{index + 1:>4d}/{updates}]  loss {recent:.4f} (mean {mean:.4f})  '
                        f'lr {lr:.3e}  {rate:.1f} img/s  data {data_share:.0f}%  left {left}',
                        f'loss {recent:.4f} lr {lr:.2e} {rate:.0f} img/s, run {left} left')
                    if args.save_images and run.folder:
                        torchvision.utils.save_image(
                            image, os.path.join(run.folder, f'train-batch-{step}.jpg'), padding=0, normalize=True)
                    reported, images_since = now, 0
            waited = time.perf_counter()
    if hasattr(optimizer, 'sync_lookahead'):
        optimizer.sync_lookahead()
    mean, _ = meter.read(args.distributed)
    return {'loss': mean, 'images_per_sec': images_done / max(time.perf_counter() - started, 1e-9)}


def _to_device(run: Run, image: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if run.args.no_prefetcher:
        image = image.to(device=run.device, dtype=run.precision.model_dtype)
        target = target.to(device=run.device)
        if run.mixup_fn is not None:
            image, target = run.mixup_fn(image, target)
    if run.args.channels_last:
        image = image.contiguous(memory_format=torch.channels_last)
    return image, target


def _make_update(run: Run) -> Callable[[], None]:
    """Optimizer step with clipping and, for float16, unscaling; a step with overflowed gradients is skipped."""
    args, scaler, optimizer = run.args, run.loss_scaler, run.optimizer

    def update() -> None:
        if args.clip_grad is not None:
            scaler.unscale_(optimizer)
            parameters = run.task.get_clip_parameters(exclude_head='agc' in args.clip_mode)
            dispatch_clip_grad(parameters, value=args.clip_grad, mode=args.clip_mode)
        scaler.step(optimizer)
        scaler.update()

    return update
