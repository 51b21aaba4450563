import importlib.util

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from cpool_vision.layers import MIXERS, ContextPool2d, TokenContextPool, context_pools, create_mixer, mixers

# dcls comes with the extra `study`
HERE = [mixer for mixer in MIXERS if mixer != 'dcls' or importlib.util.find_spec('DCLS')]
X = torch.randn(2, 8, 11, 9, generator=torch.Generator().manual_seed(0))


def make(mixer, **kwargs):
    torch.manual_seed(0)
    pool = create_mixer(8, mixer=mixer, ratio=.3, **kwargs)
    with torch.no_grad():
        for p in pool.parameters():
            p.add_(torch.randn_like(p), alpha=.3)
    return pool


def test_context_is_the_pool_itself():
    assert type(create_mixer(8)) is ContextPool2d
    assert type(create_mixer(8, layout='tokens')) is TokenContextPool


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('mixer', HERE)
def test_maps_and_tokens_agree(mixer):
    pool, token_pool = make(mixer), make(mixer, layout='tokens', num_prefix_tokens=1, grid_size=(11, 9))
    token_pool.load_state_dict(pool.state_dict())
    prefix = torch.randn(2, 1, 8)
    y = token_pool(torch.cat([prefix, X.flatten(2).mT], 1))
    assert torch.equal(y[:, :1], prefix)
    torch.testing.assert_close(y[:, 1:].mT.unflatten(2, (11, 9)), pool(X))


@pytest.mark.parametrize('mixer', HERE)
@pytest.mark.parametrize('stride', [1, 2])
def test_identity_starts_as_the_base_and_keeps_shapes(mixer, stride):
    base = nn.MaxPool2d(3, stride, 1)
    pool = create_mixer(8, mixer=mixer, stride=stride, init='identity', base=base)
    assert torch.equal(pool(X), base(X))
    nn.init.ones_(pool.gamma)
    y = pool(X)
    assert y.shape == base(X).shape and not torch.allclose(y, base(X))
    y.square().sum().backward()
    assert all(p.grad is not None for p in pool.parameters())


def test_uniform_weights_and_supports_are_what_they_say():
    logits, sigma = make('uniform').maps(X)
    assert not logits.any() and sigma.std() > 1e-3
    half = .1 + .3 * (11 * 9) ** .5 * .5
    for mixer in ('fixed', 'layer'):
        pool = create_mixer(8, mixer=mixer, ratio=.3, groups=2)
        logits, sigma = pool.maps(X)
        assert logits.std() > 1e-3
        torch.testing.assert_close(sigma, torch.full_like(sigma, half))
    with torch.no_grad():
        pool.support[0, 1] = 1.
    sigma = pool.maps(X)[1]
    assert sigma[:, 1].min() > sigma[:, 0].max() and sigma[0, 1].std() == 0


def test_a_fixed_support_has_no_gradient_and_a_layer_s_has():
    for mixer, kept in (('fixed', False), ('layer', True)):
        pool = make(mixer)
        pool(X).square().sum().backward()
        raw = pool.predict.weight.grad[1]
        assert not raw.any()  # the half that predicts supports is idle in both
        assert kept == (mixer == 'layer' and bool(pool.support.grad.any()))


def test_local_mixers():
    torch.testing.assert_close(make('average')(X), F.avg_pool2d(X, 3, 1, 1, count_include_pad=False))
    assert torch.equal(make('identity')(X), X) and torch.equal(make('identity', stride=2)(X), X[..., ::2, ::2])
    for mixer, size in (('depthwise3', 3), ('depthwise7', 7)):
        assert torch.equal(create_mixer(8, mixer=mixer)(X), X)
        pool = make(mixer)
        torch.testing.assert_close(
            pool(X), F.conv2d(X, pool.local.weight, pool.local.bias, padding=size // 2, groups=8))


def test_unknown_mixers_are_refused():
    with pytest.raises(ValueError, match="mixer must be one of .* got 'mean'"):
        create_mixer(8, mixer='mean')
    with pytest.raises(ValueError, match="cpool_mixer must be one of context, .* got 'mean'"):
        timm.create_model('vit_micro_cpool_patch4_32', cpool_mixer='mean', device='meta')


def test_blur_is_the_binomial_filter_of_maps_that_it_can_mirror():
    pool = create_mixer(8, mixer='blur', stride=2)
    taps = torch.tensor([.25, .5, .25])
    kernel = (taps[:, None] * taps).expand(8, 1, 3, 3)
    expected = nn.functional.conv2d(nn.functional.pad(X, (1, 1, 1, 1), 'reflect'), kernel, stride=2, groups=8)
    torch.testing.assert_close(pool(X), expected)
    with pytest.raises(ValueError, match="mixer 'blur' .* needs at least 2 x 2 pixels, got 1 x 9"):
        pool(X[:, :, :1])


@pytest.mark.parametrize('mixer', ['average', 'blur', 'gaussian'])
def test_constant_filters_leave_missing_pixels_out(mixer):
    present = torch.ones(2, 1, 11, 9)
    present[:, :, 4:, 3:] = 0
    y = create_mixer(8, mixer=mixer).mix(7 * present.expand(2, 8, 11, 9), present)
    torch.testing.assert_close(y[:, :, :4], torch.full((2, 8, 4, 9), 7.))


def test_mixers_without_a_predictor_are_no_context_pools():
    for mixer in HERE:
        pool = create_mixer(8, mixer=mixer)
        adaptive = mixer in ('context', 'uniform', 'fixed', 'layer')
        assert isinstance(pool, ContextPool2d) == adaptive == hasattr(pool, 'predict')
        assert list(context_pools(nn.Sequential(pool))) == ['0'] * adaptive and len(list(mixers(pool))) == 1


@pytest.mark.parametrize('name', [
    'vit_micro_cpool_patch4_32', 'resnet_micro_cpool_32', 'convnext_micro_cpool_32', 'poolformer_micro_cpool_32',
    'swin_micro_cpool_patch2_window4_32'])
@pytest.mark.parametrize('mixer', HERE[1:])
def test_every_family_takes_every_mixer(name, mixer):
    model = timm.create_model(name, cpool_mixer=mixer, cpool_init='identity').eval()
    plain = timm.create_model(name, cpool_positions=[]).eval()
    assert not plain.load_state_dict(model.state_dict(), strict=False).missing_keys
    pools = list(mixers(model))
    assert pools and all(pool.mixer == mixer for _, pool in pools)
    assert model._model_args['cpool_mixer'] == mixer
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(model(x), plain(x))
