"""The Triton kernels of the predictor: on a CUDA device or under the interpreter, as test_triton_kernels.py."""
import itertools

import pytest
import torch
from test_operator_predictor import CASES, make_inputs
from test_triton_kernels import DEVICE, INTERPRETED, fewer
from test_triton_kernels import pytestmark as pytestmark

from cpool_vision.ops.layer import compose_layer
from cpool_vision.ops.maps import empty_pair
from cpool_vision.ops.predictor import compose_maps

MORE = [
    ((1, 9, 24, 8, 8), (16, 16, 1, 8., .25, .1)),
    ((0, 8, 17, 9, 8), (4, 2, 2, 8., .25, .1)),
]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def run_kernels(inputs, how, grads=None):
    """Maps, and the gradients of all inputs, in the order of the operator."""
    from cpool_vision.ops.triton.predictor import fill_predicted, predicted_gradients
    x, reduce_weight, reduce_bias, *predict = inputs
    height, width, groups, supports, stride, bound, ratio, floor = how
    hidden = x @ reduce_weight.flatten(1).to(x.dtype).t()
    maps = empty_pair(x, x.shape[0], height, width, groups, supports, stride)
    last = stride, bound, ratio * (height * width) ** .5, floor
    fill_predicted(hidden, reduce_bias, *predict, *maps, *last)
    grads = grads or [torch.randn_like(t) for t in maps]
    made = predicted_gradients(*grads, *maps, hidden, reduce_bias, *predict, *last)
    dx = made[0] @ reduce_weight.flatten(1).to(x.dtype)
    return maps, grads, (dx, (made[0].flatten(0, 1).t() @ x.flatten(0, 1)).view_as(reduce_weight), *made[1:])


def run_torch(inputs, how, grads, dtype):
    leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
    maps = compose_maps(*leaves, *how)
    return *maps, *torch.autograd.grad(maps, leaves, [g.to(m.dtype) for g, m in zip(grads, maps, strict=True)])


@pytest.fixture
def few_parts(monkeypatch):
    """Sums of few parts, of several blocks each: the interpreter takes seconds for as many as a device needs."""
    if INTERPRETED:
        monkeypatch.setattr('cpool_vision.ops.triton.predictor.PARTS', 2)


def check_errors(case, dtype):
    inputs, how = make_inputs(case, dtype)
    inputs = [t.to(DEVICE) for t in inputs]
    maps, grads, found = run_kernels(inputs, how)
    exact = run_torch(inputs, how, grads, torch.float64)
    for got, plain, want in zip((*maps, *found), run_torch(inputs, how, grads, dtype), exact, strict=True):
        assert got.isfinite().all()
        error, allowed = ((t.double() - want).abs().max() for t in (got, plain))
        assert error <= 2 * allowed + torch.finfo(got.dtype).eps * want.abs().max().clamp(min=1)


@pytest.mark.parametrize('case', CASES + MORE)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_errors_stay_within_twice_those_of_torch(case, dtype, few_parts, poisoned_memory):
    check_errors(case, dtype)


def test_as_many_parts_as_a_device_needs(poisoned_memory):
    check_errors(CASES[0], torch.float32)


def test_prefix_tokens_get_no_gradient_and_repeats_are_identical(few_parts):
    inputs, how = make_inputs(MORE[0], torch.float32)
    inputs = [t.to(DEVICE) for t in inputs]
    _, grads, first = run_kernels(inputs, how)
    assert not first[0][:, 0].any() and first[0][:, 1:].any()
    for a, b in zip(first, run_kernels(inputs, how, grads)[2], strict=True):
        assert torch.equal(a, b)


def test_weights_of_any_strides(few_parts):
    inputs, how = make_inputs(CASES[2], torch.float32)
    inputs = [t.to(DEVICE) for t in inputs]
    _, grads, first = run_kernels(inputs, how)
    inputs[3] = inputs[3].to(memory_format=torch.channels_last)
    for a, b in zip(first, run_kernels(inputs, how, grads)[2], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize('dtype,form', fewer(
    itertools.product([torch.float32, torch.bfloat16], ['tokens', 'nchw', 'nhwc']), 2))
def test_the_whole_layer_is_its_parts(dtype, form, few_parts):
    inputs, (height, width, *how) = make_inputs(CASES[0], dtype, weight_dtype=torch.float32)
    prefix = CASES[0][0][0]
    if form != 'tokens':
        inputs = [inputs[0][:, prefix:].transpose(1, 2).unflatten(2, (height, width)), *inputs[1:]]
        layout = torch.channels_last if form == 'nhwc' else torch.contiguous_format
        inputs[0], prefix = inputs[0].contiguous(memory_format=layout), 0
    inputs = [t.to(DEVICE).requires_grad_() for t in (*inputs, torch.linspace(-1, 2, inputs[1].shape[1]))]
    args = (None, prefix, height, width, *how, 'triton')
    y = torch.ops.cpool_vision.context_pool_layer_fused(*inputs, *args)[0]
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y)
    made = torch.autograd.grad(y, inputs, grad)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    expected = compose_layer(*exact, *args[:-1], 'reference')
    wanted = torch.autograd.grad(expected, exact, grad.double())
    assert y.dtype == dtype and [t.dtype for t in made] == [t.dtype for t in inputs]

    def error(found, wants):
        return (sum((got.double() - want).square().sum() for got, want in zip(found, wants, strict=True)).sqrt()
                / sum(want.square().sum() for want in wants).sqrt())
    if dtype == torch.float32:
        # that of the logits' bias is a sum of terms that almost cancel
        assert all(error([got], [want]) <= 5e-5 for got, want in zip((y, *made), (expected, *wanted), strict=True))
    else:  # by the whole gradient: the interpreter truncates bf16, which sums over a map feel most
        assert error([y], [expected]) <= .05 and error(made, wanted) <= .1


@pytest.mark.skipif(DEVICE == 'cpu', reason='needs CUDA')
def test_needs_cuda_and_is_what_a_layer_takes():
    from torch.profiler import profile

    from cpool_vision.layers import TokenContextPool
    pool = TokenContextPool(32, 1, grid_size=(4, 4)).cuda()
    with profile() as seen, torch.autocast('cuda', torch.bfloat16):
        pool(torch.randn(2, 17, 32, device='cuda')).float().sum().backward()
    assert {'cpool_vision::context_pool_layer_fused', 'cpool_vision::context_pool_layer_fused_backward'} <= {
        e.name for e in seen.events()}
