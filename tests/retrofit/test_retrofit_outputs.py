"""Networks with several outputs, and the defaults of `add_context_pool`."""
import pytest
import timm
import torch
from torch import nn

from cpool_vision.retrofit import NoPlaceError, add_context_pool, context_pools


def open_gates(model):
    torch.manual_seed(1)
    for pool in context_pools(model).values():
        nn.init.uniform_(pool.gamma, .3, 1)
        nn.init.normal_(pool.predict.weight, std=.3)


@pytest.mark.parametrize('name, kwargs, places', [
    ('test_resnet', dict(features_only=True), ['layer2.0', 'layer3.0', 'layer4.0']),
    ('test_resnet', dict(features_only=True, feature_cls='getter'), [f'model.layer{i}.0' for i in (2, 3, 4)]),
    ('test_convnext', dict(features_only=True), ['stages_1.blocks.1', 'stages_2.blocks.3', 'stages_3.blocks.1']),
    ('test_vit', dict(features_only=True, out_indices=(1, 3, 5)), [f'model.blocks.{i}.attn' for i in range(6)]),
])
def test_every_map_of_a_net_with_several_outputs_counts(name, kwargs, places):
    model, x = timm.create_model(name, **kwargs).eval(), torch.randn(1, 3, 160, 160)
    before = model(x)
    add_context_pool(model, img_size=160)
    assert [key.removesuffix('.cpool') for key in context_pools(model)] == places
    assert all(map(torch.equal, model(x), before))
    open_gates(model)
    assert sum(not torch.equal(*pair) for pair in zip(model(x), before, strict=True)) == 3


def test_outputs_in_a_mapping_are_looked_at():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = timm.create_model('test_resnet')
            self.noise = 0.

        def forward(self, x):
            maps = self.model.forward_intermediates(x, intermediates_only=True)
            return {'fine': maps[1], 'coarse': [maps[4] + self.noise * torch.rand(1)]}

    model, x = Named().eval(), torch.randn(1, 3, 64, 64)
    before = model(x)
    add_context_pool(model, img_size=64, places=['model.layer2.0', 'model.layer4.0'])
    assert torch.equal(model(x)['coarse'][0], before['coarse'][0])
    noisy = Named().eval()
    noisy.noise = 1.
    with pytest.raises(NoPlaceError, match='does not give the same output'):
        add_context_pool(noisy, img_size=64, places='model.layer2.0')


def test_defaults_are_those_that_were_measured():
    vit = timm.create_model('test_vit', img_size=64)
    add_context_pool(vit)
    assert {(pool.groups, pool.ratio) for pool in context_pools(vit).values()} == {(16, .25)}
    assert vit._model_args['cpool_groups'] == 16 and vit._model_args['cpool_ratio'] == .25
    narrow = timm.create_model('test_vit', embed_dim=36, num_heads=2)
    add_context_pool(narrow)
    assert {pool.groups for pool in context_pools(narrow).values()} == {12}  # 16 does not divide the channels
    mixer = timm.create_model('test_vit', img_size=64, block_fn=PlainBlock)
    add_context_pool(mixer)
    assert list(context_pools(mixer))[0] == 'blocks.0.cpool'  # there is no attention to pool in front of
    resnet = timm.create_model('test_resnet')
    add_context_pool(resnet)
    assert {(pool.groups, pool.ratio) for pool in context_pools(resnet).values()} == {(1, .1)}


class PlainBlock(nn.Module):
    def __init__(self, dim, **kwargs):
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(dim), nn.Linear(dim, dim)

    def forward(self, x):
        return x + self.fc(self.norm(x))
