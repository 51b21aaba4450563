"""Values and gradients against the fp64 definition, and the properties that the definition implies."""
import random

import pytest
import torch
from ops_testing import (
    FAST_BACKENDS,
    HOST_BACKENDS,
    NO_COMPILER,
    assert_absent_pixels_do_nothing,
    assert_as_good_as_eager,
    dense,
    make_case,
    pool,
    run,
)

from cpool_vision.ops import context_pool2d, plan
from cpool_vision.ops.native import native_backward
from cpool_vision.ops.plan import BY_SOFTMAX
from cpool_vision.ops.tiled import tiled_forward

SHAPES = [
    # b, c, h, w, groups, stride, sigma
    (2, 6, 14, 14, 1, 1, (0.1, 1.4)),
    (2, 6, 28, 28, 1, 1, (0.1, 1.0)),
    (1, 8, 56, 56, 1, 1, (0.1, 5.6)),
    (2, 8, 41, 29, 2, 1, (0.1, 1.5)),
    (1, 4, 37, 64, 4, 1, (0.3, 2.0)),
    (2, 4, 33, 47, 1, 2, (0.2, 2.0)),
    (1, 6, 50, 31, 3, 3, (0.2, 1.5)),
    (1, 4, 61, 23, 1, 4, (0.5, 3.0)),
    (2, 4, 29, 30, 1, 1, (8.0, 30.0)),
    (2, 3, 1, 1, 1, 1, (0.1, 1.0)),
    (2, 4, 1, 53, 2, 1, (0.1, 2.0)),
    (2, 4, 53, 1, 1, 2, (0.1, 2.0)),
    (2, 4, 5, 5, 1, 7, (0.5, 2.0)),
]


@pytest.mark.parametrize('shape', SHAPES, ids=lambda s: '-'.join(str(v) for v in s))
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize('backend', FAST_BACKENDS)
def test_errors_stay_within_twice_those_of_dense_eager(shape, dtype, backend, poisoned_memory):
    b, c, h, w, groups, stride, sigma = shape
    assert_as_good_as_eager(make_case(b, c, h, w, groups, stride, sigma, dtype=dtype), backend, stride)


@pytest.mark.parametrize('backend', FAST_BACKENDS)
@pytest.mark.parametrize('index', range(16))
def test_random_shapes(index, backend):
    rng = random.Random(index)  # noqa: S311
    groups = rng.choice((1, 1, 2, 3))
    stride = rng.choice((1, 1, 1, 2, 3))
    largest = rng.choice((0.4, 1.0, 3.0, 9.0))
    case = make_case(
        rng.randint(1, 3), groups * rng.randint(1, 5), rng.randint(1, 60), rng.randint(1, 60), groups, stride,
        (0.05, largest), rng.choice((0.0, 1.0, 4.0)), seed=index)
    assert_as_good_as_eager(case, backend, stride)


@pytest.mark.parametrize('backend', FAST_BACKENDS)
@pytest.mark.parametrize('sigma', [(1e-3, 2e-3), (1e3, 1e4), (1e-3, 1e3)])
def test_extreme_supports(sigma, backend):
    assert_as_good_as_eager(make_case(2, 4, 34, 30, sigma=sigma), backend)


@pytest.mark.parametrize('backend', FAST_BACKENDS)
@pytest.mark.parametrize('shape', [
    (1, 3, 8, 9, 1, 1, (0.05, 0.4)),
    (2, 12, 5, 8, 3, 1, (0.05, 0.4)),
    (2, 2, 7, 1, 2, 1, (0.05, 1.0)),
], ids=lambda s: '-'.join(str(v) for v in s))
def test_what_small_supports_leave_out_is_not_seen_in_their_gradient(shape, backend):
    for seed in range(20):
        assert_as_good_as_eager(make_case(*shape, logit_scale=seed % 2, seed=seed), backend, shape[5])


@pytest.mark.parametrize('backend', FAST_BACKENDS)
def test_logits_far_apart_do_not_underflow(backend):
    assert_as_good_as_eager(make_case(1, 4, 32, 30, sigma=(0.2, 1.0), logit_scale=60.0), backend)


@pytest.mark.parametrize('backend', HOST_BACKENDS)
@pytest.mark.parametrize('size, largest', [((9, 12), 3.), ((41, 30), 1.5), ((41, 30), 40.)])
def test_pixels_of_logit_minus_infinity_are_absent(size, largest, backend):
    assert_absent_pixels_do_nothing(make_case(2, 4, *size, groups=2, sigma=(.2, largest)), backend)


def test_bound_detects_a_wrong_result():
    case = make_case(1, 4, 30, 30, sigma=(0.5, 1.0))
    wrong = (case[0], case[1], case[2] * 1.001, case[3])
    got, oracle = run(pool('tiled'), wrong), run(dense(), case, dtype=torch.float64)
    assert float((got['y'] - oracle['y']).abs().max()) > 1e-5


@pytest.mark.parametrize('stride,groups', [(1, 1), (1, 2), (2, 2)])
def test_gradcheck(stride, groups):
    for h, w, largest in ((6, 5, 1.0), (31, 3, 0.8)):
        x, logits, sigma, _ = make_case(1, 4, h, w, groups, stride, (0.3, largest), dtype=torch.float64)
        for t in (x, logits, sigma):
            t.requires_grad_()
        assert torch.autograd.gradcheck(pool('tiled', stride), (x, logits, sigma), fast_mode=h > 10)


def _windows(case, stride=1):
    margins = tiled_forward(*case[:3], stride)[1]
    h, w = case[0].shape[2:]
    bands = list(plan.iter_bands(margins, h, w, case[0].shape[1]))
    return margins, sum((b.b1 - b.b0) * (b.c1 - b.c0) * (s.r1 - s.r0) * (s.y1 - s.y0) * (b.x1 - b.x0)
                        for b in bands for s in b.strips)


def test_work_falls_with_the_supports():
    pairs = [_windows(make_case(1, 4, 56, 56, sigma=(s / 2, s)))[1] for s in (6.0, 3.0, 1.0, 0.3)]
    assert pairs == sorted(pairs, reverse=True)
    assert pairs[0] < 56 ** 4
    assert pairs[-1] < 0.2 * 56 ** 4


@pytest.mark.parametrize('largest', [0.5, 2.0, 4.0])
def test_truncated_share_is_certified(largest):
    """What the margins leave out weighs no more than the tolerance, counted pixel by pixel in fp64."""
    x, logits, sigma, _ = make_case(1, 1, 45, 40, sigma=(0.1, largest), logit_scale=2.0)
    margins = tiled_forward(x, logits, sigma, 1)[1]
    top, bottom, left, right = margins[:, 0].reshape(4, -1).long()
    rows, cols = torch.arange(45)[:, None], torch.arange(40)[None, :]
    outside = ((rows < top[:, None, None]) | (rows >= 45 - bottom[:, None, None])
               | (cols < left[:, None, None]) | (cols >= 40 - right[:, None, None]))
    one_hot_sum = []
    for start in range(0, 1800, 300):
        part = slice(start, start + 300)
        dist = ((rows - (torch.arange(1800)[part] // 40)[:, None, None]) ** 2
                + (cols - (torch.arange(1800)[part] % 40)[:, None, None]) ** 2).double()
        weight = (logits[0].double() - dist / (2 * sigma.double().flatten()[part, None, None] ** 2)).flatten(1)
        one_hot_sum.append((weight.softmax(1) * outside[part].flatten(1)).sum(1))
    share = torch.cat(one_hot_sum)
    assert outside.any()
    assert 0 < float(share.max()) <= plan.TOLERANCE[torch.float32] * 1.01
    # The certificate is tight: a hundredth of the tolerance would not be met.
    assert float(share.max()) > plan.TOLERANCE[torch.float32] / 100


def test_small_maps_and_far_logits_go_by_softmax():
    for case, by_softmax in (
            (make_case(1, 4, 14, 14, sigma=(0.1, 1.4)), True),
            (make_case(1, 4, 30, 30, sigma=(0.1, 1.4), logit_scale=40.0), True),
            (make_case(1, 4, 30, 30, sigma=(0.1, 1.4)), False),
    ):
        margins = tiled_forward(*case[:3], 1)[1]
        assert bool((margins == BY_SOFTMAX).all()) is by_softmax


@pytest.mark.parametrize('backend', HOST_BACKENDS)
class TestProperties:

    def test_constants_are_preserved(self, backend):
        x, logits, sigma, _ = make_case(1, 4, 40, 30)
        y = context_pool2d(torch.full_like(x, 3.25), logits, sigma, backend=backend)
        torch.testing.assert_close(y, torch.full_like(y, 3.25), rtol=1e-6, atol=0)

    def test_output_stays_between_min_and_max(self, backend):
        x, logits, sigma, _ = make_case(1, 4, 40, 30, sigma=(0.1, 5.0))
        y = context_pool2d(x, logits, sigma, backend=backend)
        assert float(y.max()) <= float(x.max()) * (1 + 1e-6)
        assert float(y.min()) >= float(x.min()) * (1 + 1e-6)

    def test_small_supports_give_the_identity(self, backend):
        x, logits, sigma, _ = make_case(1, 4, 40, 30)
        y = context_pool2d(x, logits, torch.full_like(sigma, 0.02), backend=backend)
        torch.testing.assert_close(y, x, rtol=1e-6, atol=1e-7)

    def test_large_supports_give_the_weighted_mean(self, backend):
        x, logits, sigma, _ = make_case(1, 4, 40, 30)
        y = context_pool2d(x, logits, torch.full_like(sigma, 1e6), backend=backend)
        mean = (logits.flatten(2).softmax(-1) * x.flatten(2)).sum(-1)[..., None, None]
        torch.testing.assert_close(y, mean.expand_as(y), rtol=1e-4, atol=1e-5)

    def test_a_constant_in_the_logits_changes_nothing(self, backend):
        x, logits, sigma, _ = make_case(1, 4, 40, 30)
        y = context_pool2d(x, logits, sigma, backend=backend)
        torch.testing.assert_close(context_pool2d(x, logits + 7.5, sigma, backend=backend), y, rtol=1e-4, atol=1e-5)

    def test_shifts_commute_away_from_borders(self, backend):
        x, logits, sigma, _ = make_case(1, 4, 48, 48, sigma=(0.3, 1.0))
        y = context_pool2d(x, logits, sigma, backend=backend)
        shifted = [t.roll((5, 3), (2, 3)) for t in (x, logits, sigma)]
        inner = (..., slice(16, 32), slice(16, 32))
        torch.testing.assert_close(
            context_pool2d(*shifted, backend=backend)[inner], y.roll((5, 3), (2, 3))[inner], rtol=1e-4, atol=1e-5)

    def test_maps_do_not_mix(self, backend):
        x, logits, sigma, _ = make_case(3, 4, 40, 30)
        y = context_pool2d(x, logits, sigma, backend=backend)
        alone = context_pool2d(x[1:2], logits[1:2], sigma[1:2], backend=backend)
        torch.testing.assert_close(y[1:2], alone, rtol=1e-5, atol=1e-5)

    def test_groups_pool_their_own_channels(self, backend):
        x, logits, sigma, _ = make_case(2, 6, 40, 30, groups=3)
        y = context_pool2d(x, logits, sigma, backend=backend)
        for g in range(3):
            part = context_pool2d(x[:, 2 * g:2 * g + 2], logits[:, g:g + 1], sigma[:, g:g + 1], backend=backend)
            torch.testing.assert_close(y[:, 2 * g:2 * g + 2], part, rtol=1e-5, atol=1e-5)

    def test_empty_batch(self, backend):
        x, logits, sigma, _ = make_case(0, 4, 30, 30)
        x.requires_grad_()
        y = context_pool2d(x, logits, sigma, backend=backend)
        y.sum().backward()
        assert y.shape == (0, 4, 30, 30)
        assert x.grad.shape == x.shape

    def test_not_finite_features_are_not_hidden(self, backend):
        x, logits, sigma, _ = make_case(1, 4, 40, 30)
        x[0, 0, 20, 15] = float('nan')
        assert context_pool2d(x, logits, sigma, backend=backend)[0, 0, 20, 15].isnan()


def test_a_support_that_is_not_finite_poisons_its_query_only_inside_models():
    x, logits, sigma, _ = make_case(1, 4, 40, 30)
    sigma[0, 0, 3, 4] = float('nan')
    y = torch.ops.cpool_vision.context_pool2d(x, logits, sigma)
    assert y[0, :, 3, 4].isnan().all()


@pytest.mark.parametrize('size', [14, 30])
@pytest.mark.parametrize('groups,layout', [(1, torch.contiguous_format), (1, torch.channels_last),
                                           (2, torch.contiguous_format)])
@pytest.mark.parametrize('backend', FAST_BACKENDS)
def test_result_may_be_changed_in_place(size, groups, layout, backend):
    x, logits, sigma, _ = make_case(2, 4, size, size, groups)
    x = x.to(memory_format=layout).requires_grad_()
    y = context_pool2d(x, logits, sigma, backend=backend)
    y.mul_(2).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize('backend', FAST_BACKENDS)
def test_results_are_deterministic(backend):
    case = make_case(2, 8, 44, 40, sigma=(0.1, 3.0))
    first, second = run(pool(backend), case), run(pool(backend), case)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.skipif(NO_COMPILER, reason='no C compiler')
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
def test_a_given_gradient_in_half_precision_is_rounded_once(dtype, layout):
    x, logits, sigma, grad = make_case(2, 16, 13, 11, 2, dtype=dtype)
    exact = run(dense(), (x, logits, sigma, grad), dtype=torch.float64)['dx']
    dx = torch.full_like(x, float('nan'), memory_format=layout)
    given = native_backward(grad, x, logits, sigma, 1, dx)[0]
    assert given is dx and dx.dtype == dtype
    error = (dx.double() - exact).abs()
    assert bool((error <= 0.5 * torch.finfo(dtype).eps * exact.abs() + 1e-5).all()), float(error.max())
