"""One epoch of training: forward, backward, step, accumulation, mixed precision, clipping, averaging, schedule."""
import logging
from contextlib import nullcontext
from dataclasses import replace

import torch
from timm.utils import dispatch_clip_grad

from cpool_vision.errors import NonFiniteLossError

from ..data.naflex import naflex_loss_scale
from ..device import seed_everything
from ..distributed.sharding import no_exchange, trained_module
from ..distributed.vote import Verdict
from ..tracking.progress_bar import ProgressBar
from .report import Reporter, current_lr
from .run import Run, count_updates

_logger = logging.getLogger(__name__)


def group_size(step: int, batches: int, accum_steps: int) -> int:
    """Returns how many batches share the update of batch `step`. The last group of an epoch may be smaller."""
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
    """Trains for one epoch, or for the rest of it if the run resumes inside the epoch.

    With `--grad-accum-steps` N, an epoch has ceil(batches / N) updates. Each averages the losses of its batches, also
    the last one, which may have fewer. Losses stay on the device between updates. The random state of a batch, for
    example for dropout, follows from (seed, rank, epoch, batch).

    Args:
        run: The run. Its `progress` advances.
        epoch: The epoch, starting at 0.

    Returns:
        `loss`: mean over the images of the epoch on all processes, without skipped updates; `images_per_sec` of all
        processes; `skipped`: number of skipped updates.

    Raises:
        NonFiniteLossError: If the loss or a gradient is NaN or infinite. The weights are those before this update.
    """
    settings, runtime, optimizer, task = run.settings, run.runtime, run.optimizer, run.task
    module = trained_module(task)
    run.enter(epoch)
    first, batches, accum = run.progress.batch, len(run.loader), settings.grad_accum_steps
    second_order = bool(getattr(optimizer, 'is_second_order', False))
    buffers = _Buffers(module, settings.nonfinite == 'skip')
    group: list[tuple[torch.Tensor, int]] = []
    module.train()
    optimizer.zero_grad()
    with ProgressBar(batches, f'Epoch {epoch}', runtime.primary, settings.log_interval, first) as shown:
        reporter = Reporter(run, shown, epoch)
        for step, (image, target) in enumerate(run.loader if first < batches else (), first):
            last = step == batches - 1
            complete = last or (step + 1) % accum == 0
            image, target = _to_device(run, image, target)
            reporter.begin_batch()
            _warm_up_ddp(run, image, target)
            if not group:
                buffers.keep()
            seed_everything(settings.seed, runtime.rank, epoch, step + 1)  # + 1: SeedSequence ignores trailing zeros

            # processes average their gradients once per update
            with nullcontext() if complete else no_exchange(task):
                with runtime.precision.autocast():
                    loss = task(image, target)['loss']
                scale = _batch_scale(run, len(target)) / group_size(step, batches, accum)
                run.loss_scaler.scale(loss * scale).backward(create_graph=second_order)
            group.append((loss.detach(), len(target)))
            reporter.end_batch(len(target))
            if complete:
                verdict, finite = _judge(run, group, step)
                _step(run, group) if finite else _skip(run, buffers)
                optimizer.zero_grad()
                group.clear()
                _advance(run, step + 1, finite)
                reporter.report(image, step, last)
                run.after_update(reporter.updates, last, verdict)
            reporter.wait_for_batch()
    if hasattr(optimizer, 'sync_lookahead'):
        optimizer.sync_lookahead()
    return {'loss': run.meter.read(runtime.distributed)[0], 'images_per_sec': reporter.images_per_sec(),
            'skipped': run.progress.skipped}


def _step(run: Run, group: list[tuple[torch.Tensor, int]]) -> None:
    """Clips the unscaled gradients and steps the optimizer. The loss scaler skips the step after an overflow."""
    settings, task = run.settings, run.task
    if settings.clip_grad is not None:
        parameters = task.get_clip_parameters(exclude_head='agc' in settings.clip_mode)
        dispatch_clip_grad(parameters, value=settings.clip_grad, mode=settings.clip_mode)
    run.loss_scaler.step(run.optimizer)
    run.loss_scaler.update()
    for part in group:
        run.meter.add(*part)
    task.update_ema(step=run.updates_before(run.progress) + 1)


def _skip(run: Run, buffers: '_Buffers') -> None:
    """Skips an update that is not finite and undoes its changes to buffers."""
    buffers.restore()
    if run.loss_scaler.is_enabled():
        run.loss_scaler.update()  # required after unscale_


def _advance(run: Run, batch: int, finite: bool) -> None:
    """Advances progress and schedule past an update, also past a skipped one."""
    if run.settings.synchronize_step:
        _synchronize(run.runtime.device)
    run.progress = replace(run.progress, batch=batch, skipped=run.progress.skipped + (not finite))
    if run.scheduler is not None:
        run.scheduler.step_update(num_updates=run.updates_before(run.progress))


def _warm_up_ddp(run: Run, image: torch.Tensor, target: torch.Tensor) -> None:
    """Makes DDP rebuild its buckets before the first update after a start or resume. Does nothing later.

    DDP reorders the gradients in its buckets after the first backward pass. With three or more processes, this changes
    the order in which gradients are summed, so the first update after a resume would differ in its last bits from the
    same update in an uninterrupted run. One pass on the first batch, without other effects, avoids this.
    """
    if run.warmed_up or run.runtime.world_size < 3:
        return
    run.warmed_up = True
    buffers = _Buffers(trained_module(run.task), True)
    buffers.keep()
    with run.runtime.precision.autocast():
        loss = run.task(image, target)['loss']
    loss.backward()
    run.optimizer.zero_grad()
    buffers.restore()


def _judge(run: Run, group: list[tuple[torch.Tensor, int]], step: int) -> tuple[Verdict, bool]:
    """Votes on an update. Returns the verdict and whether to make the update.

    Raises:
        NonFiniteLossError: If the update is not finite, and `--nonfinite` or `--max-skipped` do not allow to skip it.
    """
    settings, scaler = run.settings, run.loss_scaler
    if scaler.is_enabled():
        scaler.unscale_(run.optimizer)
    gradients = [parameter.grad for part in run.optimizer.param_groups for parameter in part['params']
                 if parameter.grad is not None]
    verdict = run.vote.take(torch.stack([loss for loss, _ in group]).sum(), gradients)
    # gradients in float16 may overflow: the loss scaler skips the update and lowers its scale, down to 1
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
    """A copy of the buffers of a module, such as batch norm statistics, which a skipped update must not change."""

    def __init__(self, module: torch.nn.Module, active: bool) -> None:
        self.buffers = list(module.buffers()) if active else []
        self.former: list[torch.Tensor] = []

    def keep(self) -> None:
        """Copies the buffers."""
        self.former = [buffer.clone() for buffer in self.buffers]

    def restore(self) -> None:
        """Restores the copied values."""
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
