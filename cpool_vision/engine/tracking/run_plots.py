"""Plots of training runs: loss, accuracy, learning rate, and the supports of each context pool over time."""
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cpool_vision.errors import ConfigError
from cpool_vision.inspect.canvas import STYLE, new_figure, require_matplotlib
from cpool_vision.reading import one_line, reason

from .table import is_damaged, read_rows
from .track import SUPPORTS, UPDATES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SUMMARY = 'summary.csv'
_STYLE = {
    **STYLE, 'lines.linewidth': 1., 'axes.spines.top': False, 'axes.spines.right': False}
# the score panel of each task: its title, and the columns drawn as a solid and as a dashed line
_SCORES = {
    'accuracy (%)': (('eval_top1', 'top-1'), ('eval_top5', 'top-5')),
    'labels (%)': (('eval_map', 'mean average precision'), ('eval_macro_f1', 'macro F1')),
}
_COLUMNS = 4  # support panels side by side
_MARKED = 30  # curves of up to so many points get markers
Curve = tuple[NDArray[np.float64], NDArray[np.float64]]
Row = Mapping[str, float]


@dataclass
class RunCurves:
    """Curves of one run over time in epochs. The metrics of an epoch are at its end.

    Attributes:
        name: Name of the run folder.
        epochs: Times and values by column of summary.csv, without missing values.
        updates: Times and values by column of updates.csv, without missing values.
        supports: Times and values by layer; the values `(points, 4)` are the mean and the 5%, 50% and 95% quantiles in
            pixels.
    """

    name: str
    epochs: dict[str, Curve] = field(default_factory=dict)
    updates: dict[str, Curve] = field(default_factory=dict)
    supports: dict[str, Curve] = field(default_factory=dict)


def _read(path: str) -> list[tuple[str, dict[str, float]]]:
    """Reads the layer and the numbers of each row of a table."""
    try:
        rows = read_rows(path)
        if os.path.exists(path) and is_damaged(path, rows):
            raise ValueError('it has lines that are not rows')
        return [(row.pop('layer', ''), {key: float(value or 'nan') for key, value in row.items()}) for row in rows]
    except (OSError, ValueError) as error:
        raise ConfigError(f'{path!r} is not a table of a run ({reason(error)}): restore it, or '
                          'leave the run out') from error


def _curves(times: NDArray[np.float64], rows: Sequence[Row]) -> dict[str, Curve]:
    curves = {}
    for name in dict.fromkeys(key for row in rows for key in row):
        values = np.array([row.get(name, float('nan')) for row in rows], float)
        known = np.isfinite(values)
        if known.any():
            curves[name] = times[known], values[known]
    return curves


def _times_of_updates(rows: Sequence[Row], finished: set[int]) -> NDArray[np.float64]:
    """Converts updates to epochs. The last row of a finished epoch is at its end."""
    last: dict[int, float] = {}
    for row in rows:
        last[int(row['epoch'])] = max(last.get(int(row['epoch']), 0), row['update'])
    length = 0.
    for epoch in sorted(last):  # an unfinished epoch is as long as a finished one
        if epoch in finished:
            length = last[epoch] - last.get(epoch - 1, last[epoch] * epoch / (epoch + 1))
            break
    times = []
    for row in rows:
        epoch = int(row['epoch'])
        begin = last.get(epoch - 1, row['update'] if epoch else 0)
        own = last[epoch] - begin if epoch in finished else length
        times.append(epoch + (row['update'] - begin) / max(own or last[epoch], 1))
    return np.array(times)


def read_run(folder: str) -> RunCurves:
    """Reads the tables of a run folder; the run may be unfinished.

    Raises:
        ConfigError: If there is no run in the folder, or its tables cannot be read.
    """
    if not os.path.isdir(folder):
        raise ConfigError(f'{folder!r} is not a folder: name the folder of a run of train.py')
    paths = {name: os.path.join(folder, name) for name in (_SUMMARY, UPDATES, SUPPORTS)}
    if not any(os.path.isfile(paths[name]) for name in (_SUMMARY, UPDATES)):
        raise ConfigError(f'{folder!r} is not the folder of a run: it has neither {_SUMMARY} nor {UPDATES}')
    rows = {name: _read(path) for name, path in paths.items()}
    try:
        epochs, updates = ([row for _, row in rows[name]] for name in (_SUMMARY, UPDATES))
        finished = {int(row['epoch']) for row in epochs}
        run = RunCurves(os.path.basename(os.path.abspath(folder)))
        run.epochs = _curves(np.array([row['epoch'] + 1 for row in epochs]), epochs)
        run.updates = _curves(_times_of_updates(updates, finished), updates)
        for layer in dict.fromkeys(layer for layer, _ in rows[SUPPORTS]):
            mine = [row for name, row in rows[SUPPORTS] if name == layer]
            run.supports[layer] = (
                np.array([row['epoch'] + 1 for row in mine]),
                np.array([[row[name] for name in ('mean', 'q05', 'q50', 'q95')] for row in mine], float))
    except (KeyError, OverflowError, ValueError) as error:
        raise ConfigError(f'the tables in {folder!r} are not those of a run ({error}): restore them, or leave the run '
                          'out') from error
    if not run.epochs and not run.updates:
        raise ConfigError(f'the run in {folder!r} has recorded nothing yet: wait for its first log line')
    return run


def _plain(name: str) -> str:
    """Escapes a name so that matplotlib shows it literally, in one line."""
    return one_line(name).replace('$', r'\$')


def _plot(axes: 'Axes', curve: Curve | None, color: str, linestyle: str = '-', linewidth: float = 1.,
          alpha: float = 1., marked: bool = True) -> None:
    if curve is not None:
        marker = 'o' if marked and len(curve[0]) <= _MARKED else ''
        axes.plot(*curve, color=color, linestyle=linestyle, linewidth=linewidth, alpha=alpha, marker=marker,
                  markersize=2)


def _draw_curves(panels: Sequence['Axes'], runs: Sequence[RunCurves], colors: Sequence[str]) -> None:
    loss, accuracy, rate = panels
    known = {name for run in runs for name in run.epochs}
    kinds = {title: pair for title, pair in _SCORES.items() if known & {pair[0][0], pair[1][0]}} or dict(
        [next(iter(_SCORES.items()))])
    for run, color in zip(runs, colors, strict=True):
        _plot(loss, run.updates.get('loss'), color, linewidth=0.6, alpha=0.35, marked=False)
        _plot(loss, run.epochs.get('train_loss'), color, '--', linewidth=0.8)
        _plot(loss, run.epochs.get('eval_loss'), color)
        for (solid, _), (dashed, _) in kinds.values():
            _plot(accuracy, run.epochs.get(solid), color)
            _plot(accuracy, run.epochs.get(dashed), color, '--', linewidth=0.8)
        _plot(rate, run.updates.get('lr', run.epochs.get('lr')), color, marked=False)
    for axes, title, names in ((loss, 'loss', ('validation', 'training', 'at log lines')),
                               (accuracy, ', '.join(kinds), [name for pair in kinds.values() for _, name in pair])):
        axes.set_title(title)
        for place, name in enumerate(names):
            axes.plot([], [], color='0.3', linestyle=('-', '--')[place % 2], linewidth=(1., 0.8, 0.4)[place % 3],
                      label=name)
        axes.legend()
    rate.set_title('learning rate')


def _draw_supports(axes: 'Axes', layer: str, runs: Sequence[RunCurves], colors: Sequence[str]) -> None:
    bounds = []
    for run, color in zip(runs, colors, strict=True):
        if layer in run.supports:
            times, values = run.supports[layer]
            axes.fill_between(times, values[:, 1], values[:, 3], color=color, alpha=0.2, linewidth=0)
            _plot(axes, (times, values[:, 0]), color)
            bounds += [float(np.nanmin(values)), float(np.nanmax(values))] if np.isfinite(values).any() else []
    if bounds:
        low, high = min(bounds), max(bounds)
        # the axis spans at least a tenth of the value, so that nearly constant supports do not show rounding errors
        pad = max(0.05 * (high - low), 0.05 * abs(high) - (high - low) / 2)
        axes.set_ylim(low - pad, high + pad)
    axes.set_title(_plain(layer))


def runs_figure(runs: Sequence[RunCurves]) -> 'Figure':
    """Plots runs in the same axes: loss, accuracy and learning rate, and the supports of each context pool.

    For supports, the line is the mean and the band reaches from the 5% to the 95% quantile.

    Returns:
        A figure for `inspect.canvas.save_figure`.

    Raises:
        PlotDependencyError: If matplotlib is not installed.
    """
    matplotlib = require_matplotlib()
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator
    layers = list(dict.fromkeys(layer for run in runs for layer in run.supports))
    lines = -(-len(layers) // _COLUMNS)
    colors = [f'C{index % 10}' for index in range(len(runs))]
    with matplotlib.rc_context(_STYLE):
        figure = new_figure(7.2, 2.3 + 1.5 * lines, layout='constrained')
        parts = figure.subfigures(1 + bool(lines), 1, squeeze=False, height_ratios=(2.0, 1.5 * lines)[:1 + bool(lines)])
        panels = list(parts[0, 0].subplots(1, 3))
        _draw_curves(panels, runs, colors)
        if lines:
            grid = parts[1, 0].subplots(lines, _COLUMNS, squeeze=False)
            for index, axes in enumerate(grid.flat):
                if index >= len(layers):
                    axes.axis('off')
                    continue
                _draw_supports(axes, layers[index], runs, colors)
                panels.append(axes)
            parts[1, 0].supylabel('support σ (px)', fontsize=7)
        end = max((curve[0].max() for run in runs for curves in (run.epochs, run.updates, run.supports)
                   for curve in curves.values()), default=1.)
        for axes in panels:
            axes.set_xlim(0, 1.02 * end)
            axes.set_xlabel('epochs')
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=end >= 3))
            axes.ticklabel_format(axis='y', useOffset=False, style='plain')
        if len(runs) > 1:
            handles = [Line2D([], [], color=color) for color in colors]
            names = [_plain(run.name) for run in runs]
            figure.legend(handles, names, loc='outside upper center', ncols=min(len(runs), 4))
        else:
            figure.suptitle(_plain(runs[0].name), fontsize=8)
    return figure
