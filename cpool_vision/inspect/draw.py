"""Draws supports over images, and maps of supports and pooling weights."""
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .canvas import STYLE, PlotDependencyError, Sheet, check_images, require_matplotlib, save_figure, show

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .maps import ContextMaps

__all__ = [
    'PlotDependencyError', 'groups_figure', 'pick_layers', 'relative_weight', 'save_figure', 'support_in_pixels',
    'supports_figure']

_MIN_CIRCLES, _MAX_CIRCLES = 3, 7  # per side
_CLIPPED = 0.02  # fraction of the values beyond each end of a color scale


def support_in_pixels(maps: 'ContextMaps', image_size: tuple[int, int], group: int | None = None) -> Tensor:
    """Returns supports in pixels of the image, `(B, Ho, Wo)` fp32 on the CPU.

    Args:
        maps: Maps of a context pool.
        image_size: (height, width) of the image.
        group: Index of a group; averages over groups if None.
    """
    sigma = maps.sigma.detach().float().cpu()
    sigma = sigma.mean(1) if group is None else sigma[:, group]
    return sigma * maps.cell(image_size)


def relative_weight(maps: 'ContextMaps', group: int | None = None) -> Tensor:
    """Returns the base-2 logarithm of pooling weights relative to uniform weights, `(B, H, W)` fp32 on the CPU.

    A value of 1 means twice the uniform weight, before the support is applied.

    Args:
        maps: Maps of a context pool.
        group: Index of a group; if None, weights are averaged over groups before the logarithm.
    """
    log_weight = maps.weight_logits.detach().float().cpu().flatten(2).log_softmax(-1)
    log_weight = log_weight.unflatten(-1, tuple(maps.grid))
    log_weight = log_weight.logsumexp(1) - math.log(log_weight.shape[1]) if group is None else log_weight[:, group]
    return (log_weight + math.log(maps.grid[0] * maps.grid[1])) / math.log(2)


def pick_layers(names: Sequence[str], wanted: Sequence[str] | int = 2) -> list[str]:
    """Selects layers to draw: by name, or a number of them spread evenly from the first to the last.

    Raises:
        ValueError: A name is not in `names`, or the number is below 1.
    """
    if isinstance(wanted, int):
        if wanted < 1:
            raise ValueError(f'the number of layers must be >= 1, got {wanted}')
        count = min(wanted, len(names))
        return [names[round(i * (len(names) - 1) / max(count - 1, 1))] for i in range(count)]
    for name in wanted:
        if name not in names:
            raise ValueError(f'no context pool is named {name!r}: choose from {", ".join(names)}')
    return list(wanted)


def _circles(axes: 'Axes', sigma: NDArray[Any], maps: 'ContextMaps', size: tuple[int, int], color: Any) -> None:
    """Draws circles of radius sigma at some output cells, far enough apart that most do not overlap."""
    from matplotlib.collections import EllipseCollection
    rows, cols = sigma.shape
    cell = size[0] / maps.grid[0], size[1] / maps.grid[1]
    diameter = 2 * max(float(np.median(sigma)), 1e-6)
    step_y, step_x = (
        -(-cells // round(min(max(extent / diameter, _MIN_CIRCLES), _MAX_CIRCLES)))
        for cells, extent in ((rows, size[0]), (cols, size[1])))
    i, j = np.mgrid[step_y // 2:rows:step_y, step_x // 2:cols:step_x]
    # the center of output cell i, in pixels of an image whose first pixel spans [0, 1]
    y = (i * maps.stride + maps.stride / 2) * cell[0]
    x = (j * maps.stride + maps.stride / 2) * cell[1]
    diameters = 2 * sigma[i, j].ravel()
    for colors, width in (('black', 1.4), (color(sigma[i, j].ravel()), 0.8)):
        axes.add_collection(EllipseCollection(
            diameters, diameters, np.zeros_like(diameters), units='xy', offsets=np.stack([x.ravel(), y.ravel()], 1),
            offset_transform=axes.transData, facecolors='none', edgecolors=colors, linewidths=width))


def _limits(values: NDArray[Any]) -> tuple[float, float]:
    low, high = (float(each) for each in np.quantile(values, (_CLIPPED, 1 - _CLIPPED)))
    # the scale of a nearly constant map spans a tenth of its value instead of its rounding errors
    pad = max(0.05 * abs(high) - (high - low) / 2, 0.0)
    return low - pad, high + pad


def _reach(weight: NDArray[Any]) -> float:
    """Returns half the width of the color scale of relative weights."""
    return max(float(np.quantile(np.abs(weight), 1 - _CLIPPED)), 0.1)


def _bars(sheet: Sheet, column: int, supports: Any, weights: Any) -> None:
    """Draws color bars below the columns of supports and weights."""
    from matplotlib.ticker import MaxNLocator
    for offset, (values, label) in enumerate(((supports, 'σ (px)'), (weights, 'log₂ (weight / uniform)'))):
        sheet.figure.colorbar(values, cax=sheet.bar(column + offset), orientation='horizontal', label=label,
                              ticks=MaxNLocator(3), extend='both', extendfrac=0.03)


def _describe(maps: 'ContextMaps', size: tuple[int, int], group: int | None) -> str:
    """Describes the mean support and its range over the groups."""
    means = [support_in_pixels(maps, size, each).mean().item() for each in range(maps.sigma.shape[1])]
    if group is not None:
        return f'group {group} of {len(means)}, mean σ {means[group]:.3g} px'
    text = f'mean σ {sum(means) / len(means):.3g} px'
    return text if len(means) == 1 else f'{text} ({len(means)} groups: {min(means):.3g} to {max(means):.3g})'


def supports_figure(
        images: NDArray[np.uint8],
        maps: Mapping[str, 'ContextMaps'],
        layers: Sequence[str] | int = 2,
        row_labels: Sequence[str] | None = None,
        group: int | None = None,
) -> 'Figure':
    """Draws a row per image, with the supports over the image, the support map and the weight map of each layer.

    The radius of a circle is one support; its color is that of the support map. Supports are in pixels of the image.
    The weight map shows log2 of the weight relative to uniform weights. All rows of a layer share a color scale, which
    clips 2 % of the values at each end.

    Args:
        images: Images, `(B, H, W, 3)` uint8.
        maps: `context_maps` of the same B images.
        layers: Names of layers, or a number of layers to spread over the model.
        row_labels: B labels.
        group: Index of the group to draw; averages over groups if None.

    Returns:
        A figure for `save_figure`.

    Raises:
        PlotDependencyError: matplotlib is not installed.
        ValueError: The images do not fit the maps, or a layer is unknown.
    """
    matplotlib = require_matplotlib()
    names = pick_layers(list(maps), layers)
    check_images(images, row_labels)
    rows, size = len(images), images.shape[1:3]
    for name in names:
        if len(maps[name].sigma) != rows:
            raise ValueError(f'layer {name!r} has maps of {len(maps[name].sigma)} images, got {rows} images')
    with matplotlib.rc_context(STYLE):
        sheet = Sheet(rows, len(names), size[0] / size[1])
        for row in range(rows):
            axes = sheet.panel(row, 0)
            show(axes, images[row], size)
            if row_labels is not None:
                sheet.label(axes, row_labels[row])
        sheet.heading(0, 1, 'image', 'normal')
        for number, name in enumerate(names):
            _draw_layer(sheet, 1 + 3 * number, images, maps[name], name, group)
    return sheet.figure


def _draw_layer(
        sheet: Sheet, column: int, images: NDArray[np.uint8], maps: 'ContextMaps', name: str, group: int | None,
) -> None:
    import matplotlib
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    size = images.shape[1:3]
    sigma = support_in_pixels(maps, size, group).numpy()
    weight = relative_weight(maps, group).numpy()
    scale = ScalarMappable(Normalize(*_limits(sigma)), matplotlib.colormaps['viridis'])
    reach = _reach(weight)
    for row, image in enumerate(images):
        pale = 0.25 * 255 + 0.75 * image.astype(np.float32)
        overlay = sheet.panel(row, column)
        show(overlay, pale.astype(np.uint8), size)
        _circles(overlay, sigma[row], maps, size, scale.to_rgba)
        show(sheet.panel(row, column + 1), sigma[row], size, norm=scale.norm, cmap=scale.cmap)
        shown = show(sheet.panel(row, column + 2), weight[row], size, vmin=-reach, vmax=reach, cmap='RdBu_r')
    sheet.heading(column, column + 3, f'{name}: {_describe(maps, size, group)}', 'bold')
    for offset, title in enumerate(('supports, radius 1 σ', 'support map', 'pooling weight')):
        sheet.heading(column + offset, column + offset + 1, title, 'normal')
    _bars(sheet, column + 1, scale, shown)


def _tiles(values: NDArray[Any], grid: tuple[int, int]) -> NDArray[Any]:
    """Arranges maps `(G, h, w)` in a grid of (rows, columns), separated by NaN."""
    count, height, width = values.shape
    gap = max(1, round(0.06 * max(height, width)))
    tiled = np.full((grid[0] * (height + gap) - gap, grid[1] * (width + gap) - gap), np.nan)
    for index in range(count):
        top, left = index // grid[1] * (height + gap), index % grid[1] * (width + gap)
        tiled[top:top + height, left:left + width] = values[index]
    return tiled


def groups_figure(
        images: NDArray[np.uint8],
        maps: 'ContextMaps',
        name: str,
        row_labels: Sequence[str] | None = None,
) -> 'Figure':
    """Draws every group of a context pool: a row per image, with the support and weight maps of the groups as tiles.

    Tiles are numbered row by row from 0. Units and color scales are those of `supports_figure`.

    Args:
        images: Images, `(B, H, W, 3)` uint8.
        maps: Maps of a context pool for the same B images.
        name: Name of the pool, for the heading.
        row_labels: B labels.

    Raises:
        PlotDependencyError: matplotlib is not installed.
        ValueError: The images do not fit the maps.
    """
    matplotlib = require_matplotlib()
    check_images(images, row_labels)
    if len(maps.sigma) != len(images):
        raise ValueError(f'layer {name!r} has maps of {len(maps.sigma)} images, got {len(images)} images')
    size, groups = images.shape[1:3], maps.sigma.shape[1]
    grid = -(-groups // math.ceil(groups ** 0.5)), math.ceil(groups ** 0.5)
    sigma, weight = (
        np.stack([take(group).numpy() for group in range(groups)], 1)
        for take in (lambda group: support_in_pixels(maps, size, group), lambda group: relative_weight(maps, group)))
    scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(*_limits(sigma)), matplotlib.colormaps['viridis'])
    reach = _reach(weight)
    with matplotlib.rc_context(STYLE):
        sheet = Sheet(len(images), 1, size[0] / size[1], per_layer=2, cell=2.3)
        for row, image in enumerate(images):
            axes = sheet.panel(row, 0)
            show(axes, image, size)
            if row_labels is not None:
                sheet.label(axes, row_labels[row])
            for column, values, options in (
                    (1, sigma, dict(norm=scale.norm, cmap=scale.cmap)),
                    (2, weight, dict(vmin=-reach, vmax=reach, cmap='RdBu_r'))):
                axes = sheet.panel(row, column)
                shown = show(axes, _tiles(values[row], grid), size, **options)
                for group in range(groups):
                    axes.text(group % grid[1] / grid[1], 1 - group // grid[1] / grid[0], f' {group}', fontsize=4.5,
                              transform=axes.transAxes, ha='left', va='top', color='black',
                              bbox=dict(facecolor='white', alpha=0.6, linewidth=0, pad=0.3))
        sheet.heading(0, 1, 'image', 'normal')
        sheet.heading(1, 3, f'{name}: {_describe(maps, size, None)}', 'bold')
        sheet.heading(1, 2, 'support maps of the groups', 'normal')
        sheet.heading(2, 3, 'pooling weights of the groups', 'normal')
        _bars(sheet, 1, scale, shown)
    return sheet.figure
