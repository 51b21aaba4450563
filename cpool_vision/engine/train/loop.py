"""One epoch of training: accumulation, precision, clipping, averaging, schedule and reports."""
import argparse
import logging
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torchvision.utils
from timm.data import Mixup
from timm.task import TrainingTask
from timm.utils import dispatch_clip_grad

from cpool_vision.errors import NonFiniteLossError

from ..checkpoints.position import Position
from ..data.naflex import naflex_loss_scale
from ..device import Precision, seed_everything
from ..distributed.sharding import no_exchange
from ..distributed.vote import Verdict, Vote
from ..tracking.meter import LossMeter
from ..tracking.progress import format_time, progress

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
        position: where the run stands.
        on_report: called at each log line with the updates made so far, the epoch, and the figures.
        after_update: called between updates with how many the epoch has had, whether that was the last one, and the
            verdict on it.
        meter: loss of the epoch so far.
        vote: what the processes agree on before an update.
        rehearsed: whether `_rehearse` is done.
        data: `fingerprint` of the training set on the first process, for the checkpoints.
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
    position: Position = Position()
    on_report: Callable[[int, int, dict[str, float]], None] = lambda *_: None
    after_update: Callable[[int, bool, Verdict], None] = lambda *_: None
    meter: LossMeter = field(init=False)
    vote: Vote = field(init=False)
    rehearsed: bool = False
    data: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self.meter = LossMeter(self.device)
        self.vote = Vote(self.device, self.args.distributed)

    @property
    def updates_per_epoch(self) -> int:
        """Optimizer updates per epoch: ceil(batches / accumulation)."""
        return count_updates(len(self.loader), self.args.grad_accum_steps)

    def updates_before(self, position: Position) -> int:
        """Optimizer updates from the start of the run to a position, skipped ones included."""
        return position.epoch * self.updates_per_epoch + count_updates(position.batch, self.args.grad_accum_steps)


def count_updates(batches: int, accum_steps: int) -> int:
    """Optimizer updates that an epoch of `batches` makes when `accum_steps` of them share an update."""
    return -(-batches // accum_steps)


def group_size(step: int, batches: int, accum_steps: int) -> int:
    """How many batches share the update that batch `step` belongs to; the last group may be smaller."""
    tail = batches % accum_steps
    return tail if tail and step >= batches - tail else accum_steps


def _batch_scale(run: Run, images: int) -> float:
    if run.args.naflex_loader:
        return naflex_loss_scale(run.args, images, run.device)
    if run.args.variable_batch_loss_scale == 'none':
        return 1.
    ratio = images / run.mean_batch
    return ratio ** 0.5 if run.args.variable_batch_loss_scale == 'sqrt' else ratio


def _synchronize(device: torch.device) -> None:
    if device.type != 'cpu':
        torch.accelerator.synchronize(device)


def current_lr(optimizer: torch.optim.Optimizer) -> float:
    """Mean learning rate over the parameter groups."""
    rates = [float(group['lr']) for group in optimizer.param_groups]
    return sum(rates) / len(rates)


def train_one_epoch(run: Run, epoch: int, num_epochs: int) -> dict[str, float]:
    """Trains for one epoch, or for what is left of it at `run.position`.

    `--grad-accum-steps` N makes ceil(batches / N) updates; each averages the losses of its own group, the last group
    over its real size. Losses stay on the device between updates. Random numbers of a batch, such as those of dropout,
    follow from (seed, rank, epoch, batch).

    Args:
        run: what to train, and with what; `position` moves.
        epoch: which one, from 0.
        num_epochs: how many there are, for the estimate of the time left.

    Returns:
        `loss`: mean over the epoch's images on all processes, without skipped updates; `images_per_sec`: over all
        processes; `skipped`: updates left out.

    Raises:
        NonFiniteLossError: loss or gradient are NaN or infinite; the weights are those before the failing update.
    """
    args, optimizer, scaler = run.args, run.optimizer, run.loss_scaler
    task: Any = run.task
    if run.position.epoch != epoch:
        run.position = Position(epoch, 0, 0, run.position.skipped_before + run.position.skipped)
    first = run.position.batch
    if not first:
        run.meter.clear()
    batches = len(run.loader)
    updates = run.updates_per_epoch
    begun = count_updates(first, args.grad_accum_steps)
    done = epoch * updates + begun
    second_order = bool(getattr(optimizer, 'is_second_order', False))
    update: Callable[[], None] = _make_update(run)
    buffers = _Buffers(task.get_trainable_module(), args.nonfinite == 'skip')

    task.get_trainable_module().train()
    optimizer.zero_grad()
    started = reported = waited = time.perf_counter()
    waiting, images_done, images_since = 0., 0, 0
    group: list[tuple[torch.Tensor, int]] = []
    with progress(batches, f'Epoch {epoch}', args.rank == 0, args.log_interval) as shown:
        for _ in range(first):
            shown.advance()
        for step, (image, target) in enumerate(run.loader if first < batches else (), first):
            share = group_size(step, batches, args.grad_accum_steps)
            last = step == batches - 1
            final = last or (step + 1) % args.grad_accum_steps == 0
            image, target = _to_device(run, image, target)
            waiting += time.perf_counter() - waited
            if not run.rehearsed:
                _rehearse(run, image, target)
            if not group:
                buffers.keep()
            seed_everything(args.seed, args.rank, epoch, step + 1)  # trailing zeros would not count

            # gradients of several processes are averaged once per update
            with nullcontext() if final else no_exchange(task):
                with run.precision.autocast():
                    loss = task(image, target)['loss']
                group.append((loss.detach(), len(target)))
                scale = _batch_scale(run, len(target)) / share
                scaler.scale(loss * scale).backward(create_graph=second_order)
            images_done += len(target) * args.world_size
            images_since += len(target) * args.world_size
            shown.advance()
            if final:
                verdict, sound = _judge(run, group, f'epoch {epoch}, update {done % updates} of {updates} '
                                                    f'(batch {step}, lr {current_lr(optimizer):.3g})')
                done += 1
                skipped = run.position.skipped + (not sound)
                if sound:
                    update()
                    for part in group:
                        run.meter.add(*part)
                    task.update_ema(step=done)
                else:
                    buffers.restore()
                    if scaler.is_enabled():
                        scaler.update()  # ends the unscaled state
                optimizer.zero_grad()
                group.clear()
                if args.synchronize_step:
                    _synchronize(run.device)
                if run.scheduler is not None:
                    run.scheduler.step_update(num_updates=done)
                run.position = replace(run.position, batch=step + 1, skipped=skipped)
                index = done - epoch * updates - 1
                if shown.due(index, last):
                    mean, recent = run.meter.read(args.distributed)
                    now = time.perf_counter()
                    rate = images_since / max(now - reported, 1e-9)
                    per_update = (now - started) / (index + 1 - begun)
                    left = format_time(per_update * (num_epochs * updates - done))
                    lr = current_lr(optimizer)
                    data_share = 100 * waiting / max(now - started, 1e-9)
                    shown.report(
                        _logger,
                        f'Train: {epoch} [{index + 1:>4d}/{updates}]  loss {recent:.4f} (mean {mean:.4f})  '
                        f'lr {lr:.3e}  {rate:.1f} img/s  data {data_share:.0f}%  left {left}',
                        f'loss {recent:.4f} lr {lr:.2e} {rate:.0f} img/s, run {left} left')
                    run.on_report(done, epoch, {'loss': recent, 'lr': lr, 'images_per_sec': rate})
                    if args.save_images and run.folder:
                        torchvision.utils.save_image(
                            image, os.path.join(run.folder, f'train-batch-{step}.jpg'), padding=0, normalize=True)
                    reported, images_since = now, 0
                run.after_update(index + 1, last, verdict)
            waited = time.perf_counter()
    if hasattr(optimizer, 'sync_lookahead'):
        optimizer.sync_lookahead()
    mean, _ = run.meter.read(args.distributed)
    return {'loss': mean, 'images_per_sec': images_done / max(time.perf_counter() - started, 1e-9),
            'skipped': run.position.skipped}


def _rehearse(run: Run, image: torch.Tensor, target: torch.Tensor) -> None:
    """Lets DDP arrange its buckets before the first update of a launch.

    DDP orders the gradients in its buckets anew after the first backward pass. From three processes on the order
    decides in which order the addends of a gradient are summed, so that the first update after a resume would differ
    in the last bits from the same update amid a run. One pass on the first batch, without effect, takes that ahead.
    """
    run.rehearsed = True
    if run.args.world_size < 3:
        return
    task: Any = run.task
    buffers = _Buffers(task.get_trainable_module(), True)
    buffers.keep()
    with run.precision.autocast():
        loss = task(image, target)['loss']
    loss.backward()
    run.optimizer.zero_grad()
    buffers.restore()


def _judge(run: Run, group: list[tuple[torch.Tensor, int]], where: str) -> tuple[Verdict, bool]:
    """The verdict of all processes on an update, and whether to make it.

    Raises:
        NonFiniteLossError: it is not sound, and `--nonfinite` or `--max-skipped` forbid to leave it out.
    """
    args, scaler = run.args, run.loss_scaler
    if scaler.is_enabled():
        scaler.unscale_(run.optimizer)
    gradients = [parameter.grad for part in run.optimizer.param_groups for parameter in part['params']
                 if parameter.grad is not None]
    verdict = run.vote.take(torch.stack([loss for loss, _ in group]).sum(), gradients)
    # float16 overflows now and then: the scaler leaves such updates out and lowers its scale, as far as that helps
    overflow = scaler.is_enabled() and not verdict.gradient_finite and scaler.get_scale() > 1
    if verdict.loss_finite and (verdict.gradient_finite or overflow):
        return verdict, True
    what = 'gradient' if verdict.loss_finite else 'loss'
    skipped = run.position.skipped_before + run.position.skipped + 1
    if args.nonfinite == 'raise' or skipped > args.max_skipped:
        limit = '' if args.nonfinite == 'raise' else f' for the {skipped}. time, more than --max-skipped allows,'
        raise NonFiniteLossError(
            f'the {what} is not finite{limit} at {where}: lower --lr, clip with --clip-grad, warm up longer, or use '
            '--amp-dtype bfloat16; the weights were not updated')
    _logger.warning('The %s is not finite at %s: update skipped, %d so far.', what, where, skipped)
    return verdict, False


class _Buffers:
    """Statistics of batch norm and the like, which a skipped update must not leave traces in."""

    def __init__(self, module: torch.nn.Module, active: bool) -> None:
        self.buffers = list(module.buffers()) if active else []
        self.former: list[torch.Tensor] = []

    def keep(self) -> None:
        """Notes their values."""
        self.former = [buffer.clone() for buffer in self.buffers]

    def restore(self) -> None:
        """Gives them back what was noted."""
        for buffer, former in zip(self.buffers, self.former, strict=True):
            buffer.copy_(former)


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
    """Optimizer step with clipping, for gradients that are unscaled; one with overflowed gradients is skipped."""
    args, scaler, optimizer = run.args, run.loss_scaler, run.optimizer

    def update() -> None:
        if args.clip_grad is not None:
            parameters = run.task.get_clip_parameters(exclude_head='agc' in args.clip_mode)
            dispatch_clip_grad(parameters, value=args.clip_grad, mode=args.clip_mode)
        scaler.step(optimizer)
        scaler.update()

    return update
