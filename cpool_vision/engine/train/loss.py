"""Builds the training loss and its class weights from the flags."""

import torch
import torch.nn as nn
from timm.loss import (
    MULTI_LABEL_LOSS_TYPES,
    compute_class_weights,
    create_classification_loss,
    load_class_weights,
)

from cpool_vision.errors import ConfigError
from cpool_vision.reading import open_regular, reason

from ..data.dataset import build_dataset
from ..data.loader_flags import mixes_images
from ..data.multi_label import Classes, MultiHot
from ..settings.train import LossSettings

_COMPUTED = ('balanced', 'effective_num')
_RATIO = 'neg_pos'
_ONLY_MULTI_LABEL = ('twoway', 'zlpr', 'db')


def loss_type(settings: LossSettings) -> str:
    """Returns the type of the loss: `--loss-type`, `--jsd-loss` or `--bce-loss`; by default 'ce', or 'bce' of labels.

    Raises:
        ConfigError: If flags contradict each other.
    """
    if settings.jsd_loss and settings.bce_loss:
        raise ConfigError('--jsd-loss and --bce-loss cannot be combined: drop one of them')
    former = 'jsd' if settings.jsd_loss else 'bce' if settings.bce_loss else None
    if former and settings.loss_type not in (None, former):
        raise ConfigError(f'--{former}-loss and --loss-type {settings.loss_type} cannot be combined: drop one of them')
    kind = settings.loss_type or former or ('bce' if settings.multi_label else 'ce')
    if settings.multi_label and kind not in MULTI_LABEL_LOSS_TYPES:
        raise ConfigError(f'--loss-type {kind} is for one class per image: choose one of '
                          f'{", ".join(MULTI_LABEL_LOSS_TYPES)} for --task multi_label')
    if not settings.multi_label and kind in _ONLY_MULTI_LABEL:
        raise ConfigError(f'--loss-type {kind} is for several labels per image: add --task multi_label, or choose '
                          'another')
    return kind


def class_counts(settings: LossSettings, classes: Classes) -> tuple[torch.Tensor, int]:
    """Counts the images in the training split.

    Returns:
        Images per class, int64 `(num_classes,)`, and the total number of images.

    Raises:
        ConfigError: If the dataset has no list of its labels.
        DatasetError: See `dataset.build_dataset`.
    """
    dataset = build_dataset(settings, classes, settings.train_split, False, settings.input_img_mode or 'RGB',
                            settings.train_num_samples)
    reader = getattr(dataset, 'reader', None)
    samples = getattr(reader, 'samples', None)
    targets = getattr(dataset, 'targets', None)
    if samples is not None:
        labels = [sample[1] for sample in samples]
    elif targets is not None:
        labels = list(targets() if callable(targets) else targets)
    elif settings.multi_label and reader is not None and hasattr(reader, 'iter_targets'):
        labels = list(reader.iter_targets())
    else:
        what = f'--class-weights {settings.class_weights}' if settings.class_weights else \
            f'--loss-type {loss_type(settings)}'
        raise ConfigError(f'{what}: this dataset has no list of labels to count; give a file of weights, or choose '
                          'another loss')
    if isinstance(getattr(dataset, 'target_transform', None), MultiHot):
        counts = sum((dataset.target_transform(each) >= 0.5).long() for each in labels)
        return torch.as_tensor(counts), len(labels)
    return torch.bincount(torch.as_tensor([int(label) for label in labels]), minlength=classes.count), len(labels)


def _counts_of_every_class(settings: LossSettings, classes: Classes) -> tuple[torch.Tensor, int]:
    counts, total = class_counts(settings, classes)
    missing = counts.eq(0).nonzero().flatten().tolist()
    if missing:
        raise ConfigError(f'--class-weights {settings.class_weights}: class {missing[0]} has no image in split '
                          f'{settings.train_split!r}; lower --num-classes, or give a file of weights')
    return counts, total


def resolve_positive_weight(settings: LossSettings, classes: Classes) -> torch.Tensor | float | None:
    """Returns the weight of positive targets: `--bce-pos-weight`, or (N - n_c) / n_c for `--class-weights neg_pos`.

    Here n_c of N images have class c.

    Raises:
        ConfigError: If both are given, the task is not multi_label, or no image or every image has a class.
        DatasetError: See `class_counts`.
    """
    if settings.class_weights != _RATIO:
        return settings.bce_pos_weight
    if not settings.multi_label:
        raise ConfigError(f'--class-weights {_RATIO} weighs positive targets: add --task multi_label, or choose '
                          f'{" or ".join(_COMPUTED)}')
    if settings.bce_pos_weight is not None:
        raise ConfigError(f'--class-weights {_RATIO} and --bce-pos-weight cannot be combined: drop one of them')
    counts, total = _counts_of_every_class(settings, classes)
    always = counts.eq(total).nonzero().flatten().tolist()
    if always:
        raise ConfigError(f'--class-weights {_RATIO}: every image of split {settings.train_split!r} has class '
                          f'{always[0]}, which cannot be learned; leave the class out, or give a file of weights')
    return compute_class_weights(counts, total, method=_RATIO)[1]


def resolve_weights(settings: LossSettings, classes: Classes) -> torch.Tensor | None:
    """Returns the class weights, float32 `(num_classes,)`; None without `--class-weights` and for 'neg_pos'.

    With n_c of N images in class c of C, 'balanced' is N / (C n_c), and 'effective_num' is (1 - b) / (1 - b^n_c) with
    b = 0.999, scaled to mean 1 (Cui et al., arXiv 1901.05555).

    Raises:
        ConfigError: If the file is unreadable or has the wrong number of weights, or a class has no images.
        DatasetError: See `class_counts`.
    """
    value = settings.class_weights
    if not value or value == _RATIO:
        return None
    if value in _COMPUTED:
        counts, total = _counts_of_every_class(settings, classes)
        if value == 'balanced':
            return total / (len(counts) * counts.float())
        return compute_class_weights(counts, total, method=value)[1]
    try:
        open_regular(value).close()
        weights = load_class_weights(value)
    except OSError as error:
        raise ConfigError(f'--class-weights {value!r} cannot be read ({reason(error)}): name a file, or one of '
                          f'{", ".join(_COMPUTED)}') from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f'--class-weights {value!r} holds no weights ({error}): write one number per class') \
            from error
    if not isinstance(weights, torch.Tensor) or len(weights) != classes.count:
        count = len(weights) if isinstance(weights, torch.Tensor) else int(weights is not None)
        raise ConfigError(f'--class-weights {value!r} holds {count} weights, the model has {classes.count} '
                          'classes: write one per class')
    return weights


def build_loss(settings: LossSettings, classes: Classes) -> nn.Module:
    """Builds the training loss.

    Targets of mixup and CutMix are soft and already smoothed. Weighted cross-entropy is PyTorch's: for class indices it
    divides by the sum of the weights, for soft targets by the batch size.

    Raises:
        ConfigError: If a flag has no effect, or flags cannot be combined.
        DatasetError: See `class_counts`.
    """
    kind, several = loss_type(settings), settings.multi_label
    if kind == 'jsd' and settings.aug_splits < 2:
        raise ConfigError('the Jensen-Shannon loss needs --aug-splits 2 or more: add it')
    if kind != 'bce':
        idle = [flag for flag, given in (
            ('--bce-sum', settings.bce_sum), ('--bce-target-thresh', settings.bce_target_thresh),
            ('--bce-pos-weight', None if several and kind == 'asl' else settings.bce_pos_weight))
            if given not in (False, None)]
        if idle:
            raise ConfigError(f'{idle[0]} has no effect without --bce-loss: add it, or leave {idle[0]} out')
    if settings.class_weights and kind not in (('bce', 'asl') if several else ('ce', 'bce')):
        losses = 'bce and asl' if several else 'cross-entropy and --bce-loss'
        raise ConfigError(f'--class-weights works with {losses}, not with {kind}: leave it out')
    mixed = mixes_images(settings)
    if kind in ('twoway', 'zlpr') and (mixed or settings.smoothing):
        raise ConfigError(f'--loss-type {kind} takes labels that are 0 or 1: add --smoothing 0, and leave mixup and '
                          'CutMix out')
    weights, positive = resolve_weights(settings, classes), resolve_positive_weight(settings, classes)
    counts, total = class_counts(settings, classes) if kind == 'db' else (None, None)
    if kind == 'ce' and weights is not None:
        return nn.CrossEntropyLoss(weights, label_smoothing=0. if mixed else settings.smoothing)
    try:
        return create_classification_loss(
            kind,
            multi_label=several,
            smoothing=settings.smoothing,
            soft_targets=mixed,
            class_weight=weights,
            pos_weight=positive,
            bce_target_thresh=settings.bce_target_thresh,
            bce_sum=settings.bce_sum,
            jsd_splits=settings.aug_splits,
            class_counts=counts,
            num_samples=total,
        )
    except ValueError as error:
        raise ConfigError(f'--loss-type {kind} cannot be set up ({error}): check the loss and mixup flags') from error
