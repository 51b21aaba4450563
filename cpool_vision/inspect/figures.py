"""Draws footprints, supports by depth, and effective receptive fields."""
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .canvas import STYLE, Sheet, check_images, new_figure, require_matplotlib, show
from .draw import pick_layers
from .supports import layer_supports

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .footprints import Footprints
    from .maps import ContextMaps
    from .receptive_field import ReceptiveField

_BLUE, _ORANGE, _GREY = '#0072b2', '#d55e00', '0.55'  # color-blind readers can distinguish them
_DECADES = 3  # range of the color scale of receptive fields


def _grey(image: NDArray[np.uint8], brightness: float) -> NDArray[np.float64]:
    return brightness * image.astype(np.float64) @ np.array([0.299, 0.587, 0.114]) / 255


def footprints_figure(
        images: NDArray[np.uint8],
        footprints: Mapping[str, 'Footprints'],
        points: Sequence[Sequence[float]],
        layers: Sequence[str] | int = 2,
        row_labels: Sequence[str] | None = None,
        group: int | None = None,
) -> 'Figure':
    """Draws a row per image: the image with the points, and for each layer the footprints of the cells at the points.

    The weights of a footprint sum to one. Colors cover two decades, or more if needed to reach a decade below the
    largest weight of the flattest footprint. Smaller weights are not drawn; where footprints overlap, the larger weight
    is shown. The radius of the dashed circle around a cell's center is its support.

    Args:
        images: Images, `(B, H, W, 3)` uint8.
        footprints: `gaussian_footprints` of the same B images.
        points: Points (y, x) of the footprints.
        layers: Names of layers, or a number of layers to spread over the model.
        row_labels: B labels.
        group: Index of the group to draw; averages over groups if None.

    Raises:
        PlotDependencyError: matplotlib is not installed.
        ValueError: The images do not fit the footprints, or a layer is unknown.
    """
    matplotlib = require_matplotlib()
    names = pick_layers(list(footprints), layers)
    check_images(images, row_labels)
    size = images.shape[1:3]
    for name in names:
        if footprints[name].weights.shape[0] != len(images) or len(footprints[name].cells) != len(points):
            raise ValueError(f'layer {name!r} has footprints of {footprints[name].weights.shape[0]} images at '
                             f'{len(footprints[name].cells)} points, got {len(images)} images and {len(points)} points')
    weights = {name: _of_group(footprints[name].weights, 1, group) for name in names}
    flattest = min(float(each.amax((-2, -1)).min()) for each in weights.values())
    smallest = min(10. ** np.floor(np.log10(flattest / 10)), 1e-2)
    with matplotlib.rc_context(STYLE):
        sheet = Sheet(len(images), len(names), size[0] / size[1], per_layer=1)
        for row, image in enumerate(images):
            axes = sheet.panel(row, 0)
            show(axes, image, size)
            for y, x in points:
                axes.plot(x, y, '+', color='black', markersize=5, markeredgewidth=1.6)
                axes.plot(x, y, '+', color='white', markersize=4, markeredgewidth=0.7)
            if row_labels is not None:
                sheet.label(axes, row_labels[row])
            for column, name in enumerate(names, start=1):
                found = footprints[name]
                _draw_footprints(sheet.panel(row, column), image, found, weights[name][row], found.sigma[row], group,
                                 smallest)
        sheet.heading(0, 1, 'image and points', 'normal')
        wide = len(names) > 1
        sheet.heading(1, len(names) + 1, 'pooling weights at the points, circle 1 σ' if wide else 'weights, circle 1 σ',
                      'bold')
        for column, name in enumerate(names, start=1):
            sheet.heading(column, column + 1, name, 'normal')
        colors = matplotlib.cm.ScalarMappable(matplotlib.colors.LogNorm(smallest, 1), 'magma')
        sheet.figure.colorbar(colors, cax=sheet.bar(1, len(names)), orientation='horizontal', label='pooling weight')
    return sheet.figure


def _of_group(values: Tensor, dim: int, group: int | None) -> Tensor:
    values = values.detach().double().cpu()
    return values.mean(dim) if group is None else values.select(dim, group)


def _draw_footprints(
        axes: 'Axes', image: NDArray[np.uint8], found: 'Footprints', weights: Tensor, sigma: Tensor, group: int | None,
        smallest: float,
) -> None:
    import matplotlib
    from matplotlib.patches import Ellipse
    # 0 at the smallest weight shown, 1 at a weight of 1
    strength = 1 - np.log10(np.maximum(weights.amax(0).numpy(), smallest)) / np.log10(smallest)
    size = image.shape[:2]
    show(axes, _grey(image, 0.55), size, cmap='gray', vmin=0, vmax=1)
    show(axes, strength, size, cmap=matplotlib.colormaps['magma'], vmin=0, vmax=1,
         alpha=0.85 * strength ** 0.5)
    cell = size[0] / found.grid[0], size[1] / found.grid[1]
    for (y, x), radius in zip(found.centers().tolist(), _of_group(sigma, 0, group).tolist(), strict=True):
        axes.add_patch(Ellipse((x * cell[1], y * cell[0]), 2 * radius * cell[1], 2 * radius * cell[0], fill=False,
                               edgecolor='white', linewidth=0.6, linestyle=(0, (3, 2))))


def depth_figure(maps: Mapping[str, 'ContextMaps'], image_size: tuple[int, int]) -> 'Figure':
    """Draws the distribution of supports of every context pool by depth, in pixels of the image.

    Shapes show the density of a layer's supports, bars the 5 % to 95 % quantiles, dots the median, and short gray lines
    the smallest and largest possible support.

    Args:
        maps: Result of `context_maps`.
        image_size: (height, width) of the images.

    Raises:
        PlotDependencyError: matplotlib is not installed.
        ValueError: There are no layers.
    """
    matplotlib = require_matplotlib()
    if not maps:
        raise ValueError('maps must contain at least one context pool, got none')
    supports = [layer_supports(each, image_size) for each in maps.values()]
    places = np.arange(1, len(maps) + 1)
    with matplotlib.rc_context({**STYLE, 'axes.spines.top': False, 'axes.spines.right': False}):
        figure = new_figure(max(2.6, 0.9 + 0.42 * len(maps)), 2.6, layout='constrained')
        axes = figure.subplots()
        colors = matplotlib.colormaps['viridis'](np.linspace(0.1, 0.85, len(maps)))
        for place, values, each, color in zip(places, supports, maps.values(), colors, strict=True):
            # the density of constant supports is a line and cannot be estimated
            if np.ptp(values) > 1e-6 * abs(values[0]):
                sample = np.random.default_rng(0).permutation(values)[:20000]
                violin: Any = axes.violinplot(sample, [place], widths=0.8, showextrema=False)
                violin['bodies'][0].set(facecolor=color, edgecolor=color, alpha=0.75, linewidth=0.5)
            low, median, high = np.quantile(values, (0.05, 0.5, 0.95))
            axes.plot([place, place], [low, high], color='black', linewidth=1.2, solid_capstyle='butt')
            axes.plot(place, median, 'o', color='white', markeredgecolor='black', markersize=3.2, markeredgewidth=0.7)
            if each.limits is not None:
                limits = np.array(each.limits) * each.cell(image_size)
                axes.hlines(limits, place - 0.4, place + 0.4, color=_GREY, linewidth=0.7)
        axes.set_xticks(places, list(maps), rotation=45, ha='right', rotation_mode='anchor')
        axes.set(xlim=(0.4, len(maps) + 0.6), ylabel='support σ (px)')
        axes.set_ylim(bottom=0)
        axes.set_xlabel('context pool, in order of execution')
        marks = [
            matplotlib.patches.Patch(facecolor=colors[0], alpha=0.75, label='density'),
            matplotlib.lines.Line2D([], [], color='black', linewidth=1.2, marker='o', markerfacecolor='white',
                                    markersize=3.2, markeredgewidth=0.7, label='5–95 %, median'),
            matplotlib.lines.Line2D([], [], color=_GREY, linewidth=0.7, label='limits')]
        figure.legend(handles=marks, loc='outside upper center', ncols=3, frameon=False, fontsize=6, handlelength=1.4,
                      columnspacing=1.2)
    return figure


def receptive_field_figure(before: 'ReceptiveField', after: 'ReceptiveField') -> 'Figure':
    """Draws effective receptive fields with the pools off and on, and their mass within a radius.

    Maps show the base-10 logarithm of the gradient relative to its largest value, over three decades. The solid circle
    contains half of the mass, the dashed circle 90 %.

    Raises:
        PlotDependencyError: matplotlib is not installed.
        ValueError: The two fields have different image sizes.
    """
    matplotlib = require_matplotlib()
    if before.map.shape != after.map.shape:
        raise ValueError(f'before and after must have the same image size, got {tuple(before.map.shape)} and '
                         f'{tuple(after.map.shape)}')
    size: Any = tuple(after.map.shape)
    side, left, top, gap = 1.75, 0.1, 0.38, 0.12
    height, wide = side * size[0] / size[1], 1.95
    total_w, total_h = left + 2 * (side + gap) + 0.48 + wide + 0.1, top + height + 0.45
    with matplotlib.rc_context(STYLE):
        figure = new_figure(total_w, total_h)

        def add(x: float, width: float, y: float = top, tall: float = height) -> Any:
            return figure.add_axes((x / total_w, 1 - (y + tall) / total_h, width / total_w, tall / total_h))

        for place, (title, field) in enumerate((('pools off', before), ('pools on', after))):
            axes = add(left + place * (side + gap), side)
            decades = np.log10(np.maximum((field.map / field.map.max()).numpy(), 1e-9))
            shown = show(axes, decades, size, cmap='magma', vmin=-_DECADES, vmax=0)
            for share, style in ((0.5, '-'), (0.9, (0, (3, 2)))):
                axes.add_patch(matplotlib.patches.Circle(
                    field.center[::-1], field.radius(share), fill=False, edgecolor='white', linewidth=0.8,
                    linestyle=style))
            axes.set_title(title, fontsize=7, fontweight='bold', pad=12)
            axes.text(0.5, 1.025, f'50 % in {field.radius(0.5):.3g} px, 90 % in {field.radius(0.9):.3g} px',
                      transform=axes.transAxes, ha='center', va='bottom', fontsize=6)
        bar = add(left + 0.2 * side, 1.6 * side + gap, top + height + 0.07, 0.07)
        figure.colorbar(shown, cax=bar, orientation='horizontal', ticks=range(-_DECADES, 1),
                        label='log₁₀ (gradient / largest)', extend='min')
        axes, reach = add(left + 2 * (side + gap) + 0.48, wide), 0.
        for name, field, color, style in (
                ('pools on', after, _ORANGE, '-'), ('pools off', before, _BLUE, (0, (3, 2)))):
            radii, mass = field.mass_within()
            reach = max(reach, 1.15 * field.radius(0.995))
            axes.plot(radii, 100 * mass, color=color, linewidth=1.2, linestyle=style, label=name,
                      drawstyle='steps-post')
        for share in (50, 90):
            axes.axhline(share, color=_GREY, linewidth=0.5, linestyle=(0, (1, 2)))
        axes.spines[['top', 'right']].set_visible(False)
        axes.set(xlim=(0, reach), ylim=(0, 101), xlabel='radius (px)', ylabel='gradient within (%)',
                 yticks=(0, 25, 50, 75, 100))
        axes.legend(frameon=False, fontsize=6, loc='lower right', handlelength=1.2)
    return figure
