"""The Triton kernels of the predictor's maps: on a CUDA device or under the interpreter, as test_triton_kernels.py."""
import pytest
import torch
from test_operator_maps import CALLS, SIZES, make_raw
from test_triton_kernels import DEVICE
from test_triton_kernels import pytestmark as pytestmark

from cpool_vision.ops.maps import make_maps, make_maps_backward


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('call,rest', CALLS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_triton_kernels_are_the_formula(call, rest, size, dtype, memory_format):
    from cpool_vision.ops.triton.maps import fill_gradient, fill_maps
    raw = make_raw(call, rest, size, dtype, memory_format).to(DEVICE)
    expected = make_maps(raw, *call)
    maps = tuple(torch.full(t.shape, torch.nan, device=DEVICE) for t in expected)
    _, _, stride, bound, ratio, floor = call
    largest = ratio * raw[0, 0].numel() ** .5
    fill_maps(raw, *maps, stride, bound, largest, floor)
    torch.testing.assert_close(maps, expected)
    grads = [torch.randn_like(t).transpose(2, 3).contiguous().transpose(2, 3) for t in maps]
    grad = torch.full_like(raw, torch.nan)
    fill_gradient(*grads, *maps, grad, stride, bound, largest, floor)
    torch.testing.assert_close(grad, make_maps_backward(
        *grads, *maps, raw.shape[1], False, dtype, stride, bound, ratio, floor), atol=1e-5, rtol=1e-2)
