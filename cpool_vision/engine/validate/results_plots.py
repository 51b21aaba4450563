"""Plots of a validation: confusion matrix, reliability diagram, accuracy by class, precision over recall."""
import os
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from cpool_vision.errors import ConfigError, OutputError
from cpool_vision.inspect.canvas import STYLE, PlotDependencyError, new_figure, require_matplotlib, save_figure

from .metrics import BINS, ClassFigures
from .multi_label import LabelFigures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NAMED = 40  # with more classes, their names would be illegible
_WRITTEN = 20  # with more classes, numbers in the cells of the matrix would be illegible
_BLUE, _RED, _GREY = '#3b6ea5', '#c0504d', '#9a9a9a'


def _matplotlib() -> ModuleType:
    try:
        return require_matplotlib()
    except PlotDependencyError as error:
        raise ConfigError("--plots needs matplotlib: pip install 'cpool_vision[plot]', or drop the flag") from error


def check_plots(folder: str) -> None:
    """Checks that plots can be written, before the work that leads to them.

    Raises:
        ConfigError: matplotlib is not installed.
        OutputError: The folder cannot be created or is not writable.
    """
    _matplotlib()
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise OutputError(f'--plots {folder!r} cannot be created ({error.strerror}): choose another folder') from error
    if not os.access(folder, os.W_OK):
        raise OutputError(f'--plots {folder!r} cannot be written: choose another folder')


def confusion_figure(confusion: np.ndarray, names: Sequence[str]) -> 'Figure':
    """Draws a confusion matrix: percentage of each true class (row) that is predicted as each class (column)."""
    classes = len(confusion)
    side = 2.6 + min(classes, _NAMED) * 0.13
    figure = new_figure(side + 0.5, side, layout='constrained')
    axes = figure.subplots()
    total = confusion.sum(axis=1, keepdims=True)
    share = np.divide(100. * confusion, total, out=np.zeros(confusion.shape), where=total > 0)
    if classes <= _NAMED:
        image = axes.imshow(share, cmap='Blues', vmin=0, vmax=100, interpolation='nearest')
    else:  # in pixel-sized cells, a few percent would be invisible on a linear scale
        shown = np.ma.masked_less_equal(share, 0)
        image = axes.imshow(shown, cmap='magma_r', norm='log', clim=(0.5, 100), interpolation='nearest')
    if classes <= _NAMED:
        axes.set_xticks(range(classes), names, rotation=90)
        axes.set_yticks(range(classes), names)
    if classes <= _WRITTEN:
        for row, column in np.argwhere(share >= 0.5):
            axes.text(column, row, f'{share[row, column]:.0f}', ha='center', va='center', fontsize=5,
                      color='white' if share[row, column] > 55 else 'black')
    axes.set(xlabel='predicted class', ylabel='true class')
    figure.colorbar(image, ax=axes, shrink=0.8, label='% of the true class')
    return figure


def reliability_figure(figures: ClassFigures, ece: float) -> 'Figure':
    """Draws accuracy over confidence, and the number of images in each bin."""
    figure = new_figure(3.0, 3.6, layout='constrained')
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    edges = np.linspace(0, 100, BINS + 1)
    used = figures.bin_images > 0
    accuracy = 100 * figures.bin_hits[used] / figures.bin_images[used]
    width = 100 / BINS
    upper.bar(edges[:-1][used], accuracy, width, align='edge', color=_BLUE, edgecolor='white', linewidth=0.5,
              label='accuracy')
    upper.plot(100 * figures.bin_confidence[used], accuracy, 'o', color=_RED, markersize=2.5,
               label='at the mean confidence')
    upper.plot([0, 100], [0, 100], '--', color=_GREY, linewidth=0.8, label='calibrated')
    upper.set(xlim=(0, 100), ylim=(0, 100), ylabel='accuracy (%)', title=f'expected calibration error {ece:.2f} %')
    upper.legend(loc='upper left', fontsize=6, frameon=False)
    lower.bar(edges[:-1], figures.bin_images, width, align='edge', color=_GREY, edgecolor='white', linewidth=0.5)
    lower.set(xlabel='confidence (%)', ylabel='images')
    return figure


def per_class_figure(values: np.ndarray, names: Sequence[str], unit: str = 'accuracy (%)') -> 'Figure':
    """Draws a value per class, best first, and their mean; skips NaN."""
    present = np.flatnonzero(~np.isnan(values))
    order = present[np.argsort(-values[present], kind='stable')]
    accuracy = values[order]
    named = len(order) <= _NAMED
    figure = new_figure(3.4, 0.8 + 0.14 * len(order) if named else 5., layout='constrained')
    axes = figure.subplots()
    axes.barh(range(len(order)), accuracy, height=0.8 if named else 1., color=_BLUE)
    if named:
        axes.set_yticks(range(len(order)), [names[index] for index in order])
        for row, value in enumerate(accuracy):
            axes.text(1 if value > 12 else value + 1, row, f'{value:.1f}', va='center', fontsize=5,
                      color='white' if value > 12 else 'black')
    else:
        axes.set_ylabel(f'{len(order)} classes, best first')
    if len(order):
        axes.axvline(accuracy.mean(), color=_RED, linewidth=0.8, label=f'mean {accuracy.mean():.2f} %')
        figure.legend(loc='outside upper right', fontsize=6, frameon=False)
    axes.set(xlim=(0, 100), ylim=(max(len(order), 1) - 0.5, -0.5), xlabel=unit)
    return figure


def precision_recall_figure(figures: LabelFigures, names: Sequence[str]) -> 'Figure':
    """Draws precision over recall, for all pairs of image and label and, with up to 20 labels, for each label."""
    figure = new_figure(4.6, 3.2, layout='constrained')
    axes = figure.subplots()
    for index, (recall, precision) in enumerate(figures.curves):
        if figures.positives[index]:
            axes.plot(recall, precision, linewidth=0.5, alpha=0.8, color=f'C{index % 10}',
                      linestyle='-' if index < 10 else ':', label=f'{names[index]} {figures.ap[index]:.1f}')
    axes.plot(*figures.micro, color='black', linewidth=1.2, label=f'all pairs {figures.micro_ap:.1f}')
    axes.set(xlim=(0, 100), ylim=(0, 102), xlabel='recall (%)', ylabel='precision (%)')
    figure.legend(title='average precision (%)', title_fontsize=6, fontsize=6, frameon=False, loc='outside right upper')
    return figure


def _draw(folder: str, drawn: Mapping[str, 'Figure']) -> list[str]:
    paths = []
    for name, figure in drawn.items():
        path = os.path.join(folder, f'{name}.png')
        try:
            save_figure(figure, path)
        except OSError as error:
            raise OutputError(f'{path!r} cannot be written ({error.strerror or error}): choose another --plots') \
                from error
        paths.append(path)
    return paths


def draw_label_plots(folder: str, figures: LabelFigures, names: Sequence[str]) -> list[str]:
    """Writes per_class.png (average precision) and precision_recall.png, see `draw_plots`."""
    with _matplotlib().rc_context(STYLE):
        return _draw(folder, {'per_class': per_class_figure(figures.ap, names, 'average precision (%)'),
                              'precision_recall': precision_recall_figure(figures, names)})


def draw_plots(folder: str, figures: ClassFigures, names: Sequence[str], ece: float) -> list[str]:
    """Writes reliability.png, per_class.png and, for up to `CONFUSION_LIMIT` classes, confusion_matrix.png.

    Args:
        folder: Existing folder to write to.
        figures: Results by class and confidence.
        names: Names of the classes.
        ece: Expected calibration error in percent.

    Returns:
        Paths of the plots.

    Raises:
        OutputError: A file cannot be written.
    """
    with _matplotlib().rc_context(STYLE):
        drawn = {'reliability': reliability_figure(figures, ece),
                 'per_class': per_class_figure(figures.accuracy, names)}
        if figures.confusion is not None:
            drawn['confusion_matrix'] = confusion_figure(figures.confusion, names)
        return _draw(folder, drawn)
