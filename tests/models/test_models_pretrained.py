import json

import pytest
import timm
import torch
from models_testing import POSITIONS
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import nn

from cpool_vision.layers import mixers

PAIRS = [
    ('convnext_atto_cpool', 'convnext_atto', 64),
    ('resnet18_cpool', 'resnet18', 64),
    ('tf_efficientnet_lite0_cpool', 'tf_efficientnet_lite0', 64),
    ('vit_tiny_cpool_patch16_224', 'vit_tiny_patch16_224', 224),
    ('naflexvit_base_cpool_patch16_gap', 'naflexvit_base_patch16_gap', 64),
    ('poolformer_s12_cpool', 'poolformer_s12', 64),
    ('swin_tiny_cpool_patch4_window7_224', 'swin_tiny_patch4_window7_224', 224),
]
# of the large ones, the same code with less of it
SMALL = {
    'naflexvit_base_patch16_gap': dict(depth=4, embed_dim=192, num_heads=3),
    'swin_tiny_patch4_window7_224': dict(depths=(1, 1, 2, 1), embed_dim=48),
}
EVERYWHERE = {
    'convnext_atto': POSITIONS['convnext'],
    'naflexvit_base_patch16_gap': POSITIONS['naflexvit'],
    'poolformer_s12': POSITIONS['metaformer'],
    'resnet18': POSITIONS['resnet'],
    'swin_tiny_patch4_window7_224': POSITIONS['swin_transformer'],
    'tf_efficientnet_lite0': POSITIONS['efficientnet'],
    'vit_tiny_patch16_224': POSITIONS['vision_transformer'],
}
MICRO = [
    'convnext_micro_cpool_32', 'naflexvit_micro_cpool_patch4_gap', 'poolformer_micro_cpool_32', 'resnet_micro_cpool_32',
    'swin_micro_cpool_patch2_window4_32', 'vit_micro_cpool_patch4_32']


def randomise(model):
    for p in model.parameters():
        if p.ndim == 1:
            nn.init.normal_(p, .5, .1)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.running_mean, std=.2)
    return model.eval()


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    """A base model per pair, made once, and the keywords that make models with its weights."""
    made = {}

    def get(base):
        if base not in made:
            torch.manual_seed(0)
            small = SMALL.get(base, {})
            model = randomise(timm.create_model(base, **small))
            path = tmp_path_factory.mktemp('weights') / f'{base}.safetensors'
            save_file(model.state_dict(), path)
            made[base] = model, dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(path)), **small)
        return made[base]
    return get


@pytest.mark.parametrize('name,base,size', PAIRS)
def test_pretrained_base_weights_predict_as_the_base(weights, name, base, size):
    model, made = weights(base)
    x = torch.randn(1, 3, size, size)
    with torch.no_grad():
        expected = model(x)
        variant = timm.create_model(name, **made).eval()
        assert all(pool.gamma is not None for _, pool in mixers(variant))
        torch.testing.assert_close(variant(x), expected, rtol=0, atol=1e-5)
        everywhere = timm.create_model(name, **made, cpool_positions=EVERYWHERE[base]).eval()
        torch.testing.assert_close(everywhere(x), expected, rtol=1e-5, atol=1e-5)
        paper = timm.create_model(name, **made, cpool_init='paper').eval()
        assert all(pool.gamma is None for _, pool in mixers(paper))
        # attention of random weights takes all of its tokens alike, so that what is pooled before it matters little;
        # the last maps of an EfficientNet have 2 x 2 pixels here
        least = {'naflexvit': 5e-5, 'swin': 3e-5, 'tf': 2e-5, 'vit': 1e-4}.get(base.split('_')[0], 1e-3)
        assert (paper(x) - expected).abs().max() > least


@pytest.mark.parametrize('name,base,size', PAIRS)
def test_pretrained_with_another_head_and_stem(weights, name, base, size):
    model, made = weights(base)
    x = torch.randn(1, 1, size, size)
    color = timm.create_model(base, **made, num_classes=0).eval()
    variant = timm.create_model(name, **made, num_classes=5, in_chans=1).eval()
    assert variant(x).shape == (1, 5)
    headless = timm.create_model(name, **made, num_classes=0, in_chans=1).eval()
    with torch.no_grad():
        torch.testing.assert_close(headless(x), color(x.expand(-1, 3, -1, -1)), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize('name,base,size', PAIRS)
def test_pretrained_features(weights, name, base, size):
    _, made = weights(base)
    x = torch.randn(1, 3, size, size)
    with torch.no_grad():
        ours, theirs = (timm.create_model(n, **made, features_only=True).eval()(x) for n in (name, base))
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_pretrained_vit_at_another_size(weights):
    _, made = weights('vit_tiny_patch16_224')
    x = torch.randn(1, 3, 96, 160)
    with torch.no_grad():
        ours, theirs = (
            timm.create_model(n, **made, img_size=(96, 160)).eval()(x)
            for n in ('vit_tiny_cpool_patch16_224', 'vit_tiny_patch16_224'))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_incomplete_base_weights_are_refused(weights, tmp_path):
    _, made = weights('resnet18')
    state = load_file(made['pretrained_cfg_overlay']['file'])
    del state['layer3.0.conv1.weight']
    save_file(state, tmp_path / 'cut.safetensors')
    with pytest.raises(RuntimeError, match=r'layer3\.0\.conv1\.weight'):
        timm.create_model(
            'resnet18_cpool', pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'cut.safetensors')))


@pytest.mark.parametrize('kwargs', [dict(), dict(cpool_init='paper', cpool_positions='branch')])
def test_weights_of_other_pools_are_refused(tmp_path, kwargs):
    trained = timm.create_model('resnet_micro_cpool_32', cpool_init='paper')
    path = tmp_path / 'trained.safetensors'
    save_file(trained.state_dict(), path)
    overlay = dict(file=str(path))
    for num_classes in (10, 3):
        with pytest.raises(ValueError, match='holds other context pools than the model.*pass the cpool_init'):
            timm.create_model(
                'resnet_micro_cpool_32', pretrained=True, pretrained_cfg_overlay=overlay, num_classes=num_classes,
                **kwargs)
    same = timm.create_model(
        'resnet_micro_cpool_32', pretrained=True, pretrained_cfg_overlay=overlay, cpool_init='paper')
    assert all(torch.equal(v, trained.state_dict()[k]) for k, v in same.state_dict().items())


@pytest.mark.parametrize('kwargs', [
    dict(), dict(cpool_init='identity', cpool_ratio=.2, cpool_groups=4, cpool_floor=.3), dict(cpool_positions=[])])
@pytest.mark.parametrize('name', MICRO)
def test_saved_models_come_back_with_their_settings(tmp_path, name, kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, in_chans=1, **kwargs)
    for _, pool in mixers(model):
        nn.init.normal_(pool.predict.weight)
        if pool.gamma is not None:
            nn.init.normal_(pool.gamma)
    randomise(model)
    save_for_hf(model, tmp_path, safe_serialization=True)
    args = json.loads((tmp_path / 'config.json').read_text())['model_args']
    assert args['cpool_init'] == kwargs.get('cpool_init', 'paper') and 'cpool_positions' in args
    back = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    x = torch.randn(2, 1, 32, 32)
    assert torch.equal(back(x), model(x))
    assert str(back) == str(model)


@pytest.mark.parametrize('prefix', ['', 'encoder.'])
def test_checkpoints_of_resnets_whose_pools_had_the_names_of_slots_load(prefix):
    torch.manual_seed(0)
    model = timm.create_model('resnet18_cpool', cpool_positions=['branch', 'stem', 'stride'], cpool_init='identity')
    own = model.state_dict()
    former = {prefix + k.replace('1.cpool.', '1.se.').replace('aa.cpool.', 'aa.').replace('maxpool.cpool.', 'maxpool.'):
              torch.randn_like(v) if v.is_floating_point() else v for k, v in own.items() if 'logit_bound' not in k}
    assert not any('cpool' in k for k in former)
    if prefix:
        nn.ModuleDict({'encoder': model}).load_state_dict(former)
    else:
        model.load_state_dict(former)
    assert all(pool.bound == 0 for _, pool in mixers(model))
    for key, value in model.state_dict().items():
        if 'logit_bound' in key:
            continue
        old = key.replace('1.cpool.', '1.se.').replace('.cpool.', '.')
        assert torch.equal(value, former[prefix + old]), key
    # an SE module of the base keeps its name
    excited = timm.create_model('resnet18_cpool', cpool_positions='branch', block_args=dict(attn_layer='se'))
    assert {k for k in excited.state_dict() if '.se.' in k} and 'layer4.1.cpool.reduce.weight' in excited.state_dict()
    excited.load_state_dict(excited.state_dict())


@pytest.mark.parametrize('name', ['vit_micro_cpool_patch4_32', 'resnet_micro_cpool_32'])
def test_saved_models_from_before_the_bound_predict_as_they_did(name, tmp_path):
    torch.manual_seed(0)
    free = timm.create_model(name, cpool_logit_bound=0).eval()
    for _, pool in mixers(free):
        nn.init.normal_(pool.predict.weight, std=3.)
    timm.models.save_for_hf(free, tmp_path, safe_serialization=True)
    weights, config = tmp_path / 'model.safetensors', tmp_path / 'config.json'
    save_file({k: v for k, v in load_file(weights).items() if 'logit_bound' not in k}, weights)
    settings = json.loads(config.read_text())
    assert settings['model_args'].pop('cpool_logit_bound') == 0
    config.write_text(json.dumps(settings))
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(again(x), free(x)) and {pool.bound for _, pool in mixers(again)} == {0.}
    bounded = timm.create_model(name).eval()
    assert {pool.bound for _, pool in mixers(bounded)} == {8.}
    assert not torch.allclose(bounded(x), free(x))
