import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cpool_vision.layers import ContextPool2d, Subsample2d
from cpool_vision.layers.context_pool import default_hidden_dim
from cpool_vision.ops import context_pool2d_reference


def make(dim=32, **kwargs):
    torch.manual_seed(0)
    return ContextPool2d(dim, **kwargs)


def spread(pool, std=1.0):
    """Gives the predictor weights large enough for maps that vary from pixel to pixel."""
    with torch.no_grad():
        for conv in (pool.reduce, pool.predict):
            conv.weight.normal_(std=std / conv.weight[0].numel() ** .5)
    return pool


@pytest.mark.parametrize('groups', [1, 4])
@pytest.mark.parametrize('stride', [1, 2, 3])
@pytest.mark.parametrize('size', [(1, 1), (3, 3), (7, 5), (1, 6)])
def test_output_is_the_definition_on_predicted_maps(size, stride, groups):
    pool = spread(make(stride=stride, groups=groups, ratio=0.5), std=3.)
    x = torch.randn(2, 32, *size)
    weight_logits, sigma = pool.maps(x)
    out = [-(-n // stride) for n in size]
    assert weight_logits.shape == (2, groups, *size)
    assert sigma.shape == (2, groups, *out)
    y = pool(x)
    torch.testing.assert_close(y, context_pool2d_reference(x, weight_logits, sigma, stride), rtol=1e-4, atol=1e-5)
    assert y.shape == (2, 32, *out)


def test_supports_are_relative_to_the_map_and_bounded():
    pool = spread(make(ratio=0.25, floor=0.3), std=20.)
    _, sigma = pool.maps(torch.randn(1, 32, 9, 16))
    assert sigma.min() >= 0.3 and sigma.max() <= 0.3 + 0.25 * 12 + 1e-5
    assert sigma.std() > 0.1
    fresh = make(ratio=0.25, floor=0.3)
    torch.testing.assert_close(
        fresh.maps(torch.zeros(1, 32, 9, 16))[1], torch.full((1, 1, 9, 16), 0.3 + 0.25 * 12 / 2))


@pytest.mark.parametrize('dim,groups,hidden', [(384, 1, 24), (64, 2, 16), (768, 1, 48), (2048, 4, 128), (40, 1, 16)])
def test_parameters_and_flops_as_stated(dim, groups, hidden):
    assert default_hidden_dim(dim) == hidden
    pool = ContextPool2d(dim, groups=groups, init='identity', device='meta')
    stated = dim * hidden + hidden + 18 * hidden * groups + 2 * groups + dim
    assert sum(p.numel() for p in pool.parameters()) == stated
    with FlopCounterMode(display=False) as counter:
        pool.predict(pool.reduce(torch.empty(1, dim, 6, 5, device='meta')))
    assert counter.get_total_flops() == 2 * 6 * 5 * (dim * hidden + 18 * hidden * groups)


def test_identity_returns_its_base_bit_for_bit_until_the_gate_opens():
    x = torch.randn(2, 32, 6, 9)
    pool = make(init='identity')
    assert torch.equal(pool(x), x)
    for base in (nn.MaxPool2d(3, 2, 1), Subsample2d(2)):
        strided = make(init='identity', stride=2, base=base)
        assert torch.equal(strided(x), base(x))
    with torch.no_grad():
        pool.gamma.fill_(1.)
    paper = make(init='paper')
    paper.load_state_dict({k: v for k, v in pool.state_dict().items() if k != 'gamma'})
    torch.testing.assert_close(pool(x), paper(x))
    assert not torch.allclose(pool(x), x)


@pytest.mark.parametrize('init', ['paper', 'identity'])
def test_every_parameter_gets_a_gradient(init):
    pool = make(init=init)
    x = torch.randn(2, 32, 3, 3, requires_grad=True)
    pool(x).square().sum().backward()
    assert x.grad is not None
    for name, p in pool.named_parameters():
        assert p.grad is not None, name
    moving = pool.gamma if init == 'identity' else pool.predict.weight
    assert moving.grad.abs().max() > 0


def test_fresh_parameters_are_small_and_survive_meta():
    def is_fresh(pool):
        stds = [conv.weight.std().item() for conv in (pool.reduce, pool.predict)]
        return all(.015 < s < .025 for s in stds) and not pool.reduce.bias.any() and not pool.predict.bias.any() \
            and not pool.gamma.any()

    pool = make(256, init='identity')
    assert is_fresh(pool)
    for reset in (pool.reset_parameters, pool.init_weights):
        for p in pool.parameters():
            nn.init.normal_(p)
        assert not is_fresh(pool)
        reset()
        assert is_fresh(pool)
    meta = ContextPool2d(256, init='identity', device='meta', dtype=torch.bfloat16)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in meta.parameters())
    real = meta.to_empty(device='cpu')
    real.reset_parameters()
    assert is_fresh(real)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('init', ['paper', 'identity'])
def test_autocast_predicts_maps_in_fp32(dtype, init):
    pool = spread(make(init=init, ratio=0.3))
    if init == 'identity':
        nn.init.ones_(pool.gamma)
    x = torch.randn(2, 32, 8, 8)
    y = pool(x)
    with torch.autocast('cpu', dtype):
        weight_logits, sigma = pool.maps(x.to(dtype))
        assert weight_logits.dtype == sigma.dtype == torch.float32
        low = pool(x.to(dtype))
        assert low.dtype == dtype
        assert pool(x).dtype == (dtype if init == 'paper' else torch.float32)  # the gate's base stays as it is
    torch.testing.assert_close(low.float(), y, rtol=.05, atol=.05)
    low.float().sum().backward()
    assert pool.predict.weight.grad.dtype == torch.float32


def test_low_precision_parameters_keep_supports_in_fp32():
    pool = make().bfloat16()
    x = torch.randn(1, 32, 5, 5, dtype=torch.bfloat16)
    assert pool.maps(x)[1].dtype == torch.float32
    assert pool(x).dtype == torch.bfloat16


def test_double_precision_stays_double():
    pool = spread(make(8, hidden_dim=4, groups=2, init='identity', dtype=torch.float64))
    nn.init.normal_(pool.gamma)
    x = torch.randn(1, 8, 3, 4, dtype=torch.float64, requires_grad=True)
    assert pool(x).dtype == pool.maps(x)[1].dtype == torch.float64
    assert torch.autograd.gradcheck(pool, (x,))


def test_channels_last_equals_contiguous():
    pool = spread(make(groups=2))
    x = torch.randn(2, 32, 6, 7)
    y = pool(x)
    pool.to(memory_format=torch.channels_last)
    torch.testing.assert_close(pool(x.to(memory_format=torch.channels_last)), y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('kwargs', [
    dict(),
    dict(init='identity'),
    dict(stride=2, groups=2),
    dict(stride=2, init='identity', base=nn.MaxPool2d(3, 2, 1)),
    dict(groups=2, gate=True, support_init=(.1, .5), depthwise=3),
    dict(groups=4, support_groups=2, offset='group', logit_bound=0),
    dict(groups=2, support_groups=1, offset='cell', stride=2),
])
@pytest.mark.filterwarnings('ignore')
def test_torchscript_and_fx_equal_eager(kwargs):
    pool = spread(make(**kwargs))
    if pool.gamma is not None:
        nn.init.normal_(pool.gamma)
    x = torch.randn(2, 32, 5, 6)
    y = pool(x)
    y.square().sum().backward()
    expected = {k: p.grad.clone() for k, p in pool.named_parameters()}
    traced = torch.fx.symbolic_trace(pool)
    for compiled in (torch.jit.script(pool), traced, torch.jit.script(traced)):
        for _ in range(3):  # the profiling executor specialises after its first runs
            pool.zero_grad()
            out = compiled(x)
            assert torch.equal(out, y)
            out.square().sum().backward()
            for k, p in pool.named_parameters():
                torch.testing.assert_close(p.grad, expected[k])
        assert compiled(torch.randn(1, 32, 3, 9)).shape[-1] == -(-9 // pool.stride)


@pytest.mark.parametrize('groups', [1, 2])
@pytest.mark.parametrize('size', [4, 24])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_the_output_is_no_view_of_something_inside(memory_format, size, groups):
    pool = make(groups=groups)
    x = torch.randn(2, 32, size, size).to(memory_format=memory_format)
    y = pool(x)
    assert y.is_contiguous(memory_format=memory_format) or groups > 1
    assert not y._is_view()


@pytest.mark.parametrize('support_init', [.1, .5, .8])
def test_fresh_supports_are_the_asked_part_of_the_largest(support_init):
    torch.manual_seed(0)
    pool = ContextPool2d(32, groups=2, ratio=.4, floor=.2, support_init=support_init)
    sigma = pool.maps(torch.randn(2, 32, 9, 4))[1]
    torch.testing.assert_close(sigma, torch.full_like(sigma, .2 + .4 * 6 * support_init), atol=.02, rtol=.02)
    pool.predict.bias.data.fill_(5.)
    pool.init_weights()  # as timm's models call it
    torch.testing.assert_close(pool.maps(torch.randn(2, 32, 9, 4))[1], sigma, atol=.02, rtol=.02)


def test_maps_stores_nothing():
    pool = make(groups=2)
    before = set(pool.__dict__), set(pool.state_dict()), set(dict(pool.named_buffers()))
    pool.maps(torch.randn(1, 32, 4, 4))
    pool(torch.randn(1, 32, 4, 4))
    assert before == (set(pool.__dict__), set(pool.state_dict()), set(dict(pool.named_buffers())))


@pytest.mark.parametrize('kwargs,message', [
    (dict(dim=0), r'dim must be at least 1, got 0'),
    (dict(dim=32, groups=5), r'groups must divide dim, got groups=5 for dim=32'),
    (dict(dim=32, groups=0), r'groups must divide dim, got groups=0'),
    (dict(dim=32, stride=0), r'stride must be at least 1, got 0'),
    (dict(dim=32, ratio=0.), r'ratio must be > 0 .*, got 0.0'),
    (dict(dim=32, ratio=float('nan')), r'ratio must be > 0 .*, got nan'),
    (dict(dim=32, floor=-1.), r'floor must be > 0 .*, got -1.0'),
    (dict(dim=32, init='zero'), r"init must be one of \('paper', 'identity'\), got 'zero'"),
    (dict(dim=32, support_init=0.), r'support_init must lie between 0 and 1 .*, got 0.0'),
    (dict(dim=32, support_init=1.), r'support_init must lie between 0 and 1 .*, got 1.0'),
    (dict(dim=32, support_init=(.1, 1.)), r'support_init must lie between 0 and 1 .*, got \(0.1, 1.0\)'),
    (dict(dim=32, support_init=[.1]), r'or be a pair of such fractions, got \[0.1\]'),
    (dict(dim=32, groups=8, support_groups=3), r'support_groups must divide groups, got support_groups=3 for groups=8: '
                                               r'choose one of \[1, 2, 4, 8\]'),
    (dict(dim=32, offset='pixel'), r"offset must be one of \('none', 'group', 'cell'\), got 'pixel'"),
    (dict(dim=32, logit_bound=-1.), r'logit_bound must be >= 0 .*, got -1.0'),
    (dict(dim=32, logit_bound=float('nan')), r'logit_bound must be >= 0 .*, got nan'),
    (dict(dim=32, backend='cuda'), r"backend must be one of .* or None .*, got 'cuda'"),
    (dict(dim=32, depthwise=2), r'depthwise must be an odd side of a convolution, or 0 for none, got 2'),
    (dict(dim=32, gate=True, stride=2), r"gate=True with stride=2 needs base"),
    (dict(dim=32, hidden_dim=0), r'hidden_dim must be at least 1 or None, got 0'),
    (dict(dim=32, init='identity', stride=2), r"init='identity' with stride=2 needs base"),
])
def test_bad_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ContextPool2d(**kwargs)


def test_subsample_needs_a_stride():
    with pytest.raises(ValueError, match='stride must be at least 1, got 0'):
        Subsample2d(0)


def test_base_may_lower_the_precision_under_autocast():
    pool = ContextPool2d(8, stride=2, init='identity', base=nn.Conv2d(8, 8, 3, stride=2, padding=1))
    nn.init.ones_(pool.gamma)
    with torch.autocast('cpu', torch.bfloat16):
        y = pool(torch.randn(2, 8, 9, 9))
    assert y.dtype == torch.bfloat16 and torch.isfinite(y).all()


def test_a_pair_of_supports_is_spread_geometrically_over_the_groups():
    pool = make(groups=4, ratio=.5, floor=.1, support_init=(.05, .4), hidden_dim=1)
    nn.init.zeros_(pool.predict.weight)
    sigma = pool.maps(torch.randn(1, 32, 8, 8))[1][0, :, 0, 0]
    torch.testing.assert_close(sigma, .1 + 4 * torch.tensor([.05, .1, .2, .4]))
    assert torch.equal(make(groups=1, support_init=(.3, .6)).predict.bias, make(groups=1, support_init=.3).predict.bias)


def test_the_gate_of_paper_starts_at_one_and_may_sharpen():
    pool, plain = spread(make(gate=True, ratio=.4)), spread(make(ratio=.4))
    pool.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(2, 32, 5, 6)
    torch.testing.assert_close(pool(x), plain(x))
    pool(x).square().sum().backward()
    assert pool.gamma.grad.abs().min() > 0
    nn.init.constant_(pool.gamma, -.5)
    torch.testing.assert_close(pool(x), x - .5 * (plain(x) - x))  # unsharp masking
    strided = make(stride=2, gate=True, base=nn.AvgPool2d(2, ceil_mode=True))
    assert strided(x).shape == (2, 32, 3, 3)
    assert torch.equal(make(gate=True, init='identity')(x), x)


def test_a_depthwise_convolution_beside_the_pool_starts_at_zero_and_adds():
    for stride in (1, 2):
        pool, plain = spread(make(depthwise=3, stride=stride)), spread(make(stride=stride))
        pool.load_state_dict(plain.state_dict(), strict=False)
        x = torch.randn(2, 32, 5, 6)
        assert torch.equal(pool(x), plain(x))
        pool(x).square().sum().backward()
        assert pool.depthwise.weight.grad.abs().min() > 0
        nn.init.normal_(pool.depthwise.weight)
        torch.testing.assert_close(
            pool(x), plain(x) + nn.functional.conv2d(x, pool.depthwise.weight, None, stride, 1, groups=32))
    assert sum(p.numel() for p in pool.parameters()) - sum(p.numel() for p in plain.parameters()) == 10 * 32
    assert torch.equal(make(depthwise=3, init='identity')(x), x)


def test_logits_are_bounded_smoothly():
    pool, free = spread(make(groups=2, logit_bound=3.), std=9.), spread(make(groups=2, logit_bound=0), std=9.)
    x = torch.randn(2, 32, 6, 6)
    raw, bounded = free.maps(x)[0], pool.maps(x)[0]
    assert raw.abs().max() > 6
    torch.testing.assert_close(bounded, 3 * torch.tanh(raw / 3))
    assert bounded.abs().max() <= 3


def test_a_state_dict_without_a_bound_makes_the_layer_unbounded():
    free = spread(make(logit_bound=0), std=9.)
    former = {k: v for k, v in free.state_dict().items() if k != 'logit_bound'}
    x = torch.randn(1, 32, 6, 6)
    for state in (former, {f'0.{k}': v for k, v in former.items()}, free.state_dict()):
        pool = make()
        (nn.Sequential(pool) if '0.predict.weight' in state else pool).load_state_dict(state)
        assert torch.equal(pool(x), free(x)) and pool.bound == 0 == pool.logit_bound
        pool.reset_parameters()
        assert pool.logit_bound == 0
    assert 'logit_bound' not in former  # what was passed stays as it was
    bounded = make()
    bounded.load_state_dict(spread(make(logit_bound=3.), std=9.).state_dict())
    assert bounded.bound == 3 and not torch.allclose(bounded(x), free(x))
    # weights of a network that has no pool yet change nothing
    bounded.load_state_dict({}, strict=False)
    assert bounded.bound == 3


def test_shared_supports_serve_neighboring_groups():
    pool = spread(make(groups=4, support_groups=2, ratio=.5), std=3.)
    x = torch.randn(2, 32, 6, 5)
    weight_logits, sigma = pool.maps(x)
    assert weight_logits.shape == (2, 4, 6, 5) and sigma.shape == (2, 2, 6, 5)
    expected = context_pool2d_reference(x, weight_logits, sigma.repeat_interleave(2, 1))
    torch.testing.assert_close(pool(x), expected, rtol=1e-4, atol=1e-5)
    assert pool.predict.out_channels == 6


@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('offset', ['group', 'cell'])
def test_offsets_start_near_zero_and_move_where_a_group_looks(offset, stride):
    kwargs = dict(groups=2, ratio=.25, support_init=.01, hidden_dim=4, stride=stride)
    pool = make(offset=offset, **kwargs)
    x = torch.randn(2, 32, 8, 8)
    plain = make(**kwargs)
    nn.init.zeros_(pool.predict.weight)
    nn.init.zeros_(plain.predict.weight)
    torch.testing.assert_close(pool(x), plain(x))
    raw = math.atanh(.5)  # one pixel of the two that the ratio allows
    with torch.no_grad():
        if offset == 'group':
            pool.offset[1, 1] = raw  # the second group looks one column to the right
        else:
            pool.predict.bias[4 + 3] = raw
    y = pool(x)
    assert torch.equal(y[:, :16], pool(x)[:, :16])
    torch.testing.assert_close(y[:, :16], plain(x)[:, :16])
    if stride == 1:
        torch.testing.assert_close(y[:, 16:, :, :-1], x[:, 16:, :, 1:], atol=1e-3, rtol=1e-3)
    y.square().sum().backward()
    gradient = pool.offset.grad if offset == 'group' else pool.predict.bias.grad[4:]
    assert gradient.abs().max() > 0
    assert torch.equal(make(offset=offset, init='identity')(x), x)


def test_bad_inputs_are_named():
    pool = make()
    with pytest.raises(ValueError, match=r'expected a map \(B, 32, H, W\), got shape \(32, 5, 5\): add a batch dim'):
        pool(torch.randn(32, 5, 5))
    with pytest.raises(ValueError, match=r'expected 32 channels, got a map of shape \(1, 8, 5, 5\): build .* dim=8'):
        pool(torch.randn(1, 8, 5, 5))
    with pytest.raises(TypeError, match='act_layer must make a module, such as nn.GELU, got'):
        make(act_layer=lambda: nn.functional.gelu)
