"""Curves of training runs: loss, accuracy, learning rate, and the supports of each context pool over time."""
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cpool_vision.errors import ConfigError
from cpool_vision.inspect.canvas import STYLE, new_figure, require_matplotlib
from cpool_vision.reading import one_line, reason

from .table import is_spoilt, read_rows
from .track import SUPPORTS, UPDATES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SUMMARY = 'summary.csv'
_STYLE: dict[str, Any] = {
    **STYLE, 'lines.linewidth': 1., 'axes.spines.top': False, 'axes.spines.right': False}
# panel of scores by what a run is measured by: its title, and the columns drawn solid and dashed
_SCORES = {
    'accuracy (%)': (('eval_top1', 'top-1'), ('eval_top5', 'top-5')),
    'labels (%)': (('eval_map', 'mean average precision'), ('eval_macro_f1', 'macro F1')),
}
_COLUMNS = 4  # panels of supports side by side
_MARKED = 30  # up to so many points are marked
Curve = tuple[NDArray[Any], NDArray[Any]]


@dataclass
class RunCurves:
    """Curves of one run; time is in epochs, and what an epoch ends with stands at its end.

    Attributes:
        name: of the run folder.
        epochs: columns of summary.csv: time and values, points without a value left out.
        updates: the same of updates.csv.
        supports: by layer, time and `(points, 4)`: mean and quantiles 5, 50, 95 % in pixels.
    """

    name: str
    epochs: dict[str, Curve] = field(default_factory=dict)
    updates: dict[str, Curve] = field(default_factory=dict)
    supports: dict[str, Curve] = field(default_factory=dict)


def _read(path: str) -> list[dict[str, float | str]]:
    try:
        rows = read_rows(path)
        if os.path.exists(path) and is_spoilt(path, rows):
            raise ValueError('it has lines that are not rows')
        return [{key: value if key == 'layer' else float(value) if value else float('nan')
                 for key, value in row.items()} for row in rows]
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f'{path!r} is not a table of a run ({reason(error)}): restore it, or '
                          'leave the run out') from error


def _curves(times: NDArray[Any], rows: Sequence[dict[str, Any]]) -> dict[str, Curve]:
    curves = {}
    for name in dict.fromkeys(key for row in rows for key in row):
        values = np.array([row.get(name, float('nan')) for row in rows], float)
        known = np.isfinite(values)
        if known.any():
            curves[name] = times[known], values[known]
    return curves


def _times_of_updates(rows: Sequence[dict[str, Any]], finished: set[int]) -> NDArray[Any]:
    """Epochs that had passed at each update: the last report of a finished epoch is its end."""
    last: dict[int, float] = {}
    for row in rows:
        last[int(row['epoch'])] = max(last.get(int(row['epoch']), 0), row['update'])
    length = 0.
    for epoch in sorted(last):  # that of an epoch under way is taken from the one before
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
    """Reads the tables of a run folder, finished or not.

    Raises:
        ConfigError: no run, or its tables cannot be read.
    """
    if not os.path.isdir(folder):
        raise ConfigError(f'{folder!r} is not a folder: name the folder of a run of train.py')
    paths = {name: os.path.join(folder, name) for name in (_SUMMARY, UPDATES, SUPPORTS)}
    if not any(os.path.isfile(paths[name]) for name in (_SUMMARY, UPDATES)):
        raise ConfigError(f'{folder!r} is not the folder of a run: it has neither {_SUMMARY} nor {UPDATES}')
    rows = {name: _read(path) for name, path in paths.items()}
    try:
        finished: set[int] = {int(row['epoch']) for row in rows[_SUMMARY]}
        run = RunCurves(os.path.basename(os.path.abspath(folder)))
        ends = np.array([float(row['epoch']) + 1 for row in rows[_SUMMARY]])
        run.epochs = _curves(ends, rows[_SUMMARY])
        run.updates = _curves(_times_of_updates(rows[UPDATES], finished), rows[UPDATES])
        for layer in dict.fromkeys(str(row['layer']) for row in rows[SUPPORTS]):
            mine = [row for row in rows[SUPPORTS] if row['layer'] == layer]
            run.supports[layer] = (
                np.array([float(row['epoch']) + 1 for row in mine]),
                np.array([[row[name] for name in ('mean', 'q05', 'q50', 'q95')] for row in mine], float))
    except (KeyError, OverflowError, ValueError) as error:
        raise ConfigError(f'the tables in {folder!r} are not those of a run ({error}): restore them, or leave the run '
                          'out') from error
    if not run.epochs and not run.updates:
        raise ConfigError(f'the run in {folder!r} has recorded nothing yet: wait for its first log line')
    return run


def _plain(name: str) -> str:
    """A name as matplotlib shows it: a dollar is a dollar, and one line is one line."""
    return one_line(name).replace('$', r'\$')


def _plot(axes: Any, curve: Curve | None, marked: bool = True, **style: Any) -> None:
    if curve is not None:
        marker = {'marker': 'o', 'markersize': 2} if marked and len(curve[0]) <= _MARKED else {}
        axes.plot(*curve, **{**marker, **style})


def _draw_curves(panels: Sequence[Any], runs: Sequence[RunCurves], colors: Sequence[str]) -> None:
    loss, accuracy, rate = panels
    known = {name for run in runs for name in run.epochs}
    kinds = {title: pair for title, pair in _SCORES.items() if known & {pair[0][0], pair[1][0]}} or dict(
        [next(iter(_SCORES.items()))])
    for run, color in zip(runs, colors, strict=True):
        _plot(loss, run.updates.get('loss'), False, color=color, alpha=0.35, linewidth=0.6)
        _plot(loss, run.epochs.get('train_loss'), color=color, linestyle='--', linewidth=0.8)
        _plot(loss, run.epochs.get('eval_loss'), color=color)
        for (solid, _), (dashed, _) in kinds.values():
            _plot(accuracy, run.epochs.get(solid), color=color)
            _plot(accuracy, run.epochs.get(dashed), color=color, linestyle='--', linewidth=0.8)
        _plot(rate, run.updates.get('lr', run.epochs.get('lr')), False, color=color)
    for axes, title, names in ((loss, 'loss', ('validation', 'training', 'at log lines')),
                               (accuracy, ', '.join(kinds), [name for pair in kinds.values() for _, name in pair])):
        axes.set_title(title)
        for place, name in enumerate(names):
            axes.plot([], [], color='0.3', linestyle=('-', '--')[place % 2], linewidth=(1., 0.8, 0.4)[place % 3],
                      label=name)
        axes.legend()
    rate.set_title('learning rate')


def _draw_supports(axes: Any, layer: str, runs: Sequence[RunCurves], colors: Sequence[str]) -> None:
    bounds = []
    for run, color in zip(runs, colors, strict=True):
        if layer in run.supports:
            times, values = run.supports[layer]
            axes.fill_between(times, values[:, 1], values[:, 3], color=color, alpha=0.2, linewidth=0)
            _plot(axes, (times, values[:, 0]), color=color)
            bounds += [float(np.nanmin(values)), float(np.nanmax(values))] if np.isfinite(values).any() else []
    if bounds:
        low, high = min(bounds), max(bounds)
        # nearly constant supports get a scale of a tenth of their value, not of rounding errors
        pad = max(0.05 * (high - low), 0.05 * abs(high) - (high - low) / 2)
        axes.set_ylim(low - pad, high + pad)
    axes.set_title(_plain(layer))


def runs_figure(runs: Sequence[RunCurves]) -> 'Figure':
    """Draws runs over one another: loss, accuracy and learning rate, then a panel of supports per context pool.

    A line of supports is the mean, the band reaches from the 5 % to the 95 % quantile.

    Returns:
        A figure, to be written by `inspect.draw.save_figure`.

    Raises:
        PlotDependencyError: matplotlib is not installed.
    """
    matplotlib = require_matplotlib()
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator
    layers = list(dict.fromkeys(layer for run in runs for layer in run.supports))
    lines = -(-len(layers) // _COLUMNS)
    colors = [f'C{index % 10}' for index in range(len(runs))]
    with matplotlib.rc_context(_STYLE):
        figure = new_figure(7.2, 2.3 + 1.5 * lines, layout='constrained')
        parts: Any = figure.subfigures(2, 1, height_ratios=(2.0, 1.5 * lines)) if lines else [figure]
        panels = list(parts[0].subplots(1, 3))
        _draw_curves(panels, runs, colors)
        if lines:
            grid = parts[1].subplots(lines, _COLUMNS, squeeze=False)
            for index, axes in enumerate(grid.flat):
                if index >= len(layers):
                    axes.axis('off')
                    continue
                _draw_supports(axes, layers[index], runs, colors)
                panels.append(axes)
            parts[1].supylabel('support σ (px)', fontsize=7)
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
