"""Logs the input, the optimizer, the schedule, and changed settings before the first epoch."""
import logging
from collections.abc import Mapping

import torch

from ..checkpoints.checkpoint import to_plain
from ..settings.limits import flag_name
from ..settings.shared import InputConfig, settings_of
from ..settings.train import OptimSettings, TrainSettings
from .run import Run

_logger = logging.getLogger(__name__)
# settings that do not change the trained weights, or that depend on the machine
_WITHOUT_EFFECT = {
    'data', 'data_dir', 'output', 'experiment', 'resume', 'no_resume_opt', 'start_epoch', 'stop_epoch', 'save_epochs',
    'log_interval', 'checkpoint_hist', 'recovery_interval', 'save_images', 'log_wandb', 'wandb_project', 'wandb_tags',
    'wandb_resume_id', 'no_tensorboard', 'log_mlflow', 'local_rank', 'device', 'workers', 'pin_mem', 'num_classes'}


def log_opening(run: Run, data_config: InputConfig) -> None:
    """Logs the input, the optimizer and the schedule. Warns if warm-up takes the whole schedule."""
    settings = run.settings
    _logger.info('Input: %s.', ', '.join(f'{name} {value}' for name, value in data_config.items()))
    _logger.info('Optimizer: %s.', describe_optimizer(run.optimizer))
    _logger.info('Schedule: %s, %s.', settings.sched, describe_schedule(settings, run.epochs))
    if run.scheduler is not None and settings.warmup_epochs >= settings.epochs and not settings.warmup_prefix:
        _logger.warning('The warm-up of %d epochs fills all %d epochs, so the learning rate never reaches --lr: '
                        'lower --warmup-epochs or raise --epochs.', settings.warmup_epochs, settings.epochs)


def describe_optimizer(optimizer: torch.optim.Optimizer) -> str:
    """Describes an optimizer: class, learning rate, momentum or betas, and weight decay by number of parameters."""
    first = optimizer.param_groups[0]
    rates = [float(group.get('initial_lr', group['lr'])) for group in optimizer.param_groups]
    parts = [type(optimizer).__name__, f'lr {max(rates):.6g}']
    if min(rates) < max(rates):
        parts[-1] += f' (down to {min(rates):.3g} by layer)'
    parts += [f'{name} {first[name]}' for name in ('momentum', 'betas', 'eps') if first.get(name) is not None]
    decayed: dict[float, int] = {}
    for group in optimizer.param_groups:
        decay = float(group.get('weight_decay') or 0)
        decayed[decay] = decayed.get(decay, 0) + sum(parameter.numel() for parameter in group['params'])
    parts.append('weight decay ' + ', '.join(f'{decay:g} on {count:,} parameters' for decay, count in decayed.items()))
    return ', '.join(parts)


def describe_schedule(settings: OptimSettings, epochs: int) -> str:
    """Describes a schedule: number of epochs, warm-up, cooldown, lowest learning rate, and when it steps."""
    parts = [f'{epochs} epochs']
    if settings.sched == 'none':
        return parts[0]
    if settings.warmup_epochs:
        where = 'before the schedule' if settings.warmup_prefix else 'inside the schedule'
        parts.append(f'{settings.warmup_epochs} of warm-up from {settings.warmup_lr:g} {where}')
    if settings.cooldown_epochs:
        parts.append(f'{settings.cooldown_epochs} of cooldown')
    return ', '.join([*parts, f'floor {settings.min_lr:g}',
                      f'stepped per {"update" if settings.sched_on_updates else "epoch"}'])


def changed_settings(settings: TrainSettings, content: Mapping[str, object]) -> dict[str, tuple[object, object]]:
    """Compares the settings of a run with those in a checkpoint.

    Args:
        settings: Settings of the run.
        content: Dictionary of the checkpoint.

    Returns:
        Saved and present value of each setting that differs. A setting that is None in either is not listed.
    """
    saved, changed = settings_of(content), {}
    for name, now in settings.as_dict().items():
        former = saved.get(name)
        if name in _WITHOUT_EFFECT or name not in saved or former is None or now is None:
            continue
        if to_plain(former) != to_plain(now):
            changed[name] = (former, now)
    return changed


def warn_of_changes(settings: TrainSettings, content: Mapping[str, object], path: str) -> None:
    """Warns of settings that differ from those in the checkpoint that the run continues from."""
    changed = changed_settings(settings, content)
    if changed:
        _logger.warning('%s was saved with other settings; the run continues with the present ones: %s.', path,
                        ', '.join(f'{flag_name(name)} {former} -> {now}'
                                  for name, (former, now) in sorted(changed.items())))
