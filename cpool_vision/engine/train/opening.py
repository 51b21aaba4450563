"""What a run logs before its first epoch: input, optimizer, schedule, and differences to the run that it continues."""
import logging
from collections.abc import Mapping
from typing import Any

import torch

from ..settings.shared import InputConfig, settings_of
from ..settings.train import OptimSettings, TrainSettings
from .run import Run

_logger = logging.getLogger(__name__)
# settings that change where and how often a run reports, or that follow from the machine
_WITHOUT_EFFECT = {
    'data', 'data_dir', 'output', 'experiment', 'resume', 'no_resume_opt', 'start_epoch', 'stop_epoch', 'save_epochs',
    'log_interval', 'checkpoint_hist', 'recovery_interval', 'save_images', 'log_wandb', 'wandb_project', 'wandb_tags',
    'wandb_resume_id', 'no_tensorboard', 'log_mlflow', 'local_rank', 'device', 'workers', 'pin_mem', 'num_classes'}


def log_opening(run: Run, data_config: InputConfig) -> None:
    """Logs what images become, the optimizer and the schedule, and warns of a schedule that is all warm-up."""
    settings = run.settings
    _logger.info('Input: %s.', ', '.join(f'{name} {value}' for name, value in data_config.items()))
    _logger.info('Optimizer: %s.', describe_optimizer(run.optimizer))
    _logger.info('Schedule: %s, %s.', settings.sched, describe_schedule(settings, run.epochs))
    if run.scheduler is not None and settings.warmup_epochs >= settings.epochs and not settings.warmup_prefix:
        _logger.warning('The warm-up of %d epochs fills all %d epochs, so that the learning rate never reaches --lr: '
                        'lower --warmup-epochs or raise --epochs.', settings.warmup_epochs, settings.epochs)


def describe_optimizer(optimizer: torch.optim.Optimizer) -> str:
    """Class, learning rate, momentum or betas, and how many parameters have which weight decay."""
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
    """Length and ends of the schedule, as in '300 epochs, 5 of them warm-up from 1e-05, per update, floor 0'."""
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


def changed_settings(settings: TrainSettings, content: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings that a checkpoint was trained with and this run has otherwise.

    Args:
        settings: of this run.
        content: the checkpoint's dictionary.

    Returns:
        (saved, now) by the name of the setting. A setting that is None on either side is not a change.
    """
    saved, changed = settings_of(content), {}
    for name, now in settings.as_dict().items():
        former = saved.get(name)
        if name in _WITHOUT_EFFECT or name not in saved or former is None or now is None:
            continue
        plain = [list(each) if isinstance(each, (list, tuple)) else dict(each) if isinstance(each, Mapping) else each
                 for each in (former, now)]
        if plain[0] != plain[1]:
            changed[name] = (former, now)
    return changed


def warn_of_changes(settings: TrainSettings, content: Mapping[str, Any], path: str) -> None:
    """Lists the settings that differ from those of the checkpoint that the run continues from."""
    changed = changed_settings(settings, content)
    if changed:
        _logger.warning('%s was saved with other settings; the run continues with the present ones: %s.', path,
                        ', '.join(f'--{name.replace("_", "-")} {former} -> {now}'
                                  for name, (former, now) in sorted(changed.items())))
