import pytest
import timm
import torch
from torch import nn

from cpool_vision.inspect import context_maps, support_statistics
from cpool_vision.layers import ContextPool2d, mixers

GRIDS = {
    'convnext_micro_cpool_32': [(32, 48), (16, 24), (8, 12), (4, 6)],
    'resnet_micro_cpool_32': [(32, 48), (16, 24), (8, 12), (4, 6)],
    'vit_micro_cpool_patch4_32': [(8, 12)] * 6,
}


def snapshot(model):
    return [
        (name, m.training, sorted(m.__dict__), len(m._forward_hooks), len(m._forward_pre_hooks), sorted(m._buffers))
        for name, m in model.named_modules()
    ]


def make(name, **kwargs):
    torch.manual_seed(0)
    if name.startswith('vit'):
        kwargs.update(img_size=(32, 48), class_token=True, global_pool='token')
    else:
        kwargs.update(cpool_stages=[0, 1, 2, 3])
    if name.startswith('resnet'):
        kwargs.update(cpool_positions='branch')
    return timm.create_model(name, **kwargs)


@pytest.mark.parametrize('groups', [1, 4])
@pytest.mark.parametrize('name', sorted(GRIDS))
def test_maps_of_every_pool_on_its_grid(name, groups):
    model = make(name, cpool_groups=groups, drop_path_rate=.2, cpool_init='identity').train()
    model.get_submodule(next(iter(model.named_children()))[0]).eval()
    before = snapshot(model)
    maps = context_maps(model, torch.randn(2, 3, 32, 48))
    assert snapshot(model) == before
    assert list(maps) == [n for n, _ in mixers(model)]
    assert [m.grid for m in maps.values()] == GRIDS[name]
    for m in maps.values():
        assert m.weight_logits.shape == m.sigma.shape == (2, groups, *m.grid)
        assert m.stride == 1 and not m.sigma.requires_grad and not m.weight_logits.requires_grad
        ratio = .25 if name.startswith('vit') else .1
        assert 0.1 < m.sigma.min() and m.sigma.max() < 0.1 + ratio * (m.grid[0] * m.grid[1]) ** .5


def test_limits_and_gates():
    images = torch.randn(1, 3, 32, 32)
    maps = context_maps(make('resnet_micro_cpool_32', cpool_ratio=.5, cpool_floor=.2), images)
    assert [m.limits for m in maps.values()] == [(.2, .2 + side / 2) for side in (32, 16, 8, 4)]
    assert all(m.gate is None and m.windows == 1 for m in maps.values())
    model = make('resnet_micro_cpool_32', cpool_init='identity')
    name, pool = next(mixers(model))
    assert [m.gate for m in context_maps(model, images).values()] == [0] * 4
    pool.gamma.data[::2] = -.5
    assert context_maps(model, images)[name].gate == .25


def test_maps_are_those_the_forward_pooled_with():
    model = make('resnet_micro_cpool_32').eval()
    name, pool = next(mixers(model))
    seen = []
    handle = pool.register_forward_hook(lambda m, args, y: seen.append(args[0]))
    maps = context_maps(model, torch.randn(1, 3, 32, 32))
    handle.remove()
    weight_logits, sigma = pool.maps(seen[0])
    assert torch.equal(maps[name].weight_logits, weight_logits) and torch.equal(maps[name].sigma, sigma)


def test_strided_pools_and_named_grids():
    model = timm.create_model('resnet18_cpool', cpool_positions='stem')
    maps = context_maps(model, torch.randn(1, 3, 66, 64))['maxpool.cpool']
    assert maps.grid == (33, 32) and maps.stride == 2 and maps.sigma.shape == (1, 16, 17, 16)
    vit = timm.create_model('vit_micro_cpool_patch4_32', dynamic_img_size=True, cpool_positions=['pre_attn'])
    assert {m.grid for m in context_maps(vit, torch.randn(1, 3, 20, 44)).values()} == {(5, 11)}


def test_a_failing_model_is_restored():
    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.pool = ContextPool2d(16)
            self.drop = nn.Dropout(.5).eval()

        def forward(self, x):
            raise RuntimeError(f'no output for {tuple(self.pool(x).shape)}')

    model = Failing()
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=r'no output for \(1, 16, 3, 3\)'):
        context_maps(model, torch.randn(1, 16, 3, 3))
    assert snapshot(model) == before


def test_a_model_without_pools_is_refused():
    with pytest.raises(ValueError, match='ContextPoolResNet has no context pool: build a cpool variant'):
        context_maps(timm.create_model('resnet_micro_cpool_32', cpool_positions='none'), torch.randn(1, 3, 32, 32))


def test_supports_inside_windows_are_in_pixels_of_the_image():
    model = timm.create_model('swin_micro_cpool_patch2_window4_32', cpool_positions='window', cpool_stages=0)
    images = torch.randn(2, 3, 32, 32)
    maps = context_maps(model, images)
    each = next(iter(maps.values()))
    # sixteen windows of 4 x 4 tokens, each token of 2 x 2 pixels
    assert each.grid == (4, 4) and each.windows == 16
    assert support_statistics(maps, (32, 32))[0].mean == pytest.approx(2 * float(each.sigma.double().mean()))
