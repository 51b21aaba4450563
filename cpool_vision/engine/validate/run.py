"""Validation of one model: on one split, or on a folder of corrupted copies of it."""
import argparse
import copy
import logging
import math
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed
import torch.nn as nn
import torch.utils.data
from timm.layers import apply_test_time_pool
from timm.utils import reparameterize_model

import cpool_vision  # noqa: F401 - registers the variants
from cpool_vision.errors import ConfigError, DatasetError

from ..data import synsets
from ..data.dataset import numbers_folders
from ..data.fingerprint import check_classes, classes_in, classes_of
from ..data.loaders import base_dataset, build_eval_loader
from ..data.multi_label import CLASS_NAMES, adopt_labels, check_task, is_multi_label
from ..data.naflex import build_naflex_eval_loader
from ..data.unreadable import refuse_unreadable, sample_name
from ..device import Precision, resolve_precision, seed_everything, settle_threads, setup_device
from ..model import load_eval_model, resolve_input
from . import corruption, results, results_plots
from .cost import count_macs, measure_cost
from .evaluate import check_views, evaluate
from .labels import ClassSubset, describe_classes, read_class_subset, read_real_labels, read_valid_labels
from .metrics import ClassTally, MultiLabelTally
from .multi_label import LabelTally
from .results_rows import (
    LabelMeasurement,
    Measurement,
    class_details,
    environment,
    head_of_row,
    label_details,
    label_row_of,
    row_of,
)

_logger = logging.getLogger(__name__)


def _check(args: argparse.Namespace) -> None:
    if args.batch_size < 1:
        raise ConfigError(f'--batch-size must be >= 1, got {args.batch_size}')
    if args.seed < 0:
        raise ConfigError(f'--seed must be >= 0, got {args.seed}')
    if args.num_gpu < 1 or args.num_gpu > 1 and torch.cuda.device_count() < args.num_gpu:
        raise ConfigError(f'--num-gpu {args.num_gpu}: {torch.cuda.device_count()} CUDA devices are available')
    if args.num_gpu > 1 and args.distributed:
        raise ConfigError(f'--num-gpu {args.num_gpu} splits batches within one process: drop it under torchrun')
    check_task(args)
    check_views(args.tta, args.naflex_loader)
    for value, name in ((args.max_bad_samples, '--max-bad-samples'), (args.predictions_topk, '--predictions-topk')):
        if value < 0 or not math.isfinite(value):
            raise ConfigError(f'{name} must be >= 0, got {value}')
    for one, other in (('real_labels', 'valid_labels'), ('class_subset', 'valid_labels'), ('class_subset', 'class_map'),
                       ('corruptions', 'real_labels'), ('corruptions', 'predictions'), ('corruptions', 'plots'),
                       ('corruptions', 'dataset'), ('class_subset', 'dataset')):
        if getattr(args, one) and getattr(args, other):
            first, second = (f'--{name.replace("_", "-")}' for name in (one, other))
            raise ConfigError(f'{first} and {second} exclude each other: drop one of them')
    if args.predictions:
        results.check_writable(args.predictions, '--predictions')
        if not args.predictions.endswith('.npz'):
            raise ConfigError(f'--predictions {args.predictions!r}: give the file the suffix .npz')
    if args.plots:
        results_plots.check_plots(args.plots)


def _generate_code(model: nn.Module, args: argparse.Namespace) -> Any:
    if args.torchscript:
        return torch.jit.script(model)
    if args.torchcompile:
        torch._dynamo.reset()
        return torch.compile(model, backend=args.torchcompile, mode=args.torchcompile_mode)
    if args.aot_autograd:
        from functorch.compile import memory_efficient_fusion
        return memory_efficient_fusion(model)
    return model


def _warn_of_mismatch(args: argparse.Namespace, content: dict[str, Any], data_config: dict[str, Any]) -> None:
    """Says where the measurement departs silently from what the checkpoint holds or was trained with."""
    if args.use_ema and content and not any(content.get(key) is not None for key in ('state_dict_ema', 'model_ema')):
        _logger.warning('--use-ema: %s has no averaged weights; its plain weights are measured.', args.checkpoint)
    trained = content.get('args') or {}
    if isinstance(trained, argparse.Namespace):  # timm's own checkpoints
        trained = vars(trained)
    for key in ('mean', 'std'):
        values = trained.get(key)
        if values and list(values) != list(data_config[key]):
            _logger.warning(
                '%s was trained with --%s %s and is measured with %s: pass the former to agree with the training run.',
                args.checkpoint, key, ' '.join(map(str, values)), ' '.join(map(str, data_config[key])))


@torch.inference_mode()
def _warm_up(model: Any, size: tuple[int, ...], args: argparse.Namespace, device: torch.device, precision: Precision,
             ) -> None:
    """One unmeasured batch: the first call compiles and allocates."""
    image = torch.zeros((args.batch_size, *size), device=device, dtype=precision.model_dtype or torch.float32)
    if args.channels_last:
        image = image.contiguous(memory_format=torch.channels_last)
    with precision.autocast():
        model(image)


def known_classes(content: dict[str, Any], model: Any, num_classes: int) -> dict[str, int]:
    """Numbers of the classes by name that a model was trained with, from its checkpoint or its configuration."""
    names = (getattr(model, 'pretrained_cfg', None) or {}).get('label_names')
    if classes_in(content) or not isinstance(names, (list, tuple)) or len(names) != num_classes:
        return classes_in(content)
    return {str(name): index for index, name in enumerate(names)}


def is_part_of_imagenet(args: argparse.Namespace, dataset: Any) -> bool:
    """Whether a model of the 1000 classes is to be measured on folders of some of them, which would be renumbered."""
    names = classes_of(dataset)
    return args.num_classes == 1000 > len(names) > 0 and numbers_folders(args) and set(names) <= set(
        synsets.synset_numbers())


@dataclass
class Subject:
    """A model ready to be measured.

    Attributes:
        args: settings.
        device, precision: where and how.
        model: with its weights, compiled if asked for.
        parameters: how many.
        data_config: input size, normalisation, interpolation, crop.
        crop_pct: side of the crop over the resized side.
        valid_labels: outputs that compete, None for all.
        subset: folders and classes of `--class-subset`.
        cost: see `cost.measure_cost`; None if not asked for.
        classes: their numbers by name as the model was trained with them; empty if not known.
    """

    args: argparse.Namespace
    device: torch.device
    precision: Precision
    model: Any
    parameters: int
    data_config: dict[str, Any]
    crop_pct: float
    valid_labels: list[int] | None = None
    subset: ClassSubset | None = None
    cost: dict[str, float] | None = None
    classes: dict[str, int] = field(default_factory=dict)


def _prepare(args: argparse.Namespace, device: torch.device) -> Subject:
    precision = resolve_precision(args, device)
    seed_everything(args.seed)
    model, content = load_eval_model(args)
    if args.reparam:
        model = reparameterize_model(model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    _logger.info('Model %s: %d parameters.', args.model, parameters)
    data_config = resolve_input(model, args, use_test_size=not args.use_train_size)
    _warn_of_mismatch(args, content, data_config)
    adopt_labels(args, content, args.checkpoint, refuse=False)
    classes = known_classes(content, model, args.num_classes)
    del content  # as large as model and optimizer
    pooled = False
    if args.test_pool:
        model, pooled = apply_test_time_pool(model, data_config)
    subject = Subject(args, device, precision, model, parameters, data_config,
                      1.0 if pooled else data_config['crop_pct'], classes=classes)
    if args.class_subset:
        subject.subset = read_class_subset(args.class_subset, args.num_classes)
        args.class_map = subject.subset.class_map
        if len(subject.subset.valid_labels) < args.num_classes:
            subject.valid_labels = subject.subset.valid_labels
        if subject.valid_labels and args.real_labels:
            raise ConfigError('--real-labels go with all classes: drop --class-subset, or name imagenet-1k')
    elif args.valid_labels:
        subject.valid_labels = read_valid_labels(args.valid_labels, args.num_classes)
    return subject


def _compile(subject: Subject) -> None:
    """Puts the model on its device in the form that is measured, and measures its cost if asked for."""
    args, device, precision = subject.args, subject.device, subject.precision
    size = subject.data_config['input_size']
    model = subject.model.to(device=device, dtype=precision.model_dtype).eval()
    if args.channels_last:
        model = model.to(memory_format=torch.channels_last)
    macs = None
    if args.measure_cost and args.rank == 0:
        macs = count_macs(model, torch.zeros((1, *size), device=device, dtype=precision.model_dtype or torch.float32))
    model = _generate_code(model, args)
    if args.num_gpu > 1:
        model = nn.DataParallel(model, device_ids=list(range(args.num_gpu)))
    subject.model = model
    _warm_up(model, size, args, device, precision)
    if macs is not None:
        subject.cost = {'parameters': subject.parameters, 'macs': macs, **measure_cost(
            model, size, args.batch_size, device, precision, args.channels_last)}
    if args.measure_cost and args.distributed:
        torch.distributed.barrier()  # the others would take its time


def _open_loader(subject: Subject, args: argparse.Namespace) -> Any:
    config = subject.data_config
    common = (args.split, args.batch_size, args.num_samples)
    try:
        if args.naflex_loader:
            loader = build_naflex_eval_loader(args, subject.model, config, subject.device, subject.precision, *common,
                                              distributed=args.distributed)
        else:
            loader = build_eval_loader(
                args, config, subject.device, subject.precision, *common,
                distributed=args.distributed,
                crop_pct=subject.crop_pct,
                crop_mode=config['crop_mode'],
                crop_border_pixels=args.crop_border_pixels,
                tf_preprocessing=args.tf_preprocessing)
    except DatasetError as error:
        if subject.subset is not None and 'there is no image' in str(error):
            raise DatasetError(f'no folder under {args.data_dir!r} is a class of --class-subset {args.class_subset}: '
                               'its folders must have the names of the classes') from error
        raise
    dataset = base_dataset(loader)
    if not subject.classes and not args.valid_labels and is_part_of_imagenet(args, dataset):
        _logger.warning('The %d folders are synsets of ImageNet, which has 1000: measured as with --class-subset %s.',
                        len(classes_of(dataset)), synsets.NAME)
        subject.subset = read_class_subset(synsets.NAME, args.num_classes)
        args.class_map = subject.subset.class_map
        return _open_loader(subject, args)
    if not is_multi_label(args):
        check_classes(subject.classes, dataset, args, f'the data in {args.data_dir!r}', 'those of the model')
    if args.distributed and isinstance(loader.dataset, torch.utils.data.IterableDataset):
        raise ConfigError('a streamed set cannot be shared between processes without counting images twice: run one '
                          'process')
    if subject.subset is not None:
        found = {label for _, label in loader.dataset.reader.samples}
        _logger.info('--class-subset: %d images of %d of its %d classes; other folders are left out.',
                     len(loader.dataset), len(found), len(subject.subset.valid_labels))
    return loader


def _class_names(subject: Subject, dataset: Any, count: int) -> list[str]:
    if getattr(subject.args, CLASS_NAMES, None):
        return list(getattr(subject.args, CLASS_NAMES))
    known = getattr(getattr(dataset, 'reader', None), 'class_to_idx', None)
    if not known:
        classes = getattr(dataset, 'classes', None) or []
        known = {str(name): index for index, name in enumerate(classes)}
    names = {index: str(name) for name, index in known.items() if isinstance(index, int)}
    labels = subject.valid_labels or range(count)
    return [names.get(index, str(label)) for index, label in enumerate(labels)]


def _measure(subject: Subject, args: argparse.Namespace, loader: Any, title: str = 'Test',
             ) -> Measurement | LabelMeasurement:
    """Runs the model over one split; every process must call it, and all get the same figures."""
    dataset, device = loader.dataset, subject.device
    multi_label = is_multi_label(args)
    tally: Any = LabelTally(device, args.num_classes, args.threshold) if multi_label else ClassTally(
        device, len(subject.valid_labels or range(args.num_classes)))
    several, predictions = None, None
    if args.real_labels:
        if not hasattr(dataset, 'filenames'):
            raise ConfigError('--real-labels go by the names of files, which this set does not have: leave them out')
        several = MultiLabelTally(
            read_real_labels(args.real_labels, dataset.filenames(basename=True), args.num_classes), device)
    if args.predictions:
        predictions = results.Predictions(args.predictions_topk, device, multi_label)
    observers: list[Any] = [each for each in (several, predictions) if each is not None]

    def on_batch(output: torch.Tensor, target: torch.Tensor, positions: list[int]) -> None:
        for observer in observers:
            observer.update(output, target, positions)

    settle_threads(args.distributed)
    started = time.perf_counter()
    result = evaluate(
        subject.model, loader, device, subject.precision,
        prefetched=not args.no_prefetcher, channels_last=args.channels_last, distributed=args.distributed,
        primary=args.rank == 0, log_interval=args.log_freq, title=title, valid_labels=subject.valid_labels,
        views=args.tta, fill=args.batch_size, tally=tally, on_batch=on_batch)
    total = int(result.metrics['images'] + result.metrics['unreadable'])
    _logger.info('%d images in %.1f s.', total, time.perf_counter() - started)
    refuse_unreadable(dataset, result.unreadable_positions, total, args.max_bad_samples)

    with torch.inference_mode():
        metrics, figures = tally.compute_all()
        labels = several.compute_over_processes() if several is not None else None
        arrays = predictions.gather(args.distributed) if predictions is not None else None
    names = _class_names(subject, dataset, args.num_classes)
    measured: Measurement | LabelMeasurement = LabelMeasurement(metrics, figures, result.images_per_sec, names)
    if not multi_label:
        measured = Measurement(metrics, figures, labels, result.images_per_sec, names)
    if args.rank == 0:
        if arrays is not None:
            if hasattr(dataset, 'filename'):
                files = [sample_name(dataset, place) for place in arrays['position'].tolist()]
                arrays['filename'] = np.array(files, str)
            arrays['class_name'] = np.array(names, str)
            if subject.valid_labels is not None:
                arrays['class_index'] = np.array(subject.valid_labels)
            if not multi_label and figures.confusion is not None:
                arrays['confusion_matrix'] = figures.confusion
            results.write_predictions(args.predictions, arrays)
        if args.plots:
            shown = describe_classes(names)
            paths = results_plots.draw_label_plots(args.plots, figures, shown) if multi_label else \
                results_plots.draw_plots(args.plots, figures, shown, metrics['ece'])
            _logger.info('Drawn: %s.', ', '.join(paths))
    return measured


def _describe(args: argparse.Namespace, about: dict[str, Any], measured: Measurement | LabelMeasurement,
              ) -> dict[str, Any]:
    if isinstance(measured, LabelMeasurement):
        return label_row_of(args, about, measured) | label_details(measured)
    return row_of(args, about, measured) | class_details(measured)


def validate(args: argparse.Namespace) -> dict[str, Any]:
    """Measures one model; under torchrun, every process must call it, after `bulk.join_processes`.

    Args:
        args: settings as `config.parse_args(validate_flags.build_parser)` gives them; changed in place. Without
            `--checkpoint` the model's pretrained weights are loaded, as in timm.

    Returns:
        The row of results, the same on every process but for the times. In percent unless said otherwise: `model`,
        `top1`, `top1_err`, `top5`, `top5_err`, precision, recall and F1 if asked for, `param_count` (millions),
        `img_size`, `crop_pct`, `interpolation`, `loss` (natural logarithm), `images`, `images_per_sec`; not rounded:
        `top1_low` and so on (95 % intervals), `nll`, `macro_accuracy`, `ece`, `mce`, `brier` (0 to 2), `nonfinite` and
        `unreadable` (images); lists `per_class`, `reliability`, `top_confusions` and, up to 100 classes,
        `confusion_matrix`; `environment`; `cost` with `--measure-cost`. With `--corruptions` see
        `corruption.summarise`, with `--task multi_label` `multi_label.LabelTally`; the loss is `bce` there.

    Raises:
        DatasetError: images that cannot be read; also see `data.build_dataset`.
        UserError: other bad input; see `cpool_vision.errors`.
    """
    if not hasattr(args, 'distributed'):
        args.distributed, args.rank, args.world_size = False, 0, 1
    _check(args)
    args.pretrained = args.pretrained or not args.checkpoint
    if args.data and not args.data_dir:
        args.data_dir = args.data
    subject = _prepare(args, setup_device(args, distributed=False))
    about = head_of_row(args, subject.parameters, subject.data_config, subject.crop_pct)
    if args.corruptions:
        places = corruption.find_corruptions(args.corruptions)
        _compile(subject)
        lines = []
        for place in places:
            part = copy.copy(args)
            part.data_dir, part.split, part.num_samples = place.path, '', None
            measured = _measure(subject, part, _open_loader(subject, part), f'{place.corruption} {place.severity}')
            lines.append(corruption.line(place, _describe(args, about, measured)))
        row = corruption.summarise(about, lines)
    else:
        loader = _open_loader(subject, args)  # bad data is told before the model is compiled
        _compile(subject)
        measured = _measure(subject, args, loader)
        row = _describe(args, about, measured)
    row['environment'] = environment(args, subject.device, subject.precision)
    if subject.cost is not None:
        row['cost'] = subject.cost
    _logger.info(' * %s', '  '.join(f'{key} {value}' for key, value in results.scalars(row).items() if key != 'model'))
    return row
