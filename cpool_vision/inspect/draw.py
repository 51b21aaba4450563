"""Pictures of what a model pools with: images with their supports drawn over them, and maps of supports and weights."""
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .canvas import STYLE, PlotDependencyError, Sheet, check_images, require_matplotlib, save_figure, show

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .maps import ContextMaps

__all__ = [
    'PlotDependencyError', 'pick_layers', 'relative_weight', 'save_figure', 'support_in_pixels', 'supports_figure']

_MAX_CIRCLES = 7  # per side


def support_in_pixels(maps: 'ContextMaps', image_size: tuple[int, int], group: int | None = None) -> Tensor:
    """Supports in pixels of the image, `(B, Ho, Wo)` fp32 on the CPU.

    Args:
        maps: maps of one context pool.
        image_size: (height, width) of the image.
        group: group to take; the mean over groups if None.
    """
    sigma = maps.sigma.detach().float().cpu()
    sigma = sigma.mean(1) if group is None else sigma[:, group]
    return sigma * maps.cell(image_size)


def relative_weight(maps: 'ContextMaps', group: int | None = None) -> Tensor:
    """Binary logarithm of the pooling weight over that of a uniform map, `(B, H, W)` fp32 on the CPU.

    1 means twice the share that the pixel would have if all counted alike, before any support is applied.

    Args:
        maps: maps of one context pool.
        group: group to take; the mean over groups of the logarithm if None.
    """
    log_weight = maps.weight_logits.detach().float().cpu().flatten(2).log_softmax(-1)
    log_weight = log_weight.unflatten(-1, tuple(maps.grid))
    log_weight = log_weight.mean(1) if group is None else log_weight[:, group]
    return (log_weight + math.log(maps.grid[0] * maps.grid[1])) / math.log(2)


def pick_layers(names: Sequence[str], wanted: Sequence[str] | int = 2) -> list[str]:
    """Layers to draw: those named, or so many spread evenly from the first to the last.

    Raises:
        ValueError: a name that is not among `names`, or a number below 1.
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


def _circles(axes: Any, sigma: NDArray[Any], maps: 'ContextMaps', size: tuple[int, int], colour: Any) -> None:
    """One circle of radius sigma at every few output cells."""
    from matplotlib.collections import EllipseCollection
    rows, cols = sigma.shape
    cell = size[0] / maps.grid[0], size[1] / maps.grid[1]
    step_y, step_x = -(-rows // _MAX_CIRCLES), -(-cols // _MAX_CIRCLES)
    i, j = np.mgrid[step_y // 2:rows:step_y, step_x // 2:cols:step_x]
    # the centre of output cell i, in pixels of an image whose first pixel spans [0, 1]
    y = (i * maps.stride + maps.stride / 2) * cell[0]
    x = (j * maps.stride + maps.stride / 2) * cell[1]
    diameter = 2 * sigma[i, j].ravel()
    for colours, width in (('black', 1.4), (colour(sigma[i, j].ravel()), 0.8)):
        axes.add_collection(EllipseCollection(
            diameter, diameter, np.zeros_like(diameter), units='xy', offsets=np.stack([x.ravel(), y.ravel()], 1),
            offset_transform=axes.transData, facecolors='none', edgecolors=colours, linewidths=width))


def _limits(values: NDArray[Any]) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    # a nearly constant map gets a scale of a tenth of its value, not of its rounding errors
    pad = max(0.05 * abs(high) - (high - low) / 2, 0.0)
    return low - pad, high + pad


def supports_figure(
        images: NDArray[np.uint8],
        maps: Mapping[str, 'ContextMaps'],
        layers: Sequence[str] | int = 2,
        row_labels: Sequence[str] | None = None,
        group: int | None = None,
) -> 'Figure':
    """Draws a sheet: a row per image; per layer the supports over the image, the support map and the weight map.

    The circles have a radius of one standard deviation of the pooling mask and the colour of the support map beside
    them. Supports are in pixels of the image; the weight map shows the binary logarithm of the weight over a uniform
    one. Colour scales are those of the layer, over all rows.

    Args:
        images: `(B, H, W, 3)` uint8.
        maps: `context_maps` of the same B images.
        layers: names of layers, or how many of them, spread over the model.
        row_labels: B labels.
        group: group of channels to draw; the mean over groups if None.

    Returns:
        A figure, to be written by `save_figure`.

    Raises:
        PlotDependencyError: matplotlib is not installed.
        ValueError: images of another shape or number than the maps, or an unknown layer.
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
    from matplotlib.ticker import MaxNLocator
    size = images.shape[1:3]
    sigma = support_in_pixels(maps, size, group).numpy()
    weight = relative_weight(maps, group).numpy()
    scale = ScalarMappable(Normalize(*_limits(sigma)), matplotlib.colormaps['viridis'])
    reach = max(float(np.abs(weight).max()), 0.1)
    for row, image in enumerate(images):
        pale = 0.25 * 255 + 0.75 * image.astype(np.float32)
        overlay = sheet.panel(row, column)
        show(overlay, pale.astype(np.uint8), size)
        _circles(overlay, sigma[row], maps, size, scale.to_rgba)
        show(sheet.panel(row, column + 1), sigma[row], size, norm=scale.norm, cmap=scale.cmap)
        shown = show(sheet.panel(row, column + 2), weight[row], size, vmin=-reach, vmax=reach, cmap='RdBu_r')
    sheet.heading(column, column + 3, f'{name}: mean σ {sigma.mean():.3g} px', 'bold')
    for offset, title in enumerate(('supports, radius 1 σ', 'support map', 'pooling weight')):
        sheet.heading(column + offset, column + offset + 1, title, 'normal')
    for offset, (values, label) in enumerate(((scale, 'σ (px)'), (shown, 'log₂ (weight / uniform)')), start=1):
        sheet.figure.colorbar(
            values, cax=sheet.bar(column + offset), orientation='horizontal', label=label, ticks=MaxNLocator(3))
