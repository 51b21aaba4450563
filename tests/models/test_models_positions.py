import itertools

import pytest
import timm
import torch
from models_testing import POSITIONS
from torch import nn

from cpool_vision.layers import ContextPool2d, mixers

MODELS = [
    ('convnext_micro_cpool_32', 'convnext', 16),
    ('tf_efficientnet_lite0_cpool', 'efficientnet', 65),
    ('resnet_micro_cpool_32', 'resnet', 16),
    ('resnet18_cpool', 'resnet', 64),
    ('resnet50_cpool', 'resnet', 32),
    ('naflexvit_micro_cpool_patch4_gap', 'naflexvit', 32),
    ('poolformer_micro_cpool_32', 'metaformer', 16),
    ('swin_micro_cpool_patch2_window4_32', 'swin_transformer', 32),
    ('vit_micro_cpool_patch4_32', 'vision_transformer', 32),
]
NARROW = dict.fromkeys(('resnet18_cpool', 'resnet50_cpool'), dict(channels=(16, 16, 32, 32)))
CASES = [
    (name, positions, size)
    for name, family, size in MODELS
    for positions in [*((p,) for p in POSITIONS[family]), POSITIONS[family]]
    if not (name == 'resnet_micro_cpool_32' and 'stem' in positions)
]
PLACES = {
    ('convnext_micro_cpool_32', 'pre_block'): [f'stages.{i}.blocks.cpool' for i in (1, 2, 3)],
    ('convnext_micro_cpool_32', 'downsample'): [f'stages.{i}.downsample.cpool' for i in (1, 2, 3)],
    ('resnet18_cpool', 'branch'): ['layer3.1.cpool', 'layer4.1.cpool'],
    ('resnet18_cpool', 'stem'): ['maxpool.cpool'],
    ('resnet18_cpool', 'stride'): ['layer3.0.aa.cpool', 'layer4.0.aa.cpool'],
    ('tf_efficientnet_lite0_cpool', 'pre_block'): [f'blocks.{i}.cpool' for i in (2, 4, 6)],
    ('tf_efficientnet_lite0_cpool', 'stride'): [f'blocks.{i}.0.aa.cpool' for i in (2, 3, 5)],
    ('resnet18_cpool', 'shortcut'): [f'layer{i}.0.downsample.cpool' for i in (3, 4)],
    ('poolformer_micro_cpool_32', 'token_mixer'): [
        f'stages.{i}.blocks.{j}.token_mixer.cpool' for i, n in enumerate((2, 2, 4, 2)) for j in range(n)],
    ('swin_micro_cpool_patch2_window4_32', 'pre_attn'): [
        f'layers.{i}.blocks.{j}.cpool_attn' for i, n in ((2, 4), (3, 1)) for j in range(n)],
    ('swin_micro_cpool_patch2_window4_32', 'window'): [
        f'layers.{i}.blocks.{j}.attn.qkv.cpool' for i, n in ((2, 4), (3, 1)) for j in range(n)],
    ('swin_micro_cpool_patch2_window4_32', 'post_block'): [f'layers.2.blocks.{j}.cpool' for j in range(3)],
    ('naflexvit_micro_cpool_patch4_gap', 'post_block'): [f'blocks.{i}.cpool' for i in range(5)],
    ('naflexvit_micro_cpool_patch4_gap', 'pre_attn'): [f'blocks.{i}.cpool_attn' for i in range(6)],
    ('vit_micro_cpool_patch4_32', 'post_block'): [f'blocks.{i}.cpool' for i in range(5)],
    ('vit_micro_cpool_patch4_32', 'pre_kv'): [f'blocks.{i}.attn.qkv.cpool' for i in range(6)],
    ('vit_micro_cpool_patch4_32', 'pre_attn'): [f'blocks.{i}.cpool_attn' for i in range(6)],
}


def randomise(model):
    """Moves every parameter and statistic off its initial value, so that a missing branch shows."""
    for p in model.parameters():
        nn.init.normal_(p, 1. if p.ndim == 1 else 0., .2 if p.ndim == 1 else 1.5 / p[0].numel() ** .5)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.running_mean, std=.2)
    return model


@pytest.mark.parametrize('name,positions,size', CASES)
def test_identity_starts_as_the_base_and_paper_does_not(name, positions, size):
    torch.manual_seed(0)
    # on maps of 4 x 4 tokens the supports are too small to show otherwise
    wide = dict(cpool_stages=[0, 1, 2, 3], cpool_ratio=.5) if name.startswith('swin') else {}
    common = dict(num_classes=7, **NARROW.get(name, {}))
    plain = randomise(timm.create_model(name, cpool_positions='none', **common)).double().eval()
    common.update(cpool_positions=positions, **wide)
    model = timm.create_model(name, cpool_init='identity', **common).double().eval()
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert missing and not unexpected
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    with torch.no_grad():
        expected = plain(x)
        torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
        for _, pool in mixers(model):
            nn.init.ones_(pool.gamma)
        paper = timm.create_model(name, cpool_init='paper', **common).double().eval()
        paper.load_state_dict({k: v for k, v in model.state_dict().items() if k in paper.state_dict()})
        pooled = paper(x)
        assert (pooled - expected).abs().max() > 1e-2
        torch.testing.assert_close(model(x), pooled, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('name,position', sorted(PLACES))
def test_pools_stand_where_they_should(name, position):
    model = timm.create_model(name, cpool_positions=position, device='meta')
    assert [n for n, _ in mixers(model)] == PLACES[name, position]
    listed = timm.create_model(name, cpool_positions=[position], device='meta')
    assert str(listed) == str(model)


@pytest.mark.parametrize('name,prefixes', [
    ('convnext_micro_cpool_32', ['stages.1', 'stages.3']), ('resnet18_cpool', ['layer2', 'layer4'])])
def test_stages_are_selectable(name, prefixes):
    model = timm.create_model(name, cpool_stages=[1, 3], device='meta')
    assert all(n.startswith(f'{prefix}.') for (n, _), prefix in zip(mixers(model), prefixes, strict=True))
    one = timm.create_model(name, cpool_stages=3, device='meta')
    assert [n.split('.')[0] for n, _ in mixers(one)] == [prefixes[1].split('.')[0]]


def test_settings_reach_every_pool():
    for name, _, _ in MODELS:
        model = timm.create_model(
            name, cpool_ratio=.3, cpool_floor=.2, cpool_groups=4, cpool_init='identity', cpool_support_init=.2,
            device='meta')
        pools = [pool for _, pool in mixers(model)]
        assert pools and {(p.ratio, p.floor, p.groups, p.gamma is None, p.support_init) for p in pools} == {
            (.3, .2, 4, False, .2)}


def test_keys_and_values_of_pooled_tokens_leave_the_queries_sharp():
    torch.manual_seed(0)
    model = timm.create_model('vit_micro_cpool_patch4_32', cpool_positions='pre_kv', class_token=True).eval()
    qkv = model.blocks[0].attn.qkv
    nn.init.normal_(qkv.cpool.predict.weight)
    x = torch.randn(2, 65, 128)
    pooled = qkv.cpool(x)
    assert not torch.allclose(pooled, x)
    expected = nn.Linear(128, 384)
    expected.load_state_dict(qkv.state_dict(), strict=False)
    torch.testing.assert_close(qkv(x)[..., :128], expected(x)[..., :128])
    torch.testing.assert_close(qkv(x)[..., 128:], expected(pooled)[..., 128:])
    model.set_input_size(img_size=(24, 40))
    assert torch.isfinite(torch.jit.script(model)(torch.randn(1, 3, 24, 40))).all()


def test_options_of_the_pools_reach_them_and_start_as_the_base():
    options = dict(
        cpool_gate=True, cpool_support_init=[.06, .6], cpool_depthwise=3, cpool_init='identity', cpool_groups=8,
        cpool_support_groups=4, cpool_offset='group', cpool_logit_bound=6.)
    for name, _, size in MODELS:
        model, plain = (timm.create_model(name, **kwargs, **NARROW.get(name, {})).eval()
                        for kwargs in (options, dict(cpool_positions='none')))
        plain.load_state_dict({k: v for k, v in model.state_dict().items() if k in plain.state_dict()})
        x = torch.randn(1, 3, size, size)
        assert torch.equal(model(x), plain(x))
        pools = [pool for _, pool in mixers(model)]
        assert all(pool.depthwise.kernel_size == (3, 3) and pool.support_init == (.06, .6) for pool in pools)
        assert {(pool.support_groups, pool.bound, pool.offset.shape) for pool in pools} == {(4, 6., (8, 2))}
        assert {k: model._model_args[k] for k in options} == options


def test_strided_positions_halve_the_map():
    model = timm.create_model('resnet50_cpool', cpool_positions=['stem', 'stride', 'shortcut'])
    assert {p.stride for _, p in mixers(model)} == {2}
    features = model.eval().forward_intermediates(torch.randn(1, 3, 70, 70), intermediates_only=True)
    assert [f.shape[-1] for f in features] == [35, 18, 9, 5, 3]


def test_positions_without_a_slot_are_refused():
    with pytest.raises(ValueError, match=r"position 'stem' replaces the stem's max-pool, but this model has Identity"):
        timm.create_model('resnet_micro_cpool_32', cpool_positions='stem', device='meta')
    with pytest.raises(ValueError, match=r"position 'stride' needs the anti-aliasing slot .* holds AvgPool2d"):
        timm.create_model('resnet18_cpool', aa_layer=nn.AvgPool2d, cpool_positions='stride', device='meta')
    with pytest.raises(ValueError, match=r"position 'shortcut' needs a strided 1x1 convolution"):
        timm.create_model('resnet18_cpool', avg_down=True, cpool_positions='shortcut', device='meta')
    for name, position in itertools.product(['resnet18_cpool'], ['stride', 'shortcut']):
        with pytest.raises(ValueError, match=r"stages \(0,\) place no context pool"):
            timm.create_model(name, cpool_positions=position, cpool_stages=0, device='meta')
    with pytest.raises(ValueError, match='patch_drop_rate must be 0 with context pooling, got 0.5'):
        timm.create_model('vit_micro_cpool_patch4_32', patch_drop_rate=.5, device='meta')
    with pytest.raises(ValueError, match="position 'pre_kv' needs images of one size"):
        timm.create_model('vit_micro_cpool_patch4_32', cpool_positions='pre_kv', dynamic_img_size=True, device='meta')
    with pytest.raises(ValueError, match='block_fn must be left out'):
        timm.create_model('vit_micro_cpool_patch4_32', block_fn=nn.Identity, device='meta')


def test_prefix_tokens_pass_every_pool_untouched():
    model = timm.create_model(
        'vit_micro_cpool_patch4_32', class_token=True, reg_tokens=3, global_pool='token',
        cpool_positions=['post_block', 'pre_attn']).eval()
    seen = []
    for _, pool in mixers(model):
        assert isinstance(pool, ContextPool2d) and pool.num_prefix_tokens == 4
        pool.register_forward_hook(lambda m, args, y: seen.append(torch.equal(args[0][:, :4], y[:, :4])
                                                                  and not torch.equal(args[0], y)))
    model(torch.randn(1, 3, 32, 32))
    assert seen == [True] * 11


def test_pools_inside_windows_follow_their_size():
    model = timm.create_model(
        'swin_micro_cpool_patch2_window4_32', cpool_positions='window', cpool_stages=[0, 1]).eval()
    assert {pool.grid_size for _, pool in mixers(model)} == {(4, 4)}
    assert torch.isfinite(torch.jit.script(model)(torch.randn(1, 3, 32, 32))).all()
    model.set_input_size((48, 48), window_size=(6, 3))
    assert {pool.grid_size for _, pool in mixers(model)} == {(6, 3)}
    assert model(torch.randn(1, 3, 48, 48)).shape == (1, 10)
