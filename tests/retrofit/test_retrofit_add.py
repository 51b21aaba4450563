import copy
import functools
import io
import pickle

import pytest
import timm
import torch
from timm.models.metaformer import Attention, LayerNorm2dNoBias, LayerNormNoBias, MetaFormer, SepConv
from torch import nn

import cpool_vision
import cpool_vision.retrofit.add as add_module
from cpool_vision.layers import ContextPool2d
from cpool_vision.retrofit import (
    NoPlaceError,
    add_context_pool,
    context_pools,
    remove_context_pool,
)
from cpool_vision.retrofit.pools import ChannelsLastContextPool, GridContextPool, solve_grid


def caformer(num_classes, **kwargs):
    return MetaFormer(
        depths=(1, 1, 2, 1), dims=(16, 24, 32, 64), token_mixers=(SepConv, SepConv, Attention, Attention),
        norm_layers=(LayerNorm2dNoBias, LayerNorm2dNoBias, LayerNormNoBias, LayerNormNoBias), num_classes=num_classes)


# name, arguments, image size, layout, modules that pool by default
MODELS = {
    'vit': ('test_vit', dict(img_size=64), 64, GridContextPool, [f'blocks.{i}.attn' for i in range(6)]),
    'deit': ('deit_tiny_distilled_patch16_224', dict(depth=3, embed_dim=48, img_size=64), 64,
             GridContextPool, [f'blocks.{i}.attn' for i in range(3)]),
    'eva': ('eva02_tiny_patch14_224', dict(depth=3, embed_dim=48, img_size=56), 56, GridContextPool,
            [f'blocks.{i}.attn' for i in range(3)]),
    'resnet': ('test_resnet', {}, 64, ContextPool2d, ['layer2.0', 'layer3.0', 'layer4.0']),
    'regnet': ('regnetx_002', {}, 64, ContextPool2d, ['s2.b1', 's3.b4', 's4.b7']),
    'convnext': ('test_convnext', {}, 64, ContextPool2d, ['stages.1.blocks.1', 'stages.2.blocks.3',
                                                          'stages.3.blocks.1']),
    'efficientnet': ('test_efficientnet', {}, 64, ContextPool2d, ['blocks.2.0', 'blocks.3.0', 'blocks.4.0']),
    'mobilenet': ('mobilenetv3_small_050', {}, 64, ContextPool2d, ['blocks.1.1', 'blocks.3.1', 'blocks.5.0']),
    'poolformer': ('poolformerv2_s12', {}, 64, ContextPool2d, ['stages.1.blocks.1', 'stages.2.blocks.5',
                                                               'stages.3.blocks.1']),
    'caformer': (caformer, {}, 64, ContextPool2d, ['stages.1.blocks.0', 'stages.2', 'stages.3']),
    'swin': ('swin_tiny_patch4_window7_224', dict(img_size=64, window_size=4, embed_dim=24, depths=(1, 2, 2, 1),
                                                  num_heads=(1, 2, 4, 8)), 64, ChannelsLastContextPool,
             ['layers.1.blocks.1', 'layers.2.blocks.1', 'layers.3.blocks.0']),
}


def build(family, **kwargs):
    name, args, size, *_ = MODELS[family]
    torch.manual_seed(0)
    create = name if callable(name) else functools.partial(timm.create_model, name)
    model = create(num_classes=7, **{**args, **kwargs}).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=.1)
    return model, torch.randn(2, 3, size, size)


def add(model, family, **kwargs):
    return add_context_pool(model, img_size=MODELS[family][2], **kwargs)


def open_gates(model):
    torch.manual_seed(1)
    for pool in context_pools(model).values():
        nn.init.uniform_(pool.gamma, .3, 1)
        nn.init.normal_(pool.predict.weight, std=.3)


@pytest.mark.parametrize('family', MODELS)
def test_the_base_is_kept_to_the_bit_and_the_pools_learn(family):
    model, x = build(family)
    weights = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        before, features = model(x), model.forward_features(x)
    state = torch.get_rng_state()
    assert add(model, family) is model
    assert not torch.equal(state, torch.get_rng_state())  # only the pools' own initialization draws
    pools = context_pools(model)
    _, _, _, layout, places = MODELS[family]
    assert [name.removesuffix('.cpool') for name in pools] == places
    assert {type(pool) for pool in pools.values()} == {layout}
    assert not any(module.training for module in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    with torch.no_grad():
        assert torch.equal(model(x), before)
        assert torch.equal(model.forward_features(x), features)
        if hasattr(model, 'forward_intermediates'):
            final, maps = model.forward_intermediates(x)
            assert torch.equal(final, features) and len(maps) == len(model.feature_info)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) == {f'{name}.{key}' for name, pool in pools.items()
                                               for key in pool.state_dict()}

    open_gates(model)
    with torch.no_grad():
        after = model(x)
        assert not torch.equal(after, before)
        copied = copy.deepcopy(model)
        assert torch.equal(copied(x), after) and not set(copied.parameters()) & set(model.parameters())
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), after)  # noqa: S301
    model.train()
    model.set_grad_checkpointing(True)
    model(x).square().sum().backward()
    for name, pool in pools.items():
        for key, p in pool.named_parameters():
            assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), f'{name}.{key}'
    remove_context_pool(model)
    assert set(model.state_dict()) == set(weights)
    model.load_state_dict(weights)
    assert torch.equal(model.eval()(x), before)
    assert type(model.get_submodule(places[0])).__name__[:11] != 'ContextPool'


@pytest.mark.parametrize('family', [
    'vit', pytest.param('resnet', marks=pytest.mark.slow), pytest.param('swin', marks=pytest.mark.slow)])
def test_compile_export_and_trace(family):
    model, x = build(family)
    add(model, family)
    open_gates(model)
    with torch.no_grad():
        expected = model(x)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend='eager')
        torch.testing.assert_close(compiled(x), expected)
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim('batch', min=1, max=8)},))
        torch.testing.assert_close(program.module()(x[:1]), expected[:1], rtol=1e-4, atol=1e-5)
        traced = torch.jit.trace(model, x)
        torch.testing.assert_close(traced(x), expected)


def test_weights_survive_a_file_with_the_old_names():
    model, x = build('vit')
    add_context_pool(model)
    open_gates(model)
    other, _ = build('vit')
    add_context_pool(other)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other(x), model(x))
    assert 'blocks.0.attn.qkv.weight' in model.state_dict() and 'blocks.0.attn.cpool.gamma' in model.state_dict()
    assert isinstance(model.blocks[0], type(build('vit')[0].blocks[0]))


def test_positions_stages_and_places():
    model, x = build('vit')
    expected = model(x)
    cpool_vision.add_context_pool(model, positions='pre_attn', stages=(1, 2), groups=2, ratio=.3)
    assert list(context_pools(model)) == ['blocks.1.attn.cpool', 'blocks.2.attn.cpool']
    assert all(pool.groups == 2 and pool.ratio == .3 for pool in context_pools(model).values())
    assert torch.equal(model(x), expected)
    open_gates(model)
    assert not torch.equal(model(x), expected)

    model, x = build('resnet')
    add(model, 'resnet', positions=['post_stage', 'post_block'], stages=[0, 1])
    assert list(context_pools(model)) == ['act1.cpool', 'layer1.0.cpool']  # each place once

    model, x = build('regnet')
    expected = model(x)
    add(model, 'regnet', places=['s3.b1', 's4.b7:input'])
    assert list(context_pools(model)) == ['s3.b1.cpool', 's4.b7.cpool']
    assert context_pools(model)['s4.b7.cpool'].dim == 368
    assert torch.equal(model(x), expected)

    model, x = build('regnet')
    add(model, 'regnet', positions='post_block')
    assert 's3.b2.cpool' in context_pools(model) and 's1.b1.cpool' not in context_pools(model)


@pytest.mark.parametrize('family', ['vit', 'resnet', 'swin'])
@pytest.mark.parametrize('support_init', [.1, .8])
def test_fresh_pools_reach_as_far_as_asked(family, support_init):
    model, x = build(family)
    expected = model(x)
    add(model, family, ratio=.4, support_init=support_init)
    assert torch.equal(model(x), expected)
    supports = {}

    def hook_of(name):
        def hook(pool, args, y):
            logits, sigma = pool.maps(*args)
            supports[name] = (sigma - pool.floor) / (pool.ratio * logits[0, 0].numel() ** .5)
        return hook

    handles = [pool.register_forward_hook(hook_of(name)) for name, pool in context_pools(model).items()]
    model(x)
    for handle in handles:
        handle.remove()
    assert supports.keys() == context_pools(model).keys()
    for part in supports.values():
        torch.testing.assert_close(part, torch.full_like(part, support_init), atol=.02, rtol=0)


def test_paper_pools_change_the_output_at_once():
    model, x = build('resnet')
    expected = model(x)
    add(model, 'resnet', init='paper')
    assert not torch.allclose(model(x), expected)


def test_tokens_follow_the_size_of_the_images():
    model, _ = build('vit', dynamic_img_size=True)
    add_context_pool(model)
    open_gates(model)
    pools = context_pools(model).values()
    copied = copy.deepcopy(model)
    for size, grid in [((96, 96), (6, 6)), ((64, 256), (4, 16)), ((160, 64), (10, 4)), ((160, 160), (10, 10))]:
        images = torch.randn(1, 3, *size)
        expected = model(images)
        assert {pool.grid_of(grid[0] * grid[1] + 1) for pool in pools} == {grid}
        assert torch.equal(model.forward_head(model.forward_features(images)), expected)
    assert all(pool.image_size == (64, 64) for pool in context_pools(copied).values())
    # a row of 16 tokens above and below each other is not the square that has as many
    images = torch.randn(1, 3, 64, 256)
    expected = model(images)
    for pool in pools:
        pool.image_size, pool.grid_size = None, (8, 8)
    model.patch_embed._forward_pre_hooks.clear()
    assert not torch.allclose(model(images), expected, atol=1e-5)
    for pool in pools:
        pool.grid_size = 4, 16
    assert torch.equal(model(images), expected)
    with pytest.raises(ValueError, match='36 tokens .and 1 prefix tokens. do not form the 4 x 16 grid'):
        model(torch.randn(1, 3, 96, 96))


def test_patches_without_a_grid_are_refused():
    model, _ = build('vit')
    add_context_pool(model)
    with pytest.raises(ValueError, match=r'reads images .B, C, H, W., got shape .1, 16, 768.'):
        model.patch_embed(torch.randn(1, 16, 768))


def test_set_input_size():
    model, _ = build('vit')
    add_context_pool(model)
    model.set_input_size((64, 256))
    assert model(torch.randn(1, 3, 64, 256)).shape == (1, 7)
    assert context_pools(model)['blocks.0.attn.cpool'].grid_of(65) == (4, 16)


@pytest.mark.parametrize('num, size, grid', [
    (196, (224, 224), (14, 14)), (64, (64, 256), (4, 16)), (64, (128, 128), (8, 8)), (70, (99, 141), (7, 10)),
    (197, (224, 224), None), (1, (32, 32), (1, 1)), (50, (224, 224), None), (0, (32, 32), None),
])
def test_solve_grid(num, size, grid):
    assert solve_grid(num, *size) == grid


@pytest.mark.parametrize('strides', ['nhwc', 'nchw'])
def test_maps_keep_their_strides(strides):
    # other strides would let the next layer choose another kernel, with other rounding
    x = torch.randn(2, 5, 6, 8) if strides == 'nhwc' else torch.randn(2, 8, 5, 6).permute(0, 2, 3, 1)
    y = ChannelsLastContextPool(8, init='identity')(x)
    assert torch.equal(y, x) and y.stride() == x.stride()


class Shuffled(nn.Module):
    """A vision transformer whose tokens are out of order behind the embedding."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.order = torch.randperm(100, generator=torch.Generator().manual_seed(3))
        self.num_prefix_tokens = 0

    def forward(self, x):
        x = self.model.patch_embed(x).flatten(1, 2)[:, self.order]
        return self.model.head(self.model.blocks(x).mean(1))


def test_tokens_out_of_order_are_refused():
    model, x = build('vit', img_size=160)
    with pytest.raises(NoPlaceError, match='not in raster order'):
        add_context_pool(Shuffled(model), img_size=160)
    shuffled = Shuffled(model)
    shuffled.order = torch.arange(100)
    add_context_pool(shuffled, img_size=160)
    assert len(context_pools(shuffled)) == 6


def test_without_an_order_in_front_of_attention_blocks_are_pooled(monkeypatch, caplog):
    # as in xcit_nano_12_p8_224
    monkeypatch.setattr(add_module, 'in_raster_order', lambda model, x, places: [p.side == 'output' for p in places])
    model, _ = build('vit')
    with pytest.raises(NoPlaceError, match='not in raster order'):  # asked for, it stays an error
        add_context_pool(model, positions='pre_attn')
    add_context_pool(model)
    assert context_pools(model) and not any('attn' in name for name in context_pools(model))
    assert "Using position 'post_block' because 'pre_attn' does not work" in caplog.text


def test_dead_places_are_left_out():
    # tokens behind the last block do not reach a head that reads the class token
    model, _ = build('vit')
    add_context_pool(model, positions='post_block', stages=range(6))
    assert len(context_pools(model)) == 5
    model, _ = build('vit')
    with pytest.raises(NoPlaceError, match='affects the output'):
        add_context_pool(model, positions='post_block', stages=5)
    nn.init.zeros_(model.head.weight)  # nothing reaches this head, so nothing can be told
    add_context_pool(model, positions='post_block', stages=5)
    model, _ = build('vit', global_pool='avg', class_token=False)
    add_context_pool(model, positions='post_block', stages=5)
    assert len(context_pools(model)) == 1


class Plain(nn.Module):
    def __init__(self, *, flat=False):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.body = nn.Sequential(*(nn.Sequential(nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8),
                                                  nn.ReLU(inplace=True)) for _ in range(3)))
        self.flat = flat
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.body(self.stem(x)).mean((2, 3)))


def test_a_network_that_is_not_of_timm():
    torch.manual_seed(0)
    model, x = Plain().eval(), torch.randn(2, 3, 64, 64)
    expected = model(x)
    with pytest.raises(NoPlaceError, match='by hand|has no place'):
        add_context_pool(model, img_size=64)  # its blocks are containers: nothing tells a block from a stem
    add_context_pool(model, places=['body.1', 'body.2'], img_size=64)
    assert torch.equal(model(x), expected)
    assert list(model.state_dict())[-1].startswith('head')
    assert type(model.body[1]) is nn.Sequential  # runs the pool by itself


class PairBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, pair):
        size, x = pair
        return size + 1, x + self.norm(self.conv(x))


class Pairs(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 8, stride=8)
        self.blocks = nn.Sequential(PairBlock(), PairBlock(), PairBlock())

    def forward(self, x):
        return self.blocks((torch.zeros(len(x), 1), self.stem(x)))[1].mean((2, 3))


def test_blocks_that_return_the_map_second():
    torch.manual_seed(0)
    model, x = Pairs().eval(), torch.randn(2, 3, 64, 64)
    expected = model(x)
    add_context_pool(model, img_size=64)
    assert list(context_pools(model)) == ['blocks.0.cpool', 'blocks.1.cpool'] and torch.equal(model(x), expected)
    open_gates(model)
    assert not torch.equal(model(x), expected) and torch.equal(copy.deepcopy(model)(x), model(x))
    remove_context_pool(model)
    assert torch.equal(model(x), expected) and 'cpool_index' not in vars(model.blocks[0])


@pytest.mark.parametrize('kwargs, message', [
    (dict(positions='middle'), "unknown position 'middle': choose from post_stage, post_block, pre_attn"),
    (dict(positions=[]), 'positions is empty'),
    (dict(stages=9), 'stages must be among 0 to 4'),
    (dict(stages='a'), "stages must be among 0 to 4 for ResNet, got 'a'"),
    (dict(places='layer9'), "got 'layer9'"),
    (dict(places=['layer1', 'layer1']), 'each once'),
    (dict(places='fc'), "output of 'fc' of ResNet is not a single map"),
    (dict(places='layer1', stages=1), 'places cannot be combined'),
    (dict(groups=5), 'groups must divide dim'),
    (dict(ratio=-1), 'ratio must be > 0'),
    (dict(init='zero'), 'init must be one of'),
    (dict(support_init=0.), r'support_init must lie between 0 and 1 .*, got 0.0'),
    (dict(support_init=1), r'support_init must lie between 0 and 1 .*, got 1'),
    (dict(support_init=float('nan')), 'support_init must lie between 0 and 1 .*, got nan'),
    (dict(img_size=(1, 2, 3)), 'img_size must be'),
    (dict(in_chans=5), 'does not run on a batch of images'),
    (dict(positions='pre_attn'), "no place 'pre_attn': choose from post_stage, post_block"),
])
def test_errors_leave_the_model_as_it_was(kwargs, message):
    model, x = build('resnet')
    model.train()
    keys, kinds = set(model.state_dict()), [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        add_context_pool(model, **{'img_size': 64, **kwargs})
    assert set(model.state_dict()) == keys and [type(module) for module in model.modules()] == kinds
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_further_errors():
    model, _ = build('resnet')
    with pytest.raises(ValueError, match='has no context pool from add_context_pool'):
        remove_context_pool(model)
    add_context_pool(model)
    with pytest.raises(ValueError, match='already has context pools .*remove_context_pool first'):
        add_context_pool(model)
    with pytest.raises(NoPlaceError, match='has no parameters'):
        add_context_pool(nn.Identity())
    with pytest.raises(NoPlaceError, match='none of its modules returns a map'):
        add_context_pool(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), img_size=2, in_chans=3)


def test_a_base_that_is_not_kept_is_refused():
    class Noisy(Plain):
        def forward(self, x):
            return super().forward(x) + torch.rand(1)

    model = Noisy()
    with pytest.raises(NoPlaceError, match='does not give the same output'):
        add_context_pool(model, places='body.1', img_size=64)
    assert not context_pools(model)


def test_models_on_the_meta_device():
    with torch.device('meta'):
        model = timm.create_model('test_resnet')
    add_context_pool(model)
    assert len(context_pools(model)) == 3
    assert all(p.is_meta for p in model.parameters())


def test_dtype_follows_the_model():
    model, x = build('convnext')
    model = model.double()
    expected = model(x.double())
    add(model, 'convnext')
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert torch.equal(model(x.double()), expected)
