"""The Triton kernels against the fp64 definition: on a CUDA device, or under Triton's interpreter.

The interpreter needs `TRITON_INTERPRET=1` before Triton is imported, so without a CUDA device these tests are skipped
here and run by test_triton_backend.py in a process of their own.
"""
import os

import ops_testing
import pytest
import torch
from ops_testing import dense, make_case, pool, run

from cpool_vision.ops import TOLERANCE, context_pool2d

pytest.importorskip('triton')
INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
DEVICE = 'cuda' if torch.cuda.is_available() and not INTERPRETED else 'cpu'
pytestmark = pytest.mark.skipif(
    DEVICE == 'cpu' and not INTERPRETED, reason='needs CUDA; test_triton_backend.py runs it under the interpreter')

SHAPES = [
    # b, c, h, w, groups, stride, sigma
    (1, 6, 14, 14, 1, 1, (0.1, 1.4)),
    (1, 6, 11, 13, 2, 1, (0.1, 1.5)),
    (1, 4, 15, 17, 1, 2, (0.2, 2.0)),
    (1, 6, 16, 13, 3, 3, (0.2, 1.5)),
    (1, 4, 21, 11, 1, 4, (0.5, 3.0)),
    (1, 4, 9, 10, 1, 1, (8.0, 30.0)),
    (2, 3, 1, 1, 1, 1, (0.1, 1.0)),
    (1, 4, 1, 23, 2, 1, (0.1, 2.0)),
    (1, 4, 23, 1, 1, 2, (0.1, 2.0)),
    (1, 4, 5, 5, 1, 7, (0.5, 2.0)),
    (1, 140, 7, 7, 1, 1, (0.1, 0.7)),
]


def on_device(case):
    return tuple(t.to(DEVICE) for t in case)


def assert_good(case, stride=1):
    ops_testing.assert_as_good_as_eager(on_device(case), 'triton', stride)


def _cases():
    # The interpreter is slow: there half precision goes over fewer shapes.
    fewer = {torch.bfloat16: SHAPES[::2], torch.float16: SHAPES[4:6]} if INTERPRETED else {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for shape in fewer.get(dtype, SHAPES):
            yield pytest.param(shape, dtype, id='-'.join(str(v) for v in (*shape, dtype)))


@pytest.mark.parametrize('shape,dtype', list(_cases()))
def test_errors_stay_within_twice_those_of_dense_eager(shape, dtype, poisoned_memory):
    b, c, h, w, groups, stride, sigma = shape
    assert_good(make_case(b, c, h, w, groups, stride, sigma, dtype=dtype), stride)


@pytest.mark.parametrize('sigma,stride', [((1e-3, 2e-3), 1), ((1e3, 1e4), 2), ((1e-3, 1e3), 1), ((1e-3, 2e-3), 2)])
def test_extreme_supports(sigma, stride):
    assert_good(make_case(1, 4, 10, 9, stride=stride, sigma=sigma), stride)


def test_more_query_tiles_than_are_searched_at_once(monkeypatch):
    from cpool_vision.ops.triton import launch
    monkeypatch.setattr(launch, 'SEARCH', 4)
    case = make_case(1, 2, 1, 77, sigma=(0.1, 0.4))
    assert _reach(case).shape[1] == 10
    assert_good(case)


def test_supports_whose_square_underflows_give_the_identity():
    x, logits, sigma, grad = on_device(make_case(1, 4, 10, 9))
    got = run(pool('triton'), (x, logits, sigma * 0 + 1e-30, grad))
    torch.testing.assert_close(got['y'], x)
    torch.testing.assert_close(got['dx'], grad)
    assert got['dlogits'].abs().max() < 1e-5 and torch.equal(got['dsigma'], torch.zeros_like(sigma))


def test_logits_far_apart():
    assert_good(make_case(1, 4, 13, 10, sigma=(0.2, 1.0), logit_scale=60.0))


def test_half_precision_logits_and_supports():
    x, logits, sigma, grad = make_case(1, 4, 10, 9, dtype=torch.bfloat16)
    assert_good((x, logits.bfloat16(), sigma.bfloat16(), grad))


def test_a_pixel_of_no_weight_is_left_out():
    case = make_case(1, 4, 10, 9)
    case[1][0, 0, :5] = -float('inf')
    assert_good(case)
    ops_testing.assert_absent_pixels_do_nothing(on_device(make_case(1, 4, 13, 16, groups=2, sigma=(.2, 3.))), 'triton')


def test_a_query_without_a_finite_support_spoils_no_other():
    x, logits, sigma, _ = on_device(make_case(1, 4, 10, 9))
    sigma[0, 0, 3, 4] = float('nan')
    y = torch.ops.cpool_vision.context_pool2d(x, logits, sigma, 1, 'triton')
    assert y[0, :, 3, 4].isnan().all()
    assert int(y.isnan().sum()) == 4


def test_constants_are_preserved():
    x, logits, sigma, _ = on_device(make_case(1, 4, 10, 9, dtype=torch.float16))
    y = context_pool2d(torch.full_like(x, 3.25), logits, sigma, backend='triton')
    assert torch.equal(y, torch.full_like(y, 3.25))


@pytest.mark.parametrize('layout', ['channels_last', 'transposed', 'strided', 'tokens'])
@pytest.mark.parametrize('size', [(9, 6)])
def test_any_layout_gives_the_result_of_contiguous_input(layout, size):
    case = x, logits, sigma, grad = on_device(make_case(2, 4, *size))
    expected = run(pool('triton'), case)
    if layout == 'channels_last':
        other = x.to(memory_format=torch.channels_last)
    elif layout == 'transposed':
        other = x.transpose(2, 3).contiguous().transpose(2, 3)
    elif layout == 'strided':
        other = torch.zeros(2, 8, size[0], 2 * size[1], device=DEVICE)[:, ::2, :, ::2].copy_(x)
    else:
        tokens = torch.cat([torch.zeros(2, 1, 4, device=DEVICE), x.flatten(2).transpose(1, 2)], 1)
        other = tokens[:, 1:].transpose(1, 2).unflatten(2, size)
    leaf = other.detach().requires_grad_()
    # Logits and supports as slices of one map, the gradient expanded.
    both = torch.cat([logits, sigma], 1)
    y = context_pool2d(leaf, both[:, :1], both[:, 1:], backend='triton')
    y.backward(grad)
    torch.testing.assert_close(y, expected['y'], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(leaf.grad, expected['dx'], rtol=1e-5, atol=1e-5)
    if layout in ('channels_last', 'tokens'):
        assert y.stride(1) == 1


def test_expanded_gradients():
    x, logits, sigma, _ = on_device(make_case(1, 4, 10, 9))
    ones = torch.ones(1, device=DEVICE).expand(1, 4, 10, 9)
    got, exact = (run(f, (x, logits, sigma, ones)) for f in (pool('triton'), dense()))
    for name, value in exact.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-4, msg=name)


def _reach(case, stride=1):
    x, logits, sigma, _ = on_device(case)
    return torch.ops.cpool_vision.context_pool2d_triton(x, logits, sigma, stride)[2].long()


def count_pairs(reach) -> int:
    return int(((reach[..., 1] - reach[..., 0]) * (reach[..., 3] - reach[..., 2])).sum())


def test_work_falls_with_the_supports():
    pairs = [count_pairs(_reach(make_case(1, 4, 24, 24, sigma=(s / 2, s)))) for s in (9.0, 1.0, 0.2)]
    assert pairs == sorted(set(pairs), reverse=True)
    assert pairs[0] == 9 * 18
    # Each query tile reads itself and one ring of key tiles at most.
    assert pairs[-1] <= 9 * 4 * 3


@pytest.mark.parametrize('stride,sigma,scale', [(1, (0.1, 0.9), 2.0), (2, (0.2, 1.0), 1.0), (3, (0.05, 0.3), 0.0)])
def test_skipped_share_is_certified(stride, sigma, scale):
    """What the tiles in reach leave out weighs no more than the tolerance, counted pixel by pixel in fp64."""
    from cpool_vision.ops.plan import QUERY_TILE
    from cpool_vision.ops.triton.common import KEY_TILE
    case = make_case(1, 1, 30, 29, stride=stride, sigma=sigma, logit_scale=scale)
    (y0, y1, x0, x1), (h, w) = _reach(case, stride)[0].cpu().T, case[0].shape[2:]
    ho, wo = case[2].shape[2:]
    tile = (torch.arange(ho)[:, None] // QUERY_TILE[0] * -(-wo // QUERY_TILE[1])
            + torch.arange(wo) // QUERY_TILE[1]).flatten()
    ky, kx = (torch.arange(h)[:, None] // KEY_TILE[0]), (torch.arange(w) // KEY_TILE[1])
    y0, y1, x0, x1 = (t[tile][:, None, None] for t in (y0, y1, x0, x1))
    skipped = ((ky < y0) | (ky >= y1) | (kx < x0) | (kx >= x1)).flatten(1)
    one_hot = torch.eye(h * w, dtype=torch.float64).view(1, h * w, h, w)
    weights = dense(stride)(one_hot, case[1].double(), case[2].double())[0].flatten(1).T
    share = (weights * skipped).sum(1)
    assert skipped.any(1).all()
    assert float(share.max()) <= TOLERANCE[torch.float32]


def test_a_radius_too_small_is_detected(monkeypatch):
    """Negative control: with a tolerance of almost everything, skipping breaks the bound that the tests assert."""
    monkeypatch.setitem(TOLERANCE, torch.float32, 0.9)
    with pytest.raises(AssertionError, match='error'):
        assert_good(make_case(1, 4, 24, 16, sigma=(1.5, 2.0)))


def test_results_are_deterministic():
    case = on_device(make_case(1, 4, 12, 10, sigma=(0.1, 2.0)))
    first, second = run(pool('triton'), case), run(pool('triton'), case)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_second_derivatives_are_refused():
    inputs = [t.requires_grad_() for t in on_device(make_case(1, 2, 6, 5))[:3]]
    y = context_pool2d(*inputs, backend='triton')
    first = torch.autograd.grad(y.square().sum(), inputs[0], create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="'triton' has no second derivative.*backend='reference'"):
        first.sum().backward()


@pytest.mark.parametrize('groups,channels_last,stride', [(2, False, 2), (1, True, 1)])
def test_opcheck(groups, channels_last, stride):
    x, logits, sigma, grad = on_device(make_case(1, 4, 7, 5, groups=groups, stride=stride))
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    inputs = [t.requires_grad_() for t in (x, logits, sigma)]
    forward = torch.ops.cpool_vision.context_pool2d_triton.default
    torch.library.opcheck(forward, (*inputs, stride))
    kept = forward(*inputs, stride)[1:]
    torch.library.opcheck(
        torch.ops.cpool_vision.context_pool2d_triton_backward.default,
        (grad, *(t.detach() for t in (*inputs, *kept)), stride))


def test_compile_without_graph_breaks():
    torch.compiler.reset()
    compiled = torch.compile(pool('triton'), fullgraph=True, dynamic=False, backend='aot_eager')
    case = on_device(make_case(1, 4, 9, 7))
    expected = run(pool('triton'), case)
    for name, value in run(compiled, case).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-6)


def test_empty_batch():
    x, logits, sigma, _ = on_device(make_case(0, 4, 9, 7))
    x.requires_grad_()
    y = context_pool2d(x, logits, sigma, backend='triton')
    y.sum().backward()
    assert y.shape == (0, 4, 9, 7) and x.grad.shape == x.shape
