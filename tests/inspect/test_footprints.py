import math

import pytest
import timm
import torch
from torch import nn

from cpool_vision.inspect import ContextMaps, Footprints, context_maps, gaussian_footprints, grid_points
from cpool_vision.inspect.footprints import cells_at, footprints_of
from cpool_vision.layers import ContextPool2d


def test_weights_by_hand() -> None:
    # three pixels in a row, the middle one counts double, sigma 1: exp(-1/2) a pixel away
    logits = torch.tensor([0.0, math.log(2), 0.0]).view(1, 1, 1, 3)
    maps = ContextMaps(logits, torch.ones(1, 1, 1, 3), (1, 3), 1)
    found = footprints_of(maps, (10, 30), [(5, 15), (0, 0)])
    assert found.cells == [(0, 1), (0, 0)]
    near = math.exp(-0.5)
    middle = torch.tensor([near, 2, near]) / (2 + 2 * near)
    corner = torch.tensor([1, 2 * near, math.exp(-2)]) / (1 + 2 * near + math.exp(-2))
    torch.testing.assert_close(found.weights[0, 0, :, 0], torch.stack([middle, corner]))
    expected = math.sqrt(2 * near / (2 + 2 * near) / 2)
    assert found.reach()[0, 0, 0].item() == pytest.approx(expected)


def test_reach_of_an_unbounded_gaussian_is_sigma() -> None:
    maps = ContextMaps(torch.zeros(1, 1, 41, 41), torch.full((1, 1, 41, 41), 3.0), (41, 41), 1)
    middle, corner = footprints_of(maps, (41, 41), [(20, 20), (0, 0)]).reach()[0, 0]
    assert middle.item() == pytest.approx(3, rel=1e-4) and corner.item() < 3


@pytest.mark.parametrize('name, kwargs', [
    ('resnet_micro_cpool_32', {'cpool_groups': 2}),
    ('resnet18_cpool', {'cpool_positions': 'stem'}),
    ('vit_micro_cpool_patch4_32', {'class_token': True, 'global_pool': 'token'}),
])
def test_rows_sum_to_one_and_reproduce_the_pool(name, kwargs) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    images = torch.randn(2, 3, 32, 32)
    layer, pool = next((n, m) for n, m in model.named_modules() if isinstance(m, ContextPool2d))
    seen: list = []
    handle = pool.register_forward_hook(lambda module, args, output: seen.extend([args[0].clone(), output.clone()]))
    points = grid_points((32, 32))
    found = gaussian_footprints(model, images, points, [layer])[layer]
    handle.remove()
    torch.testing.assert_close(found.weights.sum((-2, -1)), torch.ones(found.weights.shape[:3]))
    x, y = (t.transpose(1, 2)[..., 1:].unflatten(2, found.grid) if t.ndim == 3 else t for t in seen)
    grouped = x.unflatten(1, (pool.groups, -1))
    expected = torch.einsum('bgphw,bgchw->bgcp', found.weights, grouped).flatten(1, 2)
    at = torch.stack([y[:, :, row, column] for row, column in found.cells], -1)
    torch.testing.assert_close(expected, at, rtol=1e-3, atol=1e-4)
    assert (expected - at.flip(-1)).abs().max() > 1e-2  # of other cells it is another value


def test_points_in_pixels_of_the_image() -> None:
    maps = ContextMaps(torch.zeros(1, 1, 5, 8), torch.ones(1, 1, 3, 4), (5, 8), 2)
    assert cells_at(maps, (40, 64), [(0, 0), (15.9, 15.9), (16, 16), (39.9, 63.9)]) == [(0, 0), (0, 0), (1, 1), (2, 3)]
    centers = footprints_of(maps, (40, 64), [(17, 17)]).centers()
    assert centers.tolist() == [[3, 3]]
    assert grid_points((4, 8), 2) == [(1, 2), (1, 6), (3, 2), (3, 6)]


@pytest.mark.parametrize('points, message', [
    ([], r'points must contain at least one \(y, x\), got none'),
    ([(32, 0)], r'point \(32, 0\) is not inside an image of 32 x 32 pixels'),
    ([(1, 1), (-0.1, 0)], r'point \(-0.1, 0\)'),
    ([(float('nan'), 0)], r'point \(nan, 0\)'),
    ([(1, 2, 3)], r'point \(1, 2, 3\)'),
])
def test_bad_points(points, message) -> None:
    model = timm.create_model('resnet_micro_cpool_32')
    with pytest.raises(ValueError, match=message):
        gaussian_footprints(model, torch.zeros(1, 3, 32, 32), points)


def test_bad_layers() -> None:
    model = timm.create_model('resnet_micro_cpool_32')
    with pytest.raises(ValueError, match="no context pool is named 'stem': choose from layer3"):
        gaussian_footprints(model, torch.zeros(1, 3, 32, 32), [(1, 1)], ['stem'])
    with pytest.raises(ValueError, match='Conv2d has no context pool'):
        gaussian_footprints(nn.Conv2d(3, 3, 1), torch.zeros(1, 3, 8, 8), [(1, 1)])


def test_windows_are_refused_and_measured_in_their_own_cells() -> None:
    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool = ContextPool2d(3)

        def forward(self, x):
            return self.pool(x.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(0, 2))

    model, images = Windows(), torch.randn(2, 3, 8, 12)
    maps = context_maps(model, images)['pool']
    assert maps.windows == 6 and maps.grid == (4, 4) and maps.cell((8, 12)) == 1
    with pytest.raises(ValueError, match="'pool' pools 6 windows of an image"):
        gaussian_footprints(model, images, [(1, 1)])


def test_precision_is_that_of_the_supports_or_better() -> None:
    for dtype, expected in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        maps = ContextMaps(torch.zeros(1, 1, 2, 2, dtype=dtype), torch.ones(1, 1, 2, 2, dtype=dtype), (2, 2), 1)
        found = footprints_of(maps, (2, 2), [(0, 0)])
        assert isinstance(found, Footprints) and found.weights.dtype == expected
