import pytest
import timm
import torch
from models_testing import POSITIONS
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from cpool_vision.layers import mixers
from cpool_vision.models._builder import pool_keys

MICRO = {
    'convnext_micro_cpool_32': 'convnext',
    'naflexvit_micro_cpool_patch4_gap': 'naflexvit',
    'poolformer_micro_cpool_32': 'metaformer',
    'resnet_micro_cpool_32': 'resnet',
    'swin_micro_cpool_patch2_window4_32': 'swin_transformer',
    'vit_micro_cpool_patch4_32': 'vision_transformer',
}
ALL_POSITIONS = {
    name: [p for p in POSITIONS[family] if (name, p) != ('resnet_micro_cpool_32', 'stem')]
    for name, family in MICRO.items()
}


def make(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **{'cpool_positions': ALL_POSITIONS[name], **kwargs})


def is_fresh(pool):
    """Whether the predictor's weights have the spread the layer gives them, and gate and biases are zero."""
    stds = [conv.weight.std().item() for conv in (pool.reduce, pool.predict)]
    zeros = [pool.reduce.bias, pool.predict.bias] + ([] if pool.gamma is None else [pool.gamma])
    return all(.016 < s < .024 for s in stds) and not any(z.any() for z in zeros)


@pytest.mark.parametrize('kwargs', [dict(), dict(cpool_init='identity')])
@pytest.mark.parametrize('name', [*sorted(MICRO), 'resnet18_cpool'])
def test_the_layers_own_init_is_kept(name, kwargs):
    model = timm.create_model(name, **kwargs)
    pools = [pool for _, pool in mixers(model)]
    assert pools and all(is_fresh(pool) for pool in pools)
    if hasattr(model, 'init_weights'):
        model.init_weights()
        assert all(is_fresh(pool) for pool in pools)


@pytest.mark.parametrize('mode', ['jax', 'jax_nlhb', 'moco', 'reset', ''])
def test_every_vit_scheme_keeps_it(mode):
    model = timm.create_model('vit_micro_cpool_patch4_32', weight_init=mode, cpool_init='identity')
    assert all(is_fresh(pool) for _, pool in mixers(model))
    model.init_weights(mode)
    assert all(is_fresh(pool) for _, pool in mixers(model))


def test_the_parents_scheme_alone_would_lose_it():
    model = timm.create_model('resnet_micro_cpool_32')
    timm.models.ResNet.init_weights(model)
    assert not any(is_fresh(pool) for _, pool in mixers(model))
    vit = timm.create_model('vit_micro_cpool_patch4_32')
    for _, pool in mixers(vit):
        for conv in (pool.reduce, pool.predict):
            timm.models.vision_transformer.init_weights_vit_jax(conv)
    assert not any(is_fresh(pool) for _, pool in mixers(vit))


def sibling(name, model):
    """A parameter of the base in the block that the pool `name` stands in."""
    parts = name.split('.')
    if name == 'maxpool.cpool':
        return 'conv1.weight'
    if parts[0] == 'blocks' and isinstance(model.blocks[int(parts[1])], nn.Sequential):
        stage = model.blocks[int(parts[1])]
        return f'blocks.{parts[1]}.{len(stage) - 2 if parts[2] == "cpool" else parts[2]}.conv_pw.weight'
    if parts[0] == 'blocks':
        return f'blocks.{parts[1]}.attn.qkv.weight'
    if parts[0] == 'layers' or 'token_mixer' in parts:
        return '.'.join([*parts[:4], 'mlp.fc1.weight'])
    if parts[0].startswith('layer'):
        return f'{parts[0]}.{parts[1]}.conv1.weight'
    if parts[2] == 'downsample':
        return f'stages.{parts[1]}.downsample.1.weight'
    last = max(int(n) for n, _ in model.stages[int(parts[1])].blocks.named_children() if n.isdigit())
    return f'stages.{parts[1]}.blocks.{last}.conv_dw.weight'


@pytest.mark.parametrize('name', [
    *sorted(MICRO), 'resnet18_cpool', 'resnet50_cpool', 'convnext_atto_cpool', 'tf_efficientnet_lite0_cpool'])
def test_layer_decay_puts_a_pool_with_its_block(name):
    family = {'convnext': 'convnext', 'tf': 'efficientnet'}.get(name.split('_')[0], 'resnet')
    positions = ALL_POSITIONS.get(name, list(POSITIONS[family]))
    model = timm.create_model(name, cpool_positions=positions, cpool_init='identity', device='meta')
    scales = {}
    for group in param_groups_layer_decay(model, layer_decay=.5):
        for p in group['params']:
            scales[id(p)] = group['lr_scale']
    named = {n: scales[id(p)] for n, p in model.named_parameters()}
    assert len(set(named.values())) > 4
    for key in pool_keys(model) & named.keys():
        pool_name = max((n for n, _ in mixers(model) if key.startswith(n + '.')), key=len)
        assert named[key] == named[sibling(pool_name, model)], key
        lasts = ('blocks.5', 'blocks.6', 'layer4', 'layers.3', 'stages.3')
        assert named[key] < 1. or any(last in key for last in lasts), key


@pytest.mark.parametrize('name', sorted(MICRO))
def test_weight_decay_spares_gates_and_biases_by_shape_alone(name):
    model = make(name, cpool_init='identity')
    spared, decayed = param_groups_weight_decay(
        model, weight_decay=.1, no_weight_decay_list=getattr(model, 'no_weight_decay', set)())
    assert spared['weight_decay'] == 0. and decayed['weight_decay'] == .1
    ids = {id(p) for p in decayed['params']}
    params = dict(model.named_parameters())
    for key in pool_keys(model) & params.keys():
        assert (id(params[key]) in ids) == key.endswith('weight'), key
    if hasattr(model, 'no_weight_decay'):
        assert any(n.endswith(('pos_embed', 'bias_table')) for n in model.no_weight_decay() & set(params))
        assert not any('cpool' in n for n in model.no_weight_decay())


@pytest.mark.parametrize('init', ['paper', 'identity'])
@pytest.mark.parametrize('name', sorted(MICRO))
def test_gradient_checkpointing_changes_no_gradient(name, init):
    kwargs = {}
    if name.startswith('vit'):
        kwargs = dict(dynamic_img_size=True, cpool_positions=['pre_attn', 'post_block'])
    model = make(name, cpool_init=init, drop_path_rate=0., **kwargs).train()
    x = torch.randn(2, 3, 32, 32)
    results = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        y = model(x)
        y.square().sum().backward()
        results.append((y.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}))
    torch.testing.assert_close(*(r[0] for r in results), rtol=1e-4, atol=1e-5)
    for key, grad in results[0][1].items():
        torch.testing.assert_close(grad, results[1][1][key], rtol=1e-3, atol=1e-5 + 1e-4 * float(grad.abs().max()))


@pytest.mark.parametrize('name', sorted(MICRO))
def test_a_few_steps_learn_and_open_the_gate(name):
    model = make(name, cpool_init='identity')
    x, target = torch.randn(8, 3, 32, 32), torch.arange(8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(pool.gamma.abs().max() > 0 and not is_fresh(pool) for _, pool in mixers(model))
