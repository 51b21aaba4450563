import math

import pytest
import timm
import torch
from torch import nn

from cpool_vision.inspect import ReceptiveField, effective_receptive_field, without_pools
from cpool_vision.layers import ContextPool2d


def box_stack(depth: int) -> nn.Sequential:
    """3x3 convolutions of ones, one channel."""
    model = nn.Sequential(*[nn.Conv2d(1, 1, 3, padding=1, bias=False) for _ in range(depth)])
    for conv in model:
        nn.init.ones_(conv.weight)
    return model


def test_two_box_filters_by_hand() -> None:
    # (1, 2, 3, 2, 1) along each axis: 9 of 81 in the middle, then 24 at 1, 16 at sqrt 2, 12 at 2, 16 at sqrt 5, 4
    field = effective_receptive_field(box_stack(2), torch.randn(3, 1, 11, 11))
    axis = torch.tensor([1, 2, 3, 2, 1], dtype=torch.float64) / 9
    expected = torch.zeros(11, 11, dtype=torch.float64)
    expected[3:8, 3:8] = axis[:, None] * axis
    torch.testing.assert_close(field.map, expected)
    assert field.unit == (5, 5) and field.grid == (11, 11) and field.center == pytest.approx((5.5, 5.5))
    radii, mass = field.mass_within()
    assert [round(value * 81) for value in mass[:6].tolist()] == [9, 33, 49, 61, 77, 81]
    assert radii[:3].tolist() == pytest.approx([0, 1, math.sqrt(2)])
    assert field.radius(0.5) == pytest.approx(math.sqrt(2)) and field.radius(0.9) == pytest.approx(math.sqrt(5))
    assert field.radius(1) == pytest.approx(math.sqrt(8))
    assert effective_receptive_field(box_stack(4), torch.randn(1, 1, 11, 11)).radius(0.9) > field.radius(0.9)


def test_layer_and_point() -> None:
    model = box_stack(2)
    first = effective_receptive_field(model, torch.randn(1, 1, 11, 11), layer='0', point=(1.5, 9.9))
    assert first.unit == (1, 9) and (first.map > 0).sum() == 9 and first.map[0, 8] == pytest.approx(1 / 9)
    coarse = nn.Conv2d(1, 1, 2, stride=2, bias=False)
    nn.init.ones_(coarse.weight)
    field = effective_receptive_field(coarse, torch.randn(1, 1, 8, 8), point=(4, 4))
    assert field.unit == (2, 2) and field.center == pytest.approx((5, 5))
    assert field.radius(1) == pytest.approx(math.sqrt(0.5))


def test_center_is_that_of_the_mean_square_gradient() -> None:
    # the kernel of unit (2, 2) begins at pixel 3: 1, 2, 0 along x, whose squares 1 and 4 lie at 3.5 and 4.5
    conv = nn.Conv2d(1, 1, 3, stride=2, padding=1, bias=False)
    conv.weight.data = torch.tensor([1.0, 2.0, 0.0]).expand(1, 1, 3, 3)
    field = effective_receptive_field(conv, torch.randn(1, 1, 8, 8))
    assert field.unit == (2, 2) and field.center == pytest.approx((4.5, (3.5 + 4 * 4.5) / 5))


def test_signs_keep_channels_from_cancelling() -> None:
    conv = nn.Conv2d(1, 2, 1, bias=False)
    conv.weight.data = torch.tensor([1.0, -1.0]).view(2, 1, 1, 1)
    field = effective_receptive_field(conv, torch.randn(1, 1, 4, 4), probes=8)
    assert field.map[2, 2] == 1 and field.map.sum() == 1


def test_mean_over_images_is_of_squares() -> None:
    class Square(nn.Module):
        def forward(self, x):
            return x.square() + x.roll(1, -1)  # gradients 2 x and 1

    images = torch.tensor([1.0, 2.0]).view(2, 1, 1, 1).expand(2, 1, 1, 4)
    field = effective_receptive_field(Square(), images)
    own = math.sqrt((4 + 16) / 2)
    assert field.map[0].tolist() == pytest.approx([0, 1 / (own + 1), own / (own + 1), 0])


def wide_pool(**kwargs) -> ContextPool2d:
    pool = ContextPool2d(4, ratio=1.0, **kwargs)
    nn.init.constant_(pool.predict.bias, 1.0)
    return pool


@pytest.mark.parametrize('stride', [1, 2])
def test_pools_widen_the_field_and_can_be_switched_off(stride: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), wide_pool(stride=stride))
    images = torch.randn(2, 3, 12, 12)
    after = effective_receptive_field(model, images)
    before = effective_receptive_field(model, images, pools=False)
    assert before.grid == after.grid == (12 // stride, 12 // stride)
    assert (before.map > 0).sum() == 9 and (after.map > 0).all()
    assert after.radius(0.5) > before.radius(0.5)


def test_a_pool_that_is_off_is_its_base() -> None:
    model = nn.Sequential(wide_pool(stride=2, init='identity', base=nn.MaxPool2d(2)))
    nn.init.ones_(model[0].gamma)
    x = torch.randn(1, 4, 6, 6)
    with without_pools(model):
        assert torch.equal(model(x), nn.MaxPool2d(2)(x))
    assert not torch.equal(model(x), nn.MaxPool2d(2)(x)) and 'mix_gated' not in model[0].__dict__
    with pytest.raises(RuntimeError, match='stop'), without_pools(model):
        raise RuntimeError('stop')
    assert 'mix_gated' not in model[0].__dict__


@pytest.mark.parametrize('name', [
    'vit_micro_cpool_patch4_32', 'resnet_micro_cpool_32', 'convnext_micro_cpool_32', 'poolformer_micro_cpool_32'])
def test_families(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, **({'zero_init_last': False} if name.startswith('resnet') else {})).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        fields = [effective_receptive_field(model, images, layer, probes=2, pools=pools)
                  for layer, pools in ((None, True), (None, False), (0, True))]
    assert all(field.map.shape == (32, 32) and field.map.sum() == pytest.approx(1) for field in fields)
    assert not torch.equal(fields[0].map, fields[1].map)
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    again = effective_receptive_field(model, images, probes=2)
    torch.testing.assert_close(again.map, fields[0].map)


class Flat(nn.Module):
    def forward(self, x):
        return x.flatten(1)


@pytest.mark.parametrize('model, kwargs, message', [
    (box_stack(1), {'probes': 0}, 'probes must be >= 1, got 0'),
    (box_stack(1), {'pools': False}, 'Sequential has no context pool'),
    (box_stack(1), {'layer': '7'}, "no layer '7': name a module"),
    (box_stack(1), {'layer': 0}, 'Sequential has no forward_intermediates, so layer 0 is unknown'),
    (box_stack(1), {'point': (0, 8)}, r'point \(0, 8\) is not inside an image of 8 x 8'),
    (Flat(), {}, r'layer None returns \(1, 64\), not a map'),
    (timm.create_model('resnet_micro_cpool_32', in_chans=1), {'layer': 99}, 'the model has no layer number 99'),
])
def test_bad_requests(model, kwargs, message) -> None:
    with pytest.raises(ValueError, match=message):
        effective_receptive_field(model, torch.randn(1, 1, 8, 8), **kwargs)


def test_bad_images_gradients_and_shares() -> None:
    with pytest.raises(ValueError, match=r'images must be \(B, C, H, W\) with B >= 1, got \(0, 1, 8, 8\)'):
        effective_receptive_field(box_stack(1), torch.zeros(0, 1, 8, 8))
    zero = nn.Conv2d(1, 1, 1)
    nn.init.zeros_(zero.weight)
    with pytest.raises(ValueError, match='sums to 0.0: unit'):
        effective_receptive_field(zero, torch.ones(1, 1, 4, 4))
    field = ReceptiveField(torch.ones(1, 1, dtype=torch.float64), (0, 0), (1, 1), (0.5, 0.5))
    assert field.radius(1) == 0
    for share in (0, 1.1):
        with pytest.raises(ValueError, match=rf'share must be in \(0, 1\], got {share}'):
            field.radius(share)
