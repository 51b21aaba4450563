"""What the operator refuses: every entry and every fake checks shapes, dtypes and devices before memory is touched."""
import pytest
import torch
import torch.autograd.forward_ad as fwAD
from ops_testing import FAST_BACKENDS, HOST_BACKENDS, NATIVE, make_case

from cpool_vision.ops import available_backends, context_pool2d

OPS = torch.ops.cpool_vision
ENTRIES = ('context_pool2d', NATIVE, 'tiled', 'triton', 'reference')
MISFITS = {
    'fewer images of logits': lambda x, w, s: (x, w[:1], s),
    'smaller map of logits': lambda x, w, s: (x, w[:, :, :2, :2], s),
    'channels that groups do not divide': lambda x, w, s: (x[:, :5], w, s),
    'fewer images of supports': lambda x, w, s: (x, w, s[:1]),
    'smaller map of supports': lambda x, w, s: (x, w, s[..., 1:]),
    'more groups of supports': lambda x, w, s: (x, w, s.repeat(1, 2, 1, 1)),
    'no groups': lambda x, w, s: (x, w[:, :0], s[:, :0]),
    'three dimensions': lambda x, w, s: (x[0], w[0], s[0]),
    'integers': lambda x, w, s: (x, w.long(), s),
    'no pixels': lambda x, w, s: (x[:, :, :0], w[:, :, :0], s[:, :, :0]),
}


def _call(entry, *args, stride=1):
    op = getattr(OPS, 'context_pool2d' if entry == 'context_pool2d' else f'context_pool2d_{entry}')
    return op(*args, stride)


@pytest.mark.parametrize('entry', ENTRIES)
@pytest.mark.parametrize('misfit', MISFITS)
def test_no_entry_takes_tensors_that_do_not_fit(entry, misfit):
    case = make_case(2, 8, 9, 11, groups=2)
    for device in ('cpu', 'meta'):
        args = MISFITS[misfit](*(t.to(device) for t in case[:3]))
        with pytest.raises((TypeError, ValueError), match='must'):
            _call(entry, *args)


@pytest.mark.parametrize('entry', ENTRIES)
def test_no_entry_takes_a_stride_below_one(entry):
    for device in ('cpu', 'meta'):
        with pytest.raises(ValueError, match='stride must be >= 1, got stride=0'):
            _call(entry, *(t.to(device) for t in make_case(2, 8, 9, 11)[:3]), stride=0)


@pytest.mark.parametrize('backend', FAST_BACKENDS)
@pytest.mark.parametrize('grad', [(1, 8, 9, 11), (2, 7, 9, 11), (2, 8, 9, 10), (2, 8, 99)])
def test_backward_entries_check_the_gradient(backend, grad):
    case = make_case(2, 8, 9, 11, groups=2)
    margins = (torch.zeros(4, 4, 9, 11, dtype=torch.int16),) if backend == 'tiled' else ()
    for device in ('cpu', 'meta'):
        tensors = [t.to(device) for t in (torch.ones(grad), *case[:3], *margins)]
        with pytest.raises(ValueError, match=r'grad must have shape \(2, 8, 9, 11\)'):
            getattr(OPS, f'context_pool2d_{backend}_backward')(*tensors, 1)


def test_backward_entry_checks_the_margins():
    case = make_case(2, 8, 9, 11, groups=2)
    with pytest.raises(ValueError, match='margins must be what the forward pass returned'):
        OPS.context_pool2d_tiled_backward(case[3], *case[:3], torch.zeros(4, 4, 9, 10, dtype=torch.int16), 1)


@pytest.mark.parametrize('backend', [NATIVE])
def test_double_precision_is_refused_where_it_would_be_lost(backend):
    with pytest.raises(NotImplementedError, match="float64 on cpu; pass backend=None"):
        _call(backend, *make_case(1, 4, 6, 5, dtype=torch.float64)[:3])


@pytest.mark.parametrize('backend', HOST_BACKENDS)
def test_no_channels_give_zero_gradients(backend, poisoned_memory):
    x, logits, sigma, _ = (t.requires_grad_() for t in make_case(2, 0, 9, 7, groups=2))
    y = context_pool2d(x, logits, sigma, backend=backend)
    y.sum().backward()
    assert y.shape == (2, 0, 9, 7)
    assert not logits.grad.any() and not sigma.grad.any()


def test_batch_axis_is_asked_for():
    x, logits, sigma, _ = make_case(2, 8, 9, 11)
    with pytest.raises(ValueError, match=r'x must have 4 dimensions .* got shape \(8, 9, 11\); add .* x\[None\]'):
        context_pool2d(x[0], logits, sigma)
    with pytest.raises(ValueError, match=r'x must have 4 dimensions .* got shape \(1, 2, 8, 9, 11\); fold'):
        available_backends(x[None], logits, sigma)


@pytest.mark.parametrize('backend', [None, 'reference'])
def test_forward_mode_derivatives_are_right(backend):
    x, logits, sigma, _ = make_case(1, 4, 6, 5, dtype=torch.float64)
    directions = [torch.randn_like(t) for t in (x, logits, sigma)]
    with fwAD.dual_level():
        duals = [fwAD.make_dual(t, d) for t, d in zip((x, logits, sigma), directions, strict=True)]
        tangent = fwAD.unpack_dual(context_pool2d(*duals, backend=backend)).tangent
    step = 1e-6
    ends = [context_pool2d(*(t + sign * step * d for t, d in zip((x, logits, sigma), directions, strict=True)))
            for sign in (1, -1)]
    torch.testing.assert_close(tangent, (ends[0] - ends[1]) / (2 * step), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize('backend', FAST_BACKENDS)
def test_forward_mode_derivatives_are_never_dropped(backend):
    case = make_case(1, 4, 6, 5)[:3]
    for place in range(3):
        with fwAD.dual_level():
            args = list(case)
            args[place] = fwAD.make_dual(args[place], torch.ones_like(args[place]))
            with pytest.raises(NotImplementedError, match='no forward-mode derivative; pass backend=None'):
                context_pool2d(*args, backend=backend)
            with pytest.raises(NotImplementedError, match="no forward-mode derivative; use backend=None or"):
                _call(backend, *args)


@pytest.mark.parametrize('backend', [None, *HOST_BACKENDS])
def test_vmap_is_one_call_of_a_larger_batch(backend):
    x, logits, sigma, _ = make_case(6, 4, 7, 5, groups=2)
    offset = torch.randn(6, 2, 2, 1, 1) if backend in ('tiled', 'reference') else None
    expected = context_pool2d(x, logits, sigma, backend=backend, offset=offset)
    args = [t.unflatten(0, (3, 2)).movedim(0, 1) for t in (x, logits, sigma)]
    if offset is not None:
        args.append(offset.unflatten(0, (3, 2)))

    def one(x, logits, sigma, offset=None):
        return context_pool2d(x, logits, sigma, backend=backend, offset=offset)

    mapped = torch.func.vmap(one, in_dims=(1, 1, 1, 0)[:len(args)])(*args)
    torch.testing.assert_close(mapped.flatten(0, 1), expected)
    same = torch.func.vmap(one, in_dims=(1, None, None))(args[0], *(t[:, 0] for t in args[1:3]))
    assert same.shape == mapped.shape


def test_torch_func_differentiates_by_the_reference_and_says_what_cannot():
    x, logits, sigma, _ = make_case(3, 4, 6, 5)
    expected = torch.autograd.functional.vjp(lambda x: context_pool2d(x, logits, sigma).square().sum(), x)[1]
    grad = torch.func.grad(lambda x: context_pool2d(x, logits, sigma).square().sum())(x)
    torch.testing.assert_close(grad, expected)
    each = torch.func.vmap(torch.func.grad(lambda *args: context_pool2d(*args).square().sum()))(
        *(t[:, None] for t in (x, logits, sigma)))
    torch.testing.assert_close(each[:, 0], expected)
    tangent = torch.func.jvp(lambda x: context_pool2d(x, logits, sigma), (x,), (x,))[1]
    torch.testing.assert_close(tangent, context_pool2d(x, logits, sigma))
    with pytest.raises(NotImplementedError, match='cannot be transformed by torch.func; pass backend=None'):
        torch.func.grad(lambda x: context_pool2d(x, logits, sigma, backend='tiled').sum())(x)


@pytest.mark.parametrize('backend', HOST_BACKENDS)
@pytest.mark.parametrize('stride', [2 ** 20, 2 ** 62])
def test_huge_strides(stride, backend):
    case = make_case(1, 4, 9, 8, stride=stride, sigma=(0.5, 2.0))
    exact = context_pool2d(*(t.double() for t in case[:3]), stride=stride, backend='reference')
    torch.testing.assert_close(
        context_pool2d(*case[:3], stride=stride, backend=backend), exact.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('backend', HOST_BACKENDS)
def test_large_features_beside_logits_far_apart(backend):
    x, logits, sigma, _ = make_case(1, 4, 9, 8, sigma=(1.0, 3.0))
    logits = logits.fill_(0).index_fill_(3, torch.tensor([0]), 59.)
    x = 1e27 * (x / x.abs().amax())
    exact = context_pool2d(x.double(), logits, sigma, backend='reference')
    y = context_pool2d(x, logits, sigma, backend=backend)
    assert float((y - exact).abs().max()) < 1e-5 * 1e27


@pytest.mark.parametrize('stride', [1, 2, 4])
@pytest.mark.parametrize('support', [1e-3, 1e-4, 1e-12, 1e-30, 1e-40])
def test_small_supports_keep_the_logits(stride, support):
    """Dense eager in fp32 beside the limit: the softmax of the logits of each cell's nearest pixels."""
    x, logits, sigma, grad = make_case(1, 4, 12, 8, groups=2, stride=stride)
    sigma = torch.full_like(sigma, support).requires_grad_()
    y = context_pool2d(x, logits, sigma, stride=stride, backend='reference')
    n = 1 if stride == 1 else 2
    inner = slice((stride - n) // 2, (stride + n) // 2)
    cells = [t.unflatten(3, (-1, stride)).unflatten(2, (-1, stride))[:, :, :, inner, :, inner].transpose(3, 4)
             .flatten(4) for t in (x, logits.repeat_interleave(2, 1))]
    torch.testing.assert_close(y, (cells[0] * cells[1].softmax(-1)).sum(-1), rtol=1e-5, atol=1e-6)
    y.backward(grad)
    assert sigma.grad.isfinite().all()


@pytest.mark.parametrize('backend', [NATIVE])
def test_work_on_a_long_row_follows_its_supports(backend):
    """Pairs that a long row reads, seen in its time beside that of as many pixels in a square map."""
    import time

    def seconds(h, w):
        case = make_case(1, 1, h, w, sigma=(0.5, 1.0))[:3]
        start = time.process_time()
        context_pool2d(*case, backend=backend)
        return time.process_time() - start

    seconds(4, 4)
    assert min(seconds(1, 60000) for _ in range(2)) < 20 * min(seconds(245, 245) for _ in range(2))
