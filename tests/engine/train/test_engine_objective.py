"""Losses, weights of classes and learning rate curves, against timm's objects and closed formulas."""
import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.loss import AsymmetricLossSingleLabel, BinaryCrossEntropy, JsdCrossEntropy, PolyCrossEntropy
from timm.scheduler.wsd_lr import WSDLRScheduler

from cpool_vision.engine.data.multi_label import Classes
from cpool_vision.engine.train import loss, objective
from cpool_vision.errors import ConfigError

Args = Callable[..., Any]
LR = 0.4
NOISE: Any = [0.2 * 12, 0.9 * 12]


def sgd() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)


def curve(args: argparse.Namespace, updates: int = 0) -> tuple[list[float], int]:
    """Learning rate that each epoch, or each of `updates` per epoch, is trained with, and the number of epochs."""
    optimizer = sgd()
    scheduler, epochs = objective.build_scheduler(args, optimizer, updates or 1, decreasing=False)
    rates = []
    for step in range(epochs * (updates or 1)):
        rates.append(optimizer.param_groups[0]['lr'])
        if updates:
            scheduler.step_update(step + 1)
        else:
            scheduler.step(step + 1)
    return rates, epochs


FORMULAS: dict[str, tuple[list[str], Callable[[float], float], int]] = {
    # flags, rate at an epoch after the warm-up, total epochs
    'cosine': (['--epochs', '20', '--min-lr', '0.1'], lambda t: 0.1 + 0.15 * (1 + math.cos(math.pi * t / 20)), 20),
    'k-decay': (['--epochs', '20', '--lr-k-decay', '2'], lambda t: 0.2 * (1 + math.cos(math.pi * (t / 20) ** 2)), 20),
    'tanh': (['--sched', 'tanh', '--epochs', '20', '--warmup-epochs', '0'],
             lambda t: 0.2 * (1 - math.tanh(-7 * (1 - t / 20) + 3 * t / 20)), 20),
    'poly': (['--sched', 'poly', '--epochs', '20', '--decay-rate', '2'], lambda t: LR * (1 - t / 20) ** 2, 20),
    'step': (['--sched', 'step', '--epochs', '20', '--decay-epochs', '6', '--decay-rate', '0.5'],
             lambda t: LR * 0.5 ** (t // 6), 20),
    'multistep': (['--sched', 'multistep', '--epochs', '20', '--decay-milestones', '7', '12', '--decay-rate', '0.1'],
                  lambda t: LR * 0.1 ** ((t >= 7) + (t >= 12)), 20),
    'constant': (['--sched', 'constant', '--epochs', '20'], lambda t: LR, 20),
    'wsd': (['--sched', 'wsd', '--epochs', '20', '--decay-epochs', '8', '--min-lr', '0.04'],
            lambda t: LR if t <= 12 else 0.04 + 0.36 * (1 - math.sqrt((t - 12) / 8)), 20),
    'wsd-cosine': (['--sched', 'wsd', '--epochs', '20', '--decay-epochs', '8', '--lr-decay-fn', 'cosine'],
                   lambda t: LR if t <= 12 else 0.2 * (1 + math.cos(math.pi * (t - 12) / 8)), 20),
    'wsd-default-share': (['--sched', 'wsd', '--epochs', '24'],  # 0.2 of 24 - 4 epochs
                          lambda t: LR if t <= 20 else LR * (1 - math.sqrt((t - 20) / 4)), 24),
    'rsqrt': (['--sched', 'rsqrt', '--epochs', '20', '--decay-epochs', '8'],
              lambda t: LR * (1 + (t - 4) / 4) ** -0.5 * (1 - max(0, t - 12) / 8), 20),
    'rsqrt-timescale': (['--sched', 'rsqrt', '--epochs', '20', '--decay-epochs', '8', '--lr-stable-timescale', '2'],
                        lambda t: LR * (1 + (t - 4) / 2) ** -0.5 * (1 - max(0, t - 12) / 8), 20),
    'cooldown': (['--epochs', '20', '--cooldown-epochs', '3', '--min-lr', '0.1'],
                 lambda t: 0.1 + 0.15 * (1 + math.cos(math.pi * min(t, 20) / 20)), 23),
    'cycles': (['--epochs', '10', '--lr-cycle-limit', '2', '--lr-cycle-decay', '0.5', '--lr-cycle-mul', '1'],
               lambda t: 0.2 * 0.5 ** (t // 10) * (1 + math.cos(math.pi * (t % 10) / 10)), 20),
    'longer-cycles': (['--epochs', '10', '--lr-cycle-limit', '2', '--lr-cycle-decay', '1', '--lr-cycle-mul', '2'],
                      lambda t: 0.2 * (1 + math.cos(math.pi * (t / 10 if t < 10 else (t - 10) / 20))), 30),
    'prefix': (['--epochs', '20', '--warmup-prefix'], lambda t: 0.2 * (1 + math.cos(math.pi * (t - 4) / 20)), 24),
}


@pytest.mark.parametrize('updates', [0, 3], ids=['epochs', 'updates'])
@pytest.mark.parametrize('name', FORMULAS)
def test_rates_follow_the_formula(train_args: Args, name: str, updates: int) -> None:
    flags, formula, total = FORMULAS[name]
    args = train_args('--warmup-epochs', '4', '--warmup-lr', '0.02', *flags, *['--sched-on-updates'] * bool(updates))
    rates, epochs = curve(args, updates)
    assert epochs == total
    per_epoch = updates or 1
    for step, rate in enumerate(rates):
        t = step / per_epoch
        early = 1 / per_epoch if name == 'multistep' else 0  # timm lowers the rate one step before a milestone
        expected = 0.02 + (LR - 0.02) * t / 4 if t < args.warmup_epochs else formula(t + early + 1e-9 * bool(early))
        assert rate == pytest.approx(expected, rel=1e-6, abs=1e-12), (name, step)


def test_noise_is_that_of_timm(train_args: Args) -> None:
    optimizer = sgd()
    scheduler = WSDLRScheduler(
        optimizer, 10, 4, stable_fn='rsqrt', decay_fn='linear', warmup_t=2, warmup_lr_init=1e-5,
        noise_range_t=NOISE, noise_pct=0.5, noise_std=0.7, noise_seed=5)
    expected = []
    for epoch in range(12):
        expected.append(optimizer.param_groups[0]['lr'])
        scheduler.step(epoch + 1)
    rates, _ = curve(train_args(
        '--epochs', '12', '--warmup-epochs', '2', '--sched', 'rsqrt', '--decay-epochs', '4', '--lr-noise', '0.2', '0.9',
        '--lr-noise-pct', '0.5', '--lr-noise-std', '0.7', '--seed', '5'))
    assert rates == expected and len(set(rates)) > 3


def test_plateau_waits_and_lowers(train_args: Args) -> None:
    optimizer = sgd()
    scheduler, _ = objective.build_scheduler(
        train_args('--sched', 'plateau', '--patience-epochs', '2', '--decay-rate', '0.5', '--warmup-epochs', '0'),
        optimizer, 1, decreasing=True)
    rates = []
    for epoch, metric in enumerate([3., 2., 2., 2., 2., 2.]):
        scheduler.step(epoch + 1, metric)
        rates.append(optimizer.param_groups[0]['lr'])
    assert rates == [LR, LR, LR, LR, LR / 2, LR / 2]


@pytest.mark.parametrize('flags, words', [
    (['--lr-decay-fn', 'linear'], '--lr-decay-fn'),
    (['--sched', 'wsd', '--lr-stable-timescale', '3'], '--lr-stable-timescale'),
    (['--sched', 'wsd', '--lr-decay-fn', 'sine', '--epochs', '20'], 'sine'),
    (['--sched', 'wsd', '--epochs', '20', '--decay-epochs', '30'], 'decay_epochs'),
    (['--sched', 'rsqrt', '--epochs', '20', '--warmup-epochs', '0'], 'stable_timescale'),
    (['--sched', 'multistep', '--decay-milestones', '9', '3'], '--decay-milestones'),
    (['--sched', 'plateau', '--sched-on-updates'], 'Plateau'),
])
def test_unusable_schedules_are_errors(train_args: Args, flags: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        objective.build_scheduler(train_args(*flags), sgd(), 2, decreasing=False)


LOGITS = torch.tensor([[2., 0.5, -1.], [0.3, 0.1, 0.2], [-2., 1., 0.]])
TARGET = torch.tensor([0, 2, 1])


def built(train_args: Args, *flags: str) -> torch.nn.Module:
    settings = train_args('--num-classes', '3', *flags)
    return loss.build_loss(settings, Classes(settings.num_classes))


@pytest.mark.parametrize('flags, kind', [
    (['--loss-type', 'bce'], BinaryCrossEntropy),
    (['--loss-type', 'asl'], AsymmetricLossSingleLabel),
    (['--loss-type', 'poly', '--mixup', '0.2'], PolyCrossEntropy),
    (['--loss-type', 'jsd', '--aug-splits', '2'], JsdCrossEntropy),
    (['--loss-type', 'bce', '--bce-loss'], BinaryCrossEntropy),
])
def test_loss_type(train_args: Args, flags: list[str], kind: type) -> None:
    assert type(built(train_args, *flags)) is kind


@pytest.fixture
def weight_file(tmp_path: Path) -> str:
    path = tmp_path / 'weights.txt'
    path.write_text('1 2\n4\n')
    return str(path)


def test_weights_enter_cross_entropy(train_args: Args, weight_file: str, tmp_path: Path) -> None:
    log_p = LOGITS.log_softmax(-1)
    weights = torch.tensor([1., 2., 4.])
    hard = -(weights[TARGET] * log_p[range(3), TARGET]).sum() / weights[TARGET].sum()
    plain = built(train_args, '--class-weights', weight_file, '--smoothing', '0')
    torch.testing.assert_close(plain(LOGITS, TARGET), hard)
    soft_targets = torch.tensor([[0.7, 0.3, 0.], [0., 0.5, 0.5], [0., 1., 0.]])
    mixed = built(train_args, '--class-weights', weight_file, '--mixup', '0.3')
    torch.testing.assert_close(mixed(LOGITS, soft_targets), -(weights * soft_targets * log_p).sum() / 3)
    as_json = tmp_path / 'weights.json'
    as_json.write_text(json.dumps([1, 2, 4]))
    again = built(train_args, '--class-weights', str(as_json), '--smoothing', '0')
    assert torch.equal(again(LOGITS, TARGET), plain(LOGITS, TARGET))
    assert not torch.equal(built(train_args, '--smoothing', '0')(LOGITS, TARGET), hard)


def test_weights_enter_binary_cross_entropy(train_args: Args, weight_file: str) -> None:
    hot = F.one_hot(TARGET, 3).float()
    each = F.binary_cross_entropy_with_logits(LOGITS, hot, reduction='none') * torch.tensor([1., 2., 4.])
    loss_fn = built(train_args, '--class-weights', weight_file, '--bce-loss', '--smoothing', '0')
    torch.testing.assert_close(loss_fn(LOGITS, TARGET), each.mean())


def test_computed_weights_follow_the_training_split(train_args: Args, image_root: str, tmp_path: Path) -> None:
    flags = ['--data-dir', image_root, '--train-split', 'validation', '--num-classes', '3']  # 3, 3 and 1 images
    balanced = loss.resolve_weights(train_args(*flags, '--class-weights', 'balanced'), Classes(3))
    assert balanced is not None and balanced.tolist() == pytest.approx([7 / 9, 7 / 9, 7 / 3])
    number = loss.resolve_weights(train_args(*flags, '--class-weights', 'effective_num'), Classes(3))
    raw = torch.tensor([0.001 / (1 - 0.999 ** count) for count in (3, 3, 1)])
    torch.testing.assert_close(number, raw / raw.mean())
    shapes = loss.resolve_weights(train_args(
        '--dataset', 'cpool/shapes', '--train-num-samples', '25', '--num-classes', '10', '--class-weights', 'balanced'),
        Classes(10))
    assert shapes is not None and shapes.tolist() == pytest.approx([25 / 30] * 5 + [25 / 20] * 5)


@pytest.mark.parametrize('flags, words', [
    (['--class-weights', 'none.txt'], 'none.txt'),
    (['--class-weights', 'FILE', '--num-classes', '4'], 'holds 3 weights.*4 classes'),
    (['--class-weights', 'FILE', '--loss-type', 'poly'], 'not with poly'),
    (['--class-weights', 'WORDS'], 'no weights'),
    (['--class-weights', 'balanced', '--num-classes', '5'], 'class 3 has no image'),
    (['--loss-type', 'ce', '--bce-loss'], 'cannot be combined'),
    (['--loss-type', 'jsd'], '--aug-splits'),
    (['--loss-type', 'asl', '--mixup', '0.1'], 'Mixup'),
    (['--bce-sum', '--loss-type', 'poly'], '--bce-loss'),
])
def test_unusable_losses_are_errors(train_args: Args, image_root: str, weight_file: str, tmp_path: Path,
                                    flags: list[str], words: str) -> None:
    (tmp_path / 'words.txt').write_text('one two three')
    places = {'FILE': weight_file, 'WORDS': str(tmp_path / 'words.txt')}
    with pytest.raises(ConfigError, match=words):
        built(train_args, '--data-dir', image_root, *(places.get(flag, flag) for flag in flags))
