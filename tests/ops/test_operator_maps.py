"""Weight logits and supports from the predictor's output: the operator against its plain formula."""
import pytest
import torch

from cpool_vision.ops.maps import make_maps

OP = torch.ops.cpool_vision.supports_and_logits
FUSED = torch.ops.cpool_vision.supports_and_logits_fused.default
# groups, groups of supports, stride, bound, ratio, floor; and further rows
CALLS = [((1, 1, 1, 8., .25, .1), 0), ((4, 2, 1, 3., .1, .3), 0),
         ((2, 2, 2, 0., .4, .1), 0), ((2, 1, 3, 8., .3, .1), 4)]
SIZES = [(1, 1), (6, 7), (3, 10)]


def make_raw(call, rest, size, dtype=torch.float64, memory_format=torch.contiguous_format):
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(2, call[0] + call[1] + rest, *size, generator=generator, dtype=torch.float64) * 4
    return raw.to(dtype).to(memory_format=memory_format)


def plain(raw, groups, supports, stride, bound, ratio, floor):
    logits = raw[:, :groups]
    s = torch.sigmoid(raw[:, groups:groups + supports, ::stride, ::stride])
    return bound * torch.tanh(logits / bound) if bound else logits, floor + ratio * raw[0, 0].numel() ** .5 * s


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('call,rest', CALLS)
def test_values_and_gradients_are_those_of_the_formula(call, rest, size):
    raw = make_raw(call, rest, size).requires_grad_()
    expected = plain(raw, *call)
    grads = [torch.randn_like(t) for t in expected]
    d_expected, = torch.autograd.grad(expected, raw, grads)
    for function in (OP, FUSED, make_maps):
        maps = function(raw, *call)
        torch.testing.assert_close(maps, expected)
        torch.testing.assert_close(torch.autograd.grad(maps, raw, grads)[0], d_expected)


@pytest.mark.parametrize('call,rest', CALLS)
def test_derivatives_by_differences_to_the_second_order(call, rest):
    raw = make_raw(call, rest, (3, 2)).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: FUSED(t, *call), raw)
    assert torch.autograd.gradgradcheck(lambda t: FUSED(t, *call), raw)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_maps_are_in_fp32_and_the_gradient_as_its_input(dtype, memory_format):
    call, rest = CALLS[1]
    raw = make_raw(call, rest, (6, 7), dtype, memory_format).requires_grad_()
    maps, expected = OP(raw, *call), plain(raw.double(), *call)
    assert all(t.dtype == torch.float32 and t.is_contiguous() for t in maps)
    torch.testing.assert_close(maps, tuple(t.float() for t in expected), rtol=1e-5, atol=1e-6)
    grads = [torch.randn_like(t) for t in maps]
    grad, = torch.autograd.grad(maps, raw, grads)
    assert grad.dtype == dtype and grad.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(grad, torch.autograd.grad(expected, raw, [g.double() for g in grads])[0].to(dtype),
                               rtol=1e-2 if dtype == torch.bfloat16 else 2e-3, atol=1e-5)


@pytest.mark.parametrize('call,rest', CALLS)
def test_is_an_operator(call, rest):
    torch.library.opcheck(FUSED, (make_raw(call, rest, (4, 5)).requires_grad_(), *call))
    torch.library.opcheck(OP, (make_raw(call, rest, (4, 5)).requires_grad_(), *call),
                          test_utils=('test_schema', 'test_faketensor'))


def test_compiled_exported_and_transformed():
    call, rest = CALLS[3]
    raw = make_raw(call, rest, (6, 7), torch.float32)
    expected = plain(raw, *call)

    class Module(torch.nn.Module):
        def forward(self, raw):
            return OP(raw, *call)

    for module in (torch.compile(Module(), fullgraph=True, backend='aot_eager', dynamic=True),
                   torch.export.export(Module(), (raw,)).module()):
        torch.testing.assert_close(module(raw), expected)
    mapped = torch.func.vmap(lambda t: OP(t, *call), in_dims=1)(torch.stack([raw, -raw], 1))
    torch.testing.assert_close([t[0] for t in mapped], list(expected))
    tangent = torch.randn_like(raw)
    moved = torch.func.jvp(lambda t: OP(t, *call), (raw,), (tangent,))[1]
    torch.testing.assert_close(moved, torch.func.jvp(lambda t: plain(t, *call), (raw,), (tangent,))[1])


@pytest.mark.parametrize('raw,stride,error,message', [
    (torch.zeros(1, 2, 3, 3, dtype=torch.long), 1, TypeError, r'raw must be floating point, got torch.int64'),
    (torch.zeros(1, 1, 3, 3), 1, ValueError, r'raw must have shape \(B, 2 or more, H, W\) .*, got \(1, 1, 3, 3\)'),
    (torch.zeros(2, 3, 3), 1, ValueError, r'raw must have shape .*, got \(2, 3, 3\)'),
    (torch.zeros(1, 2, 3, 3), 0, ValueError, r'stride must be >= 1, got stride=0'),
])
def test_bad_arguments_are_named(raw, stride, error, message):
    for function in (OP, FUSED):
        with pytest.raises(error, match=message):
            function(raw, 1, 1, stride, 8., .1, .1)
