"""The Triton kernels against the fp64 definition: on a CUDA device, or under Triton's interpreter.

The interpreter needs `TRITON_INTERPRET=1` before Triton is imported, so without a CUDA device these tests are skipped
here and run by test_triton_backend.py in a process of their own.
"""
import functools
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
    (1, 6, 9, 10, 1, 1, (0.1, 1.4)),
    (2, 6, 5, 13, 2, 1, (0.1, 1.5)),
    (1, 4, 9, 17, 1, 2, (0.2, 2.0)),
    (1, 6, 10, 7, 3, 3, (0.2, 1.5)),
    (1, 4, 21, 11, 1, 4, (0.5, 3.0)),
    (1, 4, 9, 10, 1, 1, (8.0, 30.0)),
    (2, 3, 1, 1, 1, 1, (0.1, 1.0)),
    (1, 4, 1, 23, 2, 1, (0.1, 2.0)),
    (1, 4, 23, 1, 1, 2, (0.1, 2.0)),
    # One cell an image: a mean over few values would be luck.
    (8, 16, 5, 5, 1, 7, (0.5, 2.0)),
    (1, 140, 7, 7, 1, 1, (0.1, 0.7)),
    (1, 48, 6, 5, 1, 1, (0.1, 0.7)),
    # Maps that are not read whole.
    (1, 3, 34, 8, 1, 1, (0.1, 0.6)),
    (1, 3, 8, 34, 1, 2, (0.1, 0.6)),
]


def fewer(cases, step):
    """All cases on a device; of the slow interpreter every `step`-th, chosen so that each value still occurs."""
    cases = list(cases)
    return cases[::step] if INTERPRETED else cases


@pytest.fixture(autouse=True)
def fresh_launches():
    """Of every test, which may have replaced what they are chosen by."""
    from cpool_vision.ops.triton.launch import forget_launches
    forget_launches()
    yield
    forget_launches()


def on_device(case):
    return tuple(t.to(DEVICE) for t in case)


def assert_good(case, stride=1):
    ops_testing.assert_as_good_as_eager(on_device(case), 'triton', stride)


def _cases():
    some = {torch.bfloat16: SHAPES[::5], torch.float16: SHAPES[1::5]} if INTERPRETED else {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for shape in some.get(dtype, SHAPES):
            yield pytest.param(shape, dtype, id='-'.join(str(v) for v in (*shape, dtype)))


@pytest.mark.parametrize('shape,dtype', list(_cases()))
def test_errors_stay_within_twice_those_of_dense_eager(shape, dtype, poisoned_memory):
    b, c, h, w, groups, stride, sigma = shape
    assert_good(make_case(b, c, h, w, groups, stride, sigma, dtype=dtype), stride)


@pytest.mark.parametrize('sigma,stride', [((1e-3, 2e-3), 1), ((1e3, 1e4), 2), ((1e-3, 1e3), 1), ((1e-3, 2e-3), 2)])
def test_extreme_supports(sigma, stride):
    assert_good(make_case(1, 4, 10, 9, stride=stride, sigma=sigma), stride)


def test_supports_whose_square_underflows_give_the_identity():
    x, logits, sigma, grad = on_device(make_case(1, 4, 10, 9))
    got = run(pool('triton'), (x, logits, sigma * 0 + 1e-30, grad))
    torch.testing.assert_close(got['y'], x)
    torch.testing.assert_close(got['dx'], grad)
    assert got['dlogits'].abs().max() < 1e-5 and torch.equal(got['dsigma'], torch.zeros_like(sigma))


@pytest.mark.parametrize('height,stride,dtype', fewer(
    ((*size, dtype) for size in ((7, 1), (34, 2)) for dtype in (torch.float32, torch.float16)), 3))
def test_logits_far_apart(height, stride, dtype):
    assert_good(make_case(1, 4, height, 8, stride=stride, sigma=(0.2, 1.0), logit_scale=60.0, dtype=dtype), stride)


@pytest.mark.parametrize('spread', [15.0, 25.0, 50.0])
def test_one_pixel_far_above_the_others(spread):
    """On both sides of what sums relative to the largest logit can hold."""
    for dtype in (torch.float32, torch.float16):
        case = make_case(1, 4, 7, 6, sigma=(0.1, 1.0), dtype=dtype)
        case[1][0, 0, 3, 3] += spread
        assert_good(case)


def test_half_precision_logits_and_supports():
    x, logits, sigma, grad = make_case(1, 4, 10, 9, dtype=torch.bfloat16)
    assert_good((x, logits.bfloat16(), sigma.bfloat16(), grad))


def test_a_pixel_of_no_weight_is_left_out():
    case = make_case(1, 4, 10, 9)
    case[1][0, 0, :5] = -float('inf')
    assert_good(case)
    ops_testing.assert_absent_pixels_do_nothing(on_device(make_case(1, 4, 9, 12, groups=2, sigma=(.2, 3.))), 'triton')


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


@functools.cache
def _contiguous():
    case = on_device(make_case(2, 4, 6, 5))
    return case, run(pool('triton'), case)


@pytest.mark.parametrize('layout', ['channels_last', 'transposed', 'strided', 'tokens'])
def test_any_layout_gives_the_result_of_contiguous_input(layout):
    (x, logits, sigma, grad), expected = _contiguous()
    if layout == 'channels_last':
        other = x.to(memory_format=torch.channels_last)
    elif layout == 'transposed':
        other = x.transpose(2, 3).contiguous().transpose(2, 3)
    elif layout == 'strided':
        other = torch.zeros(2, 8, 6, 10, device=DEVICE)[:, ::2, :, ::2].copy_(x)
    else:
        tokens = torch.cat([torch.zeros(2, 1, 4, device=DEVICE), x.flatten(2).transpose(1, 2)], 1)
        other = tokens[:, 1:].transpose(1, 2).unflatten(2, (6, 5))
    leaf = other.detach().requires_grad_()
    # Logits and supports as slices of one map, the gradient expanded.
    both = torch.cat([logits, sigma], 1)
    y = context_pool2d(leaf, both[:, :1], both[:, 1:], backend='triton')
    y.backward(grad)
    torch.testing.assert_close(y, expected['y'], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(leaf.grad, expected['dx'], rtol=1e-5, atol=1e-5)
    if layout in ('channels_last', 'tokens'):
        assert y.stride(1) == 1


def test_results_go_where_they_are_wanted():
    """The pooled maps and the gradient of the features, written behind a prefix token that stays."""
    from cpool_vision.ops.triton.launch import triton_backward, triton_forward
    x, logits, sigma, grad = on_device(make_case(2, 6, 5, 7, groups=2))

    def behind_a_token():
        tokens = torch.full((2, 36, 6), 7.0, device=DEVICE)
        return tokens, tokens[:, 1:].transpose(1, 2).unflatten(2, (5, 7))

    y, kept = triton_forward(x, logits, sigma, 1)
    tokens, out = behind_a_token()
    assert triton_forward(x, logits, sigma, 1, out=out)[0] is out
    assert torch.equal(out, y) and (tokens[:, 0] == 7).all()
    expected = triton_backward(grad, x, logits, sigma, kept, 1)
    tokens, dx = behind_a_token()
    got = triton_backward(grad, x, logits, sigma, kept, 1, dx=dx)
    assert got[0] is dx and (tokens[:, 0] == 7).all()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize('groups,support_groups', [(4, 2), (3, 1)])
def test_supports_shared_by_groups(groups, support_groups):
    x, logits, sigma, grad = on_device(make_case(1, 12, 5, 7, groups=groups))
    sigma = sigma[:, :support_groups]
    n = groups // support_groups
    expected = run(dense(), (x, logits, sigma.repeat_interleave(n, 1), grad))
    forward = torch.ops.cpool_vision.context_pool2d_triton
    got = run(lambda *inputs: forward(*inputs, 1)[0], (x, logits, sigma, grad))
    expected['dsigma'] = expected['dsigma'].unflatten(1, (support_groups, n)).sum(2)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-4, msg=name)


def test_offsets_beyond_32_bits(monkeypatch):
    from cpool_vision.ops.triton import launch
    strided = torch.empty(0, device='meta').as_strided((1, 2, 2, 9), (0, 2 ** 31, 9, 1))
    assert launch.needs_wide_index((strided.shape, strided.stride()))
    small = torch.empty(9, 64, 99, 99, device='meta')
    assert not launch.needs_wide_index((small.shape, small.stride()))
    case = on_device(make_case(1, 48, 3, 5))
    expected = run(pool('triton'), case)
    monkeypatch.setattr(launch, 'needs_wide_index', lambda *_: True)
    launch.forget_launches()
    got = run(pool('triton'), case)
    assert all(torch.equal(got[name], expected[name]) for name in got)


@pytest.mark.parametrize('where', ['features', 'logits'])
def test_not_a_number_in_and_out(where):
    x, logits, sigma, grad = on_device(make_case(2, 4, 5, 6, groups=2))
    (x if where == 'features' else logits)[0, 0, 2, 3] = float('nan')
    got = run(pool('triton'), (x, logits, sigma, grad))
    exact = run(dense(), (x, logits, sigma, grad))
    for name in got:
        assert torch.equal(got[name].isnan(), exact[name].isnan()), name


def test_expanded_gradients():
    x, logits, sigma, _ = on_device(make_case(1, 4, 10, 9))
    ones = torch.ones(1, device=DEVICE).expand(1, 4, 10, 9)
    got, exact = (run(f, (x, logits, sigma, ones)) for f in (pool('triton'), dense()))
    for name, value in exact.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-4, msg=name)


def _pixels_left_out(case, stride=1):
    """`(Ho Wo, H W)`: whether a query never touches a pixel, whose value would else make its result no number."""
    h, w = case[0].shape[2:]
    x = torch.zeros(1, h * w, h, w, device=DEVICE)
    x.view(h * w, h * w).fill_diagonal_(float('nan'))
    y = torch.ops.cpool_vision.context_pool2d_triton(x, *on_device(case[1:3]), stride)[0]
    return ~y[0].flatten(1).T.isnan().cpu()


def test_work_falls_with_the_supports(monkeypatch):
    monkeypatch.setattr('cpool_vision.ops.triton.launch.WHOLE_UP_TO', 0)
    left_out = [_pixels_left_out(make_case(1, 1, 22, 8, sigma=(s / 2, s))) for s in (20.0, 1.0, 0.2)]
    shares = [float(each.double().mean()) for each in left_out]
    assert shares == sorted(set(shares))
    assert shares[0] == 0 and shares[-1] > 0.4


@pytest.mark.parametrize('stride,sigma,scale', [(1, (0.1, 0.9), 2.0), (2, (0.2, 1.0), 1.0), (3, (0.05, 0.3), 0.0)])
def test_skipped_share_is_certified(stride, sigma, scale, monkeypatch):
    """What a tile leaves out weighs no more than the tolerance, counted pixel by pixel in fp64."""
    monkeypatch.setattr('cpool_vision.ops.triton.launch.WHOLE_UP_TO', 0)
    case = make_case(1, 1, 30, 8, stride=stride, sigma=sigma, logit_scale=scale)
    skipped = _pixels_left_out(case, stride)
    one_hot = torch.eye(30 * 8, dtype=torch.float64).view(1, 30 * 8, 30, 8)
    weights = dense(stride)(one_hot, case[1].double(), case[2].double())[0].flatten(1).T
    assert skipped.any(1).double().mean() > 0.5
    assert float((weights * skipped).sum(1).max()) <= TOLERANCE[torch.float32]


def test_a_radius_too_small_is_detected(monkeypatch):
    """Negative control: with a tolerance of almost everything, skipping breaks the bound that the tests assert."""
    monkeypatch.setitem(TOLERANCE, torch.float32, 0.9)
    with pytest.raises(AssertionError, match='error'):
        assert_good(make_case(1, 4, 34, 8, sigma=(1.5, 2.0)))


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
    x, logits, sigma, grad = on_device(make_case(1, 4, 4, 3, groups=groups, stride=stride))
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
