import sys

import numpy as np
import pytest
import torch

from cpool_vision.inspect import ContextMaps, Footprints, ReceptiveField
from cpool_vision.inspect.draw import PlotDependencyError
from cpool_vision.inspect.figures import depth_figure, footprints_figure, receptive_field_figure
from cpool_vision.inspect.footprints import footprints_of, grid_points

SIZE = (32, 48)


def images(batch: int = 2) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (batch, *SIZE, 3), dtype=np.uint8)


def maps_of(sigma: float = 1.0, grid: tuple[int, int] = (8, 12), stride: int = 1, **kwargs) -> ContextMaps:
    out = [-(-side // stride) for side in grid]
    return ContextMaps(torch.zeros(2, 2, *grid), torch.full((2, 2, *out), sigma), grid, stride, **kwargs)


def field(x: int = 24) -> ReceptiveField:
    values = torch.zeros(SIZE, dtype=torch.float64)
    values[16, x - 4:x + 4] = 1 / 8
    return ReceptiveField(values, (4, 6), (8, 12), (18, x + 2))


def texts(figure) -> list[str]:
    return [text.get_text() for text in figure.texts] + [
        text.get_text() for axes in figure.axes for text in axes.texts + [axes.title]]


def written(figure) -> list:
    """All texts that are drawn: matplotlib keeps labels of ticks beyond the axes too."""
    found = [*figure.texts]
    for axes in figure.axes:
        found += [*axes.texts, axes.title, axes.xaxis.label, axes.yaxis.label]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            found += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    return [text for text in found if text.get_visible() and text.get_text().strip()]


def no_overlap(figure) -> bool:
    """Whether no two texts lie on one another, nor any outside of the figure."""
    figure.canvas.draw()
    boxes = [(text, text.get_window_extent()) for text in written(figure)]
    for text, box in boxes:
        assert box.x0 >= -1 and box.y0 >= -1, text.get_text()
        assert box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1, text.get_text()
    level = [box for text, box in boxes if text.get_rotation() in (0, 90)]
    return not any(a.overlaps(b) for i, a in enumerate(level) for b in level[:i])


def test_footprints_stand_in_image_pixels() -> None:
    points = grid_points(SIZE)
    maps = {'fine': maps_of(1.5), 'coarse': maps_of(3.0, (16, 24), stride=2)}
    found = {name: footprints_of(each, SIZE, points) for name, each in maps.items()}
    figure = footprints_figure(images(), found, points, 2, ['cat', 'dog'])
    assert len(figure.axes) == 2 * 3 + 1 and {'fine', 'coarse'} <= set(texts(figure))
    assert no_overlap(figure)
    for column, name, cell in ((1, 'fine', 4), (2, 'coarse', 2)):
        circles = figure.axes[column].patches
        assert [circle.center for circle in circles] == [
            (x * cell, y * cell) for y, x in found[name].centers().tolist()]
        assert circles[0].width == 2 * cell * maps[name].sigma[0, 0, 0, 0] == 2 * 6
    gray, color = figure.axes[1].images
    assert gray.get_array().shape == SIZE and color.get_array().shape == (8, 12)


def test_long_names_are_made_to_fit() -> None:
    name = 'features.stages.2.blocks.1.attention.context_pool.{}'
    found = {name.format(i): footprints_of(maps_of(), SIZE, [(1, 1)]) for i in range(2)}
    figure = footprints_figure(images(), found, [(1, 1)], row_labels=['n01530575_brambling', 'n02089078_black-and'])
    assert no_overlap(figure)
    for text in (*figure.texts[2:4], figure.axes[0].yaxis.label):
        size = text.get_fontsize()
        text.set_fontsize(12)
        with pytest.raises(AssertionError):
            assert no_overlap(figure)
        text.set_fontsize(size)


def test_flat_footprints_widen_the_scale() -> None:
    def scale(sigma: float) -> float:
        found = {'only': footprints_of(maps_of(sigma, (32, 48)), SIZE, [(16, 24)])}
        return footprints_figure(images(), found, [(16, 24)]).axes[-1].get_xlim()[0]

    assert scale(0.5) == pytest.approx(1e-2) and scale(10) == pytest.approx(1e-4)


def test_depth_shows_every_layer_with_its_limits() -> None:
    maps = {'constant': maps_of(2.0, limits=(0.1, 3.0)), 'varied': maps_of(1.0)}
    maps['varied'].sigma.copy_(torch.rand(2, 2, 8, 12, generator=torch.Generator().manual_seed(0)) + 1)
    figure = depth_figure(maps, SIZE)
    axes, = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ['constant', 'varied']
    medians = [line.get_ydata()[0] for line in axes.lines if line.get_marker() == 'o']
    assert medians == pytest.approx([8, 4 * maps['varied'].sigma.median().item()], rel=0.02)
    limits = next(c for c in axes.collections if len(c.get_paths()) == 2 and type(c).__name__ == 'LineCollection')
    assert [segment[0, 1] for segment in limits.get_segments()] == pytest.approx([0.4, 12])
    assert no_overlap(figure)


def test_receptive_fields_name_their_radii() -> None:
    figure = receptive_field_figure(field(), field(20))
    assert texts(figure).count(f'50 % in {field().radius(0.5):.3g} px, 90 % in {field().radius(0.9):.3g} px') == 2
    circle = figure.axes[0].patches[0]
    assert circle.center == (26, 18) and circle.radius == field().radius(0.5)
    assert no_overlap(figure)
    curve = figure.axes[-1].lines[0]
    assert curve.get_ydata()[-1] == pytest.approx(100)


def test_bad_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {'only': footprints_of(maps_of(), SIZE, [(1, 1)])}
    assert isinstance(found['only'], Footprints)
    with pytest.raises(ValueError, match="layer 'only' has footprints of 2 images at 1 points, got 3 images and 1"):
        footprints_figure(images(3), found, [(1, 1)])
    with pytest.raises(ValueError, match='got 2 images and 2 points'):
        footprints_figure(images(), found, [(1, 1), (2, 2)])
    with pytest.raises(ValueError, match="no context pool is named 'x'"):
        footprints_figure(images(), found, [(1, 1)], ['x'])
    with pytest.raises(ValueError, match='maps must contain at least one context pool'):
        depth_figure({}, SIZE)
    other = field()._replace(map=torch.ones(4, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match=r'the same image size, got \(32, 48\) and \(4, 4\)'):
        receptive_field_figure(field(), other)
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    for call in (lambda: depth_figure({'only': maps_of()}, SIZE), lambda: receptive_field_figure(field(), field())):
        with pytest.raises(PlotDependencyError, match=r"pip install 'cpool_vision\[plot\]'"):
            call()
