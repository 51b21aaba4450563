import io
import math
import pathlib
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from cpool_vision.cli import inspect as cli
from cpool_vision.inspect import ContextMaps
from cpool_vision.inspect.draw import (
    PlotDependencyError,
    groups_figure,
    pick_layers,
    relative_weight,
    save_figure,
    support_in_pixels,
    supports_figure,
)


def fake_maps(grid: tuple[int, int] = (4, 4), stride: int = 1, batch: int = 2, seed: int = 0) -> ContextMaps:
    generator = torch.Generator().manual_seed(seed)
    out = tuple(-(-n // stride) for n in grid)
    return ContextMaps(
        torch.randn(batch, 2, *grid, generator=generator), 0.5 + torch.rand(batch, 2, *out, generator=generator), grid,
        stride)


def fake_images(batch: int = 2, size: tuple[int, int] = (32, 32)) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (batch, *size, 3), dtype=np.uint8)


def test_support_in_pixels_of_the_image() -> None:
    maps = ContextMaps(torch.zeros(1, 2, 4, 8), torch.tensor([1.0, 3.0]).view(1, 2, 1, 1).expand(1, 2, 4, 8), (4, 8), 1)
    torch.testing.assert_close(support_in_pixels(maps, (32, 64)), torch.full((1, 4, 8), 16.0))
    torch.testing.assert_close(support_in_pixels(maps, (32, 64), group=1), torch.full((1, 4, 8), 24.0))


def test_relative_weight_is_zero_for_a_uniform_map() -> None:
    uniform = ContextMaps(torch.full((1, 2, 3, 5), 7.0), torch.ones(1, 2, 3, 5), (3, 5), 1)
    torch.testing.assert_close(relative_weight(uniform), torch.zeros(1, 3, 5), atol=1e-5, rtol=0)
    logits = torch.full((1, 1, 1, 4), -100.0)
    logits[..., 0] = 0
    single = ContextMaps(logits, torch.ones(1, 1, 1, 4), (1, 4), 1)
    assert relative_weight(single)[0, 0, 0].item() == pytest.approx(2)  # all of four shares
    assert torch.allclose(relative_weight(fake_maps(), group=0).exp2().mean((1, 2)), torch.ones(2))


def test_pick_layers() -> None:
    names = ['a', 'b', 'c', 'd', 'e']
    assert pick_layers(names, 2) == ['a', 'e']
    assert pick_layers(names, 3) == ['a', 'c', 'e']
    assert pick_layers(names, 1) == ['a'] and pick_layers(names, 9) == names
    assert pick_layers(names, ['d', 'b']) == ['d', 'b']
    with pytest.raises(ValueError, match="no context pool is named 'x': choose from a, b"):
        pick_layers(names, ['x'])
    with pytest.raises(ValueError, match='must be >= 1, got 0'):
        pick_layers(names, 0)


def test_figure_shows_every_layer_and_image() -> None:
    maps = {'first': fake_maps(), 'second': fake_maps((16, 16), stride=2), 'third': fake_maps((8, 8))}
    figure = supports_figure(fake_images(), maps, layers=['first', 'second'], row_labels=['cat', 'dog'])
    titles = [text.get_text() for text in figure.texts]
    mean = support_in_pixels(maps['second'], (32, 32)).mean().item()
    assert any(title.startswith(f'second: mean σ {mean:.3g} px (2 groups: ') for title in titles)
    assert not any('third' in title for title in titles)
    assert {'cat', 'dog'} <= {axes.get_ylabel() for axes in figure.axes}
    assert len(figure.axes) == 2 * 7 + 4  # two rows of panels, two color bars per layer


@pytest.mark.parametrize('grid, stride, size', [((4, 4), 1, (32, 32)), ((16, 24), 2, (32, 48)), ((5, 3), 2, (32, 48))])
def test_circles_stand_on_cell_centers_with_the_radius_of_the_support(grid, stride, size) -> None:
    maps = fake_maps(grid, stride, batch=1)
    figure = supports_figure(fake_images(1, size), {'only': maps})
    circles = figure.axes[1].collections[-1]
    cell = np.asarray([size[1] / grid[1], size[0] / grid[0]]) * stride
    centers = circles.get_offsets() / cell
    assert np.allclose(centers % 1, 0.5)
    column, row = np.floor(centers).astype(int).T
    expected = 2 * support_in_pixels(maps, size)[0].numpy()[row, column]
    assert np.allclose(2 * np.asarray(circles._widths), expected)
    assert 1 <= len(expected) <= 49 and circles._units == 'xy'


@pytest.mark.parametrize('sigma, per_side', [(0.2, 7), (2., 4), (20., 3)])
def test_circles_leave_the_image_visible(sigma: float, per_side: int) -> None:
    maps = ContextMaps(torch.zeros(1, 1, 14, 14), torch.full((1, 1, 14, 14), sigma), (14, 14), 1)
    figure = supports_figure(fake_images(1, (224, 224)), {'only': maps})
    centers = np.asarray(figure.axes[1].collections[-1].get_offsets())
    assert len(centers) <= per_side ** 2 and len(set(centers[:, 0])) >= 3
    assert per_side == 3 or np.diff(np.unique(centers[:, 0])).min() >= 2 * sigma * 16 - 1e-6


def test_one_extreme_value_does_not_take_the_color_scale() -> None:
    logits, sigma = torch.zeros(1, 1, 16, 16), torch.linspace(1, 2, 256).view(1, 1, 16, 16).clone()
    logits[0, 0, 0, 0], sigma[0, 0, 0, 0] = 50., 1000.
    figure = supports_figure(fake_images(1, (16, 16)), {'only': ContextMaps(logits, sigma, (16, 16), 1)})
    low, high = figure.axes[2].images[0].get_clim()
    assert 1 <= low < 1.1 and 1.9 < high <= 2


def test_the_summary_of_groups_is_the_mean_of_their_weights() -> None:
    logits = torch.zeros(1, 2, 1, 4)
    logits[0, 0, 0, 0] = 100.  # this group reads the first pixel alone, the other one all alike
    maps = ContextMaps(logits, torch.tensor([1., 3.]).view(1, 2, 1, 1).expand(1, 2, 1, 4), (1, 4), 1)
    share = relative_weight(maps)[0, 0].exp2() / 4
    torch.testing.assert_close(share, torch.tensor([(1 + .25) / 2, .125, .125, .125]))
    titles = [text.get_text() for text in supports_figure(fake_images(1, (8, 32)), {'only': maps}).texts]
    assert 'only: mean σ 16 px (2 groups: 8 to 24)' in titles
    assert any('group 1 of 2, mean σ 24 px' in text.get_text()
               for text in supports_figure(fake_images(1, (8, 32)), {'only': maps}, group=1).texts)


def test_every_group_has_a_tile() -> None:
    sigma = torch.arange(1., 7).view(1, 6, 1, 1).expand(2, 6, 4, 4)
    maps = ContextMaps(torch.randn(2, 6, 4, 4), sigma, (4, 4), 1)
    figure = groups_figure(fake_images(), maps, 'only', ['cat', 'dog'])
    tiles = np.ma.getdata(figure.axes[1].images[0].get_array())
    assert tiles.shape == (4 + 1 + 4, 4 + 1 + 4 + 1 + 4)  # two rows of three
    assert tiles[0, 0] == 8 and tiles[0, 5] == 16 and tiles[5, 10] == 48 and np.isnan(tiles[4, 0])
    weights = np.ma.getdata(figure.axes[5].images[0].get_array())
    assert np.allclose(weights[5:9, :4], relative_weight(maps, group=3)[1])
    assert {'cat', 'dog'} <= {axes.get_ylabel() for axes in figure.axes}
    with pytest.raises(ValueError, match="'only' has maps of 2 images, got 1"):
        groups_figure(fake_images(1), maps, 'only')


def test_constant_maps_can_be_drawn() -> None:
    maps = ContextMaps(torch.zeros(2, 1, 4, 4), torch.ones(2, 1, 4, 4), (4, 4), 1)
    supports_figure(fake_images(), {'only': maps}).canvas.draw()


@pytest.mark.parametrize('images, labels, message', [
    (fake_images(3), None, "layer 'only' has maps of 2 images, got 3 images"),
    (fake_images()[..., :2], None, r'images must be \(B, H, W, 3\) uint8'),
    (fake_images().astype(np.float32), None, 'uint8, got .* float32'),
    (fake_images(), ['one'], 'got 1 row_labels for 2 images'),
])
def test_bad_figure_input(images, labels, message) -> None:
    with pytest.raises(ValueError, match=message):
        supports_figure(images, {'only': fake_maps()}, row_labels=labels)


def test_figure_is_written_whole_or_not_at_all(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = supports_figure(fake_images(), {'only': fake_maps()})
    path = tmp_path / 'new' / 'picture.png'
    save_figure(figure, str(path), dpi=50)
    before = path.read_bytes()
    assert np.asarray(Image.open(io.BytesIO(before))).std() > 10

    def fail(file: io.BufferedWriter, **kwargs) -> None:
        file.write(b'half')
        raise OSError('disk full')

    monkeypatch.setattr(figure, 'savefig', fail)
    with pytest.raises(OSError, match='disk full'):
        save_figure(figure, str(path))
    assert path.read_bytes() == before and [entry.name for entry in path.parent.iterdir()] == ['picture.png']
    with pytest.raises(ValueError, match='suffix must be one of .*png'):
        save_figure(figure, str(tmp_path / 'picture.xyz'))


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    with pytest.raises(PlotDependencyError, match=r"pip install 'cpool_vision\[plot\]'"):
        supports_figure(fake_images(), {'only': fake_maps()})


def test_command_draws_the_built_in_set(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / 'supports.png')
    arguments = ['vit_micro_cpool_patch4_32', '-o', path, '--num-images', '2', '--dpi', '40']
    groups = str(tmp_path / 'groups.png')
    assert cli.main([*arguments, '--layers', 'blocks.1.cpool_attn', '--groups', groups]) == 0
    out, err = capsys.readouterr()
    assert out.split() == [path, groups]
    assert math.prod(Image.open(path).size) > 5000 and math.prod(Image.open(groups).size) > 5000
    assert 'vit_micro_cpool_patch4_32 has random weights' in err


def test_command_draws_files_through_a_map_model(tmp_path: pathlib.Path) -> None:
    photo, path = str(tmp_path / 'photo.jpg'), str(tmp_path / 'supports.png')
    Image.fromarray(fake_images(1, (50, 70))[0]).save(photo)
    assert cli.main(['resnet_micro_cpool_32', photo, '-o', path, '--dpi', '40']) == 0
    assert Image.open(path).size[0] > 100


@pytest.mark.parametrize('arguments, message', [
    (['resnet_micro_cpool_32', 'missing.jpg'], "image 'missing.jpg' cannot be read"),
    (['resnet_micro_cpool_32', '--num-images', '0'], '--num-images must be >= 1, got 0'),
    (['resnet_micro_cpool_32', '--dataset', 'cpool/cats'], "unknown dataset 'cpool/cats'"),
    (['resnet_micro_cpool_32', '--layers', 'nowhere'], "no context pool is named 'nowhere'"),
    (['resnet_micro_cpool_32', '--checkpoint', 'missing.pth'], "'missing.pth' does not exist"),
    (['test_resnet'], 'has no context pool'),
    (['resnet_micro_cpool'], "unknown model 'resnet_micro_cpool'"),
])
def test_command_reports_bad_input_in_one_line(arguments, message, tmp_path, capsys) -> None:
    assert cli.main([*arguments, '-o', str(tmp_path / 'x.png')]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and '\n' not in error
    assert not (tmp_path / 'x.png').exists()
