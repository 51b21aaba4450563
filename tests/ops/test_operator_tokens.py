"""Tokens behind a prefix: values and gradients are those of the map, and the prefix passes."""
import pytest
import torch
from ops_testing import NO_COMPILER
from torch.utils.flop_counter import FlopCounterMode

from cpool_vision.ops import available_backends
from cpool_vision.ops.layer import compose_layer

TOKENS = torch.ops.cpool_vision.context_pool_tokens
NATIVE = torch.ops.cpool_vision.context_pool_tokens_native.default


def make_tokens(prefix=1, dtype=torch.float32, groups=2, shared=1):
    torch.manual_seed(0)
    x = torch.randn(2, prefix + 20, 8).to(dtype)
    logits, sigma = torch.randn(2, groups, 4, 5), torch.rand(2, groups // shared, 4, 5) + .3
    return [t.requires_grad_() for t in (x, logits, sigma)], torch.randn(2, prefix + 20, 8).to(dtype)


def by_map(x, logits, sigma, prefix):
    grid = x[:, prefix:].transpose(1, 2).unflatten(2, (4, 5))
    y = torch.ops.cpool_vision.context_pool2d(grid, logits, sigma, 1, 'reference')
    return torch.cat([x[:, :prefix], y.flatten(2).transpose(1, 2)], 1)


@pytest.mark.parametrize('backend', [None, 'native', 'tiled', 'reference', 'triton'])
@pytest.mark.parametrize('prefix,shared', [(0, 1), (1, 1), (5, 2)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_tokens_are_pooled_as_a_map(backend, prefix, shared, dtype):
    inputs, grad = make_tokens(prefix, dtype, shared=shared)
    x, logits, sigma = inputs
    if backend is not None:
        reason = available_backends(x[:, prefix:].transpose(1, 2).unflatten(2, (4, 5)), logits, sigma)[backend]
        if reason is not None:
            pytest.skip(reason)
    y, expected = TOKENS(x, logits, sigma, prefix, backend), by_map(*inputs, prefix)
    close = dict(rtol=1e-4, atol=1e-5) if dtype == torch.float32 else dict(rtol=.02, atol=.05)
    torch.testing.assert_close(y, expected, **close)
    assert torch.equal(y[:, :prefix], x[:, :prefix]) and (y.is_contiguous() or prefix == 0)
    for got, wanted in zip(*(torch.autograd.grad(z, inputs, grad) for z in (y, expected)), strict=True):
        torch.testing.assert_close(got, wanted, **close)


@pytest.mark.skipif(NO_COMPILER, reason='no C compiler')
def test_opcheck():
    inputs, grad = make_tokens(2)
    torch.library.opcheck(NATIVE, (*inputs, 2))
    torch.library.opcheck(torch.ops.cpool_vision.context_pool_tokens_native_backward.default,
                          (grad, *(t.detach() for t in inputs), 2))


def test_the_input_is_left_as_it_is_and_autocast_applies():
    (x, logits, sigma), _ = make_tokens(1)
    before = x.detach().clone()
    with torch.autocast('cpu', torch.bfloat16):
        y = TOKENS(x, logits, sigma, 1)
    assert y.dtype == torch.bfloat16 and torch.equal(x, before)
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32 and torch.equal(x.grad[:, :1], torch.ones(2, 1, 8))


@pytest.mark.parametrize('prefix', [0, 2])
@pytest.mark.parametrize('groups,supports', [(1, 1), (4, 2)])
def test_the_whole_layer_as_one_operator_is_its_parts(prefix, groups, supports):
    if NO_COMPILER:
        pytest.skip('no C compiler')
    torch.manual_seed(0)
    inputs = [torch.randn(shape).requires_grad_() for shape in (
        (2, prefix + 35, 8), (3, 8, 1, 1), (3,), (groups + supports, 3, 3, 3), (groups + supports,))]
    how = (prefix, 5, 7, groups, supports, 8., .3, .1)
    grad = torch.randn(2, prefix + 35, 8)
    fused = torch.ops.cpool_vision.pool_tokens_fused.default
    with FlopCounterMode(display=False) as counted:
        made = [fused(*inputs, *how, 'native')[0]]
        made += torch.autograd.grad(made[0], inputs, grad)
    with FlopCounterMode(display=False) as counted_parts:
        expected = [compose_layer(*inputs, *how, 'native')]
        expected += torch.autograd.grad(expected[0], inputs, grad)
    for got, want in zip(made, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert torch.equal(torch.ops.cpool_vision.pool_tokens(*inputs, *how), made[0])
    assert counted.get_total_flops() == counted_parts.get_total_flops()
    torch.library.opcheck(fused, (*inputs, *how, 'native'), test_utils=('test_schema', 'test_autograd_registration'))
    y = fused(*inputs, *how, 'native')[0]
    with pytest.raises(NotImplementedError, match="second derivative; use backend='reference'"):
        torch.autograd.grad(torch.autograd.grad(y.sum(), inputs[0], create_graph=True)[0].sum(), inputs[0])
