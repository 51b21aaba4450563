"""One epoch of training: forward, backward and step; accumulation, precision, clipping, averaging, schedule."""
import logging
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from timm.utils import dispatch_clip_grad

from cpool_vision.errors import NonFiniteLossError

from ..data.naflex import naflex_loss_scale
from ..device import seed_everything
from ..distributed.sharding import no_exchange
from ..distributed.vote import Verdict
from ..tracking.progress_bar import progress_bar
from .report import Reporter, current_lr
from .run import Run, count_updates

_logger = logging.getLogger(__name__)


def group_size(step: int, batches: int, accum_steps: int) -> int:
    """How many batches share the update that batch `step` belongs to; the last group may be smaller."""
    tail = batches % accum_steps
    return tail if tail and step >= batches - tail else accum_steps


def _batch_scale(run: Run, images: int) -> float:
    if run.settings.naflex_loader:
        return naflex_loss_scale(run.settings, run.runtime, images)
    if run.settings.variable_batch_loss_scale == 'none':
        return 1.
    ratio = images / run.mean_batch
    return ratio ** 0.5 if run.settings.variable_batch_loss_scale == 'sqrt' else ratio


def _synchronize(device: torch.device) -> None:
    if device.type != 'cpu':
        torch.accelerator.synchronize(device)


def train_one_epoch(run: Run, epoch: int) -> dict[str, float]:
    """Trains for one epoch, or for the rest of it, from `run.progress` on.

    `--grad-accum-steps` N makes ceil(batches / N) updates; each averages the losses of its own group, the last group
    over its real size. Losses stay on the device between updates. Random numbers of a batch, such as those of dropout,
    follow from (seed, rank, epoch, batch).

    Args:
        run: the run; its `progress` advances.
        epoch: which one, from 0.

    Returns:
        `loss`: mean over the epoch's images on all processes, without skipped updates; `images_per_sec`: over all
        processes; `skipped`: updates left out.

    Raises:
        NonFiniteLossError: loss or gradient are NaN or infinite; the weights are those before the failing update.
    """
    settings, runtime, optimizer = run.settings, run.runtime, run.optimizer
    task: Any = run.task
    run.enter(epoch)
    first, batches, accum = run.progress.batch, len(run.loader), settings.grad_accum_steps
    second_order = bool(getattr(optimizer, 'is_second_order', False))
    buffers = _Buffers(task.get_trainable_module(), settings.nonfinite == 'skip')
    group: list[tuple[torch.Tensor, int]] = []
    task.get_trainable_module().train()
    optimizer.zero_grad()
    with progress_bar(batches, f'Epoch {epoch}', runtime.primary, settings.log_interval, first) as shown:
        reporter = Reporter(run, shown, epoch)
        for step, (image, target) in enumerate(run.loader if first < batches else (), first):
            last = step == batches - 1
            complete = last or (step + 1) % accum == 0
            image, target = _to_device(run, image, target)
            reporter.begin_batch()
            _rehearse(run, image, target)
            if not group:
                buffers.keep()
            seed_everything(settings.seed, runtime.rank, epoch, step + 1)  # trailing zeros would not count

            # gradients of several processes are averaged once per update
            with nullcontext() if complete else no_exchange(task):
                with runtime.precision.autocast():
                    loss = task(image, target)['loss']
                scale = _batch_scale(run, len(target)) / group_size(step, batches, accum)
                run.loss_scaler.scale(loss * scale).backward(create_graph=second_order)
            group.append((loss.detach(), len(target)))
            reporter.end_batch(len(target))
            if complete:
                verdict, sound = _judge(run, group, step)
                _step(run, group) if sound else _leave_out(run, buffers)
                optimizer.zero_grad()
                group.clear()
                _move(run, step + 1, sound)
                reporter.report(image, step, last)
                run.after_update(reporter.updates, last, verdict)
            reporter.wait_for_batch()
    if hasattr(optimizer, 'sync_lookahead'):
        optimizer.sync_lookahead()
    return {'loss': run.meter.read(runtime.distributed)[0], 'images_per_sec': reporter.images_per_sec(),
            'skipped': run.progress.skipped}


def _step(run: Run, group: list[tuple[torch.Tensor, int]]) -> None:
    """Optimizer step with clipping, for gradients that are unscaled; one with overflowed gradients is skipped."""
    settings, task = run.settings, run.task
    if settings.clip_grad is not None:
        parameters = task.get_clip_parameters(exclude_head='agc' in settings.clip_mode)
        dispatch_clip_grad(parameters, value=settings.clip_grad, mode=settings.clip_mode)
    run.loss_scaler.step(run.optimizer)
    run.loss_scaler.update()
    for part in group:
        run.meter.add(*part)
    task.update_ema(step=run.updates_before(run.progress) + 1)


def _leave_out(run: Run, buffers: '_Buffers') -> None:
    """Drops an update that is not finite, without a trace."""
    buffers.restore()
    if run.loss_scaler.is_enabled():
        run.loss_scaler.update()  # ends the unscaled state


def _move(run: Run, batch: int, sound: bool) -> None:
    """Moves the run past an update, also past a skipped one."""
    if run.settings.synchronize_step:
        _synchronize(run.runtime.device)
    run.progress = replace(run.progress, batch=batch, skipped=run.progress.skipped + (not sound))
    if run.scheduler is not None:
        run.scheduler.step_update(num_updates=run.updates_before(run.progress))


def _rehearse(run: Run, image: torch.Tensor, target: torch.Tensor) -> None:
    """Makes DDP rebuild its buckets before the first update of a launch; does nothing later.

    DDP reorders the gradients in its buckets after the first backward pass. With three or more processes, this changes
    the order in which gradients are summed, so the first update after a resume would differ in its last bits from the
    same update in an uninterrupted run. One pass on the first batch, without other effects, avoids this.
    """
    if run.rehearsed or run.runtime.world_size < 3:
        return
    run.rehearsed = True
    task: Any = run.task
    buffers = _Buffers(task.get_trainable_module(), True)
    buffers.keep()
    with run.runtime.precision.autocast():
        loss = task(image, target)['loss']
    loss.backward()
    run.optimizer.zero_grad()
    buffers.restore()


def _judge(run: Run, group: list[tuple[torch.Tensor, int]], step: int) -> tuple[Verdict, bool]:
    """The verdict of all processes on an update, and whether to make it.

    Raises:
        NonFiniteLossError: it is not sound, and `--nonfinite` or `--max-skipped` forbid to leave it out.
    """
    settings, scaler = run.settings, run.loss_scaler
    if scaler.is_enabled():
        scaler.unscale_(run.optimizer)
    gradients = [parameter.grad for part in run.optimizer.param_groups for parameter in part['params']
                 if parameter.grad is not None]
    verdict = run.vote.take(torch.stack([loss for loss, _ in group]).sum(), gradients)
    # float16 overflows now and then: the scaler leaves such updates out and lowers its scale, as far as that helps
    overflow = scaler.is_enabled() and not verdict.gradient_finite and scaler.get_scale() > 1
    if verdict.loss_finite and (verdict.gradient_finite or overflow):
        return verdict, True
    update = count_updates(run.progress.batch, settings.grad_accum_steps)
    where = (f'epoch {run.progress.epoch}, update {update} of {run.updates_per_epoch} '
             f'(batch {step}, lr {current_lr(run.optimizer):.3g})')
    what = 'gradient' if verdict.loss_finite else 'loss'
    skipped = run.progress.skipped_before + run.progress.skipped + 1
    if settings.nonfinite == 'raise' or skipped > settings.max_skipped:
        limit = '' if settings.nonfinite == 'raise' else \
            f' after {skipped - 1} skipped updates (--max-skipped {settings.max_skipped})'
        raise NonFiniteLossError(
            f'the {what} is not finite{limit} at {where}: lower --lr, clip with --clip-grad, warm up longer, or use '
            '--amp-dtype bfloat16; the weights were not updated')
    _logger.warning('The %s is not finite at %s: update skipped, %d so far.', what, where, skipped)
    return verdict, False


class _Buffers:
    """Buffers, such as batch norm statistics, that a skipped update must not change."""

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
    runtime = run.runtime
    if run.settings.no_prefetcher:
        image = image.to(device=runtime.device, dtype=runtime.precision.model_dtype)
        target = target.to(device=runtime.device)
        if run.mixup_fn is not None:
            image, target = run.mixup_fn(image, target)
    if run.settings.channels_last:
        image = image.contiguous(memory_format=torch.channels_last)
    return image, target
