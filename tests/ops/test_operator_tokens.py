"""Tokens behind a prefix: values and gradients are those of the map, and the prefix passes."""
import pytest
import torch
from ops_testing import NO_COMPILER

from cpool_vision.ops import available_backends

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
