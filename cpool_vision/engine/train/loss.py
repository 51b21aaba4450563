"""Training loss from the flags, and weights of classes."""
import argparse
from typing import Any

import torch
import torch.nn as nn
from timm.loss import (
    MULTI_LABEL_LOSS_TYPES,
    compute_class_weights,
    create_classification_loss,
    load_class_weights,
)

from cpool_vision.errors import ConfigError

from ..data.loaders import build_dataset, mixing
from ..data.multi_label import MultiHot, is_multi_label

_COMPUTED = ('balanced', 'effective_num')
_RATIO = 'neg_pos'
_ONLY_MULTI_LABEL = ('twoway', 'zlpr', 'db')


def loss_type(args: argparse.Namespace) -> str:
    """Kind of loss: `--loss-type`, else what `--jsd-loss` and `--bce-loss` say, else 'ce', or 'bce' of several labels.

    Raises:
        ConfigError: flags that contradict each other.
    """
    if args.jsd_loss and args.bce_loss:
        raise ConfigError('--jsd-loss and --bce-loss exclude each other: drop one of them')
    former = 'jsd' if args.jsd_loss else 'bce' if args.bce_loss else None
    if former and args.loss_type not in (None, former):
        raise ConfigError(f'--{former}-loss and --loss-type {args.loss_type} exclude each other: drop one of them')
    kind = args.loss_type or former or ('bce' if is_multi_label(args) else 'ce')
    if is_multi_label(args) and kind not in MULTI_LABEL_LOSS_TYPES:
        raise ConfigError(f'--loss-type {kind} is for classes that exclude each other: choose one of '
                          f'{", ".join(MULTI_LABEL_LOSS_TYPES)} for --task multi_label')
    if not is_multi_label(args) and kind in _ONLY_MULTI_LABEL:
        raise ConfigError(f'--loss-type {kind} is for several labels per image: add --task multi_label, or choose '
                          'another')
    return kind


def class_counts(args: argparse.Namespace) -> tuple[torch.Tensor, int]:
    """Images per class in the training split, int64 `(num_classes,)`, and images in all.

    Raises:
        ConfigError: the labels cannot be known without reading the whole set.
        DatasetError: see `dataset.build_dataset`.
    """
    dataset = build_dataset(args, args.train_split, False, args.input_img_mode or 'RGB', args.train_num_samples)
    reader: Any = getattr(dataset, 'reader', None)
    samples = getattr(reader, 'samples', None)
    targets = getattr(dataset, 'targets', None)
    if samples is not None:
        labels = [sample[1] for sample in samples]
    elif targets is not None:
        labels = list(targets() if callable(targets) else targets)
    elif is_multi_label(args) and hasattr(reader, 'iter_targets'):
        labels = list(reader.iter_targets())
    else:
        what = f'--class-weights {args.class_weights}' if args.class_weights else f'--loss-type {loss_type(args)}'
        raise ConfigError(f'{what}: the labels of this data set are not listed, so that they cannot be counted; give a '
                          'file of weights, or choose another loss')
    if isinstance(getattr(dataset, 'target_transform', None), MultiHot):
        counts = sum((dataset.target_transform(each) >= 0.5).long() for each in labels)
        return torch.as_tensor(counts), len(labels)
    return torch.bincount(torch.as_tensor([int(label) for label in labels]), minlength=args.num_classes), len(labels)


def _counts_of_every_class(args: argparse.Namespace) -> tuple[torch.Tensor, int]:
    counts, total = class_counts(args)
    missing = counts.eq(0).nonzero().flatten().tolist()
    if missing:
        raise ConfigError(f'--class-weights {args.class_weights}: class {missing[0]} has no image in split '
                          f'{args.train_split!r}; lower --num-classes, or give a file of weights')
    return counts, total


def resolve_positive_weight(args: argparse.Namespace) -> torch.Tensor | float | None:
    """Weight of positive targets: `--bce-pos-weight`, or (N - n_c) / n_c of each class for `--class-weights neg_pos`.

    Raises:
        ConfigError: both, another task than multi_label, or a class that no image has, or that every image has.
        DatasetError: see `class_counts`.
    """
    if args.class_weights != _RATIO:
        return args.bce_pos_weight
    if not is_multi_label(args):
        raise ConfigError(f'--class-weights {_RATIO} weighs positive targets: add --task multi_label, or choose '
                          f'{" or ".join(_COMPUTED)}')
    if args.bce_pos_weight is not None:
        raise ConfigError(f'--class-weights {_RATIO} and --bce-pos-weight exclude each other: drop one of them')
    counts, total = _counts_of_every_class(args)
    always = counts.eq(total).nonzero().flatten().tolist()
    if always:
        raise ConfigError(f'--class-weights {_RATIO}: every image of split {args.train_split!r} has class {always[0]}, '
                          'so that it cannot be learned; leave the class out, or give a file of weights')
    return compute_class_weights(counts, total, method=_RATIO)[1]


def resolve_weights(args: argparse.Namespace) -> torch.Tensor | None:
    """Weight of each class, float32 `(num_classes,)`; None without `--class-weights` and for 'neg_pos'.

    'balanced' is N / (C n_c) for n_c of N images in class c of C; 'effective_num' is (1 - b) / (1 - b^n_c) with
    b = 0.999, scaled to mean 1 (Cui et al., arXiv 1901.05555).

    Raises:
        ConfigError: unreadable file, another number of weights than classes, or a class without images.
        DatasetError: see `class_counts`.
    """
    value = args.class_weights
    if not value or value == _RATIO:
        return None
    if value in _COMPUTED:
        counts, total = _counts_of_every_class(args)
        if value == 'balanced':
            return total / (len(counts) * counts.float())
        return compute_class_weights(counts, total, method=value)[1]
    try:
        with open(value, encoding='utf-8'):
            pass
        weights: Any = load_class_weights(value)
    except OSError as error:
        raise ConfigError(f'--class-weights {value!r} cannot be read ({error.strerror}): name a file, or one of '
                          f'{", ".join(_COMPUTED)}') from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f'--class-weights {value!r} holds no weights ({error}): write one number per class') \
            from error
    if not isinstance(weights, torch.Tensor) or len(weights) != args.num_classes:
        count = len(weights) if isinstance(weights, torch.Tensor) else int(weights is not None)
        raise ConfigError(f'--class-weights {value!r} holds {count} weights, the model has {args.num_classes} '
                          'classes: write one per class')
    return weights


def build_loss(args: argparse.Namespace) -> nn.Module:
    """Training loss, in the form that the targets ask for.

    Mixup and CutMix give soft targets that are smoothed already. Weighted cross-entropy is PyTorch's: class indices
    are averaged over the sum of their weights, soft targets over the batch.

    Raises:
        ConfigError: flags that would have no effect, or that exclude each other.
        DatasetError: see `class_counts`.
    """
    kind, several = loss_type(args), is_multi_label(args)
    if kind == 'jsd' and args.aug_splits < 2:
        raise ConfigError('the Jensen-Shannon loss needs --aug-splits 2 or more: add it')
    if kind != 'bce':
        idle = [flag for flag, given in (
            ('--bce-sum', args.bce_sum), ('--bce-target-thresh', args.bce_target_thresh),
            ('--bce-pos-weight', None if several and kind == 'asl' else args.bce_pos_weight))
            if given not in (False, None)]
        if idle:
            raise ConfigError(f'{idle[0]} has no effect without --bce-loss: add it, or leave {idle[0]} out')
    if args.class_weights and kind not in (('bce', 'asl') if several else ('ce', 'bce')):
        losses = 'bce and asl' if several else 'cross-entropy and --bce-loss'
        raise ConfigError(f'--class-weights goes with {losses}, not with {kind}: leave it out')
    mixed = bool(mixing(args))
    if kind in ('twoway', 'zlpr') and (mixed or args.smoothing):
        raise ConfigError(f'--loss-type {kind} takes labels that are 0 or 1: add --smoothing 0, and leave mixup and '
                          'CutMix out')
    weights, positive = resolve_weights(args), resolve_positive_weight(args)
    counts, total = class_counts(args) if kind == 'db' else (None, None)
    if kind == 'ce' and weights is not None:
        return nn.CrossEntropyLoss(weights, label_smoothing=0. if mixed else args.smoothing)
    try:
        return create_classification_loss(
            kind,
            multi_label=several,
            smoothing=args.smoothing,
            soft_targets=mixed,
            class_weight=weights,
            pos_weight=positive,
            bce_target_thresh=args.bce_target_thresh,
            bce_sum=args.bce_sum,
            jsd_splits=args.aug_splits,
            class_counts=counts,
            num_samples=total,
        )
    except ValueError as error:
        raise ConfigError(f'--loss-type {kind} cannot be set up ({error}): check the loss and mixup flags') from error
