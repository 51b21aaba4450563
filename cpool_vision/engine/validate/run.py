"""Validates one model, on a split or on a folder of corrupted copies of it."""
import logging
import os
import time
from collections.abc import Iterable
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import torch.distributed
import torch.utils.data

import cpool_vision  # noqa: F401 - registers the variants
from cpool_vision.errors import ConfigError, DatasetError

from ..data.dataset import IMAGENET, check_source, numbers_folders, synset_numbers
from ..data.fingerprint import check_classes, classes_of
from ..data.loaders import base_dataset, build_eval_loader
from ..data.multi_label import check_task
from ..data.naflex import build_naflex_eval_loader
from ..data.stream import Loader
from ..data.unreadable import refuse_unreadable, sample_name
from ..device import Runtime, settle_threads, start_runtime
from ..settings.limits import check_limits, flag_name
from ..settings.validate import ValidateSettings
from . import corruption, results, results_plots
from .evaluate import check_views, evaluate
from .labels import describe_classes, read_class_subset, read_real_labels
from .metrics import ClassTally, MultiLabelTally
from .multi_label import LabelTally
from .results_rows import (
    LabelMeasurement,
    Measurement,
    Row,
    class_details,
    environment,
    head_of_row,
    label_details,
    label_row_of,
    row_of,
)
from .subject import Subject, compile_subject, prepare

_logger = logging.getLogger(__name__)


def _check(settings: ValidateSettings, runtime: Runtime) -> None:
    check_limits(settings)
    if settings.num_gpu < 1 or settings.num_gpu > 1 and torch.cuda.device_count() < settings.num_gpu:
        raise ConfigError(f'--num-gpu {settings.num_gpu}: {torch.cuda.device_count()} CUDA devices are available')
    if settings.num_gpu > 1 and runtime.distributed:
        raise ConfigError(f'--num-gpu {settings.num_gpu} splits batches within one process: drop it with torchrun')
    check_task(settings)
    check_views(settings.tta, settings.naflex_loader)
    for one, other in (('real_labels', 'valid_labels'), ('class_subset', 'valid_labels'), ('class_subset', 'class_map'),
                       ('corruptions', 'real_labels'), ('corruptions', 'predictions'), ('corruptions', 'plots'),
                       ('corruptions', 'dataset'), ('class_subset', 'dataset')):
        if getattr(settings, one) and getattr(settings, other):
            first, second = map(flag_name, (one, other))
            raise ConfigError(f'{first} and {second} cannot be combined: drop one of them')
    if settings.predictions:
        results.check_writable(settings.predictions, '--predictions')
        if not settings.predictions.endswith('.npz'):
            raise ConfigError(f'--predictions {settings.predictions!r}: the suffix must be .npz')
    if settings.plots:
        results_plots.check_plots(settings.plots)
    if settings.tf_preprocessing and find_spec('tensorflow') is None:
        raise ConfigError('--tf-preprocessing needs TensorFlow: pip install tensorflow, or drop the flag')


def is_part_of_imagenet(settings: ValidateSettings, num_classes: int, dataset: torch.utils.data.Dataset[object],
                        ) -> bool:
    """Returns whether a 1000-class model meets folders of fewer ImageNet synsets, which would get wrong indices."""
    names = classes_of(dataset)
    return num_classes == 1000 > len(names) > 0 and numbers_folders(settings) and set(names) <= set(
        synset_numbers())


def _has_class_folder(root: str, names: Iterable[str]) -> bool:
    known = set(names)
    return any(known.intersection(folders) for _, folders, _ in os.walk(root, followlinks=True))


def _open_loader(subject: Subject, settings: ValidateSettings) -> Loader:
    config, runtime, subset = subject.data_config, subject.runtime, subject.subset
    if subset is not None:
        settings = replace(settings, class_map=subset.class_map)
    common = (settings, runtime, config, subject.classes)
    split = (settings.split, settings.batch_size, settings.num_samples)
    try:
        if settings.naflex_loader:
            loader = build_naflex_eval_loader(*common, subject.model, *split)
        else:
            loader = build_eval_loader(
                *common, *split,
                crop_pct=subject.crop_pct,
                crop_mode=config['crop_mode'],
                crop_border_pixels=settings.crop_border_pixels,
                tf_preprocessing=settings.tf_preprocessing)
    except DatasetError as error:
        root = settings.data_dir
        if subset is not None and root and os.path.isdir(root) and not _has_class_folder(root, subset.class_map):
            raise DatasetError(f'no folder under {root!r} is a class of --class-subset {settings.class_subset}: '
                               'name the folders after the classes') from error
        raise
    dataset = base_dataset(loader)
    if not subject.numbers and not settings.valid_labels and is_part_of_imagenet(
            settings, subject.classes.count, dataset):
        _logger.warning('The %d folders are some of the 1000 ImageNet synsets: using --class-subset %s.',
                        len(classes_of(dataset)), IMAGENET)
        subject.subset = read_class_subset(IMAGENET, subject.classes.count)
        return _open_loader(subject, settings)
    if not settings.multi_label:
        check_classes(
            subject.numbers, dataset, settings, f'the data in {settings.data_dir!r}', 'the classes of the model')
    if runtime.distributed and isinstance(loader.dataset, torch.utils.data.IterableDataset):
        raise ConfigError('several processes would count images of a streamed dataset twice: run one process')
    if subset is not None:
        found = {label for _, label in loader.dataset.reader.samples}
        _logger.info('--class-subset: %d images of %d of its %d classes; other folders are ignored.',
                     len(loader.dataset), len(found), len(subset.valid_labels))
    return loader


def _class_names(subject: Subject, dataset: torch.utils.data.Dataset[object]) -> list[str]:
    if subject.classes.names:
        return list(subject.classes.names)
    names = {index: name for name, index in classes_of(dataset).items()}
    labels = subject.valid_labels or range(subject.classes.count)
    return [names.get(index, str(label)) for index, label in enumerate(labels)]


def _measure(subject: Subject, settings: ValidateSettings, loader: Loader, title: str = 'Test',
             ) -> Measurement | LabelMeasurement:
    """Runs the model over a split. Every process must call it, and all of them get the same metrics."""
    dataset, runtime, count = loader.dataset, subject.runtime, subject.classes.count
    tally: Any = LabelTally(runtime.device, count, settings.threshold) if settings.multi_label else ClassTally(
        runtime.device, len(subject.valid_labels or range(count)))
    several, predictions = None, None
    if settings.real_labels:
        if not hasattr(dataset, 'filenames'):
            raise ConfigError('--real-labels needs file names, which this dataset does not have: drop it')
        several = MultiLabelTally(
            read_real_labels(settings.real_labels, dataset.filenames(basename=True), count), runtime.device)
    if settings.predictions:
        predictions = results.Predictions(settings.predictions_topk, runtime.device, settings.multi_label)
    observers: list[Any] = [each for each in (several, predictions) if each is not None]

    def on_batch(output: torch.Tensor, target: torch.Tensor, positions: list[int]) -> None:
        for observer in observers:
            observer.update(output, target, positions)

    # the same for any number of processes; a small dataset is not padded to many times its size
    fill = min(settings.batch_size, len(dataset)) if hasattr(dataset, '__len__') else settings.batch_size
    settle_threads(runtime.distributed)
    started = time.perf_counter()
    result = evaluate(
        subject.model, loader, runtime, prefetched=not settings.no_prefetcher, channels_last=settings.channels_last,
        log_interval=settings.log_freq, title=title, valid_labels=subject.valid_labels, views=settings.tta,
        fill=fill, tally=tally, on_batch=on_batch)
    total = int(result.metrics['images'] + result.metrics['unreadable'])
    _logger.info('%d images in %.1f s.', total, time.perf_counter() - started)
    refuse_unreadable(dataset, result.unreadable_positions, total, settings.max_bad_samples)

    with torch.inference_mode():
        metrics, figures = tally.compute_all()
        labels = several.compute_over_processes() if several is not None else None
        arrays = predictions.gather(runtime.distributed) if predictions is not None else None
    names = _class_names(subject, dataset)
    measured: Measurement | LabelMeasurement = LabelMeasurement(metrics, figures, result.images_per_sec, names)
    if not settings.multi_label:
        measured = Measurement(metrics, figures, labels, result.images_per_sec, names)
    if runtime.primary:
        _write(subject, settings, dataset, measured, arrays)
    return measured


def _write(subject: Subject, settings: ValidateSettings, dataset: object, measured: Measurement | LabelMeasurement,
           arrays: dict[str, np.ndarray] | None) -> None:
    """Writes the files of `--predictions` and `--plots`."""
    if arrays is not None:
        if hasattr(dataset, 'filename'):
            files = [sample_name(dataset, index) for index in arrays['position'].tolist()]
            arrays['filename'] = np.array(files, str)
        arrays['class_name'] = np.array(measured.names, str)
        if subject.valid_labels is not None:
            arrays['class_index'] = np.array(subject.valid_labels)
        if isinstance(measured, Measurement) and measured.figures.confusion is not None:
            arrays['confusion_matrix'] = measured.figures.confusion
        results.write_predictions(settings.predictions, arrays)
    if settings.plots:
        shown = describe_classes(measured.names)
        if isinstance(measured, LabelMeasurement):
            paths = results_plots.draw_label_plots(settings.plots, measured.figures, shown)
        else:
            paths = results_plots.draw_plots(settings.plots, measured.figures, shown, measured.metrics['ece'])
        _logger.info('Plots written to %s.', ', '.join(paths))


def _describe(subject: Subject, about: Row, measured: Measurement | LabelMeasurement) -> Row:
    settings, world_size = subject.settings, subject.runtime.world_size
    if isinstance(measured, LabelMeasurement):
        return label_row_of(settings, world_size, about, measured) | label_details(measured)
    return row_of(settings, world_size, about, measured) | class_details(measured)


def validate(settings: ValidateSettings, runtime: Runtime | None = None) -> Row:
    """Validates one model. In distributed validation, every process must call it.

    Args:
        settings: Result of `config.read_validate`. Without a checkpoint, the model's pretrained weights are loaded, as
            in timm.
        runtime: Result of `start_runtime`; validates in this process alone if None.

    Returns:
        A row of results, the same on every process except for times. Metrics are in percent unless noted.

        - Rounded, under timm's names: `model`, `top1`, `top1_err`, `top5`, `top5_err`, precision, recall and F1 with
          `--metrics-avg`, `param_count` (millions), `img_size`, `crop_pct`, `interpolation`, `loss` (natural
          logarithm), `images`, `images_per_sec`.
        - Not rounded: `top1_low`, `top1_high`, `top5_low`, `top5_high` (95 % confidence intervals), `nll`,
          `macro_accuracy`, `ece`, `mce`, `brier` (0 to 2), and the number of images that are `nonfinite` or
          `unreadable`.
        - Lists: `per_class`, `reliability`, `top_confusions` and, for up to 100 classes, `confusion_matrix`.
        - `environment`, and `cost` with `--measure-cost`.

        With `--corruptions`, see `corruption.summarize`. With `--task multi_label`, the metrics are those of
        `multi_label.LabelTally` and the unrounded loss is `bce`.

    Raises:
        DatasetError: The dataset cannot be opened (see `build_dataset`), or too many images cannot be read.
        UserError: Other bad input, see `cpool_vision.errors`.
    """
    runtime = runtime or start_runtime(settings, join=False)
    _check(settings, runtime)
    if not settings.corruptions:
        check_source(settings, settings.split)  # before loading weights, which may take long
    subject = prepare(settings, runtime)
    about = head_of_row(settings.model, subject.parameters, subject.data_config, subject.crop_pct)
    if settings.corruptions:
        folders = corruption.find_corruptions(settings.corruptions)
        compile_subject(subject)
        lines = []
        for folder in folders:
            part = replace(settings, data_dir=folder.path, split='', num_samples=None)
            measured = _measure(subject, part, _open_loader(subject, part), f'{folder.corruption} {folder.severity}')
            lines.append(corruption.line(folder, _describe(subject, about, measured)))
        row = corruption.summarize(about, lines)
    else:
        loader = _open_loader(subject, settings)  # reports bad data before the model is compiled
        compile_subject(subject)
        row = _describe(subject, about, _measure(subject, settings, loader))
    row['environment'] = environment(settings.batch_size, runtime)
    if subject.cost is not None:
        row['cost'] = subject.cost
    _logger.info(' * %s', '  '.join(f'{key} {value}' for key, value in results.scalars(row).items() if key != 'model'))
    return row
