"""Ranges and choices of the flags. The parsers show them in --help, and every run is checked against them."""
import argparse
import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass

from cpool_vision.errors import ConfigError


@dataclass(frozen=True)
class Range:
    """A range of finite numbers.

    Attributes:
        least: Lower bound, None for none.
        most: Upper bound, None for none.
        above: Whether to exclude `least`.
        below: Whether to exclude `most`.
    """

    least: float | None = None
    most: float | None = None
    above: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:
        if not math.isfinite(value):
            return False
        low = self.least is None or (value > self.least if self.above else value >= self.least)
        return low and (self.most is None or (value < self.most if self.below else value <= self.most))

    def __str__(self) -> str:
        low = '' if self.least is None else f'{">" if self.above else ">="} {self.least:g}'
        high = '' if self.most is None else f'{"<" if self.below else "<="} {self.most:g}'
        return ' and '.join(filter(None, (low, high))) or 'finite'


SHARE = Range(0, 1)
RATE = Range(0, 1, below=True)  # a rate of 1 would drop everything
COUNT = Range(1)
NATURAL = Range(0)
POSITIVE = Range(0, above=True)

RANGES: dict[str, Range] = {
    **dict.fromkeys((
        'hflip', 'vflip', 'color_jitter_prob', 'grayscale_prob', 'gaussian_blur_prob', 'reprob', 'mixup_prob',
        'mixup_switch_prob', 'model_ema_decay', 'bn_momentum', 'train_size_random_mix', 'bce_target_thresh',
        'cutmix_minmax', 'lr_noise_pct', 'layer_decay_min_scale', 'layer_decay_no_opt_scale'), SHARE),
    **dict.fromkeys(('drop', 'drop_connect', 'drop_path', 'drop_block', 'smoothing', 'opt_betas', 'momentum'), RATE),
    **dict.fromkeys((
        'batch_size', 'validation_batch_size', 'num_classes', 'img_size', 'in_chans', 'input_size', 'grad_accum_steps',
        'epochs', 'stop_epoch', 'save_epochs', 'val_interval', 'log_interval', 'checkpoint_hist', 'lr_base_size',
        'lr_cycle_limit', 'recount',
        'train_num_samples', 'val_num_samples', 'num_samples', 'train_img_sizes', 'train_batch_sizes',
        'train_batches_per_epoch', 'naflex_train_seq_lens', 'naflex_max_seq_len', 'naflex_patch_sizes',
        'kd_student_feature_dim', 'kd_teacher_feature_dim', 'log_freq'), COUNT),
    **dict.fromkeys((
        'lr', 'workers', 'seed', 'recovery_interval', 'max_skipped', 'warmup_epochs', 'cooldown_epochs',
        'patience_epochs', 'start_epoch', 'aug_repeats', 'mixup', 'cutmix', 'mixup_off_epoch', 'color_jitter',
        'epoch_repeats', 'weight_decay', 'warmup_lr', 'min_lr', 'lr_noise', 'lr_noise_std', 'max_bad_samples',
        'predictions_topk',
        'crop_border_pixels', 'decay_milestones', 'train_size_probs', 'naflex_patch_size_probs', 'task_loss_weight',
        'distill_loss_weight', 'train_size_schedule_spread'), NATURAL),
    **dict.fromkeys((
        'lr_base', 'clip_grad', 'opt_eps', 'bn_eps', 'crop_pct', 'std', 'ratio', 'decay_epochs',
        'decay_rate', 'lr_stable_timescale', 'lr_cycle_mul', 'lr_k_decay', 'kd_temperature', 'bce_pos_weight', 'scale'),
        POSITIVE),
    **dict.fromkeys(('layer_decay', 'lr_cycle_decay'), Range(0, 1, above=True)),
    'threshold': Range(0, 1, above=True, below=True),
    'mean': Range(),
    'head_init_bias': Range(),
    'head_init_scale': Range(),
}

_DTYPES = ('float32', 'float16', 'bfloat16')
_RESIZING = ('bilinear', 'bicubic', 'nearest', 'lanczos', 'box', 'hamming')
CHOICES: dict[str, tuple[str, ...]] = {
    'amp_dtype': _DTYPES,
    'model_dtype': _DTYPES,
    'clip_mode': ('norm', 'value', 'agc'),
    'crop_mode': ('center', 'squash', 'border'),
    'dist_bn': ('reduce', 'broadcast', ''),
    'fuser': ('te', 'old', 'nvfuser', ''),
    'gp': ('avg', 'max', 'avgmax', 'catavgmax', 'fast', 'fastavg', 'fastmax', 'fastavgmax', 'fastcatavgmax', 'token',
           'map', 'prr', ''),
    'interpolation': (*_RESIZING, 'random', ''),
    'kd_loss_type': ('kl',),
    'lr_base_scale': ('linear', 'sqrt', ''),
    'mixup_mode': ('batch', 'pair', 'elem'),
    'remode': ('const', 'rand', 'pixel'),
    'results_format': ('csv', 'json', 'md'),
    'sched': ('cosine', 'tanh', 'step', 'multistep', 'poly', 'wsd', 'rsqrt', 'constant', 'plateau', 'none'),
    'torchcompile_mode': ('default', 'reduce-overhead', 'max-autotune', 'max-autotune-no-cudagraphs'),
    'train_crop_mode': ('rrc', 'rkrc', 'rkrr'),
    'train_interpolation': (*_RESIZING, 'random'),
    'worker_seeding': ('all', 'part'),
}


def _join(choices: Iterable[str]) -> str:
    return ', '.join(each or "''" for each in choices)


def flag_name(dest: str) -> str:
    """Returns the flag that sets a setting: `--FIELD-NAME`."""
    return '--' + dest.replace('_', '-')


def refuse_unknown(flag: str, value: str, choices: Iterable[str]) -> None:
    """Checks that a value is one of the choices.

    Raises:
        ConfigError: If it is not. The message lists the choices or, if there are many, the closest ones.
    """
    known = list(choices)
    if value in known:
        return
    close = difflib.get_close_matches(value, known, n=3)
    shown = close if len(known) > 20 and close else known[:20]
    more = ', ...' if shown is not close and len(known) > 20 else ''
    raise ConfigError(f'{flag} {value!r} is unknown: choose {_join(shown)}{more}')


def check_limits(settings: object) -> None:
    """Checks settings against their ranges and choices. Skips flags that `settings` lacks.

    Raises:
        ConfigError: If a value is not allowed. The message names the flag, the value, and the allowed values.
    """
    for dest, limit in RANGES.items():
        value = getattr(settings, dest, None)
        for each in value if isinstance(value, (list, tuple)) else [] if value is None else [value]:
            if each not in limit:
                raise ConfigError(f'{flag_name(dest)} must be {limit}, got {each:g}')
    for dest, choices in CHOICES.items():
        value = getattr(settings, dest, None)
        if value is not None:
            refuse_unknown(flag_name(dest), value, choices)
    betas = getattr(settings, 'opt_betas', None)
    if betas is not None and len(betas) < 2:
        raise ConfigError(f'--opt-betas takes at least two numbers, got {len(betas)}')
    for dest in ('scale', 'ratio', 'cutmix_minmax'):
        pair = getattr(settings, dest, None)
        if pair is not None and (len(pair) != 2 or pair[0] > pair[1]):
            raise ConfigError(f'{flag_name(dest)} takes two numbers, the smaller one first, got '
                              f'{" ".join(map(str, pair))}')
    optimizer = getattr(settings, 'opt', None)
    if optimizer is not None:
        from timm.optim import list_optimizers
        known = [str(name) for name in list_optimizers()]
        if optimizer.lower() not in known and optimizer.lower().split('_')[-1] not in known:  # lookahead_NAME
            refuse_unknown('--opt', optimizer, known)
    compiler = getattr(settings, 'torchcompile', None)
    if compiler:
        import torch
        refuse_unknown('--torchcompile', compiler, torch._dynamo.list_backends(exclude_tags=()))


def show_limits(parser: argparse.ArgumentParser) -> None:
    """Appends the range or the choices of each flag to its help."""
    for action in parser._actions:
        text = action.help or ''
        if action.dest in RANGES:
            action.help = f'{text} [{RANGES[action.dest]}]'
        elif action.dest in CHOICES:
            action.help = f'{text} [{_join(CHOICES[action.dest])}]'
