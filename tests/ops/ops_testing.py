"""Inputs, oracle and error bounds shared by the operator tests."""

import pytest
import torch
from torch import Tensor

from cpool_vision.ops import context_pool2d, context_pool2d_reference, native

# Those that run on the tensors of a CPU without more ado; test_triton_*.py are about the other.
# The kernels in C are left out only where there is nothing to compile them with: a failing build is a failure.
NO_COMPILER = 'no C compiler' in (native.why_not() or '')
NATIVE = pytest.param('native', marks=pytest.mark.skipif(NO_COMPILER, reason='no C compiler'))
FAST_BACKENDS = (NATIVE, 'tiled')
HOST_BACKENDS = (*FAST_BACKENDS, 'reference')

Case = tuple[Tensor, Tensor, Tensor, Tensor]


def make_case(
        b: int, c: int, h: int, w: int, groups: int = 1, stride: int = 1, sigma: tuple[float, float] = (0.1, 2.0),
        logit_scale: float = 1.0, dtype: torch.dtype = torch.float32, seed: int = 0,
) -> Case:
    """Features, logits, supports and an incoming gradient; logits and supports are at least fp32."""
    gen = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)
    ho, wo = -(-h // stride), -(-w // stride)
    x = torch.randn(b, c, h, w, generator=gen).to(dtype)
    logits = (torch.randn(b, groups, h, w, generator=gen) * logit_scale).to(wide)
    low, high = sigma
    support = (low + (high - low) * torch.rand(b, groups, ho, wo, generator=gen)).to(wide)
    grad = torch.randn(b, c, ho, wo, generator=gen).to(dtype)
    return x, logits, support, grad


def run(function, case: Case, stride: int = 1, dtype: torch.dtype = None) -> dict[str, Tensor]:
    """Output and every gradient of `function(x, logits, sigma)`, computed on inputs of `dtype`."""
    x, logits, sigma = (t.detach().clone() if dtype is None else t.detach().to(dtype) for t in case[:3])
    for t in (x, logits, sigma):
        t.requires_grad_()
    y = function(x, logits, sigma)
    y.backward(case[3].to(y.dtype))
    return {'y': y.detach(), 'dx': x.grad, 'dlogits': logits.grad, 'dsigma': sigma.grad}


def pool(backend: str, stride: int = 1):
    return lambda x, logits, sigma: context_pool2d(x, logits, sigma, stride=stride, backend=backend)


def dense(stride: int = 1):
    return lambda x, logits, sigma: context_pool2d_reference(x, logits, sigma, stride)


def support_slopes(case: Case, stride: int) -> Tensor:
    """`E[d^2] / sigma^3` of every output cell in fp64: how fast its weights' logarithms move with its support.

    Summed over the groups that share it.
    """
    x, logits, sigma = (t.detach().double() for t in case[:3])
    (b, groups, h, w), (ho, wo) = logits.shape, sigma.shape[2:]
    rows, cols = torch.meshgrid(torch.arange(h).to(x), torch.arange(w).to(x), indexing='ij')
    moments = torch.stack((rows ** 2 + cols ** 2, rows, cols)).repeat(b, groups, 1, 1)
    square, y, x = dense(stride)(moments, logits, sigma).view(b, groups, 3, ho, wo).unbind(2)
    qy, qx = ((stride * torch.arange(n) + (stride - 1) / 2).to(x) for n in (ho, wo))
    qy = qy[:, None]
    moment = (square - 2 * (qy * y + qx * x) + qy ** 2 + qx ** 2).clamp(min=0)
    return moment.unflatten(1, (sigma.shape[1], -1)).sum(2) / sigma.clamp(min=1e-9) ** 3


def assert_as_good_as_eager(case: Case, backend: str, stride: int = 1) -> None:
    """`assert_close_to_definition` of a backend."""
    assert_close_to_definition(pool(backend, stride), dense(stride), case, stride)


def assert_close_to_definition(function, eager, case: Case, stride: int = 1, share: float = 0.) -> None:
    """Against `eager` in fp64, mean and max errors stay below twice those of `eager` plus the dtype's rounding.

    The gradients of logits and supports are differences of `dy . x`, so rounding is relative to those products. That of
    a support multiplies them by the slope of its weights, steep where a small support meets a strong neighbor. A
    further `share` of a query's weight may be wrong.
    """
    peaks = [t.double().abs().amax((2, 3)) for t in (case[3], case[0])]
    products = float((peaks[0] * peaks[1]).sum(1).amax())
    scales = {
        'dlogits': case[0].new_tensor(products, dtype=torch.float64),
        'dsigma': products * support_slopes(case, stride).clamp(min=1),
    }
    got = run(function, case)
    rounded = run(eager, case)
    oracle = run(eager, case, dtype=torch.float64)
    for name, exact in oracle.items():
        assert got[name].dtype == rounded[name].dtype, name
        assert got[name].shape == exact.shape, name
        assert torch.isfinite(got[name]).all(), f'{name} is not finite'
        scale = exact.abs().max()
        floor = (torch.finfo(rounded[name].dtype).eps + share) * torch.maximum(scales.get(name, scale), scale)
        error = (got[name].double() - exact).abs()
        eager_error = (rounded[name].double() - exact).abs()
        assert float((error - 2 * floor).max()) <= 2 * float(eager_error.max()), (
            f'{name}: max error {float(error.max()):.2e}, eager {float(eager_error.max()):.2e}, '
            f'floor {float(floor.max()):.1e}')
        assert float(error.mean()) <= 2 * (float(eager_error.mean()) + float(floor.mean()) / 4), (
            f'{name}: mean error {float(error.mean()):.2e}, eager {float(eager_error.mean()):.2e}, '
            f'floor {float(floor.mean()):.1e}')


def assert_absent_pixels_do_nothing(case: Case, backend: str) -> None:
    """Pixels of logit -inf: pooled and differentiated as the map that ends before them, whatever their features are."""
    x, logits, sigma, grad = (t.clone() for t in case)
    h, w = x.shape[2] - 4, x.shape[3] - 7
    part = tuple(t[..., :h, :w].contiguous() for t in case)
    for t, fill in ((x, 1e4), (logits, -float('inf')), (grad, 0.)):
        t[:, :, h:], t[..., w:] = fill, fill
    got, expected = run(pool(backend), (x, logits, sigma, grad)), run(dense(), part)
    for name, value in expected.items():
        torch.testing.assert_close(got[name][..., :h, :w], value, rtol=1e-3, atol=1e-4)
    for name in ('dx', 'dlogits', 'dsigma'):
        outside = got[name].clone()
        outside[..., :h, :w] = 0
        assert not outside.any(), name
