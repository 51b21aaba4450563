"""The predictor as one operator, against the same by torch's operators."""
import pytest
import torch

from cpool_vision.ops.predictor import compose_maps

OP = torch.ops.cpool_vision.predict_maps
FUSED = torch.ops.cpool_vision.predict_maps_fused.default
# Prefix tokens, channels, hidden channels, height, width; groups, groups of supports, stride, bound, ratio, floor
CASES = [
    ((1, 6, 3, 4, 5), (2, 1, 1, 8., .3, .1)),
    ((0, 4, 2, 3, 3), (1, 1, 2, 0., .3, .1)),
    ((2, 5, 4, 1, 2), (2, 2, 1, 3., .4, .2)),
]


def make_inputs(case, dtype=torch.float64, batch=2, weight_dtype=None):
    (prefix, channels, hidden, height, width), how = case
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, scale=1.):
        return torch.randn(shape, generator=generator, dtype=torch.float64) * scale
    rows = how[0] + how[1]
    x = draw(batch, prefix + height * width, channels).to(dtype)
    weights = [draw(hidden, channels, 1, 1, scale=channels ** -.5), draw(hidden), draw(rows, hidden, 3, 3), draw(rows)]
    return (x, *(w.to(weight_dtype or dtype) for w in weights)), (height, width, *how)


@pytest.mark.parametrize('case', CASES)
def test_values_and_gradients_are_those_of_torch_s_operators(case):
    inputs, how = make_inputs(case)
    inputs = tuple(t.requires_grad_() for t in inputs)
    expected = compose_maps(*inputs, *how)
    maps = FUSED(*inputs, *how)[:2]
    torch.testing.assert_close(maps, expected)
    torch.testing.assert_close(OP(*inputs, *how), expected)
    grads = [torch.randn_like(t) for t in expected]
    torch.testing.assert_close(torch.autograd.grad(maps, inputs, grads), torch.autograd.grad(expected, inputs, grads))


@pytest.mark.parametrize('case', CASES[1:])
def test_derivatives_by_differences_to_the_second_order(case):
    inputs, how = make_inputs(case)
    inputs = tuple(t.requires_grad_() for t in inputs)
    assert torch.autograd.gradcheck(lambda *t: FUSED(*t, *how)[:2], inputs)
    assert torch.autograd.gradgradcheck(lambda *t: FUSED(*t, *how)[:2], inputs, fast_mode=True)


def test_weights_that_are_frozen_get_no_gradient():
    inputs, how = make_inputs(CASES[0])
    inputs[3].requires_grad_()
    expected, = torch.autograd.grad(sum(t.sum() for t in compose_maps(*inputs, *how)), inputs[3])
    made, = torch.autograd.grad(sum(t.sum() for t in FUSED(*inputs, *how)[:2]), inputs[3])
    torch.testing.assert_close(made, expected)


@pytest.mark.parametrize('case', CASES)
def test_is_an_operator(case):
    inputs, how = make_inputs(case)
    torch.library.opcheck(FUSED, (*(t.requires_grad_() for t in inputs), *how))


def test_half_precision_features_give_maps_in_fp32_and_gradients_as_their_inputs():
    inputs, how = make_inputs(CASES[0], torch.bfloat16, weight_dtype=torch.float32)
    inputs = tuple(t.requires_grad_() for t in inputs)
    maps = FUSED(*inputs, *how)[:2]
    assert [t.dtype for t in maps] == [torch.float32] * 2
    sum(t.sum() for t in maps).backward()
    assert [t.grad.dtype for t in inputs] == [t.dtype for t in inputs]


@pytest.mark.parametrize('channels_first', [False, True])
def test_maps_of_either_layout_are_read_as_they_lie(channels_first):
    (x, *weights), how = make_inputs(CASES[1])
    other = x.transpose(1, 2).contiguous().transpose(1, 2) if channels_first else x
    torch.testing.assert_close(OP(other, *weights, *how), FUSED(x, *weights, *how)[:2])


def test_compiled_exported_and_transformed():
    inputs, how = make_inputs(CASES[0], torch.float32)
    expected = compose_maps(*inputs, *how)

    class Module(torch.nn.Module):
        def forward(self, *inputs):
            return OP(*inputs, *how)

    for module in (torch.compile(Module(), fullgraph=True, backend='aot_eager', dynamic=True),
                   torch.export.export(Module(), inputs).module()):
        torch.testing.assert_close(module(*inputs), expected)
    x, *weights = inputs
    stacked = [torch.stack([w, 2 * w]) for w in weights]
    mapped = torch.func.vmap(lambda *w: OP(x, *w, *how))(*stacked)
    torch.testing.assert_close([t[0] for t in mapped], list(expected))
    torch.testing.assert_close([t[1] for t in mapped], list(OP(x, *(2 * w for w in weights), *how)))
    tangents = tuple(torch.randn_like(t) for t in inputs)
    torch.testing.assert_close(torch.func.jvp(lambda *t: OP(*t, *how), inputs, tangents)[1],
                               torch.func.jvp(lambda *t: compose_maps(*t, *how), inputs, tangents)[1])
