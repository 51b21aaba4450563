"""What the operator receives in the block of every family under autocast, and how exact a step stays."""
import pytest
import timm
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.autocast_gradients import error
from cpool_vision.layers import ContextPool2d

MICRO = (
    'convnext_micro_cpool_32', 'naflexvit_micro_cpool_patch4_gap', 'poolformer_micro_cpool_32',
    'resnet_micro_cpool_32', 'swin_micro_cpool_patch2_window4_32', 'vit_micro_cpool_patch4_32')


class KernelDtypes(TorchDispatchMode):
    """Records the dtypes of the tensors that kernels of the operator receive."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.name() == 'cpool_vision::context_pool_layer_fused':  # which makes the maps itself
            self.seen.add(tuple(t.dtype for t in (args[0], *out[1:3])))
        elif 'cpool_vision::context_pool' in func.name() and 'backward' not in func.name():
            self.seen.add(tuple(arg.dtype for arg in args if isinstance(arg, torch.Tensor)))
        return out


def kernel_dtypes(model, x, dtype=None):
    with KernelDtypes() as mode, torch.autocast('cpu', dtype or torch.bfloat16, enabled=dtype is not None):
        y = model(x)
    return y.dtype, mode.seen


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('init', ['paper', 'identity'])
@pytest.mark.parametrize('name', MICRO)
def test_kernels_receive_features_in_half_precision_and_maps_in_fp32(name, init, dtype):
    model = timm.create_model(name, cpool_init=init)
    x = torch.randn(1, 3, 32, 32)
    full = torch.float32
    assert kernel_dtypes(model, x, dtype) == (dtype, {(dtype, full, full)})
    assert kernel_dtypes(model, x)[1] == {(full, full, full)}


@pytest.mark.parametrize('name', MICRO)
def test_a_stream_that_is_pooled_keeps_its_dtype(name):
    if 'vit' not in name and 'swin' not in name:
        pytest.skip('the stream itself is pooled in post_block only')
    model, plain = (timm.create_model(name, cpool_positions=p) for p in ('post_block', 'none'))
    dtypes = []
    for each in (model, plain):
        block = each.layers[2].blocks[0] if name.startswith('swin') else each.blocks[0]
        block.register_forward_hook(lambda module, args, y: dtypes.append((args[0].dtype, y.dtype)))
        with torch.autocast('cpu', torch.bfloat16):
            each(torch.randn(1, 3, 32, 32))
    assert dtypes[0] == dtypes[1]


def test_fp64_stays_and_gradients_have_the_dtypes_of_the_inputs():
    def call(x, logits, sigma):
        inputs = [t.requires_grad_() for t in (x, logits, sigma)]
        with torch.autocast('cpu', torch.bfloat16):
            y = torch.ops.cpool_vision.context_pool2d(*inputs)
        y.float().square().sum().backward()
        return y.dtype, [t.grad.dtype for t in inputs]

    x, maps = torch.randn(1, 4, 5, 5), torch.rand(2, 1, 2, 5, 5) + .5
    assert call(x.clone(), *maps.clone()) == (torch.bfloat16, [torch.float32] * 3)
    assert call(x.bfloat16(), *maps.bfloat16()) == (torch.bfloat16, [torch.bfloat16] * 3)
    assert call(x.double(), *maps.double()) == (torch.float64, [torch.float64] * 3)


def test_compiled_and_exported_pools_do_as_eager():
    class Inside(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.pool = ContextPool2d(16, ratio=.4)

        def forward(self, x):
            with torch.autocast('cpu', torch.bfloat16):
                return self.pool(x)

    model, x = Inside(), torch.randn(2, 16, 6, 6)
    y = model(x)
    assert y.dtype == torch.bfloat16
    for other in (torch.compile(model, fullgraph=True, backend='aot_eager'), torch.export.export(model, (x,)).module()):
        torch.testing.assert_close(other(x), y)  # dtypes are compared too
    with torch.autocast('cpu', torch.bfloat16):
        compiled = torch.compile(model.pool, fullgraph=True, backend='aot_eager')(x)
        exported = torch.export.export(model.pool, (x,)).module()(x)
    torch.testing.assert_close(compiled, y)
    torch.testing.assert_close(exported, y)


@pytest.mark.parametrize('name', ['vit_micro_cpool_patch4_32', 'resnet_micro_cpool_32'])
def test_a_step_is_as_exact_as_that_of_the_base(name):
    base, variant = (error(name, torch.float32, True, **kwargs) for kwargs in ({'cpool_positions': 'none'}, {}))
    assert 0 < variant < 2 * base < 1
