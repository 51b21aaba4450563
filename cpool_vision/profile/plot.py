"""Plots cost over map side and mean support, relative to a depthwise 7x7 convolution."""
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cpool_vision.inspect.canvas import new_figure, require_matplotlib

from .implementations import CONVOLUTION, NAMES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colors, which color-blind readers can distinguish.
_COLORS = ('#000000', '#0072b2', '#d55e00', '#009e73', '#cc79a7', '#56b4e9')
_MARKERS = 'osD^vP'
_LABELS = {'size': 'side of the map (pixels)', 'support': 'mean support (pixels)'}


def _series(points: Sequence[Mapping[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Returns the values at which both the implementation and the convolution ran, and the relative cost."""
    pairs = [(point['at'], row['cost_over_depthwise_7x7']) for point in points for row in point['rows']
             if row['implementation'] == name and row['cost_over_depthwise_7x7'] is not None]
    return [at for at, _ in pairs], [cost for _, cost in pairs]


def _floor_series(points: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    pairs = [(point['at'], point['floor']['ms'] / row['median_ms']) for point in points for row in point['rows']
             if row['implementation'] == CONVOLUTION]
    return [at for at, _ in pairs], [cost for _, cost in pairs]


def _draw_panel(axes: 'Axes', kind: str, points: Sequence[Mapping[str, Any]]) -> None:
    from matplotlib import ticker

    drawn = [name for name in NAMES if name != CONVOLUTION]
    for number, name in enumerate(drawn):
        at, cost = _series(points, name)
        if at:
            axes.plot(at, cost, color=_COLORS[number % len(_COLORS)], marker=_MARKERS[number % len(_MARKERS)],
                      markersize=3, linewidth=1, label=name)
    axes.plot(*_floor_series(points), color='0.5', linestyle='--', linewidth=0.8, label='floor')
    axes.axhline(1, color='0.5', linewidth=0.8, label='depthwise 7x7 convolution')
    axes.set(xscale='log', yscale='log', xlabel=_LABELS[kind])
    axes.set_xticks([point['at'] for point in points], [f'{point["at"]:g}' for point in points])
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f'{value:g}'))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    axes.spines[['top', 'right']].set_visible(False)
    case = points[0]['case']
    fixed = (f'supports {case["sigma"][0]:g} to {case["sigma"][1]:g} px' if kind == 'size'
             else f'{case["shape"][2]}x{case["shape"][3]} maps')
    axes.set_title(f'batch {case["shape"][0]}, {case["shape"][1]} channels, {fixed}', fontsize=7)


def cost_figure(sweeps: Mapping[str, Sequence[Mapping[str, Any]]], title: str) -> 'Figure':
    """Draws a panel per sweep: time relative to a depthwise 7x7 convolution on the same map, on logarithmic axes.

    Args:
        sweeps: Results of `cpool_vision.profile.report.sweep` by kind (`size`, `support`).
        title: Line above the panels.

    Returns:
        A figure for `cpool_vision.inspect.draw.save_figure`.

    Raises:
        PlotDependencyError: matplotlib is not installed.
    """
    matplotlib = require_matplotlib()
    with matplotlib.rc_context({'font.size': 7, 'axes.linewidth': 0.5}):
        figure = new_figure(3.3 * len(sweeps), 2.9, layout='constrained')
        panels = figure.subplots(1, len(sweeps), sharey=True, squeeze=False)[0]
        for axes, (kind, points) in zip(panels, sweeps.items(), strict=True):
            _draw_panel(axes, kind, points)
        panels[0].set_ylabel('time / time of the convolution')
        handles = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(),
                                                                             strict=True)}
        figure.legend(list(handles.values()), list(handles), loc='outside lower center', ncols=6, frameon=False)
        figure.suptitle(title, fontsize=7, fontweight='bold')
    return figure
