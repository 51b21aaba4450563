"""Rows of results: metrics as plain values, under timm's names where timm has them."""
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import timm
import torch

from cpool_vision.version import __version__

from ..device import Runtime
from ..settings.shared import InputConfig
from ..settings.validate import ValidateSettings
from .labels import describe_classes
from .metrics import ClassFigures
from .multi_label import LabelFigures, LabelTally

Row = dict[str, Any]  # plain values, for JSON
_MATRIX_IN_JSON = 100  # classes
_CONFUSIONS = 20


@dataclass
class Measurement:
    """Results of a split, see `metrics.ClassTally`; `several` is that of `metrics.MultiLabelTally`, if used."""

    metrics: dict[str, float]
    figures: ClassFigures
    several: dict[str, float] | None
    images_per_sec: float
    names: list[str]


@dataclass
class LabelMeasurement:
    """Results of a multi-label split, see `multi_label.LabelTally`."""

    metrics: dict[str, float]
    figures: LabelFigures
    images_per_sec: float
    names: list[str]


def class_details(measured: Measurement) -> Row:
    """Returns results by class and by confidence, as lists of plain values."""
    figures, names = measured.figures, describe_classes(measured.names)
    accuracy = figures.accuracy.tolist()
    details: Row = {'per_class': [
        {'class': index, 'name': name, 'images': int(figures.images[index]), 'accuracy': accuracy[index]}
        for index, name in enumerate(names)]}
    edges = [100 * index / len(figures.bin_images) for index in range(len(figures.bin_images) + 1)]
    details['reliability'] = [
        {'low': low, 'high': high, 'images': int(count), 'confidence': 100 * float(confidence),
         'accuracy': 100 * int(hits) / int(count) if count else math.nan}
        for low, high, count, hits, confidence in zip(
            edges[:-1], edges[1:], figures.bin_images, figures.bin_hits, figures.bin_confidence, strict=True)]
    if figures.confusion is not None:
        wrong = figures.confusion.copy()
        np.fill_diagonal(wrong, 0)
        order = np.argsort(-wrong, axis=None, kind='stable')[:_CONFUSIONS]
        pairs = [divmod(int(cell), len(names)) for cell in order if wrong.flat[cell]]
        details['top_confusions'] = [
            {'true': names[row], 'predicted': names[column], 'images': int(wrong[row, column]),
             'share': 100 * int(wrong[row, column]) / int(figures.images[row])} for row, column in pairs]
        if len(names) <= _MATRIX_IN_JSON:
            details['confusion_matrix'] = figures.confusion.tolist()
    return details


def label_details(measured: LabelMeasurement) -> Row:
    """Returns results by label, as a list of plain values."""
    figures = measured.figures
    columns = {name: figures.column(name) for name in ('precision', 'recall', 'f1')}
    return {'per_class': [
        {'class': index, 'name': name, 'images': int(figures.positives[index]),
         'predicted': int(figures.predicted[index]), 'ap': float(figures.ap[index]),
         **{key: values[index] for key, values in columns.items()}}
        for index, name in enumerate(describe_classes(measured.names))]}


def environment(batch_size: int, runtime: Runtime) -> Row:
    """Returns device, dtype, batch size and versions, which the last digits of metrics may depend on."""
    device, precision = runtime.device, runtime.precision
    dtype = precision.amp_dtype or precision.model_dtype or torch.float32
    return {
        'device': torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type,
        'dtype': str(dtype).removeprefix('torch.') + (' by autocast' if precision.amp_dtype else ''),
        'batch_size': batch_size,
        'versions': {'cpool_vision': __version__, 'timm': timm.__version__, 'torch': torch.__version__},
    }


def head_of_row(model: str, parameters: int, data_config: InputConfig, crop_pct: float) -> Row:
    """Returns the part of a row that describes the model and its input."""
    return {
        'model': model,
        'param_count': round(parameters / 1e6, 2),
        'img_size': data_config['input_size'][-1],
        'crop_pct': crop_pct,
        'interpolation': data_config['interpolation'],
    }


def row_of(settings: ValidateSettings, world_size: int, about: Row, measured: Measurement) -> Row:
    """Returns the metrics of a split, timm's columns first and in timm's order, see `run.validate`."""
    metrics = measured.metrics
    best = measured.several or metrics
    averaged = measured.figures.averaged(settings.metrics_avg) if settings.metrics_avg else {}
    row: Row = {
        'model': about['model'],
        'top1': round(best['top1'], 4), 'top1_err': round(100 - best['top1'], 4),
        'top5': round(best['top5'], 4), 'top5_err': round(100 - best['top5'], 4),
        **{f'{settings.metrics_avg}_{name}': round(value, 4) for name, value in averaged.items()},
        **about,
        'loss': round(metrics['loss'], 4),
        'images': metrics['images'],
        'images_per_sec': round(measured.images_per_sec * world_size, 2),
        **{f'{name}_{side}': best[f'{name}_{side}'] for name in ('top1', 'top5') for side in ('low', 'high')},
    }
    if measured.several:
        row |= {'real_images': measured.several['images'], 'original_top1': metrics['top1'],
                'original_top5': metrics['top5']}
    row['nll'] = metrics['loss']
    return row | {name: metrics[name] for name in ('macro_accuracy', 'ece', 'mce', 'brier', 'nonfinite', 'unreadable')}


def label_row_of(settings: ValidateSettings, world_size: int, about: Row, measured: LabelMeasurement) -> Row:
    """Returns the metrics of a multi-label split, in timm's order where timm has them."""
    metrics = measured.metrics
    rates = {name: round(metrics[name], 4) for name in LabelTally.columns if name != 'loss'}
    return {
        'model': about['model'], **rates, **about,
        'threshold': settings.threshold,
        'loss': round(metrics['loss'], 4),
        'images': metrics['images'],
        'images_per_sec': round(measured.images_per_sec * world_size, 2),
        'bce': metrics['loss'],
        **{name: metrics[name] for name in ('empty', 'nonfinite', 'unreadable')},
    }
