"""The whole layer as one operator: values and gradients are those of its parts."""
import itertools

import pytest
import torch
from ops_testing import NO_COMPILER
from torch.utils.flop_counter import FlopCounterMode

from cpool_vision.ops import layer
from cpool_vision.ops.layer import compose_layer
from cpool_vision.ops.tiled import tiled_backward, tiled_forward

LAYER = torch.ops.cpool_vision.context_pool_layer
FUSED = torch.ops.cpool_vision.context_pool_layer_fused.default
FORMS = ('tokens', 'nchw', 'nhwc')
GATES = ('none', 'input', 'base')
# Form, gate, stride, prefix tokens, groups and groups of supports
CASES = [
    *((form, gate, 1, 0, 2, 2) for form, gate in itertools.product(FORMS, GATES)),
    ('tokens', 'none', 1, 2, 4, 2), ('tokens', 'input', 1, 1, 1, 1),
    ('nchw', 'base', 2, 0, 4, 1), ('nhwc', 'none', 2, 0, 1, 1), ('nhwc', 'base', 3, 0, 2, 1)]
needs_compiler = pytest.mark.skipif(NO_COMPILER, reason='no C compiler')


def make_case(form, gate, stride, prefix, groups, supports, dtype=torch.float32, base_dtype=None, size=(5, 7)):
    """Tensors and further arguments of the operator, and a gradient of its output."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)
    height, width = size
    out = -(-height // stride), -(-width // stride)
    x, base = (draw(2, prefix + height * width, 8) if form == 'tokens' else draw(2, 8, *s) for s in (size, out))
    if form == 'nhwc':
        x, base = (t.to(memory_format=torch.channels_last) for t in (x, base))
    weights = [draw(3, 8, 1, 1), draw(3), draw(groups + supports, 3, 3, 3), draw(groups + supports)]
    gamma, base = None if gate == 'none' else draw(8), base if gate == 'base' else None
    tensors = [t if t is None else t.to(dtype) for t in (x, *weights, gamma, base)]
    if base is not None:
        tensors[-1] = base.to(base_dtype or dtype)
    for tensor in tensors:
        if tensor is not None:
            tensor.requires_grad_()
    grad = draw(*(x.shape if form == 'tokens' else (2, 8, *out))).to(tensors[-1].dtype if gate == 'base' else dtype)
    return tensors, (prefix, height, width, groups, supports, stride, 8., .3, .1), grad


def gradients(y, tensors, grad):
    return torch.autograd.grad(y, [t for t in tensors if t is not None], grad)


@needs_compiler
@pytest.mark.parametrize('case', CASES)
def test_values_and_gradients_are_those_of_the_parts(case):
    tensors, how, grad = make_case(*case)
    with FlopCounterMode(display=False) as counted:
        y = FUSED(*tensors, *how, 'native')[0]
        made = gradients(y, tensors, grad)
    with FlopCounterMode(display=False) as counted_parts:
        expected = compose_layer(*tensors, *how, 'native')
        parts = gradients(expected, tensors, grad)
    assert torch.equal(LAYER(*tensors, *how), y)
    assert y.stride() == expected.stride() and made[0].stride() == tensors[0].stride()
    for got, want in zip((y, *made), (expected, *parts), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)
    assert counted.get_total_flops() == counted_parts.get_total_flops()


@needs_compiler
@pytest.mark.parametrize('case', CASES[::3])
def test_half_precision_features_under_a_gate_of_a_base_in_fp32(case):
    form, _, stride, *more = case
    case = form, 'base', stride, *more
    tensors, how, grad = make_case(*case, dtype=torch.bfloat16, base_dtype=torch.float32)
    tensors[1:6] = [t.detach().float().requires_grad_() for t in tensors[1:6]]
    y = FUSED(*tensors, *how, 'native')[0]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    expected = compose_layer(*exact, *how, 'reference')
    with torch.autocast('cpu', torch.bfloat16):
        parts = compose_layer(*tensors, *how, 'native')
    assert y.dtype == parts.dtype == torch.float32
    made = gradients(y, tensors, grad)
    assert [t.dtype for t in made] == [t.dtype for t in tensors]
    exact_gradients = gradients(expected, exact, grad.double())

    def error(found):
        return sum((t.double() - want).square().sum() for t, want in zip(found, exact_gradients, strict=True)).sqrt()
    assert error(made) <= 2 * error(gradients(parts, tensors, grad))
    assert (y - expected).norm() <= .01 * expected.norm()


def tiled_runs(backend):
    """`tiled` in the place of the kernels, which know no fp64."""
    def forward(*args, out=None):
        y = tiled_forward(*args)[0]
        return y if out is None else out.copy_(y)

    def backward(grad, *args, dx=None):
        *inputs, stride = args
        made = tiled_backward(grad, *inputs, tiled_forward(*args)[1], stride)[:3]
        return made if dx is None else (dx.copy_(made[0]), *made[1:])
    return forward, backward


@pytest.mark.parametrize('case', CASES)
def test_derivatives_by_differences(case, monkeypatch):
    monkeypatch.setattr(layer, '_runs', tiled_runs)
    tensors, how, grad = make_case(*case, dtype=torch.float64, size=(3, 4))
    given = [t for t in tensors if t is not None]

    def run(*values):
        rest = iter(values)
        return FUSED(*(None if t is None else next(rest) for t in tensors), *how, 'native')[0]
    assert torch.autograd.gradcheck(run, given, fast_mode=True)
    torch.testing.assert_close(run(*given), compose_layer(*tensors, *how, 'reference'))


@needs_compiler
def test_a_closed_gate_returns_its_input_and_opens():
    tensors, how, grad = make_case('nchw', 'input', 1, 0, 2, 2)
    x, gamma = tensors[0], tensors[5]
    with torch.no_grad():
        gamma.zero_()
    y = LAYER(*tensors, *how)
    made = gradients(y, tensors[:6], grad)
    assert torch.equal(y, x) and torch.equal(made[0], grad)
    assert not any(g.any() for g in made[1:5]) and made[5].all()


@needs_compiler
def test_nothing_is_kept_that_can_be_made_again():
    tensors, how, _ = make_case('nhwc', 'input', 1, 0, 2, 2)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = LAYER(*tensors, *how)
    assert not any(t.data_ptr() == y.data_ptr() for t in saved)
    of_x = [t for t in saved if t.shape == tensors[0].shape]
    assert len(of_x) == 1 and of_x[0].data_ptr() == tensors[0].data_ptr()


@needs_compiler
def test_is_an_operator_without_second_derivative():
    tensors, how, _ = make_case('tokens', 'input', 1, 2, 2, 2)
    torch.library.opcheck(FUSED, (*tensors, *how, 'native'), test_utils=('test_schema', 'test_autograd_registration'))
    y = FUSED(*tensors, *how, 'native')[0]
    with pytest.raises(NotImplementedError, match="second derivative; use backend='reference'"):
        torch.autograd.grad(torch.autograd.grad(y.sum(), tensors[0], create_graph=True)[0].sum(), tensors[0])


@pytest.mark.parametrize('form', FORMS)
def test_compiled_exported_and_transformed(form):
    tensors, how, _ = make_case(form, 'input', 1, 0, 2, 2)
    tensors = [t.detach() for t in tensors[:6]]
    expected = LAYER(*tensors, None, *how)

    class Module(torch.nn.Module):
        def forward(self, *inputs):
            return LAYER(*inputs, None, *how)

    for module in (torch.compile(Module(), fullgraph=True, backend='aot_eager'),
                   torch.export.export(Module(), tuple(tensors)).module()):
        torch.testing.assert_close(module(*tensors), expected)
    stacked = torch.stack([tensors[0], 2 * tensors[0]])
    mapped = torch.func.vmap(lambda x: LAYER(x, *tensors[1:], None, *how))(stacked)
    torch.testing.assert_close(mapped[0], expected)
    assert torch.func.grad(lambda gamma: LAYER(*tensors[:5], gamma, None, *how).sum())(tensors[5]).all()
